"""Compiled code that workers share: what is signed, what is refused, and where it is kept."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from worker.contract.errors import SettingsError
from worker.contract.settings import worker_settings
from worker.device.compiling.kernel_cache import MAGIC, KernelCache, Signed
from worker.storage.shared_code import Folder

KEY, OTHER = b"k" * 32, b"o" * 32
NAME = "setup/name.kernels"


def test_what_is_signed_is_read_again_by_whoever_has_the_key(tmp_path: Path) -> None:
    Signed(Folder(tmp_path), [KEY]).put(NAME, b"code")
    assert Signed(Folder(tmp_path), [KEY]).get(NAME) == b"code"
    # While keys are replaced, both are accepted, and the first signs.
    assert Signed(Folder(tmp_path), [OTHER, KEY]).get(NAME) == b"code"
    Signed(Folder(tmp_path), [OTHER, KEY]).put(NAME, b"more")
    assert Signed(Folder(tmp_path), [OTHER]).get(NAME) == b"more"
    assert Signed(Folder(tmp_path), [KEY]).get("setup/another.kernels") is None


@pytest.mark.parametrize("changed", ["key", "byte", "name", "cut", "unsigned", "empty"])
def test_what_no_key_has_signed_is_refused_and_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, changed: str
) -> None:
    folder = Folder(tmp_path)
    Signed(folder, [KEY]).put(NAME, b"code")
    content, keys, name = folder.get(NAME) or b"", [KEY], NAME
    match changed:
        case "key":
            keys = [OTHER]
        case "byte":
            content = content[:-1] + b"x"
        case "name":
            name = "setup/another.kernels"
        case "cut":
            content = content[: len(MAGIC) + 8]
        case "unsigned":
            content = b"code"
        case _:
            content = b""
    folder.put(name, content)
    with caplog.at_level(logging.WARNING):
        assert Signed(folder, keys).get(name) is None
    (line,) = caplog.messages
    assert name in line
    assert "SMALLCAT_KERNEL_CACHE_KEY" in line


def test_code_of_one_machine_is_found_by_another_with_its_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[bytes] = []
    monkeypatch.setattr(torch.compiler, "load_cache_artifacts", lambda found: loaded.append(found) or True)
    shared = Signed(Folder(tmp_path / "shared"), [KEY])
    one, other = (KernelCache(tmp_path / name, lambda: "a", shared) for name in ("one", "other"))
    third = KernelCache(tmp_path / "third", lambda: "b", shared)
    assert one.find("step", "lane") is None
    one.keep("step", "lane", b"kernels", "the trace")
    assert one.find("step", "lane") == "the trace"
    assert loaded == []
    # On another machine, from the fleet's; and the second time from its own disk.
    assert [other.find("step", "lane") for _ in range(2)] == ["the trace"] * 2
    assert loaded == [b"kernels"]
    # Of another GPU, version or architecture: not at all.
    assert third.find("step", "lane") is None
    assert other.find("step", "another lane") is None


def test_a_store_that_fails_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Folder):
        def get(self, name: str) -> bytes | None:
            raise OSError("the disk is away")

        def put(self, name: str, content: bytes) -> None:
            raise OSError("the disk is full")

    cache = KernelCache(tmp_path / "here", lambda: "setup", Broken(tmp_path))
    with caplog.at_level(logging.WARNING):
        assert cache.find("step", "lane") is None
        cache.keep("step", "lane", b"kernels", "")
        assert cache.wait_for_others("step", "lane") is None
        cache.renew_claim("step", "lane")
        cache.end_claim("step", "lane")
    words = [line.rpartition(": ")[2] for line in caplog.messages]
    assert words == ["the disk is away", "the disk is full", "the disk is away"]
    assert cache.find("step", "lane") == ""
    # What does not load is as good as not there.
    cache.lose("step", "lane")
    assert cache.find("step", "lane") is None


def test_a_mark_that_is_no_text_is_none(tmp_path: Path) -> None:
    cache = KernelCache(tmp_path, lambda: "setup", None)
    cache.keep("step", "lane", b"", "the trace")
    [mark] = (path for path in tmp_path.rglob("*") if path.is_file())
    mark.write_bytes(b"\xff")
    assert cache.find("step", "lane") is None
    cache.keep("step", "lane", b"", "the trace")
    assert cache.find("step", "lane") == "the trace"


def test_what_is_signed_and_cannot_be_used_is_compiled_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As when another version of torch has packed it, in spite of the setup's name."""

    def refuse(found: bytes) -> None:
        raise ValueError("not mine")

    monkeypatch.setattr(torch.compiler, "load_cache_artifacts", refuse)
    shared = Signed(Folder(tmp_path / "shared"), [KEY])
    one, other = (KernelCache(tmp_path / name, lambda: "a", shared) for name in ("one", "other"))
    assert one.keep("step", "lane", b"kernels", "the trace") == ""
    with caplog.at_level(logging.WARNING):
        assert other.find("step", "lane") is None
    assert "not mine" in caplog.text
    assert one.keep("step", "lane", b"", "the trace") != ""


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("SMALLCAT_KERNEL_CACHE", "s3:///kernels", "a folder that workers share"),
        ("SMALLCAT_KERNEL_CACHE", "gs://bucket/kernels", "s3://BUCKET/PREFIX"),
        ("SMALLCAT_KERNEL_CACHE_KEY", "short", "at least 32 characters"),
        ("SMALLCAT_KERNEL_CACHE_KEY", " ".join(["k" * 32] * 3), "or two"),
    ],
)
def test_a_wrong_setting_is_refused(name: str, value: str, words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        worker_settings({name: value})
