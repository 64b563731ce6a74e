"""LoRAs that are kept: which goes first, who shares, what happens where one fails or memory runs out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests import lora_files, tiny_models
from worker.contract.errors import InvalidJobError, OutOfMemoryError, RenderError
from worker.contract.file_index import Kind
from worker.contract.job import Job
from worker.contract.job_files import with_files
from worker.contract.settings import WorkerSettings
from worker.device.loras import cache, factors
from worker.device.loras.cache import Loras
from worker.device.model_runner import ModelRunner
from worker.model.beside.file_store import FileStore

CPU = torch.device("cpu")


class Ground:
    """A tiny model, and files a, b and c of equal size."""

    def __init__(self, folder: Path) -> None:
        self.model, self.folder = tiny_models.tiny_sd1(folder / "model"), folder / "loras"
        self.folder.mkdir()
        unet = diffusers.UNet2DConditionModel.from_pretrained(self.model / "unet")
        shapes = {
            name: shape for name, shape in lora_files.modules(unet).items() if ".transformer_blocks." in name
        }
        for seed, name in enumerate("abc"):
            changes = {"unet": lora_files.made_up(shapes, seed=seed)}
            save_file(lora_files.kohya(changes), self.folder / f"{name}.safetensors")
        wider = {name: (shape[0], shape[1] + 8) for name, shape in shapes.items()}
        save_file(lora_files.kohya({"unet": lora_files.made_up(wider)}), self.folder / "other.safetensors")
        self.files = FileStore({Kind.LORA: [str(self.folder)]}, folder / "cache")
        self.runner = self.a_runner()
        #: Bytes of one file.
        self.size = self.runner._loras._read(self.files.index.files[0].sha256, "a", self.adaptable).nbytes

    @property
    def adaptable(self) -> Any:
        return self.runner._family.adaptable()

    def a_runner(self, **settings: Any) -> ModelRunner:
        settings["loras"] = str(self.folder)
        return ModelRunner(WorkerSettings(model=str(self.model), **settings), files=self.files)

    def loras(self, memory: int) -> Loras:
        return Loras(self.files, self.runner._family, CPU, memory)

    def job(self, *names: str, seed: int = 0, weight: float = 0.5) -> Job:
        given = [{"name": name, "weight": weight} for name in names]
        job = Job(prompt="a small cat", seed=seed, steps=2, guidance_scale=3.0, loras=given)
        return with_files(job.resolved(self.runner.served), self.files.index)


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Ground:
    return Ground(tmp_path_factory.mktemp("loras"))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were read."""
    found: list[str] = []
    load = cache.lora_files.load

    def counted(path: Path, name: str, *rest: Any) -> Any:
        found.append(name)
        return load(path, name, *rest)

    monkeypatch.setattr(cache.lora_files, "load", counted)
    return found


def test_a_weight_that_changes_nothing_is_said(ground: Ground) -> None:
    """The files have no part for text encoders."""

    def said(**lora: Any) -> tuple[str, ...]:
        job = Job(prompt="a small cat", seed=0, steps=2, guidance_scale=3.0, loras=[{"name": "a", **lora}])
        whole = with_files(job.resolved(ground.runner.served), ground.files.index)
        return ground.runner.prepare(whole).warnings

    [sentence] = said(weight=1, text_encoder_weight=0.5)
    assert sentence == 'The LoRA "a" has no part for text encoders, so te=0.5 changes nothing: leave it out.'
    # What nobody asked for on its own needs no word; nor does a weight of 0, which changes nothing anywhere.
    assert said(weight=0.5) == said(weight=1, text_encoder_weight=0) == ()


def test_what_was_used_least_lately_goes_first_and_the_memory_is_kept(
    ground: Ground, reads: list[str]
) -> None:
    loras = ground.loras(2 * ground.size)
    for name in "abac":
        loras.of(ground.job(name))
        assert loras._on_device.nbytes <= loras.limit
    assert reads == ["a", "b", "c"]
    # The set of b goes with its file, of which it is made.
    loras.of(ground.job("a"))
    loras.of(ground.job("c"))
    assert reads == ["a", "b", "c"]
    loras.of(ground.job("b"))
    assert reads == ["a", "b", "c", "b"]


