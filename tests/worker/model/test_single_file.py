"""Single files in all the ways in which tools write them: the same pictures as their folder."""

from __future__ import annotations

import functools
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, LatentConsistencyModelPipeline
from safetensors.torch import load_file, save_file

from tests import original_layout, tiny_models
from tests.worker.model import shipped
from tests.worker.model.shipped import Tensors, Tiny, load, note, picture
from worker.contract.errors import SettingsError
from worker.contract.settings import WorkerSettings
from worker.model import files as model_files
from worker.model import headers, single_file


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def tinies(root: Path) -> dict[str, Tiny]:
    return {family: shipped.make(family, root) for family in shipped.FAMILIES}


@pytest.fixture(autouse=True)
def configs(root: Path, tinies: dict[str, Tiny], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny models' configs in the place of the shipped ones."""
    monkeypatch.setattr(single_file, "CONFIGS", root / "configs")
    return root / "configs"


def find(model: Path, **settings: str) -> model_files.ModelFiles:
    return model_files.find(WorkerSettings(model=str(model), **settings), half=False)


def refuse(model: Path, sentence: str, **settings: str) -> None:
    with pytest.raises(SettingsError, match=sentence) as caught:
        load(model, **settings)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(".")


@functools.cache
def of_folder(folder: Path) -> tuple[Any, np.ndarray]:
    """The pipeline of a tiny model's folder, which nobody changes, and its picture."""
    pipeline = load(folder).pipeline
    return pipeline, picture(pipeline)


def same(model: Path, tiny: Tiny) -> None:
    """The single file `model` has the weights of the folder, and draws its picture."""
    single = load(model).pipeline
    folder, expected_picture = of_folder(tiny.folder)
    for name, component in folder.components.items():
        if isinstance(component, torch.nn.Module):
            expected, got = component.state_dict(), single.components[name].state_dict()
            assert {key: value.shape for key, value in got.items()} == {
                key: value.shape for key, value in expected.items()
            }
            assert all(torch.equal(value, got[key]) for key, value in expected.items()), name
    # A matrix that lies in memory otherwise is multiplied otherwise, by a last bit.
    assert np.allclose(picture(single), expected_picture, atol=1e-5)


@pytest.mark.parametrize("name", ["time_embedding.cond_proj.weight", "time_embed.cond_proj.weight"])
def test_a_latent_consistency_model(tmp_path: Path, configs: Path, name: str) -> None:
    """Its UNet takes the guidance as numbers, by a tensor that no other checkpoint has."""
    folder = tiny_models.tiny_lcm(tmp_path / "lcm")
    pipeline = LatentConsistencyModelPipeline.from_pretrained(folder, safety_checker=None)
    tensors = original_layout.checkpoint(pipeline)
    prefix = "model.diffusion_model."
    tensors[f"{prefix}{name}"] = tensors.pop(f"{prefix}time_embedding.cond_proj.weight")
    save_file(tensors, tmp_path / "lcm.safetensors")
    single, expected = load(tmp_path / "lcm.safetensors"), load(folder)
    assert type(single.pipeline) is type(expected.pipeline) is LatentConsistencyModelPipeline
    assert single.served.defaults == expected.served.defaults
    state = single.pipeline.unet.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in expected.pipeline.unet.state_dict().items())

    def drawn(pipeline: Any) -> Any:
        generator = torch.Generator("cpu").manual_seed(5)
        return pipeline("a cat", num_inference_steps=2, height=64, width=64, generator=generator,
                        output_type="np").images[0]  # fmt: skip

    assert np.allclose(drawn(single.pipeline), drawn(expected.pipeline), atol=1e-5)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_a_model_made_for_inpainting(tmp_path: Path, configs: Path, family: str) -> None:
    """Its UNet takes 9 channels; all else is as the family's configs say, or as the user's do."""
    folder = shipped.FAMILIES[family](tmp_path / "folder", inpainting=True)
    expected = load(folder)
    path = tmp_path / "cat.safetensors"
    save_file(original_layout.checkpoint(expected.pipeline), path)
    state = expected.pipeline.unet.state_dict()
    for own in ("", str(folder)):
        single = load(path, model_config_dir=own)
        assert single.served.inpainting
        assert type(single.pipeline) is type(expected.pipeline)
        found = single.pipeline.unet.state_dict()
        assert found.keys() == state.keys()
        assert all(torch.equal(value, found[key]) for key, value in state.items())
    why = "The unet of .* is not what SMALLCAT_MODEL_CONFIG_DIR describes"
    refuse(path, why, model_config_dir=str(shipped.FAMILIES[family](tmp_path / "plain")))


