"""Attention backends against each other and diffusers' own processor, on a CPU; xformers by a fake."""

from __future__ import annotations

import subprocess
import sys
import types
from collections import Counter
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import tiny_models
from worker.contract.errors import SettingsError
from worker.device import attention
from worker.device.attention_timing import Kernel, Shape
from worker.device.unet_family import UNetFamily

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tiny_models.tiny_sd2(tmp_path_factory.mktemp("models") / "sd2")
    return diffusers.DiffusionPipeline.from_pretrained(folder)


def layers(pipeline: Any) -> list[attention.Layer]:
    return list(UNetFamily(pipeline, CPU, torch.float32).attentions())


def an_attention(**options: Any) -> Attention:
    torch.manual_seed(0)
    return Attention(**{"query_dim": 24, "heads": 3, "dim_head": 8, **options}).eval()


def outputs(module: Attention, *inputs: torch.Tensor) -> list[torch.Tensor]:
    """diffusers' own, naive, sdpa."""
    results = []
    for processor in (
        AttnProcessor2_0(),
        attention.Processor(attention.naive),
        attention.Processor(attention.sdpa),
    ):
        module.set_processor(processor)
        with torch.inference_mode():
            results.append(module(*inputs))
    return results


def agree(results: list[torch.Tensor]) -> None:
    for result in results[1:]:
        assert result.shape == results[0].shape
        torch.testing.assert_close(result, results[0], rtol=0, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 3),
    tokens=st.integers(1, 20),
    text=st.none() | st.integers(1, 9),
    upcast=st.booleans(),
    residual=st.booleans(),
)
def test_backends_agree_with_diffusers(
    rows: int, tokens: int, text: int | None, upcast: bool, residual: bool
) -> None:
    module = an_attention(
        cross_attention_dim=None if text is None else 16,
        upcast_attention=upcast,
        residual_connection=residual,
        rescale_output_factor=1.5,
        bias=True,
    )
    inputs = [torch.randn(rows, tokens, 24)]
    if text is not None:
        inputs.append(torch.randn(rows, text, 16))
    agree(outputs(module, *inputs))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_backends_agree_on_a_vaes_attention(layout: torch.memory_format) -> None:
    module = an_attention(
        heads=1, dim_head=24, norm_num_groups=4, residual_connection=True, bias=True, upcast_softmax=True
    )
    agree(outputs(module, torch.randn(2, 24, 5, 7).to(memory_format=layout)))


def test_a_mask_is_refused() -> None:
    module = an_attention()
    module.set_processor(attention.Processor(attention.sdpa))
    with pytest.raises(ValueError, match="no mask"):
        module(torch.randn(1, 4, 24), attention_mask=torch.zeros(1, 4))


