"""ComfyUI's graph of nodes as job fields, where it is one pass of text to image.

A node is `{"class_type": ..., "inputs": {...}}`; an input is a value, or a link `[id of a node, output]`
(execution.py of version 0.3). What a graph does besides is named; two passes are refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from worker.contract.errors import InvalidJobError
from worker.contract.explain import short
from worker.contract.metadata.reading import Reading, number
from worker.contract.scheduler_names import pair_of

#: Nodes that make noise into a picture in one step of the graph, and are understood.
SAMPLERS = ("KSampler", "KSamplerAdvanced")
#: The input of a node that holds a value: the first of these that there is.
_VALUES = ("value", "text", "string", "prompt", "seed", "noise_seed", "int", "float", "number")
#: Inputs of such a node that do not change the value.
_ASIDE = ("control_after_generate", "speak_and_recognation")
#: Nodes that change no picture, or that the sampler's own inputs lead to.
_KNOWN = frozenset(
    (
        *SAMPLERS,
        *("CheckpointLoaderSimple", "CheckpointLoader", "CLIPTextEncode", "CLIPTextEncodeSDXL"),
        *("EmptyLatentImage", "VAEDecode", "VAEDecodeTiled", "SaveImage", "PreviewImage", "Reroute"),
    )
)
#: Nodes of a graph, and links in a row, that are followed.
_MOST_NODES, _MOST_LINKS = 5_000, 50


def is_graph(value: object) -> bool:
    """Whether this is a graph as ComfyUI's API takes it."""
    return isinstance(value, dict) and any(
        isinstance(node, dict) and "class_type" in node and "inputs" in node for node in value.values()
    )


def read_graph(graph: Mapping[str, Any]) -> Reading:
    """The job fields of a graph. Raises `InvalidJobError` that names the node which a job cannot be."""
    return _Graph(graph).read()


