"""The seam for model families: a flow-matching transformer goes through engine, batcher and VAE decoder."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from tests import toy_flow, toy_flow_jobs
from tests.toy_flow import ToyFlow, loaded_toy
from worker.contract.errors import InvalidJobError, SettingsError, SmallcatError
from worker.contract.job import Job
from worker.contract.settings import WorkerSettings
from worker.device.compiling import compiler
from worker.device.families import family_of
from worker.device.family import ModelFamily
from worker.device.job_state import JobState
from worker.device.model_runner import ModelRunner
from worker.device.step import batch_of, denoise
from worker.device.vae import decoder

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def toy() -> ToyFlow:
    """One that no runner has touched: its attention is diffusers' own."""
    return ToyFlow(CPU)


def a_runner(**settings: Any) -> toy_flow_jobs.RecordingRunner:
    return toy_flow_jobs.RecordingRunner(WorkerSettings(max_batch=8, **settings), CPU)


@pytest.mark.parametrize("exact", [False, True])
def test_a_flow_matching_transformer_renders_as_its_own_plain_loop(toy: ToyFlow, exact: bool) -> None:
    runner = a_runner(exact=exact)
    toy_flow_jobs.check(runner, toy_flow_jobs.render(runner), toy)


class NeverFree(nullcontext[None]):
    """A lock that lets a compiler pass and no capture: graphs then run their functions as they are."""

    def acquire(self, blocking: bool) -> bool:
        return blocking


@pytest.fixture
def padded_on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadPoolExecutor]:
    """Runners compile, on this thread, and pad as on a GPU, though nothing is captured."""
    with ThreadPoolExecutor(1) as thread:
        fake = SimpleNamespace(
            submit=thread.submit,
            in_background=True,
            is_serving=False,
            elsewhere=None,
            device_sync_lock=NeverFree(),
        )
        monkeypatch.setattr(ModelRunner, "_compiler", lambda runner, settings, alone, shared: fake)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: 0)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        # On a CPU, convolutions have another way from 16 pictures on.
        monkeypatch.setattr(decoder, "CPU_PIXELS", 8 * 64 * 64)
        yield thread


@pytest.fixture
def compiled_on_cpu(monkeypatch: pytest.MonkeyPatch, padded_on_cpu: ThreadPoolExecutor) -> Iterator[None]:
    """The same, and Dynamo traces."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# Traced three times, which takes 10 s, and more beside other tests. That a padded batch gives what the batch
# itself gives is tested below for one size.
@pytest.mark.services
@pytest.mark.timeout(240)
@pytest.mark.usefixtures("compiled_on_cpu")
def test_batches_that_are_padded_for_compiled_steps_give_the_same_pictures(toy: ToyFlow) -> None:
    runner = a_runner()
    for job in toy_flow_jobs.JOBS[: len(toy_flow_jobs.SIZES)]:
        assert runner.compile(job)
    counters.clear()
    pictures = toy_flow_jobs.render(runner)
    assert counters["stats"]["unique_graphs"] == 0, "nothing is compiled again"
    assert runner._graphs is not None
    lanes = {name.rpartition(", ")[2] for pool in runner._graphs._pools for name in pool._graphs}
    assert lanes == {"4x8x8", "4x8x12", "4x12x8"}
    toy_flow_jobs.check(runner, pictures, toy)


def test_jobs_that_change_over_to_compiled_steps_give_the_same_pictures(
    monkeypatch: pytest.MonkeyPatch, padded_on_cpu: ThreadPoolExecutor, toy: ToyFlow
) -> None:
    """Between two of their steps: what is compiled beside them takes over, with the padding of its graphs."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(torch.cuda, "Event", lambda: SimpleNamespace(record=lambda: None, query=lambda: True))
    monkeypatch.setattr(compiler, "CALLS_BEFORE_COMPILING", 3)
    runner = a_runner()
    steps: dict[int, list[bool]] = {}
    step = runner.step

    def noted(states: Sequence[JobState]) -> list[SmallcatError | None]:
        outcomes = step(states)
        for state in states:
            steps.setdefault(state.job.seed, []).append(runner.is_compiled)
        # What the step has begun to compile takes over at the next one, however long it takes.
        padded_on_cpu.submit(lambda: None).result()
        return outcomes

    monkeypatch.setattr(runner, "step", noted)
    toy_flow_jobs.check(runner, toy_flow_jobs.render(runner), toy)
    changed = [seed for seed, compiled in steps.items() if set(compiled) == {False, True}]
    assert len(changed) >= 3
    # Over, and not back.
    assert all(steps[seed] == sorted(steps[seed]) for seed in changed)


