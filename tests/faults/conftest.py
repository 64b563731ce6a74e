"""Fixtures of the fault suite."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from deploy.stack import Stack

# Before they are imported, for asserts that say what they saw.
pytest.register_assert_rewrite("tests.faults.oracle", "tests.faults.harness")

from tests.faults.harness import Ground  # noqa: E402 - see above


@pytest.fixture
def ground(new_stack: Callable[..., Stack], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ground:
    """A stack of its own, without workers yet."""
    return Ground(new_stack(workers=0), tmp_path, monkeypatch)
