"""A run that the first version began goes on as it began, whatever its files and options.

tests/earlier_version/begun holds runs of version b89d500, one for each format: the file; its journal and its
keys in Redis (`runs.json`) when it was stopped; and the manifest and rejected lines that it then went on to.
`random.json` has random files, and the jobs that it makes of them.
"""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deploy.embedded.servers import ValkeyProcess
from producer.cli.ingest import plan_of
from producer.cli.ingest_display import QuietDisplay
from producer.cli.main import cli
from producer.ingest.plan import Plan, Planned, unresolved
from producer.ingest.submit_file import make_ingest, make_plan, make_variants
from producer.ingest.types import Options, Outcome
from producer.prompts import fields_v1
from tests.drain import Drain
from tests.fast_worker import SERVED, announce
from tests.producer.ingest import first_version_jobs
from tests.producer.prompts.random_files import write_files
from worker.contract.choices import PromptSyntax
from worker.contract.errors import InvalidJobError, PromptFileError
from worker.contract.job import Job
from worker.contract.queues import queues_of
from worker.state.keys import run_key

ROOT = Path(__file__).parents[3]
BEGUN = ROOT / "tests" / "earlier_version" / "begun"
RUNS: dict[str, dict[str, Any]] = json.loads((BEGUN / "runs.json").read_text())
#: The last version that read files so.
FIRST = "b89d500"


class Heard(QuietDisplay):
    """Keeps the notices."""

    def __init__(self) -> None:
        self.notices: list[str] = []

    def notice(self, text: str) -> None:
        self.notices.append(text)


@pytest.fixture
def drain(valkey: ValkeyProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Drain]:
    """What ends the jobs of runs. The working folder is empty."""
    monkeypatch.setenv("REDIS_URL", valkey.url)
    monkeypatch.chdir(tmp_path)
    announce(valkey.url)
    drain = Drain(valkey.url, queues_of(SERVED)[0])
    yield drain
    drain.client.close()


def plan(*words: str) -> Plan:
    """The plan of `smallcat ingest WORDS...`."""
    context = cli.commands["ingest"].make_context("ingest", list(words))
    return plan_of(context.params.pop("files"), context.params)


def ran(drain: Drain, of: Plan, display: QuietDisplay, options: Options | None = None) -> Outcome:
    """The outcome of a plan's run, when it is over."""
    run, over = make_ingest(of, options or Options(), display), threading.Event()

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


