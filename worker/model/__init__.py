"""From files to a pipeline on a device: `loader` is the door."""
