from __future__ import annotations

import base64
import csv
import gzip
import io
import json
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from PIL import Image

from producer.cli.main import cli
from producer.gallery.fields import FIELDS
from producer.gallery.lines import read_lines
from producer.gallery.page import as_data
from producer.gallery.write import DEFAULT_LIMIT, MAX_LINK_S, in_order, write_gallery
from producer.ingest.manifest import write_manifest
from producer.ingest.message_templates import JobTemplates
from producer.ingest.plan import Cursor, Planned
from producer.prompts.entries import Entry
from producer.prompts.reader import read as prompt_entries
from producer.prompts.sources import source
from tests.conftest import EmptyBucket
from worker.contract.errors import CallerError, PermanentStorageError
from worker.contract.infotext import write
from worker.contract.job import JOB_FIELDS, Job
from worker.contract.record import JobRecord, State, Timings
from worker.storage.bucket import Bucket

HOSTILE = [
    "</script><script>window.pwned = 1</script>",
    '<img src=x onerror="window.pwned = 1">',
    "\"quotes\" & 'apostrophes'",
    "<!-- <script>",
    "👩‍🚀 on the 🌋",
    "قطة على سطح",
    "half a pair: \ud83d",
    "\u2028 and \u2029",
    "{{rows}} {{script}}",
]


def job_of(prompt: str = "a small cat", **fields: Any) -> Job:
    whole = {"width": 64, "height": 64, "steps": 4, "guidance_scale": 7.5, "model": "m", "revision": "r"}
    return Job.parse({"prompt": prompt, "seed": 7} | whole | fields)


def line_of(job: Job, uri: str | None = None, **more: Any) -> dict[str, Any]:
    fields = job.model_dump(mode="json")
    state = "done" if uri else "failed"
    return {"file": "p.txt", "line": 1, "id": job.id, "uri": uri, "state": state, **fields, "grid": {}} | more


def png(size: tuple[int, int] = (64, 64)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, "teal").save(file, "PNG")
    return file.getvalue()


def rows_of(page: Path) -> list[dict[str, Any]]:
    blocks = re.findall(r'<script type="application/json" class="rows">(.*?)</script>', page.read_text())
    return [row for block in blocks for row in json.loads(block)]


@pytest.fixture
def manifest(tmp_path: Path) -> Callable[..., str]:
    def write_lines(*lines: dict[str, Any], name: str = "run.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return str(path)

    return write_lines


@pytest.fixture
def no_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and an address, which presigning needs, and nothing that answers there."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1")


@pytest.fixture
def bucket(s3_environment: EmptyBucket) -> Bucket:
    return Bucket(s3_environment.name, "runs/1")


def stored(storage: Bucket, job: Job, picture: bytes | None = None) -> str:
    uri = storage.uri(job.id, job.format)
    record = JobRecord(id=job.id, state=State.DONE, job=job, uri=uri, timings=Timings(rendered=1.5))
    storage.put(job.id, job.format, picture or png(), record.model_dump_json().encode(), "image/png")
    return uri


# ---- The page ----


@pytest.mark.usefixtures("no_bucket")
def test_a_manifest_line_becomes_a_row_with_all_that_people_see(manifest: Callable[..., str]) -> None:
    job = job_of(seed=2**63 - 1, negative_prompt="fog", metadata={"ticket": 10**17, "tags": ["a"]})
    timings = {"queued": 0.25, "rendered": 12.345, "uploaded": None}
    run = manifest(line_of(job, "s3://b/images/x.png", timings=timings, grid={"steps": 4}))
    page = write_gallery(run)
    assert page.path == Path(run).with_name("run.html")
    assert (page.jobs, page.pictures, page.failed, page.notices) == (1, 1, 0, ())
    (row,) = rows_of(page.path)
    assert row.pop("url").startswith("http://127.0.0.1:1/b/images/x.png?X-Amz")
    assert row == {
        "line": "p.txt:1",
        "id": job.id,
        "state": "done",
        "uri": "s3://b/images/x.png",
        "prompt": "a small cat",
        "negative_prompt": "fog",
        "seed": str(2**63 - 1),  # A browser's numbers end at 2^53.
        "size": "64x64",
        "steps": "4",
        "guidance_scale": "7.5",
        "scheduler": "default",
        "model": "m",
        "revision": "r",
        "format": "png",
        "grid": {"steps": "4"},
        "metadata": {"ticket": str(10**17), "tags": '["a"]'},
        "timings": {"queued": "0.25", "rendered": "12.3"},
        "parameters": write(job),
    }


