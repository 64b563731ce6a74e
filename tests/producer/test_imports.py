"""What importing `producer` costs, and what it must not load. Measured in fresh interpreters."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys

import pytest

#: Seconds that `import producer` may take.
LIMIT_S = 0.5
HEAVY = ["torch", "diffusers", "transformers", "numpy", "PIL", "boto3", "botocore", "redis", "celery"]


def fresh(code: str, *flags: str) -> str:
    return subprocess.run(
        [sys.executable, *flags, "-c", code], capture_output=True, text=True, timeout=60, check=True
    ).stdout


def test_importing_the_producer_takes_no_time() -> None:
    """In processor time of the import alone, so that a busy machine does not fail it."""
    code = "import time; t = time.process_time(); import producer; print(time.process_time() - t)"
    fresh(code)  # Compiles what was not compiled yet.
    assert statistics.median(float(fresh(code)) for _ in range(3)) < LIMIT_S


@pytest.mark.parametrize("module", ["producer", "producer.cli.main"])
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


def test_all_is_what_there_is() -> None:
    import producer

    assert all(hasattr(producer, name) for name in producer.__all__)
    assert sorted(producer.__all__) == producer.__all__
