"""What the README says is what there is. `tests/test_docs.py` checks the commands and names in it."""

from __future__ import annotations

import re

import pytest

from tests.docs import DOCUMENTS, ROOT
from worker.contract.choices import SAMPLERS, Scheduler
from worker.contract.job_parameters import MAX_SIZE, MIN_SIZE, SIZE_STEP

TEXT = (ROOT / "README.md").read_text("utf-8")
#: Words, as `wc -w` counts them, at most.
MAX_WORDS = 1_200


def section(heading: str) -> str:
    """What stands below a heading, up to the next one."""
    return re.split(r"^#+ ", TEXT.partition(f"# {heading}\n")[2], maxsplit=1, flags=re.MULTILINE)[0]


def test_it_is_short() -> None:
    assert len(TEXT.split()) <= MAX_WORDS


def test_every_document_is_reached_from_it() -> None:
    pages = {path.name for path in DOCUMENTS if path.parent == ROOT / "docs"} - {"README.md"}
    assert pages <= set(re.findall(r"\]\(docs/([\w-]+\.md)\)", TEXT))


def test_what_is_supported_is_what_the_code_has() -> None:
    supported = section("What is supported")
    names = set(SAMPLERS.values()) - {SAMPLERS[Scheduler.DEFAULT], SAMPLERS[Scheduler.PNDM]}
    assert [name for name in names if name.removeprefix("DPM++ 2M ") not in supported] == []
    assert "PNDM" in supported
    assert "the model's own" in supported
    assert f"{MIN_SIZE} to {MAX_SIZE:,} px, multiples of {SIZE_STEP}" in supported


@pytest.mark.parametrize("heading", ["Reliability", "Speed"])
def test_figures_stand_beside_hardware_and_date(heading: str) -> None:
    assert re.search(r"(H100|H200|EPYC).*20\d\d-\d\d-\d\d", section(heading))


def test_the_figures_are_those_of_the_pages_behind_them() -> None:
    """A number in bold is in the page that has all of them, though perhaps with one more digit."""
    for heading, page in (("Reliability", "reliability.md"), ("Speed", "performance.md")):
        full = (ROOT / "docs" / page).read_text("utf-8")
        numbers = [float(number) for number in re.findall(r"\d+\.\d+|\d+", full.replace(",", ""))]
        for found in re.findall(r"\| ([^|]+) \|\n", section(heading)):
            for shown in re.findall(r"\d+\.\d+", found):
                digits = len(shown.partition(".")[2])
                assert any(round(number, digits) == float(shown) for number in numbers), shown


def test_the_licence_is_what_it_says() -> None:
    assert "Apache-2.0" in section("License")
    assert (ROOT / "LICENSE").read_text("utf-8").lstrip().startswith("Apache License")
