"""All that runs on the device: text encoding, denoising steps over mixed jobs, decoding.

A job's pixels are what diffusers' own pipeline call gives for it with a CPU generator of its seed (within 1
of 255 in fp32), whatever other jobs are in its batches. Formulas and their order follow
`diffusers/pipelines/stable_diffusion/pipeline_stable_diffusion.py`, its SDXL sibling and
`latent_consistency_models/pipeline_latent_consistency_text2img.py`. Latents and sampler arithmetic are fp32
also where the model runs in fp16: the noise is the same on every machine, and rounding does not add up.

Here batches are put together and taken apart. `step` is the arithmetic of a step, `cuda_graphs` what makes it
fast on a GPU, `vae_decoder` what comes after the last.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, cast

import torch

from worker.contract.errors import InvalidJobError, OutOfMemoryError, SettingsError, SmallcatError
from worker.contract.job import Job, Scheduler
from worker.contract.settings import WorkerSettings
from worker.device import attention, unet_patches
from worker.device.compiler import Compiler, keep_kernels_in
from worker.device.cuda_graphs import MAX_ROWS, StepGraphs
from worker.device.errors import mapped
from worker.device.job_state import Check, JobState, batch_of
from worker.device.samplers import Samplers
from worker.device.step import Step, denoise
from worker.device.text_encoder import Text, TextEncoder
from worker.device.vae_decoder import Decoder
from worker.engine import step_cost
from worker.engine.runner import Picture
from worker.engine.step_cost import StepCost
from worker.model import loader as pipelines
from worker.model.placement import Choice

#: Seconds after which no larger batch is tried at warm-up, on a GPU and on a CPU, which is full at a few
#: rows; but sizes that are tried however slow; and steps of each size, the fastest counts.
GPU_MEASURE_S, CPU_MEASURE_S, LEAST_SIZES, MEASURED_TIMES = 5.0, 0.4, 4, 3
#: Forwards of one job each that a GPU has at once in exact mode: one alone does not fill it.
EXACT_AT_ONCE = 4


class ModelRunner:
    """The one door to the device.

    `step` is called from one thread, `decode` from one, and `prepare` from any number of them, all at the
    same time: they share the text cache and the tokenizers, behind a lock.
    """

    def __init__(self, settings: WorkerSettings) -> None:
        """Load the model. Raises `SettingsError` with one sentence when that cannot be done."""
        loaded = pipelines.load(settings)
        self._pipeline = loaded.pipeline
        self._device, self._dtype = loaded.device, loaded.dtype
        is_gpu = self._device.type == "cuda"
        self._text_stream = torch.cuda.Stream(self._device, priority=-1) if is_gpu else None
        self._samplers = Samplers(self._pipeline)
        self._texts = TextEncoder(self._pipeline, self._device, self._dtype)
        compiler = self._compiler(settings)
        if compiler:
            # Compiled, they are less work; eager, more kernels.
            unet_patches.install(self._pipeline)
        at_once = EXACT_AT_ONCE if settings.exact else 1
        self._graphs = StepGraphs(self._pipeline.unet, compiler, at_once=at_once) if compiler else None
        self._decoder = Decoder(
            self._pipeline, self._device, self._dtype, alone=settings.exact, compiler=compiler
        )
        self._exact = settings.exact
        #: The model as it is announced.
        self.served = loaded.served
        self._asked_rows = settings.max_batch
        self._cost = StepCost((), self._default_area, settings.max_batch or step_cost.MIN_CAP)
        #: Each choice made at start, with its reason.
        self.choices = (
            *loaded.choices,
            attention.install(
                self._pipeline,
                settings.attention_backend,
                self._device,
                settings.cache_folder / "attention.json",
            ),
        )

    @property
    def max_rows(self) -> int:
        """Rows worth having in a step of the default size; measured by `warm_up` unless asked for."""
        return self._cost.max_rows

    @property
    def job_s(self) -> float:
        """Seconds of the device's time for the steps of a job of the model's defaults, in full batches.

        Measured by `warm_up`.
        """
        defaults = self.served.defaults
        step_s = self._cost.seconds(self.max_rows, self._default_area)
        return defaults.steps * self._rows(defaults.guidance_scale) * step_s / self.max_rows

    def _rows(self, guidance_scale: float) -> int:
        """Rows of a job: guidance takes a second one, unless the UNet has it embedded (LCM)."""
        embeds_guidance = self._pipeline.unet.config.time_cond_proj_dim is not None
        return 2 if guidance_scale > 1 and not embeds_guidance else 1

    @property
    def decodes_beside(self) -> bool:
        """Whether `decode` gains beside `step`: on a GPU, not on cores that `step` uses all of."""
        return self._device.type == "cuda"

    def warm_up(self) -> tuple[Choice, ...]:
        """One small render through everything, then the cost of steps, which sets `max_rows`.

        On a GPU the step is compiled between the two. Returns what was chosen. Raises `SettingsError` when
        the render fails.
        """
        # A GPU picks its kernels by shape, so it is warmed with the one most jobs have.
        side = None if self._device.type == "cuda" else 64
        try:
            self._render(Job(prompt="a small cat", seed=0, steps=4, width=side, height=side))
            compiled = self._compile()
        except SmallcatError as error:
            raise SettingsError(
                f"The model {self.served.name} failed to render at start ({error}): try another "
                "SMALLCAT_DTYPE, SMALLCAT_ATTENTION or SMALLCAT_MODEL."
            ) from error
        return compiled, self._measure()

    def _render(self, job: Job) -> None:
        render = self.prepare(job)
        while render.step < render.steps:
            (failure,) = self.step([render])
            if failure is not None:
                raise failure
        (picture,) = self.decode([render])
        if isinstance(picture, SmallcatError):
            raise picture

    def _compiler(self, settings: WorkerSettings) -> Compiler | None:
        if self._device.type != "cuda" or not settings.compile:
            return None
        keep_kernels_in(settings.cache_folder / "kernels")
        return Compiler(self._device, exact=settings.exact)

    def _compile(self) -> Choice:
        if self._graphs is None:
            reason = "SMALLCAT_COMPILE=0" if self._device.type == "cuda" else "the CPU runs the plain step"
            return Choice("compile", "no", reason)
        started_s = time.monotonic()
        if not self.compile(Job(prompt="a small cat", seed=0)):
            return Choice("compile", "no", "it failed, see above")
        return Choice("compile", "yes", f"took {time.monotonic() - started_s:.0f} s for the default size")

    @torch.no_grad()
    def compile(self, job: Job) -> bool:
        """Compile for jobs of this one's size now, not when it is worth it; whether that worked."""
        if self._graphs is None:
            return False
        render = self.prepare(job)
        self._decoder.compile(render.latents)
        return self._graphs.compile(render.lane, batch_of([render]))

    def _measure(self) -> Choice:
        """Set what steps cost, and with it the most rows they should have."""
        curve = self._curve()
        rows, reason = step_cost.choose_cap(curve)
        if self._asked_rows is not None:
            rows, reason = self._asked_rows, "SMALLCAT_MAX_BATCH asks for it"
        self._cost = StepCost(curve, self._default_area, rows)
        return Choice("max rows", str(rows), reason)

    @torch.no_grad()
    def _curve(self) -> list[tuple[int, float]]:
        """Seconds of a step of the default size by its rows, as far as they fit and seem to pay."""
        render = self.prepare(Job(prompt="a small cat", seed=0, guidance_scale=1.0))
        curve: list[tuple[int, float]] = []
        budget_s = GPU_MEASURE_S if self._device.type == "cuda" else CPU_MEASURE_S
        started_s = time.monotonic()
        for rows in step_cost.BATCH_SIZES:
            if self._asked_rows is not None and rows > self._asked_rows:
                break
            try:
                with mapped("measure"):
                    # The first is a warm-up: kernels are picked by shape.
                    seconds = min(self._seconds_of([render] * rows) for _ in range(MEASURED_TIMES))
            except OutOfMemoryError:
                break
            curve.append((rows, seconds))
            is_late = time.monotonic() - started_s > budget_s and len(curve) >= LEAST_SIZES
            if step_cost.is_past_gain(curve) or is_late:
                break
        return curve

    def _seconds_of(self, renders: Sequence[JobState]) -> float:
        started_s = time.perf_counter()
        for step in self._run(self._groups(renders)):
            step.finite.tolist()
        return time.perf_counter() - started_s

    @property
    def _default_area(self) -> int:
        """Latent pixels of the default size."""
        factor = int(self._pipeline.vae_scale_factor)
        return (self.served.defaults.width // factor) * (self.served.defaults.height // factor)

    def memory(self) -> dict[str, int]:
        """Bytes of the GPU's memory by what has them: now, and at most in a step of each bucket so far."""
        if self._device.type != "cuda":
            return {}
        now = {
            "in use": torch.cuda.memory_allocated(self._device),
            "held": torch.cuda.memory_reserved(self._device),
        }
        return now | (self._graphs.peaks if self._graphs is not None else {})

    def cap(self, lane: Hashable) -> int:
        """Rows worth having in one step of `lane`: as many latent pixels as in the measured one, >= 1."""
        return self._asked_rows or self._cost.cap(_area(lane))

    def step_s(self, lane: Hashable, rows: int) -> float:
        """What a step of `rows` rows of `lane` costs."""
        return self._cost.seconds(rows, _area(lane))

    @torch.no_grad()
    def prepare(self, job: Job) -> JobState:
        """`job` with its text encoded, its noise drawn and its schedule made, ready for its first step.

        Raises `InvalidJobError` for what the model cannot do, `RenderError` when the text encoder fails, and
        `OutOfMemoryError` when it does not fit. No other render is affected.
        """
        self._take_device()
        job = job.resolved(self.served)
        assert job.width and job.height and job.steps  # noqa: S101, PT018 - resolved, which mypy cannot know
        assert job.guidance_scale is not None  # noqa: S101
        factor = int(self._pipeline.vae_scale_factor)
        if job.width % factor or job.height % factor:
            raise InvalidJobError(
                f"The size is {job.width} x {job.height}, but this model's sizes are multiples of {factor}."
            )
        schedule = self._samplers.schedule(Scheduler(job.scheduler), job.steps)
        generator = torch.Generator("cpu").manual_seed(job.seed)
        sampler = None
        if schedule.weights is None:
            sampler = self._samplers.own(Scheduler(job.scheduler), job.steps, generator)
        guided = self._rows(job.guidance_scale) == 2
        shape = (self._pipeline.unet.config.in_channels, job.height // factor, job.width // factor)
        noise = torch.randn((1, *shape), generator=generator)[0] * schedule.noise_scale
        with mapped("encode the prompt"), self._own_stream():
            text = self._texts.encode(job.prompt, job.negative_prompt, guided=guided)
            conditions = self._conditions(job, text)
            return JobState(job, text, conditions, schedule, sampler, generator, noise.to(self._device))

    def _own_stream(self) -> contextlib.AbstractContextManager[Any]:
        """On a GPU: a stream beside that of the steps, and before it where both want the same."""
        return torch.cuda.stream(self._text_stream) if self._text_stream else contextlib.nullcontext()

    def _take_device(self) -> None:
        """Make the runner's GPU the calling thread's: each thread starts with the first one."""
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)

    def _conditions(self, job: Job, text: Text) -> dict[str, torch.Tensor]:
        """What the UNet takes besides text and timestep: (rows, width) each, in the model's dtype."""
        conditions: dict[str, torch.Tensor] = {}
        width = self._pipeline.unet.config.time_cond_proj_dim
        if width is not None:
            scale = torch.tensor([(job.guidance_scale or 0.0) - 1])
            conditions["timestep_cond"] = self._pipeline.get_guidance_scale_embedding(
                scale, embedding_dim=width
            ).to(self._device, self._dtype)
        if text.pooled is not None:
            # SDXL's micro-conditioning: original size, crop, target size (Podell et al., 2023, section 2.2).
            sizes = torch.tensor([[job.height, job.width, 0, 0, job.height, job.width]] * len(text.pooled))
            conditions["text_embeds"] = text.pooled
            conditions["time_ids"] = sizes.to(self._device, self._dtype)
        return conditions

    @torch.no_grad()
    def step(self, renders: Sequence[JobState]) -> list[SmallcatError | None]:
        """One denoising step for `renders`, of one lane and none of them done, in one forward of the UNet.

        Returns each one's outcome: None when it is a step further, else its error; then it is as it was. A
        GPU is kept one step ahead: it is still at this step when the call returns, and whether a render is
        finite is told by its next step, or by `decode`.
        Raises `OutOfMemoryError` when they do not fit together, `RenderError` when the forward they share
        fails. Then all are as they were, and fewer of them may be tried.
        """
        self._take_device()
        outcomes: list[SmallcatError | None] = []
        with mapped("denoise"):
            groups = self._groups(renders)
            for group, step in zip(groups, self._run(groups), strict=True):
                check = Check(step.finite)
                outcomes += [
                    render.outcome(check, place, step.states[place], step.predictions[place])
                    for place, render in enumerate(group)
                ]
        return outcomes

    def _run(self, groups: Sequence[Sequence[JobState]]) -> list[Step]:
        """The step of each group, set off."""
        batches = [batch_of(group) for group in groups]
        lane = groups[0][0].lane
        if self._graphs is not None and (steps := self._graphs.run(lane, batches)) is not None:
            return steps
        return [Step(*denoise(self._pipeline.unet, batch)) for batch in batches]

    def _groups(self, renders: Sequence[JobState]) -> list[list[JobState]]:
        """Who is in one forward together: all, as far as a bucket takes them; in exact mode each alone."""
        if self._exact:
            return [[render] for render in renders]
        groups: list[list[JobState]] = [[]]
        for render in renders:
            if sum(mate.rows for mate in groups[-1]) + render.rows > MAX_ROWS and self._graphs is not None:
                groups.append([])
            groups[-1].append(render)
        return groups

    def decode(self, renders: Sequence[JobState]) -> Iterator[Picture | SmallcatError]:
        """Set off the decoding of `renders`, which may be of different lanes.

        Returns the picture of each, or its error, and waits as it is asked: on any one thread.
        """
        self._take_device()
        sources: dict[int, Iterator[Picture | SmallcatError]] = {}
        lanes: dict[Hashable, list[int]] = {}
        for place, render in enumerate(renders):
            with mapped("denoise"):
                failure = render.failure()
            if failure is not None:
                sources[place] = iter((failure,))
            else:
                lanes.setdefault(render.lane, []).append(place)
        for places in lanes.values():
            pictures = self._decoder.pictures([renders[place].latents for place in places])
            sources |= dict.fromkeys(places, pictures)
        return (next(sources[place]) for place in range(len(renders)))


def _area(lane: Hashable) -> int:
    """Latent pixels of a row of `lane`."""
    _, height, width = cast("tuple[int, int, int]", lane)
    return height * width
