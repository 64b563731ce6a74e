"""A folder of wildcards: the alternatives that `__name__` means, from text, JSON and YAML files.

    colours.txt              __colours__            a line each; lines that begin with # are comments
    animals/small.txt        __animals/small__      __animals/*__ is all below animals, __**/small__ all small
    clothes.yaml, .json      __hats/red__           objects of lists, whose keys are the name
                             __clothes__            where the file is a list itself (JSON, YAML)

As in the package dynamicprompts 0.31: values of all files that match are sorted, each is there once, and a
name that matches nothing is searched for in all folders. Weights (`2::red`, or `{"text": ..., "weight": 2}`)
are for JSON and YAML; in a text file they are text.
"""

from __future__ import annotations

import codecs
import fnmatch
import hashlib
import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from producer.prompts.dynamic_prompts import MAX_WEIGHT, Template, parse
from producer.prompts.entries import LineError
from worker.contract.explain import short

#: The files of a folder that are read.
ENDINGS = (".txt", ".json", ".yaml")
#: Bytes in a file of wildcards, at most.
MAX_FILE = 64 << 20
#: Names and values that a JSON or YAML file may hold, at most.
MAX_VALUES = 1_000_000
#: Lists and objects in one another in a YAML file, at most.
MAX_LEVELS = 100

_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_LINE_END = re.compile(r"\r\n|\r|\n")
_WEIGHT = re.compile(r"(\d+\.?\d*|\.\d+)::")


class Wildcards:
    """A folder of wildcards. Each file is read once, when a name needs it."""

    def __init__(self, folder: Path | None) -> None:
        """Without a folder every wildcard is a `LineError`."""
        self._folder = folder
        self._index: _Index | None = None
        self._known: dict[str, tuple[tuple[Template, float], ...]] = {}
        self._notices: dict[str, bool] = {}

    @property
    def folder(self) -> Path | None:
        """Where the files are."""
        return self._folder

    @property
    def digest(self) -> str:
        """A hash over all files, 32 hexadecimal digits; it is part of a run's identity."""
        return self.digest_of(*ENDINGS)

    def digest_of(self, *endings: str) -> str:
        """A hash over the files with these endings."""
        digest = hashlib.blake2b(digest_size=16)
        for path in sorted(self._folder.rglob("*")) if self._folder else ():
            if path.suffix in endings and path.is_file():
                data = path.read_bytes()
                digest.update(f"{path.relative_to(self._folder or path)}\0{len(data)}\0".encode() + data)
        return digest.hexdigest()

    def notice(self, text: str) -> None:
        """Have `notices` return a sentence, once."""
        self._notices.setdefault(text, True)

    def notices(self) -> list[str]:
        """Sentences about files that were read since the last call: what may not be meant so."""
        if not self._notices:
            return []
        new = [text for text, is_new in self._notices.items() if is_new]
        self._notices.update(dict.fromkeys(new, False))
        return new

    def values(self, name: str) -> tuple[tuple[Template, float], ...]:
        """The values that `__name__` means, sorted, with their weights. Raises `LineError`."""
        if name not in self._known:
            self._known[name] = self._read(name)
        return self._known[name]

    def _read(self, name: str) -> tuple[tuple[Template, float], ...]:
        shown = name if len(name) <= 60 else f"{name[:60]}..."
        if self._folder is None:
            raise _error(
                shown, f"it needs a folder of wildcards: add --wildcards DIR, or write \\__{shown}\\__."
            )
        pattern = re.sub(r"[\\/]+", "/", name).strip("/")
        if ".." in pattern:
            raise _error(shown, "it leads out of the folder of wildcards.")
        if self._index is None:
            self._index = _Index(self._folder)
        weights: dict[str, float] = {}
        # A name that has no values is searched for in all folders.
        for each in (pattern, f"**/{pattern}"):
            if not weights and (each == pattern or not pattern.startswith("**")):
                for source in self._index.matching(each, shown):
                    for text, weight in source if isinstance(source, list) else self._lines(source, shown):
                        weights[text] = weights.get(text, 0.0) + weight
        for said in (*self._index.broken, *self._index.left_out):
            self.notice(said)
        if not weights:
            broken = "".join(f" {each}" for each in self._index.broken[:1])
            raise _error(
                shown,
                f"there is no {shown}.txt with a line in it in {self._folder}: write it, or name another "
                f"folder with --wildcards.{broken}",
            )
        return tuple((_parsed(text, shown), weights[text]) for text in sorted(weights))

    def _lines(self, path: Path, shown: str) -> Iterator[tuple[str, float]]:
        for each in _LINE_END.split(_text_of(path, shown)):
            line = each.strip()
            if line and not line.startswith("#"):
                if _WEIGHT.match(line):
                    self.notice(
                        f'{path}: "{line[:40]}" is text with its number, as in dynamicprompts: weights are '
                        "for YAML and JSON files."
                    )
                yield line, 1.0


