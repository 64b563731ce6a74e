"""The command line: exit codes, one JSON document, one sentence for what goes wrong, never a traceback."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest
from PIL import Image
from redis import Redis

from producer import JobHandle, submit_file
from producer.cli import local_stack
from producer.cli.job_options import JOB_OPTIONS
from producer.cli.main import cli, main
from tests.worker.contract.test_job import OTHER_VALUES
from tests.worker.engine.fake_runner import SERVED, job_of, picture_of
from worker.contract import infotext
from worker.contract.errors import (
    NotFiniteError,
    PromptFileError,
    StorageError,
    UnknownJobError,
    UnknownModelError,
)
from worker.contract.job import Job
from worker.contract.prompt_syntax import UNUSED_NEGATIVE, warnings_of
from worker.contract.queues import queue_of
from worker.contract.record import JobRecord, State
from worker.jobs.image_file import encode
from worker.state.fleet import Fleet, WorkerInfo
from worker.state.records import Records
from worker.state.redis_client import connect
from worker.storage.bucket import Bucket


@dataclass(frozen=True)
class Ran:
    """What a command left."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def environment(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    monkeypatch.setenv("SMALLCAT_SUBMIT_TIMEOUT_S", "1")
    return environment


@pytest.fixture
def client(environment: dict[str, str]) -> Iterator[Redis]:
    with connect(environment["REDIS_URL"], retry_s=2) as client:
        worker = WorkerInfo(
            name="w1", served=SERVED, started_at=1.0, device="CPU", attention="sdpa", max_rows=8, versions={}
        )
        Fleet(client, 1_000).announce(worker)
        yield client


