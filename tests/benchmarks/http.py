"""Measures the HTTP API: submissions at a fixed rate, and streams of events.

    python -m tests.benchmarks.http                          300 submissions a second for 60 s
    python -m tests.benchmarks.http --rate 100 --seconds 10
    python -m tests.benchmarks.http --streams 1000           and so many open streams meanwhile

Starts a stack with the HTTP API and one fake worker without a bucket, all on this machine. The load is an
open loop: each submission is sent at its time, whether the earlier ones were answered or not, and its latency
counts from that time. Prints one JSON object; `limit_s` is the promised 99th percentile.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from typing import Any
from urllib.parse import urlsplit

import click
import psutil

from deploy.embedded.stack import Stack
from tests.fast_worker import SERVED, announce
from worker.contract.queues import queues_of

#: Connections that are kept, seconds that a submission may take, and the promised 99th percentile.
CONNECTIONS, TIMEOUT_S, LIMIT_S = 64, 30.0, 0.1


class Client:
    """Keeps connections to one server, and speaks as much HTTP as is needed."""

    def __init__(self, url: str, key: str) -> None:
        where = urlsplit(url)
        self.host, self.port = str(where.hostname), int(where.port or 80)
        self._key = key
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection, kept or new."""
        return self._idle.pop() if self._idle else await asyncio.open_connection(self.host, self.port)

    def head(self, method: str, path: str, length: int = 0) -> bytes:
        """The head of a request."""
        lines = [f"{method} {path} HTTP/1.1", f"Host: {self.host}", f"Authorization: Bearer {self._key}"]
        if length:
            lines += ["Content-Type: application/json", f"Content-Length: {length}"]
        return ("\r\n".join(lines) + "\r\n\r\n").encode()

    async def submit(self, prompt: str, model: str = "default") -> dict[str, Any]:
        """Submit a job."""
        body = json.dumps({"prompt": prompt, "model": model}).encode()
        reader, writer = await self.connect()
        writer.write(self.head("POST", "/v1/jobs", len(body)) + body)
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        answer = await reader.readexactly(length)
        if b" 202 " not in head.partition(b"\r\n")[0]:
            raise RuntimeError(answer.decode())
        self._idle.append((reader, writer))
        return dict(json.loads(answer))


async def load(client: Client, rate: float, seconds: float) -> tuple[list[float], int]:
    """Seconds from each submission's time to its answer, and how many failed."""
    loop = asyncio.get_running_loop()
    taken: list[float] = []
    failed = 0

    async def one(number: int, due_s: float) -> None:
        nonlocal failed
        try:
            async with asyncio.timeout(TIMEOUT_S):
                await client.submit(f"a cat, number {number}")
            taken.append(loop.time() - due_s)
        except (OSError, RuntimeError, TimeoutError, asyncio.IncompleteReadError):
            failed += 1

    began_s = loop.time() + 0.5
    async with asyncio.TaskGroup() as group:
        for number in range(int(rate * seconds)):
            due_s = began_s + number / rate
            await asyncio.sleep(max(0.0, due_s - loop.time()))
            group.create_task(one(number, due_s))
    return taken, failed


async def follow(client: Client, path: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """An open stream of events, after its first one."""
    reader, writer = await asyncio.open_connection(client.host, client.port)
    writer.write(client.head("GET", path))
    while not (await reader.readline()).startswith(b"data: "):
        pass
    return reader, writer


async def measure(url: str, key: str, server: psutil.Process, options: Any) -> dict[str, Any]:
    """All figures."""
    client = Client(url, key)
    await load(client, options["rate"] / 4, 4)  # Warm: connections, templates of messages.
    streams = []
    if options["streams"]:
        for start in range(0, options["streams"], 50):
            count = min(50, options["streams"] - start)
            # Of a model that nobody serves: they stay open.
            jobs = [await client.submit("followed", "nobody-serves-this") for _ in range(count)]
            streams += await asyncio.gather(*(follow(client, job["links"]["events"]) for job in jobs))
    memory, cpu = server.memory_info().rss, server.cpu_times()
    taken, failed = await load(client, options["rate"], options["seconds"])
    after = server.cpu_times()
    for _, writer in streams:
        writer.close()
    taken.sort()
    share = {name: taken[min(len(taken) - 1, int(len(taken) * part))] for name, part in _PARTS.items()}
    return {
        **options,
        "answered": len(taken),
        "failed": failed,
        **{f"{name}_s": round(value, 4) for name, value in share.items()},
        "limit_s": LIMIT_S,
        "server_cpu_s": round(after.user + after.system - cpu.user - cpu.system, 1),
        "server_mb": round(memory / 1e6, 1),
        "server_grew_mb": round((server.memory_info().rss - memory) / 1e6, 1),
    }


_PARTS = {"p50": 0.5, "p95": 0.95, "p99": 0.99, "max": 1.0}


@click.command()
@click.option("--rate", default=300.0, show_default=True, help="Submissions a second.")
@click.option("--seconds", default=60.0, show_default=True, help="For how long.")
@click.option("--streams", default=0, show_default=True, help="Streams of events that are open meanwhile.")
@click.option("--no-worker", is_flag=True, help="Without the fake worker.")
def main(**options: Any) -> None:
    """Measure the HTTP API on this machine."""
    with Stack(workers=0, http=True) as stack:
        announce(stack.valkey.url)
        environment = {name: value for name, value in stack.environment.items() if name != "S3_BUCKET"}
        command = [
            "celery",
            "-A",
            "tests.fast_worker",
            "worker",
            "-Q",
            ",".join(queues_of(SERVED)),
            "-c",
            "4",
        ]
        worker = None
        if not options["no_worker"]:
            worker = subprocess.Popen(
                [sys.executable, "-m", *command],
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            time.sleep(3)  # It starts beside nothing else.
        try:
            assert stack.http is not None
            server = psutil.Process(stack.http.pid)
            print(json.dumps(asyncio.run(measure(stack.http.url, stack.http.key, server, options))))
        finally:
            if worker is not None:
                worker.kill()
                worker.wait()


if __name__ == "__main__":
    main()
