"""The Kubernetes files: rendered by kubectl, valid by the schemas of the API and of KEDA, and safe."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.kubernetes import EXAMPLE, container, environment, of_kind, render, rendered
from tests.deploy.processes import DEPLOY
from worker.contract.settings import variables

pytestmark = pytest.mark.services

#: Versions of Kubernetes that the objects are valid for: the oldest with `preStop.sleep`, and the newest.
VERSIONS = ("1.30", "1.37")
WORKERS = ("smallcat-worker-sd15", "smallcat-worker-sdxl")
DEPLOYMENTS = (*WORKERS, "smallcat-http", "smallcat-metrics", "smallcat-webhooks")


@pytest.mark.parametrize("version", VERSIONS)
def test_the_objects_are_valid_by_the_schemas_of_the_api(version: str) -> None:
    import kubernetes_validate

    for each in rendered():
        if each["kind"] != "ScaledObject":
            kubernetes_validate.validate(each, version, strict=True)


def test_the_schemas_would_notice() -> None:
    import kubernetes_validate

    [wrong] = [dict(each) for each in rendered() if each["kind"] == "Namespace"]
    wrong["metdata"] = wrong.pop("metadata")
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, VERSIONS[0], strict=True)


def test_the_scaling_is_valid_by_kedas_own_types() -> None:
    """Made from KEDA 2.16's CRD. They ignore what they do not know, so nothing may be lost by them."""
    from cloudcoil.models.keda.v1alpha1 import ScaledObject

    for each in of_kind("ScaledObject").values():
        read = ScaledObject.model_validate(each)
        assert read.model_dump(by_alias=True, exclude_unset=True, mode="json") == each


