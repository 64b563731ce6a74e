"""Prometheus metrics of a worker, on `SMALLCAT_METRICS_PORT`: the only door to prometheus_client."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from prometheus_client import REGISTRY, Counter, Gauge, Histogram, start_http_server
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

#: Jobs by how they ended: rendered, cached, failed, retried, cancelled, given_back, taken.
JOBS = Counter("smallcat_jobs", "Jobs by how they ended on this worker", ["outcome"])
#: 1 while the worker takes no jobs, because the bucket refuses it; else 0.
PAUSED = Gauge("smallcat_paused", "Whether the worker takes no jobs, because the bucket refuses it")
#: Seconds that a job waited in its queue.
QUEUED = Histogram(
    "smallcat_queued_seconds",
    "Seconds from the submission of a job until this worker took it",
    buckets=(0.1, 0.5, 1, 5, 15, 60, 300, 900, 3600),
)
#: Seconds that a job spent in the engine.
RENDERED = Histogram(
    "smallcat_rendered_seconds",
    "Seconds from then until the picture of the job was decoded",
    buckets=(0.1, 0.5, 1, 2, 5, 10, 30, 60, 120, 300),
)
#: Seconds that encoding and upload took.
UPLOADED = Histogram(
    "smallcat_uploaded_seconds",
    "Seconds that encoding and upload of a picture took",
    buckets=(0.01, 0.05, 0.1, 0.5, 1, 5, 15, 60, 300),
)
#: Rows of a step: how full the batches are.
ROWS = Histogram(
    "smallcat_step_rows",
    "Rows of the batch in a denoising step",
    buckets=(1, 2, 4, 8, 16, 24, 32, 48, 64, 128, 256),
)
#: Seconds that a step took.
STEP = Histogram(
    "smallcat_step_seconds",
    "Seconds that a denoising step of a batch took",
    buckets=(0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5),
)


def observe_step(rows: int, seconds: float) -> None:
    """Count one step of the engine."""
    ROWS.observe(rows)
    STEP.observe(seconds)


class MemoryCollector(Collector):
    """The GPU's memory, read when Prometheus asks. `read` returns bytes by what uses them."""

    def __init__(self, read: Callable[[], Mapping[str, int]]) -> None:
        self._read = read
        REGISTRY.register(self)

    def collect(self) -> Iterable[Metric]:
        """The gauge, as Prometheus' client asks for it."""
        gauge = GaugeMetricFamily(
            "smallcat_gpu_memory_bytes", "Bytes of GPU memory by what uses them", labels=["what"]
        )
        for what, count in self._read().items():
            gauge.add_metric([what], count)
        yield gauge


def serve(port: int) -> None:
    """Answer Prometheus on `port` in a thread of its own. Raises `OSError` where the port is taken."""
    start_http_server(port)
