"""One real Chromium for all tests of the run. Without one: skipped at home, a failure in CI.

(`WITHOUT_BROWSER=1`, from `.ci/run`: skipped in CI too, where none can be installed.)
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.browser.chromium import Chromium, program


@pytest.fixture(scope="session")
def chromium() -> Iterator[Chromium]:
    """One browser for all tests of the run."""
    if program() is None:
        needed = os.environ.get("CI") == "true" and not os.environ.get("WITHOUT_BROWSER")
        (pytest.fail if needed else pytest.skip)("No Chromium is installed: .ci/run shows how.")
    with Chromium() as browser:
        yield browser


@pytest.fixture
def browser(chromium: Chromium) -> Chromium:
    chromium.resize(1280, 800)
    chromium.prefer("light")
    return chromium
