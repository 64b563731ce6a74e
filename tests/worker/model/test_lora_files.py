"""LoRAs' files: what is read of each tool's is what diffusers makes of it (0.42.1, with PEFT 0.21.2)."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import diffusers
import peft
import pytest
import torch
from diffusers.loaders.lora_conversion_utils import (
    _convert_unet_lora_key,
    _maybe_map_sgm_blocks_to_diffusers,
)
from diffusers.training_utils import _collate_lora_metadata as metadata_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from tests import lora_files as made
from tests import tiny_models
from tests.lora_files import Change, Changes, Tensors
from worker.model.beside import lora_files
from worker.model.beside.lora_files import LoraFile
from worker.model.beside.lora_names import Targets, parse
from worker.model.single_file import CONFIGS

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


def check(model: Model, path: Path, tensors: Tensors, changes: Changes, *, diffusers: bool = False) -> None:
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


@pytest.mark.parametrize("name", ["sd1", "sd2"])
def test_files_of_attention_processors(models: dict[str, Model], tmp_path: Path, name: str) -> None:
    model = models[name]
    ends = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj")
    shapes = {
        part: {module: shape for module, shape in of_part.items() if module.endswith(ends)}
        for part, of_part in model.shapes.items()
    }
    changes = {part: made.made_up(of_part, seed=3) for part, of_part in shapes.items()}
    check(model, tmp_path / "x.safetensors", made.processors(changes), changes, diffusers=True)
    # Older ones still say no part, since they have one.
    tensors = {key.removeprefix("unet."): each for key, each in made.processors(changes).items()}
    tensors = {key: each for key, each in tensors.items() if not key.startswith("text_encoder")}
    check(model, tmp_path / "x.safetensors", tensors, {"unet": changes["unet"]}, diffusers=False)


def test_files_of_diffusers_between_the_two(models: dict[str, Model], tmp_path: Path) -> None:
    model = models["sdxl"]
    changes = model.changes(share=0.3)
    check(model, tmp_path / "x.safetensors", made.layers(changes), changes, diffusers=True)


@pytest.mark.parametrize("name", MODELS)
def test_onetrainers_files(models: dict[str, Model], tmp_path: Path, name: str) -> None:
    model = models[name]
    changes = model.changes(ranks=(2, 8), alphas=(1.0, 8.0), dora="in")
    tensors = made.onetrainer(changes, model.pipeline.unet)
    check(model, tmp_path / "x.safetensors", tensors, changes, diffusers=False)
    check(model, tmp_path / "x.safetensors", made.kohya(changes) if name != "sdxl" else tensors, changes)


def test_files_of_lycoris_that_wrapped_one_model(models: dict[str, Model], tmp_path: Path) -> None:
    model = models["sdxl"]
    for part in ("unet", "text_encoder_2"):
        changes = {part: made.made_up(model.shapes[part], ranks=(2, 5), alphas=(1.0, 8.0), seed=3)}
        check(model, tmp_path / "x.safetensors", made.lycoris(changes[part]), changes)


@pytest.mark.parametrize(
    "options", [{"tucker": True}, {"dora": "out"}, {"dora": "in"}, {"dora": "out", "tucker": True}]
)
def test_locon_and_dora(models: dict[str, Model], tmp_path: Path, options: Any) -> None:
    """diffusers leaves dora_scale out, with a warning, and refuses lora_mid."""
    model = models["sd1"]
    changes = model.changes(ranks=(2, 5), alphas=(1.0, 2.0), **options)
    check(model, tmp_path / "x.safetensors", made.kohya(changes), changes)


def test_diffusers_dora(models: dict[str, Model], tmp_path: Path) -> None:
    model = models["sd1"]
    changes = {"unet": made.made_up(model.shapes["unet"], ranks=(3,), dora="out")}
    check(model, tmp_path / "x.safetensors", made.diffusers(changes), changes, diffusers=True)


#: Options of PEFT by which products differ.
OPTIONS: tuple[dict[str, Any], ...] = (
    {"r": 4, "lora_alpha": 8, "rank_pattern": {"to_k": 2, "attn1.to_q": 3}, "alpha_pattern": {"to_k": 5}},
    {"r": 9, "lora_alpha": 2, "use_rslora": True, "use_dora": True},
)


def trained(model: torch.nn.Module, targets: list[str], **options: Any) -> Any:
    """A copy with PEFT's adapter in it, of made-up numbers."""
    config = peft.LoraConfig(target_modules=targets, init_lora_weights="gaussian", **options)
    adapted = peft.get_peft_model(copy.deepcopy(model), config)
    generator = torch.Generator().manual_seed(5)
    for key, weight in adapted.named_parameters():
        if "lora_" in key:
            noise = 0.2 * torch.randn(weight.shape, generator=generator)
            weight.data = weight.data + noise.abs() if "magnitude" in key else noise
    return adapted


def fused(adapted: Any) -> Tensors:
    """The weights that PEFT makes of it."""
    return dict(copy.deepcopy(adapted).merge_and_unload().state_dict())


@pytest.mark.parametrize("options", OPTIONS)
def test_what_diffusers_saves_with_pefts_settings(
    models: dict[str, Model], tmp_path: Path, options: dict[str, Any]
) -> None:
    model = models["sdxl"]
    unet = trained(model.parts["unet"], ["to_q", "to_k", "to_out.0", "conv1", "proj_in"], **options)
    texts = [trained(model.parts[part], ["q_proj", "k_proj", "fc1"], **options) for part in PARTS[1:]]
    adapters = [unet, *texts]
    states = [peft.get_peft_model_state_dict(each) for each in adapters]
    states = [
        {key.removeprefix("base_model.model."): each for key, each in state.items()} for state in states
    ]
    diffusers.StableDiffusionXLPipeline.save_lora_weights(
        tmp_path, *states, **metadata_of(dict(zip(PARTS, adapters, strict=True)))
    )
    file = load(tmp_path / "pytorch_lora_weights.safetensors", model.targets)
    same(model.read(file), {part: fused(each) for part, each in zip(PARTS, adapters, strict=True)})


