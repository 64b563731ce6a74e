"""A job that begins with a picture: it is read from the bucket, checked again, and given to the runner."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.worker.engine.fake_runner import job_of
from tests.worker.jobs.test_handler import FlakyBucket, Worker, client, storage, worker
from worker.contract import infotext
from worker.contract.errors import StorageError
from worker.contract.job import Job
from worker.contract.job_parameters import MAX_SIZE
from worker.contract.metadata.job_from_image import read_infotext
from worker.contract.record import JobRecord, State
from worker.storage.bucket import Bucket
from worker.storage.input_pixels import PUT_BACK_BY_ALPHA
from worker.storage.inputs import Inputs

__all__ = ["client", "storage", "worker"]

#: A cut-out: a red square that is opaque in its left half.
CUT_OUT = Image.new("RGBA", (128, 64), (255, 0, 0, 0))
CUT_OUT.paste((255, 0, 0, 255), (0, 0, 64, 64))


def file_of(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def put(bucket: Bucket, image: Image.Image, tenant: str = "") -> str:
    """Put a picture; returns its reference."""
    sha256 = Inputs(bucket).put(file_of(image), "image/png", tenant)
    return f"sha256:{sha256}:{image.width}x{image.height}"


def job(image: str, **fields: Any) -> Job:
    given = {"width": 64, "height": 64} | fields
    return Job.parse(job_of(5).model_dump() | {"image": image, **given})


def record_of(worker: Worker, wanted: Job) -> JobRecord:
    worker.submit(wanted)
    assert worker.handle(wanted) is None
    return worker.records.get(wanted.id)


def test_the_runner_gets_the_pixels_at_the_jobs_size(worker: Worker, storage: FlakyBucket) -> None:
    wanted = job(put(storage, CUT_OUT))
    record = record_of(worker, wanted)
    assert (record.state, record.attempts) == (State.DONE, 1)
    assert record.warnings == (
        "The image is transparent in places, and lies on white: mask=alpha draws there.",
    )
    inputs = worker.runner.inputs[5]
    assert inputs is not None
    white = Image.new("RGBA", CUT_OUT.size, "white")
    white.alpha_composite(CUT_OUT)
    resized = white.convert("RGB").resize((64, 64), Image.Resampling.LANCZOS)
    assert np.array_equal(inputs.image, np.asarray(resized))
    assert inputs.mask is None


def test_the_alpha_channel_may_be_the_mask(worker: Worker, storage: FlakyBucket) -> None:
    record = record_of(worker, job(put(storage, CUT_OUT), mask="alpha", width=128))
    assert (record.state, record.warnings) == (State.DONE, (PUT_BACK_BY_ALPHA,))
    inputs = worker.runner.inputs[5]
    assert inputs is not None
    assert inputs.mask is not None
    assert inputs.mask.shape == (64, 128)
    assert (inputs.mask[:, :64].max(), inputs.mask[:, 64:].min()) == (0, 255)


@pytest.mark.parametrize("size", [(128, 64), (64, 64), (192, 96)])
def test_what_is_opaque_in_a_cut_out_is_as_pillow_resizes_it(
    worker: Worker, storage: FlakyBucket, size: tuple[int, int]
) -> None:
    """By Lanczos, colours weighted by alpha: without the white, and what is behind transparent pixels."""
    cut_out = Image.effect_noise(CUT_OUT.size, 90).convert("RGB").convert("RGBA")
    cut_out.putalpha(CUT_OUT.getchannel("A"))
    cut_out.putpixel((20, 20), (9, 9, 9, 100))
    wanted = job(put(storage, cut_out), mask="alpha", width=size[0], height=size[1])
    assert record_of(worker, wanted).state == State.DONE
    inputs = worker.runner.inputs[5]
    assert inputs is not None
    assert inputs.mask is not None
    resized = np.asarray(cut_out.resize(size, Image.Resampling.LANCZOS))
    assert np.array_equal(inputs.mask, 255 - resized[..., 3])
    opaque = resized[..., 3] == 255
    assert opaque.any()
    assert np.array_equal(inputs.image[opaque], resized[opaque][:, :3])
    assert (inputs.image[resized[..., 3] == 0] == 255).all()


def test_a_picture_of_which_a_part_is_kept_says_so(worker: Worker, storage: FlakyBucket) -> None:
    """IPTC's term, in XMP, and AUTOMATIC1111's keys in the infotext (1.10, modules/processing.py)."""
    reference = put(storage, CUT_OUT)
    white, half = Image.new("L", (128, 64), 255), Image.new("L", (128, 64))
    half.paste(255, (0, 0, 64, 64))
    whole = record_of(worker, job(reference, seed=6))
    part = record_of(worker, job(reference, mask=put(storage, half), padding=32))
    others = [
        *(job(reference, mask=put(storage, white), padding=padding, seed=8) for padding in (None, 0)),
        *(job(reference, mask=put(storage, half), padding=padding, seed=8) for padding in (None, 0)),
    ]
    records = [whole, part, *(record_of(worker, each) for each in others)]
    files = [storage.get(each.uri or "") for each in records]
    assert [b"digitalsourcetype/trainedAlgorithmicMedia" in each for each in files] == [
        *(True, False, True, True, False, False)
    ]
    assert [b"digitalsourcetype/compositeWithTrainedAlgorithmicMedia" in each for each in files] == [
        *(False, True, False, False, True, True)
    ]
    text = read_infotext(files[1]) or ""
    for pair in (
        "Denoising strength: 1.0",
        "Mask blur: 4",
        "Masked area padding: 32",
        "Inpaint area: Only masked",
    ):
        assert pair in text
    assert infotext.read(text).id == part.job.id
    assert "Mask blur" not in (read_infotext(files[0]) or "")


@pytest.mark.parametrize("image_format", ["png", "webp", "jpeg"])
def test_every_format_says_that_a_part_is_kept(
    worker: Worker, storage: FlakyBucket, image_format: str
) -> None:
    reference = put(storage, CUT_OUT)
    for seed, (fields, kept) in enumerate(
        [({"mask": "alpha"}, True), ({"mask": "alpha", "preserve_unmasked": False}, True), ({}, False)]
    ):
        record = record_of(worker, job(reference, format=image_format, seed=10 + seed, **fields))
        data = storage.get(record.uri or "")
        assert (b"digitalsourcetype/compositeWithTrainedAlgorithmicMedia" in data) is kept
        assert (b"digitalsourcetype/trainedAlgorithmicMedia" in data) is not kept


def test_with_padding_the_runner_gets_a_part_and_the_picture_is_as_large_as_the_image(
    worker: Worker, storage: FlakyBucket
) -> None:
    mask = Image.new("L", (128, 64))
    mask.paste(255, (10, 20, 26, 36))
    wanted = job(put(storage, CUT_OUT), mask=put(storage, mask), padding=8, mask_blur=0)
    record = record_of(worker, wanted)
    assert record.warnings == (
        "The image is transparent in places, and lies on white: mask=alpha draws there.",
        (
            "The part of the image from 2,12 to 34,44 px was drawn at 64x64 and put back. The picture has "
            "the image's size, 128x64."
        ),
    )
    inputs = worker.runner.inputs[5]
    assert inputs is not None
    assert inputs.mask is not None
    assert inputs.mask.shape == (64, 64)
    assert (inputs.image == (255, 0, 0)).all(), "all of the part is of the square"
    assert (inputs.mask[22:42, 22:42].min(), inputs.mask[:10].max(), inputs.mask[54:].max()) == (255, 0, 0)
    picture = Image.open(io.BytesIO(storage.get(record.uri or "")))
    assert picture.size == (128, 64)
    pixels = np.asarray(picture)
    assert (pixels[20:36, 10:26] == 5).all(), "as the fake runner draws it"
    assert (pixels[:, 64:] == 255).all()
    assert (pixels[:20, :64] == (255, 0, 0)).all()


def test_a_job_without_an_image_begins_with_nothing(worker: Worker) -> None:
    assert record_of(worker, job_of(5)).state is State.DONE
    assert worker.runner.inputs == {5: None}


def test_a_tenants_input_is_his_own(worker: Worker, storage: FlakyBucket) -> None:
    reference = put(storage, CUT_OUT, "acme")
    assert record_of(worker, job(reference, tenant="acme")).state is State.DONE
    for tenant in ("", "acme-2"):
        assert record_of(worker, job(reference, tenant=tenant)).error_type == "InputError"


def test_an_input_that_is_gone_or_changed_or_no_picture_fails_its_job_at_once_in_a_sentence(
    worker: Worker, storage: FlakyBucket
) -> None:
    reference = put(storage, CUT_OUT)
    digits = reference[7:71]
    key = f"inputs/{digits}"

    def error(wanted: Job, body: bytes | None) -> str | None:
        if body is None:
            storage._client.delete_object(Bucket=storage.name, Key=key)
        else:
            storage._client.put_object(Bucket=storage.name, Key=key, Body=body)
        record = record_of(worker, wanted)
        assert (record.state, record.error_type, record.attempts) == (State.FAILED, "InputError", 1)
        return record.error

    remedy = "submit the job again with the picture."
    assert error(job(reference), None) == f"image is gone from the bucket ({digits[:12]}...): {remedy}"
    changed = f"image was changed in the bucket ({digits[:12]}...): {remedy}"
    assert error(job(reference, seed=6), file_of(CUT_OUT.convert("RGB"))) == changed
    said = job(reference.replace("128x64", "64x64"), seed=7)
    assert (
        error(said, file_of(CUT_OUT)) == "image is 128x64, and the job says 64x64: submit the picture again."
    )
    whole = put(storage, CUT_OUT.convert("RGB"))
    opaque = record_of(worker, job(whole, mask="alpha", seed=8))
    assert opaque.error is not None
    assert opaque.error.startswith("mask is alpha, and no pixel of the image is transparent: give a mask, or")
    text = Inputs(storage).put(b"a small cat", "image/png")
    record = record_of(worker, job(f"sha256:{text}:64x64", seed=9))
    assert record.error == "image is no picture that is read: give a PNG, JPEG or WebP."
    assert worker.runner.prepared == []


def test_a_bucket_that_fails_while_inputs_are_read_is_waited_for(
    worker: Worker, storage: FlakyBucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = job(put(storage, CUT_OUT))
    errors = [StorageError("away"), StorageError("away")]
    real = storage.read_input

    def flaky(sha256: str, tenant: str = "") -> bytes | None:
        if errors:
            raise errors.pop()
        return real(sha256, tenant)

    monkeypatch.setattr(storage, "read_input", flaky)
    record = record_of(worker, wanted)
    assert (record.state, record.attempts, errors) == (State.DONE, 1, [])


def test_an_input_that_breaks_off_while_it_is_read_is_read_again(
    worker: Worker, storage: FlakyBucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is no changed one."""
    wanted = job(put(storage, CUT_OUT))
    real, broken = storage._client.get_object, [True]

    def flaky(**request: Any) -> Any:
        found = real(**request)
        if "inputs/" in request["Key"] and broken:
            broken.pop()
            found["Body"] = io.BytesIO(found["Body"].read()[:-1])
        return found

    monkeypatch.setattr(storage._client, "get_object", flaky)
    record = record_of(worker, wanted)
    assert (record.state, record.attempts, broken) == (State.DONE, 1, [])


