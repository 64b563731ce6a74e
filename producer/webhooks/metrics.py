"""Prometheus metrics of a sender of webhooks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, start_http_server
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from producer.session import Session
from worker.contract.errors import QueueError
from worker.state.notifications import Notifications

logger = logging.getLogger("smallcat.webhooks")


class _Book(Collector):
    """Notifications that wait and that were given up, read when Prometheus asks; none without Redis."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def collect(self) -> Iterator[Metric]:
        """The gauges, as Prometheus' client asks for them."""
        try:
            with self._session.queue_errors():
                waiting, given_up = Notifications(self._session.redis).counts()
        except QueueError as error:
            logger.warning("%s", error)
            return
        yield GaugeMetricFamily(
            "smallcat_webhooks_waiting",
            "Notifications that wait or are sent now, of all senders",
            value=waiting,
        )
        yield GaugeMetricFamily(
            "smallcat_webhooks_given_up", "Notifications that were given up and are kept", value=given_up
        )


def serve(session: Session, port: int) -> Callable[[str], None]:
    """Answer Prometheus on `port`. Returns what counts an attempt by how it ended: sent, later or failed.

    Raises `OSError` where the port is taken.
    """
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Book(session))
    attempts = Counter(
        "smallcat_webhooks",
        "Attempts to notify by how they ended: see the documents",
        ["ended"],
        registry=registry,
    )
    for ended in ("sent", "later", "failed"):
        attempts.labels(ended)
    start_http_server(port, registry=registry)
    return lambda ended: attempts.labels(ended).inc()
