"""The worker: `celery -A worker worker` renders jobs from Redis and stores the pictures in S3.

`celery` is the app, and `tasks` assembles a process. Each folder says what it holds, and names its door.
"""
