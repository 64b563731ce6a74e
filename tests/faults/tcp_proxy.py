"""A TCP proxy that does to connections what networks do: cut, delay, half-close, lose the answer."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from typing import Literal

#: cut: all connections are reset, new ones work. delay: every packet waits for DELAY_S. half_close: the
#: server sees the end of each connection, the client receives nothing. lose: the request is done; the
#: answer is lost, with its connection. well: nothing is wrong.
Mode = Literal["well", "cut", "delay", "half_close", "lose"]
MODES: tuple[Mode, ...] = ("cut", "delay", "half_close", "lose")

#: Seconds that each packet waits, each way, when the mode is delay.
DELAY_S = 0.2


class TCPProxy:
    """Passes bytes on to `port` of this machine, or does what its mode says. A context manager."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._lock = threading.Lock()
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._mode: Mode = "well"
        #: Answers that were lost, after the request had arrived.
        self.lost = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, name="tcp proxy", daemon=True).start()

    def be(self, mode: Mode) -> None:
        """Change the mode, for the connections that there are and for new ones."""
        with self._lock:
            self._mode = mode
            pairs = list(self._pairs)
        for near, far in pairs:
            if mode == "cut":
                _reset(near)
                _reset(far)
            elif mode == "half_close":
                with contextlib.suppress(OSError):
                    far.shutdown(socket.SHUT_WR)
        if mode == "cut":
            with self._lock:
                self._mode = "well"

    def __enter__(self) -> TCPProxy:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()
        self.be("cut")

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                near.close()
                continue
            with self._lock:
                self._pairs.append((near, far))
            for source, sink, is_answer in ((near, far, False), (far, near, True)):
                arguments = (source, sink, is_answer)
                threading.Thread(target=self._pump, args=arguments, name="tcp proxy", daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, is_answer: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65_536):
                if self._mode == "delay":
                    time.sleep(DELAY_S)
                if self._mode == "lose" and is_answer:
                    with self._lock:
                        self.lost += 1
                    break
                sink.sendall(data)
        if self._mode == "half_close" and is_answer:
            return  # The client's connection stays open.
        for each in (source, sink):
            _reset(each)
        with self._lock:
            self._pairs = [pair for pair in self._pairs if source not in pair]


def _reset(connection: socket.socket) -> None:
    """Close at once, with a reset: also what is under way is lost."""
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()
