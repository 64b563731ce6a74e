"""`/v1/runs` and `/v1/fleet`: uploads, their counts and manifests, and a server that is killed meanwhile."""

from __future__ import annotations

import csv
import gzip
import io
import json
import time
from collections.abc import Callable
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from deploy.embedded.stack import Stack
from tests.producer.http.conftest import NOBODYS, Answer, Api, fast_worker

TEXT = b"a cat\na dog --steps 7\n"


def upload(api: Api, data: bytes, query: str = "", **options: Any) -> Answer:
    headers = {"Content-Type": "application/octet-stream"}
    return api.call("POST", f"/v1/runs?{query}", raw=data, headers=headers, **options)


def finished(api: Api, run: Any) -> Any:
    for _ in range(400):
        found = api.call("GET", run["links"]["self"]).json
        if found["state"] in ("finished", "failed", "cancelled"):
            return found
        time.sleep(0.05)
    raise AssertionError(found)


def lines_of(answer: Answer) -> list[Any]:
    return [json.loads(line) for line in answer.body.splitlines()]


def test_a_file_is_rendered(api: Api) -> None:
    answer = upload(api, TEXT, "name=my+prompts.txt&images=2&steps=3&seed_start=1")
    assert answer.status == 202
    run = finished(api, answer.json)
    assert (run["state"], run["done"], run["total"], run["failed"], run["rejected"]) == (
        "finished",
        4,
        4,
        0,
        0,
    )
    assert run["files"] == ["my prompts.txt"]
    answer = api.call("GET", run["links"]["manifest"])
    assert answer.headers["content-type"] == "application/x-ndjson"
    lines = lines_of(answer)
    assert [(line["file"], line["prompt"], line["seed"], line["steps"]) for line in lines] == [
        ("my prompts.txt", "a cat", 1, 3),
        ("my prompts.txt", "a cat", 2, 3),
        ("my prompts.txt", "a dog", 1, 7),
        ("my prompts.txt", "a dog", 2, 7),
    ]
    assert {line["state"] for line in lines} == {"done"}
    job = api.call("GET", f"/v1/jobs/{lines[0]['id']}/image?redirect=false")
    assert job.body[:4] == b"\x89PNG"


def parquet() -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"prompt": "a cat of parquet"}]), file)
    return file.getvalue()


@pytest.mark.parametrize(
    ("query", "data"),
    [
        ("name=a.csv", b"prompt,steps\na cat of csv,5\n"),
        ("name=a.tsv", b"prompt\tsteps\na cat of tsv\t5\n"),
        ("name=a.jsonl", b'{"prompt": "a cat of jsonl"}\n'),
        ("name=a.parquet", parquet()),
        ("name=upload&format=csv", b"prompt\na cat of format\n"),
        ("name=a.txt.gz", gzip.compress(b"a cat of gzip\n", mtime=0)),
    ],
)
def test_every_format_is_read(api: Api, query: str, data: bytes) -> None:
    run = finished(api, upload(api, data, query).json)
    assert (run["state"], run["done"]) == ("finished", 1)


def test_a_manifest_can_be_csv(api: Api) -> None:
    run = finished(api, upload(api, b"a cat for a table\n", "manifest=csv").json)
    text = api.call("GET", run["links"]["manifest"]).body.decode()
    assert [row["prompt"] for row in csv.DictReader(io.StringIO(text))] == ["a cat for a table"]


def test_rejected_lines_are_told(api: Api) -> None:
    data = b'{"prompt": "right"}\n{"prompt": "wrong", "steps": 1000}\n'
    run = finished(api, upload(api, data, "name=a.jsonl").json)
    assert (run["done"], run["rejected"]) == (1, 1)
    [line] = lines_of(api.call("GET", run["links"]["rejected"]))
    assert (line["line"], line["field"]) == (2, "steps")
    assert upload(api, data, "name=a.jsonl&strict=true").status == 422


def test_lines_begin_with_the_pictures_of_jobs_and_with_no_file_of_the_servers(api: Api) -> None:
    job = api.call("POST", "/v1/jobs", {"prompt": "a first one", "width": 64, "height": 64}).json
    images = [job["id"], f"job:{job['id']}", "0" * 32, "/etc/hostname", "s3://b/k", ["a"]]
    data = "".join(json.dumps({"prompt": "a cat", "image": each}) + "\n" for each in images).encode()
    run = finished(api, upload(api, data, "name=a.jsonl").json)
    # Its worker draws pictures of another size, which no job begins with.
    assert (run["state"], run["total"], run["rejected"]) == ("finished", 2, 4)
    lines = lines_of(api.call("GET", run["links"]["manifest"]))
    assert {line["image"] for line in lines} == {f"job:{job['id']}:64x64"}
    reasons = [line["reason"] for line in lines_of(api.call("GET", run["links"]["rejected"]))]
    assert [each.partition(": ")[0] for each in reasons] == [
        f"image is the picture of job {'0' * 32}, which is not known",
        "image is '/etc/hostname', and paths are not read here",
        "image is an s3:// address, which is not read here",
        "image is ['a']",
    ]


