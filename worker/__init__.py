"""The worker: `celery -A worker worker` renders jobs from Redis and puts the pictures in S3.

The file list is the architecture. The contract that both sides share: `job`, `errors`, `settings`,
`records`, `fleet`. Delivery: `celery`, `transport`, `tasks`. The loop: `engine`, `batcher`, `images`,
`storage`. All of torch: `model_runner`, `pipeline`, `attention`, `samplers`.
"""
