"""An engine with a fake runner, in both ways to decode."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.worker.engine.engine_bench import Bench, bench_of
from tests.worker.engine.fake_runner import FakeRunner


@pytest.fixture(params=[False, True], ids=["decodes between steps", "decodes beside steps"])
def runner(request: pytest.FixtureRequest) -> FakeRunner:
    return FakeRunner(max_rows=8, decodes_beside=request.param)


@pytest.fixture
def bench(runner: FakeRunner) -> Iterator[Bench]:
    with bench_of(runner) as bench:
        yield bench
