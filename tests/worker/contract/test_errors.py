"""The error tree: as drawn, and the same on the other side of a pickle or a record."""

from __future__ import annotations

import pickle
import re

import pytest

from worker.contract import errors
from worker.contract.errors import JobError, SmallcatError, named


def tree(root: type[SmallcatError] = SmallcatError) -> list[type[SmallcatError]]:
    """`root` and all below it that this project defines."""
    below = [each for child in root.__subclasses__() for each in tree(child)]
    return [root, *below]


def in_the_project(kind: type[SmallcatError]) -> bool:
    return kind.__module__.split(".")[0] in ("worker", "producer")


KINDS = [kind for kind in tree() if in_the_project(kind)]


def drawn() -> dict[str, str]:
    """Child to parent, as the module's docstring draws them."""
    assert errors.__doc__ is not None
    parents: dict[str, str] = {}
    path: list[str] = []
    for line in errors.__doc__.splitlines():
        if found := re.match(r"    ([│├└─ ]*)(\w+Error)\b", line):
            depth = len(found[1]) // 4
            path = [*path[:depth], found[2]]
            if depth:
                parents[found[2]] = path[depth - 1]
    return parents


def test_the_tree_is_as_drawn() -> None:
    # Whatever other modules define would be missing in the drawing, and unknown to `named`.
    import producer.cli.doctor
    import worker.jobs.handler
    import worker.jobs.heartbeat
    import worker.state.fleet
    import worker.storage.bucket

    assert producer
    assert worker

    real = {
        kind.__name__: parent.__name__
        for kind in tree()
        if in_the_project(kind)
        for parent in kind.__bases__
        if kind is not SmallcatError
    }
    assert drawn() == real


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_an_error_is_raised_again_by_its_name_with_its_text(kind: type[SmallcatError]) -> None:
    error = named(kind.__name__, "a text")
    assert type(error) is kind
    assert str(error) == "a text"


def test_an_error_of_a_newer_version_becomes_a_job_error_that_mentions_it() -> None:
    error = named("SunspotError", "a text")
    assert type(error) is JobError
    assert str(error) == "SunspotError: a text"


@pytest.mark.parametrize("name", ["ValueError", "SystemExit", "", "named", "__class__"])
def test_only_errors_of_this_tree_go_by_name(name: str) -> None:
    assert type(named(name, "a text")) is JobError


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_an_error_survives_pickling(kind: type[SmallcatError]) -> None:
    copy = pickle.loads(pickle.dumps(kind("a text")))  # noqa: S301 - our own bytes
    assert (type(copy), copy.args) == (kind, ("a text",))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_docstring_says_when_an_error_is_raised(kind: type[SmallcatError]) -> None:
    assert kind is SmallcatError or (kind.__doc__ or "").startswith("Raised when")
