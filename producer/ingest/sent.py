"""A message of a run on its way into Redis, and what `feed.lua` takes of a window of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Sent(NamedTuple):
    """A message, and what is to be known of its job where that begins with the pictures of others."""

    #: The Redis list that it belongs into.
    list: str
    #: As it stands in the list.
    message: str
    #: Ids of the jobs whose pictures its job begins with: it waits for those that are not done.
    parents: tuple[str, ...] = ()
    #: The job's id, the job as JSON, its queue, and its run mark; empty where it has no `parents`.
    id: str = ""
    job: str = ""
    queue: str = ""
    mark: str = ""


def arguments(messages: Sequence[Sent], numbers: Mapping[str, int]) -> list[str | int]:
    """The last arguments of `feed.lua`. `numbers` are the places of the lists among its keys, from 1."""
    args: list[str | int] = [item for each in messages for item in (numbers[each.list], each.message)]
    for place, each in enumerate(messages, 1):
        if each.parents:
            args += [place, each.id, each.job, each.queue, each.mark, " ".join(each.parents)]
    return args
