"""What long prompts cost: jobs of different lengths in one step, against a step for each length.

    python -m tests.benchmarks.text_lengths --model FOLDER --rows 32

For each mixture of lengths, in windows of the text encoder: milliseconds of one step that all jobs share, and
of one step after the other for the jobs of each length. Also those of a step in which all have one length,
from which `worker.engine.step_cost.TEXT_SHARE` comes. On a GPU every kind of batch is compiled first.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence

import click
import torch

from worker.contract.job import Job
from worker.contract.settings import worker_settings
from worker.device.job_state import JobState
from worker.device.model_runner import ModelRunner
from worker.device.step import batch_of

#: Mixtures of lengths; jobs of each in equal parts.
MIXTURES = ((1,), (2,), (4,), (8,), (1, 2), (1, 4), (1, 2, 4), (2, 3), (1, 2, 3), (1, 1, 1, 1, 1, 1, 1, 4))


def states_of(runner: ModelRunner, lengths: Sequence[int], rows: int) -> list[JobState]:
    """Jobs without guidance, a row each, of these lengths in turns."""
    prompts = [" BREAK ".join(["a small cat"] * length) for length in lengths]
    return [
        runner.prepare(
            Job(
                prompt=prompts[number % len(prompts)],
                prompt_syntax="a1111",
                seed=number,
                guidance_scale=1.0,
                steps=20,
                scheduler="euler",
            )
        )
        for number in range(rows)
    ]


@torch.no_grad()
def step_ms(runner: ModelRunner, groups: Sequence[Sequence[JobState]], times: int) -> float:
    """Milliseconds of a step of each group, one after the other: the fastest, on a machine that is shared."""
    for group in groups:
        if runner._graphs is not None:
            runner._graphs.compile(group[0].lane, batch_of([state.next_inputs() for state in group]))
    taken = []
    for number in range(times + 3):
        started_s = time.perf_counter()
        for group in groups:
            for step in runner._run([group]):
                step.finite.tolist()
        if number >= 3:
            taken.append(time.perf_counter() - started_s)
    return 1e3 * min(taken)


@click.command(help=__doc__)
@click.option("--model", default="", help="Folder; the bundled model when not given.")
@click.option("--rows", default=8, show_default=True, help="Jobs in a step, a row each.")
@click.option("--times", default=10, show_default=True, help="Steps that are measured.")
@click.option("--most", default=10, show_default=True, help="Mixtures that are measured, from the first.")
def main(model: str, rows: int, times: int, most: int) -> None:
    settings = worker_settings().model_copy(update={"model": model} if model else {})
    runner = ModelRunner(settings)
    for lengths in MIXTURES[:most]:
        states = states_of(runner, lengths, rows)
        line: dict[str, object] = {
            "lengths": lengths,
            "shared_ms": round(step_ms(runner, [states], times), 2),
        }
        if len(set(lengths)) > 1:
            by_length: dict[int, list[JobState]] = {}
            for state in states:
                by_length.setdefault(state.text_tokens, []).append(state)
            line["lanes_ms"] = round(step_ms(runner, list(by_length.values()), times), 2)
        line |= {"kind": batch_of([state.next_inputs() for state in states]).kind}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
