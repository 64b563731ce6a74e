"""Attention of the model and its VAE: one processor, three exact backends, one setting that chooses.

`naive` is softmax(QK^T)V with the matrix of all pairs in memory, as in 2022. `sdpa` is torch's
`scaled_dot_product_attention`. `xformers` is memory-efficient attention (Rabe and Staats, 2021; Dao et al.,
2022) as the origin of this project used it. All take queries, keys and values as (batch, tokens, heads, head
width) views of the projections' outputs, without a copy.

The model family names the attention modules and their shapes: see `worker.device.family`.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.utils import import_utils
from torch import library

from worker.contract.errors import SettingsError, first_line
from worker.device.attention_timing import TIMED_ROWS, Kernel, Shape, Timings, time_kernel
from worker.device.fp8.layers import Fp8Linear, given_to
from worker.device.fp8.quantising import Quantised, rows_of
from worker.model.placement import Choice

Backend = Literal["auto", "xformers", "sdpa", "naive"]
#: Largest absolute difference between a result of xformers and one of sdpa for inputs around 1, in fp16.
_TOLERANCE = 2e-2
_NO_CPU_OPERATOR = "has no operator for a CPU"
_REMEDY = (
    "install the worker with its cuda extra (pip install '.[cuda]': xformers and nvidia-cuda-runtime-cu12), "
    "or leave SMALLCAT_ATTENTION and USE_MEMORY_EFFICIENT_ATTENTION out"
)

# diffusers imports xformers wherever it is installed. On a CPU that only prints a warning. On a GPU it comes
# before the CUDA runtime below is loaded, and then no operator of xformers works. Only this module may
# import xformers, so diffusers is made to believe that it is not installed. diffusers' models read this flag
# when they are first imported, which must come after this module.
import_utils._xformers_available = False


def naive(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """softmax(QK^T)V with the (tokens x tokens) matrix in memory: the baseline of 2022. See `Kernel`."""
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    weights = torch.softmax((query * scale) @ key.transpose(-1, -2), dim=-1)
    return (weights @ value).transpose(1, 2)


def sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """torch's scaled_dot_product_attention, which picks its kernel. `bias`: (batch, keys), on the logits."""
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    mask = None if bias is None else bias[:, None, None].to(query.dtype)
    result = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, scale=scale)
    return result.transpose(1, 2)


