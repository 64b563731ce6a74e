"""Random prompt files with the peculiarities of real ones, and options of `ingest`: to compare readings."""

from __future__ import annotations

import gzip
import json
import math
import random
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

PROMPTS = (
    *("a cat", 'a "red" cat', 'a 5" pipe', "it's", "a cat --steps 3", "a cat \u2014 steps 3", "--steps 3"),
    *(
        '--prompt "a dog" --steps 12',
        "--prompt a dog --cfg_scale 5 --seed -1 --batch_size 2",
        "--prompt x --seed",
    ),
    *("--prompt 'x y' --negative_prompt bad --sampler_name \"Euler a\" --n_iter 2", "--prompt x --stpes 3"),
    *(
        "--prompt x --styles abc --tiling true",
        "-- prompt",
        "--",
        "\u2014prompt x",
        "# comment",
        "none",
        "NaN",
    ),
    *(
        "null",
        "<NA>",
        "",
        "   ",
        "\u200b",
        "\u200b x",
        "\ufeffa",
        "{red|blue} cat",
        "a {2$$a|b|c}",
        "{3::x|y}",
    ),
    *(
        "a {1-2$$ and $$a|b}",
        "__colour__ car",
        "__co*__ x",
        "__none__",
        "\\{a|b\\}",
        "\\__x__ y",
        "{a}",
        "a # b",
    ),
    *("{a|{b|c}}", "${c=!{a|b}} ${c}", "{|}", "{", "}", "{a|b", "a||b", "a,b;c\td|e", "\xe9t\xe9 \u732b"),
    *(
        "a\u2028b",
        "a\x0bb",
        "a\x01b",
        "x" * 2001,
        "(a:1.3) <lora:x:1>",
        "a\rb",
        "'",
        '"',
        '""',
        "=1+1",
        "prompt",
    ),
)
COLUMNS = (
    *(
        "prompt",
        "Prompt",
        " text",
        "caption",
        "positive prompt",
        "negative_prompt",
        "Negative-Prompt",
        "neg_prompt",
    ),
    *(
        "seed",
        "random_seed",
        "Steps",
        "num_inference_steps",
        "sampling steps",
        "cfg",
        "CFG Scale",
        "guidance",
    ),
    *("guidance_scale", "sampler", "scheduler", "Sampler Name", "schedule type", "w", "h", "width"),
    *("height", "Size", "model", "sd_model", "revision", "format", "priority", "metadata", "artist"),
    *("stpes", "promt", "batch_size", "guidance_start", "guidance_stop", "numInferenceSteps", "clip_skip"),
    *("", "file", "id"),
)
#: Values by the kind of column: those of odd files, and those that all readings take.
ODD: dict[str, tuple[str, ...]] = {
    "integer": (
        "7",
        " 20 ",
        "20.0",
        "20.5",
        "-1",
        "-2",
        "+5",
        "1e1",
        "many",
        "",
        "null",
        "nan",
        "9" * 31,
        "7,5",
    ),
    "number": ("7.5", "7", "7,5", "1e1", "nan", "inf", "", "-0.0", "31", ".5", "5.", "1_0", "none", "0.5"),
    "scheduler": (
        "euler",
        "Euler a",
        "EULER_A",
        "DPM++ 2M Karras",
        "dpmpp 2m k",
        "k_euler",
        "heun",
        "",
        " lcm ",
    ),
    "format": ("png", "PNG", "jpg", "webp", "avif", ""),
    "object": ('{"a": 1}', '[["a", 1]]', "[]", '"x"', "5", "{", '{"a": NaN}', '{"a": {"b": [1, null]}}', ""),
    "text": ("x", "", " y ", "none", 'a"b', "a,b", "\xe9"),
}
PLAIN: dict[str, tuple[str, ...]] = {
    "integer": ("64", "128", "8", "20", ""),
    "number": ("0.5", "1", "0.25", ""),
    "scheduler": ("euler", "Euler a", "k_euler"),
    "format": ("png", "jpg", ""),
    "object": ('{"a": "1"}', ""),
    "text": ("x", "", " y "),
}
_KINDS = {
    **dict.fromkeys(
        ("seed", "random_seed", "steps", "num_inference_steps", "sampling_steps", "w"), "integer"
    ),
    **dict.fromkeys(("h", "width", "height", "priority", "batch_size", "numinferencesteps"), "integer"),
    **dict.fromkeys(("cfg", "cfg_scale", "guidance", "guidance_scale", "guidance_start"), "number"),
    **dict.fromkeys(("sampler", "scheduler", "sampler_name", "schedule_type"), "scheduler"),
    **dict.fromkeys(
        ("prompt", "positive_prompt", "negative_prompt", "neg_prompt", "text", "caption"), "prompt"
    ),
    "guidance_stop": "number",
    "format": "format",
    "metadata": "object",
}
_OPTIONS = {
    "--scheduler": ("Euler a", "euler", "DPM++ 2M Karras"),
    "--negative-prompt": ("none", "", " bad ", "x {a|b}"),
    "--guidance-scale": ("7", "7.5"),
    "--steps": ("9",),
    "--model": (" m ",),
    "--metadata": ('{"a": 1}',),
    "--seed-start": ("5",),
    "--sample": ("2",),
    "--images": ("2", "3"),
    "--grid": ("steps=3,4", "scheduler=Euler a,euler", "negative-prompt=a ,b", "guidance_scale=5,7.5"),
}


