"""Run by test_job_fields.py in a copy of the tree where `Job` has made-up fields: prints where they are.

The made-up fields are named in `VALUES` alone. Nothing else here is written for them.
"""

from __future__ import annotations

import csv
import json
import os
import re
from pathlib import Path
from typing import Any, get_type_hints

from click.testing import CliRunner

#: A value of each made-up field, as JSON has it.
VALUES: dict[str, Any] = {"sharpness": 2.5, "palette": "warm", "mood": 'calm, "still"', "team_note": "ours"}
VALUES |= {"seamless": True}
#: A job that leaves nothing open.
WHOLE = {"prompt": "a cat", "seed": 7, "width": 64, "height": 64, "steps": 4, "guidance_scale": 7.5}
WHOLE |= {"model": "m", "revision": "r"}


def prompt_files() -> dict[str, Any]:
    """The made-up fields of a prompt in a file of each format, by its ending; and of an options line."""
    import pyarrow
    import pyarrow.parquet

    from producer.prompts.reader import Entry, read
    from producer.prompts.sources import source

    row = {"prompt": "a cat", **VALUES}
    for name, delimiter in (("p.csv", ","), ("p.tsv", "\t")):
        with Path(name).open("w", newline="") as file:
            table = csv.writer(file, delimiter=delimiter)
            table.writerows([row.keys(), row.values()])
    Path("p.jsonl").write_text(json.dumps(row) + "\n")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), "p.parquet")
    Path("p.txt").write_text('--prompt "a cat" --sharpen 2.5 --colors "Warm Tones" --seamlessly yes\n')
    found = {}
    for word in ("TRUE", "false", "1", "0.0", "On", "no", "", "null", "maybe"):
        Path("w.csv").write_text(f"prompt,seamless\na cat,{word}\n")
        Path("w.jsonl").write_text(json.dumps({"prompt": "a cat", "seamless": word}) + "\n")
        Path("w.txt").write_text(f'--prompt "a cat" --seamlessly "{word}"\n')
        words = [read(source(name)) for name in ("w.csv", "w.jsonl", "w.txt")]
        found[word] = [next(each).fields.get("seamless") for each in words]  # type: ignore[union-attr]
    for number, value in enumerate((0, 1.0, 2, False, None)):
        Path("w.jsonl").write_text(json.dumps({"prompt": "a cat", "seamless": value}) + "\n")
        pyarrow.parquet.write_table(
            pyarrow.Table.from_pylist([{"prompt": "a cat", "seamless": value}]), "w.parquet"
        )
        words = [read(source(name)) for name in ("w.jsonl", "w.parquet")]
        found[f"value {number}"] = [next(each).fields.get("seamless") for each in words]  # type: ignore[union-attr]
    for name in ("p.csv", "p.tsv", "p.jsonl", "p.parquet", "p.txt"):
        [entry] = read(source(name))
        assert isinstance(entry, Entry), entry
        found[name] = {field: entry.fields.get(field) for field in VALUES}
    return found


def headings() -> list[str]:
    from producer.prompts.fields import meaning_of
    from worker.contract.job import JOB_FIELDS

    names = [(name, field) for field in VALUES for name in JOB_FIELDS[field].all_headings]
    return sorted(name for name, field in names if meaning_of(name) == field)


