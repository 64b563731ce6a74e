"""The runs that one server feeds, of one queue: each is a folder with the uploaded file and how to read it.

    RUN/run.json         the file's name and the options, for a server that goes on with the run
    RUN/prompts.csv      the file as it was uploaded
    RUN/manifest.jsonl   what became of each job, when the run is over; and the other files of a run
    RUN/error.txt        why it cannot go on
    RUN/lock             held by the process that feeds it

A thread feeds each run. A server that was killed goes on with its runs when it starts again: what is left to
do is in Redis, as for `smallcat ingest`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

from producer.http import run_folder
from producer.http.run_limits import gate_of
from producer.http.run_pictures import UploadedPictures
from producer.http.run_slots import MAX_RUNS, MAX_RUNS_OF_ONE, RunSlots, Slot, tenant_of
from producer.ingest.check import refuse_bad_lines
from producer.ingest.feeder import Ingest
from producer.ingest.message_templates import resolver_of
from producer.ingest.plan import Plan, Planned, unresolved
from producer.ingest.run_webhook import set_webhook, tell_run
from producer.ingest.submit_file import grid_of, make_ingest, make_variants
from producer.ingest.types import Options, SilentDisplay
from producer.prompts.sources import source
from producer.session import session
from worker.contract.errors import PromptFileError, QueueError, ServiceError, SmallcatError
from worker.state.keys import HTTP_FORGOTTEN

logger = logging.getLogger("smallcat.http")

#: Seconds until a run is gone on with that Redis or the bucket has stopped.
_AGAIN_S: Final = 5.0
#: Seconds between two looks for runs that were forgotten, or that a server of an earlier version has left.
_LOOK_EVERY_S: Final = 30.0
#: Characters of a run's name, at most.
MAX_NAME: Final = 40
#: Lines that are looked at before a file is taken.
_LOOKED_AT: Final = 1_000
#: Notices of a run that are kept.
_MAX_NOTICES: Final = 100


@dataclass(frozen=True)
class Upload:
    """How an uploaded file is to be read: what `smallcat ingest` has as options."""

    #: The file's name, as manifests have it.
    name: str
    #: Its format; empty: by its name.
    format: str = ""
    images: int = 1
    seed_start: int | None = None
    grid: tuple[str, ...] = ()
    sample: int | None = None
    literal: bool = False
    extra: bool = False
    strict: bool = False
    #: `jsonl` or `csv`.
    manifest: str = "jsonl"
    #: Job fields of lines that do not set them.
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    #: The tenant that the jobs say; empty: none.
    owner: str = ""
    #: The settings of the tenant that uploaded it, as they were then: the same lines are rejected each time.
    tenant: Mapping[str, Any] | None = None
    #: What is told when the run is over, and whether of each job, too: as in `Options`.
    hook: str = ""
    webhook_jobs: bool = False


class _Display(SilentDisplay):
    """Keeps notices."""

    def __init__(self) -> None:
        self.notices: list[str] = []

    def notice(self, text: str) -> None:
        """Keep it."""
        if len(self.notices) < _MAX_NOTICES:
            self.notices.append(text)


class RunStore:
    """The folder of a server's runs. Thread-safe."""

    def __init__(self, folder: Path, ttl_s: float, take_earlier: Callable[[], Sequence[str]] = tuple) -> None:
        """`take_earlier` moves the queue's runs of earlier versions into its folder, and returns their names.

        Raises `SettingsError` where the folder is not ours alone.
        """
        self._folder = folder
        self._ttl_s = ttl_s
        self._take_earlier = take_earlier
        self._feeding: dict[str, tuple[Ingest, _Display]] = {}
        self._ending = threading.Event()
        self._slots = RunSlots(self._ending)
        #: The runs that have a thread, and those that need one more when it ends.
        self._begun: set[str] = set()
        self._again: set[str] = set()
        self._starting = threading.Lock()
        run_folder.claim(self._folder)

    def resume(self) -> None:
        """Go on with the runs that an earlier process began; delete those that have expired.

        What another process receives or feeds stays, and so does what is neither an upload nor a run.
        Raises `QueueError`.
        """
        self._take_earlier()
        run_folder.delete_broken_uploads(self._folder)
        threading.Thread(target=self._look_around, name="look for runs", daemon=True).start()
        for folder in run_folder.lasting(self._folder, self._ttl_s):
            with contextlib.suppress(FileNotFoundError):  # Another process deleted it first.
                if not run_folder.is_over(folder):
                    self._start(folder.name)

    def delete_forgotten(self) -> None:
        """Delete the runs that `smallcat forget` has removed, unless they are fed at the moment.

        Raises `QueueError`.
        """
        if forgotten := _forgotten():
            for folder in filter(run_folder.is_run, self._folder.iterdir()):
                if _is_among(forgotten, folder):
                    run_folder.delete_unlocked(folder, folder / "lock")

    def _look_around(self) -> None:
        while not self._ending.wait(_LOOK_EVERY_S):
            with contextlib.suppress(QueueError, OSError):
                for run in self._take_earlier():
                    self._start(run)
                self.delete_forgotten()

    def close(self) -> None:
        """Feed no more. The next process goes on."""
        self._ending.set()

    def uploading(self) -> AbstractContextManager[Path]:
        """A folder for one upload, until `take` makes it a run or the context ends."""
        return run_folder.uploading(self._folder)

    def take(self, folder: Path, file: Path, upload: Upload, mark: str) -> str:
        """Take an uploaded file that lies in `folder`, and feed its run. Returns the run's name.

        The name begins with `mark`, which tells whose it is; the rest follows from the file and the options,
        so that a file that is sent again is the same run; one that had failed is fed again. Raises
        `PromptFileError`, `InvalidJobError`; with `strict` `QueueError`, too.
        """
        try:
            plan = _plan_of(file, upload)
            _look(plan)
            if upload.strict:
                now = session()
                with now.queue_errors():
                    refuse_bad_lines(plan, lambda _: None, resolver_of(now.fleet.snapshot()))
        except PromptFileError as error:
            raise PromptFileError(_told(error, file, upload)) from None
        run = f"{mark}{plan.digest[: min(24, MAX_NAME - len(mark))]}"
        kept = self._folder / run
        with file.open("rb") as written:
            os.fsync(written.fileno())
        values = {**dataclasses.asdict(upload), "file": file.name}
        run_folder.write_whole(folder / "run.json", json.dumps(values))
        try:
            folder.rename(kept)
        except OSError:
            if not kept.is_dir():
                raise
            if self.error(run) or not self.knows(run):
                self._begin_again(folder, file, kept)
            elif upload.hook:
                self._tell_also(run, upload)
        if not run_folder.is_over(kept):
            self._start(run)
        return run

    def _begin_again(self, folder: Path, file: Path, kept: Path) -> None:
        """Put what was uploaded in the place of a run that had failed."""
        file.replace(kept / file.name)
        (folder / "run.json").replace(kept / "run.json")
        with self._starting:
            if kept.name in self._begun:
                self._again.add(kept.name)
            (kept / "error.txt").unlink(missing_ok=True)

    def _tell_also(self, run: str, upload: Upload) -> None:
        """Let a run that was uploaded before tell this webhook."""
        path = self._folder / run / "run.json"
        with contextlib.suppress(ValueError, TypeError):
            values = json.loads(path.read_text(encoding="utf-8"))
            told = {"hook": upload.hook, "webhook_jobs": upload.webhook_jobs}
            run_folder.write_whole(path, json.dumps(values | told))
        now = session()
        with now.queue_errors():
            set_webhook(now.redis, run, upload.hook, of_jobs=upload.webhook_jobs)

    def is_full(self, tenant_mark: str) -> bool:
        """Whether so many runs are fed or wait, in all or of this tenant, that no further one is taken."""
        with self._starting:
            of_one = sum(tenant_of(each) == tenant_mark for each in self._begun) if tenant_mark else 0
            return len(self._begun) >= MAX_RUNS or of_one >= MAX_RUNS_OF_ONE

    def knows(self, run: str) -> bool:
        """Whether the run is this server's."""
        return (self._folder / run / "run.json").exists()

    def names(self, mark: str) -> list[str]:
        """The runs whose names begin so."""
        return sorted(each.name for each in self._folder.iterdir() if each.name.startswith(mark))

    def error(self, run: str) -> str:
        """Why the run cannot go on; empty where nothing is wrong."""
        with contextlib.suppress(OSError):
            return (self._folder / run / "error.txt").read_text(encoding="utf-8")
        return ""

    def notices(self, run: str) -> list[str]:
        """The run's notices since this process feeds it."""
        fed = self._feeding.get(run)
        return list(fed[1].notices) if fed else []

    def manifest(self, run: str) -> Path | None:
        """The manifest; None until it is written."""
        return run_folder.manifest_of(self._folder / run)

    def listed(self, run: str) -> Path | None:
        """The manifest, or the journal of a run that is not over; None while no job has ended."""
        return self.manifest(run) or next(iter((self._folder / run).glob("manifest.*.part")), None)

    def rejected(self, run: str) -> Path | None:
        """The file of rejected lines; None where there is none."""
        return next(iter((self._folder / run).glob("*.rejected.jsonl")), None)

    def _start(self, run: str) -> None:
        with self._starting:
            if run in self._begun:
                return
            self._begun.add(run)
        threading.Thread(target=self._feed, args=[run], name=f"run {run}", daemon=True).start()

    def _feed(self, run: str) -> None:
        """Feed a run until it is over. While another process feeds it, wait until it ends or is killed."""
        folder = self._folder / run
        has_ended = False
        try:
            while not (has_ended or self._ending.is_set() or run_folder.is_over(folder)) and self.knows(run):
                with run_folder.locked(folder / "lock") as is_mine:
                    has_ended = is_mine and self._try(run, folder)
                if not has_ended:
                    self._ending.wait(_AGAIN_S)
        except OSError as error:
            logger.error("The run %s cannot be gone on with until the server starts again: %s", run, error)
            return
        finally:
            self._feeding.pop(run, None)
            with self._starting:
                self._begun.discard(run)
        if run in self._again:  # It was uploaded again while this thread ended.
            self._again.discard(run)
            self._start(run)

    def _try(self, run: str, folder: Path) -> bool:
        """Feed a run once. Returns whether it has ended, well or with an error that is kept."""
        try:
            with self._slots.taken(run) as slot:
                self._feed_once(run, folder, slot)
            return True
        except ServiceError as error:
            logger.warning("The run %s waits: %s", run, error)
            return False
        except (SmallcatError, OSError) as error:
            text = str(error).replace(f"{folder}{os.sep}", "")
        except Exception as error:  # noqa: BLE001 - what nobody expected; its text may have prompts
            frames = "".join(traceback.format_tb(error.__traceback__))
            logger.error("The run %s has a fault, %s:\n%s", run, type(error).__name__, frames)
            text = "The server has a fault; its log says where. Upload the file again to try once more."
        self._tell_failed(run, folder, text)
        run_folder.write_whole(folder / "error.txt", text)
        return True

    def _tell_failed(self, run: str, folder: Path, text: str) -> None:
        """Tell the run's webhook that it cannot go on."""
        with contextlib.suppress(OSError, ValueError, TypeError, AttributeError, ServiceError):
            hook = json.loads((folder / "run.json").read_text(encoding="utf-8")).get("hook")
            now = session()
            with now.queue_errors():
                if hook:
                    tell_run(now.redis, run, hook, "failed", text)

    def _feed_once(self, run: str, folder: Path, slot: Slot) -> None:
        try:
            values = json.loads((folder / "run.json").read_text(encoding="utf-8"))
            file = folder / values.pop("file")
            upload = Upload(**{**values, "grid": tuple(values["grid"])})
        except (ValueError, TypeError, KeyError, AttributeError):
            raise PromptFileError(
                "The server's own file of this run, run.json, cannot be read: upload the prompt file again."
            ) from None
        if _is_among(_forgotten(), folder):
            # Its jobs would come back. The folder is deleted soon.
            raise PromptFileError("The run was forgotten: upload the file again to have it anew.")
        display = _Display()
        options = Options(
            manifest=folder / f"manifest.{upload.manifest}",
            run=run,
            hook=upload.hook,
            webhook_jobs=upload.webhook_jobs,
        )
        gate = slot.gate(gate_of(upload.tenant, run))
        ingest = make_ingest(_plan_of(file, upload), options, display, gate=gate)
        self._feeding[run] = ingest, display
        ingest()


