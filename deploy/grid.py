"""One PNG of a grid's pictures: `python -m deploy.grid MANIFEST OUTPUT`, after `ingest --grid --download`.

A row for each value of the grid's first field. In it, for each prompt, a column for each combination of the
others. docs/job-fields.md has the command that drew the picture of all schedulers.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from worker.contract.loras import shown_loras

#: Pixels: a cell's side, the gap between two, the column of names, and the two lines over the cells.
CELL, GAP, NAMES, HEAD = 80, 4, 150, 40
#: Colours of the palette: few enough for a page of documents, enough for what the bundled model draws.
COLOURS = 128


def draw(manifest: Path, output: Path) -> tuple[int, int]:
    """Write the PNG. Returns its rows and columns. Paths in the manifest begin in the current folder.

    Raises `ValueError` for a manifest without a grid or without saved pictures.
    """
    lines = [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines()]
    if not all(line.get("grid") for line in lines):
        raise ValueError(f"{manifest} is of a run without a grid: smallcat ingest --grid makes one.")
    done = [line for line in lines if line.get("path")]
    if not done or len(done) < len(lines):
        raise ValueError(
            f"{manifest}: {len(lines) - len(done)} of {len(lines)} lines have no saved picture: "
            "run smallcat ingest again, with --download."
        )
    rows = list(dict.fromkeys(_row(line) for line in done))
    columns = list(dict.fromkeys((line["prompt"], _column(line)) for line in done))
    size = (NAMES + len(columns) * (CELL + GAP), HEAD + len(rows) * (CELL + GAP))
    sheet = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for number, (prompt, values) in enumerate(columns):
        x = NAMES + number * (CELL + GAP)
        if not number or columns[number - 1][0] != prompt:
            pen.text((x, 4), prompt, "black", font)
        pen.text((x, 22), values, "black", font)
    for number, name in enumerate(rows):
        pen.text((4, HEAD + number * (CELL + GAP) + CELL // 2), name, "black", font, anchor="lm")
    for line in done:
        x = NAMES + columns.index((line["prompt"], _column(line))) * (CELL + GAP)
        y = HEAD + rows.index(_row(line)) * (CELL + GAP)
        with Image.open(line["path"]) as picture:
            sheet.paste(picture.convert("RGB").resize((CELL, CELL), Image.Resampling.LANCZOS), (x, y))
    sheet.quantize(COLOURS, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(output, optimize=True)
    return len(rows), len(columns)


def _row(line: dict[str, Any]) -> str:
    return _shown(*next(iter(line["grid"].items())))


def _column(line: dict[str, Any]) -> str:
    return ", ".join(f"{name} {_shown(name, value)}" for name, value in list(line["grid"].items())[1:])


def _shown(name: str, value: Any) -> str:
    """A field's value, each other one as another text: it names its row or column."""
    if name != "loras" or isinstance(value, str):
        return str(value)
    return shown_loras(value) or "none"


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("Use python -m deploy.grid MANIFEST OUTPUT.")
    try:
        print("{} rows, {} columns".format(*draw(*map(Path, sys.argv[1:]))))
    except (OSError, ValueError) as error:
        sys.exit(str(error))
