"""`/v1/inputs`: pictures that are sent before the jobs, or the prompt file, that name them."""

from __future__ import annotations

import hashlib
import json
import socket
from typing import Any

import pytest
from PIL import Image

from tests.producer.http.conftest import NOBODYS, Answer, Api
from tests.producer.http.test_pictures import form
from tests.producer.http.test_runs import finished, lines_of, upload
from tests.producer.test_pictures import CUT_OUT, PHOTO, file_of
from worker.contract.object_keys import input_key

DATA = file_of(PHOTO, "JPEG")
REFERENCE = f"sha256:{hashlib.sha256(DATA).hexdigest()}:80x64"
MASK = file_of(Image.linear_gradient("L").resize(PHOTO.size))


def send(api: Api, data: bytes, query: str = "", **options: Any) -> Answer:
    headers = {"Content-Type": "image/png"}
    return api.call("POST", f"/v1/inputs{query}", raw=data, headers=headers, **options)


def stored(api: Api, data: bytes, tenant: str = "") -> bool:
    """Whether a picture is in the bucket, for a tenant."""
    key = input_key(hashlib.sha256(data).hexdigest(), tenant)
    return bool(list(api.stack.home.path.rglob(key)))


def test_a_prompt_file_names_pictures_that_were_sent_before(api: Api) -> None:
    answer = send(api, DATA)
    assert (answer.status, answer.json) == (201, {"reference": REFERENCE, "width": 80, "height": 64})
    mask = send(api, MASK, "?mask=true").json["reference"]
    lines = [{"prompt": "a cat", "image": REFERENCE, "mask": mask}, {"prompt": "a dog", "image": REFERENCE}]
    data = "".join(f"{json.dumps(line)}\n" for line in lines).encode()
    run = finished(api, upload(api, data, "name=a.jsonl&steps=4&seed_start=1").json)
    assert (run["done"], run["failed"], run["rejected"]) == (2, 0, 0)
    found = lines_of(api.call("GET", run["links"]["manifest"]))
    assert [(each["image"], each["mask"]) for each in found] == [(REFERENCE, mask), (REFERENCE, "")]
    assert {(each["width"], each["height"]) for each in found} == {(80, 64)}


def test_a_job_names_it_too_and_it_may_be_sent_again(api: Api) -> None:
    data = file_of(CUT_OUT)
    first, second = send(api, data), send(api, data)
    assert (first.status, second.status) == (201, 201)
    assert first.json == second.json
    job = {"prompt": "a cat", "image": first.json["reference"], "mask": "alpha", "model": NOBODYS}
    assert api.call("POST", "/v1/jobs", job).status == 202


@pytest.mark.parametrize(
    "query", ["name=a.csv", "name=a.csv&image=shoe.png"], ids=["of a line", "of the upload"]
)
def test_a_line_that_names_a_file_of_the_clients_is_told_where_to_send_it(api: Api, query: str) -> None:
    data = b"prompt\na cat\n" if "image" in query else b"prompt,image\na cat,shoe.png\n"
    answer = upload(api, data, query)
    assert answer.status == 422
    assert (
        "image is 'shoe.png', and paths are not read here: send the file to /v1/inputs first, and give the "
        "reference that it answers (sha256:...), or a job's id."
    ) in answer.json["detail"]


def test_what_is_stored_is_the_tenants_own(api: Api) -> None:
    data = file_of(PHOTO.rotate(90))
    ours, theirs = (api.new_key(f"{name}-inputs", tenant=f"{name}-inputs") for name in ("ours", "theirs"))
    reference = send(api, data, key=ours).json["reference"]
    assert stored(api, data, "ours-inputs")
    assert not stored(api, data)
    job = {"prompt": "a cat", "image": reference, "model": NOBODYS}
    refused = api.call("POST", "/v1/jobs", job, key=theirs)
    assert (refused.status, "among the bucket's inputs" in refused.json["detail"]) == (422, True)
    run = upload(api, f"prompt,image\na cat,{reference}\n".encode(), "name=a.csv", key=theirs).json
    failed = finished(Api(api.stack, api.url, theirs), run)
    assert (failed["done"], failed["failed"]) == (0, 1)
    [line] = lines_of(api.call("GET", run["links"]["manifest"], key=theirs))
    assert line["error_type"] == "InputError", line


def test_a_key_that_may_only_read_stores_nothing(api: Api) -> None:
    data = file_of(PHOTO.rotate(180))
    answer = send(api, data, key=api.new_key("reads-inputs", "read"))
    assert answer.status == 403
    assert not stored(api, data)


def test_a_picture_counts_as_a_request_of_its_tenant(api: Api) -> None:
    key = api.new_key("slow-inputs", tenant="slow-inputs", requests_per_s=0.001, burst=1)
    assert send(api, DATA, key=key).status == 201
    assert send(api, DATA, key=key).status == 429


@pytest.mark.parametrize(
    ("data", "query", "sentence"),
    [
        (b"", "", "image is empty: give a PNG, JPEG or WebP."),
        (b"GIF89a", "", "image is a GIF: give a PNG, JPEG or WebP."),
        (b"GIF89a", "?mask=true", "mask is a GIF: give a PNG, JPEG or WebP."),
        (file_of(CUT_OUT), "?mask=true", "mask is transparent in places: make it white where"),
        (DATA, "?maks=true", "There is no parameter 'maks': did you mean mask?"),
    ],
)
def test_what_is_no_picture_is_refused_and_not_stored(
    api: Api, data: bytes, query: str, sentence: str
) -> None:
    answer = send(api, data, query)
    assert (answer.status, answer.json["detail"][: len(sentence)]) == (422, sentence)


def test_a_form_is_refused_with_the_way_to_send_it(api: Api) -> None:
    answer = form(api, {"image": DATA}, "/v1/inputs")
    assert answer.status == 415
    assert answer.json["detail"].endswith("as the body, by curl with `--data-binary @FILE`.")


@pytest.mark.parametrize(
    ("path", "remedy"),
    [
        ("/v1/inputs", b"make the picture smaller, or raise SMALLCAT_HTTP_MAX_BODY_MB at the server."),
        ("/v1/runs", b"compress the prompt file, split it, or raise SMALLCAT_HTTP_MAX_UPLOAD_MB"),
        ("/v1/jobs", b"send less at once, pictures to /v1/inputs, or a prompt file to /v1/runs."),
    ],
)
def test_a_body_that_is_too_large_has_its_remedy(api: Api, path: str, remedy: bytes) -> None:
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {10**9}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", int(api.url.rpartition(":")[2])), timeout=10) as connection:
        connection.sendall(head.encode())
        answer = b"".join(iter(lambda: connection.recv(65_536), b""))
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert remedy in answer
