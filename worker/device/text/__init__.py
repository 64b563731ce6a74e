"""A job's texts as conditions of its steps: `encoder` is the door."""
