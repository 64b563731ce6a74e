"""Prometheus metrics of a worker, on `SMALLCAT_METRICS_PORT`: the only door to prometheus_client."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

from prometheus_client import REGISTRY, Counter, Gauge, Histogram, Info, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

#: Jobs by how they ended: rendered, cached, failed, retried, cancelled, given_back, taken; and by the error's
#: class, empty where there is none.
JOBS = Counter("smallcat_jobs", "Jobs by how they ended on this worker, and why", ["outcome", "reason"])
#: Jobs that this worker works on: from the claim until they are done or go back.
IN_FLIGHT = Gauge("smallcat_jobs_in_flight", "Jobs that this worker works on")
#: Messages whose leases this worker renews: those of jobs in flight, and those that it has fetched ahead.
HELD = Gauge("smallcat_leases", "Messages whose leases this worker renews")
#: Attempts at rendering a job that this worker has begun.
ATTEMPTS = Counter("smallcat_attempts", "Attempts at rendering a job that this worker has begun")
#: Messages that had been fetched before, by a worker that gave them back or died.
REDELIVERED = Counter("smallcat_redeliveries", "Messages that this worker fetched and another one had before")
#: Messages that this worker set aside: unreadable, or poison, which came back too often.
SET_ASIDE = Counter("smallcat_messages_set_aside", "Messages that this worker set aside, and why", ["reason"])
#: 1 while the worker takes no jobs, because the bucket refuses it; else 0.
PAUSED = Gauge("smallcat_paused", "Whether the worker takes no jobs, because the bucket refuses it")
#: Seconds that a job waited in its queue.
QUEUED = Histogram(
    "smallcat_queued_seconds",
    "Seconds from the submission of a job until this worker took it",
    buckets=(0.1, 0.5, 1, 5, 15, 60, 300, 900, 3600),
)
#: Seconds that the texts of a job took to encode, on the device.
TEXT_ENCODED = Histogram(
    "smallcat_text_encoded_seconds",
    "Seconds that encoding the texts of a job took",
    buckets=(0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1, 5, 15),
)
#: Seconds that a job spent in the engine.
RENDERED = Histogram(
    "smallcat_rendered_seconds",
    "Seconds from then until the picture of the job was decoded",
    buckets=(0.1, 0.5, 1, 2, 5, 10, 30, 60, 120, 300),
)
#: Seconds from a job's last step until its picture was in the host's memory.
DECODED = Histogram(
    "smallcat_decoded_seconds",
    "Seconds from the last step of a job until its picture was decoded",
    buckets=(0.01, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 15, 60),
)
#: Seconds that it took to make a file of a picture.
ENCODED = Histogram(
    "smallcat_encoded_seconds",
    "Seconds that making a file of a picture took",
    buckets=(0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 15),
)
#: Seconds that the upload of a picture and its record took, with all that was tried again.
UPLOADED = Histogram(
    "smallcat_uploaded_seconds",
    "Seconds that the upload of a picture took",
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
#: The longest pause between two steps while this worker changed over to compiled ones; 0 until it has.
CHANGE = Gauge(
    "smallcat_compiled_change_pause_seconds",
    "Longest pause between two steps, in seconds, at the last change to compiled ones",
)
#: What runs here, as labels: versions of packages, model, device.
BUILD = Info("smallcat_build", "What runs here")

#: Whatever a job can end with: these series are there from the start, so that the first failure is a rise.
for _outcome in ("rendered", "cached", "cancelled", "taken"):
    JOBS.labels(_outcome, "")
for _reason in ("unreadable", "poison"):
    SET_ASIDE.labels(_reason)


def observe_wait(queued_s: float | None) -> None:
    """Count a job's wait; None: nobody knows it."""
    if queued_s is not None:
        QUEUED.observe(queued_s)


def observe_step(rows: int, seconds: float) -> None:
    """Count one step of the engine."""
    ROWS.observe(rows)
    STEP.observe(seconds)


def observe_change(pause_s: float) -> None:
    """Say how long the longest pause was at a change to compiled steps."""
    CHANGE.set(pause_s)


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


class Device(Protocol):
    """What is read of the device when Prometheus asks."""

    def memory(self) -> Mapping[str, int]:
        """Bytes of its memory by what uses them; empty on a CPU."""

    def utilisation(self) -> float | None:
        """The share of the last moment in which it did something, 0 to 1; None: it cannot be asked."""

    @property
    def out_of_memory(self) -> int:
        """How often a step, a text or a picture did not fit: then fewer are tried together."""

    @property
    def padded_rows(self) -> int:
        """Rows that steps had beside those of jobs."""


class DeviceCollector(Collector):
    """What the device counts, read when Prometheus asks: a step pays nothing for it."""

    def __init__(self, device: Device) -> None:
        self._device = device
        REGISTRY.register(self)

    def collect(self) -> Iterable[Metric]:
        """The metrics, as Prometheus' client asks for them."""
        utilisation = self._device.utilisation()
        busy = GaugeMetricFamily(
            "smallcat_gpu_utilisation_ratio", "Share of the last second that the GPU worked"
        )
        if utilisation is not None:
            busy.add_metric([], utilisation)
        yield busy
        yield CounterMetricFamily(
            "smallcat_out_of_memory",
            "Times that a step, a text or a picture did not fit in memory and was tried again smaller",
            value=self._device.out_of_memory,
        )
        yield CounterMetricFamily(
            "smallcat_step_padded_rows",
            "Rows that steps had beside those of jobs, to fit a captured batch size",
            value=self._device.padded_rows,
        )


def observe_process(device: Device, held: Callable[[], int], build: Mapping[str, str]) -> None:
    """Read these whenever Prometheus asks. `held`: messages held. `build`: what runs here, by name."""
    MemoryCollector(device.memory)
    DeviceCollector(device)
    HELD.set_function(held)
    BUILD.info(dict(build))


def counted(set_aside: Callable[[bytes, str, bool], object]) -> Callable[[bytes, str, bool], object]:
    """`set_aside`, and count the message once that is done."""

    def call(raw: bytes, reason: str, is_poison: bool) -> object:
        done = set_aside(raw, reason, is_poison)
        SET_ASIDE.labels("poison" if is_poison else "unreadable").inc()
        return done

    return call


def serve(port: int) -> None:
    """Answer Prometheus on `port` in a thread of its own. Raises `OSError` where the port is taken."""
    start_http_server(port)
