"""Makes the generated parts of the documents from the code: `python -m tests.docs`.

A generated part stands between two marks, `<!-- made by tests.docs: NAME -->` and `<!-- end of NAME -->`.
`PARTS` has the function that makes each. `tests/test_docs.py` fails when a document is stale.
"""

from __future__ import annotations

import ast
import enum
import importlib
import inspect
import itertools
import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import click
import prometheus_client
from pydantic_core import PydanticUndefined

import producer
from deploy.local import main as local
from producer.cli import main as command_line
from producer.ingest.download import FIELDS
from producer.ingest.manifest import COLUMNS
from producer.ingest.types import Outcome
from tests.faults.earlier import EARLIER
from tests.test_architecture import FOLDERS
from worker.contract import errors
from worker.contract.choices import SAMPLERS, NoiseSchedule, Scheduler
from worker.contract.job import FORMAT_VERSION, JOB_FIELDS, WRITTEN_FIELDS, Job
from worker.contract.job_fields import FieldEntry, help_lines
from worker.contract.record import Attempt, State, Timings
from worker.contract.scheduler_names import OFFERED
from worker.contract.settings import (
    ProducerSettings,
    ServerSettings,
    Settings,
    WebhookSettings,
    WorkerSettings,
)
from worker.jobs import metrics

ROOT = Path(__file__).parent.parent
#: Every document that the project ships, and the tests read.
DOCUMENTS = [
    *(
        ROOT / name
        for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "worker/demo/README.md")
    ),
    *sorted((ROOT / "docs").glob("*.md")),
]

#: Job fields that are options of `smallcat submit`.
_SUBMIT_OPTIONS = {
    option.name for option in command_line.cli.commands["submit"].params if isinstance(option, click.Option)
}

_PART = re.compile(r"(<!-- made by tests\.docs: ([\w-]+) -->\n).*?(<!-- end of \2 -->)", re.DOTALL)

#: What a user does about an error; a class that is not here has its base class's remedy.
REMEDIES: dict[type[errors.SmallcatError], str] = {
    errors.SmallcatError: "Read the text: it names the value, the limit and the remedy.",
    errors.CallerError: "Correct what the text names.",
    errors.InvalidJobError: "Correct the fields that the text names.",
    errors.InputError: "Submit the job again with the picture.",
    errors.PromptFileError: "Correct the file or the option that the text names, and run the command again.",
    errors.UnknownModelError: "Start a worker for that model, or submit again without `revision`.",
    errors.UnknownJobError: "Check the id. An expired record is looked up in the bucket: set `S3_BUCKET`.",
    errors.JobCancelledError: "Nothing. Submit the job again to render it after all.",
    errors.SettingsError: "Correct the variable: see [settings](settings.md).",
    errors.JobError: "See the job's attempts: `smallcat failed show ID`.",
    errors.RenderError: "Read the worker's log. `smallcat failed retry ID` tries again.",
    errors.NotFiniteError: "Use another `SMALLCAT_DTYPE` (bf16 or fp32), or other parameters.",
    errors.JobTooLargeError: "Ask for a smaller size, or use a GPU with more memory.",
    errors.JobTimeoutError: "Ask for fewer steps or a smaller size, or raise `SMALLCAT_JOB_TIMEOUT_S`.",
    errors.PoisonJobError: "Read the log of the workers that died. `smallcat failed retry ID` tries again.",
    errors.MachineError: "Nothing: another worker takes the job. Read the worker's log.",
    errors.OutOfMemoryError: "Nothing: the engine tries again with fewer rows.",
    errors.DeviceError: "Let the supervisor start the worker again; check the GPU and its driver.",
    errors.EngineStoppedError: "Nothing: another worker takes the job.",
    errors.EngineFailedError: "Nothing: another worker takes the job. Read the failed one's log.",
    errors.BucketRefusedError: "Give the worker its rights again: `smallcat doctor` says what is refused.",
    errors.MissingFileError: "Put the file where a worker looks for it, or submit the job again.",
    errors.NewerMessageError: "Upgrade the workers before the producers.",
    errors.ServiceError: "Run `smallcat doctor`.",
    errors.QueueError: "Check `REDIS_URL`, and that Redis is up and has memory. Submitting again is safe.",
    errors.StorageError: "Check the bucket and the `AWS_*` variables.",
    errors.PermanentStorageError: "Do what the text says: create the bucket, correct the keys, or make room.",
}


