"""Which job takes a step when, without torch: `engine` is the door, `runner` what it asks of a device."""