def write_files(folder: Path, count: int, seed: int, rows: int = 30) -> None:
    """Write `count` files of up to `rows` rows, a folder of wildcards, and `words.json`.

    `words.json` has for each file the options that `ingest` is called with.
    """
    files = _Files(random.Random(seed), rows)
    (folder / "wildcards").mkdir(parents=True)
    (folder / "wildcards" / "colour.txt").write_text(
        "red\n# no\n2::blue\n{light|dark} green\n__size__ grey\n"
    )
    (folder / "wildcards" / "size.txt").write_text("big\nsmall\n")
    words = {}
    for number in range(count):
        name = f"{number:03}.{files.rng.choice(('txt', 'csv', 'csv', 'tsv', 'jsonl', 'jsonl', 'parquet'))}"
        files.write(folder / name)
        words[name] = files.words()
    (folder / "words.json").write_text(json.dumps(words))


class _Files:
    """Draws files."""

    def __init__(self, rng: random.Random, rows: int) -> None:
        self.rng, self._rows = rng, rows

    def words(self) -> list[str]:
        """Options of the command."""
        words = ["--literal"] if self.rng.random() < 0.15 else []
        for option, values in _OPTIONS.items():
            if self.rng.random() < 0.15:
                words += [option, self.rng.choice(values)]
        return words

    def write(self, path: Path) -> None:
        """Write one file in the format of its ending."""
        match path.suffix:
            case ".parquet":
                self._write_parquet(path)
            case ".txt":
                path.write_bytes(self._encoded([self.rng.choice(PROMPTS) for _ in range(self._count())]))
            case ".jsonl":
                path.write_bytes(self._encoded(self._objects()))
            case ".tsv":
                path.write_bytes(self._encoded(self._table("\t")))
            case _:
                path.write_bytes(self._encoded(self._table(self.rng.choice((",", ",", ",", ";", "|")))))

    def _count(self) -> int:
        return self.rng.randint(0, self._rows)

    def _columns(self) -> list[str]:
        columns = self.rng.sample(COLUMNS, self.rng.randint(0, 6))
        if self.rng.random() < 0.95:
            name = self.rng.choice(("prompt", "Prompt", "text", "caption"))
            columns.insert(self.rng.randint(0, len(columns)), name)
        return columns

    def _value(self, column: str, *, plain: bool) -> str:
        kind = _KINDS.get(column.strip().lower().replace(" ", "_").replace("-", "_"), "text")
        return self.rng.choice(PROMPTS if kind == "prompt" else (PLAIN if plain else ODD)[kind])

    def _cell(self, text: str, delimiter: str) -> str:
        how = self.rng.random()
        if how > 0.15 and (how > 0.9 or any(each in text for each in f'"\n\r{delimiter}')):
            return '"' + text.replace('"', '""') + '"'
        return text  # In some files also where quotes are needed.

    def _table(self, delimiter: str) -> list[str]:
        columns, plain = self._columns(), self.rng.random() < 0.7
        lines = [delimiter.join(columns)]
        odd_lines = ("", "  ", delimiter * 3, '"', '"open', 'x"y', f'"a\nb"{delimiter}', "sep=;")
        for _ in range(self._count()):
            cells = [self._cell(self._value(each, plain=plain), delimiter) for each in columns]
            more = self.rng.choice((*[[]] * 18, ["", ""], ["more"]))
            lines.append(delimiter.join([*(cells[:-1] if self.rng.random() < 0.1 else cells), *more]))
            if self.rng.random() < 0.1:
                lines.append(self.rng.choice(odd_lines))
        return lines

    def _objects(self) -> list[str]:
        columns, plain = self._columns(), self.rng.random() < 0.7
        odd_lines = (
            "",
            " ",
            "{}",
            "[]",
            "5",
            "null",
            "{",
            '{"prompt": "x", "prompt": "y"}',
            "NaN",
            "[" * 2000,
        )
        lines = []
        for _ in range(self._count()):
            how, names = self.rng.random(), self.rng.random() < 0.5
            if how < 0.15:
                lines.append(json.dumps(self.rng.choice(PROMPTS), ensure_ascii=names))
            elif how < 0.2:
                lines.append(self.rng.choice(odd_lines))
            else:
                values = {"prompt": self.rng.choice(PROMPTS)} | {
                    each: self._json(each, plain=plain) for each in columns if each in _KINDS or not plain
                }
                lines.append(json.dumps(values, ensure_ascii=names))
        return lines

    def _json(self, column: str, *, plain: bool) -> Any:
        kind = _KINDS.get(column, "text")
        odd = (20.0, 20.5, -1, -2, True, None, math.nan, math.inf, 10**40, [1], {"a": [1, {"b": None}]}, "7")
        if kind == "object":
            return self.rng.choice(({}, {"a": {"b": [1, None, "\xe9"]}}, None, "x", [["a", 1]]))
        if kind in ("integer", "number"):
            return self.rng.choice((64, 128, 8, None) if plain else odd)
        return self.rng.choice(odd) if self.rng.random() < 0.05 else self._value(column, plain=plain)

    def _encoded(self, lines: list[str]) -> bytes:
        end = self.rng.choice(("\n", "\n", "\n", "\n", "\r\n", "\r"))
        text = end.join(lines) + (end if self.rng.random() < 0.7 else "")
        data, how = text.encode(), self.rng.random()
        if how < 0.1:
            return text.encode("utf-16")
        if how < 0.2:
            return b"\xef\xbb\xbf" + data
        if how < 0.27:
            return text.encode("latin-1", "replace")
        if how < 0.32:
            return gzip.compress(data, mtime=0)
        return self.rng.choice((b"BZh", b"Rar!", b"%PDF")) + data if how < 0.35 else data

    def _write_parquet(self, path: Path) -> None:
        import pyarrow
        import pyarrow.parquet

        size, columns = self._count(), {}
        for name in dict.fromkeys(self._columns()):
            kind = self.rng.choice(("text", "text", "text", "number", "integer", "other", "bytes"))
            other = self.rng.choice(
                ([1, None], {"a": 1}, datetime(2026, 1, 2, tzinfo=UTC), True, Decimal("7.5"))
            )
            values = [self._parquet_value(name, kind, other) for _ in range(size)]
            array = pyarrow.array([None if self.rng.random() < 0.15 else each for each in values])
            is_text = pyarrow.types.is_string(array.type)
            columns[name] = array.dictionary_encode() if is_text and self.rng.random() < 0.2 else array
        pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=self.rng.choice((3, 1000)))

    def _parquet_value(self, column: str, kind: str, other: object) -> object:
        match kind:
            case "integer":
                return self.rng.choice((64, 128, 20, 8, -1))
            case "number":
                return self.rng.choice((64.0, 20.0, 0.5, 7.5, math.nan, -1.0, math.inf))
            case "other":
                return other
        text = self._value(column, plain=self.rng.random() < 0.7)
        return text.encode() if kind == "bytes" else text
