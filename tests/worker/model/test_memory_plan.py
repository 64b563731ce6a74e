"""Memory is planned before a model is loaded: a table of cards and models, and what holds for all of them."""

from __future__ import annotations

import dataclasses
import json
import re
import struct
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch

from worker.bench import shapes
from worker.contract.errors import SettingsError
from worker.contract.settings import WorkerSettings
from worker.model import gpu_memory, planning
from worker.model.files import ModelFiles
from worker.model.headers import read_header
from worker.model.memory_plan import (
    BASE,
    CHUNK_PIXELS,
    GIB,
    PLENTY,
    UNPLANNED,
    Asked,
    DoesNotFitError,
    MemoryPlan,
    Sizes,
    Texts,
    plan,
)
from worker.model.memory_sizes import sizes_of
from worker.model.placement import Choice

GPU = torch.device("cuda", 0)
#: Torch's memory, GiB, of cards of 6 to 141 GB, and less.
BUDGETS = (2.0, 2.6, 3.0, 4.0, 5.2, 6.5, 7.2, 8.0, 9.2, 10.0, 11.0, 15.0, 23.0, 47.0, 79.0, 139.0)


def weights(folder: Path, module: Any) -> Path:
    """A .safetensors file with the header of a module's weights, and a hole where these would be."""
    entries, end = {}, 0
    for name, tensor in module.state_dict().items():
        start, end = end, end + 2 * tensor.numel()
        entries[name] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": [start, end]}
    header = json.dumps(entries).encode()
    path = folder / "model.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + end)
    return path


def files_of(name: shapes.Shapes, folder: Path) -> ModelFiles:
    """A model as `worker.bench.shapes` makes it, without its weights."""
    made = shapes.architecture(name)
    with torch.device("meta"):
        modules = {
            "unet": diffusers.UNet2DConditionModel(**made.unet),
            "vae": diffusers.AutoencoderKL(**made.vae),
            **shapes.text_encoders(made.texts),
        }
    values = {}
    for part, module in modules.items():
        (folder / part).mkdir(parents=True)
        if not part.startswith("text"):
            module.save_config(folder / part)
        header = read_header(weights(folder / part, module))
        values[part] = sum(tensor.values for tensor in header.tensors.values())
    return ModelFiles(
        path=folder,
        single=None,
        source=name,
        name=name,
        revision_of=lambda: "1",
        pipeline_class=made.pipeline.__name__,
        variant=None,
        reason="",
        ships_checker=False,
        values=values,
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, ModelFiles]:
    place = tmp_path_factory.mktemp("models")
    return {"sd15": files_of("sd15", place / "sd15"), "sdxl": files_of("sdxl", place / "sdxl")}


@pytest.fixture(scope="module")
def models(files: Mapping[str, ModelFiles]) -> Mapping[str, Sizes]:
    found = {name: sizes_of(each, 2) for name, each in files.items()}
    return {name: sizes for name, sizes in found.items() if sizes is not None}


def planned(sizes: Sizes, gib: float, **asked: Any) -> MemoryPlan | None:
    """None: it does not fit."""
    try:
        return plan(sizes, int(gib * GIB), Asked(**asked))
    except DoesNotFitError:
        return None


def test_sizes_are_those_of_the_files(models: Mapping[str, Sizes]) -> None:
    """As published, millions: CLIP-L 123, OpenCLIP's bigG 695, the UNets 860 and 2,567, the VAE 84."""
    sd15, sdxl = models["sd15"], models["sdxl"]
    assert [round(size / 2e6) for size in (sd15.texts, sd15.others)] == [123, 943]
    assert round(sdxl.texts / 2e6) == 818
    # The VAE counts twice: its encoder stays in fp32.
    assert round(sdxl.others / 2e6) == 2_567 + 2 * 84
    assert (sd15.pixels, sdxl.pixels) == (512 * 512, 1_024 * 1_024)
    assert (sd15.loading, sdxl.loading > 0) == (0, True)