class _Index:
    """The names in a folder."""

    def __init__(self, folder: Path) -> None:
        #: A text file, or the values themselves, by their name.
        self._names: dict[str, Path | list[tuple[str, float]]] = {}
        #: Names that are links to a place outside.
        self._outside: list[str] = []
        #: What is wrong with files that cannot be read.
        self.broken: list[str] = []
        #: What of files that can be read is no value.
        self.left_out: list[str] = []
        root = folder.resolve()
        for where, folders, files in os.walk(root):
            for each in list(folders):
                path = Path(where, each)
                if each.startswith(".") or path.is_symlink():
                    folders.remove(each)
                    if not path.resolve().is_relative_to(root):
                        self._outside.append(f"{path.relative_to(root).as_posix()}/")
            folders.sort()
            for each in sorted(files):
                self._add(Path(where, each), root)

    def matching(self, pattern: str, shown: str) -> list[Path | list[tuple[str, float]]]:
        """What the names that match have. Raises `LineError` where one is a link out of the folder."""
        for each in self._outside:
            if fnmatch.fnmatchcase(each, pattern) or (each.endswith("/") and pattern.startswith(each)):
                raise _error(
                    shown, f"{each} is a link that leads out of the folder of wildcards, or nowhere: copy it."
                )
        if pattern in self._names:
            return [self._names[pattern]]
        return [source for name, source in self._names.items() if fnmatch.fnmatchcase(name, pattern)]

    def _add(self, path: Path, root: Path) -> None:
        name = path.relative_to(root).with_suffix("").as_posix()
        if path.suffix not in ENDINGS:
            return
        if not path.resolve().is_relative_to(root):
            self._outside.append(name)
        elif path.suffix == ".txt":
            self._names[name] = path
        else:
            try:
                data = _structured(path)
                prefix = name.rpartition("/")[0]
                odd: list[object] = []
                if isinstance(data, list):
                    odd += [text for text in data if text is not None and not isinstance(text, str)]
                    self._names[name] = [(text, 1.0) for text in data if text and isinstance(text, str)]
                elif isinstance(data, dict):
                    self._names.update(_named(data, [prefix] if prefix else [], [0], odd))
                if odd:
                    shown = ", ".join(_as_written(each) for each in odd[:3])
                    more = f" and {len(odd) - 3:,} more" if len(odd) > 3 else ""
                    no, are = (
                        ("is no text, or has", "is") if len(odd) == 1 else ("are no texts, or have", "are")
                    )
                    # YAML reads these as true and false.
                    has_bool = path.suffix == ".yaml" and any(isinstance(each, bool) for each in odd)
                    self.left_out.append(
                        f"{path}: {shown}{more} {no} no weight above 0, and {are} left out: put quotes "
                        f"around texts{', also around yes, no, on and off' if has_bool else ''}."
                    )
            except LineError as error:
                self.broken.append(error.reason)


def _structured(path: Path) -> Any:
    text = _text_of(path, path.name)
    try:
        return json.loads(text) if path.suffix == ".json" else _yaml(path, text)
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise _error(path.name, f"{path} cannot be read: {reason}.") from None


def _yaml(path: Path, text: str) -> Any:
    try:
        import yaml
    except ImportError:
        raise _error(path.name, "YAML files need PyYAML: pip install 'smallcat[yaml]'.") from None
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        _refuse_bomb(yaml.parse(text, loader))
        return yaml.load(text, loader)  # noqa: S506 - a safe loader
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None


