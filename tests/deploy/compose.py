"""compose.yaml, read: each service as a process of this machine, with its command, variables and checks."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from deploy.embedded.servers import valkey_server
from tests.deploy.dockerfile import stages
from tests.deploy.processes import DEPLOY, here
from tests.worker.health.probes import free_port

FILE = DEPLOY / "compose.yaml"
#: The ports that each service listens on in its container, as the file has them.
PORTS = {
    "valkey": (6379,),
    "s3": (8333,),
    "worker": (8081, 9090),
    "http": (8000, 8081),
    "webhooks": (8081, 9090),
    "flower": (5555,),
    "metrics": (9090,),
    "prometheus": (9090,),
    "client": (),
}


def parsed() -> dict[str, Any]:
    """The file, its variables left as they are."""
    found: dict[str, Any] = yaml.safe_load(FILE.read_text())
    return found


def interpolated(text: str, values: Mapping[str, str]) -> str:
    """As Compose puts variables in: `${NAME}`, `${NAME:-default}`, `${NAME:?error}` and `$$`."""

    def value(match: re.Match[str]) -> str:
        if match[0] == "$$":
            return "$"
        found = values.get(match["name"], "")
        if not found and match["kind"] == ":?":
            raise KeyError(match["name"])
        return found or (match["rest"] if match["kind"] == ":-" else "")

    return re.sub(r"\$\$|\$\{(?P<name>\w+)(?:(?P<kind>:[-?])(?P<rest>[^}]*))?\}", value, text)


class Machine:
    """The services of the file in folders and on ports of one test."""

    def __init__(self, folder: Path, secrets: Mapping[str, str]) -> None:
        self.folder, self.secrets = folder, secrets
        self.document = yaml.safe_load(FILE.read_text())
        self.ports = {(name, port): free_port() for name, ports in PORTS.items() for port in ports}
        programs = folder / "bin"
        programs.mkdir()
        (programs / "valkey-server").symlink_to(valkey_server())
        if (client := shutil.which("valkey-cli") or shutil.which("redis-cli")) is not None:
            (programs / "valkey-cli").symlink_to(client)
        self.programs = str(programs)

    def service(self, name: str) -> Service:
        """A service of the file."""
        return Service(self, name, self.document["services"][name])

    def on_this_machine(self, name: str, text: str, paths: Mapping[str, Path]) -> str:
        """What a service is told, with the addresses, ports and folders of this machine."""
        text = interpolated(text, self.secrets)
        for (service, port), own in self.ports.items():
            text = re.sub(rf"(?<![\w.-]){service}:{port}\b", f"127.0.0.1:{own}", text)
            if service == name:
                mine = rf"(?<![\w.-])(localhost|127\.0\.0\.1|0\.0\.0\.0):{port}\b"
                text = re.sub(mine, f"127.0.0.1:{own}", text)
                text = re.sub(rf"(?<=[= ]){port}\b|^{port}$", str(own), text)
        inside = "|".join(map(re.escape, sorted(paths, key=len, reverse=True)))
        return re.sub(rf"(?<![\w/.])({inside})(?=/|\b)", lambda match: str(paths[match[0]]), text)


class Service:
    """One service, without Docker."""

    def __init__(self, machine: Machine, name: str, entry: Mapping[str, Any]) -> None:
        self.name, self.log = name, machine.folder / f"{name}.log"
        self.grace_s = float(str(entry.get("stop_grace_period", "10s")).removesuffix("s"))
        folder = machine.folder / name
        folder.mkdir(exist_ok=True)
        paths = {"/tmp": folder / "tmp"}  # noqa: S108 - in the container
        paths["/tmp"].mkdir(exist_ok=True)  # noqa: S108
        for volume in entry.get("volumes", []):
            paths[volume.partition(":")[2]] = machine.folder / "volumes" / volume.partition(":")[0]
            paths[volume.partition(":")[2]].mkdir(exist_ok=True, parents=True)
        stage = None
        if (image := entry["image"]).startswith("smallcat-"):
            stage = stages()[image.partition(":")[0].removeprefix("smallcat-")]

        def told(text: object) -> str:
            return machine.on_this_machine(name, str(text), paths)

        for config in entry.get("configs", []):
            source = machine.document["configs"][config["source"]]
            text = source["content"] if "content" in source else (DEPLOY / source["file"]).read_text()
            file = folder / Path(config["target"]).name
            file.write_text(told(text) if "content" in source or name == "prometheus" else text)
            paths[config["target"]] = file
        given = {**(stage.environment if stage else {}), **entry.get("environment", {})}
        self.environment = {key: told(value) for key, value in given.items()}
        self.environment["HOME"] = str(paths["/tmp"])  # noqa: S108
        entrypoint = entry.get("entrypoint", stage.entrypoint if stage else [])
        command = entry.get("command", stage.command[len(stage.entrypoint) :] if stage else [])
        if name == "prometheus":
            entrypoint = ["prometheus"]
        self.entrypoint = [told(word) for word in entrypoint]
        self.command = [*self.entrypoint, *(told(word) for word in command)]
        if name == "s3":
            # In its container it has a name and all ports.
            inner = ("master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port")
            more = [f"-{port}={free_port()}" for port in (*inner, "filer.port.grpc", "s3.port.grpc")]
            sockets = [f"-{kind}.localSocket={folder / kind}.sock" for kind in ("filer", "s3")]
            self.command = [word.replace("-ip=s3", "-ip=127.0.0.1") for word in self.command]
            self.command += [*more, *sockets]
        test = entry.get("healthcheck", {}).get("test", [])
        self.check = [told(word) for word in test]
        self.programs = machine.programs

    def started(self) -> dict[str, str]:
        """Its whole environment."""
        path = f"{self.programs}:/usr/local/bin:/usr/bin:/bin:/usr/sbin"
        return {"PATH": path, "OMP_WAIT_POLICY": "PASSIVE", **self.environment}

    def is_healthy(self) -> bool:
        """Its own health check, as Docker runs it."""
        kind, *words = self.check
        argv = ["sh", "-c", *words] if kind == "CMD-SHELL" else words
        return subprocess.run(argv, env=here(self.started()), capture_output=True, timeout=30).returncode == 0

    def shown(self) -> str:
        """The end of its log."""
        return f"{self.name}: {self.log.read_text(errors='replace')[-2500:]}"