def command_line() -> dict[str, Any]:
    from producer.client import Progress
    from worker.contract.record import State

    """The help of both commands, and the fields that `submit` makes of the options."""
    import producer.cli.main as main

    shown = {
        command: CliRunner().invoke(main.cli, [command, "--help"]).output for command in ("submit", "ingest")
    }
    options = [word for name, value in VALUES.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    given: dict[str, Any] = {}

    class Handle:
        id = "0"
        submission = "s"

        def progress(self) -> Progress:
            return Progress(State.QUEUED, 0, 0, 1, 1)

    def submit_job(_: str, **fields: Any) -> Handle:
        given.update(fields)
        return Handle()

    main.submit_job = submit_job  # type: ignore[assignment]
    CliRunner().invoke(main.cli, ["submit", "a cat", *options], catch_exceptions=False)
    CliRunner().invoke(main.cli, ["submit", "a cat", "--seamless"], catch_exceptions=False)
    flag = given.pop("seamless")
    CliRunner().invoke(main.cli, ["submit", "a cat", *options], catch_exceptions=False)
    wrong = CliRunner().invoke(main.cli, ["submit", "a cat", "--seamless", "maybe"]).output
    Path("c.txt").write_text("a cat\n")
    checked = CliRunner().invoke(main.cli, ["ingest", "c.txt", *options, "--check", "--json"])
    found = {"help": shown, "submitted": given, "checked": json.loads(checked.stdout)}
    return found | {"flag": flag, "wrong": wrong}


def ids() -> dict[str, Any]:
    """The job's id without them, and with each."""
    from worker.contract.job import Job

    found = {name: Job.parse(WHOLE | {name: value}).id for name, value in VALUES.items()}
    found["not seamless"] = Job.parse(WHOLE | {"seamless": False}).id
    return found | {"": Job.parse(WHOLE).id}


def infotexts() -> dict[str, Any]:
    """The infotext without and with them, and what is read from it."""
    from worker.contract import infotext
    from worker.contract.job import Job

    text = infotext.write(Job.parse(WHOLE | VALUES))
    again = infotext.read(text)
    return {
        "plain": infotext.write(Job.parse(WHOLE)),
        "text": text,
        "read": {name: getattr(again, name) for name in VALUES},
    }


def messages() -> dict[str, Any]:
    """Whether the message of a job is that job; what of it belongs to the submission; and without them."""
    from worker.contract.job import Job
    from worker.contract.message import Message, payload_of
    from worker.contract.record import JobRecord, State

    job = Job.parse(WHOLE | VALUES)
    same = Message.parse(json.loads(json.dumps(payload_of(job)))).job == job
    plain = Job.parse(WHOLE).submitted_as(job)
    record = JobRecord(id=plain.id, state=State.DONE, job=Job.parse(WHOLE))
    return {
        "same": same,
        "submission": [name for name in VALUES if getattr(plain, name) == VALUES[name]],
        "plain": payload_of(Job.parse(WHOLE)),
        "record": record.model_dump_json(),
        "again": JobRecord.model_validate_json(record.model_dump_json()) == record,
    }


def run() -> dict[str, Any]:
    """A prompt file through the plan into both manifests and the gallery."""
    from producer.gallery.write import write_gallery
    from producer.ingest.manifest import COLUMNS, write_manifest
    from producer.ingest.plan import Plan, Planned, unresolved
    from producer.ingest.submit_file import AXES
    from producer.prompts.sources import source
    from worker.contract.job import Job

    with Path("run.jsonl").open("w") as file:
        file.write(json.dumps(WHOLE | VALUES) + "\n" + json.dumps(WHOLE) + "\n")
    plan = Plan([source("run.jsonl")])
    jobs = list(plan.items(unresolved))
    assert all(isinstance(each, Planned) for each in jobs), jobs
    found: dict[str, Any] = {"columns": COLUMNS, "axes": AXES}
    found["job"] = json.loads(jobs[0].templated.job)  # type: ignore[union-attr]
    found["plain"] = json.loads(jobs[1].templated.job)  # type: ignore[union-attr]
    found["id"] = [jobs[0].templated.id, Job.parse(WHOLE | VALUES).id]  # type: ignore[union-attr]
    for name in ("m.csv", "m.jsonl"):
        write_manifest(
            Path(name),
            jobs,
            plan.sources,
            lambda number, job_id: {"state": "done", "uri": f"s3://b/images/{job_id}.png"},
        )
        page = write_gallery(name, Path(f"{name}.html")).path.read_text()
        [block] = re.findall(r'<script type="application/json" class="rows">(.*?)</script>', page)
        found[name] = json.loads(block)
    [about] = re.findall(r'<script type="application/json" id="about">(.*?)</script>', page)
    found["page_fields"] = json.loads(about)["fields"]
    with Path("m.csv").open(newline="") as table:
        found["csv"] = next(csv.DictReader(table))
    found["jsonl"] = json.loads(Path("m.jsonl").read_text().splitlines()[0])
    return found


def name_of_download() -> list[str]:
    """The name that a template of all made-up fields gives a picture."""
    import numpy as np

    from producer.ingest.download import Downloads
    from producer.ingest.journal import Journal
    from producer.prompts.sources import Source
    from worker.contract import infotext
    from worker.contract.choices import ImageFormat
    from worker.contract.job import JOB_FIELDS, Job
    from worker.engine.runner import Picture
    from worker.jobs.image_file import encode

    text = infotext.write(Job.parse(WHOLE | VALUES))
    picture = encode(Picture(np.zeros((8, 8, 3), np.uint8)), ImageFormat.PNG, text)

    class Bucket:
        def get(self, uri: str) -> bytes:
            return picture

    template = "_".join(f"{{{name}}}" for name in VALUES if JOB_FIELDS[name].is_hashed)
    bucket: Any = Bucket()
    downloads = Downloads(Path("saved"), bucket, [Source("p.txt", "txt", "", None)], template)
    with Journal(Path("saved.jsonl"), "run") as journal:
        downloads.fetch(0, 1, 0, "s3://b/x.png")
        downloads.flush(journal)
    downloads.close()
    return [path.name for path in Path("saved").iterdir()]


def errors() -> str:
    """The error of a misspelt name, a wrong value and a wrong choice."""
    from worker.contract.errors import InvalidJobError
    from worker.contract.job import Job

    try:
        Job.parse(WHOLE | {"sharpnes": 1.0, "sharpness": 9.0, "palette": "loud"})
    except InvalidJobError as error:
        return str(error)
    return ""


def keywords() -> list[str]:
    """The names among the keyword parameters of `submit_job`."""
    from worker.contract.job_keywords import JobFields

    return [name for name in get_type_hints(JobFields) if name in VALUES]


def documents() -> dict[str, str]:
    """The documents' tables of job fields."""
    from tests.docs import PARTS

    return {name: PARTS[name]() for name in ("job-fields", "job-field-names")}


def main() -> None:
    import worker

    parts = (prompt_files, headings, command_line, ids, infotexts, messages, run, name_of_download, errors)
    found: dict[str, Any] = {each.__name__: each() for each in (*parts, keywords, documents)}
    print(json.dumps(found | {"tree": os.path.dirname(os.path.dirname(str(worker.__file__)))}))  # noqa: PTH120


if __name__ == "__main__":
    main()
