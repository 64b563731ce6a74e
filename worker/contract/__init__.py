"""What producers and workers share: `job` is the door, `message` what travels, `record` what is known."""
