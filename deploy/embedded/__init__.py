"""The embedded stack, of Python wheels alone: `stack` is the door."""
