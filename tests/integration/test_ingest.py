"""`ingest` end to end: the command in a process of its own, real servers, a real worker without torch."""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import redis
from click.testing import CliRunner
from PIL import Image

from deploy.embedded.stack import Stack
from producer import submit_job
from producer.cli.main import cli
from tests.drain import Drain
from tests.fast_worker import SERVED, announce
from tests.growing_file import complete_lines
from tests.integration.transport_harness import ROOT, wait_until
from worker.contract.errors import CallerError, PromptFileError
from worker.contract.queues import queues_of

QUEUE = queues_of(SERVED)[0]
#: A worker process takes seconds to start on a busy machine.
pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def stack(servers: Stack) -> Iterator[Stack]:
    with Stack(workers=0) as stack:
        yield stack


@pytest.fixture
def client(stack: Stack) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(stack.valkey.url, decode_responses=True) as client:
        client.flushall()
        announce(stack.valkey.url)
        yield client


class FastWorker:
    """A `celery worker` process of `tests.fast_worker`."""

    def __init__(self, stack: Stack, folder: Path, *, seconds: float = 0.0, concurrency: int = 4) -> None:
        self.journal = folder / "journal"
        self.journal.touch()
        environment = stack.environment | {"FAST_WORKER_JOURNAL": str(self.journal)}
        environment |= {"FAST_WORKER_S": str(seconds)}
        command = [sys.executable, "-m", "celery", "-A", "tests.fast_worker", "worker", "-Q", QUEUE]
        command += ["-c", str(concurrency), "--without-mingle", "--without-gossip", "-l", "WARNING"]
        self._log = (folder / "worker.log").open("ab")
        self._popen = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=self._log, stderr=self._log)

    def lines(self) -> list[list[str]]:
        return [line.split(" ", 3) for line in complete_lines(self.journal)]

    def stop(self) -> None:
        self._popen.terminate()
        try:
            self._popen.wait(20)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            self._popen.wait()
        self._log.close()


@pytest.fixture(scope="module")
def worker(stack: Stack, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FastWorker]:
    """A worker with a bucket, for all tests that do not look at what else it has rendered."""
    worker = FastWorker(stack, tmp_path_factory.mktemp("worker"))
    yield worker
    worker.stop()