def test_nothing_is_kept_where_nothing_may_be(ground: Ground, reads: list[str]) -> None:
    loras = ground.loras(0)
    assert loras.of(ground.job("a")).unet is not None
    loras.of(ground.job("a"))
    assert reads == ["a", "a"]


def test_jobs_of_equal_loras_share_a_set(ground: Ground) -> None:
    loras = ground.loras(1 << 30)
    both = loras.of(ground.job("a", "b"))
    assert loras.of(ground.job("b", "a", seed=1)) is both
    assert loras.of(ground.job("a", "b", weight=0.4)) is not both


def test_out_of_memory_while_loading_lets_others_go_and_tries_again(
    ground: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    loras = ground.loras(1 << 30)
    loras.of(ground.job("a"))
    to, failed = factors.StoredFile.to, []

    def full_once(file: Any, device: torch.device) -> Any:
        if not failed:
            failed.append(True)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return to(file, device)

    monkeypatch.setattr(factors.StoredFile, "to", full_once)
    assert loras.of(ground.job("b")).unet is not None
    assert loras._on_device.nbytes == ground.size
    # One more than there was did not fit: from now on so much is kept.
    assert loras.limit == ground.size
    loras.of(ground.job("c"))
    assert loras._on_device.nbytes == ground.size


def test_out_of_memory_while_loading_that_lasts_is_one_of_memory_and_halves_what_is_kept(
    ground: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = ground.a_runner(lora_memory=3 * ground.size)
    mates = [runner.prepare(ground.job(name)) for name in "ab"]

    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(factors.StoredFile, "to", full)
        # The engine tries such a job again, alone.
        with pytest.raises(OutOfMemoryError):
            runner.prepare(ground.job("c"))
    assert runner._loras.limit == ground.size
    assert runner._loras._on_device.nbytes == 0
    # The jobs in flight still have what they had.
    assert runner.step(mates) == [None, None]
    assert runner.prepare(ground.job("c")).loras is not None


def test_out_of_memory_in_a_step_lowers_what_is_kept(ground: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = ground.a_runner()
    states = [runner.prepare(ground.job(name)) for name in "abc"]

    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(runner._family, "forward", full)
        with pytest.raises(OutOfMemoryError):
            runner.step(states)
    assert runner._loras.limit == 3 * ground.size // 2
    assert runner._loras._on_device.nbytes == ground.size
    # The jobs still have what they had, and fewer together go on.
    assert runner.step(states[:2]) == [None, None]


def test_a_file_that_does_not_fit_or_is_gone_fails_its_own_job(ground: Ground) -> None:
    runner = ground.a_runner()
    mate = runner.prepare(ground.job("a"))
    with pytest.raises(InvalidJobError, match=r'The LoRA "other" cannot be used: .*\.$') as caught:
        runner.prepare(ground.job("other"))
    assert str(caught.value).count(". ") == 0
    job = ground.job("c")
    path = ground.folder / "c.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-8])
    try:
        with pytest.raises((RenderError, InvalidJobError), match='The LoRA "c"'):
            runner.prepare(job)
    finally:
        path.write_bytes(content)
    assert runner.step([mate]) == [None]


def test_the_start_measures_what_loras_cost_where_some_are_offered(ground: Ground) -> None:
    runner = ground.a_runner(lora_memory=64 << 20, max_batch=4)
    chosen = {choice.what: choice for choice in runner.warm_up()}
    assert chosen["LoRA memory"].choice == "0.06 GiB"
    assert chosen["LoRAs"].choice.startswith("+")
    lane = runner.prepare(ground.job()).lane
    assert runner.step_s(lane, 4, lora_rows=4) >= runner.step_s(lane, 4)


def test_exact_mode_gives_the_same_bits_alone_and_beside_others(ground: Ground) -> None:
    runner = ground.a_runner(exact=True)

    def drawn(jobs: list[Job]) -> list[Any]:
        states = [runner.prepare(job) for job in jobs]
        while left := [state for state in states if state.step < state.steps]:
            assert runner.step(left) == [None] * len(left)
        return [picture.pixels for picture in runner.decode(states)]  # type: ignore[union-attr]

    job = ground.job("a", "b")
    (alone,) = drawn([job])
    together = drawn([ground.job(seed=3), job, ground.job("c", seed=4)])
    assert np.array_equal(together[1], alone)
