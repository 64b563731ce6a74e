"""Valkey, an S3 server, workers and the HTTP API together: one object to start, use and stop them.

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
from deploy.embedded.servers import HttpProcess, S3Process, ValkeyProcess, WorkerProcess

#: The bucket that every stack has.
BUCKET = "smallcat"
#: Variables that are not passed on from the user's shell, by their start: they name other servers and keys.
_FOREIGN = ("AWS_", "CELERY_", "FLOWER_", "RCLONE_", "S3_", "REDIS_")


def clean_environment() -> dict[str, str]:
    """This process' environment without other people's servers and credentials.

    `SMALLCAT_*` stays, so that a user can choose the worker's model.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_FOREIGN)}
    # The local bucket must not be reached through a proxy.
    for name in ("NO_PROXY", "no_proxy"):
        kept[name] = ",".join(filter(None, (kept.get(name), HOST, "localhost")))
    # boto3 would also read settings and credentials from these files, and from EC2's metadata service.
    nowhere = {"AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull}
    return {**kept, **nowhere, "AWS_EC2_METADATA_DISABLED": "true"}


class Stack:
    """A queue, a bucket and `workers` workers, started and stopped together.

    `http` starts the HTTP API as well, with a key that may do everything; with `webhooks` it tells webhooks.
    `data` is a folder that keeps queue and pictures between runs; None: both are removed with the stack.
    `base` is the environment to which the workers' variables are added; None: `clean_environment()`.
    """

    def __init__(
        self,
        workers: int = 1,
        data: Path | None = None,
        base: Mapping[str, str] | None = None,
        *,
        http: bool = False,
        webhooks: bool = False,
    ) -> None:
        """Raises `StackError` when another stack is running in `data`."""
        self._base = dict(clean_environment() if base is None else base)
        self.home = Home(data)
        self.valkey = ValkeyProcess(self.home)
        self.s3 = S3Process(self.home)
        self.s3.create_bucket(BUCKET)
        #: The HTTP API; None where it is not wanted.
        self.http: HttpProcess | None = None
        if http:
            variables = lambda: {**self._base, **self._servers}  # noqa: E731 - valid once it is started
            self.http = HttpProcess(self.home, variables, webhooks=webhooks)
        #: The workers that `start` and `new_worker` have made.
        self.workers: list[WorkerProcess] = []
        self._workers_wanted = workers
        #: Called from a thread when a part ends by itself. Set it before `start`.
        self.on_loss: Callable[[Process], None] | None = None

    @property
    def parts(self) -> list[Process]:
        """All parts, in the order in which they start."""
        return [self.valkey, self.s3, *([self.http] if self.http else []), *self.workers]

    @property
    def variables(self) -> dict[str, str]:
        """The environment variables that a client needs to use the stack. Valid once it is started."""
        if self.http is None:
            return self._servers
        api = {"SMALLCAT_HTTP_URL": self.http.url, "SMALLCAT_HTTP_KEY": self.http.key}
        return {**self._servers, **api, **self.http.of_webhooks}

    @property
    def _servers(self) -> dict[str, str]:
        """The variables that name the queue and the bucket."""
        return {"REDIS_URL": self.valkey.url, **self.s3.environment(BUCKET)}

    @property
    def environment(self) -> dict[str, str]:
        """The whole environment of a client's process. Valid once the stack is started."""
        return {**self._base, **self.variables}

    def start(self, on_ready: Callable[[Process], None] = lambda part: None) -> None:
        """Start all parts, and return when all are ready. Each that is ready is passed to `on_ready`.

        Raises `StackError`. Call `stop` then, too: it ends the parts that were started.
        """
        for server in (self.valkey, self.s3):
            server.on_loss = self.on_loss
            server.start()
            on_ready(server)
        for worker in [self.new_worker() for _ in range(self._workers_wanted)]:
            worker.launch()
        if self.http is not None:
            # While the workers load their model.
            self.http.on_loss = self.on_loss
            self.http.register_key(self.valkey.url)
            self.http.start()
            on_ready(self.http)
        for worker in self.workers:
            worker.wait_ready()
            on_ready(worker)

    def new_worker(self, settings: Mapping[str, str] | None = None) -> WorkerProcess:
        """One more worker of this stack, not yet started, with `settings` added to its environment."""
        environment = {
            # So that stopping the stack does not take as long as the slowest job.
            "SMALLCAT_DRAIN_S": "2",
            # By default OpenMP's threads spin while they wait for each other. On two idle cores that saves
            # 0.2 s a picture; where other processes need the cores, as here, it costs many seconds.
            "OMP_WAIT_POLICY": "PASSIVE",
            **self._base,
            **self._servers,
            **(settings or {}),
        }
        worker = WorkerProcess(self.home, f"worker{len(self.workers) + 1}", environment)
        worker.on_loss = self.on_loss
        self.workers.append(worker)
        return worker

    def stop(self) -> None:
        """End all parts, workers before the servers that they use, and return when all have ended.

        Gracefully where data are kept; at once where they are removed anyway.
        """
        if not self.home.kept:
            self.kill_now()
        for part in (*self.workers, *([self.http] if self.http else [])):
            part.ask_to_end()
        for worker in self.workers:
            worker.stop()
        if self.http is not None:
            self.http.stop()
        for server in (self.valkey, self.s3):
            server.stop()
        self.home.close()

    def kill_now(self) -> None:
        """Send SIGKILL to all parts without waiting. A `stop` in another thread then returns at once."""
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
