"""The S3 bucket: `bucket` is the door, `bucket_process` does the same in a process of its own."""
