"""Jobs with LoRAs: pictures are diffusers' own, alone and beside jobs with others and with none.

diffusers 0.42.1 with PEFT 0.21: `load_lora_weights` and `set_adapters`. What diffusers drops or refuses is
held to weights with the LoRA merged in by the published formula: tests/lora_files.py.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests import lora_files, tiny_models
from tests.lora_files import Changes, made_up, modules
from tests.worker.device.beside_diffusers import BesideDiffusers
from worker.contract.file_index import Kind
from worker.contract.job import Job
from worker.model.beside.file_store import FileStore

MODELS: dict[str, Callable[[Path], Path]] = {
    "sd1": tiny_models.tiny_sd1,
    "sd2": tiny_models.tiny_sd2,
    "sdxl": tiny_models.tiny_sdxl,
    "inpainting": functools.partial(tiny_models.tiny_sd1, inpainting=True),
}
#: Each kind of file: how its factors are made up, which parts it changes, convolutions too or not.
KINDS: dict[str, tuple[dict[str, Any], bool, bool]] = {
    "kohya": ({"alphas": [2.0]}, True, False),
    "diffusers": ({}, True, False),
    "peft": ({"ranks": [3]}, False, False),
    "locon": ({"alphas": [1.0, 4.0], "share": 0.5}, False, True),
    "tucker": ({"tucker": True, "share": 0.5}, False, True),
    "dora-of-outputs": ({"dora": "out", "share": 0.5}, True, False),
    "dora-of-inputs": ({"dora": "in", "share": 0.5}, False, False),
    "by-block": ({"ranks": [1, 2, 5, 16], "alphas": [1.0, 3.0, None], "share": 0.7}, True, False),
}
#: Those that diffusers takes as they are meant. It leaves out an alpha for each block (PEFT warns of it).
BY_DIFFUSERS = {
    "sd1": {"kohya", "diffusers"},
    "sd2": {"kohya", "diffusers"},
    "sdxl": {"diffusers"},
    "inpainting": {"kohya", "diffusers"},
}
#: What jobs name: LoRAs and weights; with a pair, the second is that of text encoders.
Named = Mapping[str, float | tuple[float, float]]


class Model(BesideDiffusers):
    """A tiny model whose runner offers a LoRA of each kind."""

    def __init__(self, name: str, folder: Path) -> None:
        path, loras = MODELS[name](folder / "model"), folder / "loras"
        loras.mkdir()
        pipeline = diffusers.DiffusionPipeline.from_pretrained(path)
        self.changes = {kind: _changes(pipeline, number, kind) for number, kind in enumerate(KINDS)}
        for kind, changes in self.changes.items():
            file = loras / f"{kind}.safetensors"
            if kind == "peft":
                (loras / kind).mkdir()
                file = loras / kind / "adapter_model.safetensors"
                config = {"peft_type": "LORA", "r": 3, "lora_alpha": 3}
                file.with_name("adapter_config.json").write_text(json.dumps(config))
            save_file(_written(kind, changes, pipeline.unet, name), file)
        super().__init__(path, FileStore({Kind.LORA: [str(loras)]}, folder / "cache"))
        self.loras, self.name = loras, name

    def job(self, named: Named, **fields: Any) -> Job:
        """A job that names LoRAs."""
        given = []
        for name, weights in named.items():
            weight, text = weights if isinstance(weights, tuple) else (weights, None)
            given.append({"name": name, "weight": weight, "text_encoder_weight": text})
        return self.job_of(prompt="a small cat", guidance_scale=3.0, loras=given, **fields)

    def by_diffusers(self, job: Job) -> Any:
        """Its pixels by diffusers' LoRAs."""
        weights = []
        for lora in job.loras:
            self.pipeline.load_lora_weights(
                str(self.loras / f"{lora.name}.safetensors"), adapter_name=lora.name
            )
            parts = [part for part in self.changes[lora.name] if part != "unet"]
            weights.append({"unet": lora.weight} | dict.fromkeys(parts, lora.in_text_encoders))
        try:
            self.pipeline.set_adapters([lora.name for lora in job.loras], weights)
            return self.expected(job)
        finally:
            self.pipeline.unload_lora_weights()

    def by_formula(self, job: Job) -> Any:
        """Its pixels by weights into which its LoRAs are merged, one after the other."""
        kept = {}
        for lora in job.loras:
            for part, changes in self.changes[lora.name].items():
                model = getattr(self.pipeline, part)
                kept.setdefault(part, {key: each.clone() for key, each in model.state_dict().items()})
                weight = lora.weight if part == "unet" else lora.in_text_encoders
                model.load_state_dict(lora_files.merged(model.state_dict(), changes, weight))
        try:
            return self.expected(job)
        finally:
            for part, state in kept.items():
                getattr(self.pipeline, part).load_state_dict(state)


