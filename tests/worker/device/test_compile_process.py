"""The process that compiles for a worker: what it does wrong, and how it ends. What it does is torch's."""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from worker.contract.settings import WorkerSettings, worker_settings
from worker.device.compiling import process, server
from worker.device.compiling.kernel_cache import KernelCache, Signed
from worker.device.compiling.process import CompileError, CompileProcess, cache_of
from worker.model import gpu_memory
from worker.storage.shared_code import Folder

KEY = "k" * 32
ANSWER = ("", b"kernels", "the trace")


def good(connection: Connection, settings: WorkerSettings, gpu: int) -> None:
    while True:
        connection.recv_bytes()
        connection.send_bytes(pickle.dumps(ANSWER))


def spoilt(connection: Connection, settings: WorkerSettings, gpu: int) -> None:
    connection.recv_bytes()
    connection.send_bytes(pickle.dumps(("RuntimeError: no such kernel", b"", "")))
    connection.recv_bytes()


def curious(connection: Connection, settings: WorkerSettings, gpu: int) -> None:
    """Says what it was given."""
    connection.recv_bytes()
    connection.send_bytes(
        pickle.dumps(("", b"kernels", f"{settings.kernel_cache_key} at {gpu}{settings.gpu_memory}"))
    )
    connection.recv_bytes()


def dying(connection: Connection, settings: WorkerSettings, gpu: int) -> None:
    connection.recv_bytes()
    os.kill(os.getpid(), signal.SIGKILL)


def rubbish(connection: Connection, settings: WorkerSettings, gpu: int) -> None:
    connection.recv_bytes()
    connection.send_bytes(b"\x80nothing that pickle reads")
    connection.recv_bytes()


def wrong(connection: Connection, settings: WorkerSettings, gpu: int) -> None:
    connection.recv_bytes()
    connection.send_bytes(pickle.dumps(("", None, 3)))
    connection.recv_bytes()


def hanging(connection: Connection, settings: WorkerSettings, gpu: int) -> None:
    """And no signal that asks ends it."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Event().wait()


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., CompileProcess]]:
    """A process on a machine without a GPU, a copy of this one: that starts at once."""
    monkeypatch.setattr(process, "METHOD", "fork")
    monkeypatch.setattr(process, "TICK_S", 0.02)
    monkeypatch.setattr(process, "END_S", 0.2)
    monkeypatch.setattr(CompileProcess, "_memory", lambda self: (2, 1))
    made: list[CompileProcess] = []

    def start(serve: Any, cache: KernelCache | None = None) -> CompileProcess:
        settings = worker_settings({"SMALLCAT_KERNEL_CACHE": "/x", "SMALLCAT_KERNEL_CACHE_KEY": KEY})
        cache = cache or KernelCache(tmp_path / "here", lambda: "setup", None)
        made.append(CompileProcess(settings, torch.device("cuda", 3), cache, serve))
        return made[-1]

    yield start
    for each in made:
        each.rest()


def asked(elsewhere: CompileProcess) -> tuple[str, str]:
    return elsewhere.compile("step", "lane", torch.zeros(2), [])


def test_what_it_compiles_is_kept_here_and_in_the_fleet(
    started: Callable[..., CompileProcess], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.device.compiling.claims.SETTLE_S", 0.0)
    shared = Signed(Folder(tmp_path / "shared"), [KEY.encode()])
    cache = KernelCache(tmp_path / "here", lambda: "setup", shared)
    elsewhere = started(good, cache)
    assert elsewhere.find("step", "lane") is None
    assert asked(elsewhere) == ("by another process", "the trace")
    assert elsewhere.find("step", "lane") == "the trace"
    assert cache.is_shared("step", "lane")
    # Its claim has ended, and the process stays for the next function.
    assert [path.read_bytes()[-4:] for path in tmp_path.rglob("*.claim")] == [b"done"]
    assert asked(elsewhere) == ("by another worker", "the trace")
    elsewhere.rest()
    assert elsewhere._process is None


def test_it_has_no_key_and_knows_its_gpu(started: Callable[..., CompileProcess]) -> None:
    assert asked(started(curious)) == ("by another process", " at 3")


def test_it_takes_of_what_the_worker_may_use_and_no_more(
    started: Callable[..., CompileProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU of 100 GiB, of which the worker may use 50 and has 10."""
    monkeypatch.undo()
    monkeypatch.setattr(process, "METHOD", "fork")
    monkeypatch.setattr(gpu_memory, "_limits", {3: 50 << 30})
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (90 << 30, 100 << 30))
    for what in ("memory_reserved", "memory_allocated"):
        monkeypatch.setattr(torch.cuda, what, lambda device: 10 << 30)
    elsewhere = started(curious)
    elsewhere._settings = elsewhere._settings.model_copy(update={"gpu_memory": "0.5"})
    assert elsewhere._memory() == (40 << 30, (10 << 30) + process.WORKING_BYTES + (10 << 30))
    assert asked(elsewhere) == ("by another process", f" at 3{30 << 30}B")