@functools.cache
def load_xformers() -> Kernel:
    """xformers' memory-efficient attention. Raises `ImportError` or `OSError` when it does not load.

    The wheels of xformers are linked against CUDA 12. Where torch comes with CUDA 13, the runtime of CUDA 12
    is that of the wheel nvidia-cuda-runtime-cu12. It must be loaded before xformers is first imported:
    otherwise xformers imports with a warning and then refuses every call.
    """
    if not (torch.version.cuda or "").startswith("12."):
        ctypes.CDLL(str(_cuda_12_runtime()), mode=ctypes.RTLD_GLOBAL)
    # Not at the top: importing it on a CPU prints a warning, and it may be absent.
    import xformers.ops

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
        attention = operator if torch.compiler.is_compiling() else xformers.ops.memory_efficient_attention
        result: torch.Tensor = attention(query, key, value, scale=scale)
        return result

    # Registered as an operator of torch, so that the compiler does not trace into it. An eager step calls
    # xformers directly: dispatching a custom operator takes longer than all of xformers' own Python.
    @library.custom_op("smallcat::xformers_attention", mutates_args=())
    def operator(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
        result: torch.Tensor = xformers.ops.memory_efficient_attention(query, key, value, scale=scale)
        return result

    @operator.register_fake
    def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
        return torch.empty_like(query, memory_format=torch.contiguous_format)

    return attend


def _cuda_12_runtime() -> Path | str:
    """The path of libcudart.so.12 in its wheel; without the wheel, its name, which the system may find."""
    try:
        package = importlib.util.find_spec("nvidia.cuda_runtime")
    except ModuleNotFoundError:
        package = None
    for folder in (package.submodule_search_locations or []) if package else []:
        library = Path(folder) / "lib" / "libcudart.so.12"
        if library.is_file():
            return library
    return "libcudart.so.12"


class Processor:
    """diffusers' attention processor for plain attention, self and cross.

    The order of operations is that of `AttnProcessor2_0` (diffusers/models/attention_processor.py).
    """

    def __init__(self, kernel: Kernel, *, once_a_job: bool = False) -> None:
        """`once_a_job`: see `Layer`."""
        self._kernel = kernel
        self._once_a_job = once_a_job

    @property
    def once_a_job(self) -> bool:
        """See `Layer`."""
        return self._once_a_job

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor | Quantised,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
        prompted: torch.Tensor | None = None,
        job_of_row: torch.Tensor | None = None,
        text_bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention of `hidden_states`, (batch, tokens, width) or (batch, width, height, width).

        Those of a transformer block may be quantised for layers in FP8.
        Keys and values come from `encoder_hidden_states` where given. Masks are not supported: no pipeline
        that is served uses one, and another one raises `ValueError`.

        `prompted` and `job_of_row` assign rows to jobs: see `worker.device.step.Batch`. A layer that is
        computed once a job needs both; the others ignore them. `text_bias`, (batch, keys), is added to the
        logits of cross attention: see `worker.device.text.job_text`.
        """
        if attention_mask is not None:
            raise ValueError("This attention takes no mask.")
        if self._once_a_job and prompted is not None:
            once = rows_of(hidden_states, prompted)
            return self._attend(attn, once, encoder_hidden_states, None)[job_of_row]
        bias = None if encoder_hidden_states is None else text_bias
        return self._attend(attn, hidden_states, encoder_hidden_states, bias)

    def _attend(
        self,
        attn: Any,
        hidden_states: torch.Tensor | Quantised,
        encoder_hidden_states: torch.Tensor | None,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        if isinstance(hidden_states, Quantised):
            return self._of_tokens(attn, hidden_states, encoder_hidden_states, bias)
        residual, shape = hidden_states, hidden_states.shape
        if hidden_states.ndim == 4:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        result = self._of_tokens(attn, hidden_states, encoder_hidden_states, bias)
        if residual.ndim == 4:
            result = result.transpose(1, 2).reshape(shape)
        if attn.residual_connection:
            result = result + residual
        if attn.rescale_output_factor != 1.0:
            result = result / attn.rescale_output_factor
        return result

    def _of_tokens(
        self,
        attn: Any,
        hidden_states: torch.Tensor | Quantised,
        encoder_hidden_states: torch.Tensor | None,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attention of (batch, tokens, width) without what is around it."""
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = self._projected(attn, hidden_states, context)
        heads = (query.shape[0], -1, attn.heads, query.shape[-1] // attn.heads)
        query, key, value = query.view(heads), key.view(heads), value.view(heads)
        if bias is not None:
            # Few batches need one, and the other kernels take none of this shape.
            result = sdpa(query, key, value, attn.scale, bias)
        elif attn.upcast_attention and self._kernel is naive:
            # The products of Stable Diffusion 2.1 overflow fp16. The other kernels accumulate in fp32.
            result = naive(query.float(), key.float(), value.float(), attn.scale).to(query.dtype)
        else:
            result = self._kernel(query, key, value, attn.scale)
        return self._output(attn, result.flatten(2))

    def _projected(self, attn: Any, hidden_states: Any, context: Any) -> Sequence[torch.Tensor]:
        """Queries, keys and values. What they are of may be quantised."""
        if isinstance(attn.to_q, Fp8Linear):
            # Once for all that take it.
            given = given_to(attn.to_q, hidden_states)
            hidden_states, context = given, given if context is hidden_states else context
        return attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context)

    def _output(self, attn: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        """The product behind the attention."""
        output: torch.Tensor = attn.to_out[0](hidden_states)
        return output


@dataclass(frozen=True)
class Layer:
    """One attention module of a model, as its family describes it."""

    #: A `diffusers.models.attention_processor.Attention`.
    module: Any
    #: Its sizes in a picture of the model's default size.
    shape: Shape
    #: Whether a guided job's two rows are still equal there, so that one of them is enough. That is so before
    #: the first layer that depends on the prompt.
    once_a_job: bool = False


def shape_of(module: Any, query_tokens: int, key_tokens: int) -> Shape:
    """The shape of one of diffusers' `Attention` modules for so many tokens.

    Raises `SettingsError` for attention of a kind that `Processor` does not compute.
    """
    unknown = (
        module.added_kv_proj_dim is not None
        or any((module.norm_q, module.norm_k, module.norm_cross, module.spatial_norm))
        or module.fused_projections
        or module.inner_kv_dim != module.inner_dim
    )
    if unknown:
        raise SettingsError(
            "The model has attention of another kind than Stable Diffusion's: use another model."
        )
    return Shape(
        query_tokens=query_tokens,
        key_tokens=key_tokens,
        heads=module.heads,
        head_width=module.inner_dim // module.heads,
        dtype=module.to_q.weight.dtype,
    )


def install(layers: Sequence[Layer], backend: Backend, device: torch.device, cache: Path) -> Choice:
    """Run every one of `layers` on `backend`. Returns what was chosen, and why.

    `auto` takes sdpa on a CPU. On a GPU it takes the fastest kernel for each shape, which it measures once
    and keeps in the file `cache`. Raises `SettingsError` with the remedy when the backend was asked for by
    name and does not work. Without layers, nothing is chosen.
    """
    if not layers:
        return Choice("attention", "the model's own", "its family leaves no backend to choose")
    shapes = list(dict.fromkeys(layer.shape for layer in layers))
    kernels, reason = _choose(shapes, backend, device, cache)
    for layer in layers:
        layer.module.set_processor(Processor(kernels[layer.shape], once_a_job=layer.once_a_job))
    names = sorted({_name(kernel) for kernel in kernels.values()})
    return Choice("attention", backend if backend != "auto" else " and ".join(names), reason)


def probe(device: torch.device) -> dict[str, str]:
    """Each backend, and the reason why it does not work on `device`; empty where it works."""
    problem = _NO_CPU_OPERATOR
    if device.type != "cpu":
        # The widest attention of Stable Diffusion 1.x apart from the VAE's.
        _, problem = _probe([Shape(64, 64, heads=8, head_width=160, dtype=torch.float16)], device)
    return {"naive": "", "sdpa": "", "xformers": problem}


def _choose(
    shapes: Sequence[Shape], backend: Backend, device: torch.device, cache: Path
) -> tuple[dict[Shape, Kernel], str]:
    if backend == "naive":
        return dict.fromkeys(shapes, naive), "asked for; the baseline of 2022, with N x N matrices in memory"
    if backend == "sdpa":
        return dict.fromkeys(shapes, sdpa), "asked for"
    if device.type == "cpu":
        if backend == "xformers":
            raise SettingsError(
                f"The attention backend xformers is asked for, but it {_NO_CPU_OPERATOR}: set "
                "SMALLCAT_ATTENTION=sdpa and leave USE_MEMORY_EFFICIENT_ATTENTION out."
            )
        return dict.fromkeys(shapes, sdpa), f"xformers {_NO_CPU_OPERATOR}"
    kernels, refused = _probe(shapes, device)
    if backend == "xformers":
        if not any(kernel is not sdpa for kernel in kernels.values()):
            raise SettingsError(
                f"The attention backend xformers is asked for, but does not work ({refused}): {_REMEDY}."
            )
        return kernels, "asked for" + (f"; sdpa where it refuses: {refused}" if refused else "")
    if all(kernel is sdpa for kernel in kernels.values()):
        return kernels, f"xformers does not work: {refused}"
    return _fastest(kernels, device, cache)


def _fastest(
    kernels: dict[Shape, Kernel], device: torch.device, cache: Path
) -> tuple[dict[Shape, Kernel], str]:
    """The faster of sdpa and `kernels` for each shape, and the times as a table."""
    known = Timings(cache, device)
    chosen: dict[Shape, Kernel] = {}
    table = []
    for shape, kernel in kernels.items():
        times = {"sdpa": math.inf, "xformers": math.inf} | known.of(shape)
        for name, each in (("sdpa", sdpa), ("xformers", kernel)):
            if times[name] == math.inf and (name == "sdpa" or kernel is not sdpa):
                times[name] = time_kernel(each, shape, device)
        known.keep(shape, times)
        chosen[shape] = kernel if times["xformers"] < times["sdpa"] else sdpa
        table.append(f"{shape}: " + " ".join(f"{name} {time:.3f}" for name, time in times.items()))
    known.save()
    return chosen, f"the fastest for each shape, ms for {TIMED_ROWS} rows: {'; '.join(table)}"


def _probe(shapes: Iterable[Shape], device: torch.device) -> tuple[dict[Shape, Kernel], str]:
    """xformers for each shape that it computes correctly, sdpa for the others, and the first reason why."""
    try:
        kernel = load_xformers()
    except Exception as error:  # noqa: BLE001 - whatever keeps it from loading is reported
        return dict.fromkeys(shapes, sdpa), f"it does not load: {first_line(error)}"
    kernels: dict[Shape, Kernel] = {}
    refused = ""
    for shape in shapes:
        try:
            drawn = shape.draw(1, device)
            scale = shape.head_width**-0.5
            difference = (kernel(*drawn, scale).float() - sdpa(*drawn, scale).float()).abs().max().item()
            if not difference < _TOLERANCE:
                raise RuntimeError(f"its result is off by {difference:.2g}")
            kernels[shape] = kernel
        except Exception as error:  # noqa: BLE001 - likewise
            kernels[shape] = sdpa
            refused = refused or f"heads of {shape.head_width} in {shape.dtype}: {first_line(error)}"
    return kernels, refused


def _name(kernel: Kernel) -> str:
    names: dict[Kernel, str] = {naive: "naive", sdpa: "sdpa"}
    return names.get(kernel, "xformers")
