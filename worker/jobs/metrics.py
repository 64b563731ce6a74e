"""Prometheus metrics of a worker, on `SMALLCAT_METRICS_PORT`: the only door to prometheus_client."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from prometheus_client import REGISTRY, Counter, Histogram, start_http_server
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

#: Jobs by how they ended: rendered, cached, failed, retried, cancelled, given_back, taken.
JOBS = Counter("smallcat_jobs", "Jobs, by how they ended on this worker", ["outcome"])
#: Seconds a job waited in the queue.
QUEUED = Histogram(
    "smallcat_queued_seconds",
    "From submission until a worker took the job",
    buckets=(0.1, 0.5, 1, 5, 15, 60, 300, 900, 3600),
)
#: Seconds a job spent in the engine.
RENDERED = Histogram(
    "smallcat_rendered_seconds",
    "From then until its picture was decoded",
    buckets=(0.1, 0.5, 1, 2, 5, 10, 30, 60, 120, 300),
)
#: Seconds encoding and upload took.
UPLOADED = Histogram(
    "smallcat_uploaded_seconds", "Encoding and upload", buckets=(0.01, 0.05, 0.1, 0.5, 1, 5, 15, 60, 300)
)
#: Rows of the UNet in a step: how full the batches are.
ROWS = Histogram(
    "smallcat_step_rows", "Rows of the UNet in a step", buckets=(1, 2, 4, 8, 16, 24, 32, 48, 64, 128, 256)
)
#: Seconds a step took.
STEP = Histogram(
    "smallcat_step_seconds",
    "One denoising step of a batch",
    buckets=(0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5),
)


def observe_step(rows: int, seconds: float) -> None:
    """Count one step of the engine."""
    ROWS.observe(rows)
    STEP.observe(seconds)


class MemoryCollector(Collector):
    """The GPU's memory, read when somebody asks. `read` gives bytes by what has them."""

    def __init__(self, read: Callable[[], Mapping[str, int]]) -> None:
        self._read = read
        REGISTRY.register(self)

    def collect(self) -> Iterable[Metric]:
        """As Prometheus' client wants it."""
        gauge = GaugeMetricFamily("smallcat_gpu_memory_bytes", "The GPU's memory", labels=["what"])
        for what, count in self._read().items():
            gauge.add_metric([what], count)
        yield gauge


def serve(port: int) -> None:
    """Answer Prometheus on `port` from a thread of its own. Raises `OSError` where the port is taken."""
    start_http_server(port)
