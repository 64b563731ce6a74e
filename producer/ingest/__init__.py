"""Feeding a run of prompt files: `submit_file` is the door."""
