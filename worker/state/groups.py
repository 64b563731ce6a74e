"""The live workers by what they serve, and what a job means by them. Pure: Redis is elsewhere (`fleet`).

A job that names a model gets the revision of the newest worker that serves it. A job that names none gets the
fleet's default: the model of the worker that has been up longest. Workers that retire are meant where no
others are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict

from worker.contract.choices import PromptSyntax
from worker.contract.file_index import FileIndex
from worker.contract.job import Job
from worker.contract.job_files import lacking, with_files
from worker.contract.job_parameters import DEFAULT_MODEL
from worker.contract.queues import Takers, queues_of
from worker.contract.served_model import ServedModel


class WorkerInfo(BaseModel):
    """A worker as it announces itself."""

    model_config = ConfigDict(frozen=True)

    #: Celery's node name.
    name: str
    #: What it serves.
    served: ServedModel
    #: Unix seconds by Redis' clock when it started.
    started_at: float
    #: What it runs on, such as "NVIDIA H200" or "CPU, 2 threads".
    device: str
    #: Attention backend in use.
    attention: str
    #: Rows of one forward pass, at most: its largest batch size.
    max_rows: int
    #: Versions of what it runs, by package.
    versions: dict[str, str]
    #: Why it takes no jobs at present; empty while it does.
    paused: str = ""
    #: Version of messages up to which it reads jobs (`worker.contract.job.FORMAT_VERSION`).
    reads: int = 1
    #: The syntax of jobs that do not say theirs. Not among the model's defaults, where older producers refuse
    #: names that they do not know.
    prompt_syntax: PromptSyntax = PromptSyntax.PLAIN
    #: Digest of the index of the files that it offers; empty where it offers none.
    files: str = ""
    #: Jobs that it works on.
    running: int = 0
    #: Pictures a second, and mean rows of a step, lately; 0 while it does nothing.
    images_s: float = 0.0
    step_rows: float = 0.0
    #: Whether it retires: new jobs mean it only where they name what it alone serves.
    retiring: bool = False


#: In place of who started first and last.
_NOBODY = (0.0, "")


class Group(BaseModel):
    """The live workers that serve and read the same. Those that pause are a group of their own."""

    model_config = ConfigDict(frozen=True)

    #: What they serve.
    served: ServedModel
    #: How many they are.
    workers: int
    #: When the one that has been up longest started, Unix seconds by Redis' clock, and its name.
    first: tuple[float, str]
    #: When the newest one started, and its name.
    last: tuple[float, str]
    #: As `WorkerInfo.reads`.
    reads: int = 1
    #: Whether they take no jobs at present.
    paused: bool = False
    #: As `WorkerInfo.prompt_syntax`.
    prompt_syntax: PromptSyntax = PromptSyntax.PLAIN
    #: As `WorkerInfo.files`.
    files: str = ""
    #: As `WorkerInfo.retiring`.
    retiring: bool = False

    def meaning(self, index: FileIndex) -> Meant:
        """What a job means that means this group, whose files are `index`."""
        return Meant(self.served, self.prompt_syntax, index)


class Digest(BaseModel):
    """What the live workers serve. Workers write it when it changes."""

    model_config = ConfigDict(frozen=True)

    #: Another one with each change.
    version: int
    #: Whether workers of earlier versions are live, which are not in it.
    mixed: bool
    groups: tuple[Group, ...]


def groups_in(digest: object) -> Sequence[Group] | None:
    """The groups in the text of the digest; None where all announcements must be read instead."""
    if not isinstance(digest, str):
        return None
    try:
        read = Digest.model_validate_json(digest)
    except ValueError:
        return None
    return None if read.mixed else read.groups


def groups_of(workers: Iterable[WorkerInfo]) -> Sequence[Group]:
    """The groups of `workers`."""
    members: dict[Group, list[tuple[float, str]]] = {}
    for worker in workers:
        kind = Group(
            served=worker.served,
            workers=0,
            first=_NOBODY,
            last=_NOBODY,
            reads=worker.reads,
            paused=bool(worker.paused),
            prompt_syntax=worker.prompt_syntax,
            files=worker.files,
            retiring=worker.retiring,
        )
        members.setdefault(kind, []).append((worker.started_at, worker.name))
    return [
        kind.model_copy(update={"workers": len(of), "first": min(of), "last": max(of)})
        for kind, of in members.items()
    ]


def takers(groups: Iterable[Group], queue: str, job: Job, index_of: Callable[[str], FileIndex]) -> Takers:
    """Who of `groups` takes messages of `job` from `queue`. `index_of` a digest: the files of a group."""
    fitting = [group for group in groups if queue in queues_of(group.served)]
    reading = [group for group in fitting if group.reads >= job.version]
    taking = [group for group in reading if not lacking(job, index_of(group.files))]
    return Takers(
        workers=sum(group.workers for group in taking if not group.paused),
        paused=sum(group.workers for group in taking if group.paused),
        reads=max((group.reads for group in fitting), default=0),
        lacking=sum(group.workers for group in reading) - sum(group.workers for group in taking),
    )


def version_read(groups: Iterable[Group], queue: str) -> int:
    """The version of messages up to which one of `groups` takes jobs from `queue`; 0 where none does."""
    return max((group.reads for group in groups if queue in queues_of(group.served)), default=0)


@dataclass(frozen=True)
class Meant:
    """What a job means that names no revision, or no model."""

    served: ServedModel
    prompt_syntax: PromptSyntax
    #: The files that jobs may name.
    index: FileIndex

    def resolve(self, job: Job) -> Job:
        """`job` with all of it. Raises `InvalidJobError`."""
        job = job.in_syntax(self.prompt_syntax).resolved(self.served)
        return with_files(job, self.index, self.served.architecture)


def meant_by(job: Job, *known: Callable[[], Sequence[Group]]) -> Group | None:
    """Whom a job without a revision, or without a model, means; None where no group serves it.

    The first of `known` with such a group counts; those that retire, only where all others have none.
    """
    seen = []
    for groups in known:
        seen.append(groups())
        if group := _meant_among(job, [each for each in seen[-1] if not each.retiring]):
            return group
    return next((group for groups in seen if (group := _meant_among(job, groups))), None)


def _meant_among(job: Job, groups: Sequence[Group]) -> Group | None:
    name = job.model
    if groups and name == DEFAULT_MODEL:
        name = min(groups, key=lambda group: group.first).served.name
    fitting = [
        group for group in groups if group.served.name == name and job.revision in ("", group.served.revision)
    ]
    return max(fitting, key=lambda group: group.last) if fitting else None
