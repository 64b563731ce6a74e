"""Other S3 servers than the embedded stack's: moto, SeaweedFS and s3rver, as real processes.

`make test-services` installs them and runs the bucket's tests against each.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

from deploy.embedded.home import HOST, Home, StackError
from deploy.embedded.servers import S3Process

#: Where `make test-services` puts s3rver, beside the interpreter's own programs.
NODE = Path(sysconfig.get_path("scripts")).parent / "node"


class MotoProcess(S3Process):
    """moto's server: answers as AWS in many things, and checks neither keys nor signatures."""

    start_timeout_s = 30.0

    def _argv(self) -> list[str]:
        return [sys.executable, "-m", "moto.server", "-H", HOST, "-p", str(self.port)]

    def _environment(self) -> dict[str, str]:
        return {"PATH": os.defpath, "HOME": str(self.home.path), "PYTHONUNBUFFERED": "1"}

    def _is_ready(self) -> bool:
        return "Running on" in self.output() and _answers(self.port)


class SeaweedProcess(S3Process):
    """SeaweedFS: master, volume server, filer and S3 gateway in one process."""

    start_timeout_s = 60.0

    def _argv(self) -> list[str]:
        keys = {"accessKey": self.access_key, "secretKey": self.secret_key}
        rights = ["Admin", "Read", "Write", "List", "Tagging"]
        config = self.home.path / f"{self.name}.json"
        config.touch(mode=0o600)
        config.write_text(
            json.dumps({"identities": [{"name": "test", "credentials": [keys], "actions": rights}]})
        )
        names = ("master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port")
        ports = dict(zip((*names, "filer.port.grpc", "s3.port.grpc"), _free_ports(7), strict=True))
        options = {
            "dir": self.folder,
            "ip": HOST,
            "ip.bind": HOST,
            "s3.port": self.port,
            "s3.config": config,
            "s3.port.iceberg": 0,
            "s3.port.lance": 0,
            "s3.autoCreateBucket": "false",
            "master.telemetry": "false",
            # Megabytes. A bucket has volumes of its own, which are made as large as this at once.
            "master.volumeSizeLimitMB": 8,
            "volume.max": 1_000,
            "filer.localSocket": self.folder / "filer.sock",
            "s3.localSocket": self.folder / "s3.sock",
        }
        return [
            str(Path(sysconfig.get_path("scripts")) / "weed"),
            "server",
            "-s3",
            *(f"-{name}={value}" for name, value in (options | ports).items()),
        ]

    def _environment(self) -> dict[str, str]:
        # Without a key of its own it refuses SSE-S3.
        return {"PATH": os.defpath, "HOME": str(self.home.path), "WEED_S3_SSE_KEY": self.secret_key}

    def _is_ready(self) -> bool:
        """Whether a bucket can be made: the gateway answers before the rest is up."""
        import boto3
        import botocore.config
        import botocore.exceptions

        if not _answers(self.port):
            return False
        config = botocore.config.Config(retries={"total_max_attempts": 1}, read_timeout=5)
        environment = self.environment("")
        client = boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            region_name=self.region,
            aws_access_key_id=environment["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=environment["AWS_SECRET_ACCESS_KEY"],
            config=config,
        )
        try:
            client.create_bucket(Bucket="ready")
            client.put_object(Bucket="ready", Key="x", Body=b"x")
        except client.exceptions.BucketAlreadyOwnedByYou:
            client.put_object(Bucket="ready", Key="x", Body=b"x")
        except (botocore.exceptions.ClientError, botocore.exceptions.BotoCoreError):
            return False
        return True


class S3rverProcess(S3Process):
    """s3rver: a server in JavaScript that has one pair of keys."""

    start_timeout_s = 30.0

    def __init__(self, home: Home, name: str = "s3rver") -> None:
        super().__init__(home, name)
        self.access_key = self.secret_key = "S3RVER"

    def _argv(self) -> list[str]:
        program = NODE / "node_modules" / ".bin" / "s3rver"
        return [str(program), "-d", str(self.folder), "-a", HOST, "-p", str(self.port)]

    def _environment(self) -> dict[str, str]:
        node = shutil.which("node") or ""
        return {"PATH": f"{Path(node).parent}:{os.defpath}", "HOME": str(self.home.path)}

    def _is_ready(self) -> bool:
        return "listening on" in self.output() and _answers(self.port)


#: The servers by name, and what each needs to be there.
SERVERS: dict[str, type[S3Process]] = {
    "moto": MotoProcess,
    "seaweedfs": SeaweedProcess,
    "s3rver": S3rverProcess,
}

#: What a server does not check, of what the tests of the bucket ask of S3.
UNCHECKED = {"moto": {"access key", "secret key", "MD5"}, "s3rver": {"secret key", "MD5"}}


def missing(name: str) -> str:
    """Why a server cannot be started here; empty where it can."""
    if name == "moto":
        absent = [each for each in ("moto", "flask", "flask_cors") if find_spec(each) is None]
        return f"{', '.join(absent)} not installed: make test-services does it" if absent else ""
    program = {
        "seaweedfs": Path(sysconfig.get_path("scripts")) / "weed",
        "s3rver": NODE / "node_modules" / ".bin" / "s3rver",
    }[name]
    if name == "s3rver" and shutil.which("node") is None:
        return "there is no node on this machine, which s3rver needs"
    return "" if program.exists() else f"{program} is not there: make test-services installs it"


def _answers(port: int) -> bool:
    try:
        socket.create_connection((HOST, port), timeout=1).close()
    except OSError:
        return False
    return True


def _free_ports(count: int) -> list[int]:
    held = [socket.socket() for _ in range(count)]
    try:
        for each in held:
            each.bind((HOST, 0))
        return [each.getsockname()[1] for each in held]
    except OSError as error:
        raise StackError(f"There are no {count} free ports: {error}") from error
    finally:
        for each in held:
            each.close()
