"""Measures what LoRAs cost a worker's start: the first and the second start, without them and with them.

    python -m tests.benchmarks.start_loras MODEL FOLDER
    python -m tests.benchmarks.start_loras worker/demo/model worker/demo/loras --more 20    # also on a CPU

Starts `celery -A worker worker` as `tests.benchmarks.start` does. The first start knows nothing: neither the
files' hashes nor compiled code. `--more` adds so many files of 100 MB that no job asks for. Prints JSON lines
as it goes, and the table last.
"""

from __future__ import annotations

import json
import math
import shutil
import struct
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from tests.benchmarks.start import Worker, environment_of, say, show, until, valkey

#: Parts of the start that LoRAs have something to do with, as `tests.benchmarks.start_app` notes them.
PARTS = ("files beside the model", "warm up, all")
#: Seconds until the first picture, at most.
FIRST_S = 240.0


def add_files(folder: Path, count: int, size: int = 100 << 20) -> None:
    """Put files into a folder whose headers say that they are LoRAs for SD 1.x."""
    module = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    rank = 64
    up = (size // 4 - rank * 768) // rank
    ends = [4 * rank * 768, 4 * rank * (768 + up)]
    tensors = {
        f"{module}.lora_A.weight": {"dtype": "F32", "shape": [rank, 768], "data_offsets": [0, ends[0]]},
        f"{module}.lora_B.weight": {"dtype": "F32", "shape": [up, rank], "data_offsets": ends},
    }
    header = json.dumps(tensors).encode()
    for number in range(count):
        with (folder / f"more-{number}.safetensors").open("wb") as file:
            file.write(struct.pack("<Q", len(header)) + header)
            file.write(bytes([number % 256]) * ends[1])


def start(name: str, work: Path, environment: dict[str, str], most: float) -> Iterator[tuple[str, float]]:
    """Start a worker, and yield what it took, in seconds, until compiled steps run or for `most` seconds."""
    worker = Worker(name, work, environment)
    until(worker, FIRST_S, worker.pictures)
    yield "first job taken", worker.at_s("first job taken")
    yield "first picture", time.time() - worker.started_s
    if worker.steps():  # They are noted on a GPU alone.
        until(worker, most, lambda: len(worker.steps(compiled=True)) > 20)
        changed = worker.steps(compiled=True)[:1]
        yield "changed over to compiled steps", changed[0]["at_s"] if changed else math.nan
    for line in worker.lines:
        if line.get("what") in PARTS:
            yield line["what"], line["ended_s"] - line["began_s"]
    worker.stop()


@click.command(help=__doc__)
@click.argument("model", type=click.Path(exists=True, path_type=Path))
@click.argument("loras", type=click.Path(exists=True, path_type=Path))
@click.option("--more", default=0, show_default=True, help="Files of 100 MB beside them.")
@click.option("--most", default=400.0, show_default=True, help="Seconds that a start may compile.")
def main(model: Path, loras: Path, more: int, most: float) -> None:
    work = Path(tempfile.mkdtemp(prefix="start-"))
    shutil.copytree(loras, work / "loras")
    add_files(work / "loras", more)
    table: dict[str, Any] = {}
    with valkey(work) as url:
        # A page cache that holds the model, and bytecode, for all starts alike.
        environment = environment_of(model, work, work / "shared", url)
        for what, _ in start("before", work, environment | {"SMALLCAT_COMPILE": "0"}, 0.0):
            say(before=what)
        for name, setting in (("without", ""), ("with", str(work / "loras"))):
            own = environment_of(model, work, work / f"shared-{name}", url)
            own |= {"SMALLCAT_CACHE_DIR": str(work / f"cache-{name}"), "SMALLCAT_LORAS": setting}
            for number in ("first", "second"):
                for what, seconds in start(f"{name}-{number}", work, own, most):
                    table[f"{name} LoRAs, {number} start: {what}, s"] = seconds
                    say(part=table)
    show(table)
    shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
