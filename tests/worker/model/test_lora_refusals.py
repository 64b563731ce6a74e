"""What is wrong with a file among LoRAs is one sentence; what it fits is known by its header."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save, save_file

from worker.contract.errors import InvalidJobError, RenderError
from worker.model import headers
from worker.model.beside import lora_files, lora_header
from worker.model.beside.lora_names import UNET as UNET_PART
from worker.model.beside.lora_names import Targets
from worker.model.beside.lora_scales import METADATA

#: A model with a linear module and two convolutions; and two text encoders.
UNET = {
    "conv_in": (8, 4, 3, 3),
    "down_blocks.0.attentions.0.proj_in": (8, 8, 1, 1),
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k": (8, 16),
    "down_blocks.0.resnets.0.conv1": (8, 8, 3, 3),
}
TARGETS = Targets(
    UNET, ({"text_model.encoder.layers.0.mlp.fc1": (12, 8)}, {"encoder.layers.0.mlp.fc1": (12, 8)})
)
TO_K = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"


def pair(
    module: str = TO_K, rank: int = 2, into: int = 16, out: int = 8, **more: Any
) -> dict[str, torch.Tensor]:
    found = {
        f"{module}.lora_down.weight": torch.ones(rank, into),
        f"{module}.lora_up.weight": torch.ones(out, rank),
    }
    return found | {f"{module}.{name}": torch.as_tensor(value) for name, value in more.items()}


def problem(path: Path, tensors: dict[str, torch.Tensor], **metadata: str) -> str:
    save_file(tensors, path, metadata or None)
    fits, found = lora_files.describe(path)
    assert not (fits and found)
    assert "\n" not in found
    return found


@pytest.mark.parametrize(
    ("name", "part"),
    [
        # --- other ways to change a model
        (f"{TO_K}.hada_w1_a", "it is a LoHa, which is not offered (it has lora_unet_down"),
        (f"{TO_K}.lokr_w1", "it is a LoKr"),
        (f"{TO_K}.oft_blocks", "it is an OFT or BOFT"),
        (f"{TO_K}.on_input", "it is an IA3"),
        (f"{TO_K}.a1.weight", "it is a GLoRA"),
        (f"{TO_K}.diff", "full differences of weights, biases or norms"),
        (f"{TO_K}.diff_b", "full differences of weights, biases or norms"),
        (f"{TO_K}.w_norm", "full differences of weights, biases or norms"),
        (f"{TO_K}.scalar", "LyCORIS' scalars"),
        ("bundle_emb.cat.clip_l", "an embedding in it, which would be left out"),
        ("unet.down_blocks.0.attentions.0.proj_in.lora_B.bias", "biases (lora_bias)"),
        ("text_encoder.embeddings.token_embedding.lora_embedding_A", "the words of a text encoder"),
        # --- for other models
        ("lora_unet_double_blocks_0_img_attn_proj.lora_down.weight", "it is for FLUX"),
        ("transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight", "it is for FLUX"),
        ("lora_unet_joint_blocks_0_context_block_attn_proj.lora_down.weight", "it is for SD 3"),
        ("transformer.transformer_blocks.0.attn.add_q_proj.lora_A.weight", "it is for a transformer"),
        ("diffusion_model.blocks.0.cross_attn.k.lora_A.weight", "it is for a transformer"),
        ("lora_prior_unet_down_blocks_0_1.lora_down.weight", "it is for Stable Cascade"),
        ("down_blocks.0.motion_modules.0.proj_in.lora_down.weight", "it is for AnimateDiff"),
        # --- no LoRA
        ("model.diffusion_model.input_blocks.0.0.weight", "it is a checkpoint and no LoRA"),
        ("emb_params", "it is a textual inversion and no LoRA"),
        ("lora_controlnet", "it is a ControlNet"),
        ("image_proj.latents", "it is an IP-Adapter"),
        # --- not known
        (
            f"{TO_K}.lora_down.bias",
            "it has lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.",
        ),
        ("x", "it has x, which is not read here"),
    ],
)
def test_what_is_not_read_is_refused_by_name_beside_what_is(tmp_path: Path, name: str, part: str) -> None:
    found = problem(tmp_path / "x.safetensors", pair() | {name: torch.ones(1)})
    assert part in found


@pytest.mark.parametrize(
    ("tensors", "part"),
    [
        ({}, "it has no tensors"),
        (
            pair(rank=257),
            "its rank at down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k is 257, the limit",
        ),
        (pair() | {f"{TO_K}.lora_up.weight": torch.ones(8, 3)}, "which do not fit each other"),
        (pair() | {f"{TO_K}.lora_up.weight": torch.ones(8, 2, 3, 3)}, "which do not fit each other"),
        (pair() | {f"{TO_K}.lora_mid.weight": torch.ones(2, 3, 3, 3)}, "which do not fit each other"),
        (pair() | {f"{TO_K}.lora_down.weight": torch.ones(0, 16)}, "it has no numbers at"),
        (pair() | {f"{TO_K}.lora_down.weight": torch.ones(2, 16, dtype=torch.int8)}, "is stored as I8"),
        (pair(alpha=[1.0, 2.0]), "has 2 numbers, one is needed"),
        ({f"{TO_K}.alpha": torch.ones(())}, "the first factor of"),
        ({f"{TO_K}.lora_down.weight": torch.ones(2, 16)}, "the second factor of"),
        (pair() | {f"{TO_K}.lora_A.weight": torch.ones(2, 16)}, "which are for the same module"),
    ],
)
def test_factors_that_do_not_fit_each_other(tmp_path: Path, tensors: Any, part: str) -> None:
    assert part in problem(tmp_path / "x.safetensors", tensors)


@pytest.mark.parametrize(
    ("config", "part"),
    [
        ({"unet.peft_type": "LOHA"}, "it is PEFT's LOHA"),
        ({"unet.bias": "all"}, "PEFT's setting bias is all"),
        ({"unet.use_qalora": True}, "PEFT's setting use_qalora is on"),
        ({"unet.use_dora": True}, "has no magnitude"),
        ({"unet.init_lora_weights": "pissa"}, "trained from pissa, which changes the model's own weights"),
        ({"unet.lora_alpha": "x"}, "its alpha is 'x', a number of at most 1,000,000 is needed"),
        (
            {"unet.alpha_pattern": {"(a+)+$": 1}},
            'alpha_pattern has "(a+)+$", and only names of modules are read',
        ),
        ({"unet.alpha_pattern": [1]}, "is no table of names"),
    ],
)
def test_pefts_settings_that_are_not_read(tmp_path: Path, config: Any, part: str) -> None:
    found = problem(tmp_path / "x.safetensors", pair(), lora_adapter_metadata=json.dumps(config))
    assert part in found


def test_metadata_that_is_no_json(tmp_path: Path) -> None:
    assert "is no JSON object" in problem(tmp_path / "x.safetensors", pair(), lora_adapter_metadata="[")


def test_a_file_that_is_broken_or_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, data = tmp_path / "x.safetensors", save(pair())
    for broken, part in (
        (data[:-1], "download it again"),
        (b"", "is truncated or not a safetensors file"),
        (b"PK\x03\x04" + bytes(40), "is a pickle with the name of a .safetensors file"),
        (struct.pack("<Q", 2) + b"[]", "is not a safetensors file"),
    ):
        path.write_bytes(broken)
        assert part in lora_files.describe(path)[1]
        with pytest.raises(InvalidJobError, match='The LoRA "x" cannot be used'):
            lora_files.load(path, "x", lora_files.sha256_of(path), TARGETS)
    path.write_bytes(data)
    with monkeypatch.context() as less:
        less.setattr(headers, "MAX_HEADER", 20)
        assert "the limit of the format is 20" in lora_files.describe(path)[1]
    monkeypatch.setattr(lora_header, "MAX_BYTES", 20)
    assert "the limit is 20" in lora_files.describe(path)[1]
    with pytest.raises(InvalidJobError, match="the limit is 20"):
        lora_files.load(path, "x", "", TARGETS)


def test_a_file_that_is_replaced_or_gone(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(RenderError, match='The LoRA "x" cannot be read'):
        lora_files.load(path, "x", "", TARGETS)
    save_file(pair(), path)
    sha256 = lora_files.sha256_of(path)
    save_file(pair(alpha=1.0), path)
    with pytest.raises(RenderError, match='The LoRA "x" was replaced while a job asked for it'):
        lora_files.load(path, "x", sha256, TARGETS)


@pytest.mark.parametrize("what", ["file", "config"])
def test_a_file_that_is_replaced_while_it_is_read_gives_nothing_of_the_other_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Its metadata say by what its factors are multiplied."""
    path = tmp_path / "adapter_model.safetensors"
    config = path.with_name("adapter_config.json")

    def write(alpha: float) -> None:
        settings = {f"{UNET_PART}.lora_alpha": alpha}
        metadata = {METADATA: json.dumps(settings)} if what == "file" else None
        save_file(pair(), path, metadata)
        if what == "config":
            config.write_text(json.dumps({"peft_type": "LORA", "lora_alpha": alpha}))

    write(2.0)
    sha256, read = lora_files.sha256_of(path), lora_header.read

    def replaced_first(*given: Any) -> Any:
        write(8.0)
        return read(*given)

    monkeypatch.setattr(lora_header, "read", replaced_first)
    (factors,) = lora_files.load(path, "x", sha256, TARGETS).unet.values()
    assert factors.scale == 1.0


