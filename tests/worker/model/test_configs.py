"""The configs and the vocabulary that come with smallcat: those of the real models, in full size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.loaders.single_file_utils import infer_diffusers_model_type
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
from transformers.convert_slow_tokenizer import bytes_to_unicode

from tests import original_layout
from worker.contract.settings import WorkerSettings
from worker.model import checkpoint, loader, single_file, single_file_loader
from worker.model import files as model_files
from worker.model.headers import read_header

CONFIGS = single_file.CONFIGS
#: What diffusers calls each family, by marks in its single file.
TYPES = {"sd1": "v1", "sd2": "v2", "sdxl": "xl_base"}
#: The same of a checkpoint made for inpainting.
INPAINTING_TYPES = {"sd1": "inpainting", "sd2": "inpainting_v2", "sdxl": "xl_inpaint"}
#: How many weights the real ones have: those of stable-diffusion-v1-5, stable-diffusion-2-1 and
#: stable-diffusion-xl-base-1.0 in the format of diffusers.
WEIGHTS = {
    "sd1": {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480},
    "sd2": {"unet": 865_910_724, "vae": 83_653_863, "text_encoder": 340_387_840},
    "sdxl": {
        "unet": 2_567_463_684,
        "vae": 83_653_863,
        "text_encoder": 123_060_480,
        "text_encoder_2": 694_659_840,
    },
}


class FullSize:
    """A family's components on torch's meta device, which has shapes and no numbers."""

    def __init__(self, family: str, *, inpainting: bool = False) -> None:
        def config(kind: Any, name: str, **changed: int) -> Any:
            return kind.from_config(kind.load_config(str(CONFIGS / family / name)) | changed)

        def text(kind: Any, name: str) -> Any:
            return kind(CLIPTextConfig.from_pretrained(CONFIGS / family / name))

        with torch.device("meta"):
            channels = {"in_channels": 9} if inpainting else {}
            self.unet = config(diffusers.UNet2DConditionModel, "unet", **channels)
            self.vae = config(diffusers.AutoencoderKL, "vae")
            self.text_encoder = text(CLIPTextModel, "text_encoder")
            self.text_encoder_2 = (
                text(CLIPTextModelWithProjection, "text_encoder_2") if family == "sdxl" else None
            )

    def components(self) -> dict[str, torch.nn.Module]:
        return {name: module for name, module in vars(self).items() if module is not None}


def write(family: str, folder: Path, *, inpainting: bool = False) -> Path:
    """A checkpoint of the family with the names and shapes of the real one; all its weights are zero."""
    tensors = original_layout.checkpoint(FullSize(family, inpainting=inpainting))
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return original_layout.write_header(folder / f"{family}.safetensors", shapes)


@pytest.mark.parametrize("family", WEIGHTS)
def test_configs_describe_the_real_models(family: str) -> None:
    found = {
        name: sum(weight.numel() for weight in module.parameters())
        for name, module in FullSize(family).components().items()
    }
    assert found == WEIGHTS[family]


@pytest.mark.parametrize("family", WEIGHTS)
def test_a_full_size_checkpoint_is_known_by_its_header(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(single_file, "digesting", lambda files: lambda: "0" * 16)
    path = write(family, tmp_path)
    single = model_files.find(WorkerSettings(model=str(path)), half=False).single
    assert single is not None
    assert single.checkpoint.family.configs == family
    for name, needed in WEIGHTS[family].items():
        extra = single.checkpoint.parts[name].values - needed
        # 2.x has a layer and a projection that nobody uses.
        unused = 12 * 1024**2 + 13 * 1024 + 1024**2 if (family, name) == ("sd2", "text_encoder") else 0
        assert extra == unused, name
    # The names are those by which diffusers knows the family, too.
    assert infer_diffusers_model_type(original_layout.checkpoint(FullSize(family))) == TYPES[family]


@pytest.mark.services
@pytest.mark.parametrize("family", WEIGHTS)
def test_a_full_size_checkpoint_made_for_inpainting_is_known_by_its_header(
    family: str, tmp_path: Path
) -> None:
    path = write(family, tmp_path, inpainting=True)
    found = checkpoint.identify(read_header(path).tensors, "a file")
    assert (found.family.configs, found.inpainting_channels) == (family, 9)
    tensors = original_layout.checkpoint(FullSize(family, inpainting=True))
    assert infer_diffusers_model_type(tensors) == INPAINTING_TYPES[family]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("family", WEIGHTS)
def test_a_full_size_checkpoint_made_for_inpainting_loads(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(single_file, "digesting", lambda files: lambda: "0" * 16)
    path = write(family, tmp_path, inpainting=True)
    loaded = loader.load(WorkerSettings(model=str(path), dtype="fp16"))
    assert loaded.served.inpainting
    first = loaded.pipeline.unet.conv_in.weight
    assert first.shape == (320, 9, 3, 3)
    needed = WEIGHTS[family]["unet"] + first.numel() // 9 * 5
    assert sum(weight.numel() for weight in loaded.pipeline.unet.parameters()) == needed


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("family", WEIGHTS)
def test_a_full_size_checkpoint_loads(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(single_file, "digesting", lambda files: lambda: "0" * 16)
    loaded = loader.load(WorkerSettings(model=str(write(family, tmp_path)), dtype="fp16"))
    sides = {"sd1": 512, "sd2": 512, "sdxl": 1024}  # A 2.x of zeros looks like the one of 512 pixels.
    assert (loaded.served.defaults.width, loaded.served.defaults.height) == (sides[family], sides[family])
    for name, needed in WEIGHTS[family].items():
        assert sum(weight.numel() for weight in loaded.pipeline.components[name].parameters()) == needed
    ids = loaded.pipeline.tokenizer("a photo of a cat", padding="max_length").input_ids
    assert ids[:7] == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert set(ids[7:]) == {0 if family == "sd2" else 49407}


def test_the_vocabulary_is_clips() -> None:
    """CLIP's rule: the bytes, the bytes that end a word, the merges in their order, and the two marks."""
    lines = (CONFIGS / "clip" / "merges.txt").read_text("utf-8").split("\n")
    assert lines[0].startswith("#version")
    merges = [line for line in lines[1:] if line]
    vocabulary = json.loads((CONFIGS / "clip" / "vocab.json").read_text("utf-8"))
    characters = list(bytes_to_unicode().values())
    expected = [*characters, *(f"{each}</w>" for each in characters)]
    expected += ["".join(merge.split()) for merge in merges]
    expected += ["<|startoftext|>", "<|endoftext|>"]
    assert len(merges) == 48_894
    assert vocabulary == {name: index for index, name in enumerate(expected)}
    assert len(vocabulary) == 49_408


