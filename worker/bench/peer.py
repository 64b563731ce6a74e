"""Measures one way to draw, in a process of its own: `python -m worker.bench.peer` reads a `Task` as JSON.

Its last line is the result as JSON. A process of its own, because compiled code, the allocator and cuDNN's
choices would otherwise be another peer's.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.models.attention_processor import AttnProcessor

from worker.bench.peer_report import Task
from worker.bench.saturation import saturate
from worker.bench.steady import Gauges, Steady, Window
from worker.contract.errors import SettingsError, SmallcatError, first_line
from worker.contract.job import Job
from worker.contract.plain_text import counted
from worker.contract.settings import worker_settings
from worker.device.job_state import JobState
from worker.device.model_runner import ModelRunner

PROMPT = "a small cat"
GUIDANCE = 7.5
#: Pictures that are compared: those of these seeds.
COMPARED = range(4)
#: Pictures in a batch by the sides of a picture in pixels, up to which it holds.
USUAL_BATCH = {768: 8, 4096: 4}


def measure(task: Task) -> dict[str, Any]:
    """The result of `task`. Its pictures are in the file that it names."""
    begun_s = time.perf_counter()
    return _engine(task, begun_s) if task.peer == "smallcat" else _diffusers(task, begun_s)


def _diffusers(task: Task, begun_s: float) -> dict[str, Any]:
    """diffusers' pipeline, called again and again."""
    settings = worker_settings()
    on_gpu = torch.cuda.is_available() and settings.device in (None, "cuda", "auto")
    if task.peer == "compiled" and not on_gpu:
        raise SettingsError("measured on a GPU only")
    dtype = torch.float16 if on_gpu else torch.float32
    pipe: Any = diffusers.DiffusionPipeline.from_pretrained(task.model, dtype=dtype, safety_checker=None)
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    pipe = pipe.to("cuda" if on_gpu else "cpu")
    pipe.set_progress_bar_config(disable=True)
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor
    usual = next(each for up_to, each in USUAL_BATCH.items() if side <= up_to)
    batch = (task.batch or usual) if task.peer in ("batched", "compiled") else 1
    if task.peer == "naive":
        pipe.unet.set_attn_processor(AttnProcessor())
    if task.peer == "compiled":
        _compile(pipe, task.mode)

    def draw(seeds: range) -> np.ndarray:
        given = {"num_inference_steps": task.steps, "guidance_scale": GUIDANCE}
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        floats = pipe([PROMPT] * len(seeds), generator=generators, output_type="np", **given).images
        return np.asarray((floats * 255).round(), np.uint8)

    def run() -> int:
        draw(range(batch))
        return batch

    first = draw(range(batch))
    first_s = time.perf_counter() - begun_s
    compared = [first[seed] if seed < batch else draw(range(seed, seed + batch))[0] for seed in COMPARED]
    np.save(task.pictures, np.stack(compared))
    found = Window(task.warm_s, task.seconds).measure(run)
    return _result(found, batch, first_s, (side, side), str(dtype))


def _compile(pipe: Any, mode: str) -> None:
    """As diffusers' documentation has it ("Accelerate inference")."""
    inductor = torch._inductor.config
    inductor.conv_1x1_as_mm = True
    inductor.coordinate_descent_tuning = mode == "max-autotune"
    inductor.epilogue_fusion = False
    pipe.fuse_qkv_projections()
    for module in (pipe.unet, pipe.vae):
        module.to(memory_format=torch.channels_last)
    pipe.unet = torch.compile(pipe.unet, mode=mode, fullgraph=True)
    pipe.vae.decode = torch.compile(pipe.vae.decode, mode=mode, fullgraph=True)


def _engine(task: Task, begun_s: float) -> dict[str, Any]:
    """The worker's own runner and engine, without queue, encoding and bucket."""
    update = {"model": task.model, "compile_first": True}
    runner = ModelRunner(worker_settings().model_copy(update=update))
    chosen = {choice.what: choice for choice in (*runner.choices, *runner.warm_up())}
    fields: dict[str, Any] = {"steps": task.steps, "scheduler": "euler", "guidance_scale": GUIDANCE}
    states = [
        runner.prepare(Job.parse({"prompt": PROMPT, "seed": seed, **fields}).resolved(runner.served))
        for seed in COMPARED
    ]
    np.save(task.pictures, np.stack(_drawn(runner, states)))
    first_s = time.perf_counter() - begun_s
    gauges = Gauges()
    rates = saturate(runner, task.seconds, warm_s=task.warm_s, during=gauges, **fields)
    found = Steady(rates["images_s"], *gauges.medians)
    defaults = runner.served.defaults
    return _result(found, 0, first_s, (defaults.width, defaults.height), chosen["dtype"].choice)


def _drawn(runner: ModelRunner, states: list[JobState]) -> list[np.ndarray]:
    """The pictures of these jobs, in one batch."""
    while states[0].step < states[0].steps:
        if failures := [failure for failure in runner.step(states) if failure is not None]:
            raise failures[0]
    return [_pixels(outcome) for outcome in runner.decode(states)]


def _pixels(outcome: Any) -> np.ndarray:
    if isinstance(outcome, SmallcatError):
        raise outcome
    return np.asarray(outcome.pixels)


def _result(found: Steady, batch: int, first_s: float, size: tuple[int, int], dtype: str) -> dict[str, Any]:
    on_gpu = torch.cuda.is_initialized()
    device = torch.cuda.get_device_name() if on_gpu else f"CPU, {counted(torch.get_num_threads(), 'thread')}"
    peer = {
        **dataclasses.asdict(found),
        "batch": batch,
        "first_s": first_s,
        "memory_gib": torch.cuda.max_memory_reserved() / 2**30 if on_gpu else None,
    }
    conditions = {
        "width": size[0],
        "height": size[1],
        "device": device,
        "dtype": dtype.removeprefix("torch."),
    }
    return {"peer": peer, "conditions": conditions | {"guidance_scale": GUIDANCE}}


def main() -> None:
    """Measure what standard input says. A peer that cannot be measured is a result, too."""
    task = Task(**json.load(sys.stdin))
    try:
        result = measure(task)
    except (SmallcatError, torch.OutOfMemoryError, OSError, ValueError) as error:
        result = {"left_out": first_line(error)}
    sys.stdout.flush()
    os.write(1, b"\n" + json.dumps(result).encode() + b"\n")


if __name__ == "__main__":
    main()
