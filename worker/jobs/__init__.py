"""The way of one job through a worker: `handler` is the door."""