# --- the layouts of the three families ----------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_a_file_without_configs_or_network(
    tinies: dict[str, Tiny], tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []
    monkeypatch.setattr(socket.socket, "connect", lambda _, address: asked.append(address))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *address, **_: asked.append(address))
    if family == "sd2":  # Its tiny tokenizer has 16 tokens; the text encoder's config says so.
        assert tinies[family].tensors["cond_stage_model.model.positional_embedding"].shape[0] == 16
    path = tinies[family].write(tmp_path / "cat.safetensors")
    same(path, tinies[family])
    loaded, folder = load(path), load(tinies[family].folder)
    assert loaded.served.name == "cat"
    assert loaded.served.defaults == folder.served.defaults
    assert loaded.pipeline.scheduler.config == folder.pipeline.scheduler.config
    assert asked == []
    assert loaded.pipeline.config.get("force_zeros_for_empty_prompt") == folder.pipeline.config.get(
        "force_zeros_for_empty_prompt"
    )


def moved(tensors: Tensors, old: str, new: str) -> Tensors:
    assert any(name.startswith(old) for name in tensors)
    return {
        new + name.removeprefix(old) if name.startswith(old) else name: tensor
        for name, tensor in tensors.items()
    }


def with_training_state(tensors: Tensors) -> Tensors:
    """As a trainer leaves it: averaged weights, as CompVis' LitEma names them, and its counters."""
    averaged = {
        f"model_ema.{name.removeprefix('model.').replace('.', '')}": torch.zeros_like(tensor)
        for name, tensor in tensors.items()
        if name.startswith("model.diffusion_model.")
    }
    return {
        **tensors,
        **averaged,
        "model_ema.decay": torch.tensor(0.9),
        "global_step": torch.tensor(840000),
        "betas": torch.linspace(0.00085, 0.012, 1000),
        "first_stage_model.loss.logvar": torch.zeros(1),
    }


def as_linear_layer(tensors: Tensors) -> Tensors:
    place = "conditioner.embedders.1.model.text_projection"
    rest = {name: tensor for name, tensor in tensors.items() if name != place}
    return {**rest, f"{place}.weight": tensors[place].T.contiguous()}


LAYOUTS: dict[str, tuple[str, Callable[[Tensors], Tensors]]] = {
    "CLIP before 2023": (
        "sd1",
        lambda each: moved(each, "cond_stage_model.transformer.text_model.", "cond_stage_model.transformer."),
    ),
    "position ids, as integers or not": (
        "sd1",
        lambda each: (
            each
            | {
                "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77.0)[None],
                "cond_stage_model.transformer.embeddings.position_ids": torch.arange(77)[None],
            }
        ),
    ),
    "1.x in sgm's layout": (
        "sd1",
        lambda each: moved(each, "cond_stage_model.", "conditioner.embedders.0."),
    ),
    "2.x in sgm's layout": (
        "sd2",
        lambda each: moved(each, "cond_stage_model.", "conditioner.embedders.0."),
    ),
    "XL with the older name of CLIP": (
        "sdxl",
        lambda each: moved(
            each, "conditioner.embedders.0.transformer.text_model.", "conditioner.embedders.0.transformer."
        ),
    ),
    "XL with a linear projection": ("sdxl", as_linear_layer),
    "VAE as vae": ("sdxl", lambda each: moved(each, "first_stage_model.", "vae.")),
    "training state": ("sd1", with_training_state),
    "XL with training state": ("sdxl", with_training_state),
    "leftovers of a LoRA": (
        "sd1",
        lambda each: each | {"lora_te_text_model_encoder_layers_0_mlp_fc1.alpha": torch.zeros(())},
    ),
    "attention of the VAE as a matrix": (
        "sd1",
        lambda each: {
            name: tensor[:, :, 0, 0].contiguous() if "mid.attn_1" in name and tensor.ndim == 4 else tensor
            for name, tensor in each.items()
        },
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_in_which_the_file_is_shared(tinies: dict[str, Tiny], tmp_path: Path, layout: str) -> None:
    family, change = LAYOUTS[layout]
    tiny = tinies[family]
    same(tiny.write(tmp_path / "cat.safetensors", change(tiny.tensors)), tiny)


@pytest.mark.parametrize("suffix", [".SAFETENSORS", ".Safetensors", ".sft"])
def test_a_suffix_in_capitals_or_short(tinies: dict[str, Tiny], tmp_path: Path, suffix: str) -> None:
    path = tinies["sd1"].write(tmp_path / f"Cat{suffix}")
    assert load(path).served.name == "Cat"
    same(path, tinies["sd1"])


def test_averaged_weights_are_left_out_and_that_is_said(tinies: dict[str, Tiny], tmp_path: Path) -> None:
    path = tinies["sd1"].write(tmp_path / "cat.safetensors", with_training_state(tinies["sd1"].tensors))
    choice, reason = note(load(path), "UNet weights")
    assert choice == "the plain ones"
    assert "as A1111, ComfyUI and Forge take" in reason


# --- how weights are stored ---------------------------------------------------------------------------------


def stored(tensors: Tensors, dtype: torch.dtype) -> Tensors:
    return {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()
    }


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.float64]
)
@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_weights_in_any_float(
    tinies: dict[str, Tiny], tmp_path: Path, family: str, dtype: torch.dtype
) -> None:
    tiny = tinies[family]
    path = tiny.write(tmp_path / "cat.safetensors", stored(tiny.tensors, dtype))
    loaded, (folder, _) = load(path).pipeline, of_folder(tiny.folder)
    for name in ("unet", "vae", "text_encoder"):
        got = loaded.components[name].state_dict()
        for key, expected in folder.components[name].state_dict().items():
            assert got[key].dtype == torch.float32
            assert torch.equal(got[key], expected.to(dtype).float()), key


