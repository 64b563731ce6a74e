"""The weights of a scheduler, measured by its impulse response.

A scheduler treats every pixel alike and apart from the others. So one run over a probe, a small tensor whose
pixels are chosen for the purpose, gives all weights at once:

- **impulses**: for each tensor that goes into a step, one pixel that is large in that tensor and zero in all
  others. What comes out there, divided by what went in, is the tensor's weight.
- **zeros**: a few pixels that are zero in all tensors. What comes out there is the noise.
- **samples**: random pixels, half of them large, so that no clipping goes unnoticed.

Impulses and zeros are written anew before each step. The samples go through the whole schedule, and the
weights must predict them: else the scheduler is not linear.
"""

from __future__ import annotations

from typing import Any

import torch

from worker.device.schedulers.schedule import SLOTS, Brownian, Mix, Sampler, Schedule, copied_generator

#: Which pixels of the probe are of which kind.
IMPULSES, ZEROS, SAMPLES = slice(0, SLOTS + 1), slice(SLOTS + 1, SLOTS + 5), slice(SLOTS + 5, SLOTS + 37)
LARGE_SAMPLES = slice(SLOTS + 21, SLOTS + 37)
#: (batch, channels, height, width).
PROBE_SHAPE = (1, 1, 1, SLOTS + 37)
#: Size of an impulse: a power of two, by which division is exact, and beside which noise is negligible.
IMPULSE = 2.0**20
#: Largest difference between weights and scheduler, as a share of the largest term so far. Rounding to
#: float32 makes up to 4e-6 with most schedulers that are offered by name, and up to 1.5e-5 where one divides
#: by a last noise level of 0.03 after a leap: Heun and DPM2 a of two or three steps, LMS of 150.
TOLERANCE = 3e-5


def read_off(sampler: Sampler, *, for_images: bool = False) -> Schedule:
    """The schedule of a fresh `sampler`, which cannot be used afterwards; `for_images`: with its mixes.

    Without weights where the scheduler is not linear, keeps too many tensors, or raises an error: then each
    job calls the scheduler itself.
    """
    timesteps, noise_scale = tuple(map(float, sampler.timesteps.tolist())), sampler.noise_scale
    order = int(getattr(sampler.scheduler, "order", 1))
    without_weights = Schedule(timesteps, noise_scale, (), None, (), order=order)
    path = _BrownianPath(sampler.generator) if hasattr(sampler.scheduler, "noise_sampler_seed") else None
    if path is not None:
        sampler.scheduler.noise_sampler = path
    mixes: list[Mix] | None = [] if for_images else None
    try:
        run = _run(sampler, mixes)
    except Exception:  # noqa: BLE001 - a job's own sampler raises it again, for that job
        return without_weights
    if run is None:
        return without_weights
    inputs, outputs, model_inputs = run
    noise_only = inputs[:, -1:, ZEROS]
    # Least squares over the zeros; the weight is 0 without noise.
    noise = (outputs[..., ZEROS] * noise_only).sum(-1, True) / noise_only.square().sum(-1, True).clamp(
        min=1e-9
    )
    responses = (outputs[..., IMPULSES] - noise * inputs[:, -1:, IMPULSES]) / IMPULSE
    in_use = inputs[:, :-1, IMPULSES].diagonal(dim1=1, dim2=2) > 0
    weights = torch.cat([responses * in_use[:, None], noise], dim=2)
    scale = model_inputs[:, 0] / IMPULSE
    scaled = scale[:, None] * inputs[:, 0]
    if not _agree(weights, inputs, outputs) or not _are_near(scaled, model_inputs, model_inputs.abs()):
        return without_weights
    draws = (inputs[:, -1] != 0).any(-1).tolist()
    brownian = None if path is None else path.read_off(sampler.scheduler.sigmas, draws)
    return Schedule(
        timesteps,
        noise_scale,
        tuple(scale.tolist()),
        weights,
        tuple(draws),
        brownian,
        order,
        mixes=tuple(mixes or ()),
    )


