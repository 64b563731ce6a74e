"""Each run writes files of its own, nothing is replaced in silence, and `--download` saves what it says."""

from __future__ import annotations

import csv
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deploy.embedded.servers import ValkeyProcess
from producer.cli.ingest_display import QuietDisplay
from producer.ingest.feeder import Ingest
from producer.ingest.journal import Journal
from producer.ingest.plan import Cursor, Rejected
from producer.ingest.rejects import OwnFiles, Rejects
from producer.ingest.runs import list_runs
from producer.ingest.submit_file import make_ingest, make_plan, make_variants
from producer.ingest.types import Options, Outcome
from producer.prompts.sources import source
from producer.session import session
from tests.drain import Drain
from tests.fast_worker import SERVED, announce
from worker.contract.choices import ImageFormat
from worker.contract.errors import PromptFileError
from worker.contract.queues import queues_of
from worker.contract.record import JobRecord, State

BAD = "a cat\nbad \0 line\n"


class Heard(QuietDisplay):
    """Keeps what is said."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []

    def notice(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture
def drain(valkey: ValkeyProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Drain]:
    monkeypatch.setenv("REDIS_URL", valkey.url)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("producer.ingest.feeder.POLL_EVERY_S", 0.005)
    announce(valkey.url)
    drain = Drain(valkey.url, queues_of(SERVED)[0])
    yield drain
    drain.client.close()


def ingest(
    *files: str, display: QuietDisplay | None = None, download: str | None = None, steps: int = 4,
    name: str | None = None, **options: Any,
) -> Ingest:  # fmt: skip
    variants = make_variants({"steps": steps}, 1, None, {}, None, None, literal=False)
    plan = make_plan(files or ["p.txt"], file_format=None, variants=variants)
    return make_ingest(
        plan,
        Options(**options),
        display or QuietDisplay(),
        None if download is None else Path(download),
        name,
    )


def drained(run: Ingest, drain: Drain) -> Outcome:
    over = threading.Event()
    worker = threading.Thread(target=lambda: [drain.all() for _ in iter(lambda: over.wait(0.002), True)])
    worker.start()
    try:
        return run()
    finally:
        over.set()
        worker.join()


def lines_of(path: str | Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


# Rejected lines.


def test_each_run_of_a_file_has_its_own_rejected_lines(drain: Drain) -> None:
    Path("p.txt").write_text(BAD)
    first = drained(ingest(), drain)
    before = Path("p.txt.rejected.jsonl").read_bytes()
    heard = Heard()
    second = drained(ingest(steps=5, display=heard), drain)
    assert first.rejected_files == (Path("p.txt.rejected.jsonl"),)
    assert second.rejected_files == (Path("p.txt.rejected-2.jsonl"),)
    assert Path("p.txt.rejected.jsonl").read_bytes() == before == Path("p.txt.rejected-2.jsonl").read_bytes()
    assert any("p.txt.rejected-2.jsonl" in each for each in heard.said)
    # Each run again: its own file, as it was.
    for steps, outcome in ((4, first), (5, second)):
        assert drained(ingest(steps=steps), drain).rejected_files == outcome.rejected_files
    # A run without rejected lines leaves those of others alone.
    Path("p.txt").write_text("a cat\n")
    assert drained(ingest(), drain).rejected_files == ()
    assert Path("p.txt.rejected.jsonl").read_bytes() == before


def test_two_runs_at_once_do_not_mix_their_rejected_lines(drain: Drain) -> None:
    Path("p.txt").write_text("".join(f"cat {n}\n" if n % 2 else "bad \0\n" for n in range(40)))
    outcomes: list[Outcome] = []
    runs = [ingest(steps=steps, max_queued=5) for steps in (4, 5)]
    threads = [threading.Thread(target=lambda run=run: outcomes.append(run())) for run in runs]  # type: ignore[misc]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        drain.all()
    files = {path for outcome in outcomes for path in outcome.rejected_files}
    assert len(files) == 2
    assert all([line["line"] for line in lines_of(path)] == list(range(1, 40, 2)) for path in files)


def test_a_cancelled_run_that_begins_anew_writes_the_same_file(drain: Drain) -> None:
    Path("p.txt").write_text(BAD)
    run = ingest(detach=True)
    run()
    drain.client.hset(f"smallcat:run:{run.run.id}", "cancelled", 1)
    outcome = drained(ingest(), drain)
    assert (outcome.rejected, outcome.rejected_files) == (1, (Path("p.txt.rejected.jsonl"),))


def test_a_run_of_an_earlier_version_keeps_its_file(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text(BAD)
    path = tmp_path / "p.txt.rejected.jsonl"
    path.write_text('{"line": 2, "after": "0:2:0"}\n{"line": 9, "after": "0:9:0"}\n')
    sources = [source(str(tmp_path / "p.txt"))]
    rejects = Rejects(sources, (0, 2, 0), OwnFiles.read(None, rejected=1))
    rejects.write(Rejected(0, 3, "", "It is wrong.", Cursor(0, 3)))
    rejects.close()
    assert [line["line"] for line in lines_of(path)] == [2, 3]
    # One that is not known to be the run's is another's.
    other = Rejects(sources, (0, 0, 0), OwnFiles.read(None, rejected=0))
    assert other.paths() == []
    assert len(lines_of(path)) == 2


# Downloads.


@pytest.fixture
def stored(drain: Drain, environment: dict[str, str]) -> Drain:
    """As `drain`; its pictures are in a bucket."""
    real = drain.end

    def end(message: Any, task_id: str) -> None:
        bucket = session().bucket
        assert bucket is not None
        if not message.job.prompt.startswith("fail"):
            uri = bucket.uri(message.id, message.job.format)
            record = JobRecord(id=message.id, state=State.DONE, job=message.job, uri=uri)
            picture = message.id.encode()
            bucket.put(
                message.id, message.job.format, picture, record.model_dump_json().encode(), "image/png"
            )
        real(message, task_id)

    drain.end = end  # type: ignore[method-assign]
    return drain


def saved(folder: str) -> set[bytes]:
    return {path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


@pytest.mark.parametrize("manifest", ["m.jsonl", "m.csv"])
@pytest.mark.parametrize("lost", ["nothing", "manifest", "records", "first folder"])
def test_a_finished_run_is_downloaded_into_any_folder(stored: Drain, manifest: str, lost: str) -> None:
    Path("p.txt").write_text("a cat\na dog\nfail\n")
    Path("q.txt").write_text("a bird\n")
    files = ("p.txt", "q.txt")
    download = "first" if lost == "first folder" else None
    first = drained(ingest(*files, manifest=Path(manifest), download=download), stored)
    assert (first.done, first.failed) == (3, 1)
    if lost == "manifest":
        Path(manifest).unlink()
    if lost == "records":
        Path(manifest).unlink()
        stored.client.delete(*stored.client.scan_iter("smallcat:job:*"))
    if lost == "first folder":
        assert len(saved("first")) == 3
        for path in Path("first").iterdir():
            path.unlink()
    seen = len(stored.seen)
    for folder in ("first", "second", "second"):
        outcome = drained(ingest(*files, manifest=Path(manifest), download=folder), stored)
        assert (outcome.state, outcome.done, outcome.failed) == ("finished", 3, 1)
        assert len(saved(folder)) == 3
    assert len(stored.seen) == seen
    # Names have each job's own file, and the manifest the last folder.
    assert [path.name[:1] for path in sorted(Path("second").iterdir())] == ["p", "p", "q"]
    if manifest.endswith("csv"):
        with Path(manifest).open(newline="") as file:
            paths = [row["path"] for row in csv.DictReader(file)]
    else:
        paths = [line["path"] or "" for line in lines_of(manifest)]
    assert [each.partition(os.sep)[0] for each in paths] == ["second", "second", "", "second"]


def test_a_picture_that_cannot_be_written_is_one_sentence_with_its_job(
    stored: Drain, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("p.txt").write_text("a cat\n")
    real = Path.write_bytes

    def full(path: Path, data: Any) -> int:
        if "pictures" in path.parts:
            real(path, data[:1])
            raise OSError(28, "No space left on device")
        return real(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(PromptFileError) as error:
        drained(ingest(download="pictures"), stored)
    assert "pictures/000001-" in str(error.value)
    assert "No space left on device" in str(error.value)
    [(_, job_id)] = stored.seen
    assert f"The picture of job {job_id}" in str(error.value)
    assert not saved("pictures")
    monkeypatch.undo()


def test_a_picture_that_is_gone_from_the_bucket_keeps_none_of_the_others(stored: Drain) -> None:
    Path("p.txt").write_text("a cat\na dog\na bird\n")
    drained(ingest(), stored)
    gone = lines_of("p.txt.manifest.jsonl")[1]["id"]
    bucket = session().bucket
    assert bucket is not None
    bucket.delete(gone, ImageFormat.PNG)
    heard = Heard()
    outcome = drained(ingest(download="pictures", display=heard), stored)
    assert (outcome.state, outcome.done) == ("finished", 3)
    assert len(saved("pictures")) == 2
    assert [line["path"] is None for line in lines_of("p.txt.manifest.jsonl")] == [False, True, False]
    [said] = [each for each in heard.said if "gone from the bucket" in each]
    assert gone in said


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_journal_that_cannot_be_written_is_one_sentence_with_its_path(tmp_path: Path) -> None:
    with Journal(tmp_path / "m.jsonl", "run") as journal:
        journal._file.close()
        journal._file = Path("/dev/full").open("ab")  # noqa: SIM115 - the journal closes it
        with pytest.raises(PromptFileError, match=r"m\.jsonl\.run\.part cannot be written: No space left"):
            journal.write_path(1, Path("x"))
        journal._file = (tmp_path / "x").open("ab")


# Lists of runs, and manifests.


def test_a_file_without_jobs_is_not_listed_as_a_run(drain: Drain) -> None:
    Path("p.txt").write_text("# nothing\n\n")
    assert drained(ingest(), drain).state == "finished"
    Path("e.csv").write_text("")
    with pytest.raises(PromptFileError, match="empty"):
        ingest("e.csv")()
    assert list_runs(drain.client) == []
    assert drained(ingest(), drain).manifest == Path("p.txt.manifest.jsonl")
    # What was rejected is to be seen.
    Path("p.txt").write_text("bad \0 line\n")
    drained(ingest(), drain)
    assert [each.rejected for each in list_runs(drain.client)] == [1]


def test_a_manifest_that_was_copied_here_stays_and_the_sentence_says_no_more_than_is_known(
    drain: Drain,
) -> None:
    Path("p.txt").write_text("a cat\n")
    drained(ingest(), drain)
    copy = Path("p.txt.manifest.jsonl").read_bytes()
    Path("p.txt.manifest.jsonl").unlink()
    Path("p.txt.manifest.jsonl").write_bytes(copy)
    heard = Heard()
    outcome = drained(ingest(display=heard), drain)
    assert outcome.manifest == Path("p.txt.manifest-2.jsonl")
    assert Path("p.txt.manifest.jsonl").read_bytes() == copy
    [said, over] = heard.said
    assert over.startswith("This run is over already")
    assert "another run" not in said
    assert "p.txt.manifest.jsonl is there already, and not as this run wrote it" in said


def test_two_identical_files_are_one_run_and_each_line_a_job_of_its_own(drain: Drain) -> None:
    for name in ("a.txt", "b.txt"):
        Path(name).write_text("a cat\n")
    one, other = drained(ingest("a.txt"), drain), drained(ingest("b.txt"), drain)
    assert one.run == other.run
    both = drained(ingest("a.txt", "b.txt"), drain)
    assert (both.run != one.run, both.done) == (True, 2)
    assert [line["file"] for line in lines_of("a.txt.manifest-2.jsonl")] == ["a.txt", "b.txt"]
