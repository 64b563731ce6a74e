"""A device that only takes time: two or more streams that share it, and what work on it costs."""

from __future__ import annotations

import bisect
import threading
import time
from collections import deque

#: Milliseconds of a step by its rows, and of a decoding by its pictures: about as on an H200, with Stable
#: Diffusion 1.x shapes at 512x512 px, compiled (docs/measurements.md).
STEP_MS = {1: 6.6, 2: 6.6, 4: 10.0, 8: 17.2, 16: 33.1, 32: 65.0}
DECODE_MS = {1: 9.0, 2: 15.4, 4: 29.6, 8: 58.0}
#: Pictures that are decoded at once, as `worker.decoder` does at 512x512 px.
CHUNK = max(DECODE_MS)


def cost_s(costs: dict[int, float], size: int) -> float:
    """What `size` costs: as much as the next larger one that was measured, of which it is a part."""
    sizes = list(costs)
    return costs[sizes[min(bisect.bisect_left(sizes, size), len(sizes) - 1)]] / 1e3


class Device:
    """Streams that share a device: what is at the head of each advances, at the same pace."""

    def __init__(self, streams: int) -> None:
        self._streams: list[deque[tuple[list[float], threading.Event]]] = [deque() for _ in range(streams)]
        self._changed = threading.Condition()
        threading.Thread(target=self._run, daemon=True).start()

    def set_off(self, stream: int, seconds: float) -> threading.Event:
        """Begin what takes `seconds` alone, after all of its stream. The event tells when it is done."""
        done = threading.Event()
        with self._changed:
            self._streams[stream].append(([seconds], done))
            self._changed.notify()
        return done

    def _run(self) -> None:
        with self._changed:
            while True:
                heads = [stream[0] for stream in self._streams if stream]
                begun_s = time.perf_counter()
                if not heads:
                    self._changed.wait()
                    continue
                self._changed.wait(min(left[0] for left, _ in heads) * len(heads))
                passed_s = (time.perf_counter() - begun_s) / len(heads)
                for left, _ in heads:
                    left[0] -= passed_s
                for stream in self._streams:
                    if stream and stream[0][0][0] <= 0:
                        stream.popleft()[1].set()
