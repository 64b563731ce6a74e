"""What `SMALLCAT_MODEL` can be, what is refused with which sentence, and what a revision covers."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import huggingface_hub
import pytest
import torch
from huggingface_hub import errors as hub_errors
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests import tiny_models
from worker.contract.errors import SettingsError
from worker.contract.settings import WorkerSettings
from worker.model import files as model_files
from worker.model import headers, loader, placement

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.tiny_sd1(tmp_path_factory.mktemp("models") / "sd1", safety_checker="nothing")


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A model of the test's own to break."""
    return Path(shutil.copytree(original, tmp_path / "tiny-model"))


def load(model: Path | str, **settings: Any) -> loader.Loaded:
    return loader.load(WorkerSettings(model=str(model), **settings))


def find(model: Path | str, *, half: bool = False, **settings: Any) -> model_files.ModelFiles:
    return model_files.find(WorkerSettings(model=str(model), **settings), half=half)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refuse(model: Path | str, sentence: str, **settings: Any) -> None:
    with pytest.raises(SettingsError, match=sentence) as caught:
        load(model, **settings)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(".")


# --- a folder -----------------------------------------------------------------------------------------------


def test_a_folder(folder: Path) -> None:
    loaded = load(folder)
    assert loaded.served.name == "tiny-model"
    assert len(loaded.served.revision) == 16
    assert isinstance(loaded.pipeline, diffusers.StableDiffusionPipeline)
    assert loaded.pipeline.safety_checker is not None
    assert (loaded.device, loaded.dtype) == (CPU, torch.float32)
    assert not loaded.pipeline.unet.training
    assert not any(weight.requires_grad for weight in loaded.pipeline.unet.parameters())


def test_the_name_can_be_set_and_may_not_be_default(folder: Path) -> None:
    assert load(folder, model_name="cats").served.name == "cats"
    reserved = folder.rename(folder.with_name("default"))
    refuse(reserved, "set SMALLCAT_MODEL_NAME")


def test_defaults_come_from_the_settings_then_the_model(folder: Path) -> None:
    assert load(folder).served.defaults.steps == 30
    tiny_models.set_defaults(folder, steps=8, guidance_scale=2.5)
    assert load(folder).served.defaults.model_dump() == {
        "width": 64,
        "height": 64,
        "steps": 8,
        "guidance_scale": 2.5,
    }
    assert load(folder, default_steps=5).served.defaults.steps == 5
    assert load(folder, default_guidance_scale=0.0).served.defaults.guidance_scale == 0.0
    # They are not part of the revision: a job names its own steps and guidance.
    revision = load(folder).served.revision
    tiny_models.set_defaults(folder, steps=9)
    assert load(folder).served.revision == revision


@pytest.mark.parametrize("text", ["[]", "{", '{"steps": 0}', '{"step": 5}'])
def test_defaults_that_are_not_valid(folder: Path, text: str) -> None:
    (folder / "smallcat.json").write_text(text)
    with pytest.raises(SettingsError, match=r"smallcat\.json must be like"):
        load(folder)


@pytest.mark.parametrize(
    "changed", ["unet/config.json", "tokenizer/tokenizer.json", "vae/config.json", "model_index.json"]
)
def test_a_changed_file_is_another_revision(folder: Path, changed: str) -> None:
    before = find(folder).revision
    assert find(folder).revision == before
    (folder / "README.md").write_text("hello")
    (folder / "unet" / "notes.md").write_text("hello")
    assert find(folder).revision == before
    edit(folder / changed, something=1)
    assert find(folder).revision != before


def test_changed_weights_are_another_revision(folder: Path) -> None:
    before = find(folder).revision
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["conv_in.bias"] += 1e-3
    save_file(weights, path)
    assert find(folder).revision != before


def test_a_copy_elsewhere_is_the_same_revision(folder: Path, original: Path) -> None:
    assert find(folder).revision == find(original).revision


# --- weights ------------------------------------------------------------------------------------------------


def halve(folder: Path, component: str) -> None:
    for path in list((folder / component).glob("*.safetensors")):
        weights = {name: tensor.half() for name, tensor in load_file(path).items()}
        save_file(weights, path.with_suffix(".fp16.safetensors"), metadata={"format": "pt"})


def test_fp16_files_are_loaded_for_fp16_if_all_components_have_them(folder: Path) -> None:
    for component in ("unet", "vae", "text_encoder"):
        halve(folder, component)
    assert find(folder, half=True).variant is None
    halve(folder, "safety_checker")
    assert find(folder, half=True).variant == "fp16"
    assert find(folder, half=False).variant is None
    for path in folder.rglob("*.safetensors"):
        if ".fp16" not in path.name:
            path.unlink()
    assert find(folder, half=False).variant == "fp16"
    # An fp32 worker can load fp16 files.
    assert load(folder).pipeline.unet.dtype == torch.float32


