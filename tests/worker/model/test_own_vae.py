"""`SMALLCAT_MODEL_VAE`: a VAE in place of the model's own, named in the model's revision."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests import tiny_models
from tests.worker.device.beside_diffusers import BesideDiffusers, assert_drawn
from worker.contract import infotext
from worker.contract.errors import SettingsError
from worker.contract.file_index import Kind
from worker.contract.job import Job
from worker.contract.queues import queue_of
from worker.contract.settings import WorkerSettings
from worker.device.model_runner import ModelRunner
from worker.model import __main__ as download
from worker.model import own_vae
from worker.model.beside.file_store import FileStore


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and with a tiny VAE, `sd1` and `taesd`."""
    folder = tmp_path_factory.mktemp("models")
    tiny_models.tiny_sd1(folder / "sd1")
    tiny_models.tiny_vae().save_pretrained(folder / "taesd")
    return folder


class WithTiny(BesideDiffusers):
    """A runner with `SMALLCAT_MODEL_VAE`, and diffusers' pipeline with that VAE."""

    def __init__(self, place: Path) -> None:
        vae = tiny_models.vae(channels=4, levels=4).eval()
        save_file(vae.state_dict(), place / "named.safetensors")
        super().__init__(place / "sd1", FileStore({Kind.VAE: [str(place / "named.safetensors")]}, place))
        self.own = self.pipeline.vae
        vae.register_to_config(scaling_factor=self.own.config.scaling_factor)
        self.vaes: dict[str, Any] = {
            "": diffusers.AutoencoderTiny.from_pretrained(place / "taesd"),
            "named": vae,
        }
        settings = WorkerSettings(model=str(place / "sd1"), model_vae=str(place / "taesd"))
        self.without, self.runner = self.runner, ModelRunner(settings, files=self.files)

    def expected(self, job: Job) -> Any:
        """With the VAE that the job names, else the tiny one."""
        self.pipeline.vae = self.vaes[job.vae]
        return super().expected(job)


@pytest.fixture(scope="module")
def tiny(place: Path) -> WithTiny:
    return WithTiny(place)


def test_pictures_are_diffusers_own_with_it_beside_a_job_that_names_another_one(tiny: WithTiny) -> None:
    jobs = [
        tiny.job_of(prompt="a small cat", vae=vae, seed=seed)
        for vae, seed in (("", 1), ("named", 1), ("", 2))
    ]
    for job, picture in zip(jobs, tiny.together(jobs), strict=True):
        assert_drawn(picture, tiny.expected(job), job)


def test_the_revision_names_it_and_so_do_the_queue_the_id_and_the_infotext(tiny: WithTiny) -> None:
    revision = tiny.runner.served.revision
    assert re.fullmatch(rf"{tiny.without.served.revision}-taesd-[0-9a-f]{{10}}", revision)
    job = tiny.job_of(prompt="a")
    own = Job(prompt="a", seed=7, steps=3).resolved(tiny.without.served)
    assert job.id != own.id
    assert queue_of(job) != queue_of(own)
    text = infotext.write(job)
    assert f"Model hash: {revision}" in text
    assert infotext.read(text).id == job.id
    assert [str(each.choice) for each in tiny.runner.choices if each.what == "VAE"] == [
        "taesd (AutoencoderTiny)"
    ]


def test_other_weights_are_another_revision(place: Path, tmp_path: Path) -> None:
    tiny_models.tiny_vae(seed=6).save_pretrained(tmp_path / "taesd")
    pipeline = diffusers.DiffusionPipeline.from_pretrained(place / "sd1")
    assert own_vae.put(pipeline, str(tmp_path / "taesd"))[0] != own_vae.put(pipeline, str(place / "taesd"))[0]


def test_a_preview_is_what_it_was(tiny: WithTiny) -> None:
    previews = []
    for runner in (tiny.runner, tiny.without):
        runner.step([state := runner.prepare(Job(prompt="a", seed=1, steps=2))])
        previews.append(runner.preview(state))
    with_it, without = previews
    assert with_it is not None
    assert without is not None
    assert np.array_equal(with_it, without)


def test_what_cannot_be_put_stops_the_start_with_one_sentence(place: Path, tmp_path: Path) -> None:
    pipeline = diffusers.DiffusionPipeline.from_pretrained(place / "sd1")
    own = pipeline.vae
    tiny_models.tiny_vae(channels=16).save_pretrained(tmp_path / "taef1")
    (tmp_path / "empty").mkdir()
    decoder = {
        "1.weight": torch.zeros(8, 4, 3, 3),
        "1.bias": torch.zeros(8),
        "3.conv.0.weight": torch.zeros(8),
    }
    save_file(decoder, tmp_path / "taesd_decoder.safetensors")
    (tmp_path / "pickled.pt").write_bytes(b"PK")
    # A file without a config is read with the model's own, which has fewer layers.
    more = diffusers.AutoencoderKL.from_config(
        {**own.config, "layers_per_block": own.config.layers_per_block + 1}
    )
    save_file(more.state_dict(), tmp_path / "more.safetensors")
    for name, edit in (
        ("zero", lambda text: re.sub(r'"scaling_factor": [^,\n]+', '"scaling_factor": 0', text)),
        ("text", lambda text: re.sub(r'"scaling_factor": [^,\n]+', '"scaling_factor": "x"', text)),
        ("latin-1", lambda text: text.replace("{", '{"author": "\xe9",', 1)),
    ):
        shutil.copytree(place / "taesd", tmp_path / name)
        config = tmp_path / name / "config.json"
        text = config.read_text()
        config.write_bytes(edit(text).encode("latin-1"))
        assert config.read_bytes() != text.encode()
    for given, part in (
        (tmp_path / "more.safetensors", "its file has (en|de)coder.*, for which its config has no place"),
        (tmp_path / "zero", "its scaling_factor is 0; it must be above 0 and at most 1,000"),
        (tmp_path / "text", "its scaling_factor is x; it must be above 0"),
        (tmp_path / "latin-1", "its config.json is no UTF-8"),
        (Path("~nobody-of-this-name/vae"), "which does not exist: use a hub id"),
        (tmp_path / "taef1", "has 16 latent channels, this model needs 4: use another one."),
        (tmp_path / "empty", "a folder without diffusion_pytorch_model.safetensors and with no .safeten"),
        (
            tmp_path / "taesd_decoder.safetensors",
            "the encoder or the decoder of a tiny VAE .* alone: use its fol",
        ),
        (tmp_path / "pickled.pt", "cannot be used"),
        (tmp_path / "nowhere", "which does not exist: use a hub id"),
        (place / "sd1", r"which is a whole model: set it to .*vae\.$"),
    ):
        with pytest.raises(SettingsError, match=part) as refused:
            own_vae.put(pipeline, str(given))
        assert str(refused.value).startswith(f"SMALLCAT_MODEL_VAE is {given}")
        assert "\n" not in str(refused.value)
    assert pipeline.vae is own


def test_it_is_downloaded_ahead_with_the_model(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SMALLCAT_MODEL", str(place / "sd1"))
    monkeypatch.setenv("SMALLCAT_MODEL_VAE", str(place / "taesd"))
    assert download.main() == 0
    assert f"taesd is in {place / 'taesd'}" in capsys.readouterr().out
    monkeypatch.setenv("SMALLCAT_MODEL_VAE", str(place / "nowhere"))
    assert download.main() == 1
    assert "which does not exist: use a hub id" in capsys.readouterr().err
