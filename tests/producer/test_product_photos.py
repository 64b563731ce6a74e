"""docs/product_photos.py: a picture for each cut-out and prompt, and a manifest that says what is missing."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from producer.cli import main as command_line
from tests.docs import ROOT
from tests.producer.test_client import client, environment, finish, fleet, records, storage
from tests.producer.test_pictures import CUT_OUT, PHOTO, inputs_in
from worker.contract.errors import StorageError
from worker.state.records import Records
from worker.storage.bucket import Bucket

__all__ = ["client", "environment", "fleet", "records", "storage"]

PROMPTS = ("a {name} on marble", "a {name} in snow")


def test_each_cut_out_is_before_each_background_and_the_manifest_says_which(
    fleet: Any,
    records: Records,
    storage: Bucket,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    script = runpy.run_path(str(ROOT / "docs" / "product_photos.py"))
    folder, photos = tmp_path / "cut-outs", tmp_path / "out" / "photos"
    folder.mkdir()
    CUT_OUT.save(folder / "red-sneaker.png")
    PHOTO.save(folder / "table.WebP", lossless=True)
    PHOTO.save(folder / "chair.jpg")
    (folder / "notes.txt").write_text("no picture")

    def run() -> int:
        monkeypatch.setattr(sys, "argv", ["product_photos.py", str(folder), str(photos), *PROMPTS])
        return int(script["main"]())

    # A worker that is done with what is asked of it.
    wait = script["JobHandle"].result

    def result(handle: Any, timeout: float | None = None) -> Any:
        if not (record := handle.record()).state.is_final:
            finish(records, storage, record.job)
        return wait(handle, timeout)

    monkeypatch.setattr(script["JobHandle"], "result", result)
    for _ in range(2):
        assert run() == 1
    said = capsys.readouterr()
    assert said.out.splitlines() == [f"2 of 6 pictures are in {photos}"] * 2
    reason = (
        "mask is alpha, and no pixel of the image is transparent: give a mask, or save the cut-out as PNG or "
        "WebP with a transparent background, which a JPEG cannot have."
    )
    of_a_run = [f"{name}: {reason}" for name in ("chair.jpg", "table.WebP") for _ in PROMPTS]
    assert said.err.splitlines() == of_a_run * 2
    lines = [json.loads(line) for line in (photos / "manifest.jsonl").read_text().splitlines()]
    assert [(each["image"], each["prompt"], each["state"]) for each in lines] == [
        ("chair.jpg", "a chair on marble", "rejected"),
        ("chair.jpg", "a chair in snow", "rejected"),
        ("red-sneaker.png", "a red sneaker on marble", "done"),
        ("red-sneaker.png", "a red sneaker in snow", "done"),
        ("table.WebP", "a table on marble", "rejected"),
        ("table.WebP", "a table in snow", "rejected"),
    ]
    for number, line in enumerate(lines[2:4], 1):
        job = records.get(line["id"]).job
        assert (job.mask, job.priority, job.seed, job.strength) == ("alpha", 3, 1, 1.0)
        assert line["path"] == str(photos / f"red-sneaker-{number}.png")
        assert Path(line["path"]).read_bytes() == storage.get(line["uri"])
    assert len(inputs_in(storage)) == 1
    before = (photos / "manifest.jsonl").read_text()

    def no_bucket(handle: Any, timeout: float | None = None) -> Any:
        raise StorageError("The bucket is out of reach.")

    monkeypatch.setattr(script["JobHandle"], "result", no_bucket)
    with pytest.raises(StorageError):
        run()
    assert (photos / "manifest.jsonl").read_text() == before
    page = CliRunner().invoke(command_line.cli, ["gallery", str(photos / "manifest.jsonl")])
    assert page.exit_code == 0, page.output
