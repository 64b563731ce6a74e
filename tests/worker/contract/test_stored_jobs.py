"""Jobs that an earlier version took stay readable, with their ids, also where they would be refused now."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import pytest
from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel, Field, ValidationError

from worker.contract.errors import InvalidJobError
from worker.contract.infotext import read, write
from worker.contract.job import Job, version_needed
from worker.contract.limits import limits_of
from worker.contract.message import Message, payload_of
from worker.contract.record import JobRecord, State
from worker.contract.served_model import Defaults, ServedModel
from worker.contract.stored_jobs import NEW, NarrowedTo
from worker.state.hashes import record_of

#: Jobs that several commits took which read messages up to version 4, with the ids that they gave them:
#: random ones, so that each field has several values, beside others.
OF_VERSION_4 = Path(__file__).with_name("jobs_of_version_4.jsonl")
IMAGE = f"sha256:{'ab' * 32}:640x480"
#: What is refused now -> a job that an earlier version took, its id there, and what is said of it now.
NARROWED: dict[str, tuple[dict[str, Any], str, str]] = {
    "a second pass of no strength": (
        {"upscale": 2.0, "upscale_strength": 0.0},
        "76a2ac3e4c37ab407ddedbcdd959be61",
        "upscale_strength is 0.0: it must be above 0 and up to 1.",
    ),
    "a blur of the image's own edge": (
        {"image": IMAGE, "mask": "alpha", "mask_blur": 8},
        "f2f56c6a3d7a7c0a5313d4a087c46a3d",
        "mask_blur is 8, and the edge of the mask alpha is the image's own: leave it out",
    ),
    "a blur of no edge": (
        {"image": IMAGE, "mask": IMAGE, "mask_blur": 8, "preserve_unmasked": False},
        "f43ca6b9dee6aacadd43c9670a1ac2a6",
        "preserve_unmasked is False and mask_blur 8, which is for the edge",
    ),
    "a picture that WebP does not hold": (
        {"image": f"sha256:{'ab' * 32}:20000x800", "mask": "alpha", "padding": 0, "format": "webp"}
        | {"width": 512, "height": 64},
        "e9eca2077909746416b6b948c3a8ba67",
        "padding is 0, so that the picture is as large as the image, 20000x800, and webp holds up to",
    ),
    "an invisible prompt": (
        {"prompt": "\u200b"},
        "7d06d05272f5c4a1a9ff0be1eb0dcbce",
        "prompt is blank: say what to draw.",
    ),
}
SERVED = ServedModel(
    name="m", revision="r", defaults=Defaults(width=64, height=64, steps=10, guidance_scale=7.5)
)


def stored(what: str) -> tuple[dict[str, Any], str]:
    """The fields of a job, as its message has them, and its id."""
    fields, job_id, _ = NARROWED[what]
    job = Job.parse({"prompt": "a small cat", "seed": 1} | fields, is_new=False)
    return job.model_dump(mode="json"), job_id


@pytest.mark.parametrize("what", NARROWED)
def test_a_stored_job_is_read_with_its_id_and_refused_when_it_is_given_again(what: str) -> None:
    fields, job_id = stored(what)
    sentence = NARROWED[what][2]
    message = Message.parse({"version": version_needed(fields), "id": job_id, "job": fields})
    assert payload_of(message.job) == {"version": message.version, "id": job_id, "job": fields}

    job = json.dumps(fields)
    assert record_of(job_id, {"state": "failed", "job": job}).job == message.job
    text = JobRecord(id=job_id, state=State.DONE, job=message.job).model_dump_json()
    assert JobRecord.model_validate_json(text).job == message.job

    with pytest.raises(InvalidJobError) as caught:
        Job.parse(fields)
    assert str(caught.value).startswith(sentence)


def test_jobs_of_version_4_are_read_with_their_ids() -> None:
    lines = OF_VERSION_4.read_text().splitlines()
    assert len(lines) > 50
    for line in lines:
        kept = json.loads(line)
        payload = {"version": version_needed(kept["job"]), **kept}
        assert payload_of(Message.parse(payload).job) == payload, line


def test_a_picture_of_ours_is_a_stored_one_and_anothers_is_not() -> None:
    fields, _ = stored("a blur of no edge")
    job = Job.parse(fields, is_new=False).resolved(SERVED)
    assert read(write(job)) == job
    with pytest.raises(InvalidJobError, match="prompt is blank"):
        read("\u200b\nSteps: 20, Sampler: Euler")


def test_a_stored_job_of_which_no_step_is_left_is_refused_when_its_steps_are_known() -> None:
    fields, _ = stored("a second pass of no strength")
    with pytest.raises(
        InvalidJobError, match=r"upscale_strength is 0, which leaves none of 10 steps: use at"
    ):
        Job.parse(fields, is_new=False).resolved(SERVED)


@pytest.mark.parametrize(
    ("limit", "refused", "taken", "limits", "name"),
    [
        (Gt(1), 1, 1.5, "above 1 and up to 9", "exclusiveMinimum"),
        (Ge(1), 0.5, 1, "1 to 9", "minimum"),
        (Lt(8), 8, 7.5, "0 and up to below 8", "exclusiveMaximum"),
        (Le(8), 8.5, 8, "0 to 8", "maximum"),
    ],
)
def test_a_limit_that_became_narrower_holds_for_new_jobs_alone(
    limit: Ge | Gt | Le | Lt, refused: float, taken: float, limits: str, name: str
) -> None:
    class Some(BaseModel):
        value: Annotated[float | None, Field(ge=0, le=9), NarrowedTo(limit)]

    for value in (None, refused, taken):
        assert Some.model_validate({"value": value}).value == value
    for value in (None, taken):
        assert Some.model_validate({"value": value}, context=NEW).value == value
    for value, context in ((-1, None), (10, NEW)):
        with pytest.raises(ValidationError):
            Some.model_validate({"value": value}, context=context)
    with pytest.raises(ValidationError) as caught:
        Some.model_validate({"value": refused}, context=NEW)
    [found] = caught.value.errors()
    assert found["type"] in ("greater_than", "greater_than_equal", "less_than", "less_than_equal")
    assert found["input"] == refused
    assert limits_of(Some.model_fields["value"].metadata) == limits
    schema = Some.model_json_schema()["properties"]["value"]
    assert [list(each) for each in schema["allOf"]] == [[name]]
    assert {"minimum": 0, "maximum": 9, "type": "number"} in schema["anyOf"]