class Shell:
    """Runs commands in this process, as `smallcat` runs them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch = monkeypatch
        self._capsys = capsys

    def __call__(self, *arguments: str) -> Ran:
        self._monkeypatch.setattr(sys, "argv", ["smallcat", *arguments])
        with pytest.raises(SystemExit) as exit_:
            main()
        out, err = self._capsys.readouterr()
        assert "Traceback" not in err
        assert isinstance(exit_.value.code, int)
        return Ran(exit_.value.code, out, err)


@pytest.fixture
def smallcat(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(monkeypatch, capsys)


def claim(client: Redis, job: Job) -> Records:
    records = Records(client, 1_000)
    records.claim(job, "m1", worker="w1", lease_s=30, max_attempts=3, queue=queue_of(job))
    return records


def finish(client: Redis, environment: dict[str, str], job: Job, warnings: Sequence[str] = ("cut",)) -> str:
    """Have the job done, as by a worker. Returns its address."""
    storage = Bucket(environment["S3_BUCKET"])
    uri = storage.uri(job.id, job.format)
    record = JobRecord(
        id=job.id, state=State.DONE, job=job, step=4, steps=4, uri=uri, warnings=tuple(warnings)
    )
    picture = encode(picture_of(job), job.format, infotext.write(job))
    storage.put(job.id, job.format, picture, record.model_dump_json().encode(), "image/png")
    claim(client, job).done(record)
    return uri


# --- submit -----------------------------------------------------------------------------------------------


def test_every_job_field_is_an_option_and_in_the_help(smallcat: Shell) -> None:
    # Whose job it is follows from who submits.
    assert set(JOB_OPTIONS) == set(Job.model_fields) - {"prompt", "tenant"}
    ran = smallcat("submit", "--help")
    assert ran.code == 0
    for field in JOB_OPTIONS:
        assert f"--{field.replace('_', '-')}" in ran.out


def test_the_help_of_each_command_has_its_own_default_priority(smallcat: Shell) -> None:
    # A file's jobs are rendered after those that a caller waits for.
    for command, priority in (("submit", 5), ("ingest", 3)):
        ran = " ".join(smallcat(command, "--help").out.split())
        assert f"jobs of a higher priority are rendered first. {priority} when not given." in ran


def test_files_that_are_no_prompts_are_named(smallcat: Shell, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n# nothing\n\n")
    ran = smallcat("ingest", str(tmp_path / "empty.txt"), "--check")
    assert (ran.code, ran.err) == (0, "note  the files have no prompts\n")
    ran = smallcat("ingest", str(tmp_path), "--check")
    assert (ran.code, ran.err) == (2, f"{tmp_path} is a folder: name the prompt files in it.\n")
    (tmp_path / "one.txt").write_text("a cat\n")
    for values in (3, "20,30"):
        with pytest.raises(PromptFileError, match="its values for steps must be a list"):
            submit_file(tmp_path / "one.txt", grid={"steps": values})  # type: ignore[dict-item]


def commands(group: click.Group, *path: str) -> Iterator[tuple[list[str], click.Command]]:
    """All commands, those of groups within the group as well, with the words that call them."""
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, *path, name)
        else:
            yield [*path, name], command


def test_every_command_has_help_and_json(smallcat: Shell) -> None:
    for words, command in commands(cli):
        assert smallcat(*words, "--help").code == 0
        assert command.help
        # A server prints no document; figures are in Prometheus' own format.
        has_json = any("--json" in parameter.opts for parameter in command.params)
        assert has_json or words in (["serve"], ["metrics"], ["webhooks", "run"]), f"{words} takes --json"


def test_submitting_prints_the_id(smallcat: Shell, client: Redis) -> None:
    ran = smallcat("submit", "a small cat", "--seed", "3")
    assert ran.code == 0
    assert ran.out == f"{JobHandle(ran.out.strip()).record().id}\n"
    again = smallcat("submit", "a small cat", "--seed", "3", "--json")
    assert again.document["id"] == ran.out.strip()
    assert JobHandle(again.document["id"], again.document["submission"]).record()


def test_a_warning_is_said_once(
    smallcat: Shell, client: Redis, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the submission in the words of options, and not again in those of fields with the picture."""
    words = ["a <lora:wild:0.5>", "--negative-prompt", "x", "--guidance-scale", "1", "--seed", "3"]
    ran = smallcat("submit", *words)
    job = JobHandle(ran.out.strip()).record().job
    finish(client, environment, job, (*warnings_of(job), "cut"))
    result = JobHandle(job.id).result(timeout=5)
    monkeypatch.setattr("producer.cli.main._follow", lambda *_: result)
    waited = smallcat("submit", *words, "--wait")
    assert waited.code == 0
    assert waited.err == f"{ran.err}note  cut\n"
    assert ran.err.count("note  ") == len(warnings_of(job)) == 2


