"""What a start does side by side, and what it puts off."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from worker.device import start
from worker.model import headers


def test_a_module_for_later_is_loaded_when_something_of_it_is_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "rarely_used.py").write_text("import time\ntime.sleep(0.05)\nvalue = 7\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    start.later("rarely_used")
    import rarely_used  # type: ignore[import-not-found]

    stand_in = sys.modules["rarely_used"]
    assert rarely_used is stand_in
    # By any number of threads at once, each of which finds all of it.
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda _: stand_in.value, range(8))) == [7] * 8
    assert sys.modules["rarely_used"] is not stand_in
    del sys.modules["rarely_used"]


def test_what_is_imported_already_or_not_there_stays_so() -> None:
    before = sys.modules["json"]
    start.later("json")
    start.later("no_such_module_at_all")
    assert sys.modules["json"] is before
    assert "no_such_module_at_all" not in sys.modules


@pytest.mark.parametrize("size", [0, 1, 9, 10, 11, 25])
def test_files_are_hashed_as_a_whole_whatever_the_piece(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, size: int
) -> None:
    file = tmp_path / "weights"
    file.write_bytes(bytes(range(size)))
    whole = headers.digest({"weights": file})
    monkeypatch.setattr(headers, "PIECE", 10)
    assert headers.digesting({"weights": file})() == whole
