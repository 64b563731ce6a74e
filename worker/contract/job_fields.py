"""The table of job fields, from which everything about them is made.

A field of `JobParameters` has its type, its limits, a `#:` line, and a `JobField` with its names elsewhere.
`table_of` puts these together. Command-line options, headings of prompt files, AUTOMATIC1111's options,
infotext, manifest columns, names of downloads, gallery rows, the job's id and docs/job-fields.md are made
from the table, so that a new field is added in `JobParameters` alone.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType, NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from worker.contract.limits import limits_of

#: Types that a field can have: a number, yes or no, a text (choices are texts), a JSON object, or a list of
#: objects that a text says as well.
KINDS = (int, float, bool, str, dict, list)
#: Those of them that are JSON in a cell of a table.
NESTED = (dict, list)
#: What stands for yes and no where a field's value is a text.
_WORDS = {"true": True, "yes": True, "on": True, "1": True} | {
    "false": False,
    "no": False,
    "off": False,
    "0": False,
}
#: The default order of a key in an infotext: after AUTOMATIC1111's own keys.
LAST = 100


@dataclass(frozen=True, kw_only=True)
class JobField:
    """What a field of `Job` is called elsewhere, and how it is treated: part of its annotation.

    A new field may do without: its names are then made from its own. At its default it is left out of ids,
    messages and records, so that old ids stay and old workers read new messages.
    """

    #: Its name as people read it. Made from the field's name when empty.
    label: str = ""
    #: Fields with the same `pair` are shown and written as one, such as `512x768`; empty: there is no other.
    pair: str = ""
    #: Its key in an infotext. Made from the label when empty.
    infotext: str = ""
    #: The keys of an infotext are written in the order of these numbers.
    infotext_order: int = LAST
    #: Whether the key is read in our own infotexts only: other tools mean something else by it.
    infotext_ours_only: bool = False
    #: AUTOMATIC1111's names for its choices; a choice without one keeps its own name.
    a1111_values: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    #: Its option in AUTOMATIC1111's script "Prompts from file or textbox"; empty: there is none.
    a1111_option: str = ""
    #: Its argument in diffusers' pipelines; empty: there is none.
    diffusers: str = ""
    #: Other headings in tables of prompts, in lower case with underscores, beside the two names above.
    headings: tuple[str, ...] = ()
    #: What one of its values is called, where it is a list: its option is given once for each.
    each: str = ""
    #: How a list is written as one text, which its check reads. Takes its values as they are or as JSON has
    #: them; raises `ValueError`.
    as_text: Callable[[Any], str] | None = None
    #: Whether the gallery's filter finds its values without the field's name.
    is_searched: bool = False
    #: Whether None, its default, stays None: it stands for nothing of the model's.
    is_left_open: bool = False
    #: Whether it is a text in the syntax of prompts, which has lines of its own in an infotext.
    is_prompt: bool = False
    #: Whether it belongs to the submission rather than the picture: it is not part of the id.
    is_submission: bool = False
    #: Whether the fleet fills it in at submission, from what the workers announced.
    is_filled_by_fleet: bool = False
    #: Whether whoever submits says it for all jobs, and nobody who writes one: it is no option, no heading of
    #: prompt files, no option of AUTOMATIC1111's, no key of an infotext, and not in a body of the HTTP API.
    is_set_by_producer: bool = False
    #: Whether the first version had it: always part of the id, and in its old place in CSV manifests.
    is_original: bool = False
    #: Version of messages that first had it: see `worker.contract.job.FORMAT_VERSION`. Where only some of its
    #: values came later (a choice, a wider limit), a function of the value that says its version.
    since: int | Callable[[Any], int] = 1


@dataclass(frozen=True, kw_only=True)
class FieldEntry(JobField):
    """A row of the table: the field's `JobField`, and what follows from its annotation and default."""

    #: Its name in `Job`, in JSON, and in tables.
    name: str
    #: One of `KINDS`.
    kind: type
    #: The values it can have, where these are listed.
    choices: tuple[str, ...] = ()
    #: Whether it has to be given.
    is_required: bool = False
    #: Its value where it is not given; None where there is no fixed one.
    default: Any = None
    #: Whether None stands for the model's own default.
    is_nullable: bool = False
    #: Whether its value is made for each job where it is not given, such as a drawn seed.
    is_made: bool = False
    #: The limits of a number, such as "1 to 150"; empty: it has none.
    limits: str = ""

    @property
    def option(self) -> str:
        """Its option on the command line."""
        return f"--{(self.each or self.name).replace('_', '-')}"

    @property
    def is_hashed(self) -> bool:
        """Whether it determines the picture, and so is part of the job's id."""
        return not self.is_submission

    @property
    def is_axis(self) -> bool:
        """Whether a grid can cross its values."""
        return self.is_hashed and not (self.is_required or self.is_filled_by_fleet or self.is_set_by_producer)

    @property
    def is_known_when_resolved(self) -> bool:
        """Whether a submitted job may lack it and a resolved one has it.

        A field that came later is left out at its default, also of a resolved job.
        """
        is_filled = self.is_filled_by_fleet and self.is_original
        return self.is_hashed and (self.is_required or self.is_nullable or self.is_made or is_filled)

    @property
    def all_headings(self) -> tuple[str, ...]:
        """Its other names in tables of prompts, each once."""
        names = dict.fromkeys((*self.headings, self.a1111_option, self.diffusers))
        return tuple(name for name in names if name and name != self.name)