@dataclass
class _Graph:
    nodes: Mapping[str, Any]
    #: Nodes that were read as values or conditions, whatever their class.
    used: set[str] = field(default_factory=set)
    left: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if len(self.nodes) > _MOST_NODES:
            raise InvalidJobError(f"The graph has {len(self.nodes):,} nodes, the limit is {_MOST_NODES:,}.")

    def read(self) -> Reading:
        sampler = self._sampler()
        inputs = self._inputs(sampler)
        is_advanced = self._class(sampler) == "KSamplerAdvanced"
        fields: dict[str, Any] = {
            "prompt": self._condition(sampler, "positive"),
            "negative_prompt": self._condition(sampler, "negative"),
            "seed": self._number(int, sampler, "noise_seed" if is_advanced else "seed"),
            "steps": self._number(int, sampler, "steps"),
            "guidance_scale": self._number(float, sampler, "cfg"),
            **pair_of(
                self._text(sampler, "sampler_name"),
                self._text(sampler, "scheduler") if "scheduler" in inputs else None,
            ).fields(),
        }
        self._one_pass(sampler, fields["steps"], is_advanced=is_advanced)
        fields |= self._size(sampler)
        reached = (self._class(name) for name in self._reached(sampler))
        self.left += [each for each in reached if each not in _KNOWN | {""}]
        return Reading(fields, tuple(self.left))

    def _class(self, name: str) -> str:
        node = self.nodes.get(name)
        return str(node.get("class_type", ""))[:80] if isinstance(node, dict) else ""

    def _inputs(self, name: str) -> Mapping[str, Any]:
        node = self.nodes.get(name)
        inputs = node.get("inputs") if isinstance(node, dict) else None
        return inputs if isinstance(inputs, dict) else {}

    def _link(self, value: object) -> str | None:
        """The node that an input is linked to."""
        if isinstance(value, list) and len(value) == 2 and isinstance(value[0], str | int):
            return str(value[0])
        return None

    def _links(self, name: str) -> Iterator[str]:
        for value in self._inputs(name).values():
            if (link := self._link(value)) is not None and link in self.nodes:
                yield link

    def _above(self, start: str) -> set[str]:
        """All nodes that `start` is made from, and itself."""
        found, left = {start}, [start]
        while left:
            new = set(self._links(left.pop())) - found
            found |= new
            left += new
        return found

    def _reached(self, sampler: str = "") -> list[str]:
        """The nodes that some saved picture is made from, but those that were read; all without such.

        Also those that the `sampler` takes from: nodes of others save pictures, too.
        """
        saved = [name for name in self.nodes if self._class(name) in ("SaveImage", "PreviewImage")]
        found = set().union(*map(self._above, saved[:20])) if saved else set(self.nodes)
        if sampler:
            found |= self._above(sampler)
        return [name for name in self.nodes if name in found - self.used]

    def _sampler(self) -> str:
        found = [name for name in self.nodes if self._is_pass(name)]
        if len(found) > 1:
            reached = set(self._reached())
            found = [name for name in found if name in reached] or found
        if not found:
            raise InvalidJobError("The graph has no KSampler node: what it draws is not known.")
        if len(found) > 1:
            classes = ", ".join(f"{self._class(each)} {each}"[:60] for each in found[:4])
            raise InvalidJobError(f"The graph has {len(found)} samplers ({classes}): a job is one pass.")
        if self._class(found[0]) not in SAMPLERS:
            raise InvalidJobError(
                f"The graph samples with {short(self._class(found[0]))}: {' and '.join(SAMPLERS)} are read."
            )
        return found[0]

    def _is_pass(self, name: str) -> bool:
        """Whether a node samples: "sampler" is in its class, and it takes latents or noise."""
        takes = ("latent_image", "latent", "samples", "noise")
        return "sampler" in self._class(name).casefold() and any(each in self._inputs(name) for each in takes)

    def _value(self, name: str, key: str) -> Any:
        """An input's value, along its links."""
        value = self._inputs(name).get(key)
        for _ in range(_MOST_LINKS):
            link = self._link(value)
            if link is None:
                return value
            inputs = self._inputs(link)
            held = next((each for each in _VALUES if each in inputs), "")
            others = [inputs[each] for each in inputs if each not in (held, *_ASIDE)]
            # A node that puts several together makes another value than the one it holds.
            if not held or any(isinstance(each, str | list) for each in others):
                break
            self.used.add(link)
            value = inputs[held]
        source = short(self._class(self._link(value) or ""))
        raise InvalidJobError(
            f"The graph's {self._class(name)} takes its {key} from {source}, whose value is not in the graph."
        )

    def _number(self, kind: type[int] | type[float], name: str, key: str) -> Any:
        return number(kind, f"{self._class(name)}'s {key}", self._value(name, key))

    def _text(self, name: str, key: str) -> str:
        value = self._value(name, key)
        if not isinstance(value, str):
            raise InvalidJobError(f"The graph's {self._class(name)} has {key} {short(value)}: it is no text.")
        return value

    def _condition(self, sampler: str, key: str) -> str:
        name = self._link(self._inputs(sampler).get(key)) or ""
        for _ in range(_MOST_LINKS):
            kind, inputs = self._class(name), self._inputs(name)
            if kind == "Reroute" and (link := next(self._links(name), None)):
                name = link
            elif kind == "ConditioningZeroOut" and key == "negative":
                return ""
            elif kind == "CLIPTextEncodeSDXL":
                texts = [self._text(name, each) for each in ("text_g", "text_l") if each in inputs]
                if len(set(texts)) > 1:
                    raise InvalidJobError(
                        "The graph's CLIPTextEncodeSDXL has two texts, text_g and text_l: a job has one."
                    )
                return texts[0] if texts else ""
            elif kind == "CLIPTextEncode":
                return self._text(name, "text")
            elif kind.startswith("ControlNetApply") and key in inputs:
                name = self._link(inputs[key]) or ""
            elif kind == "ControlNetApply":
                name = self._link(inputs.get("conditioning")) or ""
            else:
                break
        raise InvalidJobError(
            f"The graph's {key} condition is made by {short(self._class(name) or 'nothing')}: "
            "CLIPTextEncode and CLIPTextEncodeSDXL are read."
        )

    def _one_pass(self, sampler: str, steps: int, *, is_advanced: bool) -> None:
        inputs = self._inputs(sampler)
        if not is_advanced:
            if "denoise" in inputs and self._number(float, sampler, "denoise") != 1:
                raise InvalidJobError(
                    f"The graph's KSampler has denoise {short(inputs['denoise'])}: a job begins with noise."
                )
            return
        start = self._number(int, sampler, "start_at_step") if "start_at_step" in inputs else 0
        end = self._number(int, sampler, "end_at_step") if "end_at_step" in inputs else steps
        for key, neutral in (("add_noise", "enable"), ("return_with_leftover_noise", "disable")):
            if inputs.get(key, neutral) != neutral:
                raise InvalidJobError(
                    f"The graph's KSamplerAdvanced has {key} {short(inputs[key])}: a job is one pass."
                )
        if start > 0 or end < steps:
            raise InvalidJobError(
                f"The graph's KSamplerAdvanced does the steps {start} to {end} of {steps}: a job does all."
            )

    def _size(self, sampler: str) -> dict[str, Any]:
        name = self._link(self._inputs(sampler).get("latent_image")) or ""
        for _ in range(_MOST_LINKS):
            if self._class(name) != "Reroute":
                break
            name = next(self._links(name), "")
        if self._class(name) != "EmptyLatentImage":
            raise InvalidJobError(
                f"The graph begins with {short(self._class(name) or 'nothing')}, not with EmptyLatentImage: "
                "a job begins with noise alone."
            )
        if self._inputs(name).get("batch_size", 1) != 1:
            self.left.append(f"batch_size: {short(self._inputs(name)['batch_size'])}")
        return {key: self._number(int, name, key) for key in ("width", "height")}