@pytest.mark.parametrize(
    ("text", "ids"),
    # As `SimpleTokenizer` of open_clip_torch 3.3.0 encodes them.
    [
        ("a photo of a cat", [320, 1125, 539, 320, 2368]),
        (
            "masterpiece, best quality, 1girl, (blue hair:1.2)",
            [12066, 267, 949, 3027, 267, 272, 1611, 267, 263, 1746, 2225, 281, 272, 269, 273, 264],
        ),
        (
            "Ein Mädchen mit 3 Katzen's Ähre",
            [24524, 76, 10896, 67, 8983, 4551, 274, 2844, 3928, 568, 10896, 71, 810],
        ),
        ("猫が座っている", [163, 234, 104, 4813, 234, 161, 118, 100, 4813, 96, 48029, 33523, 3909, 489]),
        ("🚀 rocket!!!", [13542, 8383, 995]),
        ("don't, we've; it'll", [847, 713, 267, 649, 1200, 282, 585, 1342]),
        ("  spaced\tout\nwords ", [10336, 538, 620, 2709]),
    ],
)
def test_prompts_have_the_ids_of_open_clip(text: str, ids: list[int]) -> None:
    for family, pads in (("sd1", [49407]), ("sd2", [0]), ("sdxl", [49407, 0])):
        tokenizers = single_file_loader.tokenizers(CONFIGS / family, 77)
        assert [tokenizer.pad_token_id for tokenizer in tokenizers.values()] == pads
        for tokenizer in tokenizers.values():
            assert len(tokenizer(text, padding="max_length").input_ids) == 77
            # Where "!" fills up, transformers takes each "!" of a prompt for it, in diffusers' folders too.
            if tokenizer.pad_token_id or "!" not in text:
                assert tokenizer(text).input_ids == [49406, *ids, 49407]


def test_each_family_has_its_configs() -> None:
    families = [checkpoint.SD1, checkpoint.SD2, checkpoint.SDXL]
    assert {path.name for path in CONFIGS.iterdir() if path.is_dir()} == {
        "clip",
        *(each.configs for each in families),
    }
