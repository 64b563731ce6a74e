"""What is published fast is what `Job` and Celery's own producer would have made of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import redis
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy.embedded.servers import ValkeyProcess
from producer.ingest.message_templates import Composer, Envelope
from worker.celery import app, connection
from worker.contract.errors import InvalidJobError
from worker.contract.job import MAX_SEED, Defaults, Job, ServedModel
from worker.contract.message import RENDER, args_repr, message_of, message_priority, run_mark
from worker.contract.queues import queue_of

SERVED = ServedModel(
    name="m/x", revision="r" * 40, defaults=Defaults(width=512, height=512, steps=30, guidance_scale=7.5)
)
MARK = run_mark("abc", 7, 0, 8, 1_700_000_000)

texts = st.text(max_size=30) | st.sampled_from(["", " ", "\0", "\x85", "\ud800", "\n", "x" * 2_001, "{é}"])
plain = st.none() | st.booleans() | st.integers() | st.floats() | texts
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "prompt": texts | plain,
    "negative_prompt": texts,
    "seed": st.integers(-2, MAX_SEED + 2) | plain,
    "width": st.sampled_from([64, 512, 513, 4096, None, "512", True]),
    "height": st.sampled_from([64, 512, 7]),
    "steps": st.sampled_from([1, 30, 151, 0, None, True, 1.0]),
    "guidance_scale": st.sampled_from([0, -0.0, 0.0, 1, 7.5, 30.5, True, None]) | st.floats(),
    "scheduler": st.sampled_from(["euler", "Euler a", "none", 3, None]),
    "format": st.sampled_from(["png", "JPG", "gif"]),
    "priority": st.integers(-1, 10),
    "model": texts,
    "metadata": st.none()
    | st.dictionaries(texts, texts | st.integers() | st.lists(texts, max_size=2), max_size=3)
    | st.just({"x": "y" * 4_096})
    | st.just({"a": "b" * 4_080})
    | st.just([1]),
    "sedd": st.just(1),
}


def complaint_about(fields: dict[str, Any]) -> str | None:
    try:
        Job.parse(fields)
    except InvalidJobError as error:
        return str(error)
    return None


@settings(max_examples=100, deadline=None)
@given(st.lists(st.fixed_dictionaries({}, optional=FIELDS), min_size=1, max_size=4))
def test_composed_jobs_are_those_that_job_parse_makes(lines: list[dict[str, Any]]) -> None:
    composer = Composer(lambda job: job.resolved(SERVED))
    for fields in (*lines, *lines):  # Again, when their shapes are known.
        fields = {"prompt": "a cat", "seed": 5} | fields
        if (complaint := complaint_about(fields)) is not None:
            with pytest.raises(InvalidJobError) as same:
                composer.compose(fields)
            assert str(same.value) == complaint
            continue
        job = Job.parse(fields).resolved(SERVED)
        composed = composer.compose(fields)
        assert composed.id == job.id
        assert composed.job == json.dumps(job.model_dump(mode="json"))
        assert (composed.prompt, composed.seed) == (job.prompt, job.seed)
        assert composed.metadata == job.metadata
        assert composed.route == (queue_of(job), message_priority(job))
        values = job.model_dump(mode="json", exclude={"prompt", "seed", "metadata"})
        assert composed.shape == values


@pytest.fixture
def producer(valkey: ValkeyProcess) -> Iterator[Any]:
    with connection(valkey.url) as open_connection:
        yield app.amqp.Producer(open_connection)


@pytest.mark.parametrize("priority", [0, 3, 9])
@pytest.mark.parametrize("prompt", ["a cat", 'say "é猫😀" \\ \n', "it's " * 100])
def test_messages_are_byte_for_byte_celery_s_own(
    producer: Any, valkey: ValkeyProcess, priority: int, prompt: str
) -> None:
    fields = {"prompt": prompt, "seed": 5, "priority": priority, "metadata": {"é": "x"}}
    job = Job.parse(fields).resolved(SERVED)
    queue = queue_of(job)
    with redis.Redis.from_url(valkey.url, decode_responses=True) as client:
        app.send_task(
            RENDER,
            args=[message_of(job, MARK)],
            argsrepr=args_repr(job.prompt, job.seed),
            task_id="task-1",
            queue=queue,
            priority=message_priority(job),
            producer=producer,
        )
        [name] = client.scan_iter(f"{queue}*")
        [sent] = client.lrange(name, 0, -1)
        composed = Composer(lambda job: job.resolved(SERVED)).compose(fields)
        envelope = Envelope(*composed.route, producer)
        tag = json.loads(sent)["properties"]["delivery_tag"]
        assert envelope.message(composed, MARK, "task-1", tag) == sent
        assert envelope.list == name
        # Nothing was sent while the envelope was made.
        assert client.llen(name) == 1