def _forgotten() -> dict[str, str]:
    """What was forgotten, and when: see `worker.state.forgetting`. Raises `QueueError`."""
    now = session()
    with now.queue_errors():
        return cast("dict[str, str]", now.redis.hgetall(HTTP_FORGOTTEN))


def _is_among(forgotten: Mapping[str, str], folder: Path) -> bool:
    """Whether a run was forgotten: by its tenant since it was uploaded, or by when it was."""
    try:
        values = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        uploaded_at = (folder / "run.json").stat().st_mtime
        names = [
            "before",
            f"tenant:{values.get('owner')}",
            f"tenant:{(values.get('tenant') or {}).get('name')}",
        ]
        return any(uploaded_at < float(forgotten.get(name, 0)) for name in names)
    except (OSError, ValueError, TypeError, AttributeError):
        return False


def _plan_of(file: Path, upload: Upload) -> Plan:
    pictures = UploadedPictures(upload.tenant, upload.owner)
    variants = make_variants(
        dict(upload.fields),
        upload.images,
        upload.seed_start,
        grid_of(upload.grid),
        upload.sample,
        None,
        literal=upload.literal,
        pictures=pictures,
    )
    found = source(str(file), upload.format or None)
    sources = [dataclasses.replace(found, name=upload.name)]
    return Plan(sources, variants, upload.extra, tenant=upload.owner, pictures=pictures)


def _told(error: Exception, file: Path, upload: Upload) -> str:
    """What an error says, by the client's name of the file, and with parameters in the place of options."""
    text = str(error).replace(str(file), upload.name).replace(f"{file.parent}{os.sep}", "")
    return text.replace("--format ", "format=")


def _look(plan: Plan) -> None:
    """Read the first lines. Raises `PromptFileError` where the file cannot be read, or has no job at all."""
    rejected: list[str] = []
    for each in plan.items(unresolved):
        if isinstance(each, Planned) or len(rejected) >= _LOOKED_AT:
            return
        rejected.append(f"line {each.line}: {each.reason}")
    first = f" {rejected[0]}" if rejected else ""
    raise PromptFileError(f"{plan.sources[0].name} has no line that is a job.{first}")
