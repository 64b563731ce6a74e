"""The recipes of docs/http.md, run as they stand."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.docs import ROOT
from tests.markdown import codes
from tests.producer.http.conftest import Api

#: How the examples of each language are run.
RUN = {
    "sh": ["bash", "-euo", "pipefail", "-c"],
    "python": [sys.executable, "-c"],
    "javascript": ["node", "--input-type=module", "-e"],
}
RECIPES = [
    (code.language, code.text)
    for code in codes(ROOT / "docs" / "http.md")
    if code.language in RUN and "SMALLCAT_HTTP_URL" in code.text
]


def test_there_is_one_for_each_language() -> None:
    assert {language for language, _ in RECIPES} == set(RUN)


@pytest.mark.parametrize("number", range(len(RECIPES)))
def test_a_recipe_runs(api: Api, tmp_path: Path, number: int) -> None:
    language, text = RECIPES[number]
    if shutil.which(RUN[language][0]) is None:
        pytest.skip(f"there is no {RUN[language][0]} here")
    # What the recipes read.
    (tmp_path / "shoes").mkdir()
    Image.new("RGB", (80, 64), "teal").save(tmp_path / "shoes" / "1.png")
    (tmp_path / "prompts.csv").write_text("prompt,image\non a marble table,shoes/1.png\na rocket,\n")
    known = {"SMALLCAT_HTTP_URL": api.url, "SMALLCAT_HTTP_KEY": api.key}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    found = subprocess.run(
        [*RUN[language], text],
        cwd=tmp_path,
        env={**os.environ, **known, "PATH": path},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert found.returncode == 0, found.stderr
    assert "done" in found.stdout or "http://" in found.stdout or '"run"' in found.stdout
    for file in tmp_path.glob("*.png"):
        assert Image.open(io.BytesIO(file.read_bytes())).size == (8, 8)
    if language == "python" and "order-17" in text:
        assert len(list(tmp_path.glob("*.png"))) == 2
