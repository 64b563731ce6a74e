"""What FP8 costs in quality, by the bundled model: PSNR beside the plain model, and the judge's score.

    python -m tests.benchmarks.precision --jobs 64              all layers that SMALLCAT_PRECISION=fp8 takes
    python -m tests.benchmarks.precision --jobs 64 --kinds      each kind of layers alone

On a CPU FP8 is computed in float32 with the same rounding. The bundled model's projections around its
attention are convolutions of one pixel; with `--kinds` they are linear layers, as SDXL's are. Speed:
`SMALLCAT_PRECISION=fp8 python -m tests.benchmarks.engine`.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Collection, Sequence

import click
import torch
from PIL import Image

from tests.benchmarks.mates import psnr
from worker.contract.job import Job
from worker.contract.settings import worker_settings
from worker.demo.training import classifier
from worker.demo.training.evaluate import Recogniser
from worker.demo.training.subjects import scored_words
from worker.device import fp8
from worker.device.model_runner import ModelRunner
from worker.engine.runner import Picture
from worker.model import loader

#: Jobs in a batch.
AT_ONCE = 8


def runner_of(kinds: Collection[str], outliers: int, *, linear: bool) -> tuple[ModelRunner, int]:
    """The bundled model with these kinds of layers in FP8, and how many layers these are."""
    settings = worker_settings().model_copy(update={"precision": "fp16"})
    loaded = loader.load(settings)
    if linear:
        project_linearly(loaded.pipeline.unet)
    layers = fp8.install(loaded.pipeline.unet, loaded.device, kinds, outliers)
    return ModelRunner(settings, loaded), layers


def project_linearly(unet: torch.nn.Module) -> None:
    """Make linear layers of the convolutions of one pixel around attention: the same function."""
    from diffusers.models.transformers.transformer_2d import Transformer2DModel

    for module in unet.modules():
        if isinstance(module, Transformer2DModel) and not module.use_linear_projection:
            module.use_linear_projection = True
            for name in ("proj_in", "proj_out"):
                conv = getattr(module, name)
                layer = torch.nn.Linear(conv.in_channels, conv.out_channels)
                layer.weight.data, layer.bias.data = conv.weight.data[:, :, 0, 0].contiguous(), conv.bias.data
                setattr(module, name, layer.requires_grad_(False))


def pictures(runner: ModelRunner, jobs: Sequence[Job]) -> list[Picture]:
    """The picture of each job."""
    found: list[Picture] = []
    for first in range(0, len(jobs), AT_ONCE):
        states = [runner.prepare(job) for job in jobs[first : first + AT_ONCE]]
        while left := [state for state in states if state.step < state.steps]:
            runner.step(left)
        found += [each for each in runner.decode(states) if isinstance(each, Picture)]
    return found


@click.command(help=__doc__)
@click.option("--jobs", "count", default=64, show_default=True, help="Pictures, of a subject each.")
@click.option("--kinds", "by_kind", is_flag=True, help="Measure each kind of layers alone.")
@click.option("--outliers", default=fp8.OUTLIERS, show_default=True, help="Channels kept more precisely.")
def main(count: int, by_kind: bool, outliers: int) -> None:
    model, names = classifier.load_classifier()
    judge = Recogniser(model, names)
    words = [word for word in scored_words() if word in set(names)]
    words = (words * (count // len(words) + 1))[:count]
    jobs = [Job(prompt=f"a {word}", seed=seed) for seed, word in enumerate(words)]
    plain, _ = runner_of((), 0, linear=by_kind)
    expected = pictures(plain, jobs)

    def score(drawn: Sequence[Picture]) -> float:
        return judge.share([Image.fromarray(each.pixels) for each in drawn], words)

    print(json.dumps({"jobs": count, "judge": round(score(expected), 4)}), flush=True)
    each_kind = [(kind,) for kind in fp8.KINDS] if by_kind else []
    for kinds in (*each_kind, fp8.SERVED):
        runner, layers = runner_of(kinds, outliers, linear=by_kind)
        drawn = pictures(runner, jobs)
        dbs = [psnr(one.pixels, other.pixels) for one, other in zip(drawn, expected, strict=True)]
        line = {"fp8": kinds[0] if len(kinds) == 1 else "all that are served", "layers": layers}
        line |= {"outliers": outliers, "psnr_median": round(statistics.median(dbs), 1)}
        line |= {"psnr_least": round(min(dbs), 1), "judge": round(score(drawn), 4)}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
