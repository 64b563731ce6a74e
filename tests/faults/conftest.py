"""Fixtures of the fault suite.

ground      a stack of its own, without workers yet, for tests that break one of its parts
calm        a stack with one worker that nobody kills, shared by tests that give it bad jobs
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from deploy.embedded.stack import Stack

if TYPE_CHECKING:
    from tests.faults.harness import Ground

# Before they are imported, for asserts that show their values.
pytest.register_assert_rewrite("tests.faults.oracle", "tests.faults.harness")


@pytest.fixture
def ground(new_stack: Callable[..., Stack], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ground:
    """A stack of its own, without workers yet."""
    from tests.faults.harness import Ground

    ground = Ground(new_stack(workers=0), tmp_path)
    ground.use(monkeypatch)
    return ground


@pytest.fixture(scope="session")
def calm_ground(servers: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    """Take `calm` instead."""
    from tests.faults.harness import Ground

    with Stack(workers=0) as stack:
        ground = Ground(stack, tmp_path_factory.mktemp("calm"))
        ground.worker(settings={"SMALLCAT_MAX_ATTEMPTS": "1"})
        yield ground


@pytest.fixture
def calm(calm_ground: Ground, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ground]:
    """A stack whose one worker tries each job once, and is alive after each test."""
    calm_ground.use(monkeypatch)
    calm_ground.ids.clear()
    pid = calm_ground.workers[0].pid
    yield calm_ground
    assert calm_ground.workers[0].running
    assert calm_ground.workers[0].pid == pid