# Reading the code


def comments(owner: ModuleType | type) -> dict[str, str]:
    """The `#:` lines over each plain assignment of a module, or of an enumeration, by name, in one line."""
    source = textwrap.dedent(inspect.getsource(owner))
    lines = source.splitlines()
    tree: Any = ast.parse(source)
    found = {}
    for node in tree.body[0].body if isinstance(owner, type) else tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            above = [line.strip() for line in lines[: node.lineno - 1]]
            block = list(itertools.takewhile(lambda line: line.startswith("#:"), reversed(above)))
            if block:
                found[node.targets[0].id] = " ".join(line[2:].strip() for line in reversed(block))
    return found


def sentence(text: str | None) -> str:
    """The first paragraph of a docstring, in one line."""
    return " ".join((text or "").strip().split("\n\n")[0].split())


def _cell(text: str) -> str:
    """A cell's text in Markdown: what would part cells or be markup is escaped, but for code."""
    parts = text.replace("|", "\\|").split("`")
    parts[::2] = (part.replace("__", r"\_\_").replace("*", r"\*").replace("<", "&lt;") for part in parts[::2])
    return "`".join(parts)


def _table(headings: str, rows: Iterator[tuple[str, ...]]) -> str:
    names = headings.split(", ")
    lines = [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
    lines += [f"| {' | '.join(_cell(cell) for cell in row)} |" for row in rows]
    return "\n".join(lines) + "\n"


def _default(value: Any) -> str:
    if value is PydanticUndefined or value is None or value in ("", {}, []):
        return ""
    if isinstance(value, bool):
        return f"`{int(value)}`"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


# The parts


def settings() -> str:
    """Every environment variable that is read."""

    def rows() -> Iterator[tuple[str, ...]]:
        for kind, reader in (
            (Settings, "all"),
            (WorkerSettings, "worker"),
            (ProducerSettings, "producer"),
            (ServerSettings, "HTTP API"),
            (WebhookSettings, "webhooks"),
        ):
            texts = help_lines(kind)
            for name, field in kind.model_fields.items():
                if name in kind.__annotations__:
                    yield f"`{kind.variable(name)}`", reader, _default(field.default), texts[name]

    return _table("Variable, Read by, Default, Meaning", rows())


def job_fields() -> str:
    """Every field of `Job`: its type, its default and its limits."""
    rows = (
        (f"`{name}`", _type(entry), _field_default(entry), help_lines(Job)[name])
        for name, entry in JOB_FIELDS.items()
    )
    return _table("Field, Type, Default, Meaning and limits", rows)


def job_field_names() -> str:
    """What every field of `Job` is called elsewhere."""

    def rows() -> Iterator[tuple[str, ...]]:
        for name, entry in WRITTEN_FIELDS.items():
            yield (
                f"`{name}`",
                f"`{entry.option}`" if name in _SUBMIT_OPTIONS else "",
                ", ".join(f"`{heading}`" for heading in entry.all_headings),
                f"`--{entry.a1111_option}`" if entry.a1111_option else "",
                f"`{entry.infotext}`" if entry.is_hashed and not entry.is_prompt else "",
                f"`{entry.diffusers}`" if entry.diffusers else "",
            )

    return _table("Field, Command line, Other headings, A1111 option, Infotext, diffusers", rows())


def schedulers() -> str:
    """Every scheduler that a job can ask for."""
    # Torch and diffusers load with it.
    from worker.device.schedulers.ancestral import OURS
    from worker.device.schedulers.samplers import CLASSES

    def rows() -> Iterator[tuple[str, ...]]:
        for scheduler in Scheduler:
            name, options = CLASSES.get(scheduler, ("the model's own", {}))
            name = "none: k-diffusion's rule" if name in OURS else name
            shown = f"`{name}`" if options or name.endswith("Scheduler") else name
            asked = ", ".join(f"`{option}={value}`" for option, value in options.items())
            yield f"`{scheduler}`", shown, asked, f"`{SAMPLERS[scheduler]}`"

    return _table("Name, diffusers class, Its options, AUTOMATIC1111's name", rows())


def noise_schedules() -> str:
    """Which schedules each scheduler is offered with."""
    schedules = [each for each in NoiseSchedule if each is not NoiseSchedule.DEFAULT]

    def rows() -> Iterator[tuple[str, ...]]:
        for scheduler, offered in OFFERED.items():
            if scheduler is not Scheduler.DEFAULT:
                yield f"`{scheduler}`", *("yes" if each in offered else "" for each in schedules)

    return _table(", ".join(("Scheduler", *(f"`{each}`" for each in schedules))), rows())


def manifest_columns() -> str:
    """The columns of a CSV manifest."""
    return ", ".join(f"`{name}`" for name in COLUMNS) + ".\n"


def name_fields() -> str:
    """The fields of a template of `--name`."""
    return ", ".join(f"`{name}`" for name in FIELDS) + ".\n"


def _type(entry: FieldEntry) -> str:
    if entry.choices:
        return ", ".join(f"`{choice}`" for choice in entry.choices)
    return {int: "integer", float: "number", bool: "boolean", str: "text", dict: "JSON object", list: "list"}[
        entry.kind
    ]


def _field_default(entry: FieldEntry) -> str:
    if entry.is_required:
        return "required"
    if entry.is_nullable:
        return "the model's own"
    if entry.is_filled_by_fleet:
        return "the newest served"
    if entry.is_left_open:
        return "see there"
    if entry.is_made:
        return "empty" if entry.kind is dict else "drawn"
    if entry.kind is bool:
        return f"`{str(entry.default).lower()}`"
    return _default(entry.default) or "empty"


def error_classes() -> str:
    """The tree of errors, and for each class when it is raised, what to do, and the exit code."""
    tree = re.search(r"^SmallcatError\n(?:.+\n)+", textwrap.dedent(_indented(errors.__doc__)), re.MULTILINE)
    assert tree is not None

    def rows(kind: type[errors.SmallcatError]) -> Iterator[tuple[str, ...]]:
        when = sentence(kind.__doc__).removeprefix("Raised ")
        code = command_line._exit_code(kind("x"))
        yield f"`{kind.__name__}`", when[0].upper() + when[1:], REMEDIES[kind], str(code)
        for child in kind.__subclasses__():
            yield from rows(child)

    table = _table("Class, Raised, What to do, Exit code", rows(errors.SmallcatError))
    return f"```text\n{tree[0]}```\n\n{table}"


def _indented(docstring: str | None) -> str:
    """The indented lines of a docstring: what is drawn there."""
    return "".join(f"{line}\n" for line in (docstring or "").splitlines() if line.startswith("    "))


def metric_names() -> str:
    """Every Prometheus metric of a worker."""
    texts = comments(metrics)

    def rows() -> Iterator[tuple[str, ...]]:
        for name, value in vars(metrics).items():
            if isinstance(
                value,
                prometheus_client.Counter
                | prometheus_client.Gauge
                | prometheus_client.Histogram
                | prometheus_client.Info,
            ):
                metric = next(iter(value.describe()))
                suffix = {"counter": "_total", "info": "_info"}.get(metric.type, "")
                labels = ", ".join(f"`{label}`" for label in value._labelnames)
                yield f"`{metric.name}{suffix}`", metric.type, labels, texts[name]
        gauge = next(iter(metrics.MemoryCollector.collect(cast(Any, SimpleNamespace(_read=dict)))))
        yield f"`{gauge.name}`", gauge.type, "`what`", f"{gauge.documentation}."

        device = SimpleNamespace(utilisation=lambda: None, out_of_memory=0, padded_rows=0)
        for found in metrics.DeviceCollector.collect(cast(Any, SimpleNamespace(_device=device))):
            suffix = "_total" if found.type == "counter" else ""
            yield f"`{found.name}{suffix}`", found.type, "", f"{found.documentation}."

    return _table("Metric, Type, Labels, Meaning", rows())


def folders() -> str:
    """Every folder of code, with the first sentence of its docstring."""

    def rows() -> Iterator[tuple[str, ...]]:
        for package in ("worker", "producer", "deploy"):
            for path in sorted((ROOT / package).rglob("__init__.py")):
                name = path.parent.relative_to(ROOT).as_posix()
                if "training" not in name:
                    yield f"`{name}/`", sentence(ast.get_docstring(ast.parse(path.read_text("utf-8"))))

    return _table("Folder, What it is", rows())


def arrows() -> str:
    """Which folder imports which, from the table that `tests/test_architecture.py` holds the code to."""
    found: dict[str, set[str]] = {}
    for starts, ends in FOLDERS.items():
        for start in starts.split():
            found.setdefault(start, set()).update(ends.split())
    rows = (
        (f"`{start}`", ", ".join(f"`{end}`" for end in sorted(ends))) for start, ends in sorted(found.items())
    )
    return _table("Folder or module, Imports", rows)


def commands() -> str:
    """The `smallcat` command with all its commands and their options."""
    jobs = {
        option.opts[0]: option
        for option in _options(command_line.cli.commands["submit"])
        if option.name in Job.model_fields
    }
    return "\n".join(
        _command(f"smallcat {name}", command, jobs) for name, command in _commands(command_line.cli)
    )


def local_command() -> str:
    """The command that runs the embedded stack."""
    return _command("python -m deploy.local", local, {})


def bench_command() -> str:
    """The command that measures this machine."""
    # Here, because it imports torch, which the other parts do without.
    from worker.bench.__main__ import main as bench

    return _command("python -m worker.bench", bench, {})


def api() -> str:
    """Every public name of `producer` but the errors, functions first, and behind them what they return."""
    public = {name: getattr(producer, name) for name in producer.__all__}
    public |= {kind.__name__: kind for kind in (Outcome, State, Timings, Attempt)}
    functions = [_function(each, f"### {name}") for name, each in public.items() if not inspect.isclass(each)]
    classes = [each for each in public.values() if inspect.isclass(each) and not issubclass(each, Exception)]
    return "\n".join([*functions, *map(_class, classes)])


def upgrades() -> str:
    """The table of upgrades that `make storm` goes through, there and back."""
    lines = ["| From | To |", "|---|---|"]
    lines += [f"| {commit} ({what}) | this version |" for commit, what in EARLIER.items()]
    next_one = (
        f"a next release, made by the test: one more job field, in messages of version {FORMAT_VERSION + 1}"
    )
    return "\n".join(
        [*lines, f"| this version, which reads messages up to version {FORMAT_VERSION} | {next_one} |"]
    )


PARTS: dict[str, Callable[[], str]] = {
    "settings": settings,
    "upgrades": upgrades,
    "job-fields": job_fields,
    "job-field-names": job_field_names,
    "schedulers": schedulers,
    "noise-schedules": noise_schedules,
    "manifest-columns": manifest_columns,
    "name-fields": name_fields,
    "errors": error_classes,
    "metrics": metric_names,
    "folders": folders,
    "arrows": arrows,
    "commands": commands,
    "local": local_command,
    "bench": bench_command,
    "api": api,
}


# Commands


def _commands(group: click.Group, before: str = "") -> Iterator[tuple[str, click.Command]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from _commands(command, f"{before}{name} ")
        else:
            yield f"{before}{name}", command


def _options(command: click.Command) -> list[click.Option]:
    return [each for each in command.params if isinstance(each, click.Option)]


def _command(name: str, command: click.Command, shared: dict[str, click.Option]) -> str:
    """One command in Markdown. Options that are `submit`'s own are named, and explained there alone."""
    arguments = (each for each in command.params if isinstance(each, click.Argument))
    words = [name, *(each.make_metavar(click.Context(command)) for each in arguments)]
    text = [f"### {name}", "", f"    {' '.join(words)}", "", sentence(command.help), ""]
    options = _options(command)
    ours = (
        []
        if name == "smallcat submit"
        else [
            option
            for option in options
            if (known := shared.get(option.opts[0])) and known.help == option.help
        ]
    )
    if ours:
        names = ", ".join(f"`{option.opts[0]}`" for option in ours)
        text += [f"For jobs that do not say, as [`smallcat submit`](#smallcat-submit) has them: {names}.", ""]
    rows = (
        (f"`{', '.join(f'{each} {_value(option)}'.strip() for each in option.opts)}`", option.help or "")
        for option in options
        if option not in ours
    )
    return "\n".join(text) + "\n" + _table("Option, Meaning", rows)


def _value(option: click.Option) -> str:
    """What stands behind the option on a command line; empty for a flag."""
    if option.is_flag:
        return ""
    if option.metavar:
        return option.metavar
    if isinstance(option.type, click.Choice):
        return "|".join(map(str, option.type.choices))
    return {"TEXT": "TEXT", "INTEGER": "N", "FLOAT": "X", "INTEGER RANGE": "N", "SECONDS": "SECONDS"}.get(
        option.type.name.upper(), option.type.name.upper()
    )


# Python


def _function(function: Any, heading: str, mark: str = "") -> str:
    """A function or method in Markdown; `mark` is its decorator."""
    node = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    return f"{heading}\n\n```python\n{mark}{_signature(node)}\n```\n\n{inspect.getdoc(function)}\n"


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    word = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    result = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    arguments = list(_arguments(node.args))
    line = f"{word} {node.name}({', '.join(arguments)}){result}"
    if len(line) <= 100:
        return line
    return f"{word} {node.name}(\n" + "".join(f"    {each},\n" for each in arguments) + f"){result}"


def _arguments(args: ast.arguments) -> Iterator[str]:
    """Each parameter as it stands in a signature, without `self`."""
    plain = [*args.posonlyargs, *args.args]
    defaults = [None] * (len(plain) - len(args.defaults)) + list(args.defaults)
    for arg, default in zip(plain, defaults, strict=True):
        if arg.arg not in ("self", "cls"):
            yield _argument(arg, default)
    if args.vararg:
        yield f"*{ast.unparse(args.vararg)}"
    elif args.kwonlyargs:
        yield "*"
    for arg, default in zip(args.kwonlyargs, args.kw_defaults, strict=True):
        yield _argument(arg, default)
    if args.kwarg:
        yield f"**{ast.unparse(args.kwarg)}"


def _argument(arg: ast.arg, default: ast.expr | None) -> str:
    return ast.unparse(arg) + (f" = {ast.unparse(default)}" if default else "")


def _class(kind: type) -> str:
    """A class in Markdown: its docstring, fields, properties and methods, inherited ones of ours too."""
    # What a docstring says to those who change the class is no part of its reference.
    texts = [text for text in (inspect.getdoc(kind) or "").split("\n\n") if not text.startswith("To add ")]
    parts = [f"### {kind.__name__}", "", "\n\n".join(texts), ""]
    fields = comments(kind) if issubclass(kind, enum.Enum) else help_lines(kind)
    rows = [(f"`{name}`", text) for name, text in fields.items() if not name.startswith("_")]
    methods: list[str] = []
    for each in reversed(kind.__mro__):
        if each.__module__.split(".")[0] not in ("worker", "producer"):
            continue
        for name, member in vars(each).items():
            if name.startswith("_") or getattr(kind, name, None) is None:
                continue
            if isinstance(member, property):
                rows.append((f"`{name}`", sentence(member.__doc__)))
            elif inspect.isfunction(inspect.unwrap(getattr(member, "__func__", member))):
                mark = f"@{type(member).__name__}\n" if hasattr(member, "__func__") else ""
                methods.append(
                    _function(getattr(member, "__func__", member), f"#### {kind.__name__}.{name}", mark)
                )
    if rows:
        parts.append(_table("Attribute, Meaning", iter(rows)))
    return "\n".join(parts) + "\n" + "\n".join(methods)


# Documents


def renewed(text: str) -> str:
    """A document's text with its generated parts as they should be."""
    return _PART.sub(lambda found: f"{found[1]}{PARTS[found[2]]().strip()}\n{found[3]}", text)


def parts_in(text: str) -> list[str]:
    """The names of the generated parts in a document."""
    return [found[2] for found in _PART.finditer(text)]


def resolved(name: str) -> object:
    """What a dotted name means. Raises `ImportError` or `AttributeError`."""
    module, _, rest = name.partition(".")
    value: Any = importlib.import_module(module)
    for part in rest.split(".") if rest else []:
        module = f"{module}.{part}"
        try:
            value = getattr(value, part)
        except AttributeError:
            value = importlib.import_module(module)
    return value


if __name__ == "__main__":
    for document in DOCUMENTS:
        document.write_text(renewed(document.read_text("utf-8")), "utf-8")