def test_a_file_that_is_sent_again_is_the_same_run(api: Api) -> None:
    first, second = (upload(api, b"a cat, twice\n", "seed_start=5").json for _ in range(2))
    assert first["run"] == second["run"]
    assert finished(api, first)["done"] == 1
    assert upload(api, b"a cat, twice\n", "seed_start=6").json["run"] != first["run"]


def test_a_run_is_its_callers_own(api: Api) -> None:
    mine, key = upload(api, b"a cat of mine\n").json, api.new_key("neighbour")
    assert api.call("GET", mine["links"]["self"], key=key).status == 404
    assert api.call("GET", mine["links"]["manifest"], key=key).status == 404
    assert api.call("DELETE", mine["links"]["self"], key=key).status == 404
    assert api.call("GET", "/v1/runs", key=key).json == {"runs": []}
    theirs = upload(api, b"a cat of mine\n", key=key).json
    assert theirs["run"] != mine["run"]
    assert mine["run"] in [each["run"] for each in api.call("GET", "/v1/runs").json["runs"]]


def test_a_run_can_be_cancelled(api: Api) -> None:
    run = upload(api, b"a cat that waits\n", f"model={NOBODYS}").json
    while api.call("GET", run["links"]["self"]).json["sent"] == 0:
        time.sleep(0.02)
    assert api.call("GET", run["links"]["manifest"]).status == 409
    assert api.call("DELETE", run["links"]["self"]).json["state"] == "cancelled"


@pytest.mark.parametrize(
    ("query", "data", "part"),
    [
        ("", b"", "The file is empty"),
        ("name=a.zip", b"PK\x03\x04", "an archive or a workbook"),
        ("name=a.txt", b"PK\x03\x04xxxx", "is a zip archive or a workbook"),
        ("name=a", b"a cat", 'a ends in ".", which is no known format: add format='),
        ("name=..", b"a cat", "name is '..': use a file's name"),
        ("format=xlsx", b"a cat", "format is 'xlsx': use one of txt"),
        ("name=a.csv", b"text\n", "a.csv has no line that is a job."),
        ("name=a.jsonl", b'{"steps": 4}\n', "no line that is a job"),
        ("stpes=4", b"a cat", "There is no parameter 'stpes': did you mean steps?"),
        ("steps=1000", b"a cat", "steps is 1000"),
        ("images=0", b"a cat", "The parameter images is '0'"),
        ("grid=prompt=a,b", b"a cat", "grid cannot cross prompt"),
        ("steps=4&steps=5", b"a cat", "steps is given twice"),
    ],
)
def test_what_is_no_prompt_file_is_refused(api: Api, query: str, data: bytes, part: str) -> None:
    answer = upload(api, data, query)
    assert answer.status == 422, answer.body
    assert part in answer.json["detail"]


def test_the_names_of_the_servers_files_are_told_nobody(api: Api) -> None:
    answers = [upload(api, b"PK\x03\x04xxxx", "name=a.txt"), upload(api, b"a cat", "name=../../a.csv")]
    run = finished(api, answers[1].json) if answers[1].status == 202 else {}
    texts = [each.body.decode() for each in answers] + [json.dumps(run)]
    assert not [text for text in texts if str(api.stack.home.path) in text]


def test_a_server_that_was_killed_goes_on_with_its_runs(new_stack: Callable[..., Stack]) -> None:
    stack = new_stack(workers=0, http=True)
    assert stack.http is not None
    api = Api(stack, stack.http.url, stack.http.key)
    text = "".join(f"cat {number}\n" for number in range(40)).encode()
    run = upload(api, text, "seed_start=1&model=fast&revision=" + "f" * 40).json
    while api.call("GET", run["links"]["self"]).json["sent"] == 0:
        time.sleep(0.02)
    stack.http.kill()
    stack.http.start()
    worker = fast_worker(stack)
    try:
        found = finished(api, run)
        assert (found["state"], found["done"], found["total"]) == ("finished", 40, 40)
        assert len(lines_of(api.call("GET", run["links"]["manifest"]))) == 40
    finally:
        worker.kill()
        worker.wait()


def test_the_fleet_is_told(api: Api) -> None:
    fleet = api.call("GET", "/v1/fleet").json
    assert [each["name"] for each in fleet["workers"]] == ["fast@test"]
    assert [(each["name"], each["workers"]) for each in fleet["models"]] == [("fast", 1)]
    assert all(isinstance(length, int) for length in fleet["queues"].values())
