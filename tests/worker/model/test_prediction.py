"""What a checkpoint predicts, by the marks that tools leave, and the scheduler that follows from it."""

from __future__ import annotations

from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import save_file

from tests.worker.model import shipped
from tests.worker.model.shipped import Tensors, Tiny, load, note
from worker.model import headers, prediction, single_file
from worker.model.checkpoint import SD1, SD2, SDXL, Family

TELLTALE = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
#: The `parameterization` of Stable Diffusion's v2-inference-v.yaml, and of EasyFluff's, as A1111 reads it.
V_YAML = """
model:
  target: ldm.models.diffusion.ddpm.LatentDiffusion
  params:
    parameterization: "v"
    linear_start: 0.00085
"""
#: Part of a config of sgm, in which SDXL was trained.
SGM_YAML = """
      scaling_config:
        target: sgm.modules.diffusionmodules.denoiser_scaling.VScaling
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def tinies(root: Path) -> dict[str, Tiny]:
    return {family: shipped.make(family, root) for family in shipped.FAMILIES}


def found(path: Path, tensors: Tensors, family: Family = SD1, **metadata: str) -> prediction.Prediction:
    save_file(tensors, path, metadata=metadata)
    return prediction.find(path, headers.read_header(path), family)


def marks(*names: str) -> Tensors:
    """As NoobAI, ComfyUI and A1111's instructions write them: tensors of nothing."""
    return {name: torch.empty(0) for name in names} | {"x": torch.zeros(1)}


@pytest.mark.parametrize("family", [SD1, SD2, SDXL])
def test_the_key_v_pred_decides(tmp_path: Path, family: Family) -> None:
    path = tmp_path / "cat.safetensors"
    says = {"modelspec.prediction_type": "epsilon"}
    one = found(path, marks("v_pred"), family, **says)
    assert (one.kind, one.zero_snr, one.reason) == ("v_prediction", False, "the file has the key v_pred")
    both = found(path, marks("v_pred", "ztsnr"), family)
    assert str(both) == "v_prediction, zero terminal SNR"


def test_zero_snr_counts_with_v_alone(tmp_path: Path) -> None:
    """As in ComfyUI. A picture without signal does not determine its noise: DDIM would divide by zero."""
    one = found(tmp_path / "cat.safetensors", marks("ztsnr"))
    assert str(one) == "epsilon"
    assert one.reason.endswith("its zero terminal SNR counts with v_prediction alone")
    (tmp_path / "cat.yaml").write_text(V_YAML)
    assert found(tmp_path / "cat.safetensors", marks("ztsnr")).zero_snr


@pytest.mark.parametrize(
    ("text", "name", "kind"),
    [
        (V_YAML, "cat.yaml", "v_prediction"),
        (V_YAML.replace('"v"', "v"), "cat.yml", "v_prediction"),
        (SGM_YAML, "cat.yaml", "v_prediction"),
        (SGM_YAML.replace("VScaling", "EpsScaling"), "cat.yaml", "epsilon"),
        (V_YAML.replace('"v"', "'eps'"), "cat.yaml", "epsilon"),
        ("model: {}", "cat.yaml", "epsilon"),
        (V_YAML, "dog.yaml", "epsilon"),
    ],
)
def test_a_config_of_the_original_code_beside_the_file(
    tmp_path: Path, text: str, name: str, kind: str
) -> None:
    """A1111's convention."""
    (tmp_path / name).write_text(text)
    assert found(tmp_path / "cat.safetensors", marks()).kind == kind


@pytest.mark.parametrize(
    ("metadata", "kind"),
    [
        ({"modelspec.prediction_type": "v"}, "v_prediction"),  # kohya's sd-scripts
        ({"modelspec.predict_key": "v"}, "v_prediction"),  # ComfyUI's CheckpointSave
        ({"modelspec.predict_key": "epsilon"}, "epsilon"),
        ({"modelspec.prediction_type": ""}, "epsilon"),
    ],
)
def test_metadata_of_the_modelspec_standard(tmp_path: Path, metadata: dict[str, str], kind: str) -> None:
    assert found(tmp_path / "cat.safetensors", marks(), **metadata).kind == kind


