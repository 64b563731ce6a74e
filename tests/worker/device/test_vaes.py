"""Named VAEs: pictures are those of diffusers' pipeline with that VAE (0.42.1), in one batch with others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import save_file

from tests import original_layout, tiny_models
from tests.worker.device.beside_diffusers import BesideDiffusers, assert_drawn
from worker.contract import infotext
from worker.contract.errors import InvalidJobError, RenderError
from worker.contract.file_index import Kind
from worker.contract.job import Job
from worker.contract.job_files import with_files
from worker.contract.settings import WorkerSettings
from worker.device.model_runner import ModelRunner
from worker.model.beside import vae_files
from worker.model.beside.file_store import FileStore


def a_vae(seed: int, **more: Any) -> diffusers.AutoencoderKL:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return tiny_models.vae(**{"channels": 4, "levels": 4, **more}).eval()


class Model(BesideDiffusers):
    """A tiny model behind a runner that offers four VAEs, and diffusers' pipeline beside it."""

    def __init__(self, path: Path, folder: Path) -> None:
        self.vaes: dict[str, Any] = {
            "folder": a_vae(11, scaling_factor=0.3),
            "ldm": a_vae(12),
            "flat": a_vae(13),
            "taesd": tiny_models.tiny_vae(),
        }
        self.vaes["taesd"].save_pretrained(folder / "taesd")
        self.vaes["folder"].save_pretrained(folder / "folder")
        save_file(original_layout.vae(self.vaes["ldm"]), folder / "ldm.safetensors")
        save_file(self.vaes["flat"].state_dict(), folder / "flat.safetensors")
        super().__init__(path, FileStore({Kind.VAE: [str(folder)]}, folder))
        self.own = self.pipeline.vae
        for name in ("ldm", "flat"):
            # A single file has no config: the model's own counts.
            self.vaes[name].register_to_config(scaling_factor=self.own.config.scaling_factor)

    def job(self, vae: str, **fields: Any) -> Job:
        return self.job_of(**{"prompt": "a small cat", "vae": vae, **fields})

    def expected(self, job: Job) -> Any:
        """With the VAE that the job names."""
        self.pipeline.vae = self.vaes.get(job.vae, self.own)
        return super().expected(job)


@pytest.fixture(scope="module")
def sd1(tmp_path_factory: pytest.TempPathFactory) -> Model:
    place = tmp_path_factory.mktemp("models")
    return Model(tiny_models.tiny_sd1(place / "sd1"), tmp_path_factory.mktemp("vaes"))


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Model:
    place = tmp_path_factory.mktemp("models")
    return Model(tiny_models.tiny_sdxl(place / "sdxl"), tmp_path_factory.mktemp("vaes"))


@pytest.mark.parametrize("model", ["sd1", "sdxl"])
def test_pictures_are_diffusers_own_with_that_vae_in_one_batch(
    model: str, request: pytest.FixtureRequest
) -> None:
    tiny: Model = request.getfixturevalue(model)
    names = ("folder", "", "ldm", "flat", "folder", "", "taesd")
    jobs = [tiny.job(name, seed=number % 2) for number, name in enumerate(names)]
    pictures = tiny.together(jobs)
    for job, picture in zip(jobs, pictures, strict=True):
        assert_drawn(picture, tiny.expected(job), job)
    assert len({picture.pixels.tobytes() for picture in pictures}) == len(set(names))


def test_a_vae_is_loaded_once_and_in_prepare(sd1: Model) -> None:
    first, second, own = (sd1.runner.prepare(sd1.job(name)) for name in ("ldm", "ldm", ""))
    assert first.decoder is not None
    assert first.decoder is second.decoder
    assert own.decoder is None


def test_a_vae_is_part_of_the_job_by_content_and_the_index_says_what_it_is(sd1: Model) -> None:
    entries = {entry.name: entry for entry in sd1.files.index.files}
    assert {name: entry.architecture for name, entry in entries.items()} == dict.fromkeys(
        ("folder", "ldm", "flat", "taesd"), "4 latent channels"
    )
    job = sd1.job("ldm")
    assert job.file_hashes == {"vae:ldm": entries["ldm"].sha256}
    assert job.id != sd1.job("").id
    assert sd1.job("").version == 1
    assert sd1.job("ldm.safetensors") == job
    assert sd1.job("Automatic") == sd1.job("")
    text = infotext.write(job)
    assert "VAE: ldm, " in text
    assert f"VAE hash: {entries['ldm'].sha256[:10]}" in text
    assert infotext.read(text).id == job.id
    with pytest.raises(InvalidJobError, match='vae is "lmd", which no worker offers: did you mean ldm'):
        sd1.job("lmd")


