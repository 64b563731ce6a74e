"""Fixtures that tests share: real servers, and an environment without the user's own settings.

    valkey      a Valkey server, empty at the start of each test
    s3          a bucket of its own for each test, on a real S3 server
    stack_env   the environment that names both; `environment` makes it this process' own
    new_stack   makes stacks that belong to one test, for tests that kill or freeze parts

A server that is not installed skips the test at home and fails it in CI (`CI=true`).
"""

from __future__ import annotations

import functools
import gc
import importlib.util
import os
import secrets
import signal
import socket
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import hypothesis
import pytest

# Before any module, or conftest of a folder, imports torch, which reads them then: also in the processes that
# tests start. Tiny models are many times slower on two threads than on one where several processes share the
# cores, and sums are taken in one order on one thread.
os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}

from deploy.embedded.home import StackError
from deploy.embedded.servers import ValkeyProcess, rclone, valkey_server
from deploy.embedded.stack import Stack, clean_environment

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

#: Variables, by their start, that tests must not take from the user's environment.
_FOREIGN = (
    "AWS_",
    "CELERY_",
    "HF_",
    "OTEL_",
    "RCLONE_",
    "REDIS_",
    "S3_",
    "SMALLCAT_",
    "USE_MEMORY_EFFICIENT_ATTENTION",
)


#: How the names of threads begin that submit jobs to the Redis that the environment names.
_SUBMITTING = ("run ", "feeder")


@dataclass(frozen=True)
class EmptyBucket:
    """An empty bucket on a real S3 server."""

    #: Its name.
    name: str
    #: The variables that boto3 and smallcat read to use it.
    environment: dict[str, str]


def pytest_configure() -> None:
    """Remove the user's settings, before any module of the project can read them at its import."""
    for name in [name for name in os.environ if name.startswith(_FOREIGN)]:
        del os.environ[name]
    os.environ.update({"AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull})
    os.environ["AWS_EC2_METADATA_DISABLED"] = "true"
    # A shell's background job ignores SIGINT, and so would every process that a test starts.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # nohup has SIGHUP ignored. With a handler that does nothing the tests still ignore it, and the processes
    # that they start do not: handlers are not inherited.
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, lambda *_: None)
    # Hypothesis allows an example 0.2 s by the clock on the wall, which a busy machine takes for any of them.
    # What may take only so long is measured by its test, in seconds of the processor.
    hypothesis.settings.register_profile("smallcat", deadline=None)
    hypothesis.settings.load_profile("smallcat")
    # Tests bring their own tiny models. One that asks the hub is wrong, and fails at once instead of waiting.
    os.environ["HF_HUB_OFFLINE"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none. Torch is asked only when there is such a test."""
    gpu_tests = [item for item in items if item.get_closest_marker("gpu")]
    if gpu_tests and not _has_gpu():
        for item in gpu_tests:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish() -> None:
    """Leave thousands of collected tests out of every later collection of garbage: a quarter of all time.

    And let all sessions of boto3 in this process share one reader of its files, as clients of one session do:
    reading 2 MB of JSON again is two thirds of what a client costs, and tests make hundreds of them.
    """
    import botocore.session

    botocore.session.create_loader = functools.cache(botocore.session.create_loader)
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None]:
    """Fail a test that leaves a thread behind which submits jobs: it would do so to a later test's Redis."""
    yield
    left = [thread.name for thread in threading.enumerate() if thread.name.startswith(_SUBMITTING)]
    assert not left, f"threads that submit jobs outlive their test: {left}"


def _has_gpu() -> bool:
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()


@pytest.fixture(scope="session")
def servers() -> Iterator[Stack]:
    """One Valkey and one S3 server for the whole run. Take `valkey`, `s3` or `stack_env` instead."""
    _require_servers()
    with Stack(workers=0) as stack:
        yield stack


@pytest.fixture
def valkey(servers: Stack) -> ValkeyProcess:
    """A Valkey server without a key in it; `.url` is its address. It is shared: do not stop or kill it."""
    with socket.create_connection(("127.0.0.1", servers.valkey.port), timeout=10) as connection:
        connection.sendall(f"AUTH {servers.valkey.password}\r\nFLUSHALL SYNC\r\n".encode())
        replies = connection.makefile("rb")
        assert [replies.readline(), replies.readline()] == [b"+OK\r\n", b"+OK\r\n"]
    return servers.valkey


@pytest.fixture(scope="session")
def s3_administrator(servers: Stack) -> S3Client:
    """A client that makes buckets. Take `s3` instead."""
    import boto3

    environment = servers.s3.environment("")
    return boto3.client(
        "s3",
        endpoint_url=servers.s3.endpoint,
        region_name=servers.s3.region,
        aws_access_key_id=environment["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=environment["AWS_SECRET_ACCESS_KEY"],
    )


@pytest.fixture
def s3(servers: Stack, s3_administrator: S3Client) -> EmptyBucket:
    """An empty bucket for one test."""
    name = f"test-{secrets.token_hex(4)}"
    # By the server, not as a folder: the server would find that only when its cache of folders expires.
    s3_administrator.create_bucket(Bucket=name)
    return EmptyBucket(name, servers.s3.environment(name))


@pytest.fixture
def s3_environment(s3: EmptyBucket, monkeypatch: pytest.MonkeyPatch) -> EmptyBucket:
    """The same bucket, and this process' own settings name it."""
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    return s3


@pytest.fixture
def stack_env(valkey: ValkeyProcess, s3: EmptyBucket) -> dict[str, str]:
    """A whole environment for a worker or a producer: give it to a process, or to `from_environment`."""
    return {**clean_environment(), "REDIS_URL": valkey.url, **s3.environment}


@pytest.fixture
def environment(stack_env: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The same environment, which is also this process' own."""
    for name, value in stack_env.items():
        monkeypatch.setenv(name, value)
    return stack_env


@pytest.fixture
def new_stack() -> Iterator[Callable[..., Stack]]:
    """Makes started stacks, with `Stack`'s arguments, for one test: it may kill and freeze their parts."""
    _require_servers()
    with ExitStack() as stacks:
        yield lambda *arguments, **options: stacks.enter_context(Stack(*arguments, **options))


def _require_servers() -> None:
    try:
        valkey_server()
        rclone()
    except StackError as error:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(str(error))
