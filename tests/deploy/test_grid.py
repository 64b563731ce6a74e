"""A grid's pictures as one PNG: each in its cell, and nothing left out in silence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from deploy.grid import CELL, GAP, HEAD, NAMES, draw

COLOURS = {("ddim", 5): "red", ("ddim", 9): "lime", ("lcm", 5): "blue", ("lcm", 9): "black"}


def manifest_in(folder: Path) -> Path:
    lines = []
    for number, ((scheduler, steps), colour) in enumerate(COLOURS.items()):
        Image.new("RGB", (16, 16), colour).save(folder / f"{number}.png")
        grid = {"scheduler": scheduler, "steps": steps}
        lines.append(
            {"prompt": "a cat", "path": str(folder / f"{number}.png"), "state": "done", "grid": grid}
        )
    path = folder / "m.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return path


def test_each_picture_is_in_its_row_and_column(tmp_path: Path) -> None:
    output = tmp_path / "grid.png"
    assert draw(manifest_in(tmp_path), output) == (2, 2)
    with Image.open(output) as picture:
        sheet = picture.convert("RGB")
    middles = [
        (NAMES + column * (CELL + GAP) + CELL // 2, HEAD + row * (CELL + GAP) + CELL // 2)
        for row in range(2)
        for column in range(2)
    ]
    assert [sheet.getpixel(each) for each in middles] == [
        (255, 0, 0),
        (0, 255, 0),
        (0, 0, 255),
        (0, 0, 0),
    ]


def test_each_value_of_loras_has_a_row_of_its_own(tmp_path: Path) -> None:
    path = manifest_in(tmp_path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    half = [{"name": "pixel", "weight": 0.5}]
    for line, loras in zip(
        lines, ([], [{"name": "pixel", "weight": 1.0}], half, {"pixel": 0.5}), strict=True
    ):
        line["grid"] = {"loras": loras}
    path.write_text("\n".join(map(json.dumps, lines)))
    assert draw(path, tmp_path / "grid.png") == (3, 1)


def test_a_job_without_a_picture_and_a_run_without_a_grid_are_said(tmp_path: Path) -> None:
    path = manifest_in(tmp_path)
    done = path.read_text()
    failed = {"prompt": "a cat", "state": "failed", "grid": {"scheduler": "lms", "steps": 5}}
    path.write_text(f"{done}\n{json.dumps(failed)}")
    with pytest.raises(ValueError, match="1 of 5 lines have no saved picture"):
        draw(path, tmp_path / "grid.png")
    path.write_text(f"{done}\n{json.dumps(failed | {'grid': {}})}")
    with pytest.raises(ValueError, match="is of a run without a grid"):
        draw(path, tmp_path / "grid.png")
