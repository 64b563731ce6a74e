"""Compiled code without its trace: loaded and called as it was compiled, in seconds instead of a minute.

Where torch's cache has a function's code, torch.compile still traces the function in Python to find it. So
beside the code a `Trace` is kept: torch's key of the code, the expressions that its inputs are read by, and
where the function's results are among its outputs. No guards are kept: whoever calls the code calls it with
arguments of the shapes, dtypes and strides that it was compiled for, but for what is dynamic.

What is private to torch is used as `torch._inductor.standalone_compile` uses it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch


@dataclass(frozen=True)
class Trace:
    """What calls compiled code in place of the function that was traced."""

    #: Torch's, of its cache.
    key: str
    #: Of each input: Python, in which L has the function, bound by `bound`, and its arguments.
    inputs: Sequence[str]
    #: Of each result of the function: its place among the outputs.
    outputs: Sequence[int]
    #: Whether the function's result is one tensor, and no tuple.
    is_single: bool

    def to_json(self) -> str:
        """As text."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Trace:
        """From what `to_json` gave. Raises `ValueError`, `TypeError`."""
        return Trace(**json.loads(text))


def bound(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, as what torch.compile always traces alike: as `fn`, which is called with `args`."""
    return partial(_call, function)


def _call(function: Callable[..., Any], argument: Any) -> Any:
    return function(argument)


class Recorder:
    """A backend of torch.compile: inductor, which notes how its code is called."""

    def __init__(self) -> None:
        self._inputs: list[str] = []
        self._outputs: Sequence[Any] = ()
        #: What the function gave for its example.
        self.result: Any = None

    def __call__(self, module: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        """See torch.compile."""
        from torch._inductor.compile_fx import compile_fx

        places = [node for node in module.graph.nodes if node.op == "placeholder"]
        sources = [node.meta["grapharg"].source for node in places]
        names = (source.name if source is not None else "" for source in sources)
        self._inputs = [name() if callable(name) else name for name in names]
        compiled: Any = compile_fx(module, inputs)

        def noted(*arguments: Any) -> Any:
            self._outputs = compiled(*arguments)
            return self._outputs

        return noted

    def trace(self, keys: Sequence[str]) -> Trace | None:
        """How to get `result` from the code. None: the code alone does not give it.

        `keys`: those of what was put into torch's cache.
        """
        is_single = isinstance(self.result, torch.Tensor)
        results = [self.result] if is_single else list(self.result)
        places = [[index for index, each in enumerate(self._outputs) if each is one] for one in results]
        if len(keys) != 1 or not all(places) or not all(self._inputs):
            return None
        return Trace(keys[0], self._inputs, [first for first, *_ in places], is_single)


def carried(recorder: Recorder) -> tuple[bytes, str]:
    """What was compiled since the last call, as torch carries it, and its trace. Empty: there is none."""
    from torch.compiler._cache import CacheArtifactManager

    saved = torch.compiler.save_cache_artifacts()
    CacheArtifactManager.clear()
    if saved is None:
        return b"", ""
    artifacts, info = saved
    trace = recorder.trace(info.aot_autograd_artifacts)
    return artifacts, "" if trace is None else trace.to_json()


def load(trace: Trace, function: Callable[..., Any]) -> Callable[[Any], Any]:
    """The compiled code of `function`. Raises whatever torch raises where it has or takes none of it."""
    call = _load(trace.key)
    whole = bound(function)
    # What is no argument is read once: parameters do not change.
    read = [
        compile(each, "<input>", "eval") if each.startswith("L['args']") else eval(each, {"L": {"fn": whole}})  # noqa: S307 - as trusted as the code: both are signed
        for each in trace.inputs
    ]
    is_read = [each.startswith("L['args']") for each in trace.inputs]

    def compiled(argument: Any) -> Any:
        names = {"L": {"args": (argument,)}}
        inputs = [eval(each, names) if late else each for each, late in zip(read, is_read, strict=True)]  # noqa: S307
        outputs = call(inputs)
        if trace.is_single:
            return outputs[trace.outputs[0]]
        return tuple(outputs[place] for place in trace.outputs)

    return compiled


def _load(key: str) -> Callable[[list[Any]], Sequence[Any]]:
    """As `torch._inductor.standalone_compile.CompiledArtifact.load` does."""
    import torch._functorch.config as functorch_config
    import torch._inductor.config as inductor_config
    from torch._functorch._aot_autograd.autograd_cache import AOTAutogradCache
    from torch._inductor.compile_fx import _CompileFxKwargs
    from torch._inductor.cudagraph_utils import BoxedDeviceIndex
    from torch._inductor.utils import BoxedBool
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    cache: Any = AOTAutogradCache
    with inductor_config.patch(unsafe_skip_cache_dynamic_shape_guards=True):
        with functorch_config.patch(strict_autograd_cache=True):
            found = cache._lookup(key, local=True, remote=False, args=[], cache_info={}, aot_config=None)
        if found is None:
            raise LookupError(f"torch's cache has no code of the key {key}")
        # Earlier versions of torch give the entry alone.
        entry = found[0] if isinstance(found, tuple) else found
        options = _CompileFxKwargs(
            cudagraphs=BoxedBool(False), boxed_forward_device_index=BoxedDeviceIndex(0)
        )
        context = torch._guards.TracingContext(FakeTensorMode(shape_env=ShapeEnv()))
        with torch._guards.tracing(context):
            loaded: Callable[[list[Any]], Sequence[Any]] = entry.wrap_post_compile(
                [], entry.sanitized_aot_config, options
            )
    return loaded
