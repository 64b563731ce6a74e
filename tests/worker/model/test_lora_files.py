"""LoRAs' files: what is read of each tool's is what diffusers makes of it (0.42.1, with PEFT 0.21.2)."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import save_file

from tests import lora_files as made
from tests import tiny_models
from tests.lora_files import Change, Changes, Tensors
from worker.model import lora_files
from worker.model.lora_files import LoraFile
from worker.model.lora_names import Targets

PARTS = ("unet", "text_encoder", "text_encoder_2")
MODELS = {"sd1": tiny_models.tiny_sd1, "sd2": tiny_models.tiny_sd2, "sdxl": tiny_models.tiny_sdxl}


class Model:
    """A tiny model in diffusers, its weights, and the modules that a LoRA may change."""

    def __init__(self, folder: Path) -> None:
        self.pipeline: Any = diffusers.DiffusionPipeline.from_pretrained(folder)
        self.parts = {part: getattr(self.pipeline, part) for part in PARTS if hasattr(self.pipeline, part)}
        self.weights = {part: dict(each.state_dict()) for part, each in self.parts.items()}
        self.shapes = {part: made.modules(each) for part, each in self.parts.items()}
        texts = [each for part, each in self.parts.items() if part != "unet"]
        self.targets = Targets.of(self.parts["unet"], texts)

    def changes(self, **options: Any) -> Changes:
        return {part: made.made_up(shapes, **options) for part, shapes in self.shapes.items()}

    def merged(self, changes: Changes) -> dict[str, Tensors]:
        """All weights with a LoRA in them, by the published formulas."""
        return {part: made.merged(self.weights[part], changes.get(part, {})) for part in self.parts}

    def read(self, file: LoraFile) -> dict[str, Tensors]:
        """All weights with what was read of a file in them."""
        by_part = dict(zip(PARTS, (file.unet, *file.text_encoders), strict=False))
        changes = {
            part: {
                name: Change(each.down, each.up, each.scale * each.rank, None, each.dora)
                for name, each in factors.items()
            }
            for part, factors in by_part.items()
        }
        return self.merged(changes)

    def by_diffusers(self, path: Path) -> dict[str, Tensors]:
        """All weights after `load_lora_weights` and `fuse_lora`."""
        try:
            self.pipeline.load_lora_weights(path)
            self.pipeline.fuse_lora()
            return {
                part: {
                    name.replace(".base_layer", ""): value.clone()
                    for name, value in each.state_dict().items()
                }
                for part, each in self.parts.items()
            }
        finally:
            self.pipeline.unfuse_lora()
            self.pipeline.unload_lora_weights()
            for part, each in self.parts.items():
                each.load_state_dict(self.weights[part])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    place = tmp_path_factory.mktemp("models")
    return {name: Model(build(place / name)) for name, build in MODELS.items()}


def load(path: Path, targets: Targets) -> LoraFile:
    return lora_files.load(path, "x", lora_files.sha256_of(path), targets)


def same(first: dict[str, Tensors], second: dict[str, Tensors]) -> None:
    for part, weights in first.items():
        for name, weight in weights.items():
            assert torch.allclose(weight, second[part][name], rtol=1e-5, atol=1e-6), f"{part}.{name}"


def check(model: Model, path: Path, tensors: Tensors, changes: Changes, *, diffusers: bool) -> None:
    """What is read of a file is what was written, and what diffusers makes of it where that is right."""
    save_file(tensors, path)
    read = model.read(load(path, model.targets))
    same(read, model.merged(changes))
    if diffusers:
        same(read, model.by_diffusers(path))


@pytest.mark.parametrize("name", MODELS)
def test_kohyas_files(models: dict[str, Model], tmp_path: Path, name: str) -> None:
    model, path = models[name], tmp_path / "x.safetensors"

    def named(changes: Changes) -> Tensors:
        return made.kohya_xl(changes, model.pipeline.unet) if name == "sdxl" else made.kohya(changes)

    plain = model.changes(ranks=(4,), alphas=(1.5,))
    check(model, path, named(plain), plain, diffusers=True)
    # Of alphas that differ diffusers takes one for all attention, and of ranks for SDXL's last projection.
    mixed = model.changes(ranks=(1, 4, 7), alphas=(1.0, 4.0, 0.5), share=0.7)
    check(model, path, named(mixed), mixed, diffusers=False)
    assert lora_files.sha256_of(path) == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("name", MODELS)
def test_diffusers_files(models: dict[str, Model], tmp_path: Path, name: str) -> None:
    model = models[name]
    changes = dict(model.changes(ranks=(4,), share=0.5))
    changes["unet"] = made.made_up(model.shapes["unet"], ranks=(1, 4, 7), share=0.5)
    check(model, tmp_path / "x.safetensors", made.diffusers(changes), changes, diffusers=True)
