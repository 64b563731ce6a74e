"""Valkey, an S3 server and workers, together: one object to start, use and stop them.

with Stack(workers=2) as stack:
    subprocess.run([...], env=stack.environment)
    stack.valkey.kill()
    stack.valkey.start()  # same port, password and data
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Self

from deploy.embedded.home import HOST, Home
from deploy.embedded.process import Process
from deploy.embedded.servers import S3Process, ValkeyProcess, WorkerProcess

#: The bucket that every stack has.
BUCKET = "smallcat"
#: What may not leak from the user's shell into a stack: other servers, other credentials, other settings.
_FOREIGN = ("AWS_", "CELERY_", "FLOWER_", "RCLONE_", "S3_", "REDIS_")


def clean_environment() -> dict[str, str]:
    """This process' environment without other people's servers and credentials.

    `SMALLCAT_*` stays, so that a user can choose the worker's model.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_FOREIGN)}
    # A proxy that is set for the outside world would be asked for the local bucket.
    for name in ("NO_PROXY", "no_proxy"):
        kept[name] = ",".join(filter(None, (kept.get(name), HOST, "localhost")))
    # boto3 looks for settings and credentials in more places than the environment.
    nowhere = {"AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull}
    return {**kept, **nowhere, "AWS_EC2_METADATA_DISABLED": "true"}


class Stack:
    """A queue, a bucket and `workers` workers that live and end together.

    `data` is a folder that keeps queue and pictures between runs; without one, both end with the stack.
    `base` is the environment that the workers' own is built on; without one, `clean_environment()`.
    """

    def __init__(
        self, workers: int = 1, data: Path | None = None, base: Mapping[str, str] | None = None
    ) -> None:
        """Raises `StackError` when another stack is running in `data`."""
        self._base = dict(clean_environment() if base is None else base)
        self.home = Home(data)
        self.valkey = ValkeyProcess(self.home)
        self.s3 = S3Process(self.home)
        self.s3.create_bucket(BUCKET)
        #: Started by `start` or `add_worker`.
        self.workers: list[WorkerProcess] = []
        self._workers_wanted = workers
        #: Called from a thread when a part ends although nobody asked it to. Set it before `start`.
        self.on_loss: Callable[[Process], None] | None = None

    @property
    def parts(self) -> list[Process]:
        """All parts, in the order in which they start."""
        return [self.valkey, self.s3, *self.workers]

    @property
    def coordinates(self) -> dict[str, str]:
        """The variables that say where the stack is: all that a client needs. Known once it is started."""
        return {"REDIS_URL": self.valkey.url, **self.s3.environment(BUCKET)}

    @property
    def environment(self) -> dict[str, str]:
        """A whole environment for a client's process."""
        return {**self._base, **self.coordinates}

    def start(self, on_ready: Callable[[Process], None] = lambda part: None) -> None:
        """Start all parts, and return when all are ready; `on_ready` is called with each that is.

        Raises `StackError`, and then nothing is left running that `stop` does not end.
        """
        for server in (self.valkey, self.s3):
            server.on_loss = self.on_loss
            server.start()
            on_ready(server)
        for worker in [self.new_worker() for _ in range(self._workers_wanted)]:
            worker.launch()
        for worker in self.workers:
            worker.wait_ready()
            on_ready(worker)

    def new_worker(self, settings: Mapping[str, str] | None = None) -> WorkerProcess:
        """One more worker of this stack, with `settings` in its environment, still to be started."""
        environment = {
            # Stopping the stack should not take as long as the slowest job.
            "SMALLCAT_DRAIN_S": "2",
            # OpenMP's threads wait for each other by spinning, unless told to sleep: 0.2 s less for a picture
            # on two idle cores, but many seconds more where other processes want them, as they do here.
            "OMP_WAIT_POLICY": "PASSIVE",
            **self.environment,
            **(settings or {}),
        }
        worker = WorkerProcess(self.home, f"worker{len(self.workers) + 1}", environment)
        worker.on_loss = self.on_loss
        self.workers.append(worker)
        return worker

    def stop(self) -> None:
        """End all parts, workers before the servers that they use. Nothing is left running afterwards.

        Gracefully where data are kept; else there is nothing to bring to an end.
        """
        if not self.home.kept:
            self.kill_now()
        for worker in self.workers:
            worker.ask_to_end()
        for worker in self.workers:
            worker.stop()
        for server in (self.valkey, self.s3):
            server.stop()
        self.home.close()

    def kill_now(self) -> None:
        """Send SIGKILL to all parts without waiting; a `stop` under way then returns at once."""
        for part in self.parts:
            part.kill_now()

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
