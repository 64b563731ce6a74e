"""What is installed is told; what is not is left out."""

from __future__ import annotations

import importlib.metadata

from worker.contract.versions import versions


def test_versions_of_what_is_installed_in_the_order_asked_for() -> None:
    asked = ["torch", "no-such-package", "celery"]
    found = versions(asked)
    assert list(found) == ["torch", "celery"]
    assert found["celery"] == importlib.metadata.version("celery")