@pytest.mark.parametrize(
    ("model", "rows", "gib"),
    [*(("sd15", *each) for each in ((2, 2.3), (8, 2.7), (16, 3.1), (32, 3.9), (56, 5.1))), ("sdxl", 8, 8.9)],
)
def test_no_measured_peak_is_above_the_plan(
    models: Mapping[str, Sizes], model: str, rows: int, gib: float
) -> None:
    """docs/performance.md, "Start and memory", on an H100: peaks of one graph of steps, weights included."""
    sizes = models[model]
    estimate = (sizes.texts + sizes.others + BASE + rows * sizes.row) / GIB
    assert gib <= estimate <= 1.45 * gib


@pytest.mark.parametrize(
    ("model", "gib", "texts", "rows", "tiled", "compiled"),
    [
        ("sd15", 2.8, Texts.HOST, 2, True, False),
        ("sd15", 3.2, Texts.MOVED, 2, True, True),
        ("sd15", 4.0, Texts.GPU, 4, False, True),
        ("sd15", 5.2, Texts.GPU, 8, False, True),
        ("sd15", 11.0, Texts.GPU, 16, False, True),
        ("sd15", 23.0, Texts.GPU, None, False, True),
        ("sd15", 139.0, Texts.GPU, None, False, True),
        ("sdxl", 7.2, Texts.MOVED, 2, True, False),
        ("sdxl", 8.0, Texts.MOVED, 2, True, True),
        ("sdxl", 9.2, Texts.MOVED, 4, True, True),
        ("sdxl", 10.0, Texts.MOVED, 2, False, True),
        ("sdxl", 11.0, Texts.MOVED, 4, False, True),
        ("sdxl", 15.0, Texts.GPU, 6, False, True),
        ("sdxl", 23.0, Texts.GPU, 16, False, True),
        ("sdxl", 79.0, Texts.GPU, None, False, True),
        ("sdxl", 139.0, Texts.GPU, None, False, True),
    ],
)
def test_cards_and_models(
    models: Mapping[str, Sizes],
    model: str,
    gib: float,
    texts: Texts,
    rows: int | None,
    tiled: bool,
    compiled: bool,
) -> None:
    found = planned(models[model], gib)
    assert found is not None
    assert (found.texts, found.rows, found.decoding.tiled, found.compile) == (texts, rows, tiled, compiled)


@pytest.mark.parametrize("model", ["sd15", "sdxl"])
@pytest.mark.parametrize(
    "asked", [{}, {"exact": True}, {"rows": 16}, {"loras": True}, {"loras": True, "lora_memory": GIB}]
)
def test_on_a_large_gpu_nothing_changes(
    models: Mapping[str, Sizes], model: str, asked: dict[str, Any]
) -> None:
    found = planned(models[model], 139.0, **asked)
    assert found is not None
    assert (found.texts, found.rows, found.compile, found.lora_memory) == (Texts.GPU, None, True, None)
    assert found.decoding == PLENTY
    assert found.what == "all on the GPU"


@pytest.mark.parametrize("model", ["sd15", "sdxl"])
@pytest.mark.parametrize("asked", [{}, {"compile": False}, {"exact": True}, {"rows": 2}, {"rows": 56}])
def test_more_memory_is_never_worse_and_the_log_says_what_was_done(
    models: Mapping[str, Sizes], model: str, asked: dict[str, Any]
) -> None:
    order = list(Texts)
    found = [planned(models[model], gib, **asked) for gib in BUDGETS]
    assert found[-1] is not None
    for less, more in pairwise(found):
        if less is None:
            continue
        assert more is not None
        assert order.index(more.texts) <= order.index(less.texts)
        assert more.decoding.tiled <= less.decoding.tiled
        assert more.decoding.pixels >= less.decoding.pixels
    for each in filter(None, found):
        assert (each.texts in each.what) or each.texts is Texts.GPU
        assert ("tiles" in each.what) == each.decoding.tiled
        assert ("not compiled" in each.what) == (not each.compile)
        assert (f"at most {each.rows} rows" in each.what) == (each.rows is not None)
        assert each.decoding.pixels <= CHUNK_PIXELS


