"""What was planned is done: text encoders elsewhere, tiles, a bound of rows. A CPU stands for the GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from tests import tiny_models
from worker.contract.job import Job
from worker.contract.settings import WorkerSettings
from worker.device import warm_up
from worker.device.loras.job_set import LayerFactors
from worker.device.loras.text import TextLoras
from worker.device.model_runner import ModelRunner
from worker.device.vae.decoder import IN_TILES, VaeDecoder
from worker.model import loader
from worker.model.memory_plan import UNPLANNED, Decoding, MemoryPlan, Texts
from worker.model.moved_weights import MovedWeights

IDS = torch.tensor([[1, 5, 7, 2]])


def encoder(kind: Any = CLIPTextModelWithProjection) -> Any:
    config = CLIPTextConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        max_position_embeddings=8, projection_dim=16, eos_token_id=2, bos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return kind(config).eval().requires_grad_(False)


class Watched(MovedWeights):
    """Copies to a "GPU" that is the CPU itself, and knows what is there."""

    def __init__(self, modules: list[Any]) -> None:
        self.fetched = 0
        super().__init__(modules, torch.device("cpu"))

    def _fetched(self, host: torch.Tensor) -> torch.Tensor:
        self.fetched += host.nbytes
        return host.clone()


def nbytes(module: torch.nn.Module) -> int:
    return sum(each.nbytes for each in (*module.parameters(), *module.buffers()))


@pytest.fixture
def layers_there(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Bytes of each layer that was on the GPU, in order."""
    found: list[int] = []
    whole = MovedWeights.release

    def release(self: MovedWeights) -> None:
        found.append(sum(there.nbytes for there, _ in self._there))
        whole(self)

    monkeypatch.setattr(MovedWeights, "release", release)
    return found


@pytest.mark.parametrize("kind", [CLIPTextModel, CLIPTextModelWithProjection])
def test_moved_layers_give_the_same_and_are_there_one_at_a_time(kind: Any, layers_there: list[int]) -> None:
    whole, moved = encoder(kind), encoder(kind)
    watched = Watched([moved])
    for _ in range(2):
        expected, found = whole(IDS, output_hidden_states=True), moved(IDS, output_hidden_states=True)
        assert all(map(torch.equal, found.hidden_states, expected.hidden_states))
        assert torch.equal(found[0], expected[0])
    layers = len(moved.get_submodule("encoder" if kind is CLIPTextModel else "text_model.encoder").layers)
    assert watched.fetched == 2 * nbytes(moved), "each layer comes once a text"
    assert len(layers_there) >= 2 * (layers + 1)
    assert max(layers_there) < nbytes(moved) / 2
    watched.release()
    assert all(tensor.data_ptr() == host.data_ptr() for tensor, host in watched._there)
    assert all(map(torch.equal, moved.parameters(), whole.parameters()))


def test_what_a_moved_module_is_given_is_brought_to_its_device() -> None:
    moved = MovedWeights([], torch.device("meta"))
    (given, other), named = moved._bring_inputs(encoder(), (IDS, 1), {"attention_mask": IDS, "flag": True})
    assert given.device.type == named["attention_mask"].device.type == "meta"
    assert (other, named["flag"]) == (1, True)


def test_memory_that_runs_out_in_a_move_leaves_the_weights_on_the_host() -> None:
    moved = encoder()
    watched = Watched([moved])
    expected = moved(IDS).text_embeds

    def fails(host: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    watched._fetched = fails  # type: ignore[method-assign]
    with pytest.raises(torch.OutOfMemoryError):
        moved(IDS)
    assert not watched._there
    del watched._fetched  # type: ignore[method-assign]
    assert torch.equal(moved(IDS).text_embeds, expected)


def test_loras_of_text_encoders_follow_them() -> None:
    whole, moved, host = encoder(), encoder(), encoder().to(torch.float64)
    Watched([moved])
    name = "text_model.encoder.layers.1.mlp.fc1"
    generator = torch.Generator().manual_seed(0)
    down, up = (torch.randn((2, size), generator=generator) for size in (16, 32))
    loras = TextLoras("key", [{name: LayerFactors(down, up, 0.5, after=torch.ones(32))}])
    found = []
    for each in (whole, moved, host):
        with loras.within([each]):
            found.append(each(IDS).text_embeds)
    assert not torch.equal(found[0], whole(IDS).text_embeds)
    assert torch.equal(found[1], found[0])
    assert torch.allclose(found[2].float(), found[0], atol=1e-5)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.tiny_sdxl(tmp_path_factory.mktemp("models") / "sdxl")


def runner_with(model: Path, plan: MemoryPlan = UNPLANNED) -> ModelRunner:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader, "planned", lambda *_, **__: (plan, ()))
        patch.setattr(torch, "set_num_threads", lambda count: None)
        return ModelRunner(WorkerSettings(model=str(model)))


@pytest.fixture(scope="module")
def plain(model: Path) -> ModelRunner:
    return runner_with(model)


def texts_of(runner: ModelRunner, **fields: Any) -> dict[str, torch.Tensor]:
    """The texts of a job's first step, by name."""
    job = Job(prompt="a (small:1.2) cat", negative_prompt="a dog", seed=1, guidance_scale=5, **fields)
    texts = runner.prepare(job).next_inputs().texts
    return {f"{name} of {row}": tensor for row, text in enumerate(texts) for name, tensor in text.items()}


@pytest.mark.parametrize("texts", [Texts.MOVED, Texts.HOST])
def test_texts_are_the_same_wherever_they_are_encoded(plain: ModelRunner, model: Path, texts: Texts) -> None:
    runner = runner_with(model, MemoryPlan(texts=texts))
    for fields in ({}, {"prompt_syntax": "a1111", "clip_skip": 2}):
        expected, found = texts_of(plain, **fields), texts_of(runner, **fields)
        assert len(found) == len(expected) == 4
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def latents_of(runner: ModelRunner, side: int) -> tuple[Any, torch.Tensor]:
    lane = runner._family.lane(side, side)
    return lane, torch.randn((1, *lane), generator=torch.Generator().manual_seed(side))


def test_what_was_planned_for_tiles_is_decoded_in_tiles_with_a_warning_and_the_rest_whole(
    plain: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoding = Decoding(64 * 64, tiled=True)
    tiled = VaeDecoder(plain._family, torch.device("cpu"), alone=False, compiler=None, decoding=decoding)
    whole_of: list[int] = []
    decode = plain._family.decode
    monkeypatch.setattr(plain._family, "decode", lambda z: (whole_of.append(z.shape[-1]), decode(z))[1])

    def pictures(of: VaeDecoder, side: int) -> list[Any]:
        """Two pictures, beside steps."""
        lane, latents = latents_of(plain, side)
        return list(of.pictures(lane, [latents] * 2))

    whole = plain._vae_decoder
    for one, other in zip(pictures(tiled, 64), pictures(whole, 64), strict=True):
        assert np.array_equal(one.pixels, other.pixels)
        assert not one.warnings
    assert not any(each.warnings for each in pictures(whole, 128))
    whole_of.clear()
    assert all(each.warnings == (IN_TILES,) for each in pictures(tiled, 128))
    assert not whole_of


def test_a_worker_warms_up_as_was_planned_and_says_so(model: Path) -> None:
    runner = runner_with(model, MemoryPlan(rows=2, compile=False))
    chosen = {choice.what: choice for choice in runner.warm_up()}
    assert chosen["compile"] == warm_up.TOO_SMALL
    assert runner.max_rows == int(chosen["max rows"].choice) == 2
    assert runner.cap(runner._family.lane(128, 128)) == 1
