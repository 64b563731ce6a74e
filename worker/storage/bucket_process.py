"""The bucket, with its requests made in a process of their own.

The three requests for a picture take more than half of the Python time that a worker spends on it. Only one
thread of a process runs Python at a time, so with jobs of few steps the thread that feeds the GPU would wait
for those that upload. Here a request costs the worker one message to the other process and one back
(docs/performance.md).
"""

from __future__ import annotations

import contextlib
import multiprocessing
import secrets
import signal
import sys
import threading
from collections.abc import Callable
from multiprocessing.managers import BaseManager
from typing import Any, cast

from worker.contract.child_process import end_with_parent
from worker.contract.choices import ImageFormat
from worker.contract.errors import StorageError
from worker.contract.job import Job
from worker.contract.plain_log import LogForm, log_form, set_up_log
from worker.storage.bucket import Bucket
from worker.storage.input_pixels import InputPixels
from worker.storage.options import BucketOptions


class _Manager(BaseManager):
    """The process. It has a thread for each thread that sends it requests."""


_Manager.register("storage", Bucket, exposed=("find", "put", "probe", "pixels_of"))


class BucketProcess(Bucket):
    """A `Bucket` whose `find`, `put`, `pixels_of` and `probe` another process does. Thread-safe.

    Raises as `Bucket` does.

    The process ends with this one, however this one ends. When it ends by itself, those who wait for it get a
    `StorageError`, and the next request starts another one.
    """

    def __init__(
        self,
        name: str,
        prefix: str = "",
        *,
        connections: int = 16,
        attempts: int = 8,
        options: BucketOptions = BucketOptions(),  # noqa: B008 - frozen
    ) -> None:
        super().__init__(name, prefix, connections=connections, attempts=attempts, options=options)
        self._starting = threading.Lock()
        #: A proxy, through which each thread has a connection of its own.
        self._remote: Any = None

    def start(self) -> None:
        """Start the process in the background: it takes a second, which the first request need not wait."""

        def begin() -> None:
            # The next request raises it.
            with contextlib.suppress(EOFError, OSError):
                self._started()

        threading.Thread(target=begin, name="storage", daemon=True).start()

    def find(self, job_id: str, image_format: ImageFormat, tenant: str = "") -> bytes | None:
        """As `Bucket.find`."""
        return cast("bytes | None", self._ask("find", job_id, image_format, tenant))

    def put(
        self,
        job_id: str,
        image_format: ImageFormat,
        picture: bytes,
        record: bytes,
        mime: str,
        tenant: str = "",
    ) -> None:
        """As `Bucket.put`."""
        self._ask("put", job_id, image_format, picture, record, mime, tenant)

    def pixels_of(self, job: Job) -> InputPixels:
        """As `Bucket.pixels_of`: unpacking a picture takes no Python from this process, either."""
        return cast("InputPixels", self._ask("pixels_of", job))

    def probe(self, size: int = 8, look: Callable[[str], object] = lambda uri: None) -> tuple[str, ...]:
        """As `Bucket.probe`, with the client, and so with the keys, of `find` and `put`. Nobody looks."""
        return cast("tuple[str, ...]", self._ask("probe", size))

    def _ask(self, method: str, *arguments: object) -> object:
        remote = None
        try:
            remote = self._started()
            return remote._callmethod(method, arguments)
        except (EOFError, OSError) as error:
            with self._starting:
                if self._remote is remote:
                    self._remote = None
            ended = f"The process for requests to the bucket has ended ({error!r})"
            raise StorageError(f"{ended}: the next request starts another one.") from error

    def _started(self) -> Any:
        with self._starting:
            if self._remote is None:
                manager = _Manager(_address(), ctx=multiprocessing.get_context("spawn"))
                manager.start(_begin, (log_form(),))
                self._remote = cast("Any", manager).storage(
                    self.name,
                    self._prefix.removesuffix("/"),
                    connections=self._connections,
                    attempts=self._attempts,
                    options=self._options,
                )
            return self._remote


def _address() -> str | None:
    """The socket's address: on Linux an abstract one, so that a process that is killed leaves no file."""
    return f"\0smallcat-storage-{secrets.token_hex(8)}" if sys.platform == "linux" else None


def _begin(form: LogForm) -> None:
    """Log as the worker does, and end with it."""
    set_up_log(form)
    # Signals to the group of both are for the worker.
    end_with_parent(signal.SIGTERM)