def test_what_the_settings_ask_for_is_part_of_the_plan(models: Mapping[str, Sizes]) -> None:
    sdxl = models["sdxl"]
    plain = planned(sdxl, 11.0, compile=False)
    assert plain is not None
    assert plain.texts is Texts.GPU
    assert plain.compile, "it is the settings' own choice"
    less = planned(sdxl, 9.2, compile=False)
    assert less is not None
    assert (less.texts, less.rows, less.decoding.tiled) == (Texts.MOVED, 2, False)
    one = planned(sdxl, 11.0, rows=2)
    assert one is not None
    assert (one.texts, one.rows) == (Texts.GPU, None), "two rows fit beside the text encoders"
    assert planned(sdxl, 11.0, loras=True, lora_memory=4 * GIB) is None
    lent = planned(sdxl, 11.0, loras=True)
    assert lent is not None
    assert lent.lora_memory is not None
    assert 0 < lent.lora_memory < GIB


def test_naive_attention_and_fp32_take_more(files: Mapping[str, ModelFiles]) -> None:
    half, naive, whole = (
        sizes_of(files["sd15"], width, naive=is_naive)
        for width, is_naive in ((2, False), (2, True), (4, False))
    )
    assert half is not None
    assert naive is not None
    assert whole is not None
    # One H200: 16.9 GiB at 32 rows beside 2.0 (docs/performance.md).
    assert 16.9 / 32 < naive.row / GIB < 1.3 * 16.9 / 32
    assert whole.row == 2 * half.row
    assert whole.texts == 2 * half.texts


def test_a_model_with_configs_of_another_kind_is_not_planned(files: Mapping[str, ModelFiles]) -> None:
    assert sizes_of(dataclasses.replace(files["sd15"], path=Path("/nowhere")), 2) is None


