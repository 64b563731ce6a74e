"""The worker: `celery -A worker worker` renders jobs from Redis and puts the pictures in S3.

The file list is the architecture. The contract that both sides share: `job`, `errors`, `settings`,
`records`, `fleet`. Delivery: `celery`, `transport`, `tasks`. The loop: `engine`, `batcher`, `step_cost`,
`images`, `storage`, `storage_process`. All of torch: `model_runner`, of which `render` is a job on board,
`denoiser` the step, `compiler` and `graphs` what makes it fast, `decoder` what comes after it; under them
`pipeline`, `attention`, `samplers`, `text`.
"""