@pytest.mark.usefixtures("no_bucket")
def test_a_job_that_only_an_earlier_version_took_has_its_parameters(manifest: Callable[..., str]) -> None:
    fields = {**dict(job_of()), "image": f"sha256:{'ab' * 32}:64x64", "mask": "alpha", "mask_blur": 8}
    job = Job.parse(fields, is_new=False)
    (row,) = rows_of(write_gallery(manifest(line_of(job, "s3://b/images/x.png"))).path)
    assert row["parameters"] == write(job)


def test_guidance_in_a_part_of_the_steps_is_shown_and_in_the_infotext(manifest: Callable[..., str]) -> None:
    job = job_of(guidance_start=0.25, guidance_stop=0.5)
    page = write_gallery(manifest(line_of(job), line_of(job_of())))
    there, plain = rows_of(page.path)
    assert (there["guidance_start"], there["guidance_stop"]) == ("0.25", "0.5")
    assert "Guidance start: 0.25, Guidance stop: 0.5" in there["parameters"]
    # At their defaults they are left out, and the page says what these are.
    assert not {"guidance_start", "guidance_stop"} & set(plain)
    defaults = {each.name: each.default for each in FIELDS if each.default}
    assert (defaults["guidance_start"], defaults["guidance_stop"]) == ("0", "1")
    assert set(defaults) == {
        each.name
        for each in JOB_FIELDS.values()
        if each.is_hashed and not each.is_original and each.default not in ("", None, [])
    }


def test_failed_jobs_are_shown_with_their_error_and_need_no_bucket(manifest: Callable[..., str]) -> None:
    run = manifest(line_of(job_of(), error="It broke.", error_type="RenderError"))
    page = write_gallery(run)
    (row,) = rows_of(page.path)
    assert (row["state"], row["error"], row["error_type"]) == ("failed", "It broke.", "RenderError")
    assert (page.failed, page.pictures, page.expires_at) == (1, 0, None)
    assert "img-src &#x27;none&#x27;" in page.path.read_text()


def test_hostile_texts_cannot_leave_their_block(manifest: Callable[..., str]) -> None:
    texts = [*HOSTILE[:6], *HOSTILE[7:]]
    lines = [line_of(job_of(text)) for text in texts]
    lines.append({"state": "failed", "prompt": HOSTILE[6], "metadata": {text: text for text in HOSTILE}})
    page = write_gallery(manifest(*lines), title="</title><script>window.pwned = 1</script>")
    text = page.path.read_text()
    assert [row["prompt"] for row in rows_of(page.path)] == [*texts, HOSTILE[6]]
    assert "pwned" not in re.sub(r'<script type="application/json".*?</script>', "", text).replace(
        "&lt;/title&gt;&lt;script&gt;window.pwned = 1", ""
    )
    # Facts, rows, script; nothing that a text opened or closed.
    assert text.count("<script") == text.count("</script>") == 3


@pytest.mark.parametrize("text", HOSTILE)
def test_data_is_ascii_without_markup(text: str) -> None:
    data = as_data({text: text})
    assert json.loads(data) == {text: text}
    assert data.isascii()
    assert not set("<>&") & set(data)


@pytest.mark.usefixtures("no_bucket")
def test_the_policy_names_where_pictures_come_from_and_nothing_else(manifest: Callable[..., str]) -> None:
    page = write_gallery(manifest(line_of(job_of(), "s3://b/x.png"))).path.read_text()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy is not None
    assert "default-src &#x27;none&#x27;; img-src http://127.0.0.1:1; style-src" in policy[1]
    assert "unsafe" not in policy[1]
    outside = set(re.findall(r"https?://[\w.:]+", re.sub(r'class="rows">.*?</script>', "", page, flags=re.S)))
    assert outside == {"http://127.0.0.1:1"}


