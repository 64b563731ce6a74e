"""`smallcat warm`: what it says, and each reason for which it cannot. What it compiles is torch's."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from producer.cli import main
from worker.device.compiling import filling
from worker.device.compiling.filling import Filled
from worker.device.compiling.kernel_cache import KernelCache, Signed
from worker.storage.shared_code import Folder

KEY = "k" * 32

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    monkeypatch.setenv("SMALLCAT_KERNEL_CACHE", str(tmp_path / "shared"))
    monkeypatch.setenv("SMALLCAT_KERNEL_CACHE_KEY", KEY)

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["smallcat", "warm", *arguments])
        with pytest.raises(SystemExit) as ended:
            main.main()
        shown = capsys.readouterr()
        return int(ended.value.code or 0), shown.out, shown.err

    return call


@pytest.fixture
def filled(monkeypatch: pytest.MonkeyPatch) -> list[Filled]:
    found: list[Filled] = []
    monkeypatch.setattr(filling, "fill", lambda settings, shared: iter(found))
    return found


def test_it_says_what_was_there_and_what_it_compiled(run: Run, filled: list[Filled]) -> None:
    filled += [Filled("step", "4x64x64", False, 84.2), Filled("VAE decoder", "one picture", True, 0.0)]
    code, out, _ = run()
    assert code == 0
    assert out.splitlines() == [
        "step for 4x64x64: compiled in 84 s",
        "VAE decoder for one picture: was there already",
    ]
    code, out, _ = run("--json")
    assert code == 0
    assert [each["was_there"] for each in json.loads(out)] == [False, True]


def test_what_the_fleet_has_not_got_afterwards_is_an_error(run: Run, filled: list[Filled]) -> None:
    filled += [Filled("step", "4x64x64", False, 84.2, "the disk is full"), Filled("decoder", "one", True, 0)]
    code, out, err = run()
    assert code == 3
    assert out.splitlines()[0] == "step for 4x64x64: the disk is full"
    assert "1 of 2 are not in" in err


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("SMALLCAT_KERNEL_CACHE", "", "SMALLCAT_KERNEL_CACHE is not set"),
        ("SMALLCAT_KERNEL_CACHE_KEY", "", "SMALLCAT_KERNEL_CACHE_KEY is not set"),
        ("SMALLCAT_KERNEL_CACHE_KEY", "short", "at least 32 characters"),
        ("SMALLCAT_COMPILE", "0", "run nothing compiled"),
        ("SMALLCAT_EXACT", "1", "exact mode compile for themselves"),
        ("SMALLCAT_DEVICE", "cpu", "There is no GPU here"),
    ],
)
def test_a_setting_that_does_not_fit_is_one_sentence(
    run: Run, monkeypatch: pytest.MonkeyPatch, name: str, value: str, words: str
) -> None:
    monkeypatch.setenv(name, value)
    code, out, err = run()
    assert code != 0
    assert words in err
    assert "Traceback" not in err + out
    assert KEY not in err + out
    assert out == ""


def test_without_torch_it_says_what_to_install(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("producer.cli.warm.importlib.util.find_spec", lambda name: None)
    code, _, err = run()
    assert code == 2
    assert 'pip install "smallcat[worker,cuda]"' in err


def test_a_storage_that_fails_is_one_sentence(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Iterator[Filled]:
        raise OSError("the disk is away")

    monkeypatch.setattr(filling, "fill", fail)
    code, _, err = run()
    assert code == 3
    assert "the disk is away" in err


def test_a_folder_in_the_place_of_a_file_is_one_sentence(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pieces = Pieces(monkeypatch, "step")

    def fill(settings: Any, shared: Folder) -> Iterator[Filled]:
        cache = KernelCache(tmp_path / "here", lambda: "setup", Signed(shared, [KEY.encode()]))
        (tmp_path / "shared" / cache._name("step", "lane")).mkdir(parents=True)
        return filling.filled(pieces.all, cache)

    monkeypatch.setattr(filling, "fill", fill)
    code, _, err = run()
    assert code == 3
    assert ".kernels'): check SMALLCAT_KERNEL_CACHE." in err
    assert "Traceback" not in err


class Pieces:
    """Functions of a model, whose compiling is the test's."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, names: str) -> None:
        self.compiled: list[str] = []
        monkeypatch.setattr(filling, "carried", lambda recorder: (b"kernels", f"trace of {recorder}"))
        self.all: list[Any] = [
            SimpleNamespace(
                lanes=SimpleNamespace(what=name, record=lambda lane, *_, name=name: self.record(name)),
                lane="lane",
                example=lambda: (torch.zeros(1), []),
            )
            for name in names.split()
        ]

    def record(self, name: str) -> str:
        self.compiled.append(name)
        if name == "broken":
            raise RuntimeError("no such kernel\nand more")
        return name


def test_what_the_fleet_lacks_is_compiled_signed_and_stored(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pieces = Pieces(monkeypatch, "step broken decoder")
    shared = Signed(Folder(tmp_path / "shared"), [KEY.encode()])
    one, other = (KernelCache(tmp_path / name, lambda: "setup", shared) for name in ("one", "other"))
    first = list(filling.filled(pieces.all[:2], one))
    assert [(each.what, each.was_there, each.problem) for each in first] == [
        ("step", False, ""),
        ("broken", False, "it does not compile: no such kernel"),
    ]
    # On this machine or another one: what is there stays as it is.
    again = list(filling.filled([pieces.all[0], pieces.all[2]], other))
    assert [each.was_there for each in again] == [True, False]
    assert pieces.compiled == ["step", "broken", "decoder"]
    monkeypatch.setattr(torch.compiler, "load_cache_artifacts", lambda found: True)
    third = KernelCache(tmp_path / "third", lambda: "setup", shared)
    assert third.find("decoder", "lane") == "trace of decoder"


def test_what_this_machine_has_and_the_fleet_lacks_is_shared(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As where workers compiled for themselves until they were given a key."""
    pieces = Pieces(monkeypatch, "step")
    KernelCache(tmp_path / "here", lambda: "setup", None).keep("step", "lane", b"", "")
    shared = Signed(Folder(tmp_path / "shared"), [KEY.encode()])
    cache = KernelCache(tmp_path / "here", lambda: "setup", shared)
    assert [each.problem for each in filling.filled(pieces.all, cache)] == [""]
    assert cache.is_shared("step", "lane")


def test_a_folder_that_cannot_be_written_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "shared").write_text("a file")
    cache = KernelCache(
        tmp_path / "here", lambda: "setup", Signed(Folder(tmp_path / "shared" / "x"), [KEY.encode()])
    )
    monkeypatch.setattr(cache, "is_shared", lambda what, lane: False)
    [each] = filling.filled(Pieces(monkeypatch, "step").all, cache)
    assert "Not a directory" in each.problem or "exists" in each.problem