def pickled(path: Path) -> None:
    path.unlink()
    path.with_name("pytorch_model.bin").write_bytes(pickle.dumps({}))


def zipped(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))


def test_pickled_weights_beside_safetensors_do_not_matter(folder: Path) -> None:
    revision = find(folder).revision
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"cos\nsystem\n")
    assert load(folder).served.revision == revision


@pytest.mark.parametrize(
    ("breaks", "sentence"),
    [
        (Path.unlink, "has no weights for its unet: download its files again"),
        (pickled, r"The unet of .* has no \.safetensors file: pickled weights can run any code"),
        (zipped, "is a pickle with the name of a .safetensors file: pickled weights can run any code"),
        (lambda path: path.write_bytes(pickle.dumps({})), "is a pickle with the name of a .safetensors file"),
        (lambda path: path.write_bytes(b""), "truncated or not a safetensors file"),
        (
            lambda path: path.write_bytes(path.read_bytes()[:-1]),
            r"has [\d,]+ of [\d,]+ bytes: download it again",
        ),
        (lambda path: path.write_bytes(path.read_bytes()[:100]), "truncated or not a safetensors file"),
        (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n" * 9), "git-lfs"),
        (lambda path: path.write_bytes(struct.pack("<Q", 4) + b"null"), "is not a safetensors file"),
        (lambda path: save_file({"x": torch.zeros(1)}, path), r"The unet of .* has 1 of [\d,]+ weights"),
    ],
)
def test_weights_that_cannot_be_used(folder: Path, breaks: Callable[[Path], Any], sentence: str) -> None:
    breaks(folder / "unet" / "diffusion_pytorch_model.safetensors")
    refuse(folder, sentence)


def test_weights_that_lack_a_tensor(folder: Path) -> None:
    path = folder / "text_encoder" / "model.safetensors"
    weights = load_file(path)
    del weights[next(name for name in weights if "mlp" in name)]
    save_file(weights, path, metadata={"format": "pt"})
    refuse(folder, r"The text_encoder of .* has [\d,]+ of [\d,]+ weights: download its files again")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_header_whose_length_looks_like_a_pickle(tmp_path: Path, protocol: int) -> None:
    """The length is little-endian: 640 bytes are 80 02 00 ..., which is how a pickle of protocol 2 starts."""
    path = tmp_path / "model.safetensors"
    text = json.dumps({"__metadata__": {"format": "pt"}}).ljust(128 + 256 * protocol).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    assert path.read_bytes().startswith(b"\x80%c" % protocol)
    assert headers.read_header(path).metadata == {"format": "pt"}


@given(st.binary(max_size=200))
def test_any_bytes_are_a_header_or_a_settings_error(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    path.write_bytes(data)
    with pytest.raises(SettingsError):
        headers.read_header(path)


def test_weights_that_are_quantised(folder: Path) -> None:
    """Their scales would be left out without a word."""
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    save_file(weights | {"conv_in.scale_weight": torch.ones(())}, path, metadata={"format": "pt"})
    refuse(folder, r"is quantised \(it has conv_in\.scale_weight, F32\).*: use a version in fp16")
    save_file(weights | {"conv_in.weight": torch.ones(4, dtype=torch.int8)}, path, metadata={"format": "pt"})
    refuse(folder, r"is quantised \(it has conv_in\.weight, I8\)")
    save_file(weights, path, metadata={"format": "pt"})
    edit(folder / "text_encoder" / "config.json", quantization_config={"quant_method": "bitsandbytes"})
    refuse(
        folder, r"The text_encoder of .* is quantised \(bitsandbytes\), which is not read: use the model in"
    )


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16])
def test_weights_in_any_float(folder: Path, original: Path, dtype: torch.dtype) -> None:
    for path in folder.rglob("*.safetensors"):
        weights = {
            name: tensor.to(dtype) if tensor.is_floating_point() else tensor
            for name, tensor in load_file(path).items()
        }
        save_file(weights, path, metadata={"format": "pt"})
    found, expected = (load(each).pipeline.unet.state_dict() for each in (folder, original))
    assert all(torch.equal(found[name], value.to(dtype).float()) for name, value in expected.items())


