"""diffusers' noise schedulers as weights of one formula: `samplers` is the door."""
