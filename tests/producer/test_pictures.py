"""`submit_job` with pictures: in every form in which Python has them, checked, and stored once."""

from __future__ import annotations

import hashlib
import io
import re
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from redis import Redis

from producer import JobHandle, submit_file, submit_job
from tests.producer.test_client import client, environment, finish, fleet, messages, records
from tests.worker.engine.fake_runner import job_of
from worker.contract.errors import InvalidJobError, StorageError
from worker.contract.given_picture import Reach, read_given
from worker.contract.input_reference import MAX_INPUT_BYTES
from worker.contract.job import Job
from worker.contract.record import State
from worker.state.records import Records
from worker.storage.bucket import Bucket

__all__ = ["client", "environment", "fleet", "records"]

PHOTO = Image.effect_noise((80, 64), 60).convert("RGB")
CUT_OUT = PHOTO.convert("RGBA")
CUT_OUT.putalpha(Image.linear_gradient("L").resize(PHOTO.size))
FIELDS: dict[str, Any] = {"seed": 1, "steps": 4}


def file_of(image: Image.Image, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def bucket_of(environment: dict[str, str]) -> Bucket:
    return Bucket(environment["S3_BUCKET"])


def inputs_in(bucket: Bucket) -> dict[str, bytes]:
    """What jobs begin with in a bucket, by key."""
    found = {uri.split("/", 3)[3]: uri for uri, _ in bucket.below(bucket.root)}
    return {key: bucket.get(uri) for key, uri in found.items() if key.startswith("inputs/")}


def job(handle: JobHandle) -> Job:
    return handle.record().job


def test_a_picture_in_any_form_is_an_input_by_its_content(
    environment: dict[str, str], fleet: Any, client: Redis, tmp_path: Path
) -> None:
    data = file_of(PHOTO, "JPEG")
    (tmp_path / "photo.png").write_bytes(data)
    bucket = bucket_of(environment)
    bucket._client.put_object(Bucket=bucket.name, Key="elsewhere/photo", Body=data)
    digits = hashlib.sha256(data).hexdigest()
    forms: list[Any] = [
        tmp_path / "photo.png",
        str(tmp_path / "photo.png"),
        data,
        io.BytesIO(data),
        f"s3://{bucket.name}/elsewhere/photo",
        f"sha256:{digits}:80x64",
    ]
    jobs = [job(submit_job("a cat", image=each, **FIELDS)) for each in forms]
    assert {each.image for each in jobs} == {f"sha256:{digits}:80x64"}
    assert len({each.id for each in jobs}) == 1
    assert (jobs[0].width, jobs[0].height, jobs[0].strength) == (80, 64, 0.8)
    assert inputs_in(bucket) == {f"inputs/{digits}": data}
    head = bucket._client.head_object(Bucket=bucket.name, Key=f"inputs/{digits}")
    assert head["ContentType"] == "image/jpeg"
    assert {each["version"] for each in messages(client, jobs[0])} == {4}


def test_pixels_are_an_input_as_a_png(environment: dict[str, str], fleet: Any) -> None:
    pixels = np.asarray(PHOTO)
    forms: list[Any] = [PHOTO, pixels, np.dstack([pixels, np.full(pixels.shape[:2], 255, np.uint8)])]
    jobs = [job(submit_job("a cat", image=each, **FIELDS)) for each in forms]
    assert jobs[0].id == jobs[1].id
    found = inputs_in(bucket_of(environment))
    for each in jobs:
        stored = Image.open(io.BytesIO(found[f"inputs/{each.image.split(':')[1]}"]))
        assert np.array_equal(np.asarray(stored.convert("RGB")), pixels)
    mask = np.zeros((64, 80), bool)
    mask[:32] = True
    masked = job(submit_job("a cat", image=PHOTO, mask=mask, **FIELDS))
    stored = Image.open(io.BytesIO(inputs_in(bucket_of(environment))[f"inputs/{masked.mask.split(':')[1]}"]))
    assert np.array_equal(np.asarray(stored), mask * np.uint8(255))
    assert masked.strength == 1.0


def test_the_mask_may_be_the_alpha_channel(environment: dict[str, str], fleet: Any) -> None:
    assert job(submit_job("a cat", image=CUT_OUT, mask="alpha", **FIELDS)).mask == "alpha"
    with pytest.raises(InvalidJobError, match="mask is alpha, and no pixel of the image is transparent"):
        submit_job("a cat", image=PHOTO, mask="alpha", **FIELDS)
    with pytest.raises(InvalidJobError, match="mask is alpha, and every pixel of the image is transparent"):
        submit_job("a cat", image=Image.new("RGBA", (64, 64)), mask="alpha", **FIELDS)
    hardly = Image.new("RGBA", (64, 64), (0, 0, 0, 128))
    with pytest.raises(
        InvalidJobError, match="mask is alpha, and no pixel of the image is transparent by half"
    ):
        submit_job("a cat", image=hardly, mask="alpha", **FIELDS)
    with pytest.raises(InvalidJobError, match="mask is nowhere as light as 128 of 255"):
        submit_job("a cat", image=PHOTO, mask=Image.new("L", (64, 64), 127), **FIELDS)


def test_a_tenants_pictures_are_in_his_folder(environment: dict[str, str], fleet: Any) -> None:
    reference = job(submit_job("a cat", image=PHOTO, tenant="acme", **FIELDS)).image
    [key] = inputs_in(bucket_of(environment))
    assert key.startswith("inputs/tenants/acme/")
    # Who knows its name has it no more than who does not.
    with pytest.raises(InvalidJobError, match="among the bucket's inputs: give the picture"):
        submit_job("a cat", image=reference, tenant="evil", **FIELDS)


def test_a_job_is_submitted_again_with_its_picture(environment: dict[str, str], fleet: Any) -> None:
    first = submit_job("a cat", image=PHOTO, **FIELDS)
    assert submit_job(job(first), priority=9).id == first.id


def test_the_picture_of_a_job_that_is_done_begins_another_one(
    environment: dict[str, str], fleet: Any, records: Records
) -> None:
    parent = job_of(3)
    finish(records, bucket_of(environment), parent)
    forms: list[Any] = [JobHandle(parent.id), JobHandle(parent.id).record(), parent.id, f"job:{parent.id}"]
    jobs = [job(submit_job("a cat", image=each, **FIELDS)) for each in forms]
    assert {each.image for each in jobs} == {f"job:{parent.id}:{parent.width}x{parent.height}"}
    assert jobs[0].width == parent.width
    with pytest.raises(InvalidJobError, match="which is not known: check the id"):
        submit_job("a cat", image="f" * 32, **FIELDS)
    with pytest.raises(InvalidJobError, match="which is not known: check the id"):
        submit_job("a cat", image=parent.id, tenant="evil", **FIELDS)


def test_a_job_may_begin_with_the_picture_of_one_that_is_not_done(
    environment: dict[str, str], fleet: Any, client: Redis, records: Records
) -> None:
    parent = submit_job("a cat", **FIELDS)
    forms: list[Any] = [parent, parent.record(), parent.id, f"job:{parent.id}"]
    children = [submit_job("a dog", image=each, **FIELDS) for each in forms]
    assert len({each.id for each in children}) == 1
    child = children[0]
    assert child.record().waits_for == (parent.id,)
    assert (child.state(), child.progress().note) == (
        State.WAITING,
        f"It waits for the picture of job {parent.id}.",
    )
    masked = submit_job("a hat", image=child, mask=parent, **FIELDS)
    assert set(masked.record().waits_for) == {child.id, parent.id}
    assert [each["id"] for each in messages(client, job(parent))] == [parent.id]
    finish(records, bucket_of(environment), job(parent))
    assert {each["id"] for each in messages(client, job(parent))} == {parent.id, child.id}
    assert child.state() is State.QUEUED
    # The same chain again is the same child.
    assert submit_job("a dog", image=submit_job("a cat", **FIELDS), **FIELDS).id == child.id


def test_the_refusal_of_a_chain_says_what_is_in_the_way(
    environment: dict[str, str], fleet: Any, client: Redis
) -> None:
    parent = submit_job("a cat", **FIELDS)
    parent.cancel()
    with pytest.raises(InvalidJobError, match=f"mask is the picture of job {parent.id}, which was cancelled"):
        submit_job("a dog", image=PHOTO, mask=parent, **FIELDS)
    sizeless = submit_job("a cat", model="nobody-serves-this", **FIELDS)
    with pytest.raises(InvalidJobError, match="whose size is not known, as no worker of its model has run"):
        submit_job("a dog", image=sizeless, **FIELDS)


@pytest.mark.parametrize(
    ("image", "sentence"),
    [
        ("no-such.png", "image is 'no-such.png': there is no such file."),
        ("~nobody-here/a.png", "image is '~nobody-here/a.png': there is no such file."),
        (Path("~nobody-here/a.png"), "image is '~nobody-here/a.png': there is no such file."),
        (Path("/"), "image is '/': that is a folder: name a file in it."),
        ("/dev/null", "image is '/dev/null': that is no regular file: copy what it holds into one."),
        ("a\0b", "image is 'a\\x00b': there is no such file."),
        (b"GIF89a", "image is a GIF: give a PNG, JPEG or WebP."),
        (b"", "image is empty: give a PNG, JPEG or WebP."),
        (5, "image is 5: give a path, bytes, a Pillow image, a numpy array, an s3:// address or the handle"),
        (bytes(MAX_INPUT_BYTES + 1), "image is 50.0 MB, the limit is 50 MB: make it smaller."),
        (np.zeros((8, 8, 3)), "image is an array of float64 and the shape (8, 8, 3): give uint8, 0 to 255"),
        (np.zeros((2, 8, 8, 3), np.uint8), "image is an array of uint8 and the shape (2, 8, 8, 3): give"),
        (np.zeros((0, 8, 3), np.uint8), "image is 8x0, which is no pixel: give at least 1x1."),
        (Image.new("RGB", (0, 5)), "image is 0x5, which is no pixel: give at least 1x1."),
        (Image.new("CMYK", (8, 8)), "image has the mode CMYK: convert it to RGB or RGBA."),
        (io.StringIO("x"), "image is a file of text: open it with mode 'rb'."),
        (f"sha256:{'ab' * 32}:99999x99999", "image is 99999x99999, the limits are 64 megapixels"),
        (f"sha256:{'ab' * 32}:64x64", "There is no file abababababab... among the bucket's inputs"),
        ("s3://nothing", "image cannot be read: "),
        (
            "s3://nobucket/none.png",
            'image is s3://nobucket/none.png, and there is no bucket "nobucket": check the address.',
        ),
        (
            "https://example.com/a.png",
            "image is 'https://example.com/a.png'. Web addresses are not read: download the picture first",
        ),
        ("file:///a.png", "image is 'file:///a.png'. Such addresses are not read here: give its path, or"),
        ("data:image/png;base64,A", "image is 'data:image/png;base64,A'. Such addresses are not read here"),
        ("job:abc", "image is 'job:abc': after job: give the job's id, 32 digits of 0-9 and a-f."),
        ("sha256:abc", "image is 'sha256:abc': after sha256: give 64 digits of 0-9 and a-f and the size"),
    ],
)
def test_what_is_no_picture_is_refused_with_a_sentence_and_nothing_is_sent(
    environment: dict[str, str], fleet: Any, client: Redis, image: Any, sentence: str
) -> None:
    with pytest.raises(InvalidJobError) as caught:
        submit_job("a cat", image=image, **FIELDS)
    assert str(caught.value).startswith(sentence)
    assert messages(client, job_of(1)) == []


def test_the_refusal_of_a_path_says_where_it_was_looked_for(
    fleet: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    looked = f"image is 'in/a.png': there is no such file. It was looked for in {tmp_path}/in: give its whole"
    with pytest.raises(InvalidJobError, match=re.escape(looked)):
        submit_job("a cat", image="in/a.png", **FIELDS)
    with pytest.raises(InvalidJobError, match=r"'/none/a\.png': there is no such file: check its path\.$"):
        submit_job("a cat", image="/none/a.png", **FIELDS)


def test_a_picture_of_a_prompt_file_that_is_missing_belongs_in_its_folder(tmp_path: Path) -> None:
    """A whole path may lead out of it, which is refused."""
    with pytest.raises(InvalidJobError, match=r"looked for in .*: put it there, or correct its name"):
        read_given({"image": "nope.png"}, Reach(folder=tmp_path))


def test_a_mask_that_is_nearly_alpha_is_asked_about(
    fleet: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for near in ("alhpa", "Alpa"):
        with pytest.raises(InvalidJobError, match=f"mask is '{near}', which is no file: did you mean alpha?"):
            submit_job("a cat", image=CUT_OUT, mask=near, **FIELDS)
    with pytest.raises(InvalidJobError, match=r"mask is 'mask\.png': there is no such file"):
        submit_job("a cat", image=CUT_OUT, mask="mask.png", **FIELDS)
    (tmp_path / "alhpa").write_bytes(file_of(Image.new("L", PHOTO.size, 255)))
    assert job(submit_job("a cat", image=CUT_OUT, mask="alhpa", **FIELDS)).mask.startswith("sha256:")


def test_nothing_is_stored_for_a_job_that_is_wrong_elsewhere(environment: dict[str, str], fleet: Any) -> None:
    for wrong in ({"steps": 0}, {"strength": 2.0}, {"width": 9}):
        with pytest.raises(InvalidJobError):
            submit_job("a cat", image=PHOTO, **wrong)
    assert inputs_in(bucket_of(environment)) == {}


def test_a_picture_of_200_mb_is_refused_unread(
    environment: dict[str, str], fleet: Any, client: Redis, tmp_path: Path
) -> None:
    huge, lines = tmp_path / "huge.png", tmp_path / "lines.csv"
    with huge.open("wb") as file:
        file.truncate(200_000_000)
    lines.write_text("prompt,image\na cat,huge.png\n")
    said = "image is 200.0 MB, the limit is 50 MB: make it smaller."
    tracemalloc.start()
    try:
        with pytest.raises(InvalidJobError, match=re.escape(said)):
            submit_job("a cat", image=huge, **FIELDS)
        outcome = submit_file(lines)
        assert tracemalloc.get_traced_memory()[1] < 20_000_000
    finally:
        tracemalloc.stop()
    assert (outcome.total, outcome.rejected) == (0, 1)
    assert said in (tmp_path / "lines.csv.rejected.jsonl").read_text()
    with (
        huge.open("rb") as body,
        pytest.raises(InvalidJobError, match="the limit is 50 MB"),
    ):
        submit_job("a cat", image=body, **FIELDS)
    assert (messages(client, job_of(1)), inputs_in(bucket_of(environment))) == ([], {})


def test_without_a_bucket_a_picture_is_refused(
    environment: dict[str, str], fleet: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("S3_BUCKET")
    with pytest.raises(StorageError, match="S3_BUCKET is not set: name the bucket, from which workers read"):
        submit_job("a cat", image=PHOTO, **FIELDS)
