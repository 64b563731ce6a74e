"""The architecture: which module may import which, and which libraries each may know.

This table is the document. It is read from the source with `ast`, so that imports inside functions count as
well. To add a module, give it a place: as far right as it can be.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

#: The worker, from left to right: a module may import what stands in a line below its own, nothing else.
LINES = [
    # Puts a worker process together, and takes it apart. The Celery task.
    "tasks",
    # The way of one job through a worker; what the worker says and hears beside it.
    "render_service heartbeat",
    # The loop, and what computes for it. The engine is given its runner and knows none.
    "engine",
    # The benchmark: a program of its own.
    "bench.__main__",
    "bench.measuring bench.plots bench.tables",
    "bench.kernels bench.runs",
    "bench.report bench",
    "model_runner",
    # Decisions: no threads but their own, no torch, no services.
    "runner",
    "batcher step_cost decoding quarantine",
    # Models of full size with random weights, to measure with.
    "shapes",
    # All of torch: a job on board, the step, what makes it fast, what comes after the last.
    "render decoder",
    "graphs",
    "arrival denoiser device_errors compiler",
    "rewrites",
    "attention samplers text",
    "pipeline",
    "model_files gpu_lock",
    "model_index",
    # Delivery: Celery's transport, of which others see `celery` and `transport`.
    "channel",
    "qos",
    "lease",
    "ledger celery",
    "transport",
    # One door to each service.
    "storage_process",
    "storage metrics events",
    "fleet",
    "records",
    "redis_client record_scripts",
    # The contract: what both sides share.
    "parameters images",
    "settings",
    "job",
    "errors versions",
]

#: What a producer shares with a worker. It reaches no other module of the worker.
SHARED = "celery transport fleet records redis_client storage parameters images settings job errors"

#: And what only one module of the producer does, on a machine that may have no torch: inside a function.
EXCEPTIONS = {"producer.doctor": {"worker.attention", "worker.pipeline"}}

#: A library, or several that come together, and the only modules that import it. `*` is all below.
DOORS = {
    "torch diffusers transformers xformers accelerate safetensors huggingface_hub": (
        "worker.model_runner worker.render worker.graphs worker.decoder worker.arrival worker.denoiser "
        "worker.device_errors worker.compiler worker.attention worker.rewrites worker.samplers worker.text "
        "worker.pipeline worker.model_files worker.shapes worker.bench.kernels worker.bench.runs"
    ),
    "boto3 botocore": "worker.storage",
    "prometheus_client": "worker.metrics",
    "celery": "worker.celery worker.tasks worker.events",
    "redis": "worker.redis_client worker.channel worker.lease",
    "kombu": (
        "worker.tasks worker.celery worker.transport worker.channel worker.qos worker.lease "
        "worker.redis_client producer.client producer.ingest"
    ),
    "click": "producer.cli producer.ingest_command worker.shapes worker.bench.__main__",
    "matplotlib": "worker.bench.plots",
    "rich textual_image": (
        "producer.display producer.ingest_display producer.ingest_command "
        "worker.bench.__main__ worker.bench.tables"
    ),
}


@dataclass(frozen=True)
class Import:
    """That a module imports another one."""

    importer: str
    imported: str
    line: int
    #: Not at the start of a process: inside a function.
    lazy: bool
    #: Read by type checkers alone.
    typing: bool

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.imported}"


def modules(*packages: str) -> dict[str, Path]:
    """The modules of `packages` by name; the demo's training scripts are apart."""
    found = {}
    for package in packages:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            if not name.startswith("worker.demo"):
                found[name] = path
    return found


MODULES = modules("worker", "producer")


def imports_of(name: str, path: Path) -> Iterator[Import]:
    """All imports in a module, wherever they stand."""

    def walk(node: ast.AST, lazy: bool, typing: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(name, alias.name, node.lineno, lazy, typing)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}:{node.lineno}: a relative import hides where it leads"
            for alias in node.names:
                # `from worker import metrics` is of a module; `from worker.job import Job` is of a name.
                whole = f"{node.module}.{alias.name}"
                yield Import(name, whole if whole in MODULES else str(node.module), node.lineno, lazy, typing)
        elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            for child in node.body:
                yield from walk(child, lazy, True)
            for child in node.orelse:
                yield from walk(child, lazy, typing)
        else:
            inside = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            for child in ast.iter_child_nodes(node):
                yield from walk(child, inside, typing)

    yield from walk(ast.parse(path.read_text(encoding="utf-8")), False, False)


