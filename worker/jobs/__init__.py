"""The way of one job through a worker, and the worker's heartbeat: `handler` is the door."""
