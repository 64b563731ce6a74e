"""Where a worker is put together and taken apart; its work is in tests/integration and tests/faults."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
from kombu.asynchronous import Hub, get_event_loop, set_event_loop

from worker import tasks


@pytest.fixture
def idle_loop() -> Iterator[threading.Thread]:
    """One turn of Celery's event loop, which would wait for 30 seconds."""
    before = get_event_loop()
    hub = Hub()
    set_event_loop(hub)
    hub.call_later(30, lambda: None)
    waits = threading.Event()
    hub.on_tick.add(waits.set)
    turn = threading.Thread(target=lambda: next(hub.loop), daemon=True)
    turn.start()
    assert waits.wait(10)
    yield turn
    set_event_loop(before)
    hub.close()


def test_a_stopping_worker_does_not_wait_for_its_idle_loop(idle_loop: threading.Thread) -> None:
    tasks._wake_loop()
    idle_loop.join(5)
    assert not idle_loop.is_alive()


def test_a_worker_whose_engine_is_lost_leaves_at_once(
    idle_loop: threading.Thread, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks.worker_state, "should_stop", None)
    tasks._engine_failed(RuntimeError("lost"))
    idle_loop.join(5)
    assert not idle_loop.is_alive()
    assert tasks.worker_state.should_stop == tasks.EX_SOFTWARE


def test_without_a_loop_there_is_nothing_to_wake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "get_event_loop", lambda: None)
    tasks._wake_loop()