IMPORTS = [each for name, path in MODULES.items() for each in imports_of(name, path)]
#: Between modules of this project.
ARROWS = [
    each for each in IMPORTS if each.imported.split(".")[0] in ("worker", "producer", "deploy", "tests")
]
#: Line of each module of the worker, counted from the left.
PLACE = {f"worker.{name}": number for number, line in enumerate(LINES) for name in line.split()}


def told(imports: Iterable[Import]) -> str:
    return "\n".join(str(each) for each in imports)


def test_every_module_of_the_worker_has_its_place() -> None:
    real = {name for name in MODULES if name.startswith("worker.")}
    assert set(PLACE) - real == set(), "the table names modules that are gone"
    assert real - set(PLACE) == set(), "modules without a place: put them into LINES"


def test_the_worker_imports_from_left_to_right() -> None:
    wrong = [
        arrow
        for arrow in ARROWS
        if arrow.importer in PLACE and not PLACE.get(arrow.imported, -1) > PLACE[arrow.importer]
    ]
    assert not wrong, told(wrong)


def test_the_producer_reaches_no_more_of_the_worker_than_they_share() -> None:
    shared = {f"worker.{name}" for name in SHARED.split()}
    wrong = [
        arrow
        for arrow in ARROWS
        if arrow.importer.startswith("producer") and not arrow.imported.startswith("producer")
        if arrow.imported not in shared
        and not (arrow.lazy and arrow.imported in EXCEPTIONS.get(arrow.importer, ()))
    ]
    assert not wrong, told(wrong)


@pytest.mark.parametrize("libraries", DOORS)
def test_a_library_enters_by_its_own_door(libraries: str) -> None:
    names, doors = set(libraries.split()), set(DOORS[libraries].split())
    uses = [each for each in IMPORTS if each.imported.split(".")[0] in names and not each.typing]
    wrong = [each for each in uses if each.importer not in doors]
    assert not wrong, told(wrong)
    assert doors == {each.importer for each in uses}, "the table names doors that are closed"


def reached(start: str, arrows: Iterable[Import]) -> set[str]:
    """All modules that importing `start` loads by `arrows`."""
    by_importer: dict[str, set[str]] = {}
    for arrow in arrows:
        by_importer.setdefault(arrow.importer, set()).add(arrow.imported)
    found, left = {start}, [start]
    while left:
        for name in by_importer.get(left.pop(), ()):
            if name not in found:
                found.add(name)
                left.append(name)
    return found


def test_no_module_leads_back_to_itself() -> None:
    loops = [
        f"{arrow} and is reached from it"
        for arrow in ARROWS
        if not arrow.typing and arrow.importer in reached(arrow.imported, ARROWS)
    ]
    assert not loops, "\n".join(loops)


@pytest.mark.parametrize("start", ["worker.engine", "worker.render_service", "worker.tasks", "worker.celery"])
def test_the_loop_and_delivery_load_no_torch_by_themselves(start: str) -> None:
    """The engine is given its runner. Only `tasks` makes one, when all that is quick to check is well."""
    at_start = [each for each in IMPORTS if not each.lazy and not each.typing]
    torch = DOORS[next(iter(DOORS))].split()
    assert reached(start, at_start).isdisjoint({"torch", "diffusers", "transformers", *torch})


def test_celerys_module_can_hardly_fail_to_import() -> None:
    """Celery reports an import that fails in it as "Module 'worker' has no attribute 'celery'"."""
    ours = {name for name in reached("worker.celery", IMPORTS) if name.startswith(("worker", "producer"))}
    assert ours == {f"worker.{name}" for name in ("celery", "transport", "settings", "job", "errors")}


def test_the_table_would_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    """An import against the arrows is one, wherever it hides."""
    source = "def f():\n    if x:\n        from worker import tasks\n    import torch.nn\n"
    monkeypatch.setattr(Path, "read_text", lambda self, encoding: source)
    assert [(each.imported, each.lazy) for each in imports_of("worker.job", Path("job.py"))] == [
        ("worker.tasks", True),
        ("torch.nn", True),
    ]