@pytest.mark.parametrize("options", OPTIONS)
def test_what_diffusers_saves_of_a_unet_alone(
    models: dict[str, Model], tmp_path: Path, options: dict[str, Any]
) -> None:
    """`save_lora_adapter` writes PEFT's settings, too, and no part of the model before them."""
    model = models["sd1"]
    unet = copy.deepcopy(model.parts["unet"])
    config = peft.LoraConfig(target_modules=["to_q", "to_k", "conv2"], init_lora_weights=False, **options)
    unet.add_adapter(config, "x")
    unet.save_lora_adapter(tmp_path, adapter_name="x")
    unet.fuse_lora(adapter_names=["x"])
    fused = {name.replace(".base_layer", ""): each for name, each in unet.state_dict().items()}
    file = load(tmp_path / "pytorch_lora_weights.safetensors", model.targets)
    same(model.read(file), model.merged({}) | {"unet": fused})


@pytest.mark.parametrize("options", OPTIONS)
def test_what_peft_saves_with_its_config_beside_it(
    models: dict[str, Model], tmp_path: Path, options: dict[str, Any]
) -> None:
    model = models["sd1"]
    for part, targets in (("unet", ["to_q", "to_k", "conv2"]), ("text_encoder", ["q_proj", "k_proj", "fc2"])):
        adapted = trained(model.parts[part], targets, **options)
        adapted.save_pretrained(tmp_path / part)
        path = tmp_path / part / "adapter_model.safetensors"
        expected = model.merged({}) | {part: fused(adapted)}
        same(model.read(load(path, model.targets)), expected)
        # The config is part of the content, and a file without it says no alpha.
        before = lora_files.sha256_of(path)
        path.with_name("adapter_config.json").write_text("{}")
        assert lora_files.sha256_of(path) != before
        path.rename(tmp_path / part / "cat.safetensors")
        _, problem = lora_files.describe(tmp_path / part / "cat.safetensors")
        assert "keep it as adapter_model.safetensors in a folder with its adapter_config.json" in problem


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl"])
def test_all_modules_of_the_real_models_are_found_by_each_spelling(name: str) -> None:
    """By the names of the original layout, and for SDXL, whose files have these, as diffusers reads them."""
    config = json.loads((CONFIGS / name / "unet" / "config.json").read_text("utf-8"))
    with torch.device("meta"):
        unet: Any = diffusers.UNet2DConditionModel.from_config(config)
    targets = Targets.of(unet, ())
    original = made.original_names(unet)
    assert len(targets.unet) > 200
    spelled = {}
    for module in targets.unet:
        for spelling in (module, original[module]):
            kohya = parse(f"lora_unet_{spelling.replace('.', '_')}.lora_down.weight")
            dotted = parse(f"unet.{spelling}.alpha")
            assert kohya is not None
            assert dotted is not None
            assert kohya.module == dotted.module
            assert targets.by_spelling[kohya.part][kohya.module] == module
        spelled[f"lora_unet_{original[module].replace('.', '_')}.lora_down.weight"] = module
    if name == "sdxl":
        theirs = _maybe_map_sgm_blocks_to_diffusers(dict(zip(spelled, spelled, strict=True)), unet.config)
        for theirs_key, key in theirs.items():
            converted = _convert_unet_lora_key(theirs_key).replace(".processor", "")
            converted = converted.removesuffix(".lora_down.weight").replace(
                "to_out_lora.down.weight", "to_out.0"
            )
            converted = converted.replace(".lora.down.weight", "").replace("_lora.down.weight", "")
            assert converted == spelled[key]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 1 << 30),
    ranks=st.lists(st.integers(1, 256), min_size=1, max_size=4),
    alphas=st.lists(st.none() | st.floats(-64, 256, width=16), min_size=1, max_size=4),
    dora=st.sampled_from(["", "out", "in"]),
    tucker=st.booleans(),
    tool=st.sampled_from(["kohya", "kohya_xl", "onetrainer", "comfyui"]),
)
def test_any_ranks_alphas_and_modules(
    models: dict[str, Model], tmp_path: Path, seed: int, tool: str, **options: Any
) -> None:
    model = models["sdxl"]
    shapes = model.shapes if tool != "kohya" else {"unet": model.shapes["unet"]}
    changes = {part: made.made_up(of, seed=seed, share=0.05, **options) for part, of in shapes.items()}
    tensors = made.kohya(changes) if tool == "kohya" else getattr(made, tool)(changes, model.pipeline.unet)
    save_file(tensors, tmp_path / "x.safetensors")
    file = load(tmp_path / "x.safetensors", model.targets)
    found = dict(zip(PARTS, (file.unet, *file.text_encoders), strict=True))
    for part, of_part in changes.items():
        assert found[part].keys() == of_part.keys()
        for name, change in of_part.items():
            factors, shape = found[part][name], model.shapes[part][name]
            product = (factors.up @ factors.down.flatten(1)).reshape(shape) * factors.scale
            assert torch.allclose(product.double(), change.difference(shape), rtol=1e-3, atol=1e-3)
            assert factors.down.shape[2:] == shape[2:]
            if change.magnitude is not None:
                assert factors.dora is not None
                assert torch.equal(factors.dora, change.magnitude)