def test_the_config_of_a_vae_is_part_of_its_content(sd1: Model, tmp_path: Path) -> None:
    a_vae(11).save_pretrained(tmp_path / "x")
    files = FileStore({Kind.VAE: [str(tmp_path)]}, tmp_path)
    before = files.index.files[0].sha256
    config = json.loads((tmp_path / "x" / "config.json").read_text())
    (tmp_path / "x" / "config.json").write_text(json.dumps(config | {"scaling_factor": 0.9}))
    files.look()
    assert files.index.files[0].sha256 != before


def test_a_place_may_be_a_file_or_a_folder_of_diffusers(tmp_path: Path) -> None:
    a_vae(1).save_pretrained(tmp_path / "mine")
    save_file(original_layout.vae(a_vae(2)), tmp_path / "single.safetensors")
    files = FileStore({Kind.VAE: [str(tmp_path / "mine"), str(tmp_path / "single.safetensors")]}, tmp_path)
    assert [entry.name for entry in files.index.files] == ["mine", "single"]


# --- what cannot be done ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("vae", "part"),
    [
        (lambda: a_vae(1, channels=8), "has 8 latent channels, this model needs 4"),
        (lambda: a_vae(1, levels=3), "has 3 levels, this model needs 4"),
        (lambda: tiny_models.tiny_vae(channels=16), "has 16 latent channels, this model needs 4"),
        (lambda: tiny_models.tiny_vae(levels=3), "has 3 levels, this model needs 4"),
        (lambda: tiny_models.tiny_vae(shift_factor=0.1), "has latents that are shifted by 0.1"),
    ],
)
def test_a_vae_that_does_not_fit_fails_its_own_job(sd1: Model, tmp_path: Path, vae: Any, part: str) -> None:
    vae().save_pretrained(tmp_path / "x")
    files = FileStore({Kind.VAE: [str(tmp_path)]}, tmp_path)
    runner = ModelRunner(WorkerSettings(model=str(sd1.pipeline.config._name_or_path)), files=files)
    job = with_files(Job(prompt="a", seed=1, vae="x").resolved(runner.served), files.index)
    with pytest.raises(InvalidJobError, match=part):
        runner.prepare(job)
    runner.prepare(Job(prompt="a", seed=1))


def test_weights_that_do_not_fit_the_config_or_are_too_few_fail_the_job(sd1: Model, tmp_path: Path) -> None:
    weights = original_layout.vae(a_vae(1))
    last = next(name for name in weights if name.endswith("decoder.conv_out.weight"))
    few = {name: tensor for name, tensor in weights.items() if name != last}
    save_file(few, tmp_path / "few.safetensors")
    save_file(weights | {last: torch.zeros(3, 9, 3, 3)}, tmp_path / "odd.safetensors")
    files = FileStore({Kind.VAE: [str(tmp_path)]}, tmp_path)
    runner = ModelRunner(WorkerSettings(model=str(sd1.pipeline.config._name_or_path)), files=files)
    for name, part in (("few", 'VAE "few"'), ("odd", 'The VAE "odd" does not fit its config')):
        job = with_files(Job(prompt="a", seed=1, vae=name).resolved(runner.served), files.index)
        with pytest.raises(InvalidJobError, match=part):
            runner.prepare(job)


def test_what_is_no_vae_is_told_in_the_index(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    (tmp_path / "old.pt").write_bytes(b"PK")
    a_vae(1).save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    files = FileStore({Kind.VAE: [str(tmp_path)]}, tmp_path)
    problems = {entry.name: entry.problem for entry in files.index.files}
    assert problems["x"] == "it has no VAE that is read here"
    assert "pickled" in problems["old"]
    assert problems["other"] == "it is a UNet2DModel, an AutoencoderKL or an AutoencoderTiny is needed"


def test_a_vae_that_was_replaced_is_not_used_for_a_job_that_asked_for_the_old_one(
    sd1: Model, tmp_path: Path
) -> None:
    save_file(original_layout.vae(a_vae(1)), tmp_path / "x.safetensors")
    files = FileStore({Kind.VAE: [str(tmp_path)]}, tmp_path)
    runner = ModelRunner(WorkerSettings(model=str(sd1.pipeline.config._name_or_path)), files=files)
    job = with_files(Job(prompt="a", seed=1, vae="x").resolved(runner.served), files.index)
    save_file(original_layout.vae(a_vae(2)), tmp_path / "x.safetensors")
    with pytest.raises(RenderError, match="was replaced while a job asked for it"):
        runner.prepare(job)


def test_a_vae_that_is_replaced_while_it_is_read_gives_nothing_of_the_other_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.safetensors"
    first, other = (original_layout.vae(a_vae(seed)) for seed in (1, 2))
    save_file(first, path)
    sha256, read = vae_files.sha256_of(path), vae_files.read_header

    def replaced_first(*given: Any) -> Any:
        save_file(other, path)
        return read(*given)

    monkeypatch.setattr(vae_files, "read_header", replaced_first)
    loaded = vae_files.load(path, "x", sha256, a_vae(1).config)
    assert torch.equal(loaded.decoder.conv_in.weight, a_vae(1).decoder.conv_in.weight)