def truth_of(text: str) -> bool | None:
    """Whether a text says yes or no; None for others."""
    return _WORDS.get(text.strip().lower()) if len(text) < 20 else None


def table_of(model: type[BaseModel]) -> Mapping[str, FieldEntry]:
    """The table of a model's fields, by their names. Raises `TypeError` for a field of an unknown type."""
    return MappingProxyType({name: _entry(name, info) for name, info in model.model_fields.items()})


def _entry(name: str, info: FieldInfo) -> FieldEntry:
    declared = next((each for each in info.metadata if isinstance(each, JobField)), JobField())
    kind, is_nullable = _kind(info.annotation)
    is_choice = isinstance(kind, type) and issubclass(kind, StrEnum)
    plain = str if is_choice else kind
    if plain not in KINDS:
        known = ", ".join(each.__name__ for each in KINDS)
        raise TypeError(f"The job field {name} has the type {kind}: use one of {known}, or a StrEnum.")
    if info.default_factory is not None and not declared.is_original:
        # Left out of ids, messages and records at its default, which a factory does not tell.
        raise TypeError(f"The job field {name} has a default_factory: give it a plain default.")
    label = declared.label or name.replace("_", " ").capitalize()
    return FieldEntry(
        **{
            **vars(declared),
            "label": label,
            "infotext": declared.infotext or label,
            "name": name,
            "kind": plain,
            "choices": tuple(map(str, kind)) if is_choice else (),
            "is_required": info.is_required(),
            "default": None if info.default is PydanticUndefined else info.default,
            "is_nullable": is_nullable and not declared.is_left_open,
            "is_made": info.default_factory is not None,
            "limits": limits_of(info.metadata),
        }
    )


def _kind(annotation: Any) -> tuple[Any, bool]:
    """The type without annotations and None; and whether None is a value as well."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _kind(get_args(annotation)[0])
    if origin in (Union, UnionType):
        [kind] = [each for each in get_args(annotation) if each is not NoneType]
        return _kind(kind)[0], True
    if origin is list and not issubclass(get_args(annotation)[0], BaseModel):
        return annotation, False
    return origin or annotation, False


@functools.cache
def help_lines(model: type) -> Mapping[str, str]:
    """The `#:` lines over each field of a class, as one text; those of its bases of our code come first.

    Reads their source.
    """
    packages = {model.__module__.partition(".")[0], "worker", "producer"}
    ours = [base for base in model.__mro__ if base.__module__.partition(".")[0] in packages]
    return MappingProxyType({name: line for base in reversed(ours) for name, line in _lines_in(base).items()})


def _lines_in(model: type) -> dict[str, str]:
    source = textwrap.dedent(inspect.getsource(model))
    lines = source.splitlines()
    [definition] = ast.parse(source).body
    found = {}
    for node in definition.body if isinstance(definition, ast.ClassDef) else ():
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            above = node.lineno - 2
            texts: list[str] = []
            while lines[above].strip().startswith("#:"):
                texts.insert(0, lines[above].strip().removeprefix("#:").strip())
                above -= 1
            found[node.target.id] = " ".join(texts)
    return found


def version_that_has(fields: Mapping[str, Any], entries: Iterable[FieldEntry]) -> int:
    """The first version of messages that has these fields with these values, as JSON has them."""
    versions = [1]
    for entry in entries:
        value = fields.get(entry.name, entry.default)
        if callable(entry.since):
            versions.append(entry.since(value))
        elif value != entry.default:
            versions.append(entry.since)
    return max(versions)