@pytest.mark.usefixtures("no_bucket")
def test_links_with_temporary_keys_are_announced_to_end_sooner(
    manifest: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SESSION_TOKEN", "token")
    page = write_gallery(manifest(line_of(job_of(), "s3://b/x.png")), expires_s=60)
    assert '"temporary_keys":true' in page.path.read_text()


def test_an_older_page_stays_when_the_new_one_fails(manifest: Callable[..., str], tmp_path: Path) -> None:
    old = tmp_path / "run.html"
    old.write_text("old")
    with pytest.raises(CallerError, match="no job in"):
        write_gallery(manifest())
    assert old.read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.html", "run.jsonl"]


def test_no_more_than_the_limit_is_shown_and_the_page_has_a_notice(manifest: Callable[..., str]) -> None:
    run = manifest(*(line_of(job_of(seed=seed)) for seed in range(3)))
    assert write_gallery(run, limit=3).notices == ()
    page = write_gallery(run, limit=2)
    assert page.jobs == 2
    assert page.notices == ("Only the first 2 jobs are shown: raise --limit for more.",)
    assert page.notices[0] in page.path.read_text()


@pytest.mark.parametrize("wrong", [{"expires_s": 0}, {"expires_s": 604_801}, {"limit": 0}])
def test_limits_are_checked_before_anything_is_read(wrong: dict[str, int]) -> None:
    with pytest.raises(CallerError, match=r"604,800|at least one"):
        write_gallery("nowhere.jsonl", **wrong)  # type: ignore[arg-type]


# ---- The manifest ----


def read(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    warnings: list[str] = []
    return list(read_lines(str(path), warnings.append)), warnings


def test_a_torn_or_foreign_line_is_left_out_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl.part"
    path.write_text('{"id": "a"}\n\n[1]\n{"id": "b"}\n{"id": "c')
    lines, warnings = read(path)
    assert [line["id"] for line in lines] == ["a", "b"]
    assert warnings == ["Not readable in the manifest and left out: 2 lines, the first is line 3."]


def test_csv_and_gzip_are_read_as_jsonl_is(tmp_path: Path) -> None:
    path = tmp_path / "run.csv.gz"
    with gzip.open(path, "wt", newline="") as file:
        table = csv.DictWriter(file, ["id", "prompt", "seed", "guidance_scale", "grid", "rendered", "error"])
        table.writeheader()
        table.writerow(
            {"id": "a", "prompt": "two\nlines", "seed": 2**62, "guidance_scale": 7.5, "grid": '{"steps": 20}'}
            | {"rendered": 1.5}
        )
    lines, warnings = read(path)
    assert lines == [
        {"id": "a", "prompt": "two\nlines", "seed": 2**62, "guidance_scale": 7.5, "grid": {"steps": 20}}
        | {"timings": {"rendered": 1.5}}
    ]
    assert not warnings


@pytest.mark.usefixtures("no_bucket")
@pytest.mark.parametrize("name", ["run.jsonl", "run.csv"])
def test_what_ingest_writes_is_shown_whole(tmp_path: Path, name: str) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a small cat\n")
    job = job_of("a small\ncat", negative_prompt="fog", metadata={"set": "a"}, seed=2**60)
    fields = job.model_dump(mode="json", exclude={"priority"})
    planned = Planned(0, 1, JobTemplates(lambda each: each).fill(fields), {"steps": 4}, Cursor())
    result = {"state": "done", "uri": "s3://b/images/x.png", "timings": {"rendered": 1.5}}
    write_manifest(tmp_path / name, [planned], [source(str(prompts))], lambda *_: result)
    (row,) = rows_of(write_gallery(str(tmp_path / name)).path)
    assert row.pop("line").endswith("prompts.txt:1")
    assert row["parameters"] == write(job)
    assert (row["seed"], row["steps"], row["guidance_scale"]) == (str(2**60), "4", "7.5")
    assert (row["grid"], row["metadata"], row["timings"]) == (
        {"steps": "4"},
        {"set": "a"},
        {"rendered": "1.5"},
    )


@pytest.mark.usefixtures("no_bucket")
@pytest.mark.parametrize("name", ["run.jsonl", "run.csv"])
def test_numbers_that_nothing_can_count_with_and_lines_without_end_do_no_harm(
    tmp_path: Path, name: str
) -> None:
    path = tmp_path / name
    digits = "9" * 400
    if name == "run.csv":
        path.write_text(
            f"id,seed,guidance_scale,rendered,error\na,{digits},NaN,{digits},x\nb,7,inf,1e999,x\n"
        )
    else:
        numbers = f'"seed": {digits}, "guidance_scale": NaN, "timings": {{"rendered": {digits}}}'
        path.write_text(
            f'{{"id": "a", {numbers}, "at": 1e999, "error": "x"}}\n{{"error": "{"x" * (3 << 20)}"}}\n'
            '{"id": "b", "seed": 7, "error": "x", "guidance_scale": -Infinity}\n'
        )
    first, second = rows_of(write_gallery(str(path)).path)
    assert (first["id"], second["id"], second["seed"]) == ("a", "b", "7")


@pytest.mark.usefixtures("no_bucket")
def test_a_csv_manifest_holds_no_formulas_and_is_read_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a small cat\n")
    prompts = ["=1+1", "'=1", "-5", "@x", "+49 cats", "\t=x", "a=b"]
    planned = [
        Planned(0, 1, JobTemplates(lambda each: each).fill({"prompt": each, "seed": 1}), {}, Cursor())
        for each in prompts
    ]
    written = source(str(tmp_path / "p.txt"))
    write_manifest(tmp_path / "m.csv", planned, [written], lambda *_: {"state": "failed", "error": "-x"})
    with (tmp_path / "m.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["prompt"] for row in rows] == ["'=1+1", "''=1", "-5", "'@x", "'+49 cats", "'\t=x", "a=b"]
    assert {row["error"] for row in rows} == {"'-x"}
    assert [line["prompt"] for line in read(tmp_path / "m.csv")[0]] == prompts
    again = prompt_entries(source(str(tmp_path / "m.csv")))
    assert [entry.fields["prompt"] for entry in again if isinstance(entry, Entry)] == prompts


def test_a_prompt_file_beside_its_manifest_is_refused_by_the_name_of_it(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("prompt\na cat\n")
    (tmp_path / "p.csv.manifest.jsonl").touch()
    with pytest.raises(CallerError, match=r"If it is a prompt file, name .*p\.csv\.manifest\.jsonl\."):
        write_gallery(str(tmp_path / "p.csv"))


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("absent.jsonl", None, "There is no manifest"),
        ("not.jsonl.gz", b"plain", "cannot be read"),
        ("latin.jsonl", b'{"prompt": "caf\xe9"}\n', "cannot be read"),
        ("prompts.csv", b"prompt,seed\na cat,7\n", "prompts.csv is no manifest, .* run `smallcat ingest "),
        ("prompts.jsonl", b'{"prompt": "a cat"}\n', "prompts.jsonl is no manifest"),
        ("prompts.txt", b"a cat\n", "prompts.txt is no manifest"),
        ("texts.jsonl", b'"a cat"\n', "texts.jsonl is no manifest"),
    ],
)
def test_a_manifest_that_cannot_be_read_is_one_sentence(
    tmp_path: Path, name: str, content: bytes | None, match: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CallerError, match=match):
        write_gallery(str(tmp_path / name))


@pytest.mark.parametrize(
    "line",
    [
        {},
        {"prompt": ["no text"], "seed": "x", "metadata": [1], "grid": 7, "timings": "fast", "state": 9},
        {"uri": "https://elsewhere/x.png", "state": "done"},
        {"uri": 7, "state": "done", "job": "none"},
    ],
)
def test_odd_lines_become_rows_without_a_picture(manifest: Callable[..., str], line: dict[str, Any]) -> None:
    (row,) = rows_of(write_gallery(manifest(line)).path)
    assert "url" not in row


# ---- The bucket ----


def test_an_address_shows_the_pictures_below_it_from_their_records(bucket: Bucket, tmp_path: Path) -> None:
    first, second = job_of("one"), job_of("two")
    uris = {first.id: stored(bucket, first), second.id: stored(bucket, second)}
    stored(Bucket(bucket.name, "runs/10"), job_of("not this one"))
    # A worker died before it put the record: the job is not done.
    half = job_of("nor this one")
    bucket._put(bucket._key(half.id, half.format), png(), "image/png")
    page = write_gallery(f"s3://{bucket.name}/runs/1", tmp_path / "page.html")
    rows = {row["id"]: row for row in rows_of(page.path)}
    assert {name: row["uri"] for name, row in rows.items()} == uris
    assert rows[first.id]["parameters"] == write(first)
    assert rows[first.id]["timings"] == {"rendered": "1.5"}
    assert all(isinstance(row["at"], float) for row in rows.values())


def test_what_a_manifest_leaves_open_comes_from_the_record(
    bucket: Bucket, manifest: Callable[..., str]
) -> None:
    job = job_of("from the record")
    page = write_gallery(manifest({"id": job.id, "uri": stored(bucket, job), "state": "done"}))
    assert rows_of(page.path)[0]["prompt"] == "from the record"


def test_a_manifest_line_that_lacks_a_field_of_its_job_is_completed_from_the_record(
    bucket: Bucket, tmp_path: Path
) -> None:
    """Earlier versions' CSV manifests have no guidance_start: the line alone is another picture's."""
    job, gone = job_of(guidance_start=0.25), job_of(guidance_start=0.5)
    uris = [stored(bucket, job), bucket.uri(gone.id, gone.format)]
    path = tmp_path / "run.csv"
    with path.open("w", newline="") as file:
        lines = [line_of(each, uri) for each, uri in zip((job, gone), uris, strict=True)]
        columns = ["id", "uri", "state", *(name for name in Job.model_fields if name != "guidance_start")]
        table = csv.DictWriter(file, [name for name in columns if name != "metadata"], extrasaction="ignore")
        table.writeheader()
        table.writerows(lines)
    page = write_gallery(str(path))
    whole, lacking = rows_of(page.path)
    assert (whole["guidance_start"], whole["parameters"]) == ("0.25", write(job))
    # Without a record its picture is unknown: better no infotext than another picture's.
    assert "parameters" not in lacking
    assert page.notices == ("1 record could not be read from the bucket.",)


def test_embedded_thumbnails_are_small_webp_in_order(bucket: Bucket, manifest: Callable[..., str]) -> None:
    jobs = [job_of(seed=seed) for seed in range(3)]
    uris = [stored(bucket, job, png((512, 256))) for job in jobs[:2]]
    gone = bucket.uri(jobs[2].id, jobs[2].format)
    run = manifest(*(line_of(job, uri) for job, uri in zip(jobs, [*uris, gone], strict=True)))
    page = write_gallery(run, embed=True)
    assert page.notices == ("1 picture could not be read from the bucket.",)
    found = re.search(r'id="thumbs-0">(.*?)</script>', page.path.read_text())
    assert found is not None
    first, second, none = json.loads(found[1])
    assert none is None
    for data in (first, second):
        with Image.open(io.BytesIO(base64.b64decode(data))) as image:
            assert (image.format, image.size) == ("WEBP", (256, 128))
    assert "img-src data: http" in page.path.read_text()


def test_a_bucket_that_is_not_there_is_an_error_of_the_service(bucket: Bucket, tmp_path: Path) -> None:
    with pytest.raises(PermanentStorageError, match="NoSuchBucket"):
        write_gallery("s3://no-such-bucket-here/x", tmp_path / "page.html")
    with pytest.raises(CallerError, match="no job in"):
        write_gallery(f"s3://{bucket.name}/empty", tmp_path / "page.html")
    assert not list(tmp_path.iterdir())


# ---- Streaming, and the command ----


def test_results_come_in_order_and_few_items_are_read_ahead() -> None:
    read_so_far = 0

    def items() -> Iterator[int]:
        nonlocal read_so_far
        for number in range(1_000):
            read_so_far += 1
            yield number

    results = in_order(lambda number: (number, threading.get_ident()), items(), threads=4)
    assert next(results)[0] == 0
    assert read_so_far <= 16
    rest = list(results)
    assert [number for number, _ in rest] == list(range(1, 1_000))


def test_what_a_thread_raises_ends_the_stream() -> None:
    def refuse(number: int) -> int:
        if number == 5:
            raise CallerError("five")
        return number

    with pytest.raises(CallerError, match="five"):
        list(in_order(refuse, iter(range(10_000)), threads=2))


def test_the_command_writes_the_page_and_prints_its_path(manifest: Callable[..., str]) -> None:
    run = manifest(line_of(job_of()))
    ran = CliRunner().invoke(cli, ["gallery", run])
    assert ran.exit_code == 0
    assert "run.html" in ran.output
    assert "0 pictures, 1 failed" in ran.output
    as_json = CliRunner().invoke(cli, ["gallery", run, "--json", "--title", "A run"])
    answer = json.loads(as_json.output)
    assert (answer["jobs"], answer["failed"], answer["expires_at"]) == (1, 1, None)
    assert "<title>A run</title>" in Path(answer["path"]).read_text()


def test_the_command_has_the_defaults_of_the_function() -> None:
    defaults = {option.name: option.default for option in cli.commands["gallery"].params}
    assert defaults["expires_s"] == MAX_LINK_S
    assert defaults["limit"] == DEFAULT_LIMIT
