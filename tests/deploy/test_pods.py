"""What the Kubernetes files start, run: probes answer, a stopping worker loses nothing, the query counts."""

from __future__ import annotations

import contextlib
import json
import math
import re
import shutil
import signal
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deploy.embedded.stack import Stack
from producer import submit_job
from tests.deploy.dockerfile import stages
from tests.deploy.kubernetes import container, environment, of_kind
from tests.deploy.processes import WORKER_S, confined, running
from tests.worker.health.probes import ask, free_port, wait_for, wait_until
from worker.contract.record import State
from worker.state.keys import attempts_key
from worker.state.redis_client import connect

pytestmark = pytest.mark.services


class Pod:
    """The container of a Deployment, as processes of this machine: its own command, variables and probes."""

    def __init__(self, name: str, folder: Path, services: dict[str, str]) -> None:
        self.name, self.log, self.volumes = name, folder / f"{name}.log", list[Path]()
        self.ports = {port["name"]: free_port() for port in container(name)["ports"]}
        numbers = {str(port["containerPort"]): self.ports[port["name"]] for port in container(name)["ports"]}
        target = stages()[
            container(name)["image"].rpartition("/")[2].partition(":")[0].removeprefix("smallcat-")
        ]
        arguments = container(name).get("args")
        command = target.command if arguments is None else [*target.entrypoint, *arguments]
        self.command = [str(numbers.get(word, word)) for word in command]
        set_here = {**target.environment, **environment(name)}
        # Ports of this machine, folders of the test, and the services of its stack.
        variables = {key: str(numbers.get(value, value)) for key, value in set_here.items()}
        for mount in (each["mountPath"] for each in container(name)["volumeMounts"]):
            where = folder / f"{name}-{mount.strip('/')}"
            where.mkdir()
            self.volumes.append(where)
            variables = {key: re.sub(rf"^{mount}\b", str(where), value) for key, value in variables.items()}
        if "http" in self.ports:
            variables["SMALLCAT_HTTP_PORT"] = str(self.ports["http"])
        # The demo model in the place of one that is downloaded.
        variables.pop("SMALLCAT_MODEL", None)
        self.variables = {**variables, **services, "OMP_WAIT_POLICY": "PASSIVE", "TMPDIR": variables["HOME"]}

    def probe(self, kind: str) -> tuple[int, str]:
        """Port and path of a probe."""
        get = container(self.name)[f"{kind}Probe"]["httpGet"]
        return self.ports[get["port"]], get["path"]

    def probe_until(self, kind: str) -> None:
        """Probe as the node does, until the answer is yes."""
        port, path = self.probe(kind)
        wait_until(port, path, 200, WORKER_S)

    def running(self) -> contextlib.AbstractContextManager[subprocess.Popen[bytes]]:
        """Run it: it may write to its volumes, and to nothing else of this machine."""
        return running(confined(self.command, self.volumes), self.variables, self.log)

    def shown(self) -> str:
        return self.log.read_text(errors="replace")[-3000:]