def test_every_option_reaches_the_job(smallcat: Shell, client: Redis, tmp_path: Path) -> None:
    picture = tmp_path / "shoe.png"
    cut_out = Image.new("RGBA", (640, 480))
    cut_out.paste("red", (100, 100, 300, 300))
    cut_out.save(picture)
    digits = hashlib.sha256(picture.read_bytes()).hexdigest()
    given = {name: OTHER_VALUES[name] for name in Job.model_fields if name not in ("prompt", "tenant")}
    assert set(given) == set(JOB_OPTIONS)
    # The mask alpha has an edge of its own.
    given |= {"model": SERVED.name, "revision": SERVED.revision, "mask_blur": 0}
    # No job may have both.
    for left_out in (
        "mask mask_blur padding preserve_unmasked",
        "upscale upscale_steps upscale_strength upscaler",
    ):
        some = {name: value for name, value in given.items() if name not in left_out.split()}
        texts = {
            name: json.dumps(each) if isinstance(each, dict | list) else str(each)
            for name, each in some.items()
        }
        # Choices go by the names that people use.
        texts |= {"scheduler": "Euler a", "metadata": '{"mine": [1, "ä"]}'}
        # A path becomes what it has.
        texts["image"], some["image"] = str(picture), f"sha256:{digits}:640x480"
        options = [word for name, text in texts.items() for word in (f"--{name.replace('_', '-')}", text)]
        ran = smallcat("submit", "a small cat", *options)
        assert ran.code == 0, ran.err
        job = JobHandle(ran.out.strip()).record().job
        assert job.model_dump(mode="json", include={"prompt", *some}) == some | {
            "prompt": "a small cat",
            "scheduler": "euler_ancestral",
            "metadata": {"mine": [1, "ä"]},
        }


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["submit"], "PROMPT"),
        (["submit", " "], "prompt is blank"),
        (["submit", "a", "small", "cat"], "write it in quotes, 'a small cat'."),
        (["submit", "it's", "--seed", "3", "a cat"], "write it in quotes, "),
        (["submit", "x", "--width", "65"], "use 64 or 72"),
        (["submit", "x", "--steps", "many"], "many"),
        (["submit", "x", "--scheduler", "dim"], "use one of default, ddim"),
        (["submit", "x", "--stepps", "3"], "--steps"),
        (["submit", "x", "--metadata", "{"], "it is not JSON"),
        (["submit", "x", "--metadata", "[" * 100_000], "it is not JSON"),
        (["submit", "x", "--metadata", "[1]"], "metadata is [1]"),
        (["submit", "x", "--metadata", '{"x": NaN}'], "metadata is not JSON"),
        (["submit", "x", "--wait", "--timeout", "-1"], "--timeout"),
        (["submit", "x", "--wait", "--timeout", "nan"], "--timeout"),
        (["submit", "x", "--wait", "--timeout", "inf"], "--timeout"),
        (["submit", "\udcff"], "prompt"),
        (["paint", "x"], "paint"),
        (["cancel"], "Give their ids, or --run"),
        (["cancel", "x", "--run", "y"], "not both"),
        (["cancel", "--run", "y", "--submission", "z"], "not both"),
        (["cancel", "--submission", "z"], "Give their ids"),
        (["status", "--submission", "z"], "give one id, not 0"),
        (["status", "--run", "nosuch"], "There is no run nosuch"),
        (["fetch"], "JOB_IDS"),
        ([], "Usage"),
        (["status", "nonsense"], "no record of a job nonsense"),
        (["cancel", "0" * 32], "no record of a job"),
        (["fetch", "0" * 32], "no record of a job"),
    ],
    ids=lambda value: (
        " ".join(value)[:40].encode("ascii", "replace").decode() if isinstance(value, list) else ""
    ),
)
def test_a_usage_error_is_a_sentence_and_2(
    smallcat: Shell, client: Redis, arguments: list[str], part: str
) -> None:
    ran = smallcat(*arguments)
    assert ran.code == 2
    assert part in ran.err
    assert len(ran.err) < 1_500
    assert not list(client.scan_iter("smallcat:job:*"))


