"""Which jobs take the next step, without torch: `engine` is the door, `runner` what it asks of a device."""
