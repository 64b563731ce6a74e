"""What other tools write into their pictures, as job fields: `job_from_image` is the door."""
