"""The worker: `celery -A worker worker` renders jobs from Redis and puts the pictures into S3.

`celery` is the app and `tasks` puts a process together; each folder says what is behind its door.
"""