def lines_of(path: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def places(path: str | Path) -> list[tuple[Any, ...]]:
    """The rejected lines of a file: where each is, and the field."""
    lines = lines_of(path) if Path(path).exists() else []
    return [tuple(line[name] for name in ("file", "line", "field", "after")) for line in lines]


def restore(drain: Drain, name: str) -> None:
    """Put a stopped run into Redis and the working folder."""
    for key, (kind, value) in RUNS[name]["redis"].items():
        if kind == "hash":
            drain.client.hset(key, mapping=value)
        else:
            drain.client.set(key, bytes.fromhex(value))
    for ending in ("", ".manifest.jsonl.part", ".rejected.jsonl"):
        if (path := BEGUN / f"{name}{ending}").exists():
            shutil.copy(path, ".")


@pytest.mark.parametrize("name", RUNS)
def test_a_stopped_run_goes_on_to_the_manifest_of_the_version_that_began_it(name: str, drain: Drain) -> None:
    restore(drain, name)
    display, stored = Heard(), RUNS[name]
    outcome = ran(drain, plan(name, *stored["words"]), display)
    assert (outcome.run, outcome.state) == (stored["run"], "finished")
    assert (outcome.total, outcome.rejected) == (stored["total"], stored["rejected"])
    fed = int(stored["redis"][run_key(outcome.run)][1]["fed"])
    # What was done is not sent again.
    assert sorted(number for number, _ in drain.seen) == list(range(fed, stored["total"]))
    old, new = lines_of(BEGUN / f"{name}.whole.jsonl"), lines_of(f"{name}.manifest.jsonl")
    for line in (*old, *new):
        del line["timings"]
    assert json.dumps(
        [{key: line[key] for key in before} for line, before in zip(new, old, strict=True)]
    ) == (json.dumps(old))
    assert places(f"{name}.rejected.jsonl") == places(BEGUN / f"{name}.rejected.jsonl")
    assert "An earlier version began the run" in display.notices[0]


def test_a_finished_run_is_finished_still(drain: Drain) -> None:
    name = "values.jsonl"
    restore(drain, name)
    of = plan(name)
    first, seen = ran(drain, of, Heard()), len(drain.seen)
    again = ran(drain, of, Heard())
    assert (again.run, again.state, again.total) == (first.run, "finished", first.total)
    assert len(drain.seen) == seen


def items_of(of: Plan) -> list[list[Any]]:
    """As `first_version_jobs.items_of`, of this version."""
    found: list[list[Any]] = []
    try:
        for each in of.items(unresolved):
            place = [each.line, str(each.cursor)]
            found.append([*place, each.templated.id] if isinstance(each, Planned) else place)
            if len(found) == first_version_jobs.MOST:
                break
    except PromptFileError:
        found.append(["refused"])
    return found


def compare(words: dict[str, list[str]], expected: dict[str, list[Any]]) -> None:
    """Read the files of the working folder as they were begun, and compare digests, jobs and bad lines."""
    assert len(words) == len(expected)
    for name, (digest, items) in expected.items():
        begun = plan(name, *words[name]).as_begun(lambda each, digest=digest: each == digest)  # type: ignore[misc]
        assert begun.digest == digest, (name, words[name])
        assert items_of(begun) == items, (name, words[name])


def test_random_files_make_the_jobs_that_they_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    stored = json.loads((BEGUN / "random.json").read_text())
    for name, data in stored["files"].items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(base64.b64decode(data))
    compare(stored["words"], stored["jobs"])


@pytest.mark.services
def test_400_random_files_make_the_jobs_that_the_first_version_makes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its code is run from git's history."""
    archive, folder, tree = tmp_path / "first.tar", tmp_path / "files", tmp_path / "first"
    made = subprocess.run(
        ["git", "archive", "--output", str(archive), FIRST], cwd=ROOT, capture_output=True, timeout=30
    )
    if made.returncode != 0:
        pytest.skip(f"there is no git, or no {FIRST} in its history")
    with tarfile.open(archive) as tar:
        tar.extractall(tree, filter="data")
    write_files(folder, 400, seed=1)
    jobs = subprocess.run(
        [
            sys.executable,
            "-I",
            "-c",
            RUN.format(tree=str(tree), script=first_version_jobs.__file__),
            str(folder),
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert jobs.returncode == 0, jobs.stderr[-2000:]
    monkeypatch.chdir(folder)
    compare(json.loads(Path("words.json").read_text()), json.loads(jobs.stdout))


#: Runs a script with another tree of the project first in the path.
RUN = "import runpy, sys; sys.path.insert(0, {tree!r}); runpy.run_path({script!r}, run_name='__main__')"


def variants_of(**fields: Any) -> Any:
    return make_variants(fields, 1, None, {}, None, None, literal=False)


def begun_by_the_first(drain: Drain, of: Plan, run: str = "", **noted: str) -> str:
    """Put a run of this plan into Redis as the first version has it, and return its id."""
    digests: list[str] = []
    of.as_begun(lambda digest: bool(digests.append(digest)))  # type: ignore[func-returns-value]
    run = run or digests[1][:16]
    drain.client.hset(run_key(run), mapping={"what": digests[1], "fed": 0, "ttl": 9_999, **noted})
    return run


def test_a_new_run_reads_files_as_now(drain: Drain) -> None:
    Path("p.csv").write_text("prompt,seed\na cat,-1\n")
    display = Heard()
    outcome = ran(drain, plan("p.csv"), display)
    assert (outcome.done, outcome.rejected, display.notices) == (1, 0, [])


@pytest.mark.parametrize("noted", [{}, {"cursor": "0:1:0", "cancelled": "1"}])
def test_a_run_that_sent_nothing_or_was_cancelled_begins_anew_and_reads_files_as_now(
    noted: dict[str, str], drain: Drain
) -> None:
    Path("p.csv").write_text("prompt,seed\na cat,-1\n")
    of = plan("p.csv")
    earlier = begun_by_the_first(drain, of, **noted)
    outcome = ran(drain, of, Heard())
    assert (outcome.done, outcome.rejected, outcome.run != earlier) == (1, 0, True)


def test_a_named_run_stays_the_run_that_it_is(drain: Drain) -> None:
    Path("p.csv").write_text("prompt,seed\na cat,-1\na dog,7\n")
    of = plan("p.csv")
    begun_by_the_first(drain, of, run="mine")
    outcome = ran(drain, of, Heard(), Options(run="mine"))
    assert (outcome.run, outcome.done, outcome.rejected) == ("mine", 1, 1)


def test_strict_looks_at_the_lines_as_the_run_reads_them(drain: Drain) -> None:
    """The present reading refuses this option; the first one took it for text."""
    Path("p.txt").write_text("a cat --stpes 3\na dog\n")
    of = plan("p.txt")
    with pytest.raises(PromptFileError, match="1 line is no job"):
        ran(drain, of, Heard(), Options(strict=True))
    begun_by_the_first(drain, of, fed="1", cursor="0:0:1", ended="1")
    assert ran(drain, of, Heard(), Options(strict=True)).total == 2


def test_a_file_that_is_refused_today_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text that begins as an archive does, and one of few bytes that become many."""
    import gzip

    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_bytes(b"Rar! a cat\n")
    Path("b.txt").write_bytes(gzip.compress(b"a cat\n" + b"#" * (65 << 20) + b"\na dog\n"))
    for name, jobs in (("a.txt", 1), ("b.txt", 3)):
        of = make_plan([name], file_format=None, variants=variants_of())
        with pytest.raises(PromptFileError):
            list(of.items(unresolved))
        digests: list[str] = []
        begun = of.as_begun(lambda digest, seen=digests: len(seen) == 1 or bool(seen.append(digest)))  # type: ignore[misc]
        assert (begun.reading, len(items_of(begun))) == (1, jobs)


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"seed": -1}, "seed is -1: it must be greater"),
        ({"scheduler": "k_euler"}, "scheduler is 'k_euler': use one of default, ddim, euler, euler_"),
        ({"scheduler": "DPM++ 2M Karras", "format": "avif"}, "format is 'avif'"),
        ({"seed": -1, "width": 65}, "width is 65, which is no multiple of 8: use 64 or 72. seed is -1"),
        ({"lora": "x"}, 'There is no job field "lora"'),
        ({"prompt": " "}, "prompt is blank"),
    ],
)
def test_what_was_no_job_is_none(fields: dict[str, Any], error: str) -> None:
    with pytest.raises(InvalidJobError) as raised:
        fields_v1.job_of({"prompt": "x", "seed": 1, **fields})
    assert error in str(raised.value)


def test_a_field_that_came_later_is_unknown_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(Job.model_fields, "lora", Job.model_fields["model"])
    with pytest.raises(InvalidJobError, match='There is no job field "lora": known are prompt, '):
        fields_v1.job_of({"prompt": "x", "seed": 1, "lora": "x"})


def test_a_prompt_of_invisible_characters_is_a_stored_job_and_no_new_one() -> None:
    job = fields_v1.job_of({"prompt": "\u200b", "seed": 1})
    assert Job.model_validate_json(job.model_dump_json()) == job
    with pytest.raises(InvalidJobError, match="prompt is blank"):
        Job.parse({"prompt": "\u200b"})


def test_its_jobs_keep_their_ids_where_the_fleets_default_is_another_syntax_of_prompts() -> None:
    job = fields_v1.job_of({"prompt": "a (cat:1.2)", "seed": 1})
    assert job.id == Job(prompt="a (cat:1.2)", seed=1).id
    assert job.in_syntax(PromptSyntax.A1111) == job
    assert "prompt_syntax" not in job.model_dump_json()
