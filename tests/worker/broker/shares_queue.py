"""A queue with tenants, as the scripts have it: for tests and benchmarks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import redis

from worker.broker.layout import words_of
from worker.broker.scripts import FETCH, FETCH_DIGEST
from worker.broker.transport import UNACKED, UNACKED_INDEX
from worker.contract import queues
from worker.contract.lua import script
from worker.contract.queues import SHARES, UNDECODABLE, URGENT, WEIGHTS, arrivals_of, list_of

PUT = script(Path(queues.__file__).with_name("put.lua")) + "put(ARGV[1], KEYS[1], ARGV[2])"


class SharedQueue:
    """One queue. A message is a tenant, a number and a priority as Redis counts."""

    def __init__(self, client: redis.Redis, name: str = "smallcat.m@r") -> None:
        self._client = client
        self.name = name
        self._put = client.script_load(PUT)
        client.script_load(FETCH)
        self._numbers = 0

    def put(self, tenant: str, step: int = 4, *, cost: Any = None, command: str = "LPUSH") -> int:
        """Put one more message. Returns its number."""
        self._numbers += 1
        self.put_again(tenant, step, self._numbers, cost=cost, command=command)
        return self._numbers

    def put_again(
        self, tenant: str, step: int, number: int, *, cost: Any = None, command: str = "LPUSH"
    ) -> None:
        """Put a message of that number."""
        raw = message(tenant, step, number, cost)
        self._client.evalsha(self._put, 1, list_of(self.name, step, tenant), command, raw)

    def put_many(self, tenant: str, step: int, count: int) -> None:
        """Put so many at once."""
        name, first = list_of(self.name, step, tenant), self._numbers + 1
        self.put(tenant, step)
        for start in range(first + 1, first + count, 1_000):
            numbers = range(start, min(start + 1_000, first + count))
            self._client.lpush(name, *(message(tenant, step, each) for each in numbers))
        self._numbers = first + count - 1

    def fetch(self, *, urgent: bool = False, others: Sequence[str] = ()) -> tuple[str, int, int] | None:
        """The next message, of this queue or of `others`; None where all are empty."""
        names = [self.name, *others]
        steps = range(URGENT + 1) if urgent else range(10)
        lists = [
            (each, arrivals_of(each, step), str(int(step > URGENT)))
            for each in names
            for step in ((0,) if urgent else (0, 9))
        ]
        lists += [(each, list_of(each, step), "") for step in steps for each in names]
        keys = [UNACKED, UNACKED_INDEX, UNDECODABLE, "", SHARES, WEIGHTS, *(key for _, key, _ in lists)]
        said = words_of((each, kind) for each, _, kind in lists)
        while True:
            answer: Any = self._client.evalsha(
                FETCH_DIGEST, len(keys), *keys, 1, "", "", 0, "100000 60 10 1000 why", *said
            )
            if answer != [b"again"]:
                break
        if not answer:
            return None
        found = json.loads(answer[1])["headers"]
        assert lists[answer[0]][0] in names
        return found["tenant"], found["step"], found["number"]


def message(tenant: str, step: int, number: int, cost: Any = None) -> str:
    """A message, as far as the fetch looks into it."""
    headers = {"tenant": tenant, "step": step, "number": number}
    own = {} if cost is None else {"smallcat-cost": cost}
    return json.dumps({"headers": headers | own, "properties": {"delivery_tag": f"{tenant}-{number}"}})
