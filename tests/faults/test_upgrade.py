"""An upgrade and its way back, under load and kills: between earlier versions and this one, and to the next.

Workers and producers of both releases are on one queue all the time. One worker after the other is replaced,
in the order that docs/upgrades.md gives, and killed on the way; then one after the other goes back.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.faults import oracle
from tests.faults.earlier import EARLIER
from tests.faults.harness import ROOT, Feeder, Ground, slots, wait_until
from tests.faults.releases import OtherProducer, account_with_tints, earlier_release, next_release, waiting
from worker.broker.transport import OLD_UNACKED, UNACKED
from worker.contract.job import Job

#: Jobs at least, of both producers together.
JOBS = 300
#: Jobs a second of each producer.
RATE = 20.0
#: Lines of a prompt file of each producer, fed meanwhile.
LINES = 60
#: Jobs that end between two steps.
PROGRESS = 15
SETTINGS = {"SMALLCAT_MAX_ATTEMPTS": "1000"}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def tree_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The tree of a release: `next`, or a commit."""
    made: dict[str, Path] = {}

    def tree(release: str) -> Path:
        if release not in made:
            folder = tmp_path_factory.mktemp(release)
            made[release] = next_release(folder) if release == "next" else earlier_release(release, folder)
        return made[release]

    return tree


class Fleet:
    """Two workers, each of one of two releases at a time."""

    def __init__(self, ground: Ground, *trees: Path) -> None:
        self._ground = ground
        self._trees = list(trees)
        self.workers = [ground.worker(settings=SETTINGS, tree=tree) for tree in trees]
        #: Process ids by the release that they run.
        self.pids: dict[Path, set[int]] = {}
        self._note()
        self.kills = 0

    def _note(self) -> None:
        for worker, tree in zip(self.workers, self._trees, strict=True):
            self.pids.setdefault(tree, set()).add(worker.pid)

    def _replace(self, number: int, tree: Path, *, progress: bool = True) -> None:
        self._trees[number] = tree
        if self.workers[number].tree == tree:
            self.workers[number].launch()
        else:
            self.workers[number] = self._ground.worker(settings=SETTINGS, tree=tree, ready=False)
        self._note()
        self.workers[number].wait_ready()
        if not progress:
            return
        left = self._ground.journal.total("leave")
        wait_until("progress", lambda: self._ground.journal.total("leave") > left + PROGRESS, 120)

    def kill(self, number: int, then: Path) -> None:
        """Kill a worker under load; in its place comes one of the release `then`."""
        self.workers[number].kill()
        self.kills += 1
        self._replace(number, then)

    def drain(self, number: int, then: Path, *, progress: bool = True) -> None:
        """End a worker as documented; in its place comes one of the release `then`."""
        self.workers[number].stop()
        self._replace(number, then, progress=progress)


@contextmanager
def feeding_runs(folder: Path, *producers: OtherProducer) -> Iterator[None]:
    """Each producer's `smallcat ingest` of a file of its own; all lines of both end as done."""

    def ingest(number: int, producer: OtherProducer) -> Path:
        file = folder / f"{number}.csv"
        lines = [f"run-{number}-{line} sleep:0.2,{1000 * number + line}" for line in range(LINES)]
        file.write_text("\n".join(["prompt,seed", *lines, ""]))
        fed = producer.command("ingest", str(file), "--max-queued", "10", timeout_s=400)
        assert fed.returncode == 0, fed.stderr
        return folder / f"{file.name}.manifest.jsonl"

    with ThreadPoolExecutor() as pool:
        manifests = [pool.submit(ingest, number, each) for number, each in enumerate(producers)]
        yield
        for manifest in manifests:
            rows = [json.loads(line) for line in manifest.result().read_text().splitlines()]
            assert [row["state"] for row in rows] == ["done"] * LINES


def held_by(ground: Ground) -> set[str]:
    """Messages that workers of this release hold."""
    with ground.redis as client:
        return set(client.hkeys(UNACKED))


def roll(fleet: Fleet, ground: Ground, old: Path, new: Path) -> None:
    """There and back, with a kill of each worker in each release while it runs beside the other release."""
    fleet.kill(0, then=new)
    fleet.kill(1, then=old)
    fleet.kill(0, then=new)
    fleet.drain(1, then=new)
    # Back. What a killed worker held goes on when a worker that knows of it finds its lease run out: so one
    # of its own release stays until then.
    fleet.drain(0, then=old)
    fleet.kill(0, then=old)
    before = held_by(ground)
    fleet.kill(1, then=new)
    wait_until("the killed worker's messages go on", lambda: not before & held_by(ground), 60)
    fleet.drain(1, then=old)


