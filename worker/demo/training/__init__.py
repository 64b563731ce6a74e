"""The training of the bundled model, in a checkout only: `train` makes the model and `evaluate` scores it."""
