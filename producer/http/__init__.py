"""The HTTP API: `smallcat serve`. `server` is the door, `app` has the routes; it needs the extra `http`."""
