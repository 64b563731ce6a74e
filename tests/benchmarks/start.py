"""Measures a worker's start on a GPU: from the process to the first picture, and over to compiled code.

    python -m worker.bench.shapes sdxl /tmp/sdxl
    python -m tests.benchmarks.start /tmp/sdxl
    python -m tests.benchmarks.start /tmp/sdxl --fill /tmp/filled     # compiles ahead, and times loading it
    python -m tests.benchmarks.start /tmp/sdxl --filled /tmp/filled   # two short starts, with and without it

Starts `celery -A worker worker` (with pictures in a folder) and a Valkey, and keeps the queue full. Three
starts: without compiling, as the measure of uncompiled steps; with nothing compiled yet; and, as on another
machine, with what the one before has shared. The pictures of the second start, uncompiled ones and those of
jobs that changed over, are drawn again by the third. Prints JSON lines as it goes, and the table last.
"""

from __future__ import annotations

import collections
import contextlib
import json
import math
import os
import re
import secrets
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import redis
from PIL import Image

from deploy.embedded.servers import valkey_server

#: Jobs that wait or run, at least.
OUTSTANDING = 64
PORT = 16_381


def say(**values: Any) -> None:
    print(json.dumps(values), flush=True)


@contextlib.contextmanager
def valkey(folder: Path) -> Iterator[str]:
    """A server; yields its URL."""
    command = [str(valkey_server()), "--port", str(PORT), "--dir", str(folder), "--save", ""]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as server:
        url = f"redis://127.0.0.1:{PORT}/0"
        for _ in range(100):
            with contextlib.suppress(redis.RedisError):
                redis.Redis.from_url(url).ping()
                break
            time.sleep(0.1)
        try:
            yield url
        finally:
            server.terminate()


