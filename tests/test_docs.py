"""What the documents say is what there is."""

from __future__ import annotations

import ast
import builtins
import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

import producer
from deploy.local import main as local
from producer.cli.main import cli
from producer.client import submit_job
from producer.ingest.submit_file import submit_file
from tests.docs import DOCUMENTS, PARTS, REMEDIES, ROOT, parts_in, renewed, resolved
from tests.markdown import codes, prose
from worker.bench.__main__ import main as bench
from worker.contract import errors
from worker.contract.job import JOB_FIELDS, Job
from worker.contract.settings import variables

#: What a document may name as a file's folder.
FOLDERS = ("worker", "producer", "deploy", "tests", "docs")
#: Commands of click that are called as modules.
MODULE_COMMANDS = {"producer": cli, "deploy.local": local, "worker.bench": bench}


documents = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())


def lines(document: Path) -> Iterator[str]:
    """Every line of code in a document, without prompts and comments."""
    for code in codes(document):
        if code.language != "python":
            for line in code.text.splitlines():
                yield re.sub(r"(^|\s)#.*", "", line).strip().removeprefix("$ ").strip()


def words_of(line: str) -> list[str]:
    """The words of a command line; none where it is not one."""
    try:
        return shlex.split(line.replace("\\|", "|"))
    except ValueError:
        return []


def anchors(document: Path, level: str = "#+") -> list[str]:
    """The anchors of a document's headings, of one `level` or of all, as GitHub makes them."""
    found = re.findall(rf"^{level} (.+)$", prose(document.read_text("utf-8")), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found]


# What is made from the code


@documents
def test_what_is_made_from_the_code_is_as_the_code_has_it(document: Path) -> None:
    text = document.read_text("utf-8")
    assert renewed(text) == text, "run: python -m tests.docs"


def test_every_part_that_can_be_made_is_in_a_document() -> None:
    assert sorted(part for document in DOCUMENTS for part in parts_in(document.read_text("utf-8"))) == sorted(
        PARTS
    )


def test_every_setting_and_every_job_field_is_in_its_table() -> None:
    settings = (ROOT / "docs" / "settings.md").read_text("utf-8")
    assert [name for name in variables() if f"| `{name}` |" not in settings] == []
    fields = (ROOT / "docs" / "job-fields.md").read_text("utf-8")
    assert [name for name in Job.model_fields if f"| `{name}` |" not in fields] == []


def test_every_error_class_has_its_remedy() -> None:
    kinds = {kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)}
    assert set(REMEDIES) == kinds
    text = (ROOT / "docs" / "errors.md").read_text("utf-8")
    assert [kind.__name__ for kind in kinds if f"`{kind.__name__}`" not in text] == []


def test_every_public_name_is_documented() -> None:
    text = (ROOT / "docs" / "python-api.md").read_text("utf-8")
    text += (ROOT / "docs" / "errors.md").read_text("utf-8")
    missing = [name for name in producer.__all__ if f"### {name}\n" not in text and f"`{name}`" not in text]
    assert missing == []
    assert re.findall(r"^\| `(\w+)` \|  \|$", text, re.MULTILINE) == [], "attributes without a `#:` line"


# What is named


def test_every_page_is_in_the_index() -> None:
    pages = {path.name for path in DOCUMENTS if path.parent == ROOT / "docs"} - {"README.md"}
    assert pages <= set(re.findall(r"\]\(([\w-]+\.md)\)", (ROOT / "docs" / "README.md").read_text("utf-8")))


@documents
def test_links_and_anchors_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(document.read_text("utf-8"))):
        if target.startswith(("https://", "http://")):
            continue
        path, _, anchor = target.partition("#")
        page = (document.parent / path).resolve() if path else document
        assert page.exists(), f"{document.name} links to {target}"
        if anchor:
            assert anchor in anchors(page), f"{document.name} links to {target}"


@documents
def test_a_page_s_contents_are_its_sections_in_order(document: Path) -> None:
    if contents := re.search(r"^Contents: (.+)$", document.read_text("utf-8"), re.MULTILINE):
        assert re.findall(r"\]\(#([^)]+)\)", contents[1]) == anchors(document, "##")


@documents
def test_files_that_are_named_are_there(document: Path) -> None:
    named = [code.text for code in codes(document) if code.language == "inline"]
    paths = [name for name in named if re.fullmatch(rf"(?:{'|'.join(FOLDERS)})/[\w./-]*", name)]
    paths += [name for name in named if re.fullmatch(r"Makefile|Procfile|[\w-]+\.(?:md|toml)", name)]
    assert [path for path in paths if not (ROOT / path).exists()] == []


@documents
def test_make_targets_that_are_named_are_there(document: Path) -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    variables_of_make = set(re.findall(r"^([A-Z]+) \?=", makefile, re.MULTILINE))
    for line in lines(document):
        if (words := words_of(line))[:1] == ["make"] and len(words) > 1:
            assert words[1] in targets, line
            assert {word.partition("=")[0] for word in words[2:]} <= variables_of_make, line


@documents
def test_commands_and_options_that_are_named_are_there(document: Path) -> None:
    for line in lines(document):
        for words in _calls(line):
            if words[0].rpartition("/")[2] == "smallcat":
                _check_call(cli, words[1:], line)
            elif words[0].rpartition("/")[2] == "python" and words[1:2] == ["-m"] and len(words) > 2:
                _check_module(words[2], words[3:], line)


def _calls(line: str) -> Iterator[list[str]]:
    """The commands in a line: behind pipes, behind `--`, and without variables before them."""
    words = words_of(line)
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    rest: list[str] = []
    for word in words:
        if word in ("|", "--"):
            if rest:
                yield rest
            rest = []
        else:
            rest.append(word)
    if rest:
        yield rest


