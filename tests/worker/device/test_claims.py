"""Which worker compiles what the fleet lacks. Clocks and waits are the test's own."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from worker.device.compiling import claims
from worker.device.compiling.claims import GONE_S, LOOK_S, MOST_WAIT_S, RENEW_S, SETTLE_S, Claims

NAME = "setup/name.kernels"


class Machines:
    """A store and a time that machines share, and what happens while one of them waits."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.now_s = 0.0
        self.meanwhile: Callable[[], None] = lambda: None

    def get(self, name: str) -> bytes | None:
        return self.files.get(name)

    def put(self, name: str, content: bytes) -> None:
        self.files[name] = content

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds
        self.meanwhile()

    def machine(self) -> Claims:
        return Claims(self, lambda: self.now_s, self.sleep)

    def is_there(self) -> bool:
        return NAME in self.files


def test_the_first_machine_compiles_and_the_next_waits_for_its_code() -> None:
    shared = Machines()
    one, other = shared.machine(), shared.machine()
    assert one.take(NAME, shared.is_there)
    assert shared.now_s <= SETTLE_S + 0.1
    began_s = shared.now_s

    def compiling() -> None:
        one.renew(NAME)
        if shared.now_s > began_s + 300:
            shared.files[NAME] = b"code"
            one.end(NAME)

    shared.meanwhile = compiling
    assert not other.take(NAME, shared.is_there)
    assert 300 < shared.now_s - began_s < 300 + 2 * LOOK_S


def test_a_machine_that_is_gone_holds_nobody_up_for_long() -> None:
    shared = Machines()
    assert shared.machine().take(NAME, shared.is_there)
    assert shared.machine().take(NAME, shared.is_there)
    assert GONE_S < shared.now_s < GONE_S + 2 * LOOK_S + 2 * SETTLE_S


def test_one_that_has_failed_is_followed_at_once() -> None:
    shared = Machines()
    one = shared.machine()
    assert one.take(NAME, shared.is_there)
    one.end(NAME)
    before_s = shared.now_s
    assert shared.machine().take(NAME, shared.is_there)
    assert shared.now_s - before_s <= SETTLE_S + 0.1


def test_of_two_that_claim_at_once_one_compiles() -> None:
    shared = Machines()
    one, other = shared.machine(), shared.machine()
    results: list[bool] = []

    def claim() -> None:
        """While the first one waits for its claim to settle."""
        shared.meanwhile = lambda: None
        results.append(other.take(NAME, shared.is_there))
        shared.files[NAME] = b"code"

    shared.meanwhile = claim
    results.append(one.take(NAME, shared.is_there))
    assert results == [True, False]


def test_a_claim_is_renewed_now_and_then() -> None:
    shared = Machines()
    one = shared.machine()
    assert one.take(NAME, shared.is_there)
    first = shared.files[NAME + claims.SUFFIX]
    one.renew(NAME)
    assert shared.files[NAME + claims.SUFFIX] == first
    shared.now_s += RENEW_S + 1
    one.renew(NAME)
    assert shared.files[NAME + claims.SUFFIX] != first


def test_nobody_waits_for_ever() -> None:
    shared = Machines()
    shared.files[NAME + claims.SUFFIX] = b"another"

    def renewed() -> None:
        shared.files[NAME + claims.SUFFIX] = f"another {shared.now_s}".encode()

    shared.meanwhile = renewed
    assert shared.machine().take(NAME, shared.is_there)
    assert shared.now_s < MOST_WAIT_S + LOOK_S + 1


def test_a_process_that_ends_waits_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = Machines()
    shared.files[NAME + claims.SUFFIX] = b"another"
    monkeypatch.setattr(claims, "is_ending", lambda: shared.now_s > 2)
    shared.machine().take(NAME, shared.is_there)
    assert shared.now_s < 4