@pytest.mark.parametrize("text", [None, 5])
def test_kernels_get_views_of_what_the_projections_wrote(text: int | None) -> None:
    """xformers' layout, (batch, tokens, heads, head width), and not one copy on the way in."""
    module = an_attention(cross_attention_dim=None if text is None else 24)
    written: dict[str, torch.Tensor] = {}
    for name in ("to_q", "to_k", "to_v"):
        getattr(module, name).register_forward_hook(
            lambda _, __, output, name=name: written.__setitem__(name, output)
        )
    seen: list[torch.Tensor] = []

    def kernel(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
        seen.extend((query, key, value))
        assert scale == pytest.approx(8**-0.5)
        return attention.sdpa(query, key, value, scale).contiguous()

    module.set_processor(attention.Processor(kernel))
    module(torch.randn(2, 11, 24), *([torch.randn(2, text, 24)] if text else []))
    keys = text or 11
    assert [tensor.shape for tensor in seen] == [(2, 11, 3, 8), (2, keys, 3, 8), (2, keys, 3, 8)]
    for tensor, source in zip(seen, written.values(), strict=True):
        assert tensor.data_ptr() == source.data_ptr()
        assert tensor.is_contiguous()


# --- choosing -----------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "attention.json"


def processors(pipeline: Any) -> list[Any]:
    parts = (pipeline.unet, pipeline.vae)
    return [module.processor for part in parts for module in part.modules() if isinstance(module, Attention)]


@pytest.mark.parametrize(
    ("asked", "kernel", "reason"),
    [
        ("auto", attention.sdpa, "xformers has no operator for a CPU"),
        ("sdpa", attention.sdpa, "asked for"),
        ("naive", attention.naive, "the baseline of 2022"),
    ],
)
def test_install_on_a_cpu(pipeline: Any, cache: Path, asked: Any, kernel: Kernel, reason: str) -> None:
    choice = attention.install(layers(pipeline), asked, CPU, cache)
    assert (choice.what, choice.choice) == ("attention", "sdpa" if asked == "auto" else asked)
    assert reason in choice.reason
    found = processors(pipeline)
    # Two in each of the UNet's four transformers, one in each of the VAE's two middle blocks.
    assert len(found) == 10
    assert all(isinstance(processor, attention.Processor) for processor in found)
    assert all(processor._kernel is kernel for processor in found)


@pytest.mark.parametrize("asked", ["auto", "xformers", "sdpa", "naive"])
def test_a_model_without_layers_to_choose_for_keeps_its_own_attention(asked: Any, cache: Path) -> None:
    choice = attention.install([], asked, CPU, cache)
    assert choice.choice == "the model's own"
    assert choice.reason


def test_xformers_by_name_on_a_cpu_stops_the_start(pipeline: Any, cache: Path) -> None:
    with pytest.raises(SettingsError, match=r"no operator for a CPU: set SMALLCAT_ATTENTION=sdpa"):
        attention.install(layers(pipeline), "xformers", CPU, cache)


def test_shapes_are_the_models_own(pipeline: Any) -> None:
    shapes = Counter(layer.shape for layer in layers(pipeline))
    unet = {"heads": 4, "head_width": 8, "dtype": torch.float32}
    assert shapes == {
        # 16 x 16 latents, halved once before the first attention; 16 tokens of text.
        Shape(query_tokens=64, key_tokens=64, **unet): 4,
        Shape(query_tokens=64, key_tokens=16, **unet): 4,
        Shape(query_tokens=256, key_tokens=256, heads=1, head_width=8, dtype=torch.float32): 2,
    }


def test_attention_of_another_kind_is_refused(
    pipeline: Any, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = next(module for module in pipeline.unet.modules() if isinstance(module, Attention))
    monkeypatch.setattr(module, "added_kv_proj_dim", 8)
    with pytest.raises(SettingsError, match="another kind"):
        attention.install(layers(pipeline), "sdpa", CPU, cache)


# --- xformers, where a GPU would be -------------------------------------------------------------------------


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A device that counts as a GPU for choosing, with tensors that are on the CPU all the same."""
    draw = Shape.draw
    monkeypatch.setattr(Shape, "draw", lambda shape, rows, device: draw(shape, rows, CPU))
    return torch.device("cuda")


def fake_xformers(*, least_heads: int = 1, wrong: float = 0.0) -> Kernel:
    def kernel(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
        if query.shape[2] < least_heads:
            raise NotImplementedError("No operator found\nfor so few heads")
        return attention.naive(query, key, value, scale) + wrong

    return kernel


def test_xformers_by_name(
    pipeline: Any, on_gpu: torch.device, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = fake_xformers()
    monkeypatch.setattr(attention, "load_xformers", lambda: kernel)
    choice = attention.install(layers(pipeline), "xformers", on_gpu, cache)
    assert (choice.choice, choice.reason) == ("xformers", "asked for")
    assert all(processor._kernel is kernel for processor in processors(pipeline))


def test_what_xformers_refuses_is_sdpas_and_is_said(
    pipeline: Any, on_gpu: torch.device, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "load_xformers", lambda: fake_xformers(least_heads=2))
    choice = attention.install(layers(pipeline), "xformers", on_gpu, cache)
    assert choice.choice == "xformers"
    assert "sdpa where it refuses: heads of 8 in torch.float32: No operator found" in choice.reason
    assert Counter(processor._kernel is attention.sdpa for processor in processors(pipeline)) == {
        False: 8,
        True: 2,
    }


@pytest.mark.parametrize(
    ("fake", "why"),
    [
        (lambda: fake_xformers(least_heads=99), "No operator found"),
        (lambda: fake_xformers(wrong=1.0), "off by 1"),
        (lambda: fake_xformers(wrong=float("nan")), "off by nan"),
    ],
)
def test_xformers_that_does_not_work_stops_the_start_when_asked_for_and_is_told_when_not(
    pipeline: Any, on_gpu: torch.device, cache: Path, monkeypatch: pytest.MonkeyPatch, fake: Any, why: str
) -> None:
    monkeypatch.setattr(attention, "load_xformers", fake)
    with pytest.raises(SettingsError, match=rf"(?s)does not work.*{why}.*pip install '.\[cuda\]'"):
        attention.install(layers(pipeline), "xformers", on_gpu, cache)
    choice = attention.install(layers(pipeline), "auto", on_gpu, cache)
    assert choice.choice == "sdpa"
    assert why in choice.reason


def test_probing_tells_what_works(on_gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    assert attention.probe(CPU) == {"naive": "", "sdpa": "", "xformers": "has no operator for a CPU"}
    monkeypatch.setattr(attention, "load_xformers", fake_xformers)
    assert attention.probe(on_gpu) == {"naive": "", "sdpa": "", "xformers": ""}
    monkeypatch.setattr(attention, "load_xformers", lambda: fake_xformers(wrong=1.0))
    assert "off by 1" in attention.probe(on_gpu)["xformers"]


def test_xformers_that_does_not_load(
    pipeline: Any, on_gpu: torch.device, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> Kernel:
        raise OSError("libcudart.so.12: cannot open shared object file")

    monkeypatch.setattr(attention, "load_xformers", fail)
    with pytest.raises(SettingsError, match=r"it does not load: libcudart.so.12"):
        attention.install(layers(pipeline), "xformers", on_gpu, cache)
    assert "it does not load" in attention.install(layers(pipeline), "auto", on_gpu, cache).reason


def test_auto_takes_the_fastest_for_each_shape_shows_the_table_and_keeps_it(
    pipeline: Any, on_gpu: torch.device, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "load_xformers", fake_xformers)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    timed: list[Shape] = []

    def time(kernel: Kernel, shape: Shape, device: torch.device) -> float:
        timed.append(shape)
        # xformers is the faster one for the UNet's self attention alone.
        is_self = shape.heads > 1 and shape.query_tokens == shape.key_tokens
        return 2.0 if (kernel is attention.sdpa) != is_self else 3.0

    monkeypatch.setattr(attention, "time_kernel", time)
    choice = attention.install(layers(pipeline), "auto", on_gpu, cache)
    assert choice.choice == "sdpa and xformers"
    assert "64x64 4 heads of 8 float32: sdpa 3.000 xformers 2.000" in choice.reason
    assert "64x16 4 heads of 8 float32: sdpa 2.000 xformers 3.000" in choice.reason
    assert Counter(processor._kernel is attention.sdpa for processor in processors(pipeline)) == {
        False: 4,
        True: 6,
    }
    # Three shapes, two backends; at the next start none.
    assert len(timed) == 6
    assert attention.install(layers(pipeline), "auto", on_gpu, cache) == choice
    assert len(timed) == 6
    # Another GPU is measured for itself, and so is everything when the file is no longer whole.
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "another GPU")
    attention.install(layers(pipeline), "auto", on_gpu, cache)
    assert len(timed) == 12
    cache.write_text("{")
    attention.install(layers(pipeline), "auto", on_gpu, cache)
    assert len(timed) == 18


def test_loading_xformers_loads_the_cuda_12_runtime_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    order: list[str] = []
    library = tmp_path / "lib" / "libcudart.so.12"
    library.parent.mkdir()
    library.touch()
    package = types.SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name: package)
    monkeypatch.setattr(attention.ctypes, "CDLL", lambda path, mode: order.append(path))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    parent: Any = types.ModuleType("xformers")
    parent.ops = ops = types.ModuleType("xformers.ops")
    monkeypatch.setitem(sys.modules, "xformers", parent)
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)

    def attend(query: Any, key: Any, value: Any, *, scale: float) -> Any:
        order.append("attention")
        return query.clone()

    monkeypatch.setattr(ops, "memory_efficient_attention", attend, raising=False)
    drawn = Shape(3, 3, 2, 8, torch.float32).draw(1, CPU)
    attention.load_xformers.cache_clear()
    try:
        assert torch.equal(attention.load_xformers()(*drawn, 0.5), drawn[0])
    finally:
        attention.load_xformers.cache_clear()
    assert order == [str(library), "attention"]


def test_on_a_cpu_xformers_is_never_imported_even_where_it_is_installed(tmp_path: Path) -> None:
    """diffusers would, wherever it finds it."""
    for name in ("xformers", "xformers/ops"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("print('xformers was imported')\n")
    metadata = tmp_path / "xformers-0.0.35.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: xformers\nVersion: 0.0.35\n")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import worker.device.model_runner, diffusers;"
        "diffusers.UNet2DConditionModel, diffusers.AutoencoderKL, diffusers.StableDiffusionPipeline"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "xformers was imported" not in done.stdout


COMPILED = """
import sys, types
import torch
from worker.device import attention
from worker.device.attention_timing import Kernel, Shape

calls = []
def memory_efficient_attention(query, key, value, scale):
    calls.append(query.shape)
    return attention.naive(query, key, value, scale).contiguous()

torch.version.cuda = "12.8"
package, ops = types.ModuleType("xformers"), types.ModuleType("xformers.ops")
package.ops, ops.memory_efficient_attention = ops, memory_efficient_attention
sys.modules |= {"xformers": package, "xformers.ops": ops}

kernel = attention.load_xformers()
drawn = [torch.randn(2, 5, 3, 4) for _ in range(3)]
graphs = []
def keep(graph, example):
    graphs.append(graph)
    return graph.forward
compiled = torch.compile(lambda *drawn: kernel(*drawn, 0.5), fullgraph=True, backend=keep)
assert torch.equal(compiled(*drawn), kernel(*drawn, 0.5))
(graph,) = graphs
print([str(node.target) for node in graph.graph.nodes if node.op == "call_function"], len(calls))
"""


@pytest.mark.services  # It imports torch and its compiler once more.
def test_xformers_is_one_operator_for_the_compiler_and_called_directly_by_eager_steps() -> None:
    # In a process of its own: an operator's name can be taken once.
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[0] == "['smallcat.xformers_attention.default'] 2"
