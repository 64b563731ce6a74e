"""Linear layers in FP8, by the reference on a CPU: `SMALLCAT_PRECISION=fp8`."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock

from tests import tiny_models
from tests.benchmarks.mates import psnr
from worker.contract import infotext
from worker.contract.errors import SettingsError
from worker.contract.job import Job
from worker.contract.queues import queue_of
from worker.contract.settings import WorkerSettings
from worker.device import attention
from worker.device.fp8 import unet as fp8
from worker.device.fp8.layers import Fp8Gate, Fp8Linear, Fp8Norm, products
from worker.device.fp8.quantising import quantise
from worker.device.model_runner import ModelRunner
from worker.model import loader, placement

CPU = torch.device("cpu")


def a_layer(inputs: int = 96, outputs: int = 64, *, bias: bool = True) -> torch.nn.Linear:
    torch.manual_seed(1)
    layer = torch.nn.Linear(inputs, outputs, bias=bias).requires_grad_(False)
    layer.weight[:, 5] *= 20
    return layer


def an_input(inputs: int = 96) -> torch.Tensor:
    """With tokens of other sizes, one of zeros, and a channel that is larger than the others."""
    torch.manual_seed(2)
    x = torch.randn(3, 7, inputs) * torch.logspace(-3, 3, 7)[:, None]
    x[..., 5] *= 8
    x[1, 2] = 0
    return x


def in_fp8(layer: torch.nn.Linear, outliers: int = 16) -> Fp8Linear:
    return Fp8Linear(layer, fp8._outliers([layer], None, outliers))


def snr(exact: torch.Tensor, found: torch.Tensor) -> float:
    """Decibels, of each token the same share."""
    norms = exact.norm(dim=-1).clamp(min=1e-9)
    return -20 * math.log10(float(((exact - found).norm(dim=-1) / norms).square().mean().sqrt()))


def test_a_layer_is_as_near_as_three_bits_are_and_nearer_with_outliers() -> None:
    layer, x = a_layer(), an_input()
    exact = layer(x) - layer.bias
    plain, kept = (in_fp8(layer, count)(x) - layer.bias for count in (0, 16))
    assert snr(exact, plain) > 27
    assert snr(exact, kept) > snr(exact, plain) + 4
    assert torch.equal(in_fp8(layer)(x)[1, 2], layer.bias)
    assert snr(layer.weight, in_fp8(layer).weight) > 30


def test_a_token_does_not_depend_on_the_others() -> None:
    layer, x = in_fp8(a_layer(bias=False)), an_input()
    assert torch.allclose(layer(x)[2, 3], layer(x[2:, 3:4])[0, 0], rtol=1e-6, atol=0)


def test_what_is_not_finite_stays_so() -> None:
    layer, x = in_fp8(a_layer()), an_input()
    x[0, 0, 0], x[0, 1, 0] = math.inf, math.nan
    assert layer(x).isfinite().all(-1).logical_not().nonzero().tolist() == [[0, 0], [0, 1]]


def test_the_reference_is_what_torch_gives_with_scales_by_row() -> None:
    """torch 2.13 has the product on CPUs, too, in bfloat16 alone."""
    layer, x = in_fp8(a_layer()), an_input()
    given = quantise(x, layer.outliers)
    scaled = torch._scaled_mm(
        given.values.flatten(0, 1),
        layer.quantised.t(),
        scale_a=given.scales.flatten(0, 1),
        scale_b=layer.scales,
        out_dtype=torch.bfloat16,
    )
    found = layer.product(given).flatten(0, 1)
    assert torch.allclose(scaled.float(), found, rtol=2**-7, atol=1e-5 * float(found.abs().max()))


def test_another_dtype_is_that_of_the_output_alone() -> None:
    layer, x = in_fp8(a_layer()), an_input()
    expected = layer(x)
    half = layer.half()
    assert half(x.half()).dtype == half.weight.dtype == torch.float16
    assert (half.quantised.dtype, half.scales.dtype) == (torch.float8_e4m3fn, torch.float32)
    assert torch.allclose(half.float()(x), expected, atol=1e-3)


def test_layers_of_one_input_share_what_is_kept_of_it() -> None:
    layers = [a_layer(bias=False), a_layer(96, 32, bias=False)]
    outliers = fp8._outliers(layers, None, 16)
    both: list[torch.nn.Linear] = [Fp8Linear(each, outliers) for each in layers]
    x = an_input()
    for together, layer in zip(products(x, both), both, strict=True):
        assert torch.equal(together, layer(x))
    for plain, layer in zip(products(x, layers), layers, strict=True):
        assert torch.equal(plain, layer(x))


def test_a_gate_between_two_layers_gives_its_output_quantised_for_the_second(sdxl: Path) -> None:
    unet = loader.load(WorkerSettings(model=str(sdxl))).pipeline.unet
    plain = copy.deepcopy(unet)
    fp8.install(unet, CPU)
    name = next(name for name, each in unet.named_modules() if isinstance(each, Fp8Gate))
    gate, expected = unet.get_submodule(name), plain.get_submodule(name)
    x = torch.randn(2, 7, expected.proj.in_features)
    found = gate(x)
    second = unet.get_submodule(name.removesuffix("0") + "2")
    assert torch.equal(second(found), second.of(found))
    assert snr(plain.get_submodule(name.removesuffix("0") + "2")(expected(x)), second(found)) > 20
    alone = copy.deepcopy(plain)
    fp8.install(alone, CPU, ["feed-forward: first"])
    assert not any(isinstance(each, Fp8Gate) for each in alone.modules())


def test_norms_that_only_layers_in_fp8_read_give_their_output_quantised() -> None:
    torch.manual_seed(3)
    block: Any = BasicTransformerBlock(64, 2, 32, cross_attention_dim=48).requires_grad_(False)
    for module in (block.attn1, block.attn2):
        module.set_processor(attention.Processor(attention.sdpa))
    for norm in (block.norm1, block.norm2, block.norm3):
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.bias)
    unet = torch.nn.ModuleDict({"block": copy.deepcopy(block)})
    fp8.install(unet, CPU)
    own: Any = unet["block"]
    assert all(isinstance(each, Fp8Norm) for each in (own.norm1, own.norm2, own.norm3))
    x, text = torch.randn(2, 6, 64), torch.randn(2, 5, 48)
    normed = own.norm1(x)
    assert torch.equal(normed.values, quantise(block.norm1(x), own.attn1.to_q.outliers).values)
    assert torch.equal(own.norm1.plain()(x), block.norm1(x))
    found = own(x, encoder_hidden_states=text)
    assert snr(block(x, encoder_hidden_states=text) - x, found - x) > 25
    once = attention.Processor(attention.sdpa, once_a_job=True)
    own.attn1.set_processor(once)
    rows = {"prompted": torch.tensor([1]), "job_of_row": torch.tensor([0, 0])}
    assert torch.equal(own.attn1(normed, **rows)[0], own.attn1(own.norm1(x[1:]))[0])
    own.attn1.set_processor(attention.Processor(attention.sdpa))
    # In one piece, as a step is compiled.
    compiled = torch.compile(own, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x, encoder_hidden_states=text), found)


def test_norms_that_others_read_stay_as_they_are() -> None:
    block = BasicTransformerBlock(64, 2, 32, cross_attention_dim=48)
    unet: Any = torch.nn.ModuleDict({"block": block})
    fp8.install(unet, CPU, ["cross attention: queries", "feed-forward: first"])
    assert [isinstance(each, Fp8Norm) for each in (block.norm1, block.norm2, block.norm3)] == [
        False,
        True,
        False,
    ]


# --- a model ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.tiny_sdxl(tmp_path_factory.mktemp("models") / "sdxl")


def finish(runner: ModelRunner, *jobs: Job) -> list[Any]:
    states = [runner.prepare(job) for job in jobs]
    while left := [state for state in states if state.step < state.steps]:
        assert runner.step(left) == [None] * len(left)
    return [picture.pixels for picture in runner.decode(states)]


def test_it_is_named_in_the_revision_the_queue_the_id_and_the_infotext(sdxl: Path) -> None:
    plain, runner = (
        ModelRunner(WorkerSettings(model=str(sdxl), precision=precision)) for precision in ("fp16", "fp8")
    )
    assert runner.served.revision == f"{plain.served.revision}-fp8"
    job, own = (Job(prompt="a", seed=1, steps=2).resolved(each.served) for each in (runner, plain))
    assert job.id != own.id
    assert queue_of(job) != queue_of(own)
    assert f"Model hash: {runner.served.revision}" in infotext.write(job)
    assert [each.choice for each in runner.choices if each.what == "precision"] == ["fp8"]
    assert not [each for each in plain.choices if each.what == "precision"]
    [drawn], [expected] = finish(runner, job), finish(plain, own)
    assert not np.array_equal(drawn, expected)
    assert psnr(drawn, expected) > 25
    [beside, _] = finish(runner, job, Job(prompt="b", seed=2, steps=3, guidance_scale=1.0))
    assert psnr(drawn, beside) > 40


def test_the_layers_that_are_served_are_in_fp8_and_no_others(sdxl: Path) -> None:
    unet = loader.load(WorkerSettings(model=str(sdxl))).pipeline.unet
    linear = {name for name, each in unet.named_modules() if isinstance(each, torch.nn.Linear)}
    order = list(unet.state_dict())
    count = fp8.install(unet, CPU)
    found = {name for name, each in unet.named_modules() if isinstance(each, Fp8Linear)}
    assert count == len(found)
    left_out = {name.rpartition("transformer_blocks.0.")[2] for name in linear - found}
    assert left_out == {
        *("attn2.to_k", "attn2.to_v", "time_embedding.linear_1", "time_embedding.linear_2"),
        *("add_embedding.linear_1", "add_embedding.linear_2"),
        *(name for name in linear if name.endswith("time_emb_proj")),
    }
    for name, each in unet.named_modules():
        if name.endswith("attn1"):
            assert torch.equal(each.to_q.outliers, each.to_v.outliers)
    assert len(order) == len(set(order))


def test_a_layer_whose_sides_no_product_takes_stays_as_it_is() -> None:
    unet = torch.nn.ModuleDict({"a": torch.nn.ModuleDict({"proj_in": torch.nn.Linear(24, 32)})})
    assert fp8.install(unet, CPU, ["projection in"]) == 0


# --- what is refused ----------------------------------------------------------------------------------------


def test_what_does_not_go_with_it_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    for settings, device, dtype, part in (
        (
            WorkerSettings(precision="fp8", exact=True),
            CPU,
            torch.float32,
            "SMALLCAT_EXACT is 1: unset one of",
        ),
        (WorkerSettings(precision="fp8"), gpu, torch.float16, r"A100 has none: .* 8\.0, which must be 8\.9"),
    ):
        with pytest.raises(SettingsError, match=part):
            placement.choose_precision(settings, device, dtype)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    with pytest.raises(SettingsError, match="goes with fp16 and bf16, and SMALLCAT_DTYPE is fp32"):
        placement.choose_precision(WorkerSettings(precision="fp8"), gpu, torch.float32)
    assert placement.choose_precision(WorkerSettings(precision="fp8"), gpu, torch.float16)
    assert not placement.choose_precision(WorkerSettings(), gpu, torch.float16)


def test_a_gpu_whose_torch_lacks_the_product_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def product(*_: Any) -> torch.Tensor:
        raise RuntimeError("CUBLAS_STATUS_NOT_SUPPORTED\nmore")

    monkeypatch.setattr(fp8, "scaled_product", product)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA RTX")
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: torch.empty(1))
    monkeypatch.setattr(torch, "ones", lambda *_, **__: torch.empty((1, 1)))
    with pytest.raises(SettingsError, match=r"NVIDIA RTX \(CUBLAS_STATUS_NOT_SUPPORTED\): unset it\."):
        fp8._out_dtype(torch.device("cuda", 0))
