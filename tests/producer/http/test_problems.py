"""Errors as answers: each status has words, and each finding about a parameter is a sentence."""

from __future__ import annotations

from typing import Annotated, Literal

import pytest
from fastapi import FastAPI, Query
from fastapi.exceptions import RequestValidationError
from fastapi.testclient import TestClient

from producer.http import app, problems
from producer.http.problems import RefusedError


@pytest.mark.parametrize(
    ("status", "title"), [(404, "Not Found"), (499, "Client Closed Request"), (599, "Error"), (799, "Error")]
)
def test_every_status_has_a_problem_document(status: int, title: str) -> None:
    document = problems.problem(RefusedError(status, "No."))
    assert (document["title"], document["status"]) == (title, status)
    assert document["type"] == f"urn:smallcat:error:{title.replace(' ', '')}"
    assert problems.answer(RefusedError(status, "No.")).status_code == status


@pytest.mark.parametrize(
    ("query", "sentence"),
    [
        ("shape=zzz", "The parameter shape is 'zzz': it must match pattern '^a*$'."),
        ("count=x", "The parameter count is 'x': it must be a valid integer, at least 1."),
        ("count=0", "The parameter count is '0': it must be at least 1."),
        ("kind=z", "The parameter kind is 'z': it must be 'x' or 'y'."),
        ("short=abc", "The parameter short is 'abc': it must have at most 2 characters."),
        ("", "The parameter needed is missing: send it."),
    ],
)
def test_a_finding_about_a_parameter_is_a_sentence(query: str, sentence: str) -> None:
    api = FastAPI()

    @api.get("/")
    async def look(
        needed: str,
        shape: Annotated[str, Query(pattern="^a*$")] = "",
        count: Annotated[int, Query(ge=1)] = 1,
        kind: Literal["x", "y"] = "x",
        short: Annotated[str, Query(max_length=2)] = "",
    ) -> None: ...

    api.add_exception_handler(RequestValidationError, app._answer)
    answer = TestClient(api).get(f"/?{query}" + ("&needed=1" if query else ""))
    assert answer.status_code == 422
    assert answer.json()["detail"].startswith(sentence)
