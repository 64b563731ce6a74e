"""What the version before the table of job fields wrote is read, and goes on: tests/earlier_version holds it.

prompts.csv             a prompt file; its manifests, with a grid of seeds, and its rejected line
interrupted.txt         a prompt file whose run was stopped after 18 of 41 jobs: its journal, and its keys
                        in Redis (bits as hexadecimal digits)
dynamic.txt             a prompt file with dynamic prompts, and its jobs: line, cursor, id, prompt
record.json             the record beside a picture
infotext*.txt           the infotext of that picture, and of one with the defaults
"""

from __future__ import annotations

import csv
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deploy.embedded.servers import ValkeyProcess
from producer.cli.ingest_display import QuietDisplay
from producer.client.job_result import JobResult
from producer.gallery.lines import read_lines
from producer.ingest.feeder import NAMES
from producer.ingest.journal import Journal
from producer.ingest.manifest import COLUMNS
from producer.ingest.plan import Plan, Planned, unresolved
from producer.ingest.submit_file import make_ingest, make_plan, make_variants
from producer.ingest.types import Options, Outcome
from tests.drain import Drain
from tests.fast_worker import SERVED, announce
from worker.contract import infotext
from worker.contract.job import Job
from worker.contract.queues import queues_of
from worker.contract.record import State
from worker.contract.stored_jobs import LIMITS

STORED = Path(__file__).parents[2] / "earlier_version"
#: The run of interrupted.txt: made from the file and its options, which the new version must make alike.
RUN = "bd8ae9f1179670d3"


@pytest.fixture
def drain(valkey: ValkeyProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Drain]:
    """What ends the jobs of runs. The working folder has copies of all that is stored."""
    monkeypatch.setenv("REDIS_URL", valkey.url)
    monkeypatch.chdir(shutil.copytree(STORED, tmp_path / "run"))
    announce(valkey.url)
    drain = Drain(valkey.url, queues_of(SERVED)[0])
    yield drain
    drain.client.close()


def ran(drain: Drain, file: str, fields: dict[str, Any], grid: dict[str, Any], options: Options) -> Outcome:
    """The run of a file, until it is over."""
    variants = make_variants(fields, 1, None, grid, None, None, literal=False)
    return worked(drain, make_plan([file], file_format=None, variants=variants), options)


def worked(drain: Drain, plan: Plan, options: Options) -> Outcome:
    """The run of a plan, until it is over."""
    run = make_ingest(plan, options, QuietDisplay())
    over = threading.Event()

    def work() -> None:
        while not over.wait(0.002):
            drain.all()

    worker = threading.Thread(target=work)
    worker.start()
    try:
        return run()
    finally:
        over.set()
        worker.join()


def restore(drain: Drain) -> None:
    """Put the stopped run's keys into Redis."""
    keys: dict[str, tuple[str, Any]] = json.loads((STORED / "interrupted.redis.json").read_text())
    for key, (kind, value) in keys.items():
        if kind == "hash":
            drain.client.hset(key, mapping=value)
        else:
            drain.client.set(key, bytes.fromhex(value))


