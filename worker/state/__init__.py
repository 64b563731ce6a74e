"""Jobs and workers in Redis: `records` and `fleet` are the doors, `redis_client` the connection."""