@pytest.mark.parametrize(
    ("header", "problem"),
    [
        ('{"a":{"dtype":"F32","shape":[Infinity],"data_offsets":[0,0]}}', "is not a safetensors file"),
        ('{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,1e999]}}', "is not a safetensors file"),
        ('{"__metadata__":{"lora_adapter_metadata":5}}', "is not a safetensors file"),
        (
            (
                f'{{"{TO_K}.lora_down.weight":{{"dtype":"F32","shape":[1,16],"data_offsets":[0,0]}},'
                f'"{TO_K}.lora_up.weight":{{"dtype":"F32","shape":[8,1],"data_offsets":[0,0]}},'
                f'"{TO_K}.alpha":{{"dtype":"C64","shape":[],"data_offsets":[0,0]}}}}'
            ),
            "is stored as C64: use a LoRA in fp32, fp16 or bf16",
        ),
    ],
)
def test_a_header_of_what_no_tool_writes_is_a_sentence(tmp_path: Path, header: str, problem: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header.encode())
    assert problem in lora_files.describe(path)[1]


def refused(path: Path, tensors: dict[str, torch.Tensor], targets: Targets = TARGETS) -> str:
    save_file(tensors, path)
    with pytest.raises(InvalidJobError, match='The LoRA "x" cannot be used') as found:
        lora_files.load(path, "x", lora_files.sha256_of(path), targets)
    return str(found.value)


FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2]


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        *((dtype, value) for dtype in FLOATS for value in ("nan", "inf", "-inf")),
        (torch.float8_e4m3fn, "nan"),  # It has no infinity.
    ],
)
def test_numbers_that_are_none(tmp_path: Path, dtype: torch.dtype, value: str) -> None:
    path, largest = tmp_path / "x.safetensors", torch.finfo(dtype).max
    ends = torch.tensor([[largest, -largest] * 8] * 2, dtype=torch.float64).to(dtype)
    good = pair(alpha=1.0) | {f"{TO_K}.lora_down.weight": ends}
    save_file(good, path)
    lora_files.load(path, "x", lora_files.sha256_of(path), TARGETS)
    bad = torch.tensor([0.0] * 15 + [float(value)]).to(dtype).reshape(8, 2)
    assert "it holds NaN or infinity, in lora_unet" in refused(path, good | {f"{TO_K}.lora_up.weight": bad})


def test_an_alpha_that_is_none(tmp_path: Path) -> None:
    assert "NaN or infinity" in refused(tmp_path / "x.safetensors", pair(alpha=float("nan")))


@pytest.mark.parametrize("alpha", [torch.tensor(1e300, dtype=torch.float64), -2e6, 1 << 40])
def test_an_alpha_is_a_number_of_at_most_a_million_wherever_it_stands(tmp_path: Path, alpha: Any) -> None:
    assert "a number of at most 1,000,000 is needed: save the LoRA again" in refused(
        tmp_path / "x.safetensors", pair(alpha=alpha)
    )


