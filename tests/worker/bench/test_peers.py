"""Experiment d: each peer in a process of its own, after seconds of load, with its pictures compared."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from rich.console import Console

from tests import tiny_models
from worker.bench import __main__ as command
from worker.bench import peers, plots, tables
from worker.bench.peer_report import PeerReport, Task
from worker.bench.steady import Gauges, Window
from worker.contract.errors import SettingsError

CONDITIONS = {"width": 64, "height": 64, "device": "H200", "dtype": "float16", "guidance_scale": 7.5}
SCOPE = peers.Scope(
    "models/tiny", steps=4, warm_s=5.0, seconds=10.0, limit_s=60.0, mode="reduce-overhead", batch=0
)
RATES = {"naive": 0.3, "eager": 0.4, "batched": 2.4, "smallcat": 4.6}


def measured(task: Task) -> dict[str, Any]:
    """As a process would: one peer is left out, and one draws pictures that differ by one."""
    if task.peer == "compiled":
        return {"left_out": "no [gcc]"}
    pictures = np.full((4, 8, 8, 3), 100, np.uint8)
    np.save(task.pictures, pictures + (task.peer == "smallcat"))
    peer = {"batch": 8 if task.peer == "batched" else 1, "images_s": RATES[task.peer], "mhz": 1_700.0}
    return {"peer": peer, "conditions": CONDITIONS}


def a_report() -> PeerReport:
    return peers.report(SCOPE, "python -m worker.bench --only d", lambda name: None, measured)


def test_each_peer_has_its_rate_its_ratio_and_how_near_its_pictures_are() -> None:
    report = a_report()
    assert [each.peer for each in report.peers] == ["naive", "eager", "batched", "compiled", "smallcat"]
    assert [report.ratio(each) for each in report.peers] == pytest.approx([0.75, 1.0, 6.0, None, 11.5])
    # A difference of one level of 255 is 48.1 dB.
    nearness = [each.psnr_db for each in report.peers]
    assert nearness == [100.0, 100.0, 100.0, None, pytest.approx(48.13, abs=0.01)]
    assert report.peers[3].left_out == "no [gcc]"
    assert PeerReport.read(report.as_json()) == dataclasses.replace(report, peers=list(report.peers))


def test_the_table_and_the_plot_have_them(tmp_path: Path) -> None:
    console = Console(record=True, width=200)
    for each in tables.peers(a_report()):
        console.print(each)
    text = console.export_text()
    for words in ("11.50", "48.1", "1700", "no [gcc]", "diffusers, batches of 8", "after 5 s of load"):
        assert words in text
    [path] = plots.draw_peers(a_report(), tmp_path)
    with Image.open(path) as image:
        assert image.width > 500
    none = dataclasses.replace(a_report(), peers=[])
    assert plots.draw_peers(none, tmp_path) == []


def test_where_nothing_can_be_measured_the_reason_is_said() -> None:
    with pytest.raises(SettingsError, match="no such model"):
        peers.report(SCOPE, "", lambda name: None, lambda task: {"left_out": "no such model"})


def test_only_those_that_are_named_are_measured() -> None:
    asked: list[Task] = []

    def measure(task: Task) -> dict[str, Any]:
        asked.append(task)
        return measured(task)

    peers.report(dataclasses.replace(SCOPE, names=("smallcat",)), "", lambda name: None, measure)
    assert [task.peer for task in asked] == ["smallcat"]
    assert Task(**json.loads(json.dumps(dataclasses.asdict(asked[0])))) == asked[0]


def test_a_rate_is_that_after_the_time_to_warm_up() -> None:
    """The first call compiles; then the GPU is fast for five seconds, and after them as for hours."""
    now_s = 0.0

    def run() -> int:
        nonlocal now_s
        now_s += 60.0 if now_s == 0 else 0.5 if now_s < 65 else 1.0
        return 4

    found = Window(5.0, 10.0, clock=lambda: now_s, gauges=Gauges(lambda: (1_700.0, 690.0))).measure(run)
    assert found.images_s == 4.0
    assert (found.mhz, found.watts) == (1_700.0, 690.0)


def test_gauges_that_fail_say_nothing() -> None:
    def fail() -> tuple[float, float]:
        raise RuntimeError("no driver")

    with Gauges(fail) as gauges:
        pass
    assert gauges.medians == (None, None)


def test_gauges_are_read_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.bench.steady.EVERY_S", 3_600)
    numbers = itertools.count(1)
    with Gauges(lambda: (float(next(numbers)), 2.0)) as gauges:
        pass
    assert gauges.medians == (1.0, 2.0)


def test_d_stands_alone() -> None:
    result = CliRunner().invoke(command.main, ["--only", "d", "--only", "a"])
    assert result.exit_code == 2
    assert "leave the others out" in result.output


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_peers_of_a_small_model_draw_the_same_pictures(tmp_path: Path) -> None:
    model = tiny_models.tiny_sd1(tmp_path / "tiny")
    arguments = ["--only", "d", "--model", str(model), "--steps", "2", "--warm", "0", "--seconds", "0.5"]
    result = CliRunner().invoke(command.main, [*arguments, "--output", str(tmp_path)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    report = PeerReport.read((tmp_path / "peers.json").read_text())
    by_name = {each.peer: each for each in report.peers}
    assert by_name.pop("compiled").left_out == "measured on a GPU only"
    assert len(by_name) == 4
    for each in by_name.values():
        assert each.images_s
        assert each.psnr_db is not None
        # Within 1 of 255.
        assert each.psnr_db > 48.0
    assert (tmp_path / "peers.png").exists()
    assert "smallcat's engine" in result.output


@pytest.mark.slow
def test_a_peer_that_takes_too_long_is_ended_and_left_out() -> None:
    task = Task("eager", "models/none", 4, 0.0, 0.1, "default", 0, "x.npy")
    assert peers.in_a_process(0.2)(task) == {"left_out": "it took longer than 0.2 s"}
