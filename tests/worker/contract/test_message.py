"""What travels stays what it was: messages of the first version are read, and written to the same bytes."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st

from deploy.embedded.servers import ValkeyProcess
from producer.ingest.message_templates import JobTemplates, MessageTemplate
from worker.broker.malformed import check
from worker.celery import app, connection
from worker.contract.choices import Scheduler
from worker.contract.errors import InvalidJobError, NewerMessageError
from worker.contract.job import Job
from worker.contract.job_parameters import (
    MAX_METADATA,
    MAX_MODEL,
    MAX_PROMPT,
    MAX_REVISION,
    MAX_SEED,
    MAX_SIZE,
    MAX_STEPS,
)
from worker.contract.message import (
    MAX_MESSAGE,
    RUN_MARK,
    TASK,
    Message,
    RunMark,
    payload_in,
    payload_of,
    payload_text,
    route_of,
    run_mark_in,
    task_call_of,
)
from worker.contract.queues import URGENT

#: Messages as the first version left them in Redis: one of `submit_job`, one of a prompt file's run.
#: A later version sent `guidance_start` and `guidance_stop` also at their defaults.
STORED = {
    name + suffix: (Path(__file__).parent / "messages" / f"{name}{suffix}.json").read_text().rstrip("\n")
    for suffix in ("", "_with_guidance")
    for name in ("submit_job", "prompt_file")
}
PROMPT = "a small cat, é😺"
RENDERED_BY: dict[str, Any] = {
    "width": 64,
    "height": 64,
    "guidance_scale": 7.5,
    "scheduler": "default",
    "model": "fast",
    "revision": "f" * 40,
}
#: What was said about each of them.
FIELDS: dict[str, dict[str, Any]] = {
    "submit_job": RENDERED_BY
    | {"negative_prompt": "dog", "width": 768, "priority": 9, "metadata": {"shop": "1"}},
    "prompt_file": RENDERED_BY | {"priority": 3},
}
IDS = {"submit_job": "d7f97e387168898bbf7763ebf4283cc1", "prompt_file": "8542f1de2b4c4e25bac1210f03800aef"}
LISTS = {"submit_job": f"smallcat.fast@{'f' * 16}", "prompt_file": f"smallcat.fast@{'f' * 16}\x06\x166"}


def job_of(name: str) -> Job:
    return Job(prompt=PROMPT, seed=7, steps=20, **FIELDS[name])


@pytest.mark.parametrize("name", STORED)
def test_a_stored_message_of_an_earlier_version_is_read(name: str) -> None:
    stored = json.loads(STORED[name])
    name = name.removesuffix("_with_guidance")
    message = Message.parse(payload_in(stored))

    assert message.job == job_of(name)
    assert (message.id, message.version) == (IDS[name], 1)
    assert route_of(message.job).list == LISTS[name]
    mark = run_mark_in(stored)
    if name == "submit_job":
        assert (message.run, mark) == ("", None)
    else:
        assert mark is not None
        assert mark[:4] == ("abc123", 0, 0, 1)
        assert message.run == mark.encode()


@pytest.mark.parametrize("name", IDS)
def test_messages_are_written_as_the_first_version_wrote_them(name: str, valkey: ValkeyProcess) -> None:
    stored = json.loads(STORED[name])
    job, run = job_of(name), Message.parse(payload_in(stored)).run
    task_id = stored["headers"]["id"]
    with connection(valkey.url) as link, redis.Redis.from_url(valkey.url, decode_responses=True) as client:
        producer = app.amqp.Producer(link)
        app.send_task(**task_call_of(job, run), task_id=task_id, producer=producer)
        [sent] = client.lrange(LISTS[name], 0, -1)
        # What says which process sent it, and when.
        stored["headers"]["origin"] = json.loads(sent)["headers"]["origin"]
        for own in ("reply_to", "delivery_tag"):
            stored["properties"][own] = json.loads(sent)["properties"][own]
        assert sent == json.dumps(stored)
        if run:
            fields = job.model_dump(mode="json")
            templated = JobTemplates(lambda each: each).fill(fields)
            template = MessageTemplate(templated.route, producer)
            tag = stored["properties"]["delivery_tag"]
            assert template.fill(templated, run, task_id, tag) == sent


@given(st.text("0123456789abcdefghijklmnopqrstuvwxyz", min_size=1, max_size=40), st.data())
def test_a_run_mark_is_read_as_it_was_written(run: str, data: st.DataObject) -> None:
    numbers = [data.draw(st.integers(0, 10**12 - 1)) for _ in range(4)]
    mark = RunMark(run, *numbers)

    assert RunMark.parse(mark.encode()) == mark
    assert mark.encode() == ":".join([run, *map(str, numbers)])


@pytest.mark.parametrize(
    "text",
    ["", "a", "a:1:2:3", "a:1:2:3:4:5", "a:1:2:3:x", "A:1:2:3:4", ":1:2:3:4", "a:1:2:3:4\n", "a:-1:2:3:4"],
)
def test_what_is_no_run_mark_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no run mark: it must be RUN:NUMBER:FILE:LINE:AT"):
        RunMark.parse(text)
    if text:
        with pytest.raises(InvalidJobError, match="A message is not a job: run"):
            Message.parse(payload_of(job_of("submit_job"), text))


@given(st.text(), st.sampled_from(["", "abc:1:2:3:4"]))
def test_the_payload_as_text_is_the_payload(prompt: str, run: str) -> None:
    try:
        job = Job.parse({"prompt": prompt, "seed": 1})
    except InvalidJobError:
        return
    if run:
        text = json.dumps(job.model_dump(mode="json"))
        assert payload_text(job.version, job.id, text, run) == json.dumps(payload_of(job, run))
    assert Message.parse(json.loads(json.dumps(payload_of(job, run)))) == Message(
        version=job.version, id=job.id, job=job, run=run
    )


def body(value: object) -> dict[str, str]:
    return {"body": base64.b64encode(json.dumps(value).encode()).decode()}


@pytest.mark.parametrize(
    "message",
    [
        None,
        3,
        "x",
        [],
        {},
        {"body": None},
        {"body": "#"},
        {"body": "/w=="},
        body(1),
        body([]),
        body([[], {}, {}]),
    ],
)
def test_a_message_of_someone_else_has_no_payload_and_no_mark(message: object) -> None:
    assert payload_in(message) is None
    assert run_mark_in(message) is None


@pytest.mark.parametrize("payload", [None, 1, "x", {}, {"run": 1}, {"run": "x"}, {"run": ""}])
def test_a_payload_without_a_mark_has_none(payload: object) -> None:
    assert run_mark_in(body([[payload], {}, {}])) is None


def test_a_newer_message_says_so_and_what_to_do() -> None:
    with pytest.raises(NewerMessageError, match=r"of version 99, this worker reads up to \d+: update it\."):
        Message.parse({**payload_of(job_of("submit_job")), "version": 99})


def test_the_task_and_the_urgent_priority_are_what_they_were() -> None:
    assert (TASK, URGENT) == ("smallcat.render", 4)
    assert RUN_MARK == "[0-9a-z]{1,40}(:[0-9]{1,12}){4}"


def test_a_message_may_be_twice_as_large_as_that_of_the_largest_job(valkey: ValkeyProcess) -> None:
    wide = "\U0001f63a"  # As JSON it takes twelve bytes.
    room = MAX_METADATA - len('{"":""}')
    job = Job.parse(
        {
            "prompt": wide * MAX_PROMPT,
            "negative_prompt": wide * MAX_PROMPT,
            "seed": MAX_SEED,
            "width": MAX_SIZE,
            "height": MAX_SIZE,
            "steps": MAX_STEPS,
            "guidance_scale": 1.2345678901234567,
            "guidance_start": 0.12345678901234567,
            "guidance_stop": 0.12345678901234567,
            "scheduler": max(Scheduler, key=len),
            "prompt_syntax": "a1111",
            "model": wide * MAX_MODEL,
            "revision": wide * MAX_REVISION,
            "format": "jpeg",
            "priority": 0,
            "metadata": {"": wide * (room // 4)},
        }
    )
    run = ":".join(["z" * 40, *["9" * 12] * 4])
    with connection(valkey.url) as link, redis.Redis.from_url(valkey.url) as client:
        producer = app.amqp.Producer(link)
        app.send_task(**task_call_of(job, run), task_id=f"{job.id}-{'9' * 60}", producer=producer)
        [sent] = client.lrange(route_of(job).list, 0, -1)
    assert 1.9 * len(sent) < MAX_MESSAGE <= 2 * len(sent), len(sent)
    assert check(sent, "").body[0] == [payload_of(job, run)]
