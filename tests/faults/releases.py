"""Other releases of smallcat beside this one: earlier commits, and the next one, which is made here.

The next release reads and writes messages of one more version, for the sake of one more job field, `tint`:
what CONTRIBUTING.md says about a new job parameter. Its fake renderer draws a job by it, too.
"""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import pytest
from PIL import Image

from tests.faults.app_names import MARKS
from tests.faults.harness import ROOT, Ground
from worker.contract.errors import QueueError
from worker.contract.job import FORMAT_VERSION, Job
from worker.state.parked import parked_lists

#: Version of messages that jobs with a tint need.
NEXT_VERSION = FORMAT_VERSION + 1
#: What the tint of a job adds to the grey of its picture.
TINT = 100

_FIELD = f"""\
    #: Of the next release: what is added to the picture's grey, 0 to 2.
    tint: Annotated[int, Field(ge=0, le=2, strict=True), JobField(since={NEXT_VERSION})] = 0
"""
#: Reads a job a line, submits it, and says its id or the queue's error.
_PRODUCER = """
import json, sys
from producer import submit_job
for line in sys.stdin:
    try:
        answer = {"id": submit_job(**json.loads(line)).id}
    except Exception as error:
        if type(error).__name__ != "QueueError":
            raise
        answer = {"error": str(error)}
    print(json.dumps(answer), flush=True)
"""


def earlier_release(commit: str, folder: Path) -> Path:
    """The tree of a commit, unpacked into `folder`. Skips the test where there is no such commit."""
    found = subprocess.run(["git", "archive", commit], cwd=ROOT, capture_output=True, check=False)
    if found.returncode:
        pytest.skip(f"This is no clone with the commit {commit}.")
    with tarfile.open(fileobj=io.BytesIO(found.stdout)) as tree:
        tree.extractall(folder, filter="data")
    return folder


def next_release(folder: Path) -> Path:
    """This tree in `folder`, with one more version of messages and one more job field."""
    for name in ("worker", "producer", "deploy", "tests"):
        ignored = shutil.ignore_patterns("__pycache__", "*.safetensors")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    job = folder / "worker/contract/job.py"
    text = job.read_text()
    job.write_text(
        _changed(text, f"FORMAT_VERSION = {FORMAT_VERSION}\n", f"FORMAT_VERSION = {NEXT_VERSION}\n")
    )
    parameters = job.with_name("job_parameters.py")
    text = parameters.read_text()
    text = _changed(
        text, "    #: The caller's own JSON object", f"{_FIELD}    #: The caller's own JSON object"
    )
    parameters.write_text(_changed(text, "    priority: int\n", "    priority: int\n    tint: int\n"))
    runner = folder / "tests/faults/runner.py"
    grey = "return job.seed % 251"
    runner.write_text(_changed(runner.read_text(), grey, f"return (job.seed + {TINT} * job.tint) % 251"))
    return folder


def _changed(text: str, old: str, new: str) -> str:
    assert text.count(old) == 1, f"{text.count(old)} of {old!r}"
    return text.replace(old, new)


def waiting(ground: Ground) -> int:
    """Messages that wait for a newer worker."""
    with ground.redis as client:
        return sum(parked_lists(client).values())


def account_with_tints(ground: Ground, ids: Iterable[str]) -> list[str]:
    """Check jobs as `oracle.account` does, also those that this release cannot read; the ids of these."""
    with ground.redis as client:
        marks = client.hgetall(MARKS)
    tinted = []
    for job_id in ids:
        folder = ground.folder_of(job_id)
        assert sorted(path.name for path in folder.glob(f"{job_id}*")) == [f"{job_id}.json", f"{job_id}.png"]
        assert marks[job_id] == "1"
        job = json.loads((folder / f"{job_id}.json").read_bytes())["job"]
        wanted = (job["seed"] + TINT * job.get("tint", 0)) % 251
        with Image.open(folder / f"{job_id}.png") as picture:
            assert picture.convert("L").getextrema() == (wanted, wanted)
        if "tint" in job:
            tinted.append(job_id)
    return tinted


class OtherProducer:
    """A producer of another release: a process that submits the jobs that it is called with. Thread-safe."""

    def __init__(self, ground: Ground, tree: Path) -> None:
        self._ground, self._tree = ground, tree
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> OtherProducer:
        environment = {**self._ground.stack.environment, "PYTHONPATH": str(self._tree), "PYTHONSAFEPATH": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", _PRODUCER],
            cwd=self._tree,
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process is not None
        for pipe in (self._process.stdin, self._process.stdout):
            _open(pipe).close()
        self._process.wait(timeout=30)

    def __call__(self, job: Job, **more: Any) -> str:
        """Submit `job` with the fields `more`; its id. Raises `QueueError`."""
        assert self._process is not None
        with self._lock:
            print(
                json.dumps(job.model_dump(mode="json") | more),
                file=_open(self._process.stdin),
                flush=True,
            )
            answer = json.loads(_open(self._process.stdout).readline())
        if "error" in answer:
            raise QueueError(answer["error"])
        return str(answer["id"])

    def command(self, *arguments: str, timeout_s: float = 60.0) -> subprocess.CompletedProcess[str]:
        """Run this release's `smallcat` with these arguments."""
        environment = {**self._ground.stack.environment, "PYTHONPATH": str(self._tree), "PYTHONSAFEPATH": "1"}
        return subprocess.run(
            [sys.executable, "-m", "producer", *arguments],
            cwd=self._tree,
            env=environment,
            text=True,
            capture_output=True,
            timeout=timeout_s,
            check=False,
        )


def _open(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None
    return pipe
