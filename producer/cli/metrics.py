"""The command `metrics`: figures of the queues for Prometheus, without a worker.

A fleet that is scaled by them can be scaled from zero.
"""

from __future__ import annotations

import logging
import signal
import threading
from typing import TYPE_CHECKING

import click

from producer.cli.json_output import say
from producer.session import session
from worker.contract.errors import CallerError, QueueError
from worker.contract.plain_log import set_up_log

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prometheus_client.core import Metric
    from prometheus_client.registry import Collector

logger = logging.getLogger("smallcat.metrics")

#: Each metric: its name, what it is, and the figures that it has.
GAUGES = {
    "waiting": ("smallcat_queue_jobs_waiting", "Jobs that wait in the queues, by model and revision"),
    "in_flight": ("smallcat_queue_jobs_in_flight", "Jobs that workers have fetched and not ended yet"),
    "workers": ("smallcat_workers", "Live workers that take jobs, by model and revision"),
}
#: Likewise, of those that wait, by whose they are: `tenants` is "yes" for jobs of tenants, else "no".
BY_CLASS = {
    "depth": ("smallcat_queue_depth", "Jobs that wait for workers of this version"),
    "oldest_s": ("smallcat_queue_oldest_seconds", "Seconds that the oldest job waits; 0: none waits"),
}
PARKED = ("smallcat_queue_jobs_parked", "Jobs that wait for a newer worker, by the version of their messages")
CHAINED = ("smallcat_jobs_waiting_for_jobs", "Jobs that wait for the pictures of others, and are in no queue")
REDIS_MEMORY = (
    "smallcat_redis_memory_ratio",
    "Share of Redis' maxmemory in use; absent without one",
)
#: Seconds that a scrape waits for a Redis that is away.
REDIS_RETRY_S = 2.0


@click.command()
@click.option(
    "--port",
    type=click.IntRange(1, 65_535),
    help="Serve them on this port until Ctrl-C; without it they are printed once.",
)
def metrics(port: int | None) -> None:
    """Figures of the queues for Prometheus: jobs that wait and jobs in flight, by model."""
    try:
        from prometheus_client import CollectorRegistry, generate_latest, start_http_server
    except ModuleNotFoundError as error:
        raise CallerError(f'{error.name} is not installed: pip install "smallcat[metrics]".') from None
    if port is not None:
        set_up_log(session(REDIS_RETRY_S).settings.log)
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_collector(is_served=port is not None))
    if port is None:
        for line in generate_latest(registry).decode().splitlines():
            say(line)
        return
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    try:
        server, _ = start_http_server(port, registry=registry)
    except OSError as error:
        raise CallerError(f"Port {port} cannot be listened on ({error.strerror}): name another.") from None
    logger.info("Figures of the queues are at http://localhost:%d/metrics.", port)
    ended.wait()
    server.shutdown()


def _collector(*, is_served: bool) -> Collector:
    """Reads the figures when Prometheus asks. `is_served`: a Redis that is away is a figure, and no error."""
    from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily

    from worker.contract.versions import versions
    from worker.state.queue_figures import fullness, queue_figures

    now = session(REDIS_RETRY_S)

    class QueueCollector:
        """As Prometheus' client calls it."""

        def collect(self) -> Iterator[Metric]:
            yield InfoMetricFamily("smallcat_build", "What runs here", value=versions(("smallcat",)))
            try:
                with now.queue_errors():
                    figures = queue_figures(now.redis, now.fleet)
                    full = fullness(now.redis.info("memory"))
            except QueueError as error:
                if not is_served:
                    raise
                logger.warning("%s", error)
                yield GaugeMetricFamily("smallcat_redis_up", "Whether Redis answered", value=0)
                return
            yield GaugeMetricFamily("smallcat_redis_up", "Whether Redis answered", value=1)
            if full is not None:
                yield GaugeMetricFamily(*REDIS_MEMORY, value=full)
            for field, (name, what) in GAUGES.items():
                gauge = GaugeMetricFamily(name, what, labels=["model", "revision"])
                for served, count in sorted(getattr(figures, field).items()):
                    gauge.add_metric([served.model, served.revision], count)
                yield gauge
            for field, (name, what) in BY_CLASS.items():
                gauge = GaugeMetricFamily(name, what, labels=["model", "revision", "tenants"])
                for queued, value in sorted(getattr(figures, field).items()):
                    tenants = "yes" if queued.of_tenants else "no"
                    gauge.add_metric([queued.served.model, queued.served.revision, tenants], value)
                yield gauge
            gauge = GaugeMetricFamily(*PARKED, labels=["version"])
            for version, count in sorted(figures.parked.items()):
                gauge.add_metric([str(version)], count)
            yield gauge
            yield GaugeMetricFamily(*CHAINED, value=figures.chained)

    made: Collector = QueueCollector()
    return made