def test_another_family_takes_at_most_200_lines() -> None:
    assert len(Path(toy_flow.__file__).read_text("utf-8").splitlines()) <= 200


def test_a_family_may_have_latents_of_any_shape_and_sizes_of_its_own() -> None:
    runner = a_runner()
    wide, tall = (runner.prepare(Job(prompt="a", seed=1, width=w, height=h)) for w, h in ((96, 64), (64, 96)))
    assert wide.latents.shape == tall.latents.shape == (1, 24, 16)
    assert wide.lane != tall.lane
    with pytest.raises(InvalidJobError, match="72 x 64, but this model's sizes are multiples of 16"):
        runner.prepare(Job(prompt="a", seed=1, width=72, height=64))
    with pytest.raises(InvalidJobError, match='this is a flow-matching model: use "default" or "euler"'):
        runner.prepare(Job(prompt="a", seed=1, scheduler="ddim"))


def test_a_family_warms_up_and_is_measured() -> None:
    runner = toy_flow_jobs.RecordingRunner(WorkerSettings(), CPU)
    choices = {choice.what: choice.choice for choice in (*runner.choices, *runner.warm_up())}
    assert choices == {"attention": "sdpa", "compile": "no", "max rows": str(runner.max_rows)}
    lane, large = runner._family.lane(64, 64), runner._family.lane(128, 128)
    assert runner.cap(lane) == runner.max_rows
    assert runner.cap(large) == max(1, runner.max_rows // 4)
    assert runner.job_s > 0


def test_the_compiler_takes_the_toys_step_and_vae_in_one_piece_and_once_for_any_number() -> None:
    """As for the UNets: see test_step.py."""
    runner = a_runner()
    family: ModelFamily = runner._family
    states = [runner.prepare(Job(prompt="a cat", seed=seed, guidance_scale=3.0 * seed)) for seed in (0, 1)]
    batch = batch_of([state.next_inputs() for state in states])
    torch._dynamo.reset()
    counters.clear()
    example = batch.zeros(jobs=4, rows=6)
    for tensor in example.tensors():
        torch._dynamo.mark_dynamic(tensor, 0)
    vae_inputs = family.to_vae(states[0].lane, torch.cat([state.latents for state in states]))
    vae_example = vae_inputs.new_zeros((4, *vae_inputs.shape[1:]))
    torch._dynamo.mark_dynamic(vae_example, 0)
    with torch.no_grad():
        compile_ = functools.partial(torch.compile, fullgraph=True, dynamic=False, backend="eager")
        step, decode = compile_(functools.partial(denoise, family.forward)), compile_(family.decode)
        step(example)
        decode(vae_example)
        for jobs, rows in ((2, 3), (2, 4), (6, 6), (3, 12)):
            padded = batch.zeros(jobs, rows)
            for whole, part in zip(padded.tensors(), batch.tensors(), strict=True):
                whole[: len(part)] = part
            for one, other in zip(step(padded), denoise(family.forward, batch), strict=True):
                assert torch.allclose(one[:2].float(), other.float(), atol=1e-4)
        for count in (2, 5):
            inputs = vae_inputs.new_zeros((count, *vae_inputs.shape[1:]))
            inputs[:2] = vae_inputs
            assert torch.allclose(decode(inputs)[:2], family.decode(vae_inputs), atol=1e-4)
    assert counters["stats"]["unique_graphs"] == 2
    torch._dynamo.reset()


def test_a_pipeline_of_no_known_family_is_refused() -> None:
    loaded = loaded_toy(CPU)
    pipeline = SimpleNamespace(unet=object())
    with pytest.raises(
        SettingsError, match=r"The model toy is a SimpleNamespace, which is not served: use a"
    ):
        family_of(
            type(loaded)(pipeline, loaded.served, loaded.device, loaded.dtype, loaded.choices), compiled=False
        )


def test_a_runner_loads_what_it_is_not_given(tmp_path: Path) -> None:
    with pytest.raises(SettingsError):
        ModelRunner(WorkerSettings(model=str(tmp_path / "missing")))
