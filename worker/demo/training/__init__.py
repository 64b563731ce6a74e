"""What made the bundled model, for a checkout only: `train` and `evaluate` are the doors."""
