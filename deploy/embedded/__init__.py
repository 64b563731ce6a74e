"""The embedded stack: Valkey, an S3 server and workers from Python wheels alone. `stack` is the door."""
