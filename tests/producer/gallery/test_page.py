from __future__ import annotations

from pathlib import Path

from producer.gallery import page


def test_the_pages_script_has_each_part_once_and_in_order() -> None:
    folder = Path(page.__file__).parent / "static"
    script = page._script()
    positions = [script.index((folder / name).read_text()) for name in page.SCRIPTS]
    assert sorted(page.SCRIPTS) == sorted(path.name for path in folder.glob("*.js"))
    assert positions == sorted(positions)


def test_no_part_of_the_pages_script_can_end_it() -> None:
    assert "</script" not in page._script().lower()
    assert "<!--" not in page._script()