def test_what_does_not_compile_is_an_error_of_its_own(started: Callable[..., CompileProcess]) -> None:
    with pytest.raises(CompileError, match="no such kernel"):
        asked(started(spoilt))


@pytest.mark.parametrize(
    ("serve", "words"),
    [(dying, "exit code -9"), (rubbish, "cannot be read"), (wrong, "cannot be read")],
    ids=["dies", "rubbish", "another answer"],
)
def test_one_that_fails_is_started_once_more_and_then_steps_stay_uncompiled(
    started: Callable[..., CompileProcess], caplog: pytest.LogCaptureFixture, serve: Any, words: str
) -> None:
    """The worker itself does not compile what has killed another process: it serves."""
    elsewhere = started(serve)
    with caplog.at_level(logging.WARNING), pytest.raises(CompileError, match="ended 2 times"):
        asked(elsewhere)
    assert len([line for line in caplog.messages if words in line]) == process.STARTS
    assert elsewhere._process is None


def test_one_that_hangs_is_ended(
    started: Callable[..., CompileProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "MOST_S", 0.1)
    elsewhere = started(hanging)
    with pytest.raises(CompileError, match="not compiled after 0 s"):
        asked(elsewhere)
    assert elsewhere._process is None


def test_a_worker_that_ends_does_not_wait_for_it(
    started: Callable[..., CompileProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = started(hanging)
    ends = iter([False, False])
    monkeypatch.setattr(process, "is_ending", lambda: next(ends, True))
    # While it compiles, and what else was to be compiled after that, for which no process is started.
    for _ in range(2):
        with pytest.raises(CompileError, match="the worker ends"):
            asked(elsewhere)
    assert elsewhere._process is None


def test_where_its_memory_is_too_small_the_worker_compiles(
    started: Callable[..., CompileProcess], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(CompileProcess, "_memory", lambda self: (1 << 30, 2 << 30))
    with caplog.at_level(logging.INFO):
        assert asked(started(good)) == ("", "")
    assert "another process needs 2.0 GiB of the GPU, and 1.0 are free" in caplog.text


def test_only_those_who_have_a_key_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "here"))
    folder = Folder(tmp_path / "shared")
    none = cache_of(worker_settings({}), lambda: "setup", folder)
    some = cache_of(worker_settings({"SMALLCAT_KERNEL_CACHE_KEY": KEY}), lambda: "setup", folder)
    none.keep("step", "lane", b"kernels", "")
    assert not some.is_shared("step", "lane")
    some.keep("step", "lane", b"kernels", "")
    assert some.is_shared("step", "lane")
    assert not none.is_shared("step", "lane")


def test_it_answers_each_question_and_ends_when_nobody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A function that does not compile is an answer, and the next one is compiled."""

    class Runner:
        def compile_like(self, what: str, lane: str, argument: Any, dynamic: Any) -> Any:
            if what == "broken":
                raise RuntimeError("no such kernel\nand more")
            return f"{what} for {lane}"

    monkeypatch.setattr(server, "carried", lambda recorder: (b"kernels", recorder))
    monkeypatch.setattr(server, "end_with_parent", lambda: None)
    monkeypatch.setattr(server.os, "nice", lambda number: number)
    ours, theirs = multiprocessing.Pipe()
    serving = threading.Thread(target=server.serve, args=(theirs, Runner))
    serving.start()
    answers = []
    for what in ("broken", "step"):
        ours.send_bytes(pickle.dumps((what, "lane", torch.zeros(1), [])))
        answers.append(pickle.loads(ours.recv_bytes()))  # noqa: S301 - its own answer
    assert answers == [("no such kernel", b"", ""), ("", b"kernels", "step for lane")]
    ours.close()
    serving.join(10)
    assert not serving.is_alive()


PARENT = """
import multiprocessing, sys, time
from tests.worker.device import compile_child
if __name__ == "__main__":
    child = multiprocessing.get_context("spawn").Process(target=compile_child.main, daemon=True)
    child.start()
    print(child.pid, flush=True)
    time.sleep(60)
"""


@pytest.mark.services
def test_it_ends_with_a_worker_that_is_killed(tmp_path: Path) -> None:
    """And not by Ctrl-C, which is meant for the worker."""
    program = tmp_path / "parent.py"
    program.write_text(PARENT)
    with subprocess.Popen(
        [sys.executable, str(program)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "COMPILE_READY": str(tmp_path / "ready")},
    ) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        until_s = time.monotonic() + 50
        while not (tmp_path / "ready").exists() and time.monotonic() < until_s:
            time.sleep(0.05)
        child.send_signal(signal.SIGINT)
        child.send_signal(signal.SIGHUP)
        with pytest.raises(psutil.TimeoutExpired):
            child.wait(0.5)
        parent.kill()
        child.wait(20)