def test_a_model_without_room_for_it(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    assert "have the shapes (9, 2) and (2, 16), the weight has (8, 16)" in refused(path, pair(out=9))
    assert "it changes mid_block_x, which this model has not" in refused(path, pair("lora_unet_mid_block_x"))
    xl = pair(into=2048)
    assert "it is for SDXL, this model is a UNet that takes text 16 wide: use one that fits" in refused(
        path, xl
    )
    twice = pair("unet.down_blocks.0.attentions.0.proj_in", into=8) | pair(
        "lora_unet_input_blocks_1_1_proj_in", into=8
    )
    assert "it has down_blocks.0.attentions.0.proj_in twice, in two spellings" in refused(path, twice)
    magnitude = pair(dora_scale=torch.ones(1, 8))
    assert "dora_scale has the shape (1, 8), the weight has (8, 16)" in refused(path, magnitude)
    kernel = {
        "lora_unet_conv_in.lora_down.weight": torch.ones(2, 4, 1, 1),
        "lora_unet_conv_in.lora_up.weight": torch.ones(8, 2, 1, 1),
    }
    assert "have the shapes (8, 2, 1, 1) and (2, 4, 1, 1), the weight has (8, 4, 3, 3)" in refused(
        path, kernel
    )
    first = {
        "lora_unet_conv_in.lora_down.weight": torch.ones(2, 4, 3, 3),
        "lora_unet_conv_in.lora_up.weight": torch.ones(8, 2, 1, 1),
    }
    inpainting = Targets(UNET | {"conv_in": (8, 9, 3, 3)}, TARGETS.text_encoders)
    assert "it changes conv_in, where it takes 4 channels and this model 9 (a model made" in refused(
        path, first, inpainting
    )
    save_file(pair(), path)
    lora_files.load(path, "x", lora_files.sha256_of(path), inpainting)
    # One text encoder or the other: where both would do, nothing is guessed.
    text = pair("base_model.model.text_model.encoder.layers.0.mlp.fc1", into=8, out=12, alpha=1.0)
    assert "it does not say which text encoder it is for" in refused(path, text)
    first = Targets(UNET, (*TARGETS.text_encoders[:1], {"encoder.layers.0.mlp.fc1": (12, 9)}))
    save_file(text, path)
    file = lora_files.load(path, "x", lora_files.sha256_of(path), first)
    assert list(file.text_encoders[0]) == ["text_model.encoder.layers.0.mlp.fc1"]
    assert "which this model has not" in refused(
        path, pair("lora_te2_x"), Targets(UNET, TARGETS.text_encoders[:1])
    )


def test_convolutions_of_one_pixel_are_linear_modules_too(tmp_path: Path) -> None:
    """Tools store one as the other: SD 2.x' and SDXL's projections are linear, SD 1.x' are convolutions."""
    linear = pair("lora_unet_down_blocks_0_attentions_0_proj_in", into=8)
    pixel = {
        f"{TO_K}.lora_down.weight": torch.ones(2, 16, 1, 1),
        f"{TO_K}.lora_up.weight": torch.ones(8, 2, 1, 1),
    }
    path = tmp_path / "x.safetensors"
    save_file(linear | pixel, path)
    file = lora_files.load(path, "x", lora_files.sha256_of(path), TARGETS)
    shapes = {
        name.rpartition(".")[2]: (tuple(each.down.shape), tuple(each.up.shape))
        for name, each in file.unet.items()
    }
    assert shapes == {"proj_in": ((2, 8, 1, 1), (8, 2)), "to_k": ((2, 16), (8, 2))}
    assert file.bytes == 4 * (2 * 8 + 8 * 2 + 2 * 16 + 8 * 2)


@pytest.mark.parametrize(
    ("tensors", "metadata", "fits"),
    [
        (pair(into=768), {}, "SD 1.x"),
        (pair(into=1024), {}, "SD 2.x"),
        (pair("lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_v", into=2048), {}, "SDXL"),
        (
            pair("unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.processor.to_k", into=768),
            {},
            "SD 1.x",
        ),
        (pair(into=1280), {}, "SDXL's refiner"),
        (pair(into=24), {}, "a UNet that takes text 24 wide"),
        (pair("lora_te_text_model_encoder_layers_0_mlp_fc1", into=768), {}, "SD 1.x"),
        (pair("lora_te_text_model_encoder_layers_0_mlp_fc1", into=1024), {}, "SD 2.x"),
        (pair("lora_te1_text_model_encoder_layers_0_mlp_fc1", into=768), {}, "SDXL"),
        (pair("text_encoder_2.text_model.encoder.layers.0.mlp.fc1", into=1280), {}, "SDXL"),
        (pair("unet.mid_block.attentions.0.transformer_blocks.9.attn1.to_q", into=1280), {}, "SDXL"),
        (pair("lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"), {}, ""),
        (pair("lora_unet_mid_block_x"), {"ss_base_model_version": "sdxl_base_v1-0"}, "SDXL"),
        (pair("lora_unet_mid_block_x"), {"ss_base_model_version": "sd_1.5"}, "SD 1.x"),
        (
            pair("lora_unet_mid_block_x"),
            {"modelspec.architecture": "stable-diffusion-v2-768-v/lora"},
            "SD 2.x",
        ),
    ],
)
def test_what_a_file_fits(tmp_path: Path, tensors: Any, metadata: dict[str, str], fits: str) -> None:
    save_file(tensors, tmp_path / "x.safetensors", metadata or None)
    assert lora_files.describe(tmp_path / "x.safetensors") == (fits, "")


def test_the_text_says_what_a_file_fits_before_the_depth_does(tmp_path: Path) -> None:
    """A small model may have as many blocks as SDXL."""
    deep = "unet.mid_block.attentions.0.transformer_blocks.9."
    assert (
        problem(tmp_path / "x.safetensors", pair(f"{deep}attn1.to_q") | pair(f"{deep}attn2.to_k", into=24))
        == ""
    )
    assert lora_files.describe(tmp_path / "x.safetensors")[0] == "a UNet that takes text 24 wide"


@pytest.mark.parametrize(
    ("width", "fits"),
    [
        (768, "SD 1.x"),
        (1024, "SD 2.x"),
        (2048, "SDXL"),
        (1280, "SDXL's refiner"),
        (64, "a UNet that takes text 64 wide"),
        ((768, 768), "SD 1.x"),
        ([768, 1024], ""),
        (None, ""),
    ],
)
def test_what_a_model_is_by_its_unets_config(width: object, fits: str) -> None:
    assert lora_header.architecture_of(width) == fits
