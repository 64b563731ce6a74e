"""Requests that are sent again with the same Idempotency-Key are done once and answered alike.

As draft-ietf-httpapi-idempotency-key-header-07 has it: another body with the same key is 422, a request that
still runs is 409. What is kept, for a day, is a hash of the body, and the ids that were answered.

A list whose sending was cut off goes on where it was: seeds and submissions follow from the key, so what was
sent before is the same job and the same submission, and counts once.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, cast

from producer.http.problems import RefusedError
from producer.http.submitting import SEED_BITS
from worker.contract.explain import short
from worker.state.keys import HTTP_ONCE

if TYPE_CHECKING:
    from redis.client import Redis

    from producer.http.caller import Caller

#: Seconds that an answer is kept, and that a request may take before another one may take it over.
KEPT_S, RUNS_S = 86_400, 30
#: Characters of a key, at most.
LONGEST: Final = 255


@dataclass(frozen=True)
class Once:
    """A request that is done once. `key` is its Idempotency-Key."""

    caller: Caller
    key: str
    body: bytes

    @classmethod
    def of(cls, caller: Caller, key: str, body: bytes) -> Once:
        """Raises `RefusedError` (400) for what is no key. Its quotes, as in the draft, may be left out."""
        plain = key[1:-1] if len(key) > 1 and key[0] == key[-1] == '"' else key
        if not re.fullmatch(r"[\x21-\x7e]{1,255}", plain):
            raise RefusedError(
                400,
                f"Idempotency-Key is {short(key)}: use 1 to {LONGEST} printable ASCII characters, no blanks.",
            )
        return cls(caller, plain, body)

    def seed(self, number: int) -> int:
        """The seed of job `number`, which gives none."""
        return int(self._digest("seed", number)[:16], 16) % (1 << SEED_BITS)

    def submission(self, number: int) -> str:
        """The id of the submission of job `number`."""
        return self.caller.mark + self._digest("submission", number)[:16]

    def begin(self, redis: Redis) -> Any:
        """The answer that was given before; None: the request is to be done now. Raises `RefusedError`."""
        if not redis.set(f"{self._name}:runs", secrets.token_hex(4), nx=True, ex=RUNS_S):
            known = self._known(redis)
            if known is not None and known.get("answer") is not None:
                return known["answer"]
            raise RefusedError(
                409,
                "A request with this Idempotency-Key is being worked on: send it again in a second.",
                headers={"Retry-After": "1"},
            )
        try:
            known = self._known(redis)
        except RefusedError:
            self.give_up(redis)
            raise
        if known is not None and known.get("answer") is not None:
            self.give_up(redis)
            return known["answer"]
        redis.set(self._name, json.dumps({"body": self._fingerprint}), ex=KEPT_S)
        return None

    def finish(self, redis: Redis, answer: Any) -> None:
        """Keep the answer."""
        redis.set(self._name, json.dumps({"body": self._fingerprint, "answer": answer}), ex=KEPT_S)
        self.give_up(redis)

    def give_up(self, redis: Redis) -> None:
        """The request is over without an answer that is kept: the next one does it."""
        redis.delete(f"{self._name}:runs")

    def forget(self, redis: Redis) -> None:
        """The request was refused, and nothing was sent: the key may come with another body."""
        redis.delete(self._name, f"{self._name}:runs")

    @property
    def note(self) -> str:
        """The key under which it is noted what the request was counted for."""
        return f"{self._name}:counted"

    @property
    def _name(self) -> str:
        return f"{HTTP_ONCE}{self.caller.mark}:{hashlib.sha256(self.key.encode()).hexdigest()[:32]}"

    @property
    def _fingerprint(self) -> str:
        return hashlib.sha256(self.body).hexdigest()

    def _digest(self, what: str, number: int) -> str:
        text = f"{what}\0{self.caller.tenant}\0{self.caller.name}\0{self.key}\0{number}"
        return hashlib.sha256(text.encode()).hexdigest()

    def _known(self, redis: Redis) -> dict[str, Any] | None:
        """What is kept of the key. Raises `RefusedError` (422) where it came with another body."""
        text = cast("str | None", redis.get(self._name))
        if text is None:
            return None
        try:
            known = dict(json.loads(text))
        except (ValueError, TypeError):
            return None
        if known.get("body") != self._fingerprint:
            raise RefusedError(
                422,
                "This Idempotency-Key came with another body before: use a new key for a new request.",
                code="IdempotencyKeyReused",
            )
        return known
