"""Workers that are none: they send to Redis what an idle worker sends."""

from __future__ import annotations

import contextlib
import heapq
import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any

import redis

from tests.faults.runner import SERVED
from worker.broker.fetching import LIMITS, LOOK_AGAIN_S
from worker.broker.layout import words_of
from worker.broker.scripts import EXPIRED, FETCH, FETCH_DIGEST
from worker.broker.transport import (
    UNACKED,
    UNACKED_INDEX,
    transport_options,
)
from worker.broker.waiting import CALL, PLACE_MS, ROOM
from worker.contract.queues import SHARES, UNDECODABLE, WEIGHTS, arrivals_of, list_of, queues_of
from worker.state.fleet import ANNOUNCE_EVERY_S, Fleet, WorkerInfo
from worker.state.redis_client import connect

#: Seconds between two heartbeats of Celery.
HEARTBEAT_EVERY_S = 2.0
#: About what Celery says in a heartbeat.
HEARTBEAT = json.dumps({"body": "x" * 420, "headers": {"hostname": "x" * 30}})


class Simulation:
    """So many workers, in a process of their own. A context manager."""

    def __init__(self, url: str, count: int) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._process = spawn.Process(target=_simulate, args=(url, count), daemon=True)

    def __enter__(self) -> Simulation:
        self._process.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.join()

    @contextlib.contextmanager
    def standing_still(self) -> Iterator[None]:
        """They take no processor time, and are announced still, for less than `ANNOUNCE_TTL_S` seconds."""
        assert self._process.pid is not None
        os.kill(self._process.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self._process.pid, signal.SIGCONT)


def _simulate(url: str, count: int) -> None:
    with _Simulated(url, count):
        threading.Event().wait()


class _Simulated:
    """The workers, each with the connection over which it fetches; the rest goes over a few."""

    def __init__(self, url: str, count: int, threads: int = 4) -> None:
        self._url = url
        self._stop = threading.Event()
        parts = [range(count)[first::threads] for first in range(threads)]
        self._threads = [threading.Thread(target=self._run, args=(part,), daemon=True) for part in parts]

    def __enter__(self) -> None:
        for thread in self._threads:
            thread.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self, numbers: range) -> None:
        client = connect(self._url, 5)
        fleet = Fleet(client, 3_600)
        workers = [_Waiting(self._url, number) for number in numbers]
        sweep_s = float(transport_options()["unacked_restore_interval"])

        def sweep() -> None:
            client.register_script(EXPIRED)(keys=[UNACKED_INDEX, UNACKED], args=["30", "1000"])

        def beat() -> None:
            client.publish("/0.celeryev/worker.heartbeat", HEARTBEAT)

        due: list[tuple[float, int, float, Any]] = []
        now = time.monotonic()
        for place, worker in enumerate(workers):
            at = now + place / len(workers)
            due += [
                (at, 4 * place, LOOK_AGAIN_S, worker.fetch),
                (at, 4 * place + 1, ANNOUNCE_EVERY_S, lambda worker=worker: fleet.announce(worker.info)),
                (at, 4 * place + 2, sweep_s, sweep),
                (at, 4 * place + 3, HEARTBEAT_EVERY_S, beat),
            ]
        heapq.heapify(due)
        while not self._stop.is_set():
            at, order, every_s, do = due[0]
            if (left := at - time.monotonic()) > 0:
                self._stop.wait(left)
                continue
            do()
            heapq.heapreplace(due, (max(at, time.monotonic() - 1) + every_s, order, every_s, do))


class _Waiting:
    """A worker that stands in line. Calls are not answered: no message comes to these workers."""

    def __init__(self, url: str, number: int) -> None:
        served = SERVED.model_copy(update={"name": "simulated"})
        self.info = WorkerInfo(
            name=f"smallcat-{number}@simulated-host-{number}.example.internal",
            served=served,
            started_at=time.time() + number,
            device="NVIDIA H200",
            attention="xformers",
            max_rows=16,
            versions={"python": "3.11.7", "torch": "2.13.0", "diffusers": "0.38.0", "celery": "5.7.0"},
        )
        self._connection = redis.Redis.from_url(url, protocol=3).connection_pool.get_connection()
        queues = queues_of(served)
        lists = [(queue, arrivals_of(queue, step), str(step // 5)) for queue in queues for step in (0, 5)]
        lists += [(queue, list_of(queue, step), "") for step in range(10) for queue in queues]
        keys = [UNACKED, UNACKED_INDEX, UNDECODABLE, f"{ROOM}simulated", SHARES, WEIGHTS]
        keys += [name for _, name, _ in lists]
        said = words_of((queue, kind) for queue, _, kind in lists)
        self._place = ""
        self._command = lambda: (len(keys), *keys, 1, f"{CALL}{number}", self._place, PLACE_MS, LIMITS, *said)

    def fetch(self) -> None:
        """Fetch, as `worker.broker.fetching` does."""
        self._connection.send_command("EVALSHA", FETCH_DIGEST, *self._command())
        try:
            answer: Any = self._connection.read_response()
        except redis.exceptions.NoScriptError:
            self._connection.send_command("EVAL", FETCH, *self._command())
            answer = self._connection.read_response()
        self._place = answer[0].decode()