def test_monitoring_is_valid_by_the_prometheus_operators_own_types(tmp_path: Path) -> None:
    """Made from the CRDs of 0.80. They ignore what they do not know, so nothing may be lost by them."""
    from cloudcoil.models.prometheus_operator.v1 import PodMonitor, PrometheusRule

    monitoring = DEPLOY / "kubernetes" / "monitoring"
    # As an overlay of a cluster that has the operator.
    where = [os.path.relpath(path, tmp_path) for path in (EXAMPLE, monitoring)]
    (tmp_path / "kustomization.yaml").write_text(
        yaml.safe_dump({"namespace": "smallcat", "resources": where[:1], "components": where[1:]})
    )
    found = {each["kind"]: each for each in render(tmp_path)}
    for kind, model in (("PodMonitor", PodMonitor), ("PrometheusRule", PrometheusRule)):
        read = model.model_validate(found[kind])
        assert read.model_dump(by_alias=True, exclude_unset=True, mode="json") == found[kind]
        assert found[kind]["metadata"]["namespace"] == "smallcat"
    # Each pod with metrics has a port of the name that is scraped.
    [endpoint] = found["PodMonitor"]["spec"]["podMetricsEndpoints"]
    for name in DEPLOYMENTS:
        names = {port["name"] for port in container(name).get("ports", [])}
        template = of_kind("Deployment")[name]["spec"]["template"]["metadata"]
        scraped = template.get("annotations", {}).get("prometheus.io/scrape") == "true"
        assert (endpoint["port"] in names) is scraped
        wanted = found["PodMonitor"]["spec"]["selector"]["matchLabels"].items()
        assert wanted <= template["labels"].items()


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_a_pod_has_no_more_rights_than_it_needs(name: str) -> None:
    pod = of_kind("Deployment")[name]["spec"]["template"]["spec"]
    assert pod["automountServiceAccountToken"] is False
    account = of_kind("ServiceAccount")[pod["serviceAccountName"]]
    assert account["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] >= 1000
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container(name)["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    resources = container(name)["resources"]
    assert {"cpu", "memory"} <= set(resources["requests"])
    assert "memory" in resources["limits"]
    # A secret is named, never given.
    assert not of_kind("Secret")
    assert not re.search("PASSWORD|SECRET_ACCESS_KEY|REDIS_URL", str(container(name)["env"]))


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_what_is_written_to_is_a_volume(name: str) -> None:
    mounts = {each["mountPath"] for each in container(name)["volumeMounts"]}
    volumes = {each["name"] for each in of_kind("Deployment")[name]["spec"]["template"]["spec"]["volumes"]}
    assert {each["name"] for each in container(name)["volumeMounts"]} == volumes
    for variable in ("HOME", "HF_HOME", "SMALLCAT_CACHE_DIR", "SMALLCAT_HTTP_DATA_DIR"):
        if (path := environment(name).get(variable)) is not None:
            assert any(path == mount or path.startswith(f"{mount}/") for mount in mounts), variable


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_only_settings_that_there_are_are_set(name: str) -> None:
    names = {each for each in environment(name) if each.startswith("SMALLCAT_")}
    assert names <= set(variables())


@pytest.mark.parametrize("name", WORKERS)
def test_a_model_has_workers_with_a_gpu_each_that_are_found_spread_and_scaled_by_its_own_jobs(
    name: str,
) -> None:
    deployment = of_kind("Deployment")[name]["spec"]
    instance = deployment["selector"]["matchLabels"]["app.kubernetes.io/instance"]
    labels = deployment["template"]["metadata"]["labels"]
    [spread] = deployment["template"]["spec"]["topologySpreadConstraints"]
    assert spread["topologyKey"] == "topology.kubernetes.io/zone"
    for selector in (
        deployment["selector"],
        spread["labelSelector"],
        of_kind("PodDisruptionBudget")[name]["spec"]["selector"],
    ):
        assert selector["matchLabels"] == {
            "app.kubernetes.io/name": "smallcat-worker",
            "app.kubernetes.io/instance": instance,
        }
        assert selector["matchLabels"].items() <= labels.items()
    assert container(name)["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert "replicas" not in deployment, "KEDA sets them, and an apply must not undo it"

    scaling = of_kind("ScaledObject")[name]["spec"]
    assert scaling["scaleTargetRef"]["name"] == name
    assert scaling["minReplicaCount"] == 0
    models = set(re.findall(r"model=~?\"([^\"]+)\"", scaling["triggers"][0]["metadata"]["query"]))
    [pattern] = models
    assert environment(name)["SMALLCAT_MODEL_NAME"] in pattern.split("|")


def test_one_model_takes_jobs_that_name_none() -> None:
    queries = [each["spec"]["triggers"][0]["metadata"]["query"] for each in of_kind("ScaledObject").values()]
    assert len([query for query in queries if '|default"' in query]) == 1


def probes(name: str) -> dict[str, Any]:
    return {key: value for key, value in container(name).items() if key.endswith("Probe")}


@pytest.mark.parametrize("name", WORKERS)
def test_a_first_start_of_half_an_hour_is_borne(name: str) -> None:
    startup = probes(name)["startupProbe"]
    assert startup["failureThreshold"] * startup["periodSeconds"] >= 1800
    assert of_kind("Deployment")[name]["spec"]["progressDeadlineSeconds"] > 1800


@pytest.mark.parametrize("name", WORKERS)
def test_a_worker_has_drained_before_it_is_killed_and_before_a_spot_node_is_gone(name: str) -> None:
    pod = of_kind("Deployment")[name]["spec"]["template"]["spec"]
    drain_s = float(environment(name)["SMALLCAT_DRAIN_S"])
    pre_stop_s = container(name).get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
    assert drain_s + pre_stop_s + 15 <= pod["terminationGracePeriodSeconds"] <= 120


def test_the_http_api_has_ended_its_requests_before_it_is_killed() -> None:
    from producer.http.server import DRAIN_S

    pod = of_kind("Deployment")["smallcat-http"]["spec"]["template"]["spec"]
    pre_stop_s = container("smallcat-http")["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert DRAIN_S + pre_stop_s < pod["terminationGracePeriodSeconds"]


def test_policies_forbid_what_they_do_not_allow() -> None:
    policies = of_kind("NetworkPolicy")
    assert policies["smallcat-nothing-else"]["spec"] == {
        "podSelector": {},
        "policyTypes": ["Ingress", "Egress"],
    }
    ports = {
        entry["port"]
        for each in policies.values()
        for rule in each["spec"].get("ingress", [])
        for entry in rule["ports"]
    }
    declared = {
        port["containerPort"]: port["name"] for name in DEPLOYMENTS for port in container(name)["ports"]
    }
    assert {declared[port] for port in ports} == {"http", "metrics"}, "probes come from the node"
