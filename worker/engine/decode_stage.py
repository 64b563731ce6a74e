"""Finished jobs to pictures, beside the steps where the device has room for that.

    add ─► decode, which sets it off ─► each outcome waited for ─► deliver
           (the decoder's thread)       (the deliverer's thread)

Two threads, because each picture that is delivered wakes another one, which encodes and uploads it: while
those fight for Python, the device must have its next pictures already.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

from worker.engine.runner import Outcome

T = TypeVar("T")
#: Decodings that are set off, at most: one that is waited for, and the next. Those that come meanwhile are
#: decoded together, for less each.
AHEAD = 2


class Decoding(Generic[T]):
    """Decodes items in the order in which they come, as many together as are waiting.

    `decode` sets it off and returns the outcomes in order, each waited for when it is asked for; `deliver`
    is given them one by one. `fail` is told what either of them raises, and `on_room` is called when another
    decoding may begin. Where not `beside`, all of it happens in `add`. Public methods may be called from any
    thread.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[T]], Iterator[Outcome]],
        deliver: Callable[[T, Outcome], None],
        fail: Callable[[BaseException], None],
        on_room: Callable[[], None],
        *,
        beside: bool,
        clock: Callable[[], float],
    ) -> None:
        self._decode = decode
        self._deliver = deliver
        self._fail = fail
        self._on_room = on_room
        self._clock = clock
        self._waiting: list[T] = []
        self._since_s: list[float] = []
        self._stopped = False
        self._changed = threading.Condition()
        self._decoder = ThreadPoolExecutor(1, "decoder") if beside else None
        self._deliverer = ThreadPoolExecutor(1, "deliverer") if beside else None

    @property
    def since_s(self) -> Sequence[float]:
        """When each decoding began of those that go on."""
        return tuple(self._since_s)

    @property
    def is_full(self) -> bool:
        """Whether what is added now would have to wait."""
        return len(self._since_s) >= AHEAD

    def add(self, items: Iterable[T]) -> None:
        """Have `items` decoded. After `stop` they are forgotten."""
        with self._changed:
            self._waiting.extend(items)
        self._on(self._decoder, self._set_off)

    def settle(self) -> None:
        """Wait until nothing is decoded and nobody waits for it, or `stop`."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or not (self._waiting or self._since_s))

    def stop(self) -> None:
        """Forget who is waiting. What is being decoded is still delivered, or forgotten."""
        with self._changed:
            self._stopped = True
            self._waiting.clear()
            self._changed.notify_all()
        for thread in (self._decoder, self._deliverer):
            if thread is not None:
                thread.shutdown(wait=False, cancel_futures=True)

    def _set_off(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or not self.is_full)
            items, self._waiting = self._waiting, []
            if not items:
                # An earlier decoding took them along.
                return
            since_s = self._clock()
            self._since_s.append(since_s)
        try:
            outcomes = self._decode(items)
            self._on(self._deliverer, lambda: self._deliver_all(items, outcomes, since_s))
        except BaseException as error:  # noqa: BLE001 - it is told
            self._end(since_s)
            self._fail(error)

    def _deliver_all(self, items: Sequence[T], outcomes: Iterator[Outcome], since_s: float) -> None:
        try:
            for item, outcome in zip(items, outcomes, strict=True):
                self._deliver(item, outcome)
        except BaseException as error:  # noqa: BLE001 - it is told
            self._fail(error)
        finally:
            self._end(since_s)

    def _end(self, since_s: float) -> None:
        with self._changed:
            self._since_s.remove(since_s)
            self._changed.notify_all()
        self._on_room()

    def _on(self, thread: ThreadPoolExecutor | None, do: Callable[[], None]) -> None:
        """Have it done on `thread`, where there is one, or here."""
        if thread is None:
            do()
            return
        try:
            thread.submit(do)
        except RuntimeError:
            if not self._stopped:
                raise
