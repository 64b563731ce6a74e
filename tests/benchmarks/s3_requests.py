"""Counts the requests that jobs send to S3.

    python -m tests.benchmarks.s3_requests --jobs 100

Real `celery worker` processes with a fake renderer (`tests.faults.app`) and a real S3 server, with a proxy
between them that counts. A JSON line a case: requests a job by method.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from deploy.embedded.stack import Stack
from producer import JobHandle, submit_file, submit_job
from tests.faults.harness import Ground
from tests.faults.s3_proxy import S3Proxy


class CountingProxy(S3Proxy):
    """Counts what it passes on, by method."""

    def __init__(self, port: int) -> None:
        super().__init__(port)
        self.counts: Counter[str] = Counter()

    def pass_on(
        self, method: str, path: str, body: bytes, headers: dict[str, str]
    ) -> tuple[int, dict[str, str], bytes]:
        """As `S3Proxy.pass_on`, counted."""
        self.counts[method] += 1
        return super().pass_on(method, path, body, headers)


class Cases:
    """Says what each case cost."""

    def __init__(self, proxy: CountingProxy) -> None:
        self._proxy = proxy

    @contextlib.contextmanager
    def case(self, name: str, jobs: int) -> Iterator[None]:
        """What happens in the block is `jobs` times the case."""
        before = self._proxy.counts.copy()
        yield
        each = {method: round(count / jobs, 2) for method, count in (self._proxy.counts - before).items()}
        print(json.dumps({name: each}), flush=True)


def measure(ground: Ground, jobs: int) -> None:
    """All cases, one after the other."""
    proxy = CountingProxy(ground.stack.s3.port)
    cases = Cases(proxy)
    with pytest.MonkeyPatch.context() as patch:
        ground.use(patch)
        patch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        with cases.case("a worker's start", 1):
            ground.worker(settings={"AWS_ENDPOINT_URL_S3": proxy.endpoint})
        made = [ground.job() for _ in range(jobs)]
        with cases.case("a job", jobs):
            handles = [submit_job(job) for job in made]
            for handle in handles:
                handle.result(60)
        sizes = [(ground.folder_of(job.id) / f"{job.id}.json").stat().st_size for job in made]
        print(json.dumps({"bytes of its record": round(sum(sizes) / jobs)}), flush=True)
        with cases.case("a link to its picture", jobs):
            for handle in handles:
                handle.result().url()
        with cases.case("its picture, fetched", jobs):
            for handle in handles:
                handle.result().data()
        with ground.redis as client:
            client.delete(*(f"smallcat:job:{handle.id}" for handle in handles))
        with cases.case("its record, once Redis has it no longer", jobs):
            for handle in handles:
                JobHandle(handle.id).record()
        with cases.case("the job again, answered by its picture", jobs):
            for job in made:
                submit_job(job).result(60)
        file = ground.folder / "prompts.csv"
        file.write_text("prompt,seed\n" + "".join(f"file-{line},{line}\n" for line in range(jobs)))
        with cases.case("a line of a prompt file", jobs):
            submit_file(file)
        with cases.case("the same with --download", jobs):
            submit_file(file, download=ground.folder / "pictures")
    proxy.close()


@click.command(help=__doc__)
@click.option("--jobs", default=100, show_default=True, help="Jobs of each case.")
def main(jobs: int) -> None:
    with tempfile.TemporaryDirectory() as folder, Stack(workers=0) as stack:
        measure(Ground(stack, Path(folder)), jobs)


if __name__ == "__main__":
    main()