def command(stack: Stack, folder: Path, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "producer", "ingest", *words],
        cwd=folder,
        env=stack.environment | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def within(stack: Stack, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the command in this process: a dozen starts of an interpreter take longer than all else here."""
    for name, value in stack.variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(folder)


def finished(process: subprocess.Popen[str]) -> tuple[int, Any, str]:
    """Exit code, what was printed as JSON, and standard error."""
    out, err = process.communicate(timeout=90)
    return process.returncode, json.loads(out) if out.strip().startswith("{") else out, err


def manifest(folder: Path, name: str = "p.txt") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.manifest.jsonl").read_text().splitlines()]


def fed(client: redis.Redis) -> int:
    """How many lines of the one run are fed; 0 before it has begun."""
    for name in client.scan_iter("smallcat:run:*", _type="hash"):
        if (lines := client.hget(name, "fed")) is not None:
            return int(str(lines))
    return 0


def test_ctrl_c_once_stops_feeding_and_twice_leaves(
    stack: Stack, client: redis.Redis, tmp_path: Path
) -> None:
    (tmp_path / "p.txt").write_text("".join(f"cat {n}\n" for n in range(1_000)))
    words = ("p.txt", "--max-queued", "100", "--json")
    process = command(stack, tmp_path, *words)
    wait_until("feeding", lambda: fed(client) >= 100, 60)
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    said = process.stderr.readline() + process.stderr.readline()
    assert "No more is sent" in said
    assert "smallcat ingest p.txt --max-queued 100 --json" in said
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    process.communicate()
    assert fed(client) == 100
    client.delete(*client.scan_iter("smallcat:run:*:feeder"))
    process = command(stack, tmp_path, *words)
    wait_until("its turn", lambda: bool(list(client.scan_iter("smallcat:run:*:feeder"))), 60)
    process.send_signal(signal.SIGINT)
    drain = Drain(stack.valkey.url, QUEUE)
    while process.poll() is None:
        drain.all()
    code, outcome, _ = finished(process)
    assert (code, outcome["state"]) == (130, "stopped")
    assert outcome["done"] == outcome["sent"] == len(drain.seen) == 100


def test_check_sends_nothing_and_strict_sends_nothing_if_a_line_is_bad(
    stack: Stack, client: redis.Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    within(stack, tmp_path, monkeypatch)
    Path("p.csv").write_text("prompt,steps\ncat,5\ndog,999\n")
    checked = CliRunner().invoke(cli, ["ingest", "p.csv", "--check", "--json"])
    assert checked.exit_code == 1
    job, bad = map(json.loads, checked.stdout.splitlines())
    assert (job["line"], job["prompt"], job["steps"]) == (2, "cat", 5)
    assert (bad["line"], bad["field"]) == (3, "steps")
    strict = CliRunner().invoke(cli, ["ingest", "p.csv", "--strict"])
    assert isinstance(strict.exception, PromptFileError)
    assert "p.csv, line 3: steps is 999" in str(strict.exception)
    assert fed(client) == 0
    assert not Path("p.csv.rejected.jsonl").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["none.txt"], "cannot be read"),
        (["p.txt", "--format", "gif"], "format is 'gif'"),
        (["p.txt", "--steps", "999"], "steps is 999"),
        (["p.txt", "--grid", "stepz=1,2"], "stepz"),
        (["p.txt", "--grid", "steps=1,999"], "steps is 999"),
        (["p.txt", "--download", "out", "--name", "../{line}.png"], "leads out"),
        (["p.txt", "--download", "out", "--name", "{line.__class__}.png"], "has the field"),
        (["p.txt", "--name", "{line}.png"], "download"),
        (["p.txt", "--run", "Not This"], "lower-case"),
        (["p.txt", "--max-queued", "0"], "at least 1"),
        (["p.txt", "--images", "0"], "1 to"),
    ],
)
def test_wrong_use_is_one_sentence_and_exit_code_2(
    stack: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], says: str
) -> None:
    within(stack, tmp_path, monkeypatch)
    Path("p.txt").write_text("a cat\n")
    result = CliRunner().invoke(cli, ["ingest", *words])
    assert isinstance(result.exception, CallerError)
    assert says in str(result.exception)


def test_a_live_job_is_rendered_next_while_a_file_runs(
    stack: Stack, client: redis.Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One thread and a known time a job: what the queue adds to a live job is the one that is on board."""
    within(stack, tmp_path, monkeypatch)
    seconds = 0.2
    worker = FastWorker(stack, tmp_path, seconds=seconds, concurrency=1)
    try:
        began = time.monotonic()
        submit_job("warm up").result(timeout=60)
        idle = min(_latency(f"alone {n}") for n in range(3))
        (tmp_path / "p.txt").write_text("".join(f"cat {n}\n" for n in range(100_000)))
        process = command(stack, tmp_path, "p.txt", "--quiet")
        wait_until("feeding", lambda: fed(client) >= 9_000, 60)
        before = len(worker.lines())
        busy = sorted(_latency(f"live {n}") for n in range(3))[1]
        process.kill()
        process.communicate()
        prompts = [line[3] for line in worker.lines()[before:]]
        assert busy <= 1.5 * idle + seconds, (idle, busy, time.monotonic() - began)
        # Between two live jobs at most the one file job that was on board.
        places = [place for place, prompt in enumerate(prompts) if prompt.startswith("live")]
        assert all(later - earlier <= 3 for earlier, later in itertools.pairwise(places))
    finally:
        worker.stop()


def _latency(prompt: str) -> float:
    began = time.monotonic()
    submit_job(prompt).result(timeout=60)
    return time.monotonic() - began


# From here on with a worker that stays.


def test_a_file_becomes_pictures_in_a_folder(
    stack: Stack, client: redis.Redis, worker: FastWorker, tmp_path: Path
) -> None:
    (tmp_path / "p.txt").write_text(
        'A small ../cat\nfail it\n--prompt "a dog" --seed 7 --tiling true\nbad \1\n'
    )
    process = command(stack, tmp_path, "p.txt", "--download", "out", "--images", "2", "--json", "--lines")
    out, err = process.communicate(timeout=90)
    assert process.returncode == 1
    # Standard output is events, a line each, and nothing else; the last one is the outcome.
    *events, said = map(json.loads, out.splitlines())
    assert (said["state"], said["done"], said["failed"], said["rejected"]) == ("finished", 4, 2, 1)
    assert '"tiling" has no meaning here' in err
    assert [each["event"] for each in events].count("failed") == 2
    lines = manifest(tmp_path)
    assert [line["line"] for line in lines] == [1, 1, 2, 2, 3, 3]
    saved = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert saved == sorted(
        f"{line['line']:06d}-{line['seed']}-{slug}.png"
        for line, slug in zip(lines, ["a-small-cat"] * 2 + [""] * 2 + ["a-dog"] * 2, strict=True)
        if slug
    )
    for line in lines:
        if line["state"] == "done":
            with Image.open(tmp_path / line["path"]) as image:
                assert image.size == (8, 8)
    rejected = [json.loads(line) for line in (tmp_path / "p.txt.rejected.jsonl").read_text().splitlines()]
    assert [(each["file"], each["line"], each["field"]) for each in rejected] == [("p.txt", 4, "prompt")]


def test_kill_nine_again_and_again_renders_each_line_once(
    stack: Stack, client: redis.Redis, worker: FastWorker, tmp_path: Path
) -> None:
    lines = 600
    (tmp_path / "p.txt").write_text("".join(f"kill {n}\n" for n in range(lines)))
    words = ("p.txt", "--max-queued", "100", "--quiet", "--json")
    for kill in (1, 2):
        process = command(stack, tmp_path, *words)
        wait_until("feeding", lambda kill=kill: fed(client) >= kill * 200, 60)  # type: ignore[misc]
        process.kill()
        process.communicate()
    code, said, _ = finished(command(stack, tmp_path, *words))
    assert code == 0
    assert said["done"] == lines
    assert [line["line"] for line in manifest(tmp_path)] == list(range(1, lines + 1))
    rendered = [line[0] for line in worker.lines() if line[3].startswith("kill")]
    assert len(rendered) == len(set(rendered)) == lines


def test_standard_input_s3_and_grids_are_taken(
    stack: Stack, client: redis.Redis, worker: FastWorker, tmp_path: Path
) -> None:
    # By the server: it would not look for a second whether somebody put a file into its folder.
    s3 = boto3.client(
        "s3",
        endpoint_url=stack.s3.endpoint,
        region_name=stack.s3.region,
        aws_access_key_id=stack.s3.access_key,
        aws_secret_access_key=stack.s3.secret_key,
    )
    s3.put_object(Bucket="smallcat", Key="lists/p.tsv", Body=b"Prompt\tShop\na bird\tx\n")
    process = subprocess.run(
        [
            *(sys.executable, "-m", "producer", "ingest", "-", "s3://smallcat/lists/p.tsv"),
            *("--grid", "steps=2,3", "guidance_scale=5,7.5", "--manifest", "m.jsonl", "--json"),
        ],
        cwd=tmp_path,
        env=stack.environment | {"PYTHONPATH": str(ROOT)},
        input="a cat\n",
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    # One format for standard input, and another by the address' ending.
    assert process.returncode == 0, process.stderr
    lines = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert [(line["file"], line["prompt"]) for line in lines] == [("stdin", "a cat")] * 4 + [
        ("s3://smallcat/lists/p.tsv", "a bird")
    ] * 4
    assert lines[1]["grid"] == {"steps": 2, "guidance_scale": 7.5}
    assert lines[-1]["metadata"] == {"Shop": "x"}
