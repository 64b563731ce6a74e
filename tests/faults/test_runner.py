"""The fake device of the fault tests can do whatever a worker asks of the real one."""

from __future__ import annotations

from tests.faults.runner import FaultRunner
from worker.device.model_runner import ModelRunner

#: Asked by the runner itself alone.
OWN = {"compile", "compile_like", "pieces", "default_pieces", "setup"}


def test_the_fake_device_has_all_that_the_real_one_has() -> None:
    public = {name for name in vars(ModelRunner) if not name.startswith("_")} - OWN
    assert public <= set(dir(FaultRunner(8, 0.0, lambda *_: None, lambda *_: False)))