class Card:
    """A GPU that is only numbers: what torch says of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, total: float, free: float | None = None) -> None:
        self.fraction, self.reserved = 1.0, 0
        self.total = int(total * GIB)
        self.free = self.total if free is None else int(free * GIB)
        properties = SimpleNamespace(total_memory=self.total)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (self.free, self.total))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: self.reserved)
        monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", self._limit)
        monkeypatch.setattr(gpu_memory, "_limits", {})

    def _limit(self, fraction: float, device: torch.device) -> None:
        self.fraction = fraction


def choices(files: ModelFiles, **settings: Any) -> tuple[MemoryPlan, tuple[Choice, ...]]:
    return planning.planned(files, WorkerSettings(**settings), GPU, torch.float16, helps=False)


def test_a_limit_bounds_torch_and_the_plan(
    monkeypatch: pytest.MonkeyPatch, files: Mapping[str, ModelFiles]
) -> None:
    card = Card(monkeypatch, total=140)
    found, said = choices(files["sdxl"], gpu_memory="11.8GiB")
    assert round(card.fraction * 140, 2) == 11.0
    assert (found.texts, found.rows) == (Texts.MOVED, 4)
    assert [each.what for each in said] == ["GPU memory", "memory"]
    assert "11.8 of 140.0 GiB" in said[0].reason
    assert "of 11.0 GiB planned" in said[1].reason
    card.reserved = 10 * GIB
    assert round(gpu_memory.room(GPU) / GIB, 1) == 1.0
    assert round(gpu_memory.all_of(GPU) / GIB, 1) == 11.0


def test_without_a_limit_what_is_free_counts(
    monkeypatch: pytest.MonkeyPatch, files: Mapping[str, ModelFiles]
) -> None:
    card = Card(monkeypatch, total=140, free=11.4)
    found, said = choices(files["sdxl"])
    assert card.fraction == 1.0
    assert found.texts is Texts.MOVED
    assert [each.what for each in said] == ["memory"]
    assert gpu_memory.room(GPU) == card.free


@pytest.mark.parametrize(
    ("settings", "total", "parts"),
    [
        (
            {},
            6.0,
            [
                "The model sdxl needs 6.8 GiB of the GPU's memory at least, 5.1 of them for weights, and 5.6",
                " of its 6.0 GiB are free: serve a smaller model or use a GPU with more memory.",
            ],
        ),
        ({"gpu_memory": "6GiB"}, 24.0, ["MEMORY=6GiB leaves 5.2 of its 24.0 GiB: set it to 7.7GiB"]),
        ({"loras": "x", "lora_memory": 4 * GIB}, 8.0, ["lower SMALLCAT_LORA_MEMORY"]),
        ({"attention": "naive"}, 6.0, ["set another SMALLCAT_ATTENTION than naive"]),
        ({"gpu_memory": "30GiB"}, 24.0, ["SMALLCAT_GPU_MEMORY is 30GiB, but the GPU has 24.0 GiB: lower it"]),
        ({"gpu_memory": "0.02"}, 24.0, ["SMALLCAT_GPU_MEMORY is 0.02, 0.5 GiB of this GPU", "raise it."]),
    ],
)
def test_too_small_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch,
    files: Mapping[str, ModelFiles],
    settings: dict[str, Any],
    total: float,
    parts: list[str],
) -> None:
    Card(monkeypatch, total=total)
    with pytest.raises(SettingsError) as caught:
        choices(files["sdxl"], **settings)
    assert all(part in str(caught.value) for part in parts), caught.value
    assert str(caught.value).count(". ") == 0


def test_what_too_small_names_is_enough(
    monkeypatch: pytest.MonkeyPatch, files: Mapping[str, ModelFiles]
) -> None:
    Card(monkeypatch, total=24)
    found, _ = choices(files["sdxl"], gpu_memory="7.7GiB")
    assert found.texts is Texts.HOST


def test_a_worker_without_a_gpu_says_that_the_limit_has_no_effect(files: Mapping[str, ModelFiles]) -> None:
    for limit, said in (("", ()), ("0.5", (planning.NO_GPU,))):
        settings = WorkerSettings(gpu_memory=limit)
        found = planning.planned(files["sd15"], settings, torch.device("cpu"), torch.float32, helps=False)
        assert found == (UNPLANNED, said)


def test_a_process_that_compiles_is_limited_and_plans_nothing(
    monkeypatch: pytest.MonkeyPatch, files: Mapping[str, ModelFiles]
) -> None:
    card = Card(monkeypatch, total=24)
    settings = WorkerSettings(gpu_memory=f"{6 * GIB}B")
    assert planning.planned(files["sdxl"], settings, GPU, torch.float16, helps=True) == (UNPLANNED, ())
    assert round(card.fraction * 24, 1) == 5.2


def test_the_table_of_small_gpus_is_what_is_planned(models: Mapping[str, Sizes]) -> None:
    page = (Path(__file__).parents[3] / "docs" / "sizing.md").read_text("utf-8")
    rows = re.findall(r"^\| ([\d.]+) \(\d+ GB\) \| (.+) \| (.+) \|$", page, flags=re.MULTILINE)
    assert len(rows) > 5
    for gib, *said in rows:
        assert said == [in_short(planned(models[model], float(gib))) for model in ("sd15", "sdxl")], gib


def in_short(found: MemoryPlan | None) -> str:
    """A plan as the page has it."""
    if found is None:
        return "refused"
    if (found.rows, found.texts) == (None, Texts.GPU):
        return "as on any larger card"
    words = ["all on the GPU" if found.texts is Texts.GPU else "text encoders moved", f"{found.rows} rows"]
    words += ["in tiles"] * found.decoding.tiled + ["not compiled"] * (not found.compile)
    return ", ".join(words)