def test_an_input_that_is_too_large_in_the_bucket_fails_its_job(
    worker: Worker, storage: FlakyBucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No more of it is read, nor unpacked."""
    wanted = job(put(storage, CUT_OUT))
    monkeypatch.setattr(storage, "read_input", lambda *_: bytes(50_000_001))
    assert (record_of(worker, wanted).error or "").endswith(
        "than the limit, 50 MB: submit the job again with the picture."
    )


def test_the_picture_of_another_job_is_read_where_it_is(worker: Worker, storage: FlakyBucket) -> None:
    first = job_of(3, format="webp")
    assert record_of(worker, first).state is State.DONE
    stored = Image.open(io.BytesIO(storage.get(storage.uri(first.id, first.format)))).convert("RGB")
    wanted = job(f"job:{first.id}:{stored.width}x{stored.height}")
    assert record_of(worker, wanted).state is State.DONE
    inputs = worker.runner.inputs[5]
    assert inputs is not None
    assert np.array_equal(inputs.image, np.asarray(stored.resize((64, 64), Image.Resampling.LANCZOS)))
    missing = record_of(worker, job(f"job:{'0' * 32}:64x64", seed=6))
    assert missing.error_type == "InputError"
    assert "which is not in the bucket: submit that job again, then this one." in (missing.error or "")


def test_the_mask_may_be_the_picture_of_another_job(worker: Worker, storage: FlakyBucket) -> None:
    first = job_of(200)  # A picture as light as that: a mask of it draws something.
    assert record_of(worker, first).state is State.DONE
    stored = Image.open(io.BytesIO(storage.get(storage.uri(first.id, first.format))))
    size = f"{stored.width}x{stored.height}"
    wanted = job(put(storage, Image.new("RGB", stored.size)), mask=f"job:{first.id}:{size}")
    assert record_of(worker, wanted).state is State.DONE
    inputs = worker.runner.inputs[5]
    assert inputs is not None
    mask = stored.convert("L").resize((64, 64), Image.Resampling.LANCZOS)
    assert np.array_equal(inputs.mask, np.asarray(mask))
    missing = record_of(worker, job(f"job:{first.id}:{size}", mask=f"job:{'0' * 32}:{size}", seed=6))
    assert (missing.error or "").startswith(f"mask is the picture of job {'0' * 32}, which is not in")


def test_pictures_of_jobs_are_within_the_limits_of_inputs() -> None:
    assert MAX_SIZE**2 < 64_000_000
