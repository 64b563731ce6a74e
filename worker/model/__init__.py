"""Loads a model's files into a pipeline on a device: `loader` is the door."""