def _changes(pipeline: Any, seed: int, kind: str) -> Changes:
    options, with_text, with_convolutions = KINDS[kind]
    shapes = modules(pipeline.unet)
    if not with_convolutions:
        shapes = {name: shape for name, shape in shapes.items() if ".transformer_blocks." in name}
    found = {"unet": made_up(shapes, seed=seed, **options)}
    for part in ("text_encoder", "text_encoder_2") if with_text else ():
        if (encoder := getattr(pipeline, part, None)) is not None:
            own = {name: shape for name, shape in modules(encoder).items() if ".layers." in name}
            found[part] = made_up(own, seed=seed + 50, **options)
    return found


def _written(kind: str, changes: Changes, unet: Any, model: str) -> dict[str, torch.Tensor]:
    if kind == "peft":
        return lora_files.peft(changes["unet"])
    if kind == "diffusers":
        return lora_files.diffusers(changes)
    return lora_files.kohya_xl(changes, unet) if model == "sdxl" else lora_files.kohya(changes)


def far(one: Any, other: Any) -> int:
    """The largest difference of a pixel, 0 to 255."""
    pixels = [np.asarray(getattr(each, "pixels", each), dtype=int) for each in (one, other)]
    return int(np.abs(pixels[0] - pixels[1]).max())


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Model]:
    made: dict[str, Model] = {}

    def get(name: str) -> Model:
        if name not in made:
            made[name] = Model(name, tmp_path_factory.mktemp(name))
        return made[name]

    return get


#: Alone, several of them, with weights of their own for the text.
MIXED: list[Named] = [
    {"kohya": 0.7},
    {},
    {"diffusers": -0.5, "locon": 0.8},
    {"dora-of-outputs": 0.6},
    {"by-block": (0.0, 1.0)},
    {"by-block": (0.5, -0.4), "peft": 0.5, "kohya": -0.3},
    {"dora-of-inputs": 1.0},
    {"tucker": 0.4},
]


def check_mixed(model: Model) -> None:
    jobs = [model.job(named, seed=number) for number, named in enumerate(MIXED)]
    none = [model.job({}, seed=number) for number in range(len(MIXED))]
    without = model.together(none)
    for job, picture, plain in zip(jobs, model.together(jobs), without, strict=True):
        assert far(picture, model.by_formula(job)) <= 1, job.loras
        assert far(picture, plain) > 5 if job.loras else far(picture, plain) <= 1


def test_mixed_jobs_draw_what_merged_weights_draw(model_of: Callable[[str], Model]) -> None:
    check_mixed(model_of("sd1"))


def test_a_job_draws_what_diffusers_draws(model_of: Callable[[str], Model]) -> None:
    model = model_of("sd1")
    job = model.job({"kohya": (0.7, 0.2), "diffusers": -0.5})
    assert far(model.together([job])[0], model.by_diffusers(job)) <= 1


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("sd2", marks=pytest.mark.slow),
        pytest.param("sdxl", marks=pytest.mark.slow),
        pytest.param("inpainting", marks=pytest.mark.services),
    ],
)
def test_mixed_jobs_of_each_family(name: str, model_of: Callable[[str], Model]) -> None:
    check_mixed(model_of(name))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_each_kind_in_each_family(name: str, kind: str, model_of: Callable[[str], Model]) -> None:
    model = model_of(name)
    for weight in (1.0, -0.6):
        job = model.job({kind: weight})
        (alone,) = model.together([job])
        mates = [model.job({}, seed=1), model.job({"kohya": 0.5}, seed=2)]
        assert far(alone, model.together([mates[0], job, mates[1]])[1]) <= 1
        assert far(alone, model.by_formula(job)) <= 1
        assert far(alone, model.together([model.job({})])[0]) > 5
        if kind in BY_DIFFUSERS[name]:
            assert far(alone, model.by_diffusers(job)) <= 1
