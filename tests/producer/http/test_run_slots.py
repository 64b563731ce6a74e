"""A tenant whose runs wait holds up nobody else's."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from producer.http import run_slots
from producer.http.run_slots import AT_ONCE, AT_ONCE_OF_ONE, MAX_RUNS, MAX_RUNS_OF_ONE, RunSlots
from producer.http.run_store import RunStore
from producer.ingest.types import Gate


class Shut(Gate):
    """Lets through what it is told to."""

    room = 0

    def admit(self, first: int, jobs: Sequence[Any]) -> tuple[int, str]:
        return min(self.room, len(jobs)), "the day is over."


def run_of(tenant: int, number: int = 0) -> str:
    return f"{tenant:012x}{number:028x}"


@pytest.fixture
def slots(monkeypatch: pytest.MonkeyPatch) -> RunSlots:
    monkeypatch.setattr(run_slots, "_LONGEST_S", 0.0)
    return RunSlots(threading.Event())


def test_a_tenant_has_some_of_the_slots_alone(slots: RunSlots) -> None:
    with ExitStack() as held:
        for number in range(AT_ONCE_OF_ONE):
            held.enter_context(slots.taken(run_of(1, number)))
        assert not slots.try_take(run_slots.Slot(slots, run_slots.tenant_of(run_of(1, 9))))
        for number in range(AT_ONCE - AT_ONCE_OF_ONE):
            held.enter_context(slots.taken(f"{number:032x}"))
        assert not slots.try_take(run_slots.Slot(slots, run_slots.tenant_of(run_of(2))))
    with slots.taken(run_of(1)):
        pass


def test_a_run_that_waits_for_its_limit_gives_its_slot_back_and_takes_it_again(slots: RunSlots) -> None:
    shut = Shut()
    with ExitStack() as held:
        held.enter_context(slots.taken(run_of(1)))
        waits = held.enter_context(slots.taken(run_of(1, 1))).gate(shut)
        for number in range(2, AT_ONCE_OF_ONE):
            held.enter_context(slots.taken(run_of(1, number)))
        other = run_slots.Slot(slots, run_slots.tenant_of(run_of(1, 9)))
        assert not slots.try_take(other)
        for _ in range(3):
            assert waits.admit(0, [1, 2]) == (0, "the day is over.")  # type: ignore[list-item]
        assert slots.try_take(other)
        # The limit has ended, and another run has the slot.
        shut.room = 5
        assert waits.admit(0, [1, 2])[0] == 0  # type: ignore[list-item]
        slots.give_back(other)
        assert waits.admit(0, [1, 2])[0] == 2  # type: ignore[list-item]
        assert not slots.try_take(other)


def test_the_runs_of_one_tenant_do_not_fill_the_server(tmp_path: Path) -> None:
    store = RunStore(tmp_path, 60)
    store._begun |= {run_of(1, number) for number in range(MAX_RUNS_OF_ONE)}
    assert store.is_full(f"{1:012x}")
    assert not store.is_full(f"{2:012x}")
    assert not store.is_full("")
    store._begun |= {f"{number:032x}" for number in range(MAX_RUNS)}
    assert store.is_full(f"{2:012x}")
