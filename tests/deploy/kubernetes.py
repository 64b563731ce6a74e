"""The rendered Kubernetes objects of the example overlay."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.processes import BIN, DEPLOY

#: What a person copies.
EXAMPLE = DEPLOY / "kubernetes" / "overlays" / "example"


@functools.cache
def rendered() -> tuple[dict[str, Any], ...]:
    """Those of the example."""
    return render(EXAMPLE)


def render(folder: Path) -> tuple[dict[str, Any], ...]:
    """The objects of a folder, as `kubectl kustomize` renders them."""
    kubectl = shutil.which("kubectl", path=os.pathsep.join([str(BIN), os.environ.get("PATH", os.defpath)]))
    if kubectl is None:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)("needs kubectl")
    text = subprocess.run(
        [kubectl, "kustomize", folder], capture_output=True, text=True, check=True, timeout=50
    ).stdout
    return tuple(yaml.safe_load_all(text))


def of_kind(kind: str) -> dict[str, dict[str, Any]]:
    """The objects of a kind by name."""
    return {each["metadata"]["name"]: each for each in rendered() if each["kind"] == kind}


def container(name: str) -> dict[str, Any]:
    """The only container of a Deployment."""
    [found] = of_kind("Deployment")[name]["spec"]["template"]["spec"]["containers"]
    assert isinstance(found, dict)
    return found


def environment(name: str) -> dict[str, str]:
    """The variables that a Deployment sets, those of its ConfigMaps included."""
    found: dict[str, str] = {}
    for source in container(name)["envFrom"]:
        if "configMapRef" in source:
            found |= of_kind("ConfigMap")[source["configMapRef"]["name"]]["data"]
    return found | {entry["name"]: entry["value"] for entry in container(name)["env"]}
