"""Steps compiled beside the serving, in another process, and kept for the fleet: `compiler` is the door."""