@pytest.mark.timeout(300)
def test_a_worker_is_probed_and_finishes_or_gives_back_its_jobs_within_its_grace_period(
    environment: dict[str, str], tmp_path: Path
) -> None:
    name = "smallcat-worker-sd15"
    pod = Pod(name, tmp_path, environment)
    grace_s = of_kind("Deployment")[name]["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    with pod.running() as process:
        pod.probe_until("startup")
        pod.probe_until("readiness")
        assert ask(*pod.probe("liveness"))[0] == 200

        # 150 steps of a very large picture take many minutes on a CPU, and two small ones seconds.
        long = [submit_job("a small cat", seed=seed, steps=150, width=1536, height=1536) for seed in range(2)]
        wait_for(lambda: all(each.state() is State.RUNNING for each in long), pod.shown, 60)
        short = [submit_job("a small cat", seed=seed, steps=2) for seed in range(4)]
        wait_for(lambda: all(each.state() is not State.QUEUED for each in short), pod.shown, 60)
        process.send_signal(signal.SIGTERM)
        asked_s = time.monotonic()
        wait_until(*pod.probe("readiness"), 503)
        assert ask(*pod.probe("liveness"))[0] == 200, "it is not killed while it drains"
        assert process.wait(grace_s) == 0, pod.shown()
        print(f"ended {time.monotonic() - asked_s:.0f} s after SIGTERM; the grace period is {grace_s} s")

    assert [each.state() for each in short] == [State.DONE] * len(short)
    assert [each.state() for each in long] == [State.QUEUED] * len(long)
    with connect(environment["REDIS_URL"], retry_s=1) as client:
        counted = [client.hget(attempts_key(each.id), "attempts") for each in long]
    assert [int(each or 0) for each in counted] == [0] * len(long)


@pytest.mark.timeout(200)
@pytest.mark.parametrize("name", ["smallcat-http", "smallcat-webhooks"])
def test_the_others_are_probed(name: str, stack_env: dict[str, str], tmp_path: Path) -> None:
    pod = Pod(name, tmp_path, stack_env)
    with pod.running() as process:
        for kind in ("startup", "liveness", "readiness"):
            pod.probe_until(kind)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0, pod.shown()


class Prometheus:
    """A real Prometheus that scrapes one address each second."""

    def __init__(self, folder: Path, target: int) -> None:
        self.port = free_port()
        config = folder / "prometheus.yaml"
        job = {"job_name": "smallcat", "static_configs": [{"targets": [f"127.0.0.1:{target}"]}]}
        every = {"scrape_interval": "1s", "scrape_timeout": "1s"}
        config.write_text(json.dumps({"global": every, "scrape_configs": [job]}))
        self.command = [
            "prometheus",
            f"--config.file={config}",
            f"--storage.tsdb.path={folder / 'prometheus'}",
            f"--web.listen-address=127.0.0.1:{self.port}",
        ]

    def ask(self, query: str) -> float | None:
        """The query's value; None where it has none, and where Prometheus does not answer yet."""
        url = f"http://127.0.0.1:{self.port}/api/v1/query?query={urllib.parse.quote(query)}"
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                result = json.loads(answer.read())["data"]["result"]
        except OSError:
            return None
        assert len(result) <= 1, f"KEDA takes one figure: {result}"
        return float(result[0]["value"][1]) if result else None


def wanted(scaling: dict[str, Any], value: float) -> int:
    """The replicas that KEDA and the autoscaler behind it ask for, without their windows of time."""
    trigger = scaling["triggers"][0]["metadata"]
    if value <= float(trigger["activationThreshold"]):
        return int(scaling["minReplicaCount"])
    return max(1, min(int(scaling["maxReplicaCount"]), math.ceil(value / float(trigger["threshold"]))))


@pytest.mark.timeout(500)
def test_the_autoscalers_query_counts_from_none_to_200_jobs_and_back(
    new_stack: Callable[..., Stack], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prometheus' own answers to the query of the file, over the figures that the file has it read."""
    if shutil.which("prometheus") is None:
        pytest.skip("needs prometheus, as Debian has it")
    stack = new_stack(workers=0)
    for name, value in stack.variables.items():
        monkeypatch.setenv(name, value)
    scaling = of_kind("ScaledObject")["smallcat-worker-sd15"]["spec"]
    query = scaling["triggers"][0]["metadata"]["query"]
    figures = Pod("smallcat-metrics", tmp_path, stack.environment)
    prometheus = Prometheus(tmp_path, figures.ports["metrics"])
    seen: list[tuple[float, int]] = []

    def value() -> float | None:
        found = prometheus.ask(query)
        if found is not None and (not seen or seen[-1][0] != found):
            seen.append((found, wanted(scaling, found)))
        return found

    with (
        figures.running(),
        running(prometheus.command, stack.environment, tmp_path / "prometheus.log", tmp_path),
    ):
        wait_for(lambda: value() == 0, figures.shown, 60)
        jobs = [submit_job("a small cat", seed=seed, steps=8, model="sd15") for seed in range(200)]
        wait_for(lambda: value() == 200, lambda: f"{seen} {figures.shown()}", 30)
        assert seen[-1] == (200, scaling["maxReplicaCount"]), "from zero"

        worker = Pod("smallcat-worker-sd15", tmp_path, stack.environment)
        with worker.running() as process:
            # Waiting and in flight are counted together: fetching changes nothing.
            in_flight = 'sum(smallcat_queue_jobs_in_flight{model="sd15"})'
            wait_for(
                lambda: (value() or 0) > 0 and (prometheus.ask(in_flight) or 0) > 0,
                lambda: f"{seen} {prometheus.ask(in_flight)} {worker.shown()}",
                WORKER_S,
            )
            wait_for(lambda: value() == 0, lambda: f"{seen} {worker.shown()}", 2 * WORKER_S)
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0, worker.shown()
        assert {each.state() for each in jobs} == {State.DONE}
        assert value() == 0
        print("value and wanted replicas:", seen)
        assert seen[-1] == (0, 0), "and back to zero"

        # A Redis that is away is no empty queue: KEDA then keeps its fallback.
        stack.valkey.kill()
        wait_for(lambda: prometheus.ask(query) is None, lambda: f"{prometheus.ask(query)}", 60)


def test_prometheus_reads_the_query(tmp_path: Path) -> None:
    """By promtool, for all models."""
    if shutil.which("promtool") is None:
        pytest.skip("needs promtool, as Debian's prometheus has it")
    queries = [each["spec"]["triggers"][0]["metadata"]["query"] for each in of_kind("ScaledObject").values()]
    rules = [{"record": f"wanted{number}", "expr": query} for number, query in enumerate(queries)]
    file = tmp_path / "rules.yaml"
    file.write_text(json.dumps({"groups": [{"name": "scaling", "rules": rules}]}))
    done = subprocess.run(["promtool", "check", "rules", file], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
