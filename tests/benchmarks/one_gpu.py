"""What the figures of `docs/performance.md` are measured with, on one GPU, several measurements in one go.

    python -m tests.benchmarks.one_gpu engine-sdxl,engine-sdxl-fp8,engine-sd15 kinds start --most 3000

Those that are joined by commas compile side by side and measure in turn (`tests.benchmarks.held`); after a
space the next one has the machine for itself. Models with random weights are made in the
folder first, and compiled code is kept there, by model: what a measurement compiled, the next ones load. Each
one's output goes to a file in the folder, and its last lines are printed as it ends. After `--most` seconds
those that still run are stopped.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import click


@dataclass(frozen=True)
class Measurement:
    """A program, as the words after `python -m`; a name in braces is a model."""

    words: str
    precision: str = ""
    #: It would disturb others, or be disturbed by them: by what a host does beside it, or in memory.
    is_alone: bool = False
    #: It measures how long it takes with nothing compiled.
    is_cold: bool = False

    @property
    def model(self) -> str:
        """The one that is measured; nothing where several are."""
        return next((each for each in MODELS if f"{{{each}}}" in self.words), "")


#: `worker.bench.shapes` makes them.
MODELS = ("sdxl", "sd15")
MEASUREMENTS = {
    "engine-sdxl": Measurement("tests.benchmarks.engine --model {sdxl} --job steps=30 --seconds 60"),
    "engine-sdxl-fp8": Measurement(
        "tests.benchmarks.engine --model {sdxl} --job steps=30 --seconds 60", precision="fp8"
    ),
    "engine-sd15": Measurement("tests.benchmarks.engine --model {sd15} --job steps=50 --seconds 60"),
    "kinds": Measurement(
        "tests.benchmarks.kinds --model {sdxl} --steps 30 --seconds 22 --rounds 1", is_alone=True
    ),
    "compile-loras-sd15": Measurement("tests.benchmarks.loras {sd15} --rows 32 --rank 16 --only-compile"),
    "start": Measurement("tests.benchmarks.start {sdxl}", is_alone=True, is_cold=True),
    "loras-sd15": Measurement("tests.benchmarks.loras {sd15} --rows 32 --rank 16", is_alone=True),
    "loras-sdxl": Measurement("tests.benchmarks.loras {sdxl} --rows 16 --rank 32", is_alone=True),
    "lora-zipf": Measurement("tests.benchmarks.lora_zipf --model {sd15} --kept 1000,300,100,30"),
    "peers-sd15": Measurement("worker.bench --only d --model {sd15} --steps 50", is_alone=True),
    "peers-sdxl": Measurement("worker.bench --only d --model {sdxl} --steps 30", is_alone=True),
    "fp8-layers": Measurement("tests.benchmarks.fp8_layers", is_alone=True),
    "memory": Measurement("pytest tests/gpu/test_memory.py -q", is_alone=True),
    "tests": Measurement("pytest tests/gpu -q", is_alone=True),
}
#: The lines of a measurement's output that are printed: its table is last.
LAST_LINES = 30


@dataclass(frozen=True)
class Running:
    """A measurement that has started."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    since_s: float

    def stop(self) -> None:
        """As Ctrl-C does, so that it ends what it has started; what is left after 15 s is killed."""
        os.killpg(self.process.pid, signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(15)
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def report(self) -> None:
        lines = self.log.read_text(errors="replace").splitlines()[-LAST_LINES:]
        ended = f"ended with {self.process.returncode} after {time.monotonic() - self.since_s:.0f} s"
        print(f"== {self.name}: {ended}", *lines, sep="\n", flush=True)


def make_models(folder: Path) -> None:
    """Those that are missing, side by side. Raises `SystemExit` where one fails."""
    missing = [each for each in MODELS if not (folder / each).exists()]
    words = [[sys.executable, "-m", "worker.bench.shapes", each, str(folder / each)] for each in missing]
    processes = [subprocess.Popen(each) for each in words]
    if sum(abs(each.wait()) for each in processes):
        sys.exit(f"The models {' and '.join(missing)} cannot be made.")


def start(name: str, folder: Path, turn: Path | None) -> Running:
    """Start it in a process group of its own; with a turn, it measures only while it has that lock."""
    what = MEASUREMENTS[name]
    words = shlex.split(what.words.format(**{each: folder / each for each in MODELS}))
    if turn is not None:
        words = ["tests.benchmarks.held", str(turn), *words]
    # tests/gpu finds models of full size there.
    environment = os.environ | {"SMALLCAT_TEST_SHAPES": str(folder)}
    if not what.is_cold:
        environment["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "cache" / what.model)
    # Several processes can share a GPU that is named.
    environment.setdefault("CUDA_VISIBLE_DEVICES", "0")
    if what.precision:
        environment["SMALLCAT_PRECISION"] = what.precision
    log = folder / f"{name}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", *words],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return Running(name, process, log, time.monotonic())


def run_together(names: Sequence[str], folder: Path, until_s: float) -> bool:
    """Whether all of them ended well, and in time; each one's last lines are printed as it ends."""
    turn = folder / "turn" if len(names) > 1 else None  # the file of the lock
    running = [start(name, folder, turn) for name in names]
    is_well = True
    try:
        while running:
            for each in [each for each in running if each.process.poll() is not None]:
                each.report()
                is_well = is_well and not each.process.returncode
                running.remove(each)
            if time.monotonic() > until_s:
                return False
            time.sleep(0.2)
    finally:
        for each in running:
            each.stop()
            each.report()
    return is_well


@click.command(help=__doc__)
@click.argument("groups", nargs=-1, required=True, metavar="NAME[,NAME]...")
@click.option("--folder", default=Path("outputs/one-gpu"), show_default=True, type=click.Path(path_type=Path))
@click.option("--most", default=3600.0, show_default=True, help="Seconds in all.")
def main(groups: tuple[str, ...], folder: Path, most: float) -> None:
    until_s = time.monotonic() + most
    together = [group.split(",") for group in groups]
    if unknown := {name for group in together for name in group} - set(MEASUREMENTS):
        raise click.UsageError(f"{', '.join(sorted(unknown))}: write some of {', '.join(MEASUREMENTS)}.")
    for group in together:
        if len(group) > 1 and (alone := [name for name in group if MEASUREMENTS[name].is_alone]):
            raise click.UsageError(f"{alone[0]} is measured alone: put a space beside it, not a comma.")
    folder.mkdir(parents=True, exist_ok=True)
    make_models(folder)
    failed = [group for group in together if not run_together(group, folder, until_s)]
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