@pytest.mark.parametrize(("deviation", "kind"), [(0.05, "epsilon"), (0.12, "v_prediction")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_two_kinds_of_2x_by_a_weight(
    tmp_path: Path, deviation: float, kind: str, dtype: torch.dtype
) -> None:
    """ComfyUI 0.3's rule: the standard deviation of one bias is above 0.09 in the kind that predicts v."""
    bias = torch.linspace(-1, 1, 320)
    tensors = {TELLTALE: (bias / bias.std(correction=0) * deviation).to(dtype)}
    assert found(tmp_path / "cat.safetensors", tensors, SD2).kind == kind
    assert found(tmp_path / "cat.safetensors", tensors, SD1).kind == "epsilon"


def test_a_noise_schedule_in_the_file_that_ends_at_zero(tmp_path: Path) -> None:
    path, plain = (
        tmp_path / "cat.safetensors",
        diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
    )
    zero = diffusers.DDIMScheduler.from_config(plain.config, rescale_betas_zero_snr=True)
    assert not found(path, marks("v_pred") | {"alphas_cumprod": plain.alphas_cumprod}).zero_snr
    assert not found(path, marks("v_pred") | {"alphas_cumprod": plain.alphas_cumprod.half()}).zero_snr
    assert found(path, marks("v_pred") | {"alphas_cumprod": zero.alphas_cumprod}).zero_snr


# --- what follows -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "keys", "kind", "config"),
    [
        ("sd1", (), "PNDMScheduler", {"prediction_type": "epsilon"}),
        ("sd1", ("v_pred",), "PNDMScheduler", {"prediction_type": "v_prediction"}),
        (
            "sd1",
            ("v_pred", "ztsnr"),
            "DDIMScheduler",
            {
                "prediction_type": "v_prediction",
                "rescale_betas_zero_snr": True,
                "timestep_spacing": "trailing",
            },
        ),
        ("sd2", (), "DDIMScheduler", {"prediction_type": "v_prediction"}),
        (
            "sdxl",
            ("v_pred",),
            "EulerDiscreteScheduler",
            {
                "prediction_type": "v_prediction",
                "rescale_betas_zero_snr": False,
                "timestep_spacing": "leading",
            },
        ),
        (
            "sdxl",
            ("v_pred", "ztsnr"),
            "EulerDiscreteScheduler",
            {
                "prediction_type": "v_prediction",
                "rescale_betas_zero_snr": True,
                "timestep_spacing": "trailing",
            },
        ),
    ],
)
def test_the_scheduler(
    tinies: dict[str, Tiny],
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    keys: tuple[str, ...],
    kind: str,
    config: dict[str, object],
) -> None:
    monkeypatch.setattr(single_file, "CONFIGS", root / "configs")
    tiny = tinies[family]
    loaded = load(tiny.write(tmp_path / "cat.safetensors", tiny.tensors | marks(*keys)))
    scheduler = loaded.pipeline.scheduler
    assert type(scheduler).__name__ == kind
    assert {name: scheduler.config[name] for name in config} == config
    if "ztsnr" in keys:  # The first step is the last of the schedule, where no signal is left.
        scheduler.set_timesteps(4)
        assert scheduler.timesteps[0] == 999
        assert scheduler.alphas_cumprod[-1] < 1e-6
    choice, _ = note(loaded, "prediction")
    assert choice.startswith(str(config["prediction_type"]))


def test_2x_that_predicts_noise_is_the_model_of_512_pixels(
    tinies: dict[str, Tiny], root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(single_file, "CONFIGS", root / "configs")
    path = tmp_path / "cat.safetensors"
    tinies["sd2"].write(path, None, **{"modelspec.prediction_type": "epsilon"})
    loaded = load(path)
    assert type(loaded.pipeline.scheduler) is diffusers.PNDMScheduler
    assert loaded.pipeline.scheduler.config.prediction_type == "epsilon"
    # 64 latents a side; the tiny VAE makes 4 pixels of one, the real one 8.
    assert loaded.pipeline.unet.config.sample_size == 64
    assert loaded.served.revision != headers.digest({"": path})
