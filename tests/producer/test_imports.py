"""What importing `producer` costs, and what it must not load. Measured in fresh interpreters."""

from __future__ import annotations

import ast
import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from worker.contract import errors

#: Seconds that `import producer` may take; on a slow machine as much as so many imports of pydantic.
LIMIT_S, LIMIT_PYDANTICS = 0.5, 7
HEAVY = ["torch", "diffusers", "transformers", "numpy", "PIL", "boto3", "botocore", "redis", "celery"]


def fresh(code: str, *flags: str) -> str:
    return subprocess.run(
        [sys.executable, *flags, "-c", code], capture_output=True, text=True, timeout=60, check=True
    ).stdout


@pytest.mark.parametrize("names", ["producer", "smallcat", "producer.client, producer.ingest.submit_file"])
def test_importing_the_producer_takes_no_time(names: str) -> None:
    """In processor time of the import alone, so that a busy machine does not fail it."""
    assert import_s(names) < max(LIMIT_S, LIMIT_PYDANTICS * import_s("pydantic.main, pydantic.fields"))


def import_s(names: str) -> float:
    code = f"import time; t = time.process_time(); import {names}; print(time.process_time() - t)"
    fresh(code)  # Compiles what was not compiled yet.
    return statistics.median(float(fresh(code)) for _ in range(3))


@pytest.mark.parametrize("module", ["producer", "smallcat", "smallcat, producer.cli.main"])
def test_importing_the_producer_loads_nothing_heavy(module: str) -> None:
    code = f"import sys, json, {module}; print(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    assert json.loads(fresh(code)) == []


def test_a_producer_works_where_no_worker_is_installed() -> None:
    """Submitting needs none of the worker's extra: torch, diffusers, numpy, prometheus-client."""
    code = (
        "import sys\n"
        "for name in ('torch', 'diffusers', 'transformers', 'safetensors', 'accelerate', 'numpy',"
        " 'prometheus_client'): sys.modules[name] = None\n"
        "import producer, producer.cli.main, producer.cli.doctor, producer.cli.job_display\n"
        "import worker.celery, worker.state.fleet, worker.state.records, worker.state.redis_client\n"
        "import worker.storage.bucket\n"
        "import worker.jobs.image_file, worker.contract.infotext\n"
        "print(producer.submit_job.__name__)"
    )
    assert fresh(code) == "submit_job\n"


@pytest.mark.parametrize("name", ["submit_job", "JobHandle", "Job", "QueueError"])
def test_using_a_public_name_loads_nothing_heavy(name: str) -> None:
    code = f"import sys; from producer import {name}; print([m for m in {HEAVY!r} if m in sys.modules])"
    assert fresh(code) == "[]\n"


def test_all_is_what_there_is() -> None:
    """And what a type checker sees: it reads the imports that are for it alone."""
    import producer

    assert all(hasattr(producer, name) for name in producer.__all__)
    assert sorted(producer.__all__) == producer.__all__
    assert set(producer.__all__) <= set(dir(producer))
    tree = ast.parse(Path(producer.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    shown = {
        alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert sorted(shown) == producer.__all__
    assert {name: getattr(producer, name).__module__ for name in shown} == shown
    with pytest.raises(AttributeError, match="has no attribute 'submit_jbo'"):
        producer.submit_jbo  # noqa: B018


def test_every_error_that_a_user_may_catch_is_public() -> None:
    """All but those by which a worker gives a job back, which no caller ever sees."""
    import producer

    def below(kind: type[Exception]) -> set[type[Exception]]:
        return {kind, *(each for child in kind.__subclasses__() for each in below(child))}

    ours = {kind for kind in below(errors.SmallcatError) if kind.__module__ == errors.__name__}
    public = {getattr(producer, name) for name in producer.__all__ if name.endswith("Error")}
    assert public == ours - below(errors.MachineError)


def test_smallcat_has_the_names_of_the_producer() -> None:
    import producer
    import smallcat

    assert all(getattr(smallcat, name) is getattr(producer, name) for name in producer.__all__)
    assert set(producer.__all__) <= set(dir(smallcat))
    scope: dict[str, object] = {}
    exec("from smallcat import *", scope)  # noqa: S102 - our own
    assert set(producer.__all__) <= set(scope)
    with pytest.raises(AttributeError, match="module 'smallcat' has no attribute 'submit_jbo'"):
        smallcat.submit_jbo  # noqa: B018
