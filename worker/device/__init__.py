"""A step on the device: `model_runner` is the door."""
