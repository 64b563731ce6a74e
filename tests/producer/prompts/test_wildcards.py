"""Folders of wildcards: read as dynamicprompts 0.31.0 reads them, and bounded whatever lies there."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from dynamicprompts.wildcards.wildcard_manager import WildcardManager
from hypothesis import given, settings
from hypothesis import strategies as st

from producer.prompts.dynamic_prompts import parse
from producer.prompts.entries import LineError
from producer.prompts.expansion import all_of
from producer.prompts.wildcards import MAX_LEVELS, Wildcards


def put(folder: Path, name: str, content: str | bytes) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def values(folder: Path, name: str) -> dict[str, float]:
    """What a name stands for, with the weights."""
    return {"".join(map(str, template)): weight for template, weight in Wildcards(folder).values(name)}


# As dynamicprompts reads them.


TEXTS = st.sampled_from(["red", "blue", "a b", "2::red", "0.5::blue", "x::red", "9", "1::a::b", " pad ", ""])
ITEMS: st.SearchStrategy[Any] = st.one_of(
    TEXTS,
    st.builds(
        lambda key, text, weight: {key: text, **({} if weight is None else {"weight": weight})},
        st.sampled_from(["text", "content"]),
        TEXTS,
        st.sampled_from([None, 1, 2, 0.25, "3"]),
    ),
    st.sampled_from([5, 1.5, True, None, ["inner"], {"other": "x"}]),
)
NAMES = st.sampled_from(["hats", "coats", "deep", "a"])
COLLECTIONS = st.recursive(
    st.lists(ITEMS, max_size=5) | TEXTS,
    lambda inner: st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None)
@given(
    data=st.dictionaries(NAMES, COLLECTIONS, min_size=1, max_size=3),
    ending=st.sampled_from(["yaml", "json"]),
    below=st.sampled_from(["", "sub/"]),
)
def test_nested_collections_and_weights_are_those_of_dynamicprompts(
    data: dict[str, Any], ending: str, below: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("wildcards")
    put(folder, f"{below}all.{ending}", yaml.safe_dump(data) if ending == "yaml" else json.dumps(data))
    logging.disable(logging.WARNING)
    try:
        oracle = WildcardManager(folder)
        names = sorted(oracle.get_collection_names())
        for name in (*names, "hats", "*/hats", "a/*", "deep/**", "nothing"):
            expected: dict[str, float] = {}
            for item in oracle.get_values(name):
                if text := str(getattr(item, "content", item)):
                    expected[text] = expected.get(text, 0.0) + getattr(item, "weight", 1)
            if not expected:
                with pytest.raises(LineError, match="with a line in it"):
                    values(folder, name)
                continue
            found = values(folder, name)
            assert list(found) == sorted(expected), name
            # A value that stands twice with the same weight is there once there, and counts twice here.
            assert all(found[text] >= weight for text, weight in expected.items()), name
    finally:
        logging.disable(logging.NOTSET)


def test_what_is_no_value_is_named_and_the_others_stay(tmp_path: Path) -> None:
    put(tmp_path, "w.yaml", "hats:\n- red\n- yes\n- 1990\n- {text: x, weight: -1}\n- [a]\nsize: 5\n")
    wildcards = Wildcards(tmp_path)
    assert [template for template, _ in wildcards.values("hats")] == [("red",)]
    [said] = wildcards.notices()
    assert 'w.yaml: true, 1990, {"text": "x", "weight": -1} and 2 more are no texts' in said
    assert said.endswith("and are left out: put quotes around texts, also around yes, no, on and off.")
    put(tmp_path, "one.yaml", "hats: [red, off]\n")
    put(tmp_path, "two.json", '{"hats": ["red", true]}')
    put(tmp_path, "days.yaml", "hats: [{2020-01-01: x}]\n")
    wildcards = Wildcards(tmp_path)
    wildcards.values("hats")
    said = " ".join(wildcards.notices())
    assert "one.yaml: false is no text, or has no weight above 0, and is left out: put quotes" in said
    assert "two.json: true is no text" in said
    assert "2020" in said


def test_utf16_as_windows_writes_it_is_read(tmp_path: Path) -> None:
    put(tmp_path, "u.txt", "Möwe\r\nred\r\n".encode("utf-16"))
    put(tmp_path, "y.yaml", "\ufeffhats: [Möwe]\n".encode())
    assert values(tmp_path, "u") == {"Möwe": 1.0, "red": 1.0}
    assert values(tmp_path, "hats") == {"Möwe": 1.0}


# Names do not leave the folder.


@pytest.mark.parametrize(
    "name",
    [
        *("../out/secret", " ../out/secret", "..\\out\\secret", "a/../../out/secret", "link", "dir/secret"),
        *("/out/secret", "loop/../../out/secret", "dangling", "*", "**", "pipe", "l*", "{a|../out/secret}"),
        *("${x:../out/secret}", "[l]ink"),
    ],
)
def test_a_name_that_leads_out_or_to_no_file_is_one_sentence(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "wildcards"
    put(tmp_path, "out/secret.txt", "secret\n")
    put(folder, "a.txt", "")
    (folder / "link.txt").symlink_to(tmp_path / "out" / "secret.txt")
    (folder / "dir").symlink_to(tmp_path / "out")
    (folder / "loop").symlink_to(".")
    (folder / "dangling.txt").symlink_to("gone.txt")
    os.mkfifo(folder / "pipe.txt")
    (folder / "folder.txt").mkdir()
    absolute = str(tmp_path / "out" / "secret")
    for each in (name, absolute):
        with pytest.raises(LineError) as error:
            list(all_of(parse(f"__{each}__"), Wildcards(folder)))
        assert len(error.value.reason) < 400
        assert "secret\n" not in error.value.reason


def test_a_link_within_the_folder_is_a_name_of_its_own(tmp_path: Path) -> None:
    put(tmp_path, "a.txt", "x\n")
    (tmp_path / "b.txt").symlink_to("a.txt")
    assert values(tmp_path, "b") == {"x": 1.0}


# Files that are small and become much.


def _lists() -> str:
    rows = ['a: &a ["lol"]'] + [
        f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]"
        for before, name in zip("abcdefghij", "bcdefghijk", strict=True)
    ]
    return "\n".join(rows)


def _maps(merge: str) -> str:
    rows = ["a0: &a0 {k: v}"]
    for number in range(1, 12):
        inner = ", ".join([f"*a{number - 1}"] * 9)
        keys = ", ".join(f"k{n}: *a{number - 1}" for n in range(9))
        rows.append(f"a{number}: &a{number} {{{f'{merge}: [{inner}]' if merge else keys}}}")
    return "\n".join(rows)


@pytest.mark.parametrize(
    "text",
    [
        *(_lists(), _maps(""), _maps("<<")),
        *("a: &a [*a]\n", "a: &a\n  b: *a\n", "a: &a {<<: *a}\n"),
        *("[" * 100_000, "{" * 100_000, "[" * 5_000 + "]" * 5_000, "- " * 5_000 + "x", "? " * 5_000),
        "\n".join(" " * level + "a:" for level in range(2_000)),
        "x: [" * (MAX_LEVELS + 1),
        *("- 1" + "0" * 100_000, "a: 1" + ":59" * 60_000, "a: 2024-13-45\n", "a: !!python/name:os.system\n"),
        *("a: [x]\n---\na: [y]\n", "\t- x", "a: *b\n", "? [a]\n: x\n", "a: !<!", "%YAML 9.9\n---\n"),
    ],
    ids=lambda text: text[:12],
)
def test_hostile_yaml_is_one_sentence_at_once_and_other_files_are_read(tmp_path: Path, text: str) -> None:
    put(tmp_path, "bad.yaml", text)
    put(tmp_path, "good.txt", "x\n")
    began = time.process_time()
    wildcards = Wildcards(tmp_path)
    assert [template for template, _ in wildcards.values("good")] == [("x",)]
    notices = wildcards.notices()
    assert len(notices) <= 1
    assert all("bad.yaml" in each and len(each) < 400 and "\n" not in each for each in notices)
    with contextlib.suppress(LineError):
        wildcards.values("a")
    assert time.process_time() - began < 5


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 5_000, "[1" + "0" * 100_000 + "]", "", "nul", "[NaN]"]
)
def test_hostile_json_is_one_sentence_at_once(tmp_path: Path, text: str) -> None:
    put(tmp_path, "bad.json", text)
    put(tmp_path, "good.txt", "x\n")
    wildcards = Wildcards(tmp_path)
    assert wildcards.values("good")
    [said] = wildcards.notices()
    assert "bad.json" in said
