"""From a prompt file's bytes to job fields: `reader` is the door."""