def lines_of(path: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_a_stopped_run_goes_on_where_it_was(drain: Drain) -> None:
    restore(drain)
    part = Path("interrupted.txt.manifest.jsonl.part")
    before = {line["number"]: line["id"] for line in lines_of(part)[1:]}
    outcome = ran(drain, "interrupted.txt", {"guidance_stop": 0.5}, {}, Options(max_queued=10))
    assert (outcome.run, outcome.state, outcome.total) == (RUN, "finished", 41)
    assert (outcome.done, outcome.failed) == (40, 1)
    # What was done is rendered no second time, and the manifest has it from the journal.
    assert sorted(number for number, _ in drain.seen) == list(range(18, 41))
    manifest = lines_of("interrupted.txt.manifest.jsonl")
    assert {number: manifest[number]["id"] for number in before} == before
    assert [line["line"] for line in manifest] == list(range(1, 42))
    assert {line["guidance_stop"] for line in manifest} == {0.5}


def test_a_journal_is_gone_on_with(tmp_path: Path) -> None:
    manifest = Path(shutil.copy(STORED / "interrupted.txt.manifest.jsonl.part", tmp_path)).with_suffix("")
    with Journal(manifest, RUN) as journal:
        results = [journal.result(number) for number in range(19)]
    assert [result and result["state"] for result in results] == ["done"] * 18 + [None]


def test_a_finished_manifest_is_taken_over(tmp_path: Path) -> None:
    with Journal(tmp_path / "m.jsonl", "run") as journal:
        journal.adopt(STORED / "prompts.csv.manifest.jsonl")
        results = [journal.result(number) for number in range(6)]
    stored = lines_of(STORED / "prompts.csv.manifest.jsonl")
    assert [(each or {})["id"] for each in results] == [line["id"] for line in stored]


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_a_file_makes_the_same_jobs_and_manifest_with_columns_appended(drain: Drain, ending: str) -> None:
    manifest = Path(f"new.manifest.{ending}")
    outcome = ran(drain, "prompts.csv", {}, {"seed": [7, 8]}, Options(manifest, f"new{ending}"))
    assert (outcome.state, outcome.done, outcome.failed, outcome.rejected) == ("finished", 4, 2, 1)
    stored = STORED / f"prompts.csv.manifest.{ending}"
    if ending == "jsonl":
        old_lines, new_lines = lines_of(stored), lines_of(manifest)
        same = [{name: new[name] for name in old} for new, old in zip(new_lines, old_lines, strict=True)]
        assert json.dumps(same) == json.dumps(old_lines)
    else:
        old, new = (list(csv.reader(path.open(newline=""))) for path in (stored, manifest))
        assert [row[: len(old[0])] for row in new] == old
        assert tuple(old[0]) == COLUMNS[: len(old[0])]
        # Fields that come later still are behind these two.
        end = len(old[0]) + 2
        assert new[0][end - 2 : end] == ["guidance_start", "guidance_stop"]
        assert [row[end - 2 : end] for row in new[1:]] == [["0.25", "1.0"]] * 2 + [["0.0", "0.5"]] * 2 + [
            ["0.0", "1.0"]
        ] * 2
    rejected = STORED / "prompts.csv.rejected.jsonl"
    # The stored file is another run's, of which Redis knows nothing.
    assert outcome.rejected_files == (Path("prompts.csv.rejected-2.jsonl"),)
    # That version named one limit.
    as_now = rejected.read_bytes().replace(b"it must be less than or equal to 30.", b"it must be 0 to 30.")
    assert outcome.rejected_files[0].read_bytes() == as_now


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_a_manifest_is_read_by_the_gallery(ending: str) -> None:
    lines = list(read_lines(str(STORED / f"prompts.csv.manifest.{ending}"), pytest.fail))
    assert [line["seed"] for line in lines] == [7, 8] * 3
    assert lines[0]["metadata"] == {"ticket": "T-1", "tag": [1, "ä"]}
    fields = [{name: line[name] for name in Job.model_fields if name in line} for line in lines]
    same = [Job.parse(each).id == line["id"] for each, line in zip(fields, lines, strict=True)]
    # A CSV manifest had no columns for guidance_start and guidance_stop: its first jobs are not whole.
    assert same == [ending == "jsonl"] * 4 + [True] * 2


def test_a_record_and_an_infotext_are_read_as_the_job_they_were() -> None:
    record = JobResult.model_validate_json((STORED / "record.json").read_text())
    assert (record.state, record.id) == (State.DONE, record.job.id)
    text = (STORED / "infotext.txt").read_text()
    assert infotext.read(text).id == record.id
    assert infotext.write(record.job) == text


def test_an_infotext_of_defaults_is_written_to_the_same_bytes() -> None:
    text = (STORED / "infotext_of_defaults.txt").read_text()
    assert infotext.write(infotext.read(text)) == text


@pytest.mark.parametrize("limits", [None, str(LIMITS)])
def test_a_run_keeps_the_limits_that_it_began_with(limits: str | None, drain: Drain) -> None:
    """What was a job stays one, so that the others keep their numbers; in this version's runs it is none."""
    rows = ["a cat,1,", "a dog,2,0", "a hat,2,0.1", "a bird,2,"]
    Path("p.csv").write_text("\n".join(["prompt,upscale,upscale_strength", *rows]))
    variants = make_variants({"width": 64, "height": 64}, 1, None, {}, None, None, literal=False)
    plan = make_plan(["p.csv"], file_format=None, variants=variants)
    run = f"smallcat:run:{plan.digest[:16]}"
    # As an earlier version left it: the last line is not sent yet.
    sent = 3 if limits is None else 1
    drain.client.hset(
        run, mapping={"what": plan.digest, "fed": sent, "ended": sent, "cursor": "0:3:0", "ttl": 9_999}
    )
    for number in range(sent):
        drain.client.setbit(f"{run}:done", number, 1)
    if limits is not None:
        drain.client.hset(run, "limits", limits)
    outcome = worked(drain, plan, Options())
    assert (outcome.state, outcome.total) == ("finished", sent + 1)
    assert [number for number, _ in drain.seen] == [sent]
    found = [(line["line"], line["prompt"], line["state"]) for line in lines_of("p.csv.manifest.jsonl")]
    prompts = {2: "a cat", 3: "a dog", 4: "a hat", 5: "a bird"}
    kept = prompts if limits is None else {2: "a cat", 5: "a bird"}
    assert found == [(line, prompt, "done") for line, prompt in kept.items()]
    worked(drain, plan, Options(run="fresh"))
    assert drain.client.hget("smallcat:run:fresh", "limits") == str(LIMITS)


@pytest.mark.parametrize("sample", [None, 3])
def test_a_run_that_was_begun_keeps_its_dynamic_prompts(sample: int | None, drain: Drain) -> None:
    stored = json.loads(Path("dynamic.jobs.json").read_text())[f"sample {sample}" if sample else "all"]
    variants = make_variants({}, 1, None, {}, sample, Path("wildcards"), literal=False)
    plan = make_plan(["dynamic.txt"], file_format=None, variants=variants)
    assert plan.digest != stored["digest"]
    assert plan.as_begun(lambda digest: False) is plan
    # As Redis has the run: begun by the earlier version, with two jobs that are done.
    run = stored["digest"][:16]
    before = stored["jobs"][1][1]
    drain.client.hset(
        f"smallcat:run:{run}",
        mapping={"what": stored["digest"], "fed": 2, "ended": 2, "cursor": before, "ttl": 9_999},
    )
    drain.client.setbit(f"smallcat:run:{run}:done", 0, 1)
    drain.client.setbit(f"smallcat:run:{run}:done", 1, 1)
    outcome = worked(drain, plan, Options())
    # Without a version, pictures are named as in the first one; runs that this version begins have it.
    assert drain.client.hget(f"smallcat:run:{run}", NAMES) is None
    assert (outcome.run, outcome.state, outcome.total) == (run, "finished", len(stored["jobs"]))
    assert sorted(number for number, _ in drain.seen) == list(range(2, len(stored["jobs"])))
    manifest = lines_of("dynamic.txt.manifest.jsonl")
    assert [[line["line"], line["prompt"]] for line in manifest] == [[j[0], j[3]] for j in stored["jobs"]]
    begun = plan.as_begun(lambda digest: digest == stored["digest"])
    jobs = [each for each in begun.items(unresolved) if isinstance(each, Planned)]
    found = [[each.line, str(each.cursor), each.templated.id] for each in jobs]
    assert found == [each[:3] for each in stored["jobs"]]
    worked(drain, plan, Options(run="fresh"))
    assert drain.client.hget("smallcat:run:fresh", NAMES) == "2"
