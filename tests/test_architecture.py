"""The architecture: which folder may import which, and which libraries each may know.

The two tables are the document. They are read from the source with `ast`, so that imports inside functions
and for type checkers count as well.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

#: Each folder, or module beside folders, and what it imports. Everybody may import `worker.contract`.
FOLDERS = {
    "worker.tasks": "worker.jobs worker.device worker.model worker.broker worker.celery worker.health",
    "worker.tasks worker.jobs": "worker.engine worker.state worker.storage worker.tracing",
    "worker.device": "worker.engine worker.model",
    "worker.bench": "worker.device worker.engine worker.model",
    "worker.celery": "worker.broker",
    "producer": "producer.client producer.cli producer.ingest",
    "producer.cli": (
        "producer.client producer.gallery producer.http producer.ingest producer.prompts producer.webhooks"
    ),
    "producer.http producer.client producer.ingest": "worker.celery worker.tracing",
    "producer.http": (
        "producer.client producer.gallery producer.ingest producer.prompts producer.session worker.state "
        "worker.health"
    ),
    "producer.ingest": "producer.prompts worker.broker",
    "producer.webhooks": "producer.session worker.state worker.health worker.tracing",
    "producer.cli producer.client producer.gallery producer.ingest producer.prompts": "producer.session",
    "producer.cli producer.ingest producer.session": "worker.state worker.storage",
}

#: What one module does beside that, on a machine that may have no torch: inside a function.
EXCEPTIONS = {
    "producer.cli.doctor": {"worker.device.attention", "worker.model.placement"},
    "producer.cli.warm": {"worker.device.compiling.filling"},
}

#: A library, or several that come together, and the only folders or modules that import it.
DOORS = {
    "torch diffusers transformers xformers accelerate safetensors huggingface_hub": (
        "worker.device worker.model worker.bench"
    ),
    "boto3 botocore": "worker.storage",
    "prometheus_client": "worker.jobs.metrics producer.cli.metrics producer.webhooks.metrics",
    "celery": "worker.celery worker.tasks worker.broker.event_batches worker.broker.stop_signals",
    "redis": (
        "worker.contract.redis_pool worker.state.redis_client "
        "worker.broker.addresses worker.broker.channel worker.broker.fetching worker.broker.lease"
    ),
    "fastapi starlette uvicorn": "producer.http",
    "httpcore2": "producer.webhooks.connection",
    "standardwebhooks": "producer.webhooks.payload",
    "opentelemetry": "worker.tracing.parents worker.tracing.spans worker.tracing.submissions",
    "kombu": (
        "worker.broker worker.celery worker.tasks worker.state.redis_client "
        "producer.client producer.http.sending producer.ingest"
    ),
    "click": "producer.cli worker.bench",
    "matplotlib": "worker.bench.plots",
    "rich textual_image": "producer.cli worker.bench",
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
                # `from worker.jobs import metrics` is of a module; `from ... import Job` is of a name.
                whole = f"{node.module}.{alias.name}"
                yield Import(name, whole if whole in MODULES else str(node.module), node.lineno, lazy, typing)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            for given in node.args[:1]:
                if isinstance(given, ast.Constant):
                    yield Import(name, str(given.value), node.lineno, lazy, typing)
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
OURS = [
    each
    for each in IMPORTS
    if each.imported.split(".")[0] in ("worker", "producer", "deploy", "tests", "smallcat")
]


def folder(module: str) -> str:
    """The folder that a module is in, or the module itself where it stands beside folders."""
    return ".".join(module.split(".")[:2]).removesuffix(".__main__")


def arrows(imports: Iterable[Import]) -> set[tuple[str, str]]:
    """From folder to folder, without what everybody may do."""
    found = {
        (folder(each.importer), folder(each.imported))
        for each in imports
        if each.imported not in EXCEPTIONS.get(each.importer, ()) or not each.lazy
    }
    return {(start, end) for start, end in found if start != end and end != "worker.contract"}


DRAWN = {(start, end) for starts, ends in FOLDERS.items() for start in starts.split() for end in ends.split()}


def shown(imports: Iterable[Import]) -> str:
    return "\n".join(str(each) for each in imports)


def test_folders_import_as_drawn_and_no_other_way() -> None:
    new = [each for each in OURS if arrows([each]) - DRAWN]
    assert not new, f"arrows that the table does not have:\n{shown(new)}"


def test_the_table_draws_no_arrow_that_is_gone() -> None:
    alive = arrows(OURS)
    assert {(start, end) for start, end in DRAWN if (start, end) not in alive} == set()
    assert len(FOLDERS) <= 13


def test_the_table_leads_one_way() -> None:
    ends = {start: {end for first, end in DRAWN if first == start} for start, _ in DRAWN}
    left = dict(ends)
    while left:
        over = [start for start, ends_of in left.items() if not ends_of & set(left)]
        assert over, f"these lead back to themselves: {', '.join(left)}"
        for start in over:
            del left[start]


def is_within(module: str, doors: Iterable[str]) -> str | None:
    """The door that a module is, or is behind."""
    return next((door for door in doors if module == door or module.startswith(f"{door}.")), None)


@pytest.mark.parametrize("libraries", DOORS)
def test_a_library_enters_by_its_own_door(libraries: str) -> None:
    names, doors = set(libraries.split()), DOORS[libraries].split()
    uses = [each for each in IMPORTS if each.imported.split(".")[0] in names and not each.typing]
    wrong = [each for each in uses if not is_within(each.importer, doors)]
    assert not wrong, shown(wrong)
    assert set(doors) == {is_within(each.importer, doors) for each in uses}, "the table names closed doors"


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
        f"{each} and is reached from it"
        for each in OURS
        if not each.typing and each.importer in reached(each.imported, OURS)
    ]
    assert not loops, "\n".join(loops)


@pytest.mark.parametrize(
    "start",
    ["worker.engine.engine", "worker.jobs.handler", "worker.tasks", "worker.celery", "producer.cli.main"],
)
def test_the_loop_and_delivery_load_no_torch_by_themselves(start: str) -> None:
    """The engine is given its runner. Only `tasks` makes one, when all that is quick to check is well."""
    at_start = [each for each in IMPORTS if not each.lazy and not each.typing]
    torch = next(iter(DOORS)).split()
    assert not [name for name in reached(start, at_start) if name.split(".")[0] in torch]


def test_celerys_module_can_hardly_fail_to_import() -> None:
    """Celery reports an import that fails in it as "Module 'worker' has no attribute 'celery'"."""
    ours = {name for name in reached("worker.celery", IMPORTS) if name.startswith(("worker", "producer"))}
    contract = [
        "a1111_syntax",
        "choices",
        "settings",
        "redis_url",
        "errors",
        "explain",
        "gpu_share",
        "given_file",
        "limits",
        "job_checks",
        "job_fields",
        "job_parameters",
        "lora_tags",
        "loras",
        "scheduler_names",
        "spelling",
        "stored_jobs",
        "webhook",
    ]
    assert ours == {
        "worker.celery",
        "worker.broker.transport",
        *(f"worker.contract.{name}" for name in contract),
    }


def test_each_folder_says_what_is_behind_its_door() -> None:
    for name, path in MODULES.items():
        if path.name == "__init__.py":
            text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            assert "`" in text, f"{name}: say in one sentence what is in it, and which module is its door"


def test_no_module_only_hands_on_what_others_have() -> None:
    for name, path in MODULES.items():
        if name in ("producer", "producer.__main__", "smallcat"):
            continue
        body = ast.parse(path.read_text(encoding="utf-8")).body
        imports = [node for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
        rest = [
            node
            for node in body
            if not isinstance(node, ast.Import | ast.ImportFrom | ast.Expr)
            and not (isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__")
        ]
        assert rest or len(imports) == 0, f"{name} has nothing of its own"


#: Lines of a file and of a function, at most.
MAX_LINES, MAX_FUNCTION = 400, 60


def test_no_file_and_no_function_is_too_long() -> None:
    ours = modules("worker", "producer", "deploy")
    ours |= {str(path): path for path in (ROOT / "worker" / "demo").rglob("*.py")}
    files = [*ours.values(), *(ROOT / "worker").rglob("*.lua"), *(ROOT / "producer").rglob("*.js")]
    long = [
        f"{path.relative_to(ROOT)}: {lines} lines"
        for path in files
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > MAX_LINES
    ]
    for path in ours.values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > MAX_FUNCTION:
                    long.append(f"{path.relative_to(ROOT)}: {node.name} has {lines} lines")
    assert not long, "\n".join(long)


def test_the_table_would_notice(monkeypatch: pytest.MonkeyPatch) -> None:
    """An import against the arrows is one, wherever it hides."""
    source = (
        "def f():\n    if x:\n        from worker import tasks\n    import torch.nn\n"
        "    return importlib.import_module('worker.celery')\n"
    )
    monkeypatch.setattr(Path, "read_text", lambda self, encoding: source)
    found = list(imports_of("worker.contract.job", Path("job.py")))
    named = [(each.imported, each.lazy) for each in found]
    assert named == [("worker.tasks", True), ("torch.nn", True), ("worker.celery", True)]
    assert arrows(found[:1]) - DRAWN == {("worker.contract", "worker.tasks")}
