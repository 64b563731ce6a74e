"""A primary, its replica and the sentinels that watch them: real processes, for tests that kill a primary."""

from __future__ import annotations

import contextlib
import socket
import time
from pathlib import Path

import redis

from deploy.embedded.home import HOST, Home
from deploy.embedded.servers import ValkeyProcess, _Server, valkey_server

#: The sentinels' name for the primary.
SERVICE = "main"
#: Milliseconds after which a primary that does not answer is replaced.
DOWN_AFTER_MS = 1_000


class Node(ValkeyProcess):
    """A Valkey server that may be a replica, and listens on a socket as well."""

    def __init__(self, home: Home, name: str, password: str) -> None:
        super().__init__(home, name)
        self.password = password
        #: The node that it is a replica of when it starts.
        self.primary: Node | None = None
        self.socket = self.folder / "s"

    def _argv(self) -> list[str]:
        argv = super()._argv()
        more = f'masterauth {self.password}\nunixsocket "{self.socket}"\nrepl-diskless-sync-delay 0\n'
        if self.primary is not None:
            more += f"replicaof {HOST} {self.primary.port}\n"
        with Path(argv[1]).open("a") as config:
            config.write(more)
        return argv

    @property
    def client(self) -> redis.Redis:
        """A client of this node, whatever it is."""
        return redis.Redis(port=self.port, password=self.password, decode_responses=True)


class SentinelProcess(_Server):
    """One sentinel; with `password` it asks its clients for it."""

    def __init__(self, home: Home, name: str, primary: Node, quorum: int, password: str = "") -> None:
        super().__init__(home, name)
        self._primary, self._quorum, self.password = primary, quorum, password

    def _argv(self) -> list[str]:
        config = self.folder / "sentinel.conf"
        if not config.exists():  # It writes what it learns into it.
            config.write_text(
                f'port {self.port}\nbind {HOST}\ndir "{self.folder}"\n'
                f"sentinel monitor {SERVICE} {HOST} {self._primary.port} {self._quorum}\n"
                f"sentinel auth-pass {SERVICE} {self._primary.password}\n"
                f"sentinel down-after-milliseconds {SERVICE} {DOWN_AFTER_MS}\n"
                f"sentinel failover-timeout {SERVICE} 5000\n"
                + (
                    f"requirepass {self.password}\nsentinel sentinel-pass {self.password}\n"
                    if self.password
                    else ""
                )
            )
        return [str(valkey_server()), str(config), "--sentinel"]

    def _environment(self) -> dict[str, str]:
        return {}

    def _is_ready(self) -> bool:
        try:
            with socket.create_connection((HOST, self.port), timeout=1) as connection:
                connection.sendall(b"PING\r\n")
                with connection.makefile("rb") as replies:
                    return replies.readline()[:5] in (b"+PONG", b"-NOAU")
        except OSError:
            return False


class Sentinels:
    """A primary, a replica and three sentinels. In the place of a stack's `valkey`."""

    def __init__(self, home: Home, *, locked: bool = False) -> None:
        self.home = home
        password = "hunter2-hunter2"
        self.nodes = [Node(home, f"node{number}", password) for number in (1, 2)]
        self.sentinels = [
            SentinelProcess(home, f"sentinel{number}", self.nodes[0], 2, password if locked else "")
            for number in (1, 2, 3)
        ]
        self.password = password

    def start(self) -> Sentinels:
        """Return when the replica follows and all sentinels know each other."""
        first, second = self.nodes
        first.start()
        second.primary = first
        second.start()
        for sentinel in self.sentinels:
            sentinel.start()
        self._wait(lambda: self._follows(first))
        for sentinel in self.sentinels:
            client = redis.Redis(port=sentinel.port, password=sentinel.password or None)
            self._wait(lambda client=client: self._knows_all(client))
        return self

    def _is_asked(self) -> bool:
        sentinel = self.sentinels[0]
        client = redis.Redis(port=sentinel.port, password=sentinel.password or None)
        return bool(client.sentinel_failover(SERVICE))

    @staticmethod
    def _follows(primary: Node) -> bool:
        """Whether the replica has all that the primary had, and gets what is written."""
        return primary.client.info("replication").get("slave0", {}).get("state") == "online"

    @staticmethod
    def _knows_all(client: redis.Redis) -> bool:
        state = client.sentinel_master(SERVICE)
        return state["num-other-sentinels"] == 2 and state["num-slaves"] >= 1

    @staticmethod
    def _wait(happened: object, timeout_s: float = 30) -> None:
        until = time.monotonic() + timeout_s
        while True:
            with contextlib.suppress(redis.RedisError):
                if happened():  # type: ignore[operator]
                    return
            assert time.monotonic() < until, "the sentinels did not agree"
            time.sleep(0.02)

    @property
    def url(self) -> str:
        """`REDIS_URL`."""
        hosts = ",".join(f"{HOST}:{sentinel.port}" for sentinel in self.sentinels)
        return f"redis+sentinel://:{self.password}@{hosts}/{SERVICE}/0"

    @property
    def primary(self) -> Node:
        """The node that takes writes, by its own word."""
        for node in self.nodes:
            with contextlib.suppress(redis.RedisError):
                if node.running and node.client.info("replication")["role"] == "master":
                    return node
        raise AssertionError("there is no primary")

    def fail_over(self, how: str = "kill") -> float:
        """Let the sentinels promote the replica, and the old primary come back. Returns the seconds.

        `how`: kill or freeze the primary, or ask the sentinels to.
        """
        old = self.primary
        other = next(node for node in self.nodes if node is not old)
        began = time.monotonic()
        match how:
            case "kill":
                old.kill()
            case "freeze":
                old.pause()
            case "ask":
                self._wait(self._is_asked)
        self._wait(lambda: other.client.info("replication")["role"] == "master")
        took_s = time.monotonic() - began
        old.primary, other.primary = other, None
        old.resume() if how == "freeze" else None
        old.start() if how == "kill" else None
        self._wait(lambda: self._follows(other))
        return took_s

    def stop(self) -> None:
        """End all of them at once."""
        for part in (*self.sentinels, *self.nodes):
            part.kill_now()
        for part in (*self.sentinels, *self.nodes):
            part.wait(10)

    def kill_now(self) -> None:
        """As of a part of a stack."""
        for part in (*self.sentinels, *self.nodes):
            part.kill_now()