class Worker:
    """A worker, started now."""

    def __init__(self, name: str, work: Path, environment: dict[str, str]) -> None:
        self.name = name
        self.trace, self.log, self.folder = (work / f"{name}.{what}" for what in ("trace", "log", "pictures"))
        redis.Redis.from_url(environment["REDIS_URL"]).flushall()
        self.submitted = 0
        self._environment = environment
        #: The lines of the trace that were read.
        self.lines: list[dict[str, Any]] = []
        self._read = 0
        # Jobs wait already when the worker starts.
        self.top_up()
        self.started_s = time.time()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "celery", "-A", "tests.benchmarks.start_app", "worker"],
            env=environment
            | {
                "START_AT": str(self.started_s),
                "START_FOLDER": str(self.folder),
                "START_TRACE": str(self.trace),
            },
            stdout=self.log.open("wb"),
            stderr=subprocess.STDOUT,
        )

    def pictures(self) -> dict[str, Path]:
        """The pictures so far, by id, in the order in which they were put."""
        found = sorted(self.folder.glob("**/*.json"), key=lambda path: path.stat().st_mtime)
        return {path.stem: path.with_suffix(".png") for path in found}

    def top_up(self) -> None:
        """Submit jobs until `OUTSTANDING` wait or run."""
        from producer import submit_job

        os.environ.update({name: self._environment[name] for name in ("REDIS_URL", "S3_BUCKET")})
        done = len(self.pictures())
        while self.submitted - done < OUTSTANDING:
            submit_job(f"a small cat, number {self.submitted % 50}", seed=self.submitted, model="sdxl")
            self.submitted += 1

    def look(self) -> None:
        """Read what is new in the trace. Raises if the worker has ended."""
        self.top_up()
        if self.trace.exists():
            text = self.trace.read_bytes()
            end = text.rfind(b"\n") + 1
            new = [json.loads(line) for line in text[self._read : end].splitlines()]
            self._read = end
            self.lines += new
            for line in new:
                if line["kind"] != "step":
                    say(start=self.name, **line)
        if self._process.poll() is not None:
            print(self.log.read_text()[-6_000:], flush=True)
            raise click.ClickException("The worker has ended.")
        time.sleep(0.5)

    def steps(self, *, compiled: bool | None = None) -> list[dict[str, Any]]:
        """The steps of jobs, without those of the warm-up."""
        first_s = self.at_s("first job taken")
        return [
            line
            for line in self.lines
            if line["kind"] == "step"
            and line["at_s"] > first_s
            and (compiled is None or line["compiled"] == compiled)
        ]

    def at_s(self, what: str) -> float:
        """When something happened, or ended; NaN if it did not."""
        for line in self.lines:
            if line.get("what") == what:
                return float(line.get("at_s", line.get("ended_s")))
        return math.nan

    def stop(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        time.sleep(0.2)
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(15)
        except subprocess.TimeoutExpired:
            self._process.kill()
        text = self.log.read_text()
        for line in text.splitlines():
            if re.search(r"compil|captured|attention:|max rows|ERROR|WARNING|Traceback|VAE", line):
                print(f"  [{self.name}] {line[:400]}", flush=True)


def rate(steps: list[dict[str, Any]]) -> float:
    """Rows a second, by the clock."""
    if len(steps) < 3:
        return math.nan
    return sum(step["rows"] for step in steps[1:]) / (steps[-1]["at_s"] - steps[0]["at_s"])


def windows(worker: Worker, seconds: float = 5.0) -> list[tuple[float, float]]:
    """Rows a second in each few seconds."""
    rows: collections.Counter[int] = collections.Counter()
    for step in worker.steps():
        rows[int(step["at_s"] // seconds)] += step["rows"]
    return [(window * seconds, rows[window] / seconds) for window in sorted(rows)]


def excess_ms(steps: list[dict[str, Any]]) -> float:
    """By how much the longest interval between the ends of two steps exceeds the usual one of such steps."""
    usual: dict[tuple[bool, int], list[float]] = collections.defaultdict(list)
    for step in steps[1:]:
        usual[step["compiled"], step["rows"]].append(step["interval_ms"])
    found = [
        (step["interval_ms"] - statistics.median(usual[step["compiled"], step["rows"]]), step)
        for step in steps[1:]
    ]
    largest = sorted(found, key=lambda each: each[0], reverse=True)[:5]
    say(largest=[(round(more), step) for more, step in largest])
    return largest[0][0] if largest else math.nan


def decibels(one: Path, other: Path) -> float:
    pixels = [np.asarray(Image.open(path), dtype=np.float64) for path in (one, other)]
    error = float(np.mean((pixels[0] - pixels[1]) ** 2))
    return 99.0 if error == 0 else 10 * math.log10(255**2 / error)


def until(worker: Worker, seconds: float, done: Any) -> bool:
    """Look until `done` or for some seconds; returns whether it was."""
    ends_s = time.time() + seconds
    while time.time() < ends_s:
        worker.look()
        if done():
            return True
    return False


@contextlib.contextmanager
def reported() -> Iterator[None]:
    """What fails here is printed, and the rest goes on: the GPU's time is short."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - whatever it is
        say(failed=repr(error))


def of_change(cold: Worker, eager: float, first_s: float) -> dict[str, Any]:
    """The figures of the start with nothing compiled. `eager`: rows a second uncompiled."""
    before, after = cold.steps(compiled=False), cold.steps(compiled=True)
    table: dict[str, Any] = {
        "nothing compiled: first job taken, s": cold.at_s("first job taken"),
        "nothing compiled: first picture, s": first_s,
        "rows/s until the change, share of uncompiled": rate(before) / eager,
    }
    if not after:
        return table
    changed_s, begun_s = after[0]["at_s"], before[0]["at_s"] + 5
    slow = [rows for at_s, rows in windows(cold) if begun_s < at_s < changed_s - 5]
    near = [step for step in cold.steps() if abs(step["at_s"] - changed_s) < 15]
    return table | {
        "changed over, s after the start": changed_s,
        "rows/s in its worst 5 s, share of uncompiled": min(slow, default=math.nan) / eager,
        "rows/s compiled, share of uncompiled": rate(after[-40:]) / eager,
        "largest pause within 15 s of the change, ms": excess_ms(near),
        "largest pause in all, ms": excess_ms(cold.steps()[20:]),
    }


def imports() -> None:
    """Print what takes long to import; installed as `pip install` does, with the bytecode there."""
    folders = [folder for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder]
    subprocess.run([sys.executable, "-m", "compileall", "-q", "-j", "0", *folders, "worker", "producer"])
    program = "import worker.device.model_runner, diffusers; diffusers.StableDiffusionXLPipeline"
    started_s = time.time()
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", program], capture_output=True, text=True, check=False
    )
    say(imports_s=time.time() - started_s)
    rows = [line.split("|") for line in done.stderr.splitlines() if line.count("|") == 2]
    for row in rows:
        if row[1].strip().isdigit() and int(row[1]) > 250_000:
            print(f"  {int(row[1]) / 1e6:6.2f} s {row[2]}", flush=True)


def environment_of(model: Path, work: Path, shared: Path, url: str) -> dict[str, str]:
    """What workers are started with. `shared`: the folder of compiled code, with a key beside it."""
    shared.mkdir(parents=True, exist_ok=True)
    key = shared.with_suffix(".key")
    if not key.exists():
        key.write_text(secrets.token_hex(32))
    return dict(os.environ) | {
        "REDIS_URL": url,
        "S3_BUCKET": "folder",
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_DEFAULT_REGION": "us-east-1",
        "SMALLCAT_MODEL": str(model),
        "SMALLCAT_MODEL_NAME": "sdxl",
        "SMALLCAT_CACHE_DIR": str(work / "cache"),
        "SMALLCAT_KERNEL_CACHE": str(shared),
        "SMALLCAT_KERNEL_CACHE_KEY": key.read_text(),
        "PYTHONUNBUFFERED": "1",
    }


def fill_cache(model: Path, shared: Path) -> None:
    """Compile into `shared`: from nothing, or from kernels in TORCHINDUCTOR_CACHE_DIR where that is set."""
    work = Path(tempfile.mkdtemp(prefix="fill-"))
    environment = environment_of(model, work, shared, "redis://127.0.0.1:1/0")
    environment = {"TORCHINDUCTOR_CACHE_DIR": str(work / "kernels")} | environment
    environment["SMALLCAT_ATTENTION"] = "sdpa"
    started_s = time.time()
    subprocess.run([sys.executable, "-m", "producer", "warm"], env=environment, check=True)
    sizes = [each.stat().st_size for each in shared.rglob("*.kernels")]
    say(part="filled", seconds=time.time() - started_s, bytes=sizes)
    shutil.rmtree(work, ignore_errors=True)


def short_starts(model: Path, shared: Path) -> None:
    """One start with nothing compiled, to the first picture; one with `shared`, until it is compiled."""
    work = Path(tempfile.mkdtemp(prefix="start-"))
    table: dict[str, Any] = {}
    with valkey(work) as url:
        environment = environment_of(model, work, shared, url)
        alone = environment | {"SMALLCAT_KERNEL_CACHE": "", "SMALLCAT_KERNEL_CACHE_KEY": ""}
        cold = Worker("cold", work, alone | {"SMALLCAT_CACHE_DIR": str(work / "cold")})
        until(cold, 35, lambda: cold.pictures())
        table["nothing compiled: first picture, s"] = time.time() - cold.started_s
        until(cold, 6, lambda: False)
        table["nothing compiled: first job taken, s"] = cold.at_s("first job taken")
        table["nothing compiled: rows/s"] = rate(cold.steps())
        cold.stop()
        say(part=table)
        warm = Worker("warm", work, environment | {"SMALLCAT_ATTENTION": "sdpa"})
        until(warm, 50, lambda: len(warm.steps(compiled=True)) > 60)
        until(warm, 4, lambda: False)
        before, after = warm.steps(compiled=False), warm.steps(compiled=True)
        table["compiled before: first job taken, s"] = warm.at_s("first job taken")
        table["compiled before: uncompiled rows/s, and compiled"] = f"{rate(before):.1f}, {rate(after):.1f}"
        if after:
            changed_s = table["compiled before: changed over, s after the start"] = after[0]["at_s"]
            near = [step for step in warm.steps() if abs(step["at_s"] - changed_s) < 10]
            table["largest pause within 10 s of the change, ms"] = excess_ms(near)
        warm.stop()
        say(windows=windows(warm, 1.0))
        compare(cold, warm, table)
    show(table)
    shutil.rmtree(work, ignore_errors=True)


def compare(cold: Worker, warm: Worker, table: dict[str, Any]) -> None:
    """Put into the table how alike the pictures are that both starts drew."""
    one, other = cold.pictures(), warm.pictures()
    found = [decibels(one[job], other[job]) for job in one if job in other]
    say(decibels=[round(each, 1) for each in found])
    if found:
        table["pictures of both starts; dB, least and median"] = (
            f"{len(found)}; {min(found):.1f}, {statistics.median(found):.1f}"
        )


def show(table: dict[str, Any]) -> None:
    for name, value in table.items():
        print(f"{name:65} {value if isinstance(value, str) else round(value, 3)}", flush=True)


@click.command(help=__doc__)
@click.argument("model", type=click.Path(exists=True, path_type=Path))
@click.option("--most", default=260.0, show_default=True, help="Seconds that the second start may compile.")
@click.option("--again", default=50.0, show_default=True, help="Seconds of the third start.")
@click.option("--fill", "to_fill", type=click.Path(path_type=Path), help="Compile into this folder alone.")
@click.option("--filled", type=click.Path(exists=True, path_type=Path), help="Start twice, once with that.")
def main(model: Path, most: float, again: float, to_fill: Path | None, filled: Path | None) -> None:
    if to_fill is not None:
        fill_cache(model, to_fill)
    elif filled is not None:
        short_starts(model, filled)
    else:
        long_starts(model, most, again)


def long_starts(model: Path, most: float, again: float) -> None:
    """All starts, to their ends."""
    imports()
    work = Path(tempfile.mkdtemp(prefix="start-"))
    with valkey(work) as url:
        environment = environment_of(model, work, work / "shared", url)
        table: dict[str, Any] = {}

        plain = Worker("plain", work, environment | {"SMALLCAT_COMPILE": "0"})
        until(plain, 60, lambda: plain.pictures())
        first_plain_s = time.time() - plain.started_s
        until(plain, 12, lambda: False)
        plain.stop()
        eager = rate(plain.steps()[-40:])
        table["uncompiled (SMALLCAT_COMPILE=0), first job taken, s"] = plain.at_s("first job taken")
        table["uncompiled, first picture, s"] = first_plain_s
        table["uncompiled, rows/s"] = eager
        say(part=table)

        cold = Worker("cold", work, environment | {"SMALLCAT_CACHE_DIR": str(work / "cold")})
        until(cold, 60, lambda: cold.pictures())
        first_s = time.time() - cold.started_s
        until(cold, most, lambda: len(cold.steps(compiled=True)) > 20)
        until(cold, 20, lambda: False)
        cold.stop()
        with reported():
            table |= of_change(cold, eager, first_s)
        say(windows=windows(cold))
        say(part=table)

        # As another machine: nothing but what is shared.
        warm = Worker("warm", work, environment | {"SMALLCAT_CACHE_DIR": str(work / "warm")})
        until(warm, 60, lambda: warm.pictures())
        table["compiled before: first job taken, s"] = warm.at_s("first job taken")
        table["compiled before: first picture, s"] = time.time() - warm.started_s
        until(warm, again, lambda: len(warm.steps(compiled=True)) > 20)
        if warm.steps(compiled=True):
            table["compiled before: changed over, s after the start"] = warm.steps(compiled=True)[0]["at_s"]
        until(warm, 10, lambda: False)
        warm.stop()
        say(windows=windows(warm))
        compare(cold, warm, table)
    show(table)
    shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
