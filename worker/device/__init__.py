"""The model on its device, a step of mixed jobs at a time: `model_runner` is the door."""
