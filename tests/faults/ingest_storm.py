"""Kill the feeder of a large prompt file again and again, and count what arrived.

    python -m tests.faults.ingest_storm                    a million lines, 20 kills: about 15 minutes
    python -m tests.faults.ingest_storm --lines 100000     smaller

The servers are real; the consumer (`tests.drain`) ends jobs with the workers' own scripts and journals every
message that it gets. Prints one JSON object, and exits with 1 if a line is missing or came twice, if a key
is left without an expiry or an owner, or if the feeder took more than 200 MB.
"""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import click
import redis

from deploy.embedded.stack import Stack
from tests.fast_worker import SERVED, announce
from worker.contract.queues import lists_of, queues_of

ROOT = Path(__file__).resolve().parents[2]
QUEUE = queues_of(SERVED)[0]
#: What the feeder may take, and the longest that its queue may be.
MAX_MB, MAX_QUEUED = 200, 10_000


def storm(stack: Stack, folder: Path, lines: int, kills: int, seed: int) -> dict[str, Any]:
    """Feed a file of `lines` lines and kill the feeder `kills` times. Returns what was seen."""
    rng = random.Random(seed)
    client = redis.Redis.from_url(stack.valkey.url, decode_responses=True)
    announce(stack.valkey.url)
    file, journal = folder / "prompts.txt", folder / "drained"
    file.write_text("".join(f"a photo of cat number {number}\n" for number in range(lines)))
    environment = stack.environment | {"DRAIN_JOURNAL": str(journal)}
    drain = subprocess.Popen([sys.executable, "-m", "tests.drain", QUEUE], cwd=ROOT, env=environment)
    began, peak_kb, longest, killed_at = time.monotonic(), 0, 0, []
    try:
        for kill in range(kills + 1):
            goal = lines * (kill + rng.random()) / (kills + 1) if kill < kills else None
            feeder = _feeder(stack, file)
            while feeder.poll() is None:
                fed = int(_run(client).get("fed", 0))
                longest = max(longest, sum(client.llen(name) for name in lists_of(QUEUE)))
                peak_kb = max(peak_kb, _peak_kb(feeder.pid))
                if goal is not None and fed >= goal:
                    time.sleep(rng.random() * 0.05)
                    feeder.send_signal(signal.SIGKILL)
                    feeder.wait()
                    killed_at.append(int(_run(client).get("fed", 0)))
                time.sleep(0.02)
        took_s = time.monotonic() - began
        again = _feeder(stack, file)
        code_again = again.wait()
    finally:
        drain.terminate()
        drain.wait()
    return {
        "lines": lines,
        "kills": killed_at,
        "seconds": round(took_s),
        "exit_code": feeder.returncode,
        "exit_code_again": code_again,
        "peak_mb": round(peak_kb / 1024),
        "longest_queue": longest,
        **_arrived(journal, lines),
        **_manifest(folder / "prompts.txt.manifest.jsonl", lines),
        "keys_without_expiry": _eternal(client),
    }


def _feeder(stack: Stack, file: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "producer", "ingest", str(file), "--quiet"]
    command += ["--max-queued", str(MAX_QUEUED)]
    return subprocess.Popen(command, cwd=ROOT, env=stack.environment, stdout=subprocess.DEVNULL)


def _run(client: redis.Redis) -> dict[str, str]:
    for name in client.scan_iter("smallcat:run:*", _type="hash"):
        found: dict[str, str] = client.hgetall(name)  # type: ignore[assignment]
        return found
    return {}


def _peak_kb(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")), 0)


def _arrived(journal: Path, lines: int) -> dict[str, Any]:
    with journal.open() as drained:
        times = Counter(int(line.split()[0]) for line in drained)
    return {
        "missing": sum(number not in times for number in range(lines)),
        "twice": sum(count > 1 for count in times.values()),
        "unknown": sum(number >= lines for number in times),
    }


def _manifest(manifest: Path, lines: int) -> dict[str, Any]:
    count, in_order, states = 0, True, Counter[str]()
    with manifest.open() as file:
        for count, text in enumerate(file, 1):
            values = json.loads(text)
            in_order &= values["line"] == count
            states[values["state"]] += 1
    return {"manifest_lines": count, "in_order": in_order and count == lines, "states": dict(states)}


def _eternal(client: redis.Redis) -> list[str]:
    """Keys without an expiry."""
    return [name for name in client.scan_iter() if client.ttl(name) == -1]


@click.command()
@click.option("--lines", default=1_000_000)
@click.option("--kills", default=20)
@click.option("--seed", default=1)
def main(lines: int, kills: int, seed: int) -> None:
    with Stack(workers=0) as stack, tempfile.TemporaryDirectory() as folder:
        seen = storm(stack, Path(folder), lines, kills, seed)
    print(json.dumps(seen))
    good = not (seen["missing"] or seen["twice"] or seen["unknown"] or seen["keys_without_expiry"])
    good &= seen["in_order"] and seen["peak_mb"] < MAX_MB and seen["exit_code"] == 0
    sys.exit(0 if good and seen["longest_queue"] <= MAX_QUEUED else 1)


if __name__ == "__main__":
    main()
