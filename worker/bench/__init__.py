"""The benchmark for users, on any GPU or CPU, of any model that a worker serves: `__main__` is the door."""