def _as_written(value: object) -> str:
    """A value as JSON, which is nearly as its file has it: 60 characters at most."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except (TypeError, ValueError, RecursionError):  # Days as names, which JSON has not; huge numbers.
        return short(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _refuse_bomb(events: Iterator[Any]) -> None:
    """Raise `ValueError` where a YAML file becomes too much: a few lines may stand for any number of values.

    Its events come one by one; loading it takes a level of the stack for each of its own.
    """
    #: Values and levels of each anchor's collection, once it is closed.
    known: dict[str, tuple[int, int]] = {}
    #: The anchor, values and levels of each open collection; the first is the file.
    is_open: list[tuple[str | None, int, int]] = [(None, 0, 0)]
    for event in events:
        kind = type(event).__name__
        if kind in ("SequenceStartEvent", "MappingStartEvent"):
            is_open.append((event.anchor, 0, 0))
            if len(is_open) > MAX_LEVELS:
                raise ValueError(f"it is nested deeper than {MAX_LEVELS} levels")
            continue
        if kind in ("SequenceEndEvent", "MappingEndEvent"):
            anchor, values, levels = is_open.pop()
            levels += 1
        elif kind == "AliasEvent":
            if event.anchor not in known:
                raise ValueError(f"{event.anchor} is in itself, or not there")
            anchor, (values, levels) = None, known[event.anchor]
        elif kind == "ScalarEvent":
            anchor, values, levels = event.anchor, 1, 0
        else:
            continue
        if anchor is not None:
            known[anchor] = values, levels
        around, sum_of, deepest = is_open[-1]
        is_open[-1] = around, sum_of + values + 1, max(deepest, levels)
        if is_open[-1][1] > MAX_VALUES:
            raise ValueError(f"it stands for more than {MAX_VALUES:,} values")
        if len(is_open) + max(deepest, levels) > MAX_LEVELS:
            raise ValueError(f"it is nested deeper than {MAX_LEVELS} levels")


def _named(
    data: dict[Any, Any], prefix: list[str], seen: list[int], odd: list[object]
) -> Iterator[tuple[str, list[tuple[str, float]]]]:
    """The lists of a JSON or YAML object by their names; what is no list, text or object goes to `odd`."""
    for key, value in data.items():
        seen[0] += 1
        # A few lines of YAML may stand for any number of objects.
        if seen[0] > MAX_VALUES or len(prefix) > 100:
            raise _error("/".join(prefix)[:60], f"it has more than {MAX_VALUES:,} names, or too deep ones.")
        if not isinstance(key, str) or not value:
            continue
        path = [*prefix, key]
        if isinstance(value, dict):
            yield from _named(value, path, seen, odd)
        elif isinstance(value, str | list):
            seen[0] += len(value) if isinstance(value, list) else 1
            yield "/".join(path), [item for each in _list(value) for item in _item(each, odd)]
        else:
            odd.append(value)


def _list(value: str | list[Any]) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _item(item: Any, odd: list[object]) -> Iterator[tuple[str, float]]:
    text, weight = item, 1.0
    if isinstance(item, str):
        before, mark, behind = item.rpartition("::")
        if item[:1].isdigit() and mark and not math.isnan(number := _number(before)):
            text, weight = behind, number
    elif isinstance(item, dict):
        text, weight = item.get("text") or item.get("content"), _number(item.get("weight", 1))
    if isinstance(text, str) and 0 < weight <= MAX_WEIGHT:
        if text:
            yield text, weight
    elif item is not None:
        odd.append(item)


def _number(value: object) -> float:
    """A number, also where it is a text; NaN for what is none."""
    try:
        return float(value) if isinstance(value, int | float | str) else math.nan
    except (ValueError, OverflowError):
        return math.nan


def _text_of(path: Path, shown: str) -> str:
    try:
        if not path.is_file():
            raise _error(shown, f"{path} is no file.")
        if path.stat().st_size > MAX_FILE:
            raise _error(shown, f"{path} has more than {MAX_FILE >> 20} MiB, the limit: split it.")
        data = path.read_bytes()
        return data.decode("utf-16" if data.startswith(_UTF16) else "utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise _error(shown, f"{path} cannot be read: {error}.") from None


def _parsed(text: str, shown: str) -> Template:
    try:
        return parse(text)
    except LineError as error:
        raise _error(shown, f"its line {text[:60]!r} cannot be read. {error.reason}") from None


def _error(name: str, reason: str) -> LineError:
    return LineError("prompt", f"The wildcard {name}: {reason}")
