"""A process that is stuck, not ready or not started says so, also while its Python is busy."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.worker.engine.fake_runner import SOON_S, FakeRunner, job_of
from tests.worker.health.probes import ask, free_port, wait_for, wait_until
from worker.contract.errors import SettingsError
from worker.engine.engine import Engine
from worker.engine.movement import PATIENCE_S, Movement
from worker.health.report import Health
from worker.health.server import SILENT_S, Reported

ROOT = Path(__file__).parents[3]


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def health(port: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[Health]:
    monkeypatch.setattr("worker.health.report.REPORT_EVERY_S", 0.02)
    monkeypatch.setattr("worker.health.report.CHECK_EVERY_S", 0.02)
    monkeypatch.setattr("worker.health.report.CHECK_AGAIN_S", 0.02)
    made = Health(port)
    made.start()
    yield made
    made.stop()


def wait_for_reason(port: int, path: str, reason: str) -> None:
    """Until the answer is no, for that reason: what was said before takes a moment to be replaced."""
    wait_until(port, path, 503)
    wait_for(lambda: ask(port, path)[1].get("reason") == reason, lambda: f"{ask(port, path)}")


def never() -> float:
    return math.inf


def test_a_process_that_starts_is_live_and_says_what_it_does(health: Health, port: int) -> None:
    health.doing("It loads the model.")
    wait_for_reason(port, "/startup", "It loads the model.")
    assert ask(port, "/ready")[0] == 503
    assert ask(port, "/live") == (200, {"status": "ok"})


def test_a_started_process_is_ready_while_what_it_needs_answers(health: Health, port: int) -> None:
    missing = ["Redis is away."]
    health.started(stuck_s=never, stuck_as="", not_ready=lambda: "".join(missing))
    assert wait_until(port, "/startup", 200) == {"status": "ok"}
    wait_for_reason(port, "/ready", "Redis is away.")
    missing.clear()
    wait_until(port, "/ready", 200)
    missing.append("The bucket is away.")
    wait_for_reason(port, "/ready", "The bucket is away.")
    assert ask(port, "/live")[0] == 200, "restarting this process brings back no service"


def test_a_check_that_fails_or_hangs_is_no_yes(
    health: Health, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.health.report.CHECK_S", 0.1)
    gate, hangs = threading.Event(), threading.Event()

    def check() -> str:
        if hangs.is_set():
            gate.wait(SOON_S)
            return ""
        raise OSError("broken")

    health.started(stuck_s=never, stuck_as="", not_ready=check)
    wait_for(lambda: ask(port, "/ready")[1].get("reason") == "broken", lambda: str(ask(port, "/ready")))
    hangs.set()
    wait_for(lambda: "has not answered" in ask(port, "/ready")[1].get("reason", ""), lambda: "no time-out")
    gate.set()
    hangs.clear()


def test_a_process_that_is_about_to_end_is_live_and_not_ready(health: Health, port: int) -> None:
    health.started(stuck_s=never, stuck_as="", not_ready=lambda: "")
    wait_until(port, "/ready", 200)
    health.stopping()
    wait_for_reason(port, "/ready", "The process is about to end.")
    assert ask(port, "/live")[0] == 200


def test_a_stuck_engine_fails_the_liveness_probe_until_it_moves(health: Health, port: int) -> None:
    """Its clock has begun more than the patience ago: a step that begins is stuck at once."""
    runner, gate = FakeRunner(), threading.Event()
    past_s = 20.0 * 8 + PATIENCE_S
    engine = Engine(runner, job_timeout_s=1e6, on_failure=print, clock=lambda: time.monotonic() - past_s)
    health.started(
        stuck_s=lambda: engine.movement.stuck_s,
        stuck_as="Jobs are in flight and do not move.",
        not_ready=lambda: "",
        is_patient=engine.movement.is_compiling,
    )
    engine.start()
    wait_until(port, "/ready", 200)
    assert ask(port, "/live")[0] == 200, "an idle engine is live"

    runner.gate.clear()
    job = job_of(1)
    future = engine.submit(job.id, job)
    assert wait_until(port, "/live", 503)["reason"] == "Jobs are in flight and do not move."
    assert ask(port, "/ready")[0] == 503
    runner.is_compiling = True
    wait_until(port, "/live", 200)
    runner.is_compiling = False
    wait_until(port, "/live", 503)

    runner.gate.set()
    future.result(SOON_S)
    wait_until(port, "/live", 200)
    gate.set()
    engine.stop()


def test_it_answers_while_the_process_holds_pythons_lock(port: int, tmp_path: Path) -> None:
    """PyDLL calls C without giving up the lock: no other thread of that process runs for 5 seconds."""
    held = tmp_path / "held"
    code = (
        "import ctypes, math, pathlib\n"
        "from worker.health.report import Health\n"
        f"health = Health({port}); health.start()\n"
        "health.started(stuck_s=lambda: math.inf, stuck_as='', not_ready=lambda: '')\n"
        "input()\n"
        f"pathlib.Path({str(held)!r}).touch()\n"
        "ctypes.PyDLL(None).sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, start_new_session=True
    )
    try:
        wait_until(port, "/ready", 200)
        assert process.stdin is not None
        process.stdin.write(b"\n")
        process.stdin.flush()
        wait_for(held.exists, lambda: "the lock is not held")
        asked_s = time.monotonic()
        for path in ("/live", "/ready", "/startup"):
            assert ask(port, path)[0] == 200
        assert time.monotonic() - asked_s < 2
    finally:
        process.kill()
        process.wait()
    # It ends with the process, however that ends.
    wait_for(lambda: not answers(port), lambda: "it outlives its process")


def answers(port: int) -> bool:
    try:
        ask(port, "/live")
    except OSError:
        return False
    return True


def test_a_silent_process_counts_as_stuck_unless_it_starts_or_compiles() -> None:
    reported = Reported()
    assert reported.stuck() == ""

    def take(**changes: object) -> str:
        report = {
            "sent_s": time.monotonic() - SILENT_S - 1,
            "stuck_s": None,
            "stuck_as": "",
            "patient": False,
        }
        reported.take(json.dumps(report | changes))
        return reported.stuck()

    assert take() == f"The process has been silent for {SILENT_S + 1:.0f} s."
    assert take(patient=True) == ""
    assert take(sent_s=time.monotonic()) == ""


def test_a_server_that_was_killed_is_started_again(health: Health, port: int) -> None:
    wait_until(port, "/live", 200)
    assert health._server is not None
    first = health._server.pid
    os.kill(first, signal.SIGKILL)
    wait_for(lambda: health._server is not None and health._server.pid != first, lambda: "not started again")
    wait_until(port, "/live", 200)


def test_a_port_that_is_taken_stops_the_start_with_a_sentence() -> None:
    with socket.create_server(("", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(
            SettingsError, match=f"SMALLCAT_HEALTH_PORT is {port}, which cannot be listened on"
        ):
            Health(port).start()


def test_without_a_port_nothing_is_started() -> None:
    health = Health(None)
    health.start()
    health.started(stuck_s=never, stuck_as="", not_ready=lambda: "")
    health.stopping()
    health.stop()
    assert health._server is None


@pytest.mark.parametrize("form", ["path", "abstract"])
def test_systemd_is_told_of_start_life_and_end(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As sd_notify(3) has it; a stuck process sends no WATCHDOG=1, and systemd ends it."""
    address = str(tmp_path / "notify") if form == "path" else f"\0smallcat-test-{os.getpid()}"
    monkeypatch.setattr("worker.health.report.REPORT_EVERY_S", 0.02)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(address)
        systemd.settimeout(SOON_S)
        monkeypatch.setenv("NOTIFY_SOCKET", address.replace("\0", "@"))
        monkeypatch.setenv("WATCHDOG_USEC", "300000")
        stuck = [math.inf]
        health = Health(None)
        health.start()
        health.doing("It loads.")

        def told_until(line: str) -> list[str]:
            told: list[str] = []
            while line not in told:
                told += systemd.recv(4096).decode().splitlines()
            return told

        assert "READY=1" not in told_until("STATUS=It loads.")
        health.started(stuck_s=lambda: stuck[0], stuck_as="Stuck.", not_ready=lambda: "")
        assert "WATCHDOG=1" in told_until("READY=1") + told_until("WATCHDOG=1")
        told_until("STATUS=ready")
        stuck[0] = 0.0
        told_until("STATUS=Stuck.")
        assert systemd.recv(4096).decode() == "STATUS=Stuck."
        health.stopping()
        told_until("STOPPING=1")
        health.stop()


