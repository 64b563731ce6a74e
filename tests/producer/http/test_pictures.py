"""Pictures in requests of our own API: forms, data URLs, references, jobs; what is others' is not read."""

from __future__ import annotations

import base64
import hashlib
import json
from typing import Any

import pytest
from PIL import Image

from tests.producer.http.conftest import NOBODYS, Answer, Api
from tests.producer.test_pictures import CUT_OUT, PHOTO, file_of

DATA = file_of(PHOTO, "JPEG")
REFERENCE = f"sha256:{hashlib.sha256(DATA).hexdigest()}:80x64"


def form(api: Api, parts: dict[str, str | bytes], path: str = "/v1/jobs", key: str | None = None) -> Answer:
    """Send a form, as a browser does it (RFC 7578)."""
    mark, body = "boundary0123456789", b""
    for name, value in parts.items():
        is_file = isinstance(value, bytes)
        head = f'Content-Disposition: form-data; name="{name}"' + ('; filename="a.bin"' if is_file else "")
        data = value if isinstance(value, bytes) else value.encode()
        body += f"--{mark}\r\n{head}\r\n\r\n".encode() + data + b"\r\n"
    headers = {"Content-Type": f"multipart/form-data; boundary={mark}"}
    return api.call("POST", path, raw=body + f"--{mark}--\r\n".encode(), headers=headers, key=key)


def test_a_form_has_a_jobs_fields_and_its_pictures(api: Api) -> None:
    mask = file_of(Image.linear_gradient("L").resize(PHOTO.size))
    parts: dict[str, str | bytes] = {"prompt": "a cat", "seed": "5", "steps": "20", "strength": "0.5"}
    answer = form(api, {**parts, "preserve_unmasked": "no", "image": DATA, "mask": mask})
    assert answer.status == 202, answer.body
    job = api.wait(answer.json)["job"]
    assert (job["image"], job["seed"], job["strength"]) == (REFERENCE, 5, 0.5)
    assert job["mask"].startswith(f"sha256:{hashlib.sha256(mask).hexdigest()}:")
    assert (job["width"], job["height"], job["preserve_unmasked"]) == (80, 64, False)
    again = form(api, {**parts, "preserve_unmasked": "no", "image": DATA, "mask": mask})
    assert again.json["id"] == answer.json["id"]


def test_json_has_pictures_by_what_is_there_and_as_data_urls(api: Api) -> None:
    url = f"data:image/jpeg;base64,{base64.b64encode(DATA).decode()}"
    first = api.call("POST", "/v1/jobs", {"prompt": "a cat", "seed": 6, "image": url})
    assert first.status == 202, first.body
    second = api.call("POST", "/v1/jobs", {"prompt": "a cat", "seed": 6, "image": REFERENCE})
    assert second.json["id"] == first.json["id"]
    assert api.wait(first.json)["job"]["image"] == REFERENCE
    third = api.call("POST", "/v1/jobs", [{"prompt": "a dog", "image": first.json["id"], "seed": 1}])
    assert third.status == 202, third.body
    assert api.wait(third.json["jobs"][0])["job"]["image"].startswith(f"job:{first.json['id']}:")


def test_a_job_waits_for_the_picture_of_one_that_is_not_done(api: Api) -> None:
    ours = api.new_key("chains", tenant="chains", max_queued=1, models=[NOBODYS])
    asked = {"prompt": "a cat", "model": NOBODYS, "width": 64, "height": 64, "steps": 2}
    parent = api.call("POST", "/v1/jobs", asked, key=ours).json
    wanted = {"prompt": "a dog", "seed": 1, "image": f"job:{parent['id']}", "model": NOBODYS, "steps": 2}
    child = api.call("POST", "/v1/jobs", wanted, key=ours)
    # It takes no slot of its tenant's.
    assert child.status == 202, child.body
    view = api.call("GET", child.json["links"]["self"], key=ours).json
    assert (view["state"], view["waits_for"]) == ("waiting", [parent["id"]])
    assert view["note"] == f"It waits for the picture of job {parent['id']}."
    api.call("DELETE", parent["links"]["self"], key=ours)
    events = api.call("GET", child.json["links"]["events"], key=ours).body.decode()
    assert events.count("event: failed") == 1
    assert f"The job begins with the picture of job {parent['id']}, which was cancelled." in events
    again = api.call("POST", "/v1/jobs", wanted, key=ours)
    assert (again.status, again.json["detail"]) == (
        422,
        f"image is the picture of job {parent['id']}, which was cancelled: submit that job again first.",
    )
    chained = api.call("POST", "/v1/jobs", {"prompt": "a cat", "seed": 77}).json
    last = api.call("POST", "/v1/jobs", {"prompt": "a dog", "seed": 78, "image": chained["id"]})
    # It was released, and a worker has read that picture: the fake's are all of one size.
    assert api.wait(last.json)["error"].startswith("image is 8x8, and the job says ")


