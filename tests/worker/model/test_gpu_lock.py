"""Which worker gets which GPU of a machine: real processes, and GPUs that are only UUIDs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from worker.contract.errors import SettingsError
from worker.model import gpu_lock

#: A worker reduced to its GPU: it takes one, prints which, and lives until its input ends.
WORKER = """
import sys
from worker.model import gpu_lock
from worker.contract.errors import SettingsError
try:
    share = int(sys.argv[2])
    share_of = (lambda index: share) if share else None
    print(*gpu_lock.take(int(sys.argv[1]), "uuid-{}".format, share_of=share_of), flush=True)
except SettingsError as error:
    print(error, flush=True)
sys.stdin.read()
"""
#: The same, with a forked child that outlives it.
PARENT = WORKER.replace(
    "sys.stdin.read()", "import os\nif pid := os.fork():\n    print(pid, flush=True)\nsys.stdin.read()"
)


class Worker:
    """A process that runs one of the scripts above."""

    def __init__(self, folder: Path, count: int, script: str, share: int = 0, **environment: str) -> None:
        cleaned = {name: value for name, value in os.environ.items() if name != gpu_lock.CHOSEN_BY}
        self.process = subprocess.Popen(
            [sys.executable, "-c", script, str(count), str(share)],
            env={**cleaned, "TMPDIR": str(folder), **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def next_line(self) -> str:
        """The next line that it prints."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().rstrip("\n")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Worker]]:
    """Starts workers on one machine, which end with the test."""
    with ExitStack() as cleanup:

        def one(count: int, script: str = WORKER, share: int = 0, **environment: str) -> Worker:
            worker = Worker(tmp_path, count, script, share, **environment)
            cleanup.enter_context(worker.process)
            cleanup.callback(worker.kill)
            return worker

        yield one


def test_each_worker_takes_the_first_free_gpu(start: Callable[..., Worker]) -> None:
    first, second = start(2), start(2)
    assert {first.next_line()[:1], second.next_line()[:1]} == {"0", "1"}


def test_the_reason_for_the_choice_names_the_users_of_other_gpus(start: Callable[..., Worker]) -> None:
    first = start(3)
    assert first.next_line() == "0 the first free one of 3 GPUs"
    second = start(3)
    assert second.next_line() == f"1 the first free one of 3 GPUs; process {first.process.pid} uses GPU 0"
    assert start(3).next_line() == (
        f"2 the first free one of 3 GPUs; process {first.process.pid} uses GPU 0; "
        f"process {second.process.pid} uses GPU 1"
    )


def test_when_all_are_taken_the_holders_and_the_remedy_are_named(start: Callable[..., Worker]) -> None:
    workers = []
    for _ in range(2):
        workers.append(start(2))
        workers[-1].next_line()
    pids = [worker.process.pid for worker in workers]
    assert start(2).next_line() == (
        f"Every GPU that this worker sees is taken (GPU 0 by process {pids[0]}, GPU 1 by process {pids[1]}): "
        "stop one of them, start fewer workers on this machine, or set CUDA_VISIBLE_DEVICES to one GPU to "
        "share it."
    )


def test_a_killed_worker_frees_its_gpu(start: Callable[..., Worker]) -> None:
    victim = start(1)
    assert victim.next_line() == "0 the only GPU"
    victim.kill()
    assert start(1).next_line() == "0 the only GPU"


def test_a_child_that_outlives_a_killed_worker_does_not_keep_its_gpu(start: Callable[..., Worker]) -> None:
    """Compilers are forked children of a worker."""
    victim = start(1, PARENT)
    victim.next_line()
    child = int(victim.next_line())
    victim.kill()
    os.kill(child, 0)
    assert start(1).next_line() == "0 the only GPU"
    os.kill(child, signal.SIGKILL)


def test_a_single_gpu_that_the_user_chooses_is_taken_in_any_case(start: Callable[..., Worker]) -> None:
    first = start(1, CUDA_VISIBLE_DEVICES="3")
    assert first.next_line() == "0 the only GPU in CUDA_VISIBLE_DEVICES"
    assert start(1, CUDA_VISIBLE_DEVICES="3").next_line() == (
        f"0 the only GPU in CUDA_VISIBLE_DEVICES, although process {first.process.pid} uses it"
    )


def test_a_gpu_that_the_user_chose_is_not_taken_by_others(start: Callable[..., Worker]) -> None:
    start(1, CUDA_VISIBLE_DEVICES="0").next_line()
    assert start(2).next_line()[:1] == "1"


def test_of_several_gpus_that_the_user_chooses_each_worker_takes_one(start: Callable[..., Worker]) -> None:
    """A cluster's scheduler sets the variable for all processes on a machine."""
    for expected in ("0 the first", "1 the first", "Every GPU"):
        assert start(2, CUDA_VISIBLE_DEVICES="4,5").next_line().startswith(expected)


def test_workers_with_shares_have_a_gpu_each_while_there_is_one_and_then_share(
    start: Callable[..., Worker],
) -> None:
    first, second = start(2, share=450), start(2, share=450)
    assert {first.next_line()[:1], second.next_line()[:1]} == {"0", "1"}
    third = start(2, share=550)
    line = third.next_line()
    assert "uses a part of its memory" in line
    assert start(2, share=550).next_line()[:1] != line[:1]
    assert "let SMALLCAT_GPU_MEMORY of all workers on a GPU add up" in start(2, share=1).next_line()
    third.kill()
    assert start(2, share=550).next_line()[:1] == line[:1]


def test_a_worker_without_a_share_is_beside_none(start: Callable[..., Worker]) -> None:
    first = start(1, share=1)
    first.next_line()
    taken = f"Every GPU that this worker sees is taken (GPU 0 by process {first.process.pid})"
    assert start(1).next_line().startswith(taken)
    first.kill()
    whole = start(1)
    whole.next_line()
    assert start(1, share=1).next_line().startswith("Every GPU")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This process as a worker on a machine of its own."""
    monkeypatch.setattr(gpu_lock.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(gpu_lock, "_held", set())
    return tmp_path


def test_a_process_that_takes_twice_gets_the_same_one(here: Path) -> None:
    """The benchmark loads one model after the other."""
    assert gpu_lock.take(2, "uuid-{}".format, {})[0] == 0
    assert gpu_lock.take(2, "uuid-{}".format, {}) == (0, "this process took it before")


def test_the_lock_belongs_to_the_gpu_whatever_its_index(here: Path, start: Callable[..., Worker]) -> None:
    """CUDA_VISIBLE_DEVICES gives the same GPU another index."""
    assert gpu_lock.take(1, lambda index: "uuid-1", {})[0] == 0
    assert [start(2).next_line()[:1], start(2).next_line()[:5]] == ["0", "Every"]


def test_every_user_of_the_machine_may_lock(here: Path) -> None:
    gpu_lock.take(1, "uuid-{}".format, {})
    assert gpu_lock.lock_path("uuid-0").stat().st_mode & 0o777 == 0o666


def test_a_lock_file_that_cannot_be_used(here: Path) -> None:
    (here / "elsewhere").touch()
    gpu_lock.lock_path("uuid-0").symlink_to(here / "elsewhere")
    with pytest.raises(SettingsError, match=r"smallcat-gpu-uuid-0\.lock cannot be used \(ELOOP\): delete it"):
        gpu_lock.take(1, "uuid-{}".format, {})
