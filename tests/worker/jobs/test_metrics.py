"""What Prometheus reads."""

from __future__ import annotations

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
