from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from producer.ingest.download import FIELDS, Downloads, Template, default_template, slug
from producer.ingest.ended import Ended
from producer.ingest.journal import Journal
from producer.prompts.sources import Source
from worker.contract import infotext
from worker.contract.choices import ImageFormat
from worker.contract.errors import PromptFileError
from worker.contract.job import Job
from worker.contract.loras import Lora
from worker.engine.runner import Picture
from worker.jobs.image_file import encode


class FakeBucket:
    """Pictures by address."""

    def __init__(self) -> None:
        self.pictures: dict[str, bytes] = {}

    def put(self, job: Job) -> str:
        uri = f"s3://b/images/{job.id[:2]}/{job.id}.{job.format}"
        shade = np.full((8, 8, 3), job.seed % 256, np.uint8)
        resolved = job.model_copy(
            update={"width": 64, "height": 64, "steps": job.steps or 1, "guidance_scale": 1.0}
        )
        self.pictures[uri] = encode(Picture(shade), job.format, infotext.write(resolved))
        return uri

    def get(self, uri: str) -> bytes:
        return self.pictures[uri]


@pytest.mark.parametrize(
    "text",
    [
        *("../{line}", "/etc/{line}", "a/../../{line}", "{line}\\x", "", "{prompt}", "{line.real}"),
        *("{line!r}", "{", "{line:x y}", "{line:{seed}}"),
    ],
)
def test_a_template_that_leads_out_or_is_not_understood_is_refused(text: str) -> None:
    with pytest.raises(PromptFileError):
        Template(text)


@settings(max_examples=80, deadline=None)
@given(st.text(max_size=80), st.text(max_size=20))
def test_no_value_leads_out_of_the_folder(text: str, model: str) -> None:
    values: dict[str, Any] = dict.fromkeys(FIELDS, text) | {"line": 1, "model": model, "slug": slug(text)}
    name = Template("{file}/{line}-{model}-{slug}-{scheduler}").name(values, "png")
    assert ".." not in name.parts
    assert not name.is_absolute()
    assert len(name.parts) <= 2
    assert len(name.name.encode()) < 255


def test_a_slug_is_the_first_words_of_a_prompt() -> None:
    assert slug("A small, ../cat — 猫!") == "a-small-cat-猫"
    assert len(slug("word " * 100)) <= 60
    assert slug("!?") == ""


def test_pictures_are_saved_once_under_their_names(tmp_path: Path) -> None:
    bucket: Any = FakeBucket()
    jobs = [Job(prompt="a cat", seed=1), Job(prompt="a cat", seed=1, steps=9, format=ImageFormat.WEBP)]
    jobs.append(Job(prompt="a cat", seed=1, steps=7))
    uris = [bucket.put(job) for job in jobs]
    source = Source("p.txt", "txt", "", tmp_path / "p.txt")
    ended = [
        Ended(n, 0, 5, job.id, "done", uri, {}, None, None, False, 1)
        for n, (job, uri) in enumerate(zip(jobs, uris, strict=True))
    ]
    with Journal(tmp_path / "m.jsonl", "run") as journal:
        journal.write(ended)
        for _ in range(2):  # The second time all are there.
            downloads = Downloads(tmp_path / "out", bucket, [source])
            downloads.resume(journal)
            downloads.flush(journal)
            downloads.close()
        paths = [Path(str((journal.result(n) or {})["path"])) for n in range(3)]
    names = {path.name for path in (tmp_path / "out").iterdir()}
    # Two pictures of one name: the id parts them, and none is lost.
    assert "000005-1-a-cat.png" in names
    assert "000005-1-a-cat.webp" in names
    assert len(names) == 3
    assert [path.read_bytes() for path in paths] == [bucket.get(uri) for uri in uris]


def test_a_file_of_the_user_s_own_is_not_overwritten(tmp_path: Path) -> None:
    bucket: Any = FakeBucket()
    job = Job(prompt="a cat", seed=1)
    uri = bucket.put(job)
    (tmp_path / "x.png").write_text("mine")
    downloads = Downloads(tmp_path, bucket, [Source("p.txt", "txt", "", None)], "x.png")
    with Journal(tmp_path / "m.jsonl", "run") as journal:
        downloads.fetch(0, 1, 0, uri)
        downloads.flush(journal)
    downloads.close()
    assert (tmp_path / "x.png").read_text() == "mine"
    assert (tmp_path / f"x-{job.id}.png").read_bytes() == bucket.get(uri)


def test_with_a_grid_all_names_have_its_values() -> None:
    template = default_template(1, ["steps", "guidance_scale", "prompt", "seed"])
    assert template == "{line:06d}-{seed}-{steps}-{guidance_scale}-{slug}.png"
    assert default_template(2, []) == "{file}-{line:06d}-{seed}-{slug}.png"
    values = {"line": 1, "seed": 7, "steps": 20, "guidance_scale": 7.5, "slug": "a-cat"}
    assert str(Template(template).name(values, "png")) == "000001-7-20-7.5-a-cat.png"


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"loras": [Lora(name="pixel")]}, "1-7-pixel-cat.png"),
        ({"loras": [Lora(name="pixel", weight=0.5)]}, "1-7-pixel-0.5-cat.png"),
        (
            {"loras": [Lora(name="a"), Lora(name="b c", weight=-1, text_encoder_weight=0)]},
            "1-7-a+b-c--1-te-0-cat.png",
        ),
        ({"loras": []}, "1-7-cat.png"),
        ({"loras": None, "slug": ""}, "1-7.png"),
        ({"loras": True, "slug": ""}, "1-7-true.png"),
    ],
)
def test_a_value_is_words_in_a_name_and_one_that_is_not_there_is_left_out(
    values: dict[str, Any], name: str
) -> None:
    given = {"line": 1, "seed": 7, "slug": "cat", **values}
    assert str(Template("{line}-{seed}-{loras}-{slug}.png").name(given, "png")) == name


def test_what_an_empty_field_leaves_is_no_dash_in_any_part_of_a_path() -> None:
    values = {"line": 1, "seed": 7, "slug": ""}
    assert str(Template("{slug}-{line}/{slug}/{seed}-{slug}").name(values, "png")) == "1/7.png"
    assert str(Template("x--{slug}{loras}--{line}").name(values, "png")) == "x---1.png"


def test_pictures_that_jobs_begin_with_have_their_files_names_but_in_runs_of_the_first_version(
    tmp_path: Path,
) -> None:
    bucket: Any = FakeBucket()
    reference = f"sha256:{'a' * 64}:64x64"
    uri = bucket.put(Job(prompt="a cat", seed=1, image=reference, steps=10))
    source, named = Source("p.txt", "txt", "", None), {reference: "dog"}
    for as_first in (False, True):
        downloads = Downloads(
            tmp_path, bucket, [source], axes=["image", "loras"], file_of=lambda each: named.get(each, "")
        )
        downloads.as_first = as_first
        with Journal(tmp_path / "m.jsonl", "run") as journal:
            downloads.fetch(0, 1, 0, uri)
            downloads.flush(journal)
        downloads.close()
    assert {path.name for path in tmp_path.glob("*.png")} == {
        "000001-1-dog-a-cat.png",
        f"000001-1-sha256-{'a' * 64}-64x64--a-cat.png",
    }