def test_a_step_may_take_twenty_times_what_was_measured_and_half_a_minute_at_least() -> None:
    now = [100.0]
    movement = Movement(lambda: now[0], lambda: False)
    assert movement.stuck_s == math.inf
    movement.joined(is_first=True)
    assert movement.stuck_s == 130
    now[0] = 120
    movement.joined(is_first=False)
    assert movement.stuck_s == 130, "another job that joins moves nothing"
    movement.expect(0.1)
    assert movement.stuck_s == 150
    movement.expect(5.0)
    assert movement.stuck_s == 220
    now[0] = 121
    movement.moved()
    assert movement.stuck_s == 221, "a decode may take as long as a step of its jobs"
    movement.moved(has_jobs=False)
    assert movement.stuck_s == math.inf


def test_the_probe_for_containers_says_yes_or_why_not(health: Health, port: int) -> None:
    def probe(*arguments: str, **environment: str) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, "-m", "worker.health", *arguments],
            cwd=ROOT,
            env={"PATH": os.defpath, **environment},
            capture_output=True,
            text=True,
            timeout=30,
        )
        return done.returncode, done.stdout + done.stderr

    health.doing("It loads.")
    wait_for_reason(port, "/startup", "It loads.")
    where = {"SMALLCAT_HEALTH_PORT": str(port)}
    assert probe("live", **where) == (0, "ok\n")
    assert probe("startup", **where) == (1, "It loads.\n")
    assert probe("live", SMALLCAT_HEALTH_PORT="1")[0] == 1
    assert probe("alive", **where)[0] == 2
    assert probe("live") == (
        2,
        "SMALLCAT_HEALTH_PORT is not set: set it as the process that is asked has it.\n",
    )