@pytest.mark.parametrize(
    ("image", "sentence"),
    [
        ("/etc/hostname", "image is '/etc/hostname', and paths are not read here: send the file in a form"),
        ("iVBORw0KGgo=", "image is 'iVBORw0KGgo=', and paths are not read here: send the file in a form"),
        ("data:text/html,x", "image is 'data:text/html,x'. Such addresses are not read here: send the file"),
        ("https://example.com/a.png", "image is 'https://example.com/a.png'. Web addresses are not read:"),
        ("job:abc", "image is 'job:abc': after job: give the job's id, 32 digits of 0-9 and a-f."),
        ("s3://pictures/secret.png", "image is an s3:// address, which is not read here: send the file"),
        (f"sha256:{'0' * 64}:64x64", "There is no file 000000000000... among the bucket's inputs"),
        ("0" * 32, f"image is the picture of job {'0' * 32}, which is not known: check the id."),
        ("data:image/png;base64,!", "image is 'data:image/png;base64,!', which is no base64"),
        ("data:image/png;base64,R0lGODlh", "image is a GIF: give a PNG, JPEG or WebP."),
        (["x"], 'image is ["x"]: it must be a text, or a form\'s file.'),
    ],
)
def test_what_is_no_picture_of_the_callers_is_refused(api: Api, image: Any, sentence: str) -> None:
    alone = api.call("POST", "/v1/jobs", {"prompt": "a cat", "image": image})
    assert (alone.status, alone.json["detail"][: len(sentence)]) == (422, sentence)
    listed = api.call("POST", "/v1/jobs", [{"prompt": "a cat"}, {"prompt": "a cat", "image": image}])
    assert listed.status == 422
    assert [(each["index"], each["detail"][: len(sentence)]) for each in listed.json["errors"]] == [
        (1, sentence)
    ]


def test_a_mask_that_is_nearly_alpha_is_asked_about(api: Api) -> None:
    answer = api.call("POST", "/v1/jobs", {"prompt": "a cat", "image": REFERENCE, "mask": "alhpa"})
    assert answer.status == 422
    assert answer.json["detail"] == "mask is 'alhpa', which is no file: did you mean alpha?"


def test_a_tenant_has_no_picture_of_anothers(api: Api) -> None:
    ours, theirs = (api.new_key(f"{name}-pictures", tenant=name) for name in ("ours", "theirs"))
    data = file_of(CUT_OUT)
    job = form(api, {"prompt": "a cat", "seed": "5", "image": data, "mask": "alpha"}, key=ours)
    assert job.status == 202, job.body
    reference = f"sha256:{hashlib.sha256(data).hexdigest()}:80x64"
    for image in (reference, job.json["id"]):
        refused = api.call("POST", "/v1/jobs", {"prompt": "a cat", "image": image}, key=theirs)
        assert refused.status == 422, refused.body


@pytest.mark.parametrize(
    ("parts", "sentence"),
    [
        ({"prompt": "a cat", "image": b"GIF89a"}, "image is a GIF: give a PNG, JPEG or WebP."),
        ({"prompt": "a cat", "image": b""}, "image is empty: give a PNG, JPEG or WebP."),
        ({"prompt": "a cat", "image": DATA, "mask": b""}, "mask is empty: give a PNG, JPEG or WebP."),
        ({"prompt": b"a cat"}, "The form has 'prompt' as a file: files are image and mask, send the others"),
        (
            {"prompt": "a cat", "loras[pixel]": "1"},
            "The form has 'loras[pixel]', a part of loras: send loras as one text, which may be JSON.",
        ),
        ({"prompt": "a cat", "stepps": "5"}, 'There is no job field "stepps": did you mean "steps"?'),
        ({"prompt": "a cat", "steps": "many"}, "steps is 'many': it must be a valid integer, 1 to 150."),
        ({"prompt": "a cat", "image": DATA, "steps": "0"}, "steps is 0: it must be 1 to 150."),
    ],
)
def test_a_form_that_is_wrong_is_refused(api: Api, parts: Any, sentence: str) -> None:
    answer = form(api, parts)
    assert (answer.status, answer.json["detail"][: len(sentence)]) == (422, sentence)


def test_a_form_that_cannot_be_read_is_refused(api: Api) -> None:
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    answer = api.call("POST", "/v1/jobs", raw=b"--y\r\nnothing", headers=headers)
    assert answer.status in (400, 422)
    many = {f"name{number}": "x" for number in range(200)}
    assert form(api, {"prompt": "a cat", **many}).status == 400


def test_the_document_says_that_there_are_forms(api: Api) -> None:
    document = json.loads(api.call("GET", "/openapi.json").body)
    assert set(document["paths"]["/v1/jobs"]["post"]["requestBody"]["content"]) == {
        "application/json",
        "multipart/form-data",
    }
