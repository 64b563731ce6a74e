"""Prompt files whose lines name pictures: by paths below the file, stored once, the same at each reading."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from producer.ingest.pictures import Pictures
from producer.ingest.plan import Plan, Planned, Rejected, unresolved
from producer.ingest.submit_file import make_plan, make_variants
from producer.session import session
from tests.producer.test_pictures import CUT_OUT, PHOTO, bucket_of, environment, file_of, inputs_in
from worker.contract.errors import InvalidJobError

__all__ = ["environment"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two pictures, in the working folder."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "photo.jpg").write_bytes(file_of(PHOTO, "JPEG"))
    (tmp_path / "in" / "shoe.png").write_bytes(file_of(CUT_OUT))
    (tmp_path / "outside.png").write_bytes(file_of(PHOTO))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "in"


def reference(path: Path) -> str:
    return f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}:80x64"


def plan_of(
    file: Path,
    fields: Mapping[str, Any] | None = None,
    grid: Mapping[str, Any] | None = None,
    tenant: str = "",
) -> Plan:
    pictures = Pictures(session(), tenant)
    variants = make_variants(fields or {}, 1, 5, grid or {}, None, None, literal=False, pictures=pictures)
    return make_plan([str(file)], file_format=None, variants=variants, tenant=tenant, pictures=pictures)


def items(plan: Plan) -> list[Planned | Rejected]:
    return list(plan.items(unresolved))


def shapes(plan: Plan) -> list[Mapping[str, Any]]:
    found = items(plan)
    assert all(isinstance(each, Planned) for each in found), found
    return [each.templated.shape for each in found if isinstance(each, Planned)]


def test_a_column_names_pictures_below_the_file(environment: dict[str, str], folder: Path) -> None:
    file = folder / "prompts.csv"
    file.write_text(
        "prompt,image,mask,denoising strength\na cat,photo.jpg,,0.5\na dog,shoe.png,alpha,\nno picture,,,\n"
    )
    plan = plan_of(file)
    first, second, third = shapes(plan)
    assert (first["image"], first["strength"]) == (reference(folder / "photo.jpg"), 0.5)
    assert (second["image"], second["mask"], second["width"]) == (reference(folder / "shoe.png"), "alpha", 80)
    assert "image" not in third
    assert shapes(plan) == [first, second, third]
    bucket = bucket_of(environment)
    assert inputs_in(bucket) == {}, "reading stores nothing"
    assert plan.pictures is not None
    plan.pictures.store([first, second, third])
    plan.pictures.store([first])
    assert sorted(inputs_in(bucket).values()) == sorted(
        (folder / name).read_bytes() for name in ("photo.jpg", "shoe.png")
    )


def test_a_line_whose_picture_is_wrong_is_rejected_and_stays_so(
    environment: dict[str, str], folder: Path
) -> None:
    file = folder / "prompts.csv"
    rows = ["nothing.png", "../outside.png", "/etc/hostname", "prompts.csv", "photo.jpg"]
    file.write_text("prompt,image\n" + "".join(f"a cat,{each}\n" for each in rows))
    plan = plan_of(file)
    found = items(plan)
    assert [getattr(each, "reason", "")[:44] for each in found] == [
        "image is 'nothing.png': there is no such fil",
        "image is '../outside.png', which is outside ",
        "image is '/etc/hostname', which is outside t",
        "image is no picture that is read: give a PNG",
        "",
    ]
    assert [each.field for each in found if isinstance(each, Rejected)] == ["image"] * 4
    # Whatever becomes of the files, this process' run has the same lines.
    (folder / "nothing.png").write_bytes(file_of(PHOTO))
    (folder / "photo.jpg").unlink()
    assert items(plan) == found
    assert plan.pictures is not None
    plan.pictures.store([each.templated.shape for each in found if isinstance(each, Planned)])
    assert inputs_in(bucket_of(environment)) == {}


def test_options_are_for_all_lines_and_axes_of_grids(environment: dict[str, str], folder: Path) -> None:
    file = folder / "prompts.txt"
    file.write_text("a cat\n")
    [shape] = shapes(plan_of(file, {"image": "in/shoe.png", "mask": "outside.png", "padding": 8}))
    assert shape["image"] == reference(folder / "shoe.png")
    plan = plan_of(file, {"strength": 0.5}, {"image": ["in/shoe.png", str(folder / "photo.jpg")]}, "acme")
    crossed = shapes(plan)
    assert [each["image"] for each in crossed] == [reference(folder / n) for n in ("shoe.png", "photo.jpg")]
    assert plan.pictures is not None
    plan.pictures.store(crossed)
    assert {key.rpartition("/")[0] for key in inputs_in(bucket_of(environment))} == {"inputs/tenants/acme"}
    with pytest.raises(InvalidJobError, match=r"image is 'none\.png': there is no such file"):
        plan_of(file, {"image": "none.png"})
    with pytest.raises(InvalidJobError, match="mask_blur is 65"):
        plan_of(file, {"mask_blur": 65})


@pytest.mark.parametrize("form", [lambda it: it, np.asarray, file_of, lambda it: io.BytesIO(file_of(it))])
def test_an_option_may_be_a_picture_in_any_form(
    environment: dict[str, str], folder: Path, form: Callable[[Image.Image], Any]
) -> None:
    file = folder / "prompts.txt"
    file.write_text("a cat\n")
    plan = plan_of(file, {"image": form(PHOTO), "mask": form(Image.new("L", PHOTO.size, 255))})
    assert plan.pictures is not None
    plan.pictures.store(shapes(plan))
    stored = inputs_in(bucket_of(environment))
    named = {shapes(plan)[0][name].split(":")[1] for name in ("image", "mask")}
    assert {key.rpartition("/")[2] for key in stored} == named


def test_a_mask_for_all_is_stored_beside_each_lines_picture(
    environment: dict[str, str], folder: Path
) -> None:
    file = folder / "prompts.jsonl"
    file.write_text('{"prompt": "a cat", "image": "photo.jpg"}\n')
    plan = plan_of(file, {"mask": "outside.png"})
    assert plan.pictures is not None
    plan.pictures.store(shapes(plan))
    assert len(inputs_in(bucket_of(environment))) == 2


def test_without_a_reader_of_pictures_lines_name_references_alone(
    environment: dict[str, str], folder: Path
) -> None:
    """As over HTTP: an uploaded file must not name the server's own files."""
    file = folder / "prompts.csv"
    file.write_text(
        f"prompt,image\na cat,photo.jpg\na cat,s3://b/k\na cat,{reference(folder / 'photo.jpg')}\n"
    )
    variants = make_variants({}, 1, 5, {}, None, None, literal=False)
    found = items(make_plan([str(file)], file_format=None, variants=variants))
    assert [isinstance(each, Rejected) for each in found] == [True, True, False]
    assert "image is no reference" in getattr(found[0], "reason", "")
