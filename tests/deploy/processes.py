"""Starts what the files of deploy/ say on a stack of a test, without systemd, Docker or a cluster."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
#: Where this environment's programs are.
BIN = Path(sys.executable).parent
#: Seconds that a worker's start may take beside other tests, and any other process'.
WORKER_S, OTHER_S = 120.0, 60.0


def here(environment: Mapping[str, str]) -> dict[str, str]:
    """`environment` with this checkout's packages and this environment's programs before all others."""
    path = os.pathsep.join([str(BIN), environment.get("PATH", os.defpath)])
    return {**environment, "PATH": path, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}


def confined(argv: Sequence[str], writable: Sequence[Path]) -> list[str]:
    """`argv` as in a container: on a read-only root file system, without capabilities and new privileges.

    `writable`: its volumes. Where this process may not make a namespace, it is `argv` itself.
    """
    script = "".join(f"mount --bind {folder} {folder}; " for folder in map(str, writable))
    script += "mount -o remount,bind,ro /; "
    script += 'exec setpriv --bounding-set=-all --inh-caps=-all --no-new-privs "$@"'
    inside = ["unshare", "--mount", "--propagation", "private", "sh", "-ec", script, "sh"]
    try:
        can = subprocess.run([*inside, "true"], capture_output=True, timeout=20).returncode == 0
    except OSError:
        can = False
    return [*inside, *argv] if can else list(argv)


@contextlib.contextmanager
def running(
    argv: Sequence[str], environment: Mapping[str, str], log: Path, folder: Path = ROOT
) -> Iterator[subprocess.Popen[bytes]]:
    """A process with all that it starts; its output goes to `log`. It is killed at the end."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            argv,
            cwd=folder,
            env=here(environment),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            for each in psutil.Process(process.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    each.kill()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def command_lines(process: subprocess.Popen[bytes]) -> str:
    """The arguments of a process and of all that it has started, which every user of the machine can read."""
    of = psutil.Process(process.pid)
    found = []
    for each in [of, *of.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            found.append(" ".join(each.cmdline()))
    return "\n".join(found)
