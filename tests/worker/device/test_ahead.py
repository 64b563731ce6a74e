"""What was compiled before is loaded before the first job, unless that takes too long."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from worker.device.compiling import ahead, traced
from worker.device.compiling.ahead import Ahead
from worker.device.compiling.compiler import CompiledLanes, Piece
from worker.device.compiling.traced import Trace

TRACE = Trace("key", [], [0], True).to_json()


class Elsewhere:
    """What was compiled before, by function and lane, and what another process then compiles."""

    def __init__(self, found: dict[str, str]) -> None:
        self.found, self.lost, self.compiled = found, list[str](), list[str]()
        #: Set: the storage answers.
        self.answers = threading.Event()
        self.answers.set()

    def find(self, what: str, lane: str) -> str | None:
        self.answers.wait(10)
        return self.found.get(what)

    def lose(self, what: str, lane: str) -> None:
        self.lost.append(what)
        self.found.pop(what, None)

    def compile(self, what: str, lane: str, argument: Any, dynamic: Any) -> tuple[str, str]:
        self.compiled.append(what)
        return "by another process", TRACE


class Bench:
    """Two functions of a model, and the thread that compiles them."""

    def __init__(self, elsewhere: Elsewhere, thread: ThreadPoolExecutor) -> None:
        self.elsewhere, self._thread = elsewhere, thread
        self.ran: list[str] = []
        compiler: Any = SimpleNamespace(
            submit=thread.submit,
            in_background=True,
            device_sync_lock=threading.Lock(),
            elsewhere=elsewhere,
        )
        lanes = {what: CompiledLanes(what, lambda tensor: tensor, compiler) for what in ("step", "decoder")}
        self.pieces = [
            Piece(each, "lane", self.example, lambda what=what: self.ran.append(what))
            for what, each in lanes.items()
        ]

    @staticmethod
    def example() -> tuple[torch.Tensor, list[torch.Tensor]]:
        tensor = torch.zeros(4)
        return tensor, [tensor]

    def compiled(self) -> list[str]:
        """What runs compiled now."""
        self._thread.submit(lambda: None).result(10)
        return [
            piece.lanes.what for piece in self.pieces if piece.lanes.get("lane", self.example) is not None
        ]


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The keys of what was loaded."""
    loaded: list[str] = []
    monkeypatch.setattr(traced, "load", lambda trace, function: loaded.append(trace.key) or function)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return loaded


@pytest.fixture
def bench(loads: list[str]) -> Iterator[Callable[..., Bench]]:
    made: list[Elsewhere] = []
    with ThreadPoolExecutor(1) as thread:

        def make(**found: str) -> Bench:
            made.append(Elsewhere(found))
            return Bench(made[-1], thread)

        yield make
        for each in made:
            each.answers.set()


def test_what_was_compiled_before_is_there_before_the_first_job(
    bench: Callable[..., Bench], loads: list[str]
) -> None:
    made = bench(step=TRACE, decoder=TRACE)
    choice = Ahead(made.pieces).load()
    assert choice is not None
    assert choice.choice == "yes"
    assert "loaded in" in choice.reason
    # Each was run once, as captured graphs need it.
    assert made.ran == ["step", "decoder"]
    assert made.compiled() == ["step", "decoder"]
    for piece in made.pieces:
        piece.begin()
    assert made.compiled() == ["step", "decoder"]
    assert loads == ["key", "key"]
    assert made.elsewhere.compiled == []


def test_a_fleet_without_it_costs_a_start_nothing(bench: Callable[..., Bench], loads: list[str]) -> None:
    made = bench(decoder=TRACE)
    assert Ahead(made.pieces).load() is None
    assert loads == []
    for piece in made.pieces:
        piece.begin()
    assert made.compiled() == ["step", "decoder"]
    assert made.elsewhere.compiled == ["step"]


def test_a_step_that_is_there_is_loaded_although_the_decoder_is_not(bench: Callable[..., Bench]) -> None:
    made = bench(step=TRACE)
    assert Ahead(made.pieces).load() is not None
    assert made.compiled() == ["step"]


def test_a_slow_storage_holds_no_start_up(
    bench: Callable[..., Bench], loads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker serves; what the storage then has is loaded beside, and not compiled."""
    monkeypatch.setattr(ahead, "SEEK_S", 0.05)
    made = bench(step=TRACE, decoder=TRACE)
    made.elsewhere.answers.clear()
    sought = Ahead(made.pieces)
    assert sought.load() is None
    for piece in made.pieces:
        piece.begin()
    assert made.pieces[0].lanes.get("lane", made.example) is None
    made.elsewhere.answers.set()
    assert made.compiled() == ["step", "decoder"]
    assert made.elsewhere.compiled == []


def test_a_load_that_takes_too_long_goes_on_beside_and_is_done_once(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    loading, count = threading.Event(), list[str]()

    def slow(trace: Trace, function: Any) -> Any:
        loading.wait(10)
        count.append(trace.key)
        return function

    monkeypatch.setattr(traced, "load", slow)
    monkeypatch.setattr(ahead, "LOAD_S", 0.05)
    made = bench(step=TRACE)
    assert Ahead(made.pieces).load() is None
    made.pieces[0].begin()
    loading.set()
    assert made.compiled() == ["step"]
    assert count == ["key"]


def test_what_does_not_load_is_compiled_again(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """By the other process, and not in the worker, where it would take minutes of Python."""

    def fails_once(trace: Trace, function: Any) -> Any:
        if not made.elsewhere.lost:
            raise LookupError("torch's cache has no code of the key")
        return function

    monkeypatch.setattr(traced, "load", fails_once)
    made = bench(step=TRACE)
    assert Ahead(made.pieces).load() is None
    assert made.elsewhere.lost == ["step"]
    made.pieces[0].begin()
    assert made.compiled() == ["step"]
    assert made.elsewhere.compiled == ["step"]
    assert "does not load and is made anew" in caplog.text
