"""The embedded stack stops what it started, however it ends; its parts can be killed, paused, restarted."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import boto3
import psutil
import pytest
from redis import Redis
from redis.exceptions import TimeoutError as RedisTimeoutError

from deploy import local
from deploy.embedded.home import HOST, StackError
from deploy.embedded.stack import BUCKET, Stack
from deploy.local import exports
from worker.contract.served_model import Defaults, ServedModel
from worker.state.fleet import Fleet, WorkerInfo

pytestmark = pytest.mark.usefixtures("servers")  # skips at home, fails in CI, where they are not installed

#: Seconds, at most, for what takes well under one.
SOON_S = 15
#: First lines of a command inside a stack: prints the names and numbers of all processes of the stack.
PRINT_PARTS = (
    "import json, os, psutil, signal, sys\n"
    "stack = psutil.Process(os.getppid())\n"
    "parts = {part.name(): part.pid for part in stack.children(recursive=True)}\n"
    "print(json.dumps(parts), flush=True)\n"
)
#: Last line of such a command: waits for a signal.
WAIT = "signal.pause()"


class Run:
    """`python -m deploy.local --no-worker` with a Python snippet as its command."""

    def __init__(self, folder: Path, snippet: str, *options: str) -> None:
        self.temporary = folder / "tmp"
        self.temporary.mkdir(exist_ok=True)
        command = ["--", sys.executable, "-c", snippet] if snippet else []
        self.popen = subprocess.Popen(
            [sys.executable, "-m", "deploy.local", "--no-worker", *options, *command],
            env={**os.environ, "TMPDIR": str(self.temporary)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._started: list[psutil.Process] = []

    def line(self) -> str:
        """The next line that the command prints."""
        assert self.popen.stdout is not None
        line = self.popen.stdout.readline()
        assert line, self.popen.communicate()[1]
        return line

    def until_up(self) -> None:
        """Return when the command has printed, by `PRINT_PARTS`, which processes there are."""
        parts: dict[str, int] = json.loads(self.line())
        assert {"valkey-server", "rclone"} < set(parts), "servers, guard and command"
        for pid in parts.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                self._started.append(psutil.Process(pid))

    def end(self) -> tuple[int, str, str]:
        """Exit code and outputs. Fails when a process or a temporary file is left."""
        assert self.popen.stdout is not None
        assert self.popen.stderr is not None
        out, err = self.popen.stdout.read(), self.popen.stderr.read()
        code = self.popen.wait(timeout=SOON_S)
        _, left = psutil.wait_procs(self._started, timeout=SOON_S)
        # In a container whose init process reaps none, an ended process stays listed as a zombie.
        assert not [process for process in left if process.status() != psutil.STATUS_ZOMBIE]
        assert list(self.temporary.iterdir()) == []
        return code, out, err


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    runs: list[Run] = []

    def start(snippet: str, *options: str) -> Run:
        runs.append(Run(tmp_path, snippet, *options))
        return runs[-1]

    yield start
    for each in runs:
        each.popen.kill()
        each.popen.communicate()


def client(stack: Stack) -> Redis:
    return Redis.from_url(stack.valkey.url, decode_responses=True, socket_timeout=1, retry=None)


# How it ends


def test_a_command_runs_inside_a_stack_and_its_exit_code_is_returned(run: Callable[..., Run]) -> None:
    stack = run(PRINT_PARTS + "print(os.environ['REDIS_URL'], os.environ['S3_BUCKET']); sys.exit(7)")
    stack.until_up()

    code, out, err = stack.end()

    assert (code, err) == (7, ""), "quiet where there is no terminal"
    assert out.startswith("redis://:")
    assert out.endswith(f" {BUCKET}\n")


def test_a_command_that_dies_by_a_signal_gives_the_exit_code_of_a_shell(run: Callable[..., Run]) -> None:
    stack = run(PRINT_PARTS + "os.kill(os.getpid(), signal.SIGKILL)")
    stack.until_up()

    assert stack.end()[0] == 128 + signal.SIGKILL


def test_a_command_that_does_not_exist_is_named(run: Callable[..., Run], tmp_path: Path) -> None:
    stack = subprocess.run(
        [sys.executable, "-m", "deploy.local", "--no-worker", "--", str(tmp_path / "nothing")],
        capture_output=True,
        text=True,
        timeout=SOON_S,
    )

    assert stack.returncode == 127
    assert "cannot be run: No such file or directory." in stack.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda n: n.name)
def test_a_signal_ends_the_command_and_the_stack(run: Callable[..., Run], number: signal.Signals) -> None:
    stack = run(PRINT_PARTS + WAIT)
    stack.until_up()

    stack.popen.send_signal(number)

    assert stack.end()[0] == 128 + number


def test_a_second_signal_ends_a_command_that_ignores_the_first(run: Callable[..., Run]) -> None:
    stubborn = "signal.signal(signal.SIGINT, lambda *_: os.write(1, b'heard\\n'))\n"
    stack = run(stubborn.join(["import os, signal\n", PRINT_PARTS]) + "while True: signal.pause()")
    stack.until_up()

    stack.popen.send_signal(signal.SIGINT)
    assert stack.line() == "heard\n"
    stack.popen.send_signal(signal.SIGINT)

    assert stack.end()[0] == 128 + signal.SIGINT


@pytest.fixture
def _own_handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("_own_handlers")
def test_a_signal_while_the_command_is_being_started_is_raised_when_it_is_started() -> None:
    killed: list[str] = []
    signals = local._Signals(lambda: killed.append("killed"))
    done = []

    def start() -> None:
        with signals.deferred():
            signal.raise_signal(signal.SIGTERM)
            done.append("started")

    with pytest.raises(local.Interrupted) as raised:
        start()
    assert (done, raised.value.number, killed) == (["started"], signal.SIGTERM, [])
    signal.raise_signal(signal.SIGINT)
    assert killed == ["killed"]


def test_nothing_outlives_a_stack_that_is_killed(run: Callable[..., Run]) -> None:
    stack = run(PRINT_PARTS + WAIT)
    stack.until_up()
    assert list(stack.temporary.iterdir())

    stack.popen.kill()

    assert stack.end()[0] == -signal.SIGKILL


def test_what_a_command_left_in_the_background_ends_with_it(run: Callable[..., Run]) -> None:
    leave = (
        "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import signal; signal.pause()'])\n"
    )
    stack = run(leave + PRINT_PARTS)
    stack.until_up()

    assert stack.end()[0] == 0


def test_a_part_that_ends_by_itself_ends_the_command_and_is_named(run: Callable[..., Run]) -> None:
    stack = run(PRINT_PARTS + "os.kill(parts['valkey-server'], signal.SIGKILL)\n" + WAIT)
    stack.until_up()

    code, _, err = stack.end()

    assert code == 3
    assert "valkey ended with signal SIGKILL. The end of its log" in err


def test_a_part_that_does_not_start_is_named_with_the_end_of_its_log(tmp_path: Path) -> None:
    (tmp_path / "valkey" / "appendonlydir").mkdir(parents=True)
    (tmp_path / "valkey" / "appendonlydir" / "appendonly.aof.manifest").write_text("not a manifest\n")

    stack = subprocess.run(
        [sys.executable, "-m", "deploy.local", "--no-worker", "--data", str(tmp_path), "--", "true"],
        capture_output=True,
        text=True,
        timeout=SOON_S,
    )

    assert stack.returncode == 3
    assert "valkey ended with exit code 1 while starting. The end of its log" in stack.stderr
    assert "Invalid AOF manifest file" in stack.stderr


def test_a_worker_that_refuses_to_start_says_why(new_stack: Callable[..., Stack]) -> None:
    stack = new_stack(workers=0)
    worker = stack.new_worker({"SMALLCAT_DEVISE": "cpu"})

    with pytest.raises(
        StackError, match=r"worker1 ended with exit code 1 while starting[\s\S]*mean SMALLCAT_DEVICE"
    ):
        worker.start()


def test_without_a_command_it_prints_its_environment_and_ends_well(run: Callable[..., Run]) -> None:
    stack = run("")
    lines = [stack.line() for _ in range(7)]

    stack.popen.send_signal(signal.SIGTERM)

    assert stack.end()[0] == 0
    assert [line.split("=")[0].removeprefix("export ") for line in lines] == [
        "REDIS_URL",
        "S3_BUCKET",
        "AWS_ENDPOINT_URL_S3",
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_REGION",
        "AWS_DEFAULT_REGION",
    ]


def test_hold_keeps_the_stack_until_enter_at_a_terminal(tmp_path: Path) -> None:
    terminal, keyboard = pty.openpty()
    stack = subprocess.Popen(
        [sys.executable, "-m", "deploy.local", "--no-worker", "--hold", "--", "echo", "done"],
        stdin=keyboard,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert stack.stdout is not None
    assert stack.stdout.readline() == "done\n"
    url = stack.stdout.readline().removeprefix("export REDIS_URL=").strip()
    assert Redis.from_url(url).ping(), "still up after the command"

    os.write(terminal, b"\n")

    assert stack.wait(timeout=SOON_S) == 0
    os.close(terminal)
    os.close(keyboard)
    stack.stdout.close()


def test_the_printed_environment_is_what_a_shell_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "work")
    lines = exports({"REDIS_URL": "redis://:it's@127.0.0.1:1/0"})

    shell = subprocess.run(
        ["/bin/sh", "-c", f'{lines}\necho "$REDIS_URL,$AWS_PROFILE"'], capture_output=True, text=True
    )

    assert shell.stdout == "redis://:it's@127.0.0.1:1/0,\n"


# Its parts


def test_two_stacks_run_side_by_side(new_stack: Callable[..., Stack]) -> None:
    one, other = new_stack(workers=0), new_stack(workers=0)

    client(one).set("cat", "small")

    assert client(other).get("cat") is None
    assert one.variables["AWS_ENDPOINT_URL_S3"] != other.variables["AWS_ENDPOINT_URL_S3"]


def test_the_queue_survives_a_restart_and_a_crash_on_the_same_port(new_stack: Callable[..., Stack]) -> None:
    stack = new_stack(workers=0)
    before = stack.variables
    redis = client(stack)
    redis.set("restarted", "yes")

    stack.valkey.restart()
    redis.set("crashed", "yes")
    stack.valkey.kill()
    assert not stack.valkey.running
    stack.valkey.start()

    assert stack.variables == before
    assert redis.mget("restarted", "crashed") == ["yes", "yes"]


def test_the_bucket_survives_a_crash_and_its_last_object(new_stack: Callable[..., Stack]) -> None:
    stack = new_stack(workers=0)
    where = stack.variables
    bucket = boto3.client(
        "s3",
        endpoint_url=where["AWS_ENDPOINT_URL_S3"],
        aws_access_key_id=where["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=where["AWS_SECRET_ACCESS_KEY"],
        region_name=where["AWS_REGION"],
    )
    bucket.put_object(Bucket=BUCKET, Key="images/ca/cat.png", Body=b"a small cat")

    stack.s3.kill()
    stack.s3.start()

    assert bucket.get_object(Bucket=BUCKET, Key="images/ca/cat.png")["Body"].read() == b"a small cat"
    bucket.delete_object(Bucket=BUCKET, Key="images/ca/cat.png")
    assert "Contents" not in bucket.list_objects_v2(Bucket=BUCKET)


def test_a_paused_queue_does_not_answer_until_it_is_resumed(new_stack: Callable[..., Stack]) -> None:
    stack = new_stack(workers=0)
    redis = client(stack)

    stack.valkey.pause()
    with pytest.raises(RedisTimeoutError):
        redis.ping()
    stack.valkey.resume()

    assert redis.ping()


def test_a_paused_part_can_be_stopped(new_stack: Callable[..., Stack]) -> None:
    stack = new_stack(workers=0)
    stack.valkey.pause()

    stack.valkey.stop()

    assert not stack.valkey.running


def test_only_the_end_of_a_part_that_was_not_asked_to_end_is_reported(
    new_stack: Callable[..., Stack],
) -> None:
    lost: list[str] = []
    stack = new_stack(workers=0)
    stack.valkey.on_loss = stack.s3.on_loss = lambda part: lost.append(part.name)

    stack.s3.restart()
    os.kill(stack.valkey.pid, signal.SIGKILL)
    assert stack.valkey.wait(SOON_S)

    assert lost == ["valkey"]


def test_a_folder_keeps_queue_and_pictures_between_runs(
    new_stack: Callable[..., Stack], tmp_path: Path
) -> None:
    folder = tmp_path / 'a "folder": with signs'
    first = new_stack(workers=0, data=folder)
    client(first).set("cat", "small")
    (first.s3.folder / BUCKET / "cat.png").write_bytes(b"cat")
    with pytest.raises(StackError, match="Another stack is running in"):
        Stack(workers=0, data=folder)
    first.stop()

    second = new_stack(workers=0, data=folder)

    assert second.variables == first.variables, "ports, password and keys: links live on"
    assert client(second).get("cat") == "small"
    assert (second.s3.folder / BUCKET / "cat.png").read_bytes() == b"cat"


def test_a_kept_port_that_is_taken_is_replaced(new_stack: Callable[..., Stack], tmp_path: Path) -> None:
    first = new_stack(workers=0, data=tmp_path)
    port = first.valkey.port
    first.stop()
    with socket.socket() as other:
        other.bind((HOST, port))
        other.listen()
        second = new_stack(workers=0, data=tmp_path)
        assert second.valkey.port != port
        assert second.valkey.password == first.valkey.password
        assert second.s3.port == first.s3.port


def test_a_folder_has_a_file_that_a_shell_sources(run: Callable[..., Run], tmp_path: Path) -> None:
    stack = run("", "--data", str(tmp_path / "data"))
    url = stack.line().removeprefix("export REDIS_URL=").strip()
    file = tmp_path / "data" / "env"
    assert file.stat().st_mode & 0o777 == 0o600
    assert {each.stat().st_mode & 0o777 for each in (tmp_path / "data").glob("*.json")} == {0o600}
    shell = subprocess.run(
        ["/bin/sh", "-c", f'. {file} && echo "$REDIS_URL,$AWS_PROFILE"'],
        capture_output=True,
        text=True,
        env={"AWS_PROFILE": "work"},
    )
    assert shell.stdout == f"{url},\n"
    stack.popen.send_signal(signal.SIGTERM)
    assert stack.end()[0] == 0


def test_a_worker_is_ready_when_it_is_announced_and_not_by_an_earlier_run(
    new_stack: Callable[..., Stack],
) -> None:
    stack = new_stack(workers=0)
    worker = stack.new_worker()
    fleet = Fleet(client(stack), ttl_s=60)
    worker.launched_at = fleet.now()
    run = WorkerInfo(
        name=worker.node,
        served=ServedModel(
            name="tiny", revision="1", defaults=Defaults(width=64, height=64, steps=4, guidance_scale=7.5)
        ),
        started_at=worker.launched_at - 1,
        device="cpu",
        attention="sdpa",
        max_rows=8,
        versions={},
    )

    assert not worker._is_ready()
    fleet.announce(run)
    assert not worker._is_ready(), "killed a moment ago, it still counts as live"
    fleet.announce(run.model_copy(update={"started_at": worker.launched_at + 1}))
    assert worker._is_ready()


def test_a_worker_s_choices_are_read_from_its_log(new_stack: Callable[..., Stack]) -> None:
    worker = new_stack(workers=0).new_worker()
    stamp = "[2026-11-22 21:31:16,834: "
    worker.log.write_text(
        f"banner\n{stamp}INFO/MainProcess] device: cpu (no GPU)\n{stamp}WARNING/MainProcess] hot\n"
    )

    assert worker.choices() == ["device: cpu (no GPU)"]


def test_a_command_finds_the_http_api(tmp_path: Path) -> None:
    """Its address and a key are in the environment; with `--data` the file for `source` has them, too."""
    code = """
import os, urllib.request
url, key = os.environ["SMALLCAT_HTTP_URL"], os.environ["SMALLCAT_HTTP_KEY"]
request = urllib.request.Request(url + "/v1/fleet", headers={"Authorization": "Bearer " + key})
print(urllib.request.urlopen(request).status, url, key)
"""
    command = [sys.executable, "-m", "deploy.local", "--workers", "0", "--data", str(tmp_path), "--"]
    command += [sys.executable, "-c", code]
    first, second = (
        subprocess.run(command, capture_output=True, text=True, timeout=SOON_S) for _ in range(2)
    )
    status, *words = first.stdout.split()
    assert (status, len(words)) == ("200", 2), first.stderr
    assert second.stdout == first.stdout  # They outlive a restart.
    assert all(word in (tmp_path / "env").read_text() for word in words)
