"""A folder in the place of the bucket, for processes that tests and benchmarks start."""

from __future__ import annotations

import os
from pathlib import Path

from worker.contract.choices import ImageFormat
from worker.storage.bucket import Bucket


class InFolder(Bucket):
    """Puts objects into a folder instead, and reads there what jobs begin with."""

    #: The environment variable that names the folder.
    VARIABLE: str

    def start(self) -> None:
        """Nothing to start."""

    def find(self, job_id: str, image_format: ImageFormat, tenant: str = "") -> bytes | None:
        return self.record(job_id, tenant)

    def record(self, job_id: str, tenant: str = "") -> bytes | None:
        return self._bytes(self._key(job_id, "json", tenant))

    def _bytes(self, key: str) -> bytes | None:
        path = self._path(key)
        return path.read_bytes() if path.exists() else None

    def _put(self, key: str, body: bytes, mime: str) -> None:
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name}.{os.getpid()}")
        unfinished.write_bytes(body)
        unfinished.rename(path)

    @classmethod
    def _path(cls, key: str) -> Path:
        return Path(os.environ[cls.VARIABLE]) / key
