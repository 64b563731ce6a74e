"""A job in flight, and what it brings to its next step."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from worker.contract.errors import NotFiniteError
from worker.contract.job import Job
from worker.contract.loras import Lora
from worker.device.beginnings import Beginning
from worker.device.job_state import FiniteCheck, JobState
from worker.device.schedulers.schedule import SLOTS, Schedule
from worker.device.step import batch_of
from worker.device.text.job_text import plain_text

SHAPES = [(4, 2, 3), (6, 5)]
STEPS = 3


def a_state(shape: tuple[int, ...], *, guided: bool = True, draws: bool = True, seed: int = 0) -> JobState:
    generator = torch.Generator().manual_seed(seed)
    rows = 2 if guided else 1
    weights = torch.arange(STEPS * SLOTS * (SLOTS + 2.0)).view(STEPS, SLOTS, SLOTS + 2)
    times, scales = (30.0, 20.0, 10.0), (0.5, 0.25, 0.125)
    schedule = Schedule(times, 1.0, scales, weights, (draws,) * STEPS)
    job = Job(prompt="a", seed=seed, steps=STEPS, guidance_scale=3.0, guidance_stop=0.5)
    conditions = {"text": torch.arange(rows * 4.0).view(rows, 4) + 100 * seed}
    latents = torch.randn(shape, generator=generator)
    text = plain_text(conditions, (), guided=guided)
    return JobState(job, (1, 2, 3), text, {}, schedule, None, generator, Beginning(latents))


def advance(state: JobState, *, finite: bool = True) -> Any:
    after = torch.full((SLOTS, *state.latents.shape[1:]), float(state.step))
    return state.advance(FiniteCheck(torch.tensor([True, finite])), 1, after, after[0])


@pytest.mark.parametrize("shape", SHAPES)
def test_inputs_are_those_of_the_present_step_and_the_same_when_asked_again(shape: tuple[int, ...]) -> None:
    state = a_state(shape)
    for step, rows in enumerate((2, 2, 1)):
        inputs, again = state.next_inputs(), state.next_inputs()
        assert (inputs.time, inputs.input_scale) == (30.0 - 10 * step, 0.5 ** (step + 1))
        # Without guidance the one row moves nothing.
        assert (inputs.guidance, inputs.is_guided) == ([3.0 if rows == 2 else 1.0], rows == 2)
        assert inputs.rows == state.rows == rows
        assert inputs.noise is not None
        assert again.noise is inputs.noise
        assert inputs.noise.shape == shape
        assert inputs.weights[0, 0] == step * SLOTS * (SLOTS + 2)
        # Where guidance has ended, the row with the prompt is left: the second.
        assert [float(text["text"][0, 0]) for text in inputs.texts] == [0.0, 4.0][-rows:]
        assert advance(state) is None
    assert state.step == state.steps == STEPS


def test_a_step_that_is_not_finite_leaves_the_job_as_it_was() -> None:
    state = a_state((4, 2, 3))
    before = state.next_inputs()
    failure = advance(state, finite=False)
    assert isinstance(failure, NotFiniteError)
    assert "LoRA" not in str(failure)
    assert state.step == 0
    after = state.next_inputs()
    assert after.state is before.state
    assert after.noise is before.noise


def test_a_step_that_is_not_finite_names_the_loras_that_may_have_done_it() -> None:
    state = a_state((4, 2, 3))
    state.job = state.job.model_copy(update={"loras": [Lora(name="pixel", weight=4.0)]})
    assert 'try less weight of the LoRAs ("pixel"), another scheduler' in str(advance(state, finite=False))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_batch_is_the_inputs_of_its_jobs_in_order(shape: tuple[int, ...]) -> None:
    states = [a_state(shape, guided=number != 1, draws=number == 2, seed=number) for number in range(3)]
    assert advance(states[2]) is None
    inputs = [state.next_inputs() for state in states]
    batch = batch_of(inputs)
    assert torch.equal(batch.states, torch.stack([each.state for each in inputs]))
    assert torch.equal(batch.weights, torch.stack([each.weights for each in inputs]))
    # Rows 0 and 1 are of the first job, 2 of the second, 3 and 4 of the third.
    assert (batch.without.tolist(), batch.prompted.tolist()) == ([0, 2, 3], [[1], [2], [4]])
    assert batch.job_of_row.tolist() == [0, 0, 1, 2, 2]
    assert batch.times.tolist() == [30.0, 30.0, 30.0, 20.0, 20.0]
    assert batch.input_scale.tolist() == [0.5, 0.5, 0.25]
    assert batch.conditions["text"][:, 0].tolist() == [0.0, 4.0, 100.0, 200.0, 204.0]
    assert not batch.noise[:2].any()
    assert inputs[2].noise is not None
    assert torch.equal(batch.noise[2], inputs[2].noise)
