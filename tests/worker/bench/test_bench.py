"""`python -m worker.bench` measures what it reports, and reports all that it measures."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from rich.console import Console

from tests import tiny_models
from worker.bench import __main__ as command
from worker.bench import kernels, measuring, plots, report, runs, shapes, tables
from worker.bench.report import Cat, Point, Rate, Setup
from worker.contract.errors import NotFiniteError, OutOfMemoryError, SettingsError, SmallcatError
from worker.contract.settings import WorkerSettings
from worker.device import attention_timing
from worker.model import loader

CPU = torch.device("cpu")
#: A small attention layer: some megabytes at 256 pixels.
LAYER = kernels.FirstAttention(token_px=8, heads=2, head_width=8, dtype=torch.float32)
needs_proc = pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux can reset the peak of a process' memory"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.tiny_sd1(tmp_path_factory.mktemp("models") / "tiny")


# --- results ------------------------------------------------------------------------------------------------


def a_report(**more: Any) -> report.Report:
    naive, auto = Setup("naive", compiled=False), Setup("auto", compiled=True)
    return report.Report(
        **{
            "device": "cuda (NVIDIA H200)",
            "versions": {"torch": "2.13.0", "python": "3.12.3"},
            "date": "2026-11-25",
            "command": "python -m worker.bench --shapes sd15",
            "model": "sd15",
            "dtype": "float16",
            "width": 512,
            "height": 768,
            "steps": 50,
            "guidance_scale": 7.5,
            "refused": {"xformers": "it does not load: no such file"},
            "cats": [
                Cat(naive, 2.0, 4.0),
                Cat(auto, 0.5, 3.0),
                Cat(Setup("sdpa", True), left_out="not compiled [no gcc]"),
            ],
            "points": [
                Point("naive", 512, 4096, 2.0, 1024.0),
                Point("naive", 1024, 16384, 32.0, 16384.0),
                Point("naive", 2048, 65536, left_out="does not fit in the GPU's memory"),
                Point("sdpa", 512, 4096, 0.2, 5.0),
                Point("sdpa", 1024, 16384, 3.2, 20.0),
                Point("sdpa", 2048, 65536, 51.2, 80.0),
            ],
            "rates": [
                Rate(naive, 1, 30.0, 9.0, 0.66, 4.0),
                Rate(naive, 2, left_out="does not fit in memory"),
            ],
            **more,
        }
    )


def printed(found: report.Report) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        for each in tables.tables(found):
            console.print(each)
    return capture.get()


def test_throughput_counts_all_steps_and_the_decoding() -> None:
    assert report.images_per_s(8, steps=50, step_s=0.03, decode_s=0.1) == 8 / 1.6


@pytest.mark.parametrize("power", [1, 2])
def test_the_exponent_of_growth(power: int) -> None:
    assert report.exponent((n, 3 * n**power) for n in (4, 16, 36)) == pytest.approx(power)
    assert report.exponent([(4, 4)]) is None


def test_growth_is_that_of_the_larger_sizes() -> None:
    overhead = [Point("naive", side, side, 5.0 + side**2 / 1e9, 7.0) for side in (1, 2)]
    large = [Point("naive", side, side, side**2 / 1e3, float(side)) for side in (1_000, 4_000)]
    assert report.growth([*overhead, *large, Point("sdpa", 1, 1, 9.0, 9.0)], "naive") == (
        pytest.approx(2),
        pytest.approx(1),
    )


def test_the_tables_have_all_results() -> None:
    text = printed(a_report())
    assert "xformers is left out: it does not load: no such file." in text
    assert "speed-up" in text
    assert "4.00" in text, "auto against naive"
    for each in (
        "not compiled [no gcc]",
        "does not fit in the GPU's memory",
        "does not fit in memory",
        "16384.0",
        "0.66",
    ):
        assert each in text
    assert "naive: for N tokens, time grows as N^2.0 and memory as N^2.0" in text
    assert "sdpa: for N tokens, time grows as N^2.0 and memory as N^1.0" in text


def test_an_experiment_that_was_not_run_has_no_column_and_no_table() -> None:
    on_cpu = dataclasses.replace(a_report(), cats=[Cat(Setup("naive", False), 2.0)], points=[], rates=[])
    text = printed(on_cpu)
    assert "GPU memory" not in text
    assert "tokens" not in text


@pytest.mark.parametrize("experiment", ["a", "b", "c"])
def test_each_experiment_names_its_conditions(experiment: report.Experiment) -> None:
    text = a_report().conditions(experiment)
    for each in (
        "NVIDIA H200",
        "sd15",
        "float16",
        "torch 2.13.0",
        "2026-11-25",
        "python -m worker.bench --shapes",
    ):
        assert each in text
    assert ("512x768 px, 50 steps, guidance 7.5" in text) == (experiment != "b")


def test_the_json_has_every_field() -> None:
    found = json.loads(a_report().as_json())
    assert found.keys() == {field.name for field in dataclasses.fields(report.Report)}
    assert found["points"][0] == {
        "attention": "naive",
        "side_px": 512,
        "tokens": 4096,
        "milliseconds": 2.0,
        "memory_mib": 1024.0,
        "left_out": "",
    }


def test_a_plot_for_each_experiment(tmp_path: Path) -> None:
    drawn = plots.draw(a_report(), tmp_path)
    assert [path.name for path in drawn] == ["small-cat.png", "attention.png", "images-per-second.png"]
    for path in drawn:
        with Image.open(path) as image:
            assert image.width == 1500
            assert len(image.convert("RGB").getcolors(1 << 24) or ()) > 100


def test_without_figures_there_is_no_plot(tmp_path: Path) -> None:
    nothing = a_report(cats=[], points=[], rates=[Rate(Setup("naive", False), 1, left_out="does not fit")])
    assert plots.draw(nothing, tmp_path) == []


# --- one attention ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("sd15", kernels.FirstAttention(8, 8, 40, torch.float16)),
        ("sdxl", kernels.FirstAttention(16, 10, 64, torch.float16)),
    ],
)
def test_the_first_attention_of_the_real_models(
    kind: shapes.Shapes, expected: kernels.FirstAttention
) -> None:
    plan = shapes.architecture(kind)
    with torch.device("meta"):
        unet = loader.diffusers.UNet2DConditionModel(**plan.unet).half()

    class Pipeline:
        vae_scale_factor = 8

    Pipeline.unet = unet  # type: ignore[attr-defined]
    assert kernels.first_attention(Pipeline) == expected
    assert expected.shape(1024).query_tokens == (1024 // expected.token_px) ** 2


@needs_proc
def test_on_a_cpu_memory_is_the_peak_of_the_process() -> None:
    size = 64 << 20

    def run() -> None:
        torch.zeros(size, dtype=torch.uint8)

    run()
    assert kernels.peak_bytes(run, CPU) == pytest.approx(size, rel=0.1)
    assert kernels.peak_bytes(lambda: None, CPU) == pytest.approx(0, abs=4 << 20)


@pytest.mark.services
@needs_proc
def test_naive_attention_holds_the_whole_matrix_in_memory_and_sdpa_does_not() -> None:
    sides = (256, 512)
    naive = [each.memory_mib or 0 for each in kernels.curve("naive", LAYER, sides, CPU, limit_s=60)]
    sdpa = [each.memory_mib or 0 for each in kernels.curve("sdpa", LAYER, sides, CPU, limit_s=60)]
    # 2 rows of 2 heads of 4096 x 4096 numbers of 4 bytes, before and after the softmax.
    assert naive[1] == pytest.approx(512, rel=0.1)
    assert naive[1] / naive[0] == pytest.approx(16, rel=0.2)
    assert sdpa[1] < 16


def test_without_a_figure_from_the_system_there_is_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(kernels, "_CLEAR_REFS", tmp_path / "no such file")
    assert [each.memory_mib for each in kernels.curve("sdpa", LAYER, [64], CPU, limit_s=60)] == [None]


def fake_measure(monkeypatch: pytest.MonkeyPatch, *outcomes: float | Exception) -> list[int]:
    """Let each call of `measure` take so long or raise. Returns the tokens of each call."""
    left, asked = list(outcomes), []

    def measure(kernel: object, shape: attention_timing.Shape, device: object) -> tuple[float, int]:
        asked.append(shape.query_tokens)
        outcome = left.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome, 0

    monkeypatch.setattr(kernels, "measure", measure)
    return asked


def left_out(backend: str, sides_px: Sequence[int], limit_s: float = 1.0) -> list[str]:
    return [each.left_out for each in kernels.curve(backend, LAYER, sides_px, CPU, limit_s=limit_s)]


def test_a_size_that_would_take_too_long_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = fake_measure(monkeypatch, 0.2)
    assert left_out("sdpa", [80, 160, 320]) == ["", "would take about 3 s", "would take about 51 s"]
    assert asked == [100]


def test_after_a_size_that_does_not_fit_no_larger_one_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = fake_measure(monkeypatch, 1e-6, torch.OutOfMemoryError())
    assert left_out("sdpa", [80, 160, 320]) == ["", *["does not fit in the GPU's memory"] * 2]
    assert asked == [100, 400]


def test_the_error_of_a_kernel_that_refuses_a_size_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_measure(monkeypatch, RuntimeError("No operator found\nfor query"))
    assert left_out("sdpa", [80]) == ["No operator found"]


def test_a_cpu_is_not_made_to_swap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_free_bytes", lambda: 1 << 30)
    fake_measure(monkeypatch, 1e-6, 1e-6)
    assert left_out("naive", [256, 1024]) == ["", "would take 8 GiB of memory"]
    fake_measure(monkeypatch, 1e-6, 1e-6)
    assert left_out("sdpa", [256, 1024]) == ["", ""]


# --- pictures and batches -----------------------------------------------------------------------------------


def a_setup(model: Path, *, jobs: Sequence[int] = (1, 2)) -> runs.LoadedSetup:
    plan = runs.Plan(steps=3, pictures=1, jobs=jobs, seconds=0.0)
    return runs.LoadedSetup(WorkerSettings(model=str(model)), Setup("naive", compiled=False), plan)


def test_a_picture_and_batches(model: Path) -> None:
    setup = a_setup(model)
    cat = setup.cat()
    assert cat.seconds is not None
    assert cat.seconds > 0
    found = list(setup.rates())
    assert [each.jobs for each in found] == [1, 2]
    for each in found:
        assert each.step_ms is not None
        assert each.decode_ms is not None
        # PNDM takes a step more than it is asked for.
        expected = report.images_per_s(each.jobs, 4, each.step_ms / 1e3, each.decode_ms / 1e3)
        assert each.images_per_s == pytest.approx(expected)


def test_a_batch_that_does_not_fit_is_left_out_with_all_larger_ones(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = a_setup(model, jobs=(1, 2, 4))
    step = setup._runner.step

    def small(states: Sequence[Any]) -> list[SmallcatError | None]:
        if len(states) > 1:
            raise OutOfMemoryError("no")
        return step(states)

    monkeypatch.setattr(setup._runner, "step", small)
    assert [each.left_out for each in setup.rates()] == ["", *["does not fit in memory"] * 2]


def test_a_failed_step_is_not_counted_as_a_fast_one(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = a_setup(model)
    monkeypatch.setattr(setup._runner, "step", lambda states: [NotFiniteError("not finite")] * len(states))
    assert setup.cat() == Cat(Setup("naive", False), left_out="not finite")
    assert [each.left_out for each in setup.rates()] == ["not finite"] * 2


def test_the_named_attention_is_measured(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USE_MEMORY_EFFICIENT_ATTENTION", "1")
    setup = a_setup(model)
    assert {choice.what: choice.choice for choice in setup._runner.choices}["attention"] == "naive"


def test_a_setup_that_should_be_compiled_and_is_not_is_an_error(model: Path) -> None:
    with pytest.raises(SettingsError, match="not compiled: the CPU runs the plain step"):
        runs.LoadedSetup(
            WorkerSettings(model=str(model)),
            Setup("sdpa", compiled=True),
            runs.Plan(steps=1, pictures=1, jobs=(), seconds=0.0),
        )


def test_the_setups_of_each_device() -> None:
    backends = ["naive", "sdpa"]
    eager = [Setup("naive", False), Setup("sdpa", False)]
    assert measuring.setups(backends, on_gpu=False, scope=measuring.FULL) == eager
    assert measuring.setups(backends, on_gpu=True, scope=measuring.QUICK) == [*eager, Setup("auto", True)]
    assert measuring.setups(backends, on_gpu=True, scope=measuring.FULL) == [
        *eager,
        Setup("naive", True),
        Setup("sdpa", True),
    ]


@pytest.mark.services
def test_a_setup_that_does_not_work_is_reported_and_the_others_go_on(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        measuring, "setups", lambda *_, **__: [Setup("sdpa", compiled=True), Setup("sdpa", compiled=False)]
    )
    scope = dataclasses.replace(measuring.QUICK, cpu_jobs=(1,), seconds=0.0)
    run = measuring.Benchmark(
        WorkerSettings(model=str(model)), ["a", "c"], scope, steps=2, command="python -m worker.bench"
    )
    started: list[str] = []
    found = run.report(started.append)
    assert len(started) == run.total == 6
    assert [each.left_out for each in found.cats] == ["not compiled: the CPU runs the plain step", ""]
    assert [each.left_out for each in found.rates] == ["not compiled: the CPU runs the plain step", ""]


# --- the command --------------------------------------------------------------------------------------------


def bench(*arguments: str) -> Result:
    return CliRunner().invoke(command.main, arguments)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    scope = dataclasses.replace(measuring.QUICK, sides_px=(64, 128), cpu_jobs=(1, 2), seconds=0.0)
    monkeypatch.setattr(measuring, "QUICK", scope)


# Each part of it is tested above.
@pytest.mark.services
@pytest.mark.usefixtures("quick")
def test_all_experiments(model: Path, tmp_path: Path) -> None:
    result = bench("--model", str(model), "--quick", "--steps", "2", "--output", str(tmp_path / "found"))
    assert result.exit_code == 0, result.output
    assert "xformers is left out: has no operator for a CPU" in result.stdout
    assert sorted(path.name for path in (tmp_path / "found").iterdir()) == [
        "attention.png",
        "bench.json",
        "images-per-second.png",
        "small-cat.png",
    ]
    found = json.loads((tmp_path / "found" / "bench.json").read_text())
    assert found["model"] == "tiny"
    assert found["refused"] == {"xformers": "has no operator for a CPU"}
    assert [len(found[name]) for name in ("cats", "points", "rates")] == [2, 4, 4]


@pytest.mark.services
@pytest.mark.usefixtures("quick")
def test_one_experiment_with_random_weights(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    def make(kind: str, folder: Path) -> Path:
        made.append((kind, folder))
        return model

    monkeypatch.setattr(shapes, "make", make)
    monkeypatch.setenv("SMALLCAT_CACHE_DIR", str(tmp_path))
    result = bench("--shapes", "sdxl", "--only", "b", "--quick", "--output", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert made == [("sdxl", tmp_path / "shapes" / "sdxl")]
    assert json.loads((tmp_path / "bench.json").read_text())["cats"] == []
    assert not (tmp_path / "small-cat.png").exists()


@pytest.mark.services
@pytest.mark.usefixtures("quick")
def test_without_matplotlib_a_line_names_the_remedy(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    result = bench("--model", str(model), "--only", "b", "--quick", "--output", str(tmp_path))
    assert "No plots: install matplotlib with pip install '.[bench]'." in result.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]


@pytest.mark.parametrize(
    ("arguments", "exit_code", "sentence"),
    [
        (["--model", "x", "--shapes", "sd15"], 2, "exclude each other"),
        (["--only", "e"], 2, "'e' is not one of"),
        (["--model", "/nowhere"], 1, "SMALLCAT_MODEL is /nowhere, which does not exist"),
    ],
)
def test_what_cannot_be_measured(arguments: list[str], exit_code: int, sentence: str) -> None:
    result = bench(*arguments)
    assert result.exit_code == exit_code
    assert sentence in result.output
