"""The OpenAPI document, and schemathesis 4 against the server: all of its phases find nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.producer.http.conftest import Api
from worker.contract.errors import InvalidJobError
from worker.contract.job import WRITTEN_FIELDS, Job
from worker.contract.job_fields import help_lines
from worker.contract.webhook import MAX_WEBHOOK

CONFIG = Path(__file__).with_name("schemathesis.toml")


@pytest.fixture(scope="module")
def document(api: Api) -> Any:
    return api.call("GET", "/openapi.json", key="").json


def test_the_schema_of_a_job_is_made_from_the_table(document: Any) -> None:
    schema = document["components"]["schemas"]["Job"]
    assert schema["properties"].pop("webhook")["maxLength"] == MAX_WEBHOOK, "a submission's, of no message"
    assert list(schema["properties"]) == list(WRITTEN_FIELDS)
    texts = {name: text for name, text in help_lines(Job).items() if name in WRITTEN_FIELDS}
    assert {name: each["description"] for name, each in schema["properties"].items()} == texts
    assert schema["additionalProperties"] is False
    assert schema["required"] == ["prompt"]


@pytest.mark.parametrize("name", [name for name in WRITTEN_FIELDS if name != "prompt"])
def test_null_is_in_the_schema_where_it_means_not_given(document: Any, name: str) -> None:
    field = document["components"]["schemas"]["Job"]["properties"][name]
    is_said = {"type": "null"} in field.get("anyOf", [])
    try:
        Job.parse({"prompt": "a cat", name: None})
    except InvalidJobError:
        assert not is_said, field
    else:
        assert is_said, field


def test_every_path_says_what_it_answers(document: Any) -> None:
    texts = json.dumps(document)
    for reference in set(texts.split('"$ref": "#/components/schemas/')[1:]):
        assert reference.partition('"')[0] in document["components"]["schemas"]
    for path, operations in document["paths"].items():
        for operation in operations.values():
            assert operation["summary"], path
            if path.startswith("/v1/"):
                assert operation["security"] == [{"HTTPBearer": []}], path
                for status in ("401", "403", "503"):
                    content = operation["responses"][status]["content"]
                    assert list(content) == ["application/problem+json"], path
    post = document["paths"]["/v1/jobs"]["post"]["requestBody"]["content"]["application/json"]
    assert set(post["examples"]) == {"one", "several"}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_schemathesis_finds_nothing(api: Api, tmp_path: Path) -> None:
    found = subprocess.run(
        [
            *(str(Path(sys.executable).with_name("schemathesis")), "--config-file", str(CONFIG)),
            *("run", f"{api.url}/openapi.json"),
            *("--header", f"Authorization: Bearer {api.key}", "--max-examples", "50", "--seed", "1"),
            "--no-color",
        ],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "COLUMNS": "200"},
    )
    assert found.returncode == 0, found.stdout[-8_000:]
