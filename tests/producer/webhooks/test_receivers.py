"""The receivers of docs/webhooks.md, run as they stand: they verify, and refuse what is not ours."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping

import pytest

from producer.webhooks.payload import body_of, headers_of
from producer.webhooks.secrets import new_secret
from tests.docs import ROOT
from tests.faults.harness import wait_until
from tests.markdown import codes

RUN = {"python": [sys.executable, "-c"], "javascript": ["node", "--input-type=module", "-e"]}
RECEIVERS = {
    code.language: code.text
    for code in codes(ROOT / "docs" / "webhooks.md")
    if code.language in RUN and "SMALLCAT_WEBHOOK_SECRET" in code.text
}
SECRET = new_secret()
WHAT = {"run": "r", "state": "finished", "done": 2, "at": "1795880000.25"}


def post(url: str, body: bytes, headers: Mapping[str, str]) -> int:
    request = urllib.request.Request(url, body, dict(headers), method="POST")  # noqa: S310
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:  # noqa: S310
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.parametrize("language", RUN)
def test_a_documented_receiver_takes_what_is_ours_alone(language: str) -> None:
    if shutil.which(RUN[language][0]) is None:
        pytest.skip(f"there is no {RUN[language][0]} here")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    receiver = subprocess.Popen(
        [*RUN[language], RECEIVERS[language]],
        env={**os.environ, "PORT": str(port), "SMALLCAT_WEBHOOK_SECRET": SECRET},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:

        def listens() -> bool:
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", port)) == 0

        wait_until("it listens", listens)
        url, body = f"http://127.0.0.1:{port}/", body_of(WHAT)
        good = headers_of("msg_1", time.time(), body, [new_secret(), SECRET])
        assert post(url, body, good) == 204
        assert post(url, body + b" ", good) == 400
        assert post(url, body, headers_of("msg_1", time.time(), body, [new_secret()])) == 400
        assert post(url, body, headers_of("msg_1", time.time() - 900, body, [SECRET])) == 400
        assert post(url, body, {"content-type": "application/json"}) == 400
    finally:
        receiver.terminate()
        said, _ = receiver.communicate(timeout=10)
    assert said.count("run.finished") == 1
    assert "'done': 2" in said or json.dumps({"done": 2}, separators=(",", ":"))[1:-1] in said
