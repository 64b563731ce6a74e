"""What a worker does before its first job: it tries a small one, compiles, and measures the cost of steps."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from worker.contract.errors import DeviceError, OutOfMemoryError, SettingsError, SmallcatError
from worker.contract.job import Job
from worker.contract.served_model import ServedModel
from worker.device.compiling.ahead import Ahead
from worker.device.compiling.compiler import Compiler, Piece
from worker.device.costs import Costs
from worker.device.errors import mapped
from worker.device.job_state import JobState
from worker.device.loras.cache import Loras
from worker.engine import step_cost
from worker.engine.runner import Runner, StateT
from worker.model.memory_plan import MemoryPlan
from worker.model.placement import Choice

#: What these jobs show does not matter.
PROMPT = "a small cat"
#: Side in pixels of the trial's picture on a CPU, and its steps.
TRIAL_SIDE, TRIAL_STEPS = 64, 4
#: Seconds after which no larger batch is measured: on a GPU, and on a CPU, which is full with few rows.
GPU_MEASURE_S, CPU_MEASURE_S = 5.0, 0.4
#: Rank of the LoRAs whose cost is measured. It hardly matters (docs/performance.md, "LoRAs").
LORA_RANK = 16
#: The choice of a worker that serves before its steps are compiled.
IN_BACKGROUND = Choice("compile", "in the background", "until then steps are uncompiled")
#: That of one whose GPU has no room for compiled steps beside the uncompiled ones.
TOO_SMALL = Choice("compile", "no", "there is no room for it, see memory")
#: Batch sizes that are measured however long it takes, and steps of each size, of which the fastest counts.
MIN_SIZES, TIMES = 4, 3
#: The same where jobs wait for it: seconds, sizes, steps of each.
QUICK_S, QUICK_SIZES, QUICK_TIMES = 1.0, 3, 2


class TrialRunner(Runner[JobState], Protocol):
    """What `warm_up` calls of a `worker.device.model_runner.ModelRunner`, which imports this module."""

    served: ServedModel
    choices: tuple[Choice, ...]

    def compile(self, job: Job, *, loras: bool = False) -> bool:
        """Compile now for jobs of the size of `job`, with LoRAs if `loras`. Returns whether that worked."""

    def default_pieces(self) -> list[Piece]:
        """What is compiled for the model's default size, with LoRAs where some are offered."""


def warm_up(
    runner: TrialRunner,
    step_s: Callable[[Sequence[JobState]], float],
    costs: Costs,
    loras: Loras | None,
    compiler: Compiler | None,
    *,
    on_gpu: bool,
    compiles_first: bool,
    max_batch: int | None,
    plan: MemoryPlan,
) -> tuple[Choice, ...]:
    """Make a runner ready for its first job. Returns what was chosen.

    `step_s` runs one step of jobs, which stay as they are, and returns its seconds. What is measured goes to
    `costs`. `loras`: None where none are offered. `compiler`: None where nothing is compiled.
    `compiles_first`: the first job waits for compiled steps. `max_batch`: rows that the settings ask for.
    `plan`: that of the memory.
    Raises `SettingsError` when a small picture fails.
    """
    # In exact mode nothing is run that another process has compiled.
    loads = compiler is not None and compiler.in_background
    device = next((choice.choice for choice in runner.choices if choice.what == "device"), "")
    with refused(runner.served.name, device):
        ahead = Ahead(runner.default_pieces()) if loads else None
        run_trial(runner, on_gpu=on_gpu)
        compiled = (ahead and ahead.load()) or IN_BACKGROUND
        if not loads or (compiles_first and compiled is IN_BACKGROUND):
            compiled = compile_default(runner.compile if compiler is not None else None, on_gpu=on_gpu)
        if not plan.compile:
            compiled = TOO_SMALL
    row = runner.prepare(Job(prompt=PROMPT, seed=0, guidance_scale=1.0))
    costs.window = row.text_tokens
    curve, measured = measure_steps(
        lambda rows: step_s([row] * rows),
        on_gpu=on_gpu,
        max_batch=max_batch,
        planned=plan.rows,
        quick=compiler is not None and not compiles_first,
    )
    costs.measured(curve, int(measured.choice))
    compiles = compiler is not None and compiles_first
    of_loras = _warm_up_loras(runner, row, step_s, costs, loras, compiles=compiles) if loras else ()
    if compiler is not None:
        compiler.is_serving = True
        if not compiles_first:
            for piece in runner.default_pieces():
                piece.begin()
        if compiled is IN_BACKGROUND:
            costs.search()
    return compiled, measured, *of_loras


