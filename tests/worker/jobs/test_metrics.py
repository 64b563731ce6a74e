"""What Prometheus reads."""

from __future__ import annotations

import pytest
from prometheus_client import REGISTRY, generate_latest

from worker.jobs import metrics


def test_steps_are_counted_by_rows_and_seconds() -> None:
    before = REGISTRY.get_sample_value("smallcat_step_rows_sum") or 0.0
    metrics.observe_step(16, 0.03)
    assert REGISTRY.get_sample_value("smallcat_step_rows_sum") == before + 16


def test_the_gpus_memory_is_read_when_it_is_asked_for() -> None:
    read = {"in use": 1}
    collector = metrics.MemoryCollector(lambda: read)
    try:
        read["32 rows of 4x64x64"] = 2
        text = generate_latest().decode()
        assert 'smallcat_gpu_memory_bytes{what="in use"} 1.0' in text
        assert 'smallcat_gpu_memory_bytes{what="32 rows of 4x64x64"} 2.0' in text
    finally:
        REGISTRY.unregister(collector)


class CountedDevice:
    """A device that counts."""

    out_of_memory, padded_rows = 2, 7

    def memory(self) -> dict[str, int]:
        return {}

    def utilisation(self) -> float | None:
        return 0.25


def test_the_devices_counts_are_read_when_they_are_asked_for() -> None:
    collector = metrics.DeviceCollector(CountedDevice())
    try:
        text = generate_latest().decode()
    finally:
        REGISTRY.unregister(collector)
    for line in (
        "smallcat_gpu_utilisation_ratio 0.25",
        "smallcat_out_of_memory_total 2.0",
        "smallcat_step_padded_rows_total 7.0",
    ):
        assert line in text.splitlines()


def test_a_message_that_is_set_aside_counts_once_that_is_done() -> None:
    def counted() -> float:
        name = "smallcat_messages_set_aside_total"
        return REGISTRY.get_sample_value(name, {"reason": "poison"}) or 0.0

    def refuse(raw: bytes, reason: str, is_poison: bool) -> None:
        raise ConnectionError

    before = counted()
    with pytest.raises(ConnectionError):
        metrics.counted(refuse)(b"", "", True)
    assert counted() == before
    assert metrics.counted(lambda raw, reason, is_poison: True)(b"", "", True)
    assert counted() == before + 1
