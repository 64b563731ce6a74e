from __future__ import annotations

from pathlib import Path

import pytest

from worker.contract.lua import script

ROOT = Path(__file__).parents[3]


def test_a_script_is_its_file_without_comments_and_blank_lines(tmp_path: Path) -> None:
    file = tmp_path / "one.lua"
    file.write_text("-- What it does.\n\nlocal a = 1 -- kept\n  -- why\n  return a\n")

    assert script(file) == "local a = 1 -- kept\n  return a\n"


def test_an_include_line_stands_for_the_file_that_it_names(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "now.lua").write_text("-- include base.lua\nlocal now = base\n")
    (tmp_path / "shared" / "base.lua").write_text("local base = 1\n")
    (tmp_path / "scripts").mkdir()
    file = tmp_path / "scripts" / "one.lua"
    file.write_text("-- include ../shared/now.lua\n-- include ../shared/base.lua\nreturn now\n")

    assert script(file) == "local base = 1\nlocal now = base\nreturn now\n"


def test_files_that_include_each_other_are_inserted_once(tmp_path: Path) -> None:
    (tmp_path / "a.lua").write_text("-- include b.lua\nlocal a = 1\n")
    (tmp_path / "b.lua").write_text("-- include a.lua\nlocal b = 2\n")

    assert script(tmp_path / "a.lua") == "local b = 2\nlocal a = 1\n"


def test_what_is_included_in_a_block_is_there_in_each_block_that_includes_it(tmp_path: Path) -> None:
    (tmp_path / "base.lua").write_text("local base = 1\n")
    (tmp_path / "now.lua").write_text("-- include base.lua\nlocal now = base\n")
    file = tmp_path / "one.lua"
    file.write_text(
        "if a then\n  -- include now.lua\n  if b then\n    -- include base.lua\n    f(base)\n  end\n"
        "  -- include base.lua\nelseif c then\n  -- include base.lua\nend\n"
        "-- include now.lua\nif d then\n  -- include now.lua\nend\n"
    )

    base = "local base = 1\n"
    first = f"if a then\n{base}local now = base\n  if b then\n    f(base)\n  end\nelseif c then\n{base}end\n"
    assert script(file) == f"{first}{base}local now = base\nif d then\nend\n"


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.lua").write_text("-- include gone.lua\n")

    with pytest.raises(FileNotFoundError, match=r"gone\.lua"):
        script(tmp_path / "a.lua")


def test_a_multi_line_comment_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.lua").write_text("--[[ one\ntwo ]]\n")

    with pytest.raises(ValueError, match=r"a\.lua has a multi-line comment"):
        script(tmp_path / "a.lua")


def test_every_script_of_the_project_can_be_read() -> None:
    for package in ("worker", "producer"):
        for path in (ROOT / package).rglob("*.lua"):
            assert script(path)