class _BrownianPath:
    """In the place of a scheduler's path, for the probe: it draws from a generator, and notes what for."""

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator
        self._intervals: list[tuple[float, float]] = []

    def __call__(self, start: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
        self._intervals.append((float(start), float(end)))
        return torch.randn(PROBE_SHAPE, generator=self._generator)

    def read_off(self, sigmas: torch.Tensor, draws: list[bool]) -> Brownian:
        """The path as the scheduler has it, with noise levels `sigmas`."""
        noted = iter(self._intervals)
        ends = float(sigmas[sigmas > 0].min()), float(sigmas.max())
        return Brownian(ends, tuple(next(noted) if draw else None for draw in draws))


def _agree(weights: torch.Tensor, inputs: torch.Tensor, outputs: torch.Tensor) -> bool:
    """Whether the weights alone, applied from the first latents on, give the latents of the run."""
    state, bound = inputs[0, :SLOTS], torch.zeros(PROBE_SHAPE[-1])
    latents, bounds = torch.empty_like(outputs[:, 0]), torch.empty_like(outputs[:, 0])
    for step in range(len(weights)):
        terms = torch.cat([state, inputs[step, SLOTS:]])
        bound = torch.stack([bound, state[0].abs(), weights[step, 0].abs() @ terms.abs()]).amax(0)
        state = weights[step] @ terms
        latents[step], bounds[step] = state[0], bound
    return _are_near(latents, outputs[:, 0], bounds)


def _are_near(values: torch.Tensor, expected: torch.Tensor, bound: torch.Tensor) -> bool:
    """Whether the samples are what is expected. NaN is never near."""
    excess = (values - expected).abs() - TOLERANCE * bound
    return bool((excess[:, SAMPLES] <= 0).all())


def _run(sampler: Sampler, mixes: list[Mix] | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """One run over the probe. None: the scheduler keeps more tensors than there are slots.

    Returns for each step what went in, (steps, SLOTS + 2, pixels), what came out, (steps, SLOTS, pixels),
    and the latents as the model would have seen them, (steps, pixels). Those of images go to `mixes`.
    """
    scheduler, generator, pixels = sampler.scheduler, sampler.generator, PROBE_SHAPE[-1]
    steps = len(sampler.timesteps)
    inputs, outputs = torch.zeros(steps, SLOTS + 2, pixels), torch.zeros(steps, SLOTS, pixels)
    model_inputs = torch.zeros(steps, pixels)
    random = torch.randn(steps + 1, *PROBE_SHAPE, generator=torch.Generator("cpu").manual_seed(1))
    random[..., LARGE_SAMPLES] *= 1000.0
    state = [random[steps] * sampler.noise_scale]
    for step in range(steps):
        prediction = random[step]
        for slot, tensor in [*enumerate(state), (SLOTS, prediction)]:
            tensor[..., : ZEROS.stop] = 0.0
            tensor[..., slot] = IMPULSE
            inputs[step, slot] = tensor[0, 0, 0]
        model_inputs[step] = sampler.model_input(state[0], step)[0, 0, 0]
        if mixes is not None:
            mixes.append(sampler.mix(step))
        before = copied_generator(generator)
        latents = scheduler.step(
            prediction, sampler.timesteps[step], state[0], **sampler.options, return_dict=False
        )[0]
        if not torch.equal(before.get_state(), generator.get_state()):
            inputs[step, -1] = torch.randn(PROBE_SHAPE, generator=before)[0, 0, 0]
        state = [latents, *(tensor for tensor in _kept_by(scheduler) if tensor is not latents)]
        if len(state) > SLOTS:
            return None
        for slot, tensor in enumerate(state):
            outputs[step, slot] = tensor[0, 0, 0]
    return inputs, outputs, model_inputs


def _kept_by(scheduler: Any) -> list[torch.Tensor]:
    """The tensors of the probe's shape that a scheduler keeps for its next steps, each once."""
    found: dict[int, torch.Tensor] = {}
    for value in vars(scheduler).values():
        for tensor in value if isinstance(value, list) else [value]:
            if isinstance(tensor, torch.Tensor) and tensor.shape == PROBE_SHAPE:
                found[id(tensor)] = tensor
    return list(found.values())