def _warm_up_loras(
    runner: TrialRunner,
    row: JobState,
    step_s: Callable[[Sequence[JobState]], float],
    costs: Costs,
    loras: Loras,
    *,
    compiles: bool,
) -> tuple[Choice, ...]:
    """Compile the steps with LoRAs if `compiles`, and measure what they cost; nothing if there are none."""
    if (example := loras.example(LORA_RANK)) is None:
        return ()
    chosen = []
    if compiles:
        compile_for = functools.partial(runner.compile, loras=True)
        chosen.append(compile_default(compile_for, on_gpu=True, what="compile for LoRAs"))

    def with_loras_s(has_loras: bool) -> float:
        row.loras = example if has_loras else None
        return step_s([row] * runner.max_rows)

    share, measured = measure_loras(with_loras_s)
    costs.measured_loras(share)
    return *chosen, measured, loras.choice


@contextlib.contextmanager
def refused(model: str, device: str) -> Iterator[None]:
    """Raise a `SettingsError` in the place of what a trial raises."""
    try:
        yield
    except DeviceError as error:
        raise SettingsError(
            f"The device {device} failed to render one small picture at start ({error}): see what "
            "nvidia-smi says of it, and name another one by CUDA_VISIBLE_DEVICES."
        ) from error
    except SmallcatError as error:
        raise SettingsError(
            f"The model {model} failed to render at start ({error}): try another SMALLCAT_DTYPE, "
            "SMALLCAT_ATTENTION or SMALLCAT_MODEL."
        ) from error


def run_trial(runner: Runner[StateT], *, on_gpu: bool) -> None:
    """Render one small picture. Raises the `SmallcatError` that it fails with."""
    # A GPU chooses kernels by shape, so the trial has the size that most jobs have.
    side = None if on_gpu else TRIAL_SIDE
    state = runner.prepare(Job(prompt=PROMPT, seed=0, steps=TRIAL_STEPS, width=side, height=side))
    while state.step < state.steps:
        (failure,) = runner.step([state])
        if failure is not None:
            raise failure
    (picture,) = runner.decode([state])
    if isinstance(picture, SmallcatError):
        raise picture


def compile_default(
    compile_for: Callable[[Job], bool] | None, *, on_gpu: bool, what: str = "compile"
) -> Choice:
    """Compile for the default size. Returns whether the worker's steps are compiled, and why.

    `compile_for`: compiles for jobs of the size of its argument, and returns whether that worked; None: this
    worker compiles nothing.
    """
    if compile_for is None:
        return Choice(what, "no", "SMALLCAT_COMPILE=0" if on_gpu else "the CPU runs the plain step")
    started_s = time.monotonic()
    if not compile_for(Job(prompt=PROMPT, seed=0)):
        return Choice(what, "no", "it failed, see above")
    return Choice(what, "yes", f"took {time.monotonic() - started_s:.0f} s for the default size")


def measure_steps(
    step_s: Callable[[int], float],
    *,
    on_gpu: bool,
    max_batch: int | None,
    planned: int | None = None,
    quick: bool = False,
) -> tuple[list[tuple[int, float]], Choice]:
    """(rows, seconds a step) for rising numbers of rows, and the most rows that a step should have.

    `step_s` runs one step of so many rows and returns its seconds. `max_batch`: rows that the settings ask
    for, `planned` those that fit in memory by its plan; no more are measured. Ends where more rows do not fit
    in memory or gain nothing.
    """
    curve: list[tuple[int, float]] = []
    budget_s, times, min_sizes = GPU_MEASURE_S if on_gpu else CPU_MEASURE_S, TIMES, MIN_SIZES
    if quick:
        budget_s, times, min_sizes = QUICK_S, QUICK_TIMES, QUICK_SIZES
    started_s = time.monotonic()
    for rows in step_cost.BATCH_SIZES[1 if quick and max_batch != 1 else 0 :]:
        if rows > min(max_batch or rows, planned or rows):
            break
        try:
            with mapped("measure"):
                # The first step of a size is slow, because kernels are chosen by shape.
                seconds = min(step_s(rows) for _ in range(times))
        except OutOfMemoryError:
            break
        curve.append((rows, seconds))
        is_late = time.monotonic() - started_s > budget_s and len(curve) >= min_sizes
        if step_cost.is_past_gain(curve) or is_late:
            break
    cap, reason = step_cost.choose_cap(curve)
    if max_batch is not None:
        cap, reason = max_batch, "SMALLCAT_MAX_BATCH asks for it"
    if planned is not None and cap > planned:
        cap, reason = planned, f"as many as fit in memory, by its plan; {reason}"
    return curve, Choice("max rows", str(cap), reason)


def measure_loras(step_s: Callable[[bool], float]) -> tuple[float, Choice]:
    """By what share of itself a row with LoRAs costs more, >= 0. `step_s`: of a step whose rows have some."""
    without_s, with_s = (min(step_s(loras) for _ in range(TIMES)) for loras in (False, True))
    share = max(0.0, with_s / without_s - 1)
    return share, Choice("LoRAs", f"+{share:.0%}", "measured: a row with LoRAs costs so much more")