@pytest.mark.parametrize("release", EARLIER)
def test_upgrade_from_an_earlier_version_and_roll_back(
    ground: Ground, tree_of: Callable[[str], Path], release: str, tmp_path: Path
) -> None:
    """Workers and producers of both, single jobs and prompt files; no job is lost, and none is done twice."""
    old = tree_of(release)
    fleet = Fleet(ground, old, ROOT)
    with ground.holding() as hold, ground.redis as client:
        held = ground.submit(2 * slots(4), hold)
        # They hold messages under other names.
        wait_until("both work", lambda: client.hlen(OLD_UNACKED) > 0 and client.hlen(UNACKED) > 0)
    oracle.settle(ground, held)
    fleet.drain(1, then=old, progress=False)
    with (
        OtherProducer(ground, old) as producer,
        OtherProducer(ground, ROOT) as ours,
        feeding_runs(tmp_path, producer, ours),
        ground.feeding(RATE, submit=producer, tenants=("",)) as earlier,
        ground.feeding(RATE, tenants=("",)) as now,
        ground.feeding(RATE / 4, tenants=("acme", "blue")) as tenants,
    ):
        roll(fleet, ground, old, ROOT)
        wait_until("enough jobs", lambda: len(earlier.ids) + len(now.ids) >= JOBS, 120)
    ids = [*earlier.ids, *now.ids]
    wait_until("all but tenants' jobs done", lambda: ground.states(ids).keys() <= {"done"}, 120)
    # Workers of the earlier version neither take these nor lose them. They wait for the next one that does.
    left = ground.states(tenants.ids)
    assert left["queued"] > 0
    pids = fleet.pids[old]
    mine = set(tenants.ids)
    assert not [event for event in ground.journal.events() if event.job in mine and event.pid in pids]
    report(ground, fleet, release, earlier, now)
    fleet.drain(0, then=ROOT, progress=False)
    oracle.settle(ground, [*ids, *tenants.ids], timeout_s=120)
    print(f"{len(tenants.ids)} jobs of tenants, of which {left['queued']} waited for the upgrade")


def report(ground: Ground, fleet: Fleet, release: str, *feeders: Feeder) -> None:
    """Say what was done, and by whom."""
    by = {event.job: event.pid for event in ground.journal.events() if event.what == "put"}
    jobs = {tree: sum(pid in pids for pid in by.values()) for tree, pids in fleet.pids.items()}
    assert min(jobs.values()) > 0
    shown = ", ".join(
        f"{'this' if tree == ROOT else release} rendered {count}" for tree, count in jobs.items()
    )
    sent = " and ".join(str(len(feeder.ids)) for feeder in feeders)
    print(f"{release}: {sent} jobs by its producer and ours, {fleet.kills} kills; {shown}: 0 lost")


def test_upgrade_to_the_next_release_and_roll_back(
    ground: Ground, tree_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """Half of its producer's jobs have what only its workers read: they wait, and hold up nobody."""
    after = tree_of("next")
    fleet = Fleet(ground, ROOT, ROOT)
    with OtherProducer(ground, after) as producer, OtherProducer(ground, ROOT) as ours:

        def submit(job: Job) -> str:
            return producer(job, tint=job.seed % 4 // 2)

        with (
            feeding_runs(tmp_path, ours, producer),
            ground.feeding(RATE, submit=submit, tenants=("",)) as later,
            ground.feeding(RATE) as now,
        ):
            wait_until("messages that no worker reads", lambda: waiting(ground) > 20, 120)
            roll(fleet, ground, ROOT, after)
            # Gone back: new ones wait again.
            before = waiting(ground)
            wait_until("messages that no worker reads", lambda: waiting(ground) > before + 10, 120)
            wait_until("enough jobs", lambda: len(later.ids) + len(now.ids) >= JOBS, 120)
        oracle.settle(ground, now.ids, timeout_s=120)
        left = waiting(ground)
        fleet.drain(0, then=after, progress=False)
    ids = [*later.ids, *now.ids]
    wait_until("all done", lambda: ground.states(ids).keys() <= {"done"}, 120)
    oracle.settled(ground)
    assert waiting(ground) == 0
    tinted = account_with_tints(ground, ids)
    report(ground, fleet, "the next release", later, now)
    by = {event.job: event.pid for event in ground.journal.events() if event.what == "put"}
    # Whoever was killed right after its upload noted none.
    assert {by[job_id] for job_id in tinted if job_id in by} <= fleet.pids[after]
    print(f"{len(tinted)} jobs that only the next release reads, of which {left} waited for its return")
