"""Measures a model on the machine of the user, GPU or CPU: `__main__` is the door."""
