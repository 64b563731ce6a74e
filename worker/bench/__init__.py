"""The benchmark for users, on any GPU or CPU, of any model that a worker serves: `python -m worker.bench`."""