def scaled(tensors: Tensors, suffix: str, *, rows: bool, prefix: str = "model.diffusion_model.") -> Tensors:
    """Matrices below `prefix` as fp8 with a scale: of the whole, or of each row."""
    found = dict(tensors)
    for name, tensor in tensors.items():
        if name.startswith(prefix) and name.endswith(".weight") and tensor.ndim == 2:
            most = tensor.abs().amax(1, keepdim=True) if rows else tensor.abs().max()
            scale = (most / 448).clamp(min=1e-12)
            found[name] = (tensor / scale).to(torch.float8_e4m3fn)
            found[name.removesuffix(".weight") + suffix] = scale
    return found


def comfy(tensors: Tensors, *, first: bool) -> Tensors:
    """ComfyUI's marks besides: those of its first way to write scaled fp8, or of its second."""
    names = [name.removesuffix(".weight") for name in tensors if tensors[name].dtype == torch.float8_e4m3fn]
    if first:
        mark = {"model.diffusion_model.scaled_fp8": torch.empty(2, dtype=torch.float8_e4m3fn)}
        return tensors | mark | {f"{name}.scale_input": torch.ones(()) for name in names}
    said = torch.frombuffer(bytearray(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
    return tensors | {f"{name}.comfy_quant": said.clone() for name in names}


@pytest.mark.parametrize(
    ("suffix", "rows"), [(".scale_weight", False), (".weight_scale", False), (".weight_scale", True)]
)
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_scaled_fp8(tinies: dict[str, Tiny], tmp_path: Path, family: str, suffix: str, rows: bool) -> None:
    """An fp8 number of e4m3 has 3 bits behind the point: a weight is within 1/16 of itself, or near zero."""
    tiny = tinies[family]
    tensors = comfy(scaled(tiny.tensors, suffix, rows=rows), first=suffix == ".scale_weight")
    path = tiny.write(tmp_path / "cat.safetensors", tensors)
    loaded, folder = load(path), load(tiny.folder)
    got = loaded.pipeline.unet.state_dict()
    changed = 0
    for key, expected in folder.pipeline.unet.state_dict().items():
        limit = expected.abs() / 16 + expected.abs().max() / 448 / 8
        assert ((got[key] - expected).abs() <= limit).all(), key
        changed += not torch.equal(got[key], expected)
    assert changed > 10
    assert np.abs(picture(loaded.pipeline) - picture(folder.pipeline)).mean() < 0.02
    assert note(loaded, "scaled fp8")[0].endswith("weights")
    assert loaded.served.revision != headers.digest({"": path})


def test_scaled_fp8_in_a_text_encoder(tinies: dict[str, Tiny], tmp_path: Path) -> None:
    prefix = "cond_stage_model.transformer.text_model.encoder."
    tensors = scaled(tinies["sd1"].tensors, ".scale_weight", rows=False, prefix=prefix)
    loaded = load(tinies["sd1"].write(tmp_path / "cat.safetensors", tensors)).pipeline.text_encoder
    folder, _ = of_folder(tinies["sd1"].folder)
    got = loaded.state_dict()
    for key, expected in folder.text_encoder.state_dict().items():
        assert (got[key] - expected).abs().max() <= expected.abs().max() / 16, key


# --- a VAE beside -------------------------------------------------------------------------------------------


@pytest.fixture
def other_vae(tinies: dict[str, Tiny]) -> AutoencoderKL:
    """A VAE of tiny SD 1.x with other weights."""
    vae = load(tinies["sd1"].folder).pipeline.vae
    with torch.no_grad():
        vae.decoder.conv_out.bias += 0.25
        vae.decoder.mid_block.attentions[0].to_q.weight *= 1.5
    return vae


def in_old_words(tensors: Tensors) -> Tensors:
    """A VAE as diffusers named its attention until 0.16."""
    words = {"to_q": "query", "to_k": "key", "to_v": "value"}
    found = {}
    for name, tensor in tensors.items():
        new = ".".join(words.get(word, word) for word in name.split("."))
        found[new.replace(".to_out.0.", ".proj_attn.")] = tensor
    return found


VAES: dict[str, Callable[[AutoencoderKL], Tensors]] = {
    "original": lambda vae: original_layout.under({"": original_layout.vae(vae)}),
    "original, from a checkpoint": lambda vae: original_layout.under(
        {"first_stage_model.": original_layout.vae(vae)}
    ),
    "original, from training": lambda vae: (
        original_layout.under({"": original_layout.vae(vae)})
        | {"loss.logvar": torch.zeros(1), "model_ema.decay": torch.zeros(1)}
    ),
    "diffusers": lambda vae: original_layout.under({"": vae.state_dict()}),
    "diffusers until 0.16": lambda vae: original_layout.under({"": in_old_words(vae.state_dict())}),
}


@pytest.mark.parametrize("layout", VAES)
def test_a_vae_beside_the_checkpoint_is_taken(
    tinies: dict[str, Tiny], tmp_path: Path, other_vae: AutoencoderKL, layout: str
) -> None:
    path = tinies["sd1"].write(tmp_path / "cat.v2.safetensors")
    without = load(path)
    save_file(VAES[layout](other_vae), tmp_path / "cat.v2.vae.safetensors")
    loaded = load(path)
    got = loaded.pipeline.vae.state_dict()
    assert all(torch.equal(got[key], value) for key, value in other_vae.state_dict().items())
    assert note(loaded, "VAE") == (
        "cat.v2.vae.safetensors",
        "it lies beside the checkpoint, as A1111 takes it",
    )
    # Its pictures are others, so its revision is another.
    assert loaded.served.revision != without.served.revision
    assert not np.allclose(picture(loaded.pipeline), picture(without.pipeline))


def test_a_checkpoint_without_a_vae(
    tinies: dict[str, Tiny], tmp_path: Path, other_vae: AutoencoderKL
) -> None:
    tensors = {
        name: each for name, each in tinies["sd1"].tensors.items() if not name.startswith("first_stage")
    }
    path = tinies["sd1"].write(tmp_path / "cat.safetensors", tensors)
    refuse(path, r"cat\.safetensors has no VAE: put one beside it as cat\.vae\.safetensors, or use a version")
    (tmp_path / "cat.vae.pt").touch()
    refuse(path, r"as cat\.vae\.safetensors, convert cat\.vae\.pt to it")
    save_file(VAES["original"](other_vae), tmp_path / "CAT.VAE.SAFETENSORS")
    assert note(load(path), "VAE")[0] == "CAT.VAE.SAFETENSORS"


def test_a_pickled_vae_beside_is_left_out_and_that_is_said(tinies: dict[str, Tiny], tmp_path: Path) -> None:
    path = tinies["sd1"].write(tmp_path / "cat.safetensors")
    (tmp_path / "cat.vae.pt").write_bytes(b"cos\nsystem\n")
    choice, reason = note(load(path), "VAE")
    assert choice == "the file's own"
    assert reason.startswith("cat.vae.pt beside it is pickled and left out")
    assert load(path).served.revision == headers.digest({"": path})


def test_a_vae_beside_that_does_not_fit(tinies: dict[str, Tiny], tmp_path: Path) -> None:
    path, beside = tinies["sd1"].write(tmp_path / "cat.safetensors"), tmp_path / "cat.vae.safetensors"
    save_file({"lora_unet_x.alpha": torch.zeros(1)}, beside)
    refuse(path, r"cat\.vae\.safetensors lies beside the checkpoint as its VAE, but has none: remove it")
    vae = load(tinies["sd2"].folder).pipeline.vae
    save_file(VAES["original"](vae), beside)
    refuse(path, r"The vae of .*cat\.vae\.safetensors is not that of Stable Diffusion 1\.x")


# --- the user's configs -------------------------------------------------------------------------------------


def test_the_users_configs_win(tinies: dict[str, Tiny], tmp_path: Path) -> None:
    tiny = tinies["sd1"]
    path = tiny.write(tmp_path / "cat.safetensors", tiny.tensors | {"v_pred": torch.empty(0)})
    own = Path(shutil.copytree(tiny.folder, tmp_path / "configs"))
    loaded = load(path, model_config_dir=str(own))
    assert loaded.pipeline.scheduler.config.prediction_type == "epsilon"
    assert note(loaded, "prediction") == (
        "epsilon",
        "SMALLCAT_MODEL_CONFIG_DIR says so, although the file has the key v_pred",
    )
    # Its name is no part of the revision; its bytes and its configs are.
    renamed = Path(shutil.copy(path, tmp_path / "other.safetensors"))
    assert find(renamed, model_config_dir=str(own)).revision == loaded.served.revision
    config = own / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace('"epsilon"', '"v_prediction"'))
    changed = load(path, model_config_dir=str(own))
    assert changed.pipeline.scheduler.config.prediction_type == "v_prediction"
    assert changed.served.revision != loaded.served.revision


def test_the_users_configs_of_another_family_or_size(tinies: dict[str, Tiny], tmp_path: Path) -> None:
    path = tinies["sd1"].write(tmp_path / "cat.safetensors")
    refuse(path, r"has no model_index\.json", model_config_dir=str(tmp_path))
    refuse(
        path,
        "is for a StableDiffusionPipeline, but .* of a StableDiffusionXL.*: set it to a folder that fits",
        model_config_dir=str(tinies["sdxl"].folder),
    )
    refuse(
        path,
        r"The \w+ of .* is not what SMALLCAT_MODEL_CONFIG_DIR describes \(.*\): use another version",
        model_config_dir=str(tinies["sd2"].folder),
    )


# --- what is wrong with a file ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lacks", "sentence"),
    [
        (
            "model.diffusion_model.middle_block.0.in_layers.0.weight",
            r"The unet of .* \([\d,]+ weights are too few\)",
        ),
        ("first_stage_model.decoder.mid.attn_1.q.weight", r"The vae of .* \([\d,]+ weights are too few\)"),
        (
            "cond_stage_model.transformer.text_model.final_layer_norm.bias",
            r"The text_encoder of .* \(it lacks final_layer_norm\.bias",
        ),
    ],
)
def test_a_file_that_lacks_a_tensor(
    tinies: dict[str, Tiny], tmp_path: Path, lacks: str, sentence: str
) -> None:
    tensors = {name: each for name, each in tinies["sd1"].tensors.items() if name != lacks}
    assert len(tensors) == len(tinies["sd1"].tensors) - 1
    refuse(tinies["sd1"].write(tmp_path / "cat.safetensors", tensors), sentence)