# --- what is not served -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"_class_name": "FluxPipeline"}, "is a FluxPipeline, which is not served: use a StableDiffusion"),
        ({"_class_name": "StableDiffusionUpscalePipeline"}, "is not served"),
        ({"_class_name": ["pipeline", "MyPipeline"]}, "is not served"),
        (
            {"unet": ["my_unet", "MyUNet"]},
            "The unet of .* comes from my_unet, which is custom code and is not run",
        ),
        ({"unet": [None, None]}, "has no unet"),
    ],
)
def test_pipelines_that_are_not_served(folder: Path, changes: dict[str, Any], sentence: str) -> None:
    edit(folder / "model_index.json", **changes)
    refuse(folder, sentence)


def test_an_index_that_is_missing_or_not_json(folder: Path) -> None:
    (folder / "model_index.json").write_text("{")
    refuse(folder, "is not a JSON object")
    (folder / "model_index.json").write_text("[1]")
    refuse(folder, "is not a JSON object")
    (folder / "model_index.json").unlink()
    refuse(folder, "has no model_index.json")


def test_a_folder_that_means_something_else(folder: Path, tmp_path: Path) -> None:
    refuse(folder / "unet", rf"unet is one component of a model: set SMALLCAT_MODEL to {folder}\.")
    models = tmp_path / "checkpoints"
    models.mkdir()
    (models / "cat.safetensors").touch()
    (models / "dog.SAFETENSORS").touch()
    refuse(models, rf"but single files: .* such as {models}/cat\.safetensors\.")


@pytest.mark.parametrize("component", ["scheduler", "tokenizer", "unet", "safety_checker"])
def test_a_component_that_is_missing(folder: Path, component: str) -> None:
    shutil.rmtree(folder / component)
    refuse(folder, f"(no|its) {component}: download its files again")


def test_a_tokenizer_without_a_vocabulary(folder: Path) -> None:
    (folder / "tokenizer" / "tokenizer.json").unlink()
    refuse(folder, "The tokenizer of .* has no vocabulary: download its files again")


def test_a_unet_that_takes_something_else_is_refused(folder: Path) -> None:
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["conv_in.weight"] = torch.zeros(16, 8, 3, 3)
    save_file(weights, path, metadata={"format": "pt"})
    edit(folder / "unet" / "config.json", in_channels=8)
    refuse(
        folder, "UNet of 8 input channels and a VAE of 4, and is not served: use a text-to-image or an inp"
    )


@pytest.mark.parametrize("builder", [tiny_models.tiny_sd1, tiny_models.tiny_sdxl])
def test_a_model_made_for_inpainting_says_so(builder: Callable[..., Path], tmp_path: Path) -> None:
    path = builder(tmp_path / "inpainting", inpainting=True)
    assert "Inpaint" in json.loads((path / "model_index.json").read_text())["_class_name"]
    loaded = load(path)
    assert loaded.served.inpainting
    assert any(each.what == "made for" and each.choice == "inpainting" for each in loaded.choices)
    # An index of inpainting with a UNet of 4 channels is a model for text to image.
    plain = builder(tmp_path / "plain")
    edit(
        plain / "model_index.json",
        _class_name=json.loads((path / "model_index.json").read_text())["_class_name"],
    )
    assert not load(plain).served.inpainting


@pytest.mark.parametrize(
    ("model", "settings", "sentence"),
    [
        ("/nowhere/at/all", {}, "SMALLCAT_MODEL is /nowhere/at/all, which does not exist"),
        ("./models", {}, "which does not exist"),
        ("sd 1.5", {}, "which does not exist"),
        ("model.ckpt", {}, "pickled weights can run any code"),
        ("/models/v1-5.PT", {}, "pickled weights can run any code"),
        ("owner/name", {"model_config_dir": "x"}, "unset SMALLCAT_MODEL_CONFIG_DIR"),
    ],
)
def test_values_that_name_no_model(model: str, settings: dict[str, str], sentence: str) -> None:
    refuse(model, sentence, **settings)


def test_a_revision_is_for_hub_ids(folder: Path) -> None:
    refuse(folder, "unset SMALLCAT_MODEL_REVISION", model_revision="main")


def test_the_bundled_model(monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path) -> None:
    monkeypatch.setattr(model_files, "__file__", str(tmp_path / "model" / "files.py"))
    refuse("", "No model is bundled with this installation: set SMALLCAT_MODEL")
    for place in (tmp_path / "demo" / "model", tmp_path / "demo"):
        shutil.rmtree(tmp_path / "demo", ignore_errors=True)
        shutil.copytree(folder, place)
        assert load("").served.name == "smallcat-demo"


