"""Models of full size with random weights: of the real shapes, loaded like any other, and finite."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, get_args

import diffusers
import pytest
import torch
from click.testing import CliRunner
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from worker.bench import shapes
from worker.contract.errors import SettingsError
from worker.contract.settings import WorkerSettings
from worker.model import loader

#: Weights of each component, by the model cards and the files on the hub.
WEIGHTS = {
    "sd15": {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480},
    "sdxl": {
        "unet": 2_567_463_684,
        "vae": 83_653_863,
        "text_encoder": 123_060_480,
        "text_encoder_2": 694_659_840,
    },
}


def scaled_down(kind: shapes.Shapes) -> shapes.Architecture:
    """As deep as the real model, and much narrower."""
    plan = shapes.architecture(kind)
    width = 32
    texts = tuple(
        {
            **text,
            "hidden_size": width,
            "intermediate_size": width,
            "num_attention_heads": 4,
            "projection_dim": width,
        }
        for text in plan.texts
    )
    narrow: dict[str, Any] = {
        "block_out_channels": tuple(width for _ in plan.unet["block_out_channels"]),
        "cross_attention_dim": width * len(texts),
        "attention_head_dim": 4,
        "sample_size": 16,
    }
    if "addition_time_embed_dim" in plan.unet:
        narrow |= {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 6 * 8 + width}
    vae = {**plan.vae, "block_out_channels": (width,) * 4, "sample_size": 128}
    return dataclasses.replace(plan, unet={**plan.unet, **narrow}, vae=vae, texts=texts)


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        shapes, "architecture", {kind: scaled_down(kind) for kind in get_args(shapes.Shapes)}.get
    )


@pytest.mark.parametrize("kind", WEIGHTS)
def test_the_shapes_are_those_of_the_real_model(kind: shapes.Shapes) -> None:
    plan = shapes.architecture(kind)
    with torch.device("meta"):
        modules = {
            "unet": diffusers.UNet2DConditionModel(**plan.unet),
            "vae": diffusers.AutoencoderKL(**plan.vae),
            **shapes.text_encoders(plan.texts),
        }
    counted = {
        name: sum(weight.numel() for weight in module.parameters()) for name, module in modules.items()
    }
    assert counted == WEIGHTS[kind]


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize(
    "kind",
    # The others are made, loaded and drawn by the same lines, and take 20 s.
    [pytest.param(kind, marks=[pytest.mark.services] * (kind != "sd15")) for kind in get_args(shapes.Shapes)],
)
def test_a_worker_serves_it_and_fifty_guided_steps_in_fp16_stay_finite(
    kind: shapes.Shapes, tmp_path: Path
) -> None:
    folder = shapes.make(kind, tmp_path / "models" / kind)
    loaded = loader.load(WorkerSettings(model=str(folder), dtype="fp16"))
    assert loaded.served.name == kind
    vae = loaded.pipeline.vae
    latents = loaded.pipeline(
        "a small cat",
        num_inference_steps=50,
        guidance_scale=7.5,
        generator=torch.Generator().manual_seed(1),
        output_type="latent",
    ).images
    assert latents.dtype == torch.float16
    assert latents.isfinite().all()
    assert latents.std() > 1
    with torch.inference_mode():
        image = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor).sample
    # From black to white is 2. A flat picture would be compressed faster than a real one.
    assert image.std() > 0.1


@pytest.mark.services
@pytest.mark.usefixtures("narrow")
def test_the_seed_decides_the_weights(tmp_path: Path) -> None:
    def revision(name: str, **options: Any) -> bytes:
        folder = shapes.make("sd15", tmp_path / name, **options)
        return (folder / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()

    first = revision("first")
    assert revision("again") == first
    assert revision("other", seed=1) != first
    assert len(revision("whole", dtype=torch.float32)) > 1.5 * len(first)


@pytest.mark.usefixtures("narrow")
def test_a_second_call_leaves_the_folder_as_it_is(tmp_path: Path) -> None:
    folder = shapes.make("sd15", tmp_path / "model")
    before = folder.stat().st_mtime_ns, (folder / shapes.MARK).stat().st_ino
    assert shapes.make("sd15", folder) == folder
    assert (folder.stat().st_mtime_ns, (folder / shapes.MARK).stat().st_ino) == before
    with pytest.raises(
        SettingsError, match=r"holds .*sd15.*, not .*sdxl.*: name another folder, or delete this one\."
    ):
        shapes.make("sdxl", folder)


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SettingsError, match="holds something else"):
        shapes.make("sd15", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.usefixtures("narrow")
def test_a_failure_half_way_leaves_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(diffusers.DiffusionPipeline, "save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        shapes.make("sd15", tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("narrow")
def test_the_command(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    result = CliRunner().invoke(shapes.main, ["sd15-lcm", str(folder), "--seed", "3", "--dtype", "fp32"])
    assert (result.exit_code, result.output) == (0, f"{folder}\n")
    assert json.loads((folder / shapes.MARK).read_text()) == {
        "shapes": "sd15-lcm",
        "seed": 3,
        "dtype": "float32",
    }
    refused = CliRunner().invoke(shapes.main, ["sd15", str(folder)])
    assert refused.exit_code == 1
    assert "name another folder" in refused.output


def test_a_weight_of_an_unknown_layer_is_an_error() -> None:
    class Odd(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(3), requires_grad=False)

    with pytest.raises(TypeError, match=r"no rule for the weights of a Odd"):
        shapes.fill(torch.nn.Sequential(Odd()), "0")


def test_weights_follow_torchs_own_defaults() -> None:
    layer = torch.nn.Linear(400, 300, dtype=torch.float16).requires_grad_(False)
    expected = layer.weight.std().item()
    shapes.fill(layer, "0")
    assert math.isclose(layer.weight.std().item(), expected, rel_tol=0.02)
    assert layer.bias is not None
    assert layer.bias.abs().max().item() <= 400**-0.5


def test_a_prompt_has_a_token_for_each_byte_between_clips_own_ends() -> None:
    ids = shapes.tokenizer()("a cat").input_ids
    assert (ids[0], ids[-1], len(ids)) == (shapes.VOCABULARY - 2, shapes.VOCABULARY - 1, 6)


def test_the_text_encoder_finds_the_end_of_a_text() -> None:
    """Its pooled output is the end token's, found by `eos_token_id`."""
    config = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    encoders = shapes.text_encoders(({**config, "projection_dim": 8}, {**config, "projection_dim": 8}))
    assert isinstance(encoders["text_encoder"], CLIPTextModel)
    assert isinstance(encoders["text_encoder_2"], CLIPTextModelWithProjection)
    assert isinstance(encoders["text_encoder"].config, CLIPTextConfig)
    assert encoders["text_encoder"].config.eos_token_id == shapes.VOCABULARY - 1
