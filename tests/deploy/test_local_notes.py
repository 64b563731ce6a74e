"""What `make local` says at a terminal, and what it sets for webhooks and for a command."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rich.console import Console

from deploy.embedded.home import Home
from deploy.embedded.servers import HttpProcess
from deploy.local import Interrupted, _Session, with_own_programs


def test_it_names_the_page_and_an_absolute_path_to_source(tmp_path: Path) -> None:
    stack: Any = SimpleNamespace(
        variables={}, home=SimpleNamespace(kept=True, path=tmp_path), http=SimpleNamespace(url="http://h:1")
    )
    said = io.StringIO()
    session = _Session(stack, Console(file=said, force_terminal=True, width=200), hold=False)
    ended: Any = SimpleNamespace(loss=lambda: Interrupted(2))
    session._events.put(ended)
    assert session._serve() == 0
    assert "The page: http://h:1" in said.getvalue()
    assert f"source {tmp_path}/env" in said.getvalue()


def test_the_sender_has_a_folder_for_the_secrets_of_tenants(tmp_path: Path) -> None:
    with Home(tmp_path) as home:
        http = HttpProcess(home, dict, webhooks=True)
        folder = http.of_webhooks["SMALLCAT_WEBHOOK_SECRETS_DIR"]
        assert Path(folder).is_relative_to(tmp_path)
        assert http._environment()["SMALLCAT_WEBHOOK_SECRETS_DIR"] == folder


def test_a_command_has_this_interpreter_s_programs_first_on_its_path() -> None:
    own = str(Path(sys.executable).parent)
    assert with_own_programs({"PATH": "/usr/bin", "A": "b"}) == {"PATH": f"{own}:/usr/bin", "A": "b"}
    assert with_own_programs({})["PATH"] == f"{own}:{os.defpath}"
