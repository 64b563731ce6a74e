"""All that runs on the device: jobs are prepared, denoised in mixed batches a step at a time, and decoded.

A job's pixels are what diffusers' own pipeline gives for it with a CPU generator of its seed (within 1 of 255
in fp32), whatever other jobs are in its batches. Latents and sampler arithmetic are fp32 also where the model
runs in fp16: the noise is the same on every machine, and rounding errors do not add up.

What differs between kinds of models is behind `worker.device.family`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from worker.contract.errors import OutOfMemoryError, SmallcatError
from worker.contract.job import Job
from worker.contract.served_model import ServedModel
from worker.contract.settings import WorkerSettings
from worker.device import attention, gpu, warm_up
from worker.device.compiling import server
from worker.device.compiling.claims import Store
from worker.device.compiling.compiler import CompiledLanes, Compiler, Piece
from worker.device.compiling.kernel_cache import setup_name
from worker.device.compiling.process import compiler_of
from worker.device.compiling.traced import Recorder
from worker.device.costs import Costs
from worker.device.cuda_graphs import MAX_ROWS, StepGraphs
from worker.device.errors import mapped, times
from worker.device.families import family_of
from worker.device.family import Lane, ModelFamily
from worker.device.job_state import FiniteCheck, JobState
from worker.device.loras.cache import Loras
from worker.device.preparation import Preparation
from worker.device.previews import Previews
from worker.device.step import Step, batch_of, denoise
from worker.device.step_times import StepTimes
from worker.device.text.embeddings import Files
from worker.device.vae.decoder import VaeDecoder
from worker.device.vae.vaes import Vae
from worker.engine.runner import FirstPass, JobInputs, Outcome, Picture
from worker.model import loader
from worker.model.memory_plan import EXACT_AT_ONCE
from worker.model.placement import Choice


class ModelRunner:
    """A `worker.engine.runner.Runner` on a real device.

    `step` is called from one thread, `decode` from one, and `prepare` from any number of them, all at the
    same time.
    """

    def __init__(
        self,
        settings: WorkerSettings,
        loaded: loader.Loaded | None = None,
        family: ModelFamily | None = None,
        files: Files | None = None,
        *,
        compiles_alone: bool = False,
        shared: Store | None = None,
    ) -> None:
        """Load the model that the settings name, unless it is given; choose its family, unless it is given.

        `files`: those beside the model that jobs may name; None: there are none. `compiles_alone`: this
        process compiles all itself, without the help of another one. `shared`: where the fleet keeps what is
        compiled; None: nowhere.
        Raises `SettingsError` with one sentence when that cannot be done.
        """
        loaded = loaded or loader.load(settings)
        self._device, self._plan = loaded.device, loaded.plan
        self._on_gpu = self._device.type == "cuda"
        self._exact = settings.exact
        self._components = getattr(loaded.pipeline, "components", {})
        self._asked_rows = settings.max_batch
        #: The model as it is announced.
        self.served: ServedModel = loaded.served
        compiler = self._kernel_compiler = self._compiler(settings, compiles_alone, shared)
        self._compiles_first = settings.compile_first or settings.exact
        # Before anything else is made of the model: a family may replace some of its modules.
        self._family = family or family_of(loaded, compiled=compiler is not None)
        #: Each choice made at start, with its reason.
        self.choices: tuple[Choice, ...] = (
            *loaded.choices,
            attention.install(
                list(self._family.attentions()),
                settings.attention_backend,
                self._device,
                settings.cache_folder / "attention.json",
            ),
        )
        self._previews = Previews(self._family, self._device)
        self._offers_loras = bool(settings.loras)
        self._loras = Loras(files, self._family, self._device, settings.lora_memory, self._plan.lora_memory)
        vae_of = partial(Vae.of, device=self._device, alone=settings.exact, planned=self._plan.decoding)
        vae = vae_of(self._family, compiler=compiler)
        self._vae_encoder, self._vae_decoder = vae.encoder, vae.decoder
        self._preparation = Preparation(self._family, self._device, files, self._loras, vae.encoder, vae_of)
        at_once = EXACT_AT_ONCE if settings.exact else 1
        self._graphs = StepGraphs(self._family.forward, compiler, at_once=at_once) if compiler else None
        self._costs = Costs(self._family, self.served.defaults, settings.max_batch, self._plan.rows)
        self._times = StepTimes(self._costs, lambda: self.is_compiled)

    # --- costs ----------------------------------------------------------------------------------------------

    @property
    def max_rows(self) -> int:
        """The cap in rows of a step of the default size: measured by `warm_up` unless the settings say."""
        return self._costs.max_rows

    @property
    def most_rows(self) -> int:
        """The same while many jobs wait."""
        return self._costs.most_rows

    @property
    def job_s(self) -> float:
        """Seconds of the device's time for a job of the model's defaults. Measured by `warm_up`."""
        return self._costs.job_s

    @property
    def decodes_beside(self) -> bool:
        """Whether `decode` gains beside `step`: on a GPU, not on a CPU, whose cores `step` uses already."""
        return self._on_gpu

    @property
    def is_compiling(self) -> bool:
        """Whether kernels are compiled or a CUDA graph is captured at this moment."""
        return self._kernel_compiler is not None and self._kernel_compiler.device_sync_lock.locked()

    def cap(self, lane: Hashable) -> int:
        """See `Costs`."""
        return self._costs.cap(cast("Lane", lane))

    def most(self, lane: Hashable) -> int:
        """See `Costs`."""
        return self._costs.most(cast("Lane", lane))

    def step_s(self, lane: Hashable, rows: int, text_tokens: int = 0, lora_rows: int = 0) -> float:
        """See `Costs`."""
        return self._costs.step_s(cast("Lane", lane), rows, text_tokens, lora_rows)

    @property
    def is_compiled(self) -> bool:
        """Whether the last step was compiled."""
        return self._graphs is not None and self._graphs.was_compiled

    def memory(self) -> dict[str, int]:
        """Bytes of the GPU's memory: now, and the most in a step of each batch size so far; {} on a CPU."""
        peaks = self._graphs.peaks if self._graphs is not None else {}
        return gpu.memory(self._device, peaks) if self._on_gpu else {}

    def utilisation(self) -> float | None:
        """The share of the last moment in which the GPU worked, 0 to 1, as NVIDIA's driver counts.

        None on a CPU, and where nvidia-ml-py is not installed or the driver does not say.
        """
        return gpu.utilisation(self._device) if self._on_gpu else None

    @property
    def out_of_memory(self) -> int:
        """How often a step, a text or a picture did not fit in memory: then fewer are tried together."""
        return times["out of memory"]

    @property
    def padded_rows(self) -> int:
        """Rows that steps had beside those of jobs, to fit a captured batch size."""
        return self._graphs.padded_rows if self._graphs is not None else 0

    # --- before the first job -------------------------------------------------------------------------------

    def warm_up(self) -> tuple[Choice, ...]:
        """Render one small picture, compile, and measure the cost of steps, which sets `max_rows`.

        Returns what was chosen. Raises `SettingsError` when the picture fails.
        """
        return warm_up.warm_up(
            self,
            self._seconds,
            self._costs,
            self._loras if self._offers_loras else None,
            self._kernel_compiler,
            on_gpu=self._on_gpu,
            compiles_first=self._compiles_first,
            max_batch=self._asked_rows,
            plan=self._plan,
        )

    @torch.no_grad()
    def compile(self, job: Job, *, loras: bool = False) -> bool:
        """Compile now for jobs of the size of `job`. Returns whether that worked; False on a CPU.

        `loras`: for steps in which some have LoRAs.
        """
        if self._graphs is None:
            return False
        compiled = [piece.compile_now() for piece in reversed(self.pieces(job, loras=loras))]
        return compiled[-1]

    @torch.no_grad()
    def pieces(self, job: Job, *, loras: bool = False) -> list[Piece]:
        """What is compiled for jobs of the size of `job`, the step first; [] on a CPU.

        `loras`: for steps in which some have LoRAs.
        """
        if self._graphs is None:
            return []
        state = self.prepare(job)
        state.loras = self._loras.none() if loras else None
        step = self._graphs.piece(state.lane, batch_of([state.next_inputs()]))
        return [step, *self._vae_decoder.pieces(state.lane, state.latents)]

    def default_pieces(self) -> list[Piece]:
        """What is compiled for the model's default size, with LoRAs where some are offered."""
        job = Job(prompt=warm_up.PROMPT, seed=0)
        pieces = self.pieces(job)
        if self._offers_loras and self._loras.example(warm_up.LORA_RANK) is not None:
            pieces += self.pieces(job, loras=True)[:1]
        return pieces

    def compile_like(self, what: str, lane: str, argument: Any, dynamic: Sequence[torch.Tensor]) -> Recorder:
        """Compile the function that is called `what` for a call with `argument`: see `CompiledLanes`."""
        steps = self._graphs.lanes if self._graphs is not None else None
        found = (steps, self._vae_decoder.lanes, self._vae_encoder.lanes)
        lanes: CompiledLanes[Any] = next(each for each in found if each is not None and each.what == what)
        if getattr(argument, "loras", None) is not None:
            # Loading the first LoRA makes the layers for them, and this process loads none.
            self._family.adaptable()
        return lanes.record(lane, argument, dynamic)

    def _compiler(self, settings: WorkerSettings, alone: bool, shared: Store | None) -> Compiler | None:
        if not self._on_gpu or not settings.compile or not self._plan.compile:
            return None
        serve = None if alone else serve_compiling
        return compiler_of(settings, self._device, self.setup, serve=serve, shared=shared)

    def setup(self) -> str:
        """What compiled code of this runner depends on, as a name."""
        chosen = next(choice for choice in self.choices if choice.what == "attention")
        return setup_name(self._device, self._components, chosen.choice, self._exact)

    @torch.no_grad()
    def _seconds(self, states: Sequence[JobState]) -> float:
        """Seconds of one step of `states`, which stay as they are."""
        started_s = time.perf_counter()
        for step in self._run(self._groups(states)):
            step.finite.tolist()
        return time.perf_counter() - started_s

    # --- a job: prepare, step, decode -----------------------------------------------------------------------

    @torch.no_grad()
    def prepare(self, job: Job, inputs: JobInputs | FirstPass | None = None) -> JobState:
        """`job` with text and image encoded, its noise drawn and its schedule made, ready for its first step.

        With a `FirstPass` it is the job's second pass. Raises `InvalidJobError` for what the model cannot do,
        `RenderError` when the text encoder fails, and `OutOfMemoryError` when it does not fit. No other job
        is affected.
        """
        self._set_device()
        return self._preparation.state_of(job.resolved(self.served), inputs)

    @torch.no_grad()
    def step(self, states: Sequence[JobState]) -> list[SmallcatError | None]:
        """One denoising step of jobs of one lane, none of them done, in one forward of the model.

        Returns for each job None, when it is a step further, or its error, when it is as it was before. On a
        GPU the step is only launched when the call returns: whether a job is finite is found out at its next
        step, or by `decode`.
        Raises `OutOfMemoryError` when the jobs do not fit together, and `RenderError` when the forward that
        they share fails. Then all are as they were, and fewer of them may be tried.
        """
        self._set_device()
        outcomes: list[SmallcatError | None] = []
        undo: list[Callable[[], None]] = []
        try:
            with mapped("denoise"):
                groups = self._groups(states)
                steps = self._times.run(self._run, groups)
                undo = [state.as_now() for state in states]
                for group, step in zip(groups, steps, strict=True):
                    check = FiniteCheck(step.finite)
                    outcomes += [
                        state.advance(check, index, step.states[index], step.predictions[index])
                        for index, state in enumerate(group)
                    ]
        except Exception as error:
            # A scheduler that is not linear works on each job by itself, and may fail at a later one.
            for each in undo:
                each()
            if isinstance(error, OutOfMemoryError):
                self._loras.lower()
            raise
        return outcomes

    def decode(self, states: Sequence[JobState], *, is_alone: bool = False) -> Iterator[Outcome]:
        """Launch the decoding of finished jobs, which may be of different lanes and have different VAEs.

        Returns the picture of each, or its error, in order; of one whose second pass is to come the first.
        Each is waited for when it is asked for, on any one thread. What does not fit in memory whole is
        decoded in tiles, but not beside steps, unless `is_alone`: they need some of it.
        """
        self._set_device()
        in_tiles = is_alone or not self.decodes_beside
        outcomes: dict[int, Outcome] = {}
        groups: dict[tuple[Lane, VaeDecoder, bool], list[int]] = {}
        for index, state in enumerate(states):
            with mapped("denoise"):
                found = state.failure() or state.first_latents()
            if found is not None:
                outcomes[index] = found
            else:
                # What is drawn on is not for anybody's eyes: the safety checker looks at the last pass.
                key = state.lane, state.decoder or self._vae_decoder, not state.goes_on
                groups.setdefault(key, []).append(index)
        pictures: dict[int, Iterator[Picture | SmallcatError]] = {}
        for (lane, decoder, checked), indices in groups.items():
            latents = [states[index].latents for index in indices]
            of_group = decoder.pictures(lane, latents, checked=checked, in_tiles=in_tiles)
            pictures |= dict.fromkeys(indices, of_group)
        return (
            outcomes[index] if index in outcomes else state.finished(next(pictures[index]))
            for index, state in enumerate(states)
        )

    def preview(self, state: JobState) -> NDArray[np.uint8] | None:
        """A small picture of a job in flight: see `worker.device.previews.Previews.of`. On any thread."""
        self._set_device()
        return self._previews.of(state)

    def _set_device(self) -> None:
        """Make the runner's GPU the calling thread's: a new thread's is the first GPU."""
        if self._on_gpu:
            torch.cuda.set_device(self._device)

    def _groups(self, states: Sequence[JobState]) -> list[list[JobState]]:
        """Jobs that share a forward: all, up to the largest captured batch size; in exact mode each alone."""
        if self._exact:
            return [[state] for state in states]
        groups: list[list[JobState]] = [[]]
        for state in states:
            rows = sum(each.rows for each in groups[-1]) + state.rows
            if self._graphs is not None and rows > MAX_ROWS:
                groups.append([])
            groups[-1].append(state)
        return groups

    def _run(self, groups: Sequence[Sequence[JobState]]) -> list[Step]:
        """The step of each group, launched."""
        batches = [batch_of([state.next_inputs() for state in group]) for group in groups]
        lane = groups[0][0].lane
        replayed = [None] * len(batches) if self._graphs is None else self._graphs.run(lane, batches)
        return [
            Step(*denoise(self._family.forward, batch)) if step is None else step
            for step, batch in zip(replayed, batches, strict=True)
        ]


def serve_compiling(connection: Connection, settings: WorkerSettings, gpu: int) -> None:
    """Compile for the worker with these settings on the GPU of this number: the whole of another process."""

    def load() -> ModelRunner:
        return ModelRunner(settings, loader.load(settings, gpu=gpu), compiles_alone=True)

    server.serve(connection, load)
