"""The server against clients that are slow, broken or many, services that are away, and its own end."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from deploy.embedded.stack import Stack
from tests.producer.http.conftest import NOBODYS, Api
from tests.producer.http.test_events import Stream

ROOT = Path(__file__).parents[3]
SECRET = "a very private prompt"


def raw(api: Api, data: bytes, *, seconds: float = 10) -> bytes:
    """What the server answers to bytes, until it closes or falls silent."""
    port = int(api.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as connection:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(data)
        found = b""
        with contextlib.suppress(TimeoutError, ConnectionResetError):
            while piece := connection.recv(65_536):
                found += piece
    return found


def process_of(stack: Stack) -> psutil.Process:
    assert stack.http is not None
    return psutil.Process(stack.http.pid)


# Broken and greedy requests


def test_a_body_that_is_too_large_is_refused_by_its_length(api: Api) -> None:
    head = f"POST /v1/jobs HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {api.key}\r\n"
    head += "Content-Type: application/json\r\nContent-Length: 1000000000\r\n\r\n"
    answer = raw(api, head.encode())
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"The body has more than 16 MB" in answer


def test_a_body_without_a_length_is_counted(api: Api) -> None:
    before = process_of(api.stack).memory_info().rss
    port = int(api.url.rpartition(":")[2])
    piece = b"10000\r\n" + b" " * 65_536 + b"\r\n"
    head = f"POST /v1/jobs HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {api.key}\r\n"
    head += "Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(head.encode())
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for _ in range(1_000_000_000 // 65_536):
                connection.sendall(piece)
        with contextlib.suppress(ConnectionResetError):
            assert b" 413 " in connection.recv(65_536)
    assert process_of(api.stack).memory_info().rss - before < 100_000_000
    assert api.call("GET", "/healthz").status == 200


@pytest.mark.services
def test_ten_thousand_malformed_requests_leave_nothing_behind(api: Api) -> None:
    port = int(api.url.rpartition(":")[2])
    kinds = (
        b"nonsense\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /v1/jobs HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET /v1/jobs HTTP/1.1\r\nHost: x\r\nBroken\r\n\r\n",
        b"POST /v1/jobs HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 1\r\n\r\n{",
        b"GET /" + b"%" * 50 + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    )

    def send(count: int) -> None:
        for number in range(count):
            with (
                socket.create_connection(("127.0.0.1", port), timeout=10) as connection,
                contextlib.suppress(BrokenPipeError, ConnectionResetError),
            ):
                connection.sendall(kinds[number % len(kinds)])
            if number % 100 == 0:  # It has seen the others by then.
                assert api.call("GET", "/healthz").status == 200

    process = process_of(api.stack)
    send(2_000)
    before, files = process.memory_info().rss, process.num_fds()
    send(10_000)
    deadline_s = time.monotonic() + 20
    while process.num_fds() > files + 20 and time.monotonic() < deadline_s:
        time.sleep(0.1)
    assert process.num_fds() <= files + 20
    assert process.memory_info().rss - before < 20_000_000
    assert api.call("GET", "/v1/jobs").status == 200


def test_a_head_without_end_is_refused(api: Api) -> None:
    answer = raw(api, b"GET /healthz HTTP/1.1\r\n" + b"X: " + b"y" * 200_000)
    assert answer.startswith(b"HTTP/1.1 431 ")


@pytest.mark.services  # It waits for the server's own time limits, 20 s.
@pytest.mark.timeout(120)
def test_half_sent_requests_are_cut_off_and_harm_nobody(api: Api) -> None:
    port = int(api.url.rpartition(":")[2])
    head = f"POST /v1/jobs HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {api.key}\r\n"
    head += "Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
    halves = [b"", b"GET /healthz HTTP/1.1\r\nHost:", head.encode()] * 20
    connections = []
    for half in halves:
        connections.append(socket.create_connection(("127.0.0.1", port), timeout=60))
        connections[-1].sendall(half)
    assert api.call("POST", "/v1/jobs", {"prompt": "unharmed", "model": NOBODYS}).status == 202
    ends = [connection.recv(65_536) for connection in connections]
    assert set(ends[::3]) == set(ends[1::3]) == {b""}
    assert all(b" 408 " in end for end in ends[2::3])
    for connection in connections:
        connection.close()


# Keys are needed, and forwarded headers are not believed


@pytest.fixture
def serve(api: Api) -> Iterator[Callable[..., tuple[subprocess.Popen[str], str]]]:
    """Starts `smallcat serve` with options and settings on a port of its own; returns it and its address."""
    started: list[subprocess.Popen[str]] = []

    def start(*options: str, **settings: str) -> tuple[subprocess.Popen[str], str]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        process = subprocess.Popen(
            [sys.executable, "-m", "producer", "serve", "--port", str(port), *options],
            env={**api.stack.environment, **settings},
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        url = f"http://127.0.0.1:{port}"
        for _ in range(600):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{url}/healthz", timeout=5)  # noqa: S310
                return process, url
            assert process.poll() is None, process.stderr and process.stderr.read()
            time.sleep(0.05)
        raise AssertionError("it does not answer")

    yield start
    for process in started:
        process.kill()
        process.wait()


def status(url: str, **headers: str) -> int:
    request = urllib.request.Request(url, headers=headers)  # noqa: S310
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:  # noqa: S310
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_an_open_server_answers_this_machine_alone(serve: Callable[..., tuple[object, str]]) -> None:
    _, url = serve("--no-auth")
    assert status(f"{url}/v1/jobs") == 200
    assert status(f"{url}/v1/jobs", Origin="http://localhost:3000") == 200
    assert status(f"{url}/v1/jobs", Host="evil.example") == 403
    assert status(f"{url}/v1/jobs", Origin="https://evil.example") == 403


def test_an_open_server_for_everybody_is_refused() -> None:
    found = subprocess.run(
        [sys.executable, "-m", "producer", "serve", "--host", "0.0.0.0", "--no-auth"],  # noqa: S104
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
    )
    assert found.returncode == 2
    assert "--no-auth on 0.0.0.0 would let everybody in" in found.stderr


def test_a_server_that_cannot_start_says_why(api: Api, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for options, settings, part in (
        (["--port", api.url.rpartition(":")[2]], {}, "name another --host or --port"),
        (["--port", "1"], {"SMALLCAT_HTTP_DATA_DIR": str(tmp_path / "file")}, "File exists"),
    ):
        found = subprocess.run(
            [sys.executable, "-m", "producer", "serve", *options],
            env={**api.stack.environment, **settings},
            capture_output=True,
            text=True,
            cwd=ROOT,
            timeout=60,
        )
        assert found.returncode == 2
        assert part in found.stderr
        assert "Traceback" not in found.stderr


@pytest.mark.parametrize(("trusted", "shown"), [("", "127.0.0.1"), ("127.0.0.1", "203.0.113.9")])
def test_forwarded_headers_are_believed_of_trusted_proxies_alone(
    serve: Callable[..., tuple[subprocess.Popen[str], str]], trusted: str, shown: str
) -> None:
    process, url = serve("--access-log", SMALLCAT_HTTP_TRUSTED_PROXIES=trusted)
    assert status(f"{url}/v1/fleet", **{"X-Forwarded-For": "203.0.113.9"}) == 401
    process.terminate()
    assert process.stderr is not None
    [line] = [line for line in process.stderr.read().splitlines() if "/v1/fleet" in line]
    assert f" {shown}:" in line


def test_hanging_up_during_an_upload_is_no_fault(
    serve: Callable[..., tuple[subprocess.Popen[str], str]], api: Api, tmp_path: Path
) -> None:
    process, url = serve(SMALLCAT_HTTP_DATA_DIR=str(tmp_path))
    head = (
        f"POST /v1/runs HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {api.key}\r\nContent-Length: 99\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=10) as connection:
        connection.sendall(head.encode() + b"a cat")
        while not list(tmp_path.glob("queue-*/.upload-*/prompts.txt")):
            time.sleep(0.01)
    while list(tmp_path.glob("queue-*/.upload-*")):
        time.sleep(0.01)
    process.terminate()
    assert process.stderr is not None
    log = process.stderr.read()
    assert "fault" not in log
    assert "Traceback" not in log


# Privacy


def test_no_prompt_is_in_the_log(serve: Callable[..., tuple[subprocess.Popen[str], str]], api: Api) -> None:
    process, url = serve("--access-log")
    here = Api(api.stack, url, api.key)
    here.call("POST", "/v1/jobs", {"prompt": SECRET, "model": NOBODYS, "metadata": {"x": SECRET}})
    here.call("POST", "/v1/jobs", {"prompt": SECRET, "negative_prompt": SECRET, "steps": 1_000})
    here.call("POST", "/v1/jobs", raw=f'{{"prompt": "{SECRET}"'.encode())
    here.call("POST", "/sdapi/v1/txt2img", {"prompt": SECRET, "enable_hr": True})
    here.call("POST", "/v1/images/generations", {"prompt": SECRET, "style": SECRET})
    for data in (SECRET.encode(), b'{"prompt": "' + SECRET.encode()):
        here.call("POST", "/v1/runs", raw=data, headers={"Content-Type": "text/plain"})
    process.terminate()
    assert process.stderr is not None
    log = process.stderr.read()
    assert "/v1/jobs" in log
    assert SECRET not in log


# Services that are away, and the server's own end


@pytest.fixture
def own(new_stack: Callable[..., Stack]) -> Api:
    """A server whose parts may be stopped."""
    stack = new_stack(workers=0, http=True)
    assert stack.http is not None
    return Api(stack, stack.http.url, stack.http.key)


@pytest.mark.timeout(120)
def test_while_redis_is_away_the_answer_is_503_and_then_it_goes_on(own: Api) -> None:
    job = own.call("POST", "/v1/jobs", {"prompt": "a", "model": NOBODYS}).json
    own.stack.valkey.kill()
    for method, path, body in (
        ("POST", "/v1/jobs", {"prompt": "b"}),
        ("POST", "/v1/jobs", [{"prompt": "c"}]),
        ("GET", job["links"]["self"], None),
        ("GET", "/v1/fleet", None),
        ("GET", "/readyz", None),
    ):
        answer = own.call(method, path, body)
        assert (answer.status, answer.headers.get("retry-after")) == (503, "2"), (path, answer.body)
        assert answer.json["type"] == "urn:smallcat:error:QueueError"
        assert "is out of reach" in answer.json["detail"]
        assert own.stack.valkey.password not in answer.body.decode()
    assert own.call("GET", "/healthz").status == 200
    own.stack.valkey.start()
    assert own.call("GET", "/readyz").status == 200
    assert own.call("POST", "/v1/jobs", {"prompt": "d", "model": NOBODYS}).status == 202
    assert own.call("GET", job["links"]["self"]).json["state"] == "queued"


def test_while_the_bucket_is_away_pictures_are_503(api: Api, own: Api) -> None:
    job = api.call("POST", "/v1/jobs", {"prompt": "drawn before"}).json
    api.wait(job)
    api.stack.s3.kill()
    try:
        answer = api.call("GET", job["links"]["image"] + "&redirect=false")
        assert (answer.status, answer.headers["retry-after"]) == (503, "2")
        assert answer.json["type"] == "urn:smallcat:error:StorageError"
        assert api.call("POST", "/v1/jobs", {"prompt": "e", "model": NOBODYS}).status == 202
    finally:
        api.stack.s3.start()
    assert api.call("GET", job["links"]["image"] + "&redirect=false").status == 200


def test_at_sigterm_it_finishes_what_was_begun(own: Api) -> None:
    assert own.stack.http is not None
    job = own.call("POST", "/v1/jobs", {"prompt": "a", "model": NOBODYS}).json
    stream = Stream(own, job["links"]["events"])
    assert stream.next() is not None
    where = own.url.removeprefix("http://")
    upload = http.client.HTTPConnection(where, timeout=20)
    upload.putrequest("POST", "/v1/jobs")
    body = json.dumps({"prompt": "half", "model": NOBODYS}).encode()
    for name, value in (("Authorization", f"Bearer {own.key}"), ("Content-Type", "application/json")):
        upload.putheader(name, value)
    upload.putheader("Content-Length", str(len(body)))
    upload.endheaders(body[:5])
    assert own.call("GET", "/healthz").status == 200  # The half request has been read by now.
    pid = own.stack.http.pid
    own.stack.http._asked_to_end = True
    os.kill(pid, signal.SIGTERM)
    assert stream.next() is None  # Streams end at once.
    with contextlib.suppress(ConnectionRefusedError):
        while True:  # Until it takes no more.
            socket.create_connection(("127.0.0.1", own.stack.http.port), timeout=5).close()
    upload.send(body[5:])
    assert upload.getresponse().status == 202
    assert own.stack.http.wait(20)
    assert own.stack.http._outcome() == "exit code 0"


def test_a_client_that_hangs_up_gives_its_jobs_up(own: Api) -> None:
    """Beside a worker that is announced and takes nothing."""
    from tests.fast_worker import announce

    announce(own.stack.valkey.url)
    where = own.url.removeprefix("http://")
    connection = http.client.HTTPConnection(where, timeout=20)
    headers = {"Authorization": f"Bearer {own.key}", "Content-Type": "application/json"}
    connection.request("POST", "/v1/images/generations", json.dumps({"prompt": "never"}), headers)
    while not (jobs := own.call("GET", "/v1/jobs").json["jobs"]):
        time.sleep(0.02)
    connection.close()
    while own.call("GET", f"/v1/jobs/{jobs[0]['id']}").json["state"] != "cancelled":
        time.sleep(0.02)