# --- the hub ------------------------------------------------------------------------------------------------

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cached(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`owner/cats` in the hub's cache, as a download leaves it; the hub itself cannot be reached."""
    cache = tmp_path / "hub"
    snapshot = cache / "models--owner--cats" / "snapshots" / COMMIT
    shutil.copytree(folder, snapshot)
    refs = cache / "models--owner--cats" / "refs"
    refs.mkdir()
    (refs / "main").write_text(COMMIT)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    return snapshot


def test_a_hub_model_from_the_cache_is_its_commit(cached: Path) -> None:
    for revision in ("", "main", COMMIT):
        loaded = load("owner/cats", model_revision=revision)
        assert (loaded.served.name, loaded.served.revision) == ("owner/cats", COMMIT)
    assert load("owner/cats", safety_checker=False).served.revision == f"{COMMIT}-unchecked"


def test_a_hub_model_that_is_incomplete_in_the_cache(cached: Path) -> None:
    shutil.rmtree(cached / "vae")
    refuse("owner/cats", "The model owner/cats has no weights for its vae")


def test_a_hub_that_cannot_be_reached(cached: Path) -> None:
    refuse(
        "owner/dogs",
        "SMALLCAT_MODEL is owner/dogs, which is not a folder here, and the hub cannot be reached",
    )


def test_only_files_that_are_loaded_are_downloaded(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    online = [
        *(path.relative_to(cached).as_posix() for path in cached.rglob("*") if path.is_file()),
        *(f"{name}/diffusion_pytorch_model.fp16.safetensors" for name in ("unet", "vae")),
        *(f"{name}/model.fp16.safetensors" for name in ("text_encoder", "safety_checker")),
        "unet/diffusion_pytorch_model.bin",
        "unet/diffusion_pytorch_model.non_ema.safetensors",
        "v1-5-pruned.safetensors",
        "pipeline.py",
        "README.md",
    ]
    asked: list[set[str]] = []

    def fetch(repo: str, *, revision: str, allow_patterns: list[str]) -> str:
        assert (repo, revision) == ("owner/cats", COMMIT)
        asked.append(set(allow_patterns))
        return str(cached)

    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda repo, revision: online)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    find("owner/cats")
    find("owner/cats", half=True)
    find("owner/cats", safety_checker=False)
    plain, half, unchecked = asked
    assert "unet/diffusion_pytorch_model.safetensors" in plain - half
    assert "unet/diffusion_pytorch_model.fp16.safetensors" in half - plain
    assert plain - unchecked == {"safety_checker/config.json", "safety_checker/model.safetensors"}
    for fetched in asked:
        assert {"model_index.json", "smallcat.json", "tokenizer/tokenizer.json"} <= fetched
        assert not fetched & set(online[-5:])


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (hub_errors.RepositoryNotFoundError, "neither a folder here nor a public model on the hub"),
        (hub_errors.RevisionNotFoundError, "has no revision v9: correct SMALLCAT_MODEL_REVISION"),
        (hub_errors.GatedRepoError, "is gated: accept its licence on the hub and set HF_TOKEN"),
        (hub_errors.RemoteEntryNotFoundError, "cannot be downloaded as a diffusers pipeline"),
    ],
)
def test_each_error_of_the_hub_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception], sentence: str
) -> None:
    def fail(*args: object, **more: object) -> str:
        failure = error.__new__(error)
        failure.args = ("404 Client Error.\n\nEntry Not Found",)
        raise failure

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    refuse("owner/cats", sentence, model_revision="v9")


# --- choices ------------------------------------------------------------------------------------------------


def test_choosing_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert placement.choose_device("auto") == (CPU, "torch finds no CUDA GPU")
    assert placement.choose_device("cpu") == (CPU, "set by SMALLCAT_DEVICE")
    with pytest.raises(SettingsError, match=r"SMALLCAT_DEVICE is cuda, but torch .* finds no CUDA GPU"):
        placement.choose_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert placement.choose_device("auto") == (GPU, "torch finds a CUDA GPU")
    assert placement.choose_device("cuda") == (GPU, "set by SMALLCAT_DEVICE")


def test_taking_a_gpu_makes_it_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs, of which another worker has the first."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=f"GPU-{index}")
    )
    monkeypatch.setattr(placement.gpu_lock, "take", lambda count, uuid_of, share_of: (count - 1, uuid_of(1)))
    current: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert placement.take_gpu() == (torch.device("cuda", 1), "GPU-1")
    assert current == [1]


def test_choosing_the_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    assert placement.choose_dtype("auto", GPU)[0] == torch.float16
    assert placement.choose_dtype("auto", CPU)[0] == torch.float32
    assert placement.choose_dtype("bf16", CPU)[0] == torch.bfloat16
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    with pytest.raises(SettingsError, match="SMALLCAT_DTYPE is bf16, which this GPU does not support"):
        placement.choose_dtype("bf16", GPU)
