"""The models that live workers serve, as the API shows them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from worker.contract.file_index import FileEntry, Kind

if TYPE_CHECKING:
    from producer.http.caller import Caller
    from worker.state.fleet import Fleet


@dataclass(frozen=True)
class Model:
    """A model that is served."""

    #: The name that jobs ask for.
    name: str
    #: The revision that a job gets which names none.
    revision: str
    #: Live workers that serve it, at any revision.
    workers: int
    #: Unix seconds when the first of them started.
    since: float


def served_models(fleet: Fleet) -> list[Model]:
    """The models, the fleet's default first."""
    groups = sorted(fleet.groups(), key=lambda group: group.first)
    found: dict[str, Model] = {}
    for name in dict.fromkeys(group.served.name for group in groups):
        members = [group for group in groups if group.served.name == name]
        newest = max(members, key=lambda group: group.last)
        workers = sum(group.workers for group in members)
        found[name] = Model(name, newest.served.revision, workers, members[0].first[0])
    return list(found.values())


def may_use(models: Collection[str], name: str) -> bool:
    """Whether a tenant that may use `models` may use this one; empty: all."""
    return not models or name in models


def models_of(caller: Caller) -> tuple[str, ...]:
    """The models that the caller may use and hears of; empty: all."""
    return caller.limits.models if caller.limits else ()


def allowed(caller: Caller, models: list[Model]) -> list[Model]:
    """Those of the models that the caller's tenant may use."""
    named = models_of(caller)
    return [each for each in models if may_use(named, each.name)]


def offered_loras(fleet: Fleet, models: Collection[str]) -> dict[FileEntry, list[str]]:
    """The LoRAs that can be used, by name, each with those of `models` (empty: all) that have it."""
    found: dict[FileEntry, dict[str, None]] = {}
    for group in fleet.groups():
        if may_use(models, group.served.name):
            for entry in fleet.indexes.get(group.files).files:
                if entry.kind == Kind.LORA and not entry.problem:
                    found.setdefault(entry, {})[group.served.name] = None
    return {entry: sorted(found[entry]) for entry in sorted(found, key=lambda each: each.name)}
