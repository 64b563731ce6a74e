"""An upgrade and its way back: workers of the first version and of this one take each other's jobs."""

from __future__ import annotations

import io
import subprocess
import tarfile
from pathlib import Path

import pytest

from tests.faults import oracle
from tests.faults.harness import ROOT, FaultWorker, Ground, slots, wait_until
from worker.broker.transport import UNACKED

#: The commit of the first version: see also tests/worker/contract/messages.
FIRST = "e673185"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tree of the first version."""
    folder = tmp_path_factory.mktemp("first")
    found = subprocess.run(["git", "archive", FIRST], cwd=ROOT, capture_output=True, check=False)
    if found.returncode:
        pytest.skip("This is no clone with the first version's commit.")
    with tarfile.open(fileobj=io.BytesIO(found.stdout)) as tree:
        tree.extractall(folder, filter="data")
    return folder


def _in_folder(folder: Path, argv: list[str]) -> list[str]:
    at = argv.index("celery") + 1
    return [*argv[:at], "--workdir", str(folder), *argv[at:]]


def test_workers_of_both_versions_share_a_queue_under_kills(
    ground: Ground, first: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of each works; each is killed under load, twice, and no job is lost."""
    argv_of = FaultWorker._argv
    earlier = {"PYTHONPATH": str(first), "PYTHONSAFEPATH": "1", "SMALLCAT_MAX_ATTEMPTS": "1000"}
    now = {"SMALLCAT_MAX_ATTEMPTS": "1000"}
    with monkeypatch.context() as patch:
        # Celery puts its working folder before all others.
        patch.setattr(FaultWorker, "_argv", lambda worker: _in_folder(first, argv_of(worker)))
        workers = [ground.worker(settings=earlier)]
        command = workers[0]._argv()
    monkeypatch.setattr(workers[0], "_argv", lambda: command)
    workers.append(ground.worker(settings=now))
    with ground.holding() as hold, ground.redis as client:
        held = ground.submit(2 * slots(4), hold)
        # They hold messages under other names.
        wait_until("both work", lambda: client.hlen("unacked") > 0 and client.hlen(UNACKED) > 0)
    oracle.settle(ground, held)
    with ground.feeding(30.0) as feeder:
        for kill in range(4):
            victim = workers[kill % 2]
            victim.wait_ready()
            left = ground.journal.total("leave")
            wait_until("progress", lambda left=left: ground.journal.total("leave") > left + 40, 120)
            victim.kill()
            victim.launch()
    for worker in workers:
        worker.wait_ready()
    oracle.settle(ground, feeder.ids, timeout_s=120)
    took = {event.pid for event in ground.journal.events() if event.what == "put"}
    print(f"{len(feeder.ids)} jobs, 4 kills, {len(took)} processes put pictures: 0 lost")