def test_a_unet_with_more_than_its_family_has(tinies: dict[str, Tiny], tmp_path: Path) -> None:
    """diffusers leaves what it does not know out, without a word."""
    more = {"model.diffusion_model.middle_block.3.proj.weight": torch.zeros(4, 4)}
    path = tinies["sd1"].write(tmp_path / "cat.safetensors", tinies["sd1"].tensors | more)
    refuse(path, r"The unet of .* is not that of Stable Diffusion 1\.x \(16 weights too many\)")


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.touch()
    refuse(text, r"use a hub id, a folder or a \.safetensors file")


# --- revisions ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_a_plain_file_keeps_the_revision_of_earlier_versions(
    tinies: dict[str, Tiny], tmp_path: Path, family: str
) -> None:
    """0.1.0 read such files as now, with configs from the hub; finished pictures answer jobs still."""
    path = tinies[family].write(tmp_path / "cat.safetensors")
    assert find(path).revision == headers.digest({"": path})


def test_a_file_that_earlier_versions_read_otherwise_has_another_revision(
    tinies: dict[str, Tiny], tmp_path: Path
) -> None:
    for family, marks in (("sdxl", ("v_pred",)), ("sdxl", ("v_pred", "ztsnr")), ("sd1", ("v_pred",))):
        tensors = tinies[family].tensors | {mark: torch.empty(0) for mark in marks}
        path = tinies[family].write(tmp_path / f"{family}-{'-'.join(marks)}.safetensors", tensors)
        assert find(path).revision != headers.digest({"": path})


def test_tiny_single_file_still_fits(tmp_path: Path) -> None:
    path, configs = tiny_models.tiny_single_file(tmp_path)
    assert load(path, model_config_dir=str(configs)).served.name == "tiny"
    assert load_file(path)