def _check_module(module: str, words: list[str], line: str) -> None:
    if command := MODULE_COMMANDS.get(module):
        _check_call(command, words, line)
        return
    spec = importlib.util.find_spec(module)
    assert spec is not None, line
    if module.split(".")[0] in FOLDERS and spec.origin:
        source = Path(spec.origin).read_text("utf-8")
        for word in words:
            assert not word.startswith("--") or f'"{word}"' in source, line


def _check_call(command: click.Command, words: list[str], line: str) -> None:
    """That `words` are a call of `command`: its commands, and their options."""
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        assert words[0] in command.commands, f"{line}: there is no command {words[0]}"
        command, words = command.commands[words[0]], words[1:]
    options = {name for each in command.params for name in each.opts} | {"--help"}
    for word in words:
        if re.fullmatch(r"--[a-z-]+", word):
            assert word in options, f"{line}: there is no option {word}"


@documents
def test_options_that_stand_alone_are_those_of_some_command(document: Path) -> None:
    known = {"--help", "--prompt", "--concurrency", "--loglevel"}
    commands = [*cli.commands.values(), local, bench]
    for name in ("failed", "keys", "tenants", "webhooks"):
        commands += cli.commands[name].commands.values()  # type: ignore[attr-defined]
    known |= {name for command in commands for each in command.params for name in each.opts}
    a1111 = (ROOT / "producer" / "prompts" / "a1111_options.py").read_text("utf-8")
    known |= {f"--{entry.a1111_option}" for entry in JOB_FIELDS.values()}
    folders = (ROOT / "tests", ROOT / "worker" / "demo" / "training")
    sources = "".join(path.read_text("utf-8") for folder in folders for path in folder.rglob("*.py"))
    for code in codes(document):
        if code.language == "inline" and (found := re.match(r"(--[a-z][\w-]*)", code.text)):
            name = found[1]
            assert name in known or f'"{name}"' in sources or name.removeprefix("--") in a1111, name


@documents
def test_settings_that_are_named_are_there(document: Path) -> None:
    named = re.findall(r"\bSMALLCAT_[A-Z_0-9]+\b", document.read_text("utf-8"))
    assert set(named) <= set(variables())


@documents
def test_python_that_is_shown_is_python_and_imports_what_is_there(document: Path) -> None:
    for code in codes(document):
        if code.language != "python":
            continue
        text = re.sub(r"^(>>>|\.\.\.) ?", "", code.text, flags=re.MULTILINE)
        if re.match(r"(@\w+\n)?(async )?def ", text) and not text.rstrip().endswith(":"):
            text = f"{text.rstrip()}: ..."
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    resolved(f"{node.module}.{alias.name}")
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    resolved(alias.name)
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                _check_keywords(node)


def _check_keywords(call: ast.Call) -> None:
    """That a call of ours in a document has keywords that there are."""
    assert isinstance(call.func, ast.Name)
    keywords = {keyword.arg for keyword in call.keywords}
    if call.func.id == "submit_job":
        assert keywords <= set(Job.model_fields) | set(submit_job.__annotations__)
    elif call.func.id == "submit_file":
        assert keywords <= set(Job.model_fields) | set(submit_file.__annotations__)


@documents
def test_calls_between_backticks_have_keywords_that_there_are(document: Path) -> None:
    for code in codes(document):
        if code.language == "inline" and re.match(r"submit_(job|file)\(.", code.text):
            call = ast.parse(code.text, mode="eval").body
            if isinstance(call, ast.Call):
                _check_keywords(call)


@documents
def test_names_of_modules_and_errors_between_backticks_are_there(document: Path) -> None:
    for code in codes(document):
        if code.language != "inline":
            continue
        if re.fullmatch(r"(?:worker|producer|deploy|tests)(?:\.\w+)+(?<!\.py)", code.text):
            resolved(code.text)
        elif re.fullmatch(r"[A-Z]\w+Error", code.text):
            assert hasattr(errors, code.text) or hasattr(builtins, code.text), code.text


def test_the_checks_would_notice(tmp_path: Path) -> None:
    """A document in which everything that is named is wrong fails every check."""
    page = tmp_path / "page.md"
    page.write_text(
        "`smallcat ingset`, `smallcat submit --stpes 3`, `make tset`, `worker/nothing.py`, `--nothing`,\n"
        "`SMALLCAT_MODLE`, `python -m worker.nothing`, `NoSuchError`,\n"
        '`worker.contract.nothing`, `submit_job("x", stpes=3)`, [a](nothing.md), [b](#nothing)\n\n'
        "Contents: [what](#what).\n\n## What\n\n## More\n\n"
        "```python\nfrom producer import nothing\n```\n"
    )
    checks = (
        test_links_and_anchors_lead_somewhere,
        test_a_page_s_contents_are_its_sections_in_order,
        test_files_that_are_named_are_there,
        test_make_targets_that_are_named_are_there,
        test_commands_and_options_that_are_named_are_there,
        test_options_that_stand_alone_are_those_of_some_command,
        test_settings_that_are_named_are_there,
        test_python_that_is_shown_is_python_and_imports_what_is_there,
        test_calls_between_backticks_have_keywords_that_there_are,
        test_names_of_modules_and_errors_between_backticks_are_there,
    )
    for check in checks:
        with pytest.raises((AssertionError, AttributeError, ImportError)):
            check(page)


def test_the_command_line_s_exit_codes_are_documented() -> None:
    for name in ("errors.md", "command-line.md"):
        text = (ROOT / "docs" / name).read_text("utf-8")
        assert re.search(r"1[:]? a job failed.*2[:]? .*3[:]? a service is out of reach", text), name
