"""The bucket: `bucket` is the door, `bucket_process` the same from a process of its own."""