def test_a_misspelt_setting_is_a_sentence_and_2(
    smallcat: Shell, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMALLCAT_LEESE_S", "3")
    for arguments in (["submit", "x"], ["status", "x"], ["doctor"]):
        ran = smallcat(*arguments)
        assert (ran.code, ran.err) == (
            2,
            "There is no setting SMALLCAT_LEESE_S. Did you mean SMALLCAT_LEASE_S?\n",
        )


def test_a_service_out_of_reach_is_a_sentence_and_3(
    smallcat: Shell, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        monkeypatch.setenv("REDIS_URL", f"redis://:hunter2@127.0.0.1:{held.getsockname()[1]}/0")
        for arguments in (["submit", "x"], ["status", "0" * 32], ["cancel", "x"], ["fetch", "x"]):
            ran = smallcat(*arguments)
            assert ran.code == 3
            assert "is out of reach" in ran.err
            assert "hunter2" not in ran.err


# --- status, cancel, fetch --------------------------------------------------------------------------------


def test_status_of_each_state(smallcat: Shell, client: Redis, environment: dict[str, str]) -> None:
    job_id = smallcat("submit", "a small cat", "--seed", "3").out.strip()
    job = JobHandle(job_id).record().job
    ran = smallcat("status", job_id)
    assert ran.code == 0
    assert ran.out.splitlines() == [
        f"{job_id}  queued",
        "prompt     a small cat",
        "seed       3",
        f"size       {job.width}x{job.height}",
        "queue      1 waiting, 1 worker",
    ]
    claim(client, job).progress({job_id: (1, 4)}, 30)
    assert "step       1 of 4" in smallcat("status", job_id).out
    uri = finish(client, environment, job)
    assert f"uri        {uri}" in smallcat("status", job_id).out
    assert smallcat("cancel", job_id).out == f"{job_id}  was done already\n"
    document = smallcat("status", job_id, "--json").document
    assert (document["id"], document["state"], document["uri"]) == (job_id, "done", uri)
    assert document["warnings"] == ["cut"]


def test_a_run_s_name_given_as_an_id_gets_a_hint(smallcat: Shell, client: Redis) -> None:
    client.hset("smallcat:run:cats", mapping={"fed": "1", "created": "1"})
    assert "cats is a run: smallcat status --run cats" in smallcat("status", "cats").err
    assert "is a run" not in smallcat("status", "dogs").err


def test_status_shows_that_no_worker_serves_the_job(smallcat: Shell, client: Redis) -> None:
    job_id = smallcat("submit", "x", "--model", "another").out.strip()
    assert 'No worker serves the model "another"' in smallcat("status", job_id).out
    assert "No worker serves" in smallcat("status", job_id, "--json").document["note"]


def test_cancelling_several_jobs(smallcat: Shell, client: Redis) -> None:
    queued = smallcat("submit", "x", "--seed", "1").out.strip()
    running = smallcat("submit", "x", "--seed", "2").out.strip()
    claim(client, JobHandle(running).record().job)
    ran = smallcat("cancel", queued, running)
    assert ran.code == 0
    assert ran.out.splitlines() == [f"{queued}  cancelled", f"{running}  cancelling"]
    assert smallcat("cancel", queued, running, "--json").document == {queued: "cancelled", running: "running"}


def test_a_submission_is_given_up_alone_and_the_job_goes_on_for_the_others(
    smallcat: Shell, client: Redis, environment: dict[str, str], tmp_path: Path
) -> None:
    mine = smallcat("submit", "x", "--seed", "1", "--metadata", '{"of": "me"}', "--json").document
    others = smallcat("submit", "x", "--seed", "1", "--metadata", '{"of": "others"}', "--json").document
    assert mine["id"] == others["id"]
    assert mine.keys() == {"id", "seed", "submission"}
    job_id, of_mine = mine["id"], ("--submission", mine["submission"])
    of_others = ("--submission", others["submission"])
    records = claim(client, JobHandle(job_id).record().job)
    assert smallcat("cancel", job_id, *of_mine).out == f"{job_id}  cancelled\n"
    assert smallcat("status", job_id, *of_mine).out.splitlines()[0] == f"{job_id}  cancelled"
    assert smallcat("status", job_id, *of_others, "--json").document["job"]["metadata"] == {"of": "others"}
    assert records.progress({job_id: (1, 4)}, 30) == []
    finish(client, environment, JobHandle(job_id).record().job)
    ran = smallcat("fetch", job_id, *of_mine, "--output", str(tmp_path))
    assert (ran.code, "was cancelled" in ran.err) == (1, True)
    assert smallcat("fetch", job_id, *of_others, "--output", str(tmp_path)).code == 0
    # What is done stays done, and a submission that was given up stays so.
    assert smallcat("cancel", job_id, *of_others, "--json").document == {job_id: "done"}
    assert smallcat("cancel", job_id, *of_mine, "--json").document == {job_id: "cancelled"}


def test_the_last_submission_that_is_given_up_stops_the_job(smallcat: Shell, client: Redis) -> None:
    named = [smallcat("submit", "x", "--seed", "1", "--json").document for _ in range(2)]
    job_id = named[0]["id"]
    records = claim(client, JobHandle(job_id).record().job)
    said = [smallcat("cancel", job_id, "--submission", each["submission"]).out.split()[1] for each in named]
    assert said == ["cancelled", "cancelling"]
    assert records.progress({job_id: (1, 4)}, 30) == [job_id]


@pytest.mark.parametrize("command", ["status", "cancel", "fetch"])
def test_a_submission_that_there_never_was_is_told_and_cancels_nothing(
    smallcat: Shell, client: Redis, command: str
) -> None:
    job_id = smallcat("submit", "x", "--seed", "1").out.strip()
    ran = smallcat(command, job_id, "--submission", "nosuch")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err == f"There is no submission nosuch of job {job_id}: that is wrong, or it expired.\n"
    assert JobHandle(job_id).state() is State.QUEUED
    with pytest.raises(UnknownJobError, match="There is no submission nosuch of job"):
        JobHandle(job_id, "nosuch").cancel()
    ran = smallcat(command, job_id, job_id, "--submission", "nosuch")
    assert (ran.code, "is of one job: give one id, not 2." in ran.err) == (2, True)
    assert JobHandle(job_id).state() is State.QUEUED


def test_submitting_says_at_once_that_no_worker_serves_the_model_and_what_is_served(
    smallcat: Shell, client: Redis
) -> None:
    ran = smallcat("submit", "x", "--model", "another", "--json")
    assert ran.code == 0
    assert len(ran.document["id"]) == 32
    assert 'No worker serves the model "another"' in ran.err
    assert "start one with `SMALLCAT_MODEL=another celery -A worker worker`" in ran.err
    assert f"The live workers serve {SERVED.name}.\n" in ran.err
    ran = smallcat("submit", "x", "--model", f"{SERVED.name}x")
    assert f"Did you mean --model {SERVED.name}?" in ran.err
    first = smallcat("submit", "x")
    assert first.err == ""
    # One that waits for another waits for no worker.
    second = smallcat("submit", "x", "--image", f"job:{first.out.strip()}")
    assert (second.code, second.err) == (0, "")


def test_output_can_be_a_file_of_the_picture_s_format(
    smallcat: Shell, client: Redis, environment: dict[str, str], tmp_path: Path
) -> None:
    job_id = smallcat("submit", "x", "--seed", "1").out.strip()
    finish(client, environment, JobHandle(job_id).record().job)
    file = tmp_path / "new" / "cat.png"
    ran = smallcat("fetch", job_id, "--output", str(file))
    assert ran.code == 0
    assert f"id    {job_id}" in ran.out.splitlines()
    assert Image.open(file).format == "PNG"
    ran = smallcat("fetch", job_id, "--output", str(tmp_path / "cat.jpg"))
    assert (ran.code, "the picture is png" in ran.err) == (2, True)
    ran = smallcat("fetch", job_id, "0" * 32, "--output", str(file))
    assert (ran.code, "name a folder" in ran.err) == (2, True)
    before = client.zcard("smallcat:latest")
    ran = smallcat("submit", "x", "--format", "png", "--output", str(tmp_path / "cat.webp"))
    assert (ran.code, "is a name for webp" in ran.err) == (2, True)
    assert client.zcard("smallcat:latest") == before
    for command in (("submit", "x"), ("fetch", job_id)):
        ran = smallcat(*command, "--output", str(tmp_path / "cat.bmp"))
        assert (
            ran.code,
            "ends in .bmp, in which no picture is saved: use one of .png, .webp" in ran.err,
        ) == (
            2,
            True,
        )
    assert client.zcard("smallcat:latest") == before
    for folder in ("2026.11.28", "v1.5"):
        assert smallcat("fetch", job_id, "--output", str(tmp_path / folder)).code == 0
    (tmp_path / "photos.d").mkdir()
    assert smallcat("fetch", job_id, "--output", str(tmp_path / "photos.d")).code == 0
    # The name says the format where nothing else does.
    ran = smallcat("submit", "x", "--seed", "2", "--output", str(tmp_path / "b.webp"), "--timeout", "0")
    assert ran.code == 1
    assert smallcat("status", "--limit", "1", "--json").document[0]["job"]["format"] == "webp"


def test_without_the_variables_an_error_names_the_stack_that_runs_here(
    smallcat: Shell, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with socket.socket() as held, socket.socket() as stack:
        stack.bind(("127.0.0.1", 0))
        (tmp_path / ".smallcat").mkdir()
        port = stack.getsockname()[1]
        (tmp_path / ".smallcat" / "env").write_text(f"export REDIS_URL=redis://:x@127.0.0.1:{port}/0\n")
        monkeypatch.chdir(tmp_path)
        monkeypatch.delenv("REDIS_URL", raising=False)
        assert local_stack.hint() is None, "nothing listens there"
        stack.listen()
        found = local_stack.hint()
        assert str(found).endswith("to use it: source .smallcat/env")
        (tmp_path / "below").mkdir()
        monkeypatch.chdir(tmp_path / "below")
        assert str(tmp_path / ".smallcat" / "env") in str(local_stack.hint())
        held.bind(("127.0.0.1", 0))
        monkeypatch.setenv("REDIS_URL", f"redis://127.0.0.1:{held.getsockname()[1]}/0")
        assert local_stack.hint() is None, "the shell has been told of another one"
        monkeypatch.setenv("SMALLCAT_SUBMIT_TIMEOUT_S", "0.2")
        monkeypatch.setattr(local_stack, "hint", lambda: found)
        ran = smallcat("status", "0" * 32)
        assert (ran.code, ran.err.splitlines()[-1]) == (3, found)


def test_status_and_cancel_go_on_past_unknown_ids_and_the_code_says_that_one_was(
    smallcat: Shell, client: Redis
) -> None:
    known = smallcat("submit", "x", "--seed", "1").out.strip()
    other = "0" * 32
    ran = smallcat("status", other, known, "--json")
    assert ran.code == 2
    assert [(each["id"], each["state"]) for each in ran.document] == [(other, "unknown"), (known, "queued")]
    assert "no record of a job" in ran.err
    ran = smallcat("cancel", other, known, "nonsense", "--json")
    assert (ran.code, ran.document) == (2, {other: "unknown", known: "cancelled", "nonsense": "unknown"})
    assert len(ran.err.splitlines()) == 2
    ran = smallcat("status", other, known)
    assert ran.out.splitlines()[0] == f"{other}  unknown"
    assert f"{known}  cancelled" in ran.out


def test_submit_says_that_a_negative_prompt_is_unused(smallcat: Shell, client: Redis) -> None:
    assert UNUSED_NEGATIVE in smallcat("submit", "x", "--negative-prompt", "y", "--guidance-scale", "1").err
    for words in (["--negative-prompt", "y", "--guidance-scale", "2"], ["--guidance-scale", "1"]):
        assert "negative" not in smallcat("submit", "x", *words).err


def test_status_without_ids_lists_the_latest_jobs_with_prompt_seed_time_and_link(
    smallcat: Shell, client: Redis, environment: dict[str, str]
) -> None:
    ids = [smallcat("submit", f"cat {seed}", "--seed", str(seed)).out.strip() for seed in range(4)]
    smallcat("submit", "cat 0", "--seed", "0")  # Again: it is the latest, and listed once.
    finish(client, environment, JobHandle(ids[3]).record().job)
    listed = smallcat("status", "--json").document
    assert [each["id"] for each in listed] == [ids[0], ids[3], ids[2], ids[1]]
    assert listed[1]["url"].startswith(environment["AWS_ENDPOINT_URL_S3"])
    lines = smallcat("status", "--limit", "2").out.splitlines()
    assert [line.split()[0] for line in lines] == ids[:1] + ids[3:]
    assert max(map(len, lines)) < 160
    assert "http" not in smallcat("status", ids[0], ids[3]).out
    assert smallcat("status", ids[0], ids[3], "--urls").out.count("\nurl        http") == 1
    assert "\nurl        http" not in smallcat("status", ids[3]).out
    lines = smallcat("status", "--limit", "2", "--urls").out.splitlines()
    assert [line.split()[0] for line in lines[:2]] == ids[:1] + ids[3:]
    assert lines[1].endswith("seed 3  cat 3")
    assert ids[3] in lines[2]
    assert lines[2].strip().startswith("http")
    # Once its record has expired in Redis, it is read from the bucket. What is nowhere is left out.
    client.delete(f"smallcat:job:{ids[3]}", f"smallcat:job:{ids[2]}")
    assert smallcat("status", "--limit", "2").out.splitlines() == [line.rstrip() for line in lines[:2]]
    assert ids[2] not in smallcat("status").out


def test_the_latest_jobs_are_bounded_and_expire(client: Redis) -> None:
    records = Records(client, 1_000)
    job = job_of(1)
    for number in range(1_005):
        client.zadd("smallcat:latest", {f"{number:032x}": number})
    records.submitted(job, queue_of(job))
    assert client.zcard("smallcat:latest") == 1_000
    assert client.zscore("smallcat:latest", job.id) is not None
    assert 0 < int(client.ttl("smallcat:latest")) <= 1_000  # type: ignore[arg-type]


def test_several_images_of_one_prompt(smallcat: Shell, client: Redis, environment: dict[str, str]) -> None:
    ran = smallcat("submit", "a cat", "--seed", "5", "-n", "3")
    assert ran.code == 0
    ids = [line.split()[0] for line in ran.out.splitlines()]
    assert ran.out.splitlines() == [f"{each}  seed {5 + n}" for n, each in enumerate(ids)]
    assert [JobHandle(each).record().job.seed for each in ids] == [5, 6, 7]
    ran = smallcat("submit", "a cat", "--seed", "5", "--images", "1", "--json")
    assert [(each["id"], each["seed"]) for each in ran.document] == [(ids[0], 5)]
    ran = smallcat("submit", "a cat", "-n", "2", "--output", "cat.png")
    assert (ran.code, ran.err) == (2, "--output cat.png is one file for 2 pictures: name a folder.\n")


def test_fetching_saves_each_picture(
    smallcat: Shell, client: Redis, environment: dict[str, str], tmp_path: Path
) -> None:
    jobs = [job_of(1), job_of(2)]
    for job in jobs:
        finish(client, environment, job)
    folder = tmp_path / "new" / "folder"
    ran = smallcat("fetch", *(job.id for job in jobs), "--output", str(folder))
    assert ran.code == 0
    assert "note  cut" in ran.err
    for job in jobs:
        with Image.open(folder / f"{job.id}.png") as image:
            assert image.getpixel((0, 0)) == tuple(picture_of(job).pixels[0, 0])
    document = smallcat("fetch", *(job.id for job in jobs), "--output", str(folder), "--json").document
    assert [each["id"] for each in document] == [job.id for job in jobs]
    assert all(Path(each["path"]).is_file() and each["url"].startswith("http") for each in document)


def test_one_jobs_failure_does_not_keep_the_others_from_being_fetched(
    smallcat: Shell, client: Redis, environment: dict[str, str], tmp_path: Path
) -> None:
    failed, done = job_of(1), job_of(2)
    claim(client, failed).failed(failed.id, "m1", NotFiniteError("NaN at step 3"))
    finish(client, environment, done)
    ran = smallcat("fetch", failed.id, done.id, "--output", str(tmp_path), "--json")
    assert ran.code == 1
    assert ran.err.endswith("NaN at step 3\n")
    assert [each["id"] for each in ran.document] == [done.id]


def test_waiting_for_a_picture(
    smallcat: Shell, client: Redis, environment: dict[str, str], tmp_path: Path
) -> None:
    job = job_of(3)
    finish(client, environment, job)
    # In the bucket, and its record is final: submitted again it is queued until a worker answers.
    ran = smallcat("fetch", job.id, "--show", "--output", str(tmp_path))
    assert ran.code == 0
    assert "seed 3, 4 steps" in ran.out
    assert "\nseed  3\n" in ran.out
    assert "\nurl " not in ran.out
    assert "\nurl   http" in smallcat("fetch", job.id, "--urls", "--output", str(tmp_path)).out
    ran = smallcat("submit", "x", "--wait", "--timeout", "0", "--json")
    assert (ran.code, ran.out) == (1, "")
    assert "is still queued after 0 s" in ran.err


@pytest.mark.parametrize("error", [NotFiniteError("ran why"), UnknownModelError("ran why")])
def test_a_failed_job_is_a_sentence_and_1(smallcat: Shell, client: Redis, error: Any) -> None:
    job = job_of(1)
    claim(client, job).failed(job.id, "m1", error)
    ran = smallcat("fetch", job.id)
    assert (ran.code, ran.out) == (1, "")
    assert ran.err.endswith("ran why\n")


def test_a_cancelled_job_is_a_sentence_and_1(smallcat: Shell, client: Redis) -> None:
    job_id = smallcat("submit", "x").out.strip()
    smallcat("cancel", job_id)
    ran = smallcat("fetch", job_id)
    assert (ran.code, ran.err.splitlines()[-1]) == (1, "The job was cancelled.")


def test_a_job_that_failed_for_its_storage_is_3(smallcat: Shell, client: Redis) -> None:
    job = job_of(1)
    claim(client, job).failed(job.id, "m1", StorageError("no bucket"))
    assert smallcat("fetch", job.id).code == 3


def test_a_folder_that_cannot_be_written_is_a_sentence_and_2(
    smallcat: Shell, client: Redis, environment: dict[str, str], tmp_path: Path
) -> None:
    job = job_of(1)
    finish(client, environment, job)
    (tmp_path / "file").touch()
    ran = smallcat("fetch", job.id, "--output", str(tmp_path / "file"))
    assert ran.code == 2
    assert f"The picture of job {job.id} cannot be written to {tmp_path / 'file'}" in ran.err


def test_of_a_picture_for_which_the_disk_has_no_room_nothing_is_left_and_the_others_are_fetched(
    smallcat: Shell, client: Redis, environment: dict[str, str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    full, other = job_of(1), job_of(2)
    for each in (full, other):
        finish(client, environment, each)
    real = Path.write_bytes

    def write(path: Path, data: bytes) -> int:
        if full.id in path.name:
            real(path, data[:10])
            raise OSError(28, "No space left on device")
        return real(path, data)

    monkeypatch.setattr(Path, "write_bytes", write)
    ran = smallcat("fetch", full.id, other.id, "--output", str(tmp_path))
    assert ran.code == 2
    assert f"The picture of job {full.id} cannot be written" in ran.err
    assert "No space left on device" in ran.err
    assert [path.name for path in tmp_path.iterdir()] == [f"{other.id}.png"]


def test_waiting_for_what_no_worker_serves_shows_it_once_and_without_a_python_warning(
    smallcat: Shell, client: Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.state.records.RECHECK_S", 0.01)
    ran = smallcat("submit", "x", "--model", "another", "--wait", "--timeout", "0.5")
    assert ran.code == 1
    assert ran.err.count("No worker serves") == 1
    assert "UserWarning" not in ran.err


# --- as a process -----------------------------------------------------------------------------------------


def run(environment: dict[str, str], *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "producer", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        **options,
    )


def test_python_m_producer_is_the_command(environment: dict[str, str], client: Redis) -> None:
    ran = run(environment, "submit", "a small cat", "--json")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert JobHandle(json.loads(ran.stdout)["id"]).state() is State.QUEUED


def test_a_reader_that_has_enough_is_no_error(environment: dict[str, str], client: Redis) -> None:
    read, write = os.pipe()
    os.close(read)
    ran = subprocess.run(
        [sys.executable, "-m", "producer", "submit", "x", "--json"],
        env=environment,
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
    )
    os.close(write)
    assert ran.stderr == ""


def test_the_group_is_one_that_click_can_list() -> None:
    assert isinstance(cli, click.Group)
    assert {"submit", "status", "cancel", "fetch", "doctor"} <= set(cli.commands)
