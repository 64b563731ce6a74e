"""What is published fast is what `Job` and Celery's own producer would have made of it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import redis
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy.embedded.servers import ValkeyProcess
from producer.ingest.message_templates import JobTemplates, MessageTemplate, Resolver
from worker.celery import app, connection
from worker.contract.errors import InvalidJobError
from worker.contract.file_index import FileEntry, FileIndex
from worker.contract.job import Job
from worker.contract.job_files import with_files
from worker.contract.job_parameters import MAX_SEED
from worker.contract.message import RunMark, route_of, task_call_of
from worker.contract.queues import queue_of
from worker.contract.served_model import Defaults, ServedModel

SERVED = ServedModel(
    name="m/x", revision="r" * 40, defaults=Defaults(width=512, height=512, steps=30, guidance_scale=7.5)
)
MARK = RunMark("abc", 7, 0, 8, 1_700_000_000).encode()

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
def test_templated_jobs_are_those_that_job_parse_makes(lines: list[dict[str, Any]]) -> None:
    templates = JobTemplates(lambda job: job.resolved(SERVED))
    for fields in (*lines, *lines):  # Again, when their shapes are known.
        fields = {"prompt": "a cat", "seed": 5} | fields
        if (complaint := complaint_about(fields)) is not None:
            with pytest.raises(InvalidJobError) as same:
                templates.fill(fields)
            assert str(same.value) == complaint
            continue
        job = Job.parse(fields).resolved(SERVED)
        templated = templates.fill(fields)
        assert templated.id == job.id
        assert templated.job == json.dumps(job.model_dump(mode="json"))
        assert (templated.prompt, templated.seed) == (job.prompt, job.seed)
        assert templated.metadata == job.metadata
        assert templated.route == route_of(job)
        assert templated.route[:2] == (queue_of(job), 9 - job.priority)
        values = job.model_dump(mode="json", exclude={"prompt", "seed", "metadata"})
        assert templated.shape == values


def test_a_prompt_whose_texts_by_step_are_too_much_in_the_second_pass_is_refused() -> None:
    """Of a shape that is known, too: its own steps are few enough for it."""
    templates = JobTemplates(lambda job: job.resolved(SERVED))
    fields = {"seed": 5, "prompt_syntax": "a1111", "steps": 1, "upscale": 2, "upscale_steps": 150}
    fields |= {"upscale_strength": 1}
    assert templates.fill(fields | {"prompt": "a cat"}).version == 4
    fields["prompt"] = "[a|b][a|b|c][a|b|c|d|e][a|b|c|d|e|f|g]" + "x" * 1_900
    complaint = complaint_about(fields)
    assert complaint is not None
    with pytest.raises(InvalidJobError, match=re.escape(complaint)):
        templates.fill(fields)


def test_prompts_that_name_files_are_resolved_one_by_one() -> None:
    """Those of one shape that name none are not: the template has no file of another prompt."""
    index = FileIndex.of(
        FileEntry(kind="embedding", name=name, sha256="ab" * 32) for name in ("x", "cat dog")
    )
    for syntax in ("plain", "a1111"):
        resolver = Resolver(
            lambda job: with_files(job.resolved(SERVED), index), lambda _: index.embedding_names
        )
        templates = JobTemplates(resolver)
        for prompt in ("a cat", "x", "<x>", "a cat dog", "a <cat dog> (x:1.2)", "<y>", "a dog"):
            for negative in ("", "x, <cat dog>"):
                fields = {"prompt": prompt, "seed": 5, "prompt_syntax": syntax, "negative_prompt": negative}
                job = resolver.job(Job.parse(fields))
                templated = templates.fill(fields)
                assert (templated.id, templated.version) == (job.id, job.version), fields
                assert templated.job == json.dumps(job.model_dump(mode="json"))


def test_loras_are_part_of_a_shape_and_those_of_a_prompt_are_resolved_by_themselves() -> None:
    index = FileIndex.of(
        FileEntry(kind="lora", name=name, sha256=digits * 32) for name, digits in (("a", "ab"), ("b", "cd"))
    )
    resolver = Resolver(lambda job: with_files(job.resolved(SERVED), index), lambda _: index.embedding_names)
    templates = JobTemplates(resolver)
    for loras in ("a=0.5", ["b", {"name": "a", "weight": 2}], {"a": 0.5}, [], "none"):
        for prompt in ("a cat", "a dog", "a cat <lora:b:1>" if "b" not in loras else "a cat"):
            for syntax in ("plain", "a1111"):
                fields = {"prompt": prompt, "seed": 5, "loras": loras, "prompt_syntax": syntax}
                job = resolver.job(Job.parse(fields))
                templated = templates.fill(fields)
                assert (templated.id, templated.version) == (job.id, job.version), fields
                assert templated.job == json.dumps(job.model_dump(mode="json"))
                assert templated.prompt == job.prompt
    assert len(templates._shapes) == 10


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
        app.send_task(**task_call_of(job, MARK), task_id="task-1", producer=producer)
        [name] = client.scan_iter(f"{queue}*")
        [sent] = client.lrange(name, 0, -1)
        templated = JobTemplates(lambda job: job.resolved(SERVED)).fill(fields)
        template = MessageTemplate(templated.route, producer)
        tag = json.loads(sent)["properties"]["delivery_tag"]
        assert template.fill(templated, MARK, "task-1", tag) == sent
        assert template.list == name
        # Nothing was sent while the template was made.
        assert client.llen(name) == 1
