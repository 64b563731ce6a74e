"""What FP8 costs in quality, by the bundled model: PSNR beside the plain model, and the judge's score.

    python -m tests.benchmarks.precision --jobs 64              all layers that SMALLCAT_PRECISION=fp8 takes
    python -m tests.benchmarks.precision --jobs 64 --kinds      each kind of layers alone
    python -m tests.benchmarks.precision --jobs 3 --layers      outputs of layers, by the way with outliers

On a CPU FP8 is computed in float32 with the same rounding. The bundled model's projections around its
attention are convolutions of one pixel; with `--kinds` they are linear layers, as SDXL's are. Speed:
`SMALLCAT_PRECISION=fp8 python -m tests.benchmarks.engine`.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Collection, Sequence
from typing import Any

import click
import torch
from PIL import Image

from tests.benchmarks.mates import psnr
from worker.contract.job import Job
from worker.contract.settings import worker_settings
from worker.demo.training import classifier
from worker.demo.training.evaluate import Recogniser
from worker.demo.training.subjects import scored_words
from worker.device.fp8 import unet as fp8
from worker.device.fp8.layers import Fp8Linear
from worker.device.fp8.quantising import quantise
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


def inputs_of(runner: ModelRunner, unet: torch.nn.Module, jobs: Sequence[Job]) -> dict[str, torch.Tensor]:
    """Every seventh token that the linear layers of each kind get while `jobs` are drawn, by their names."""
    seen: dict[str, list[torch.Tensor]] = {}
    handles = []
    for name, module in unet.named_modules():
        if isinstance(module, torch.nn.Linear) and kind_of(name):

            def note(_module: Any, given: Any, _output: Any, name: str = name) -> None:
                seen.setdefault(name, []).append(given[0].detach().flatten(0, -2)[::7])

            handles.append(module.register_forward_hook(note))
    pictures(runner, jobs)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(each).float() for name, each in seen.items()}


def kind_of(name: str) -> str:
    """The kind of a layer; empty: it is of none."""
    return next((kind for kind, names in fp8.KINDS.items() if names.search(name)), "")


@torch.no_grad()
def outputs_db(layer: torch.nn.Linear, norm: Any, x: torch.Tensor, count: int) -> dict[str, float]:
    """How near the output of a layer in FP8 is to the exact one, in dB, by what is done with outliers."""
    weight = layer.weight.float()
    exact = x @ weight.T

    def product(values: torch.Tensor, of: torch.Tensor, outliers: torch.Tensor) -> torch.Tensor:
        plain = torch.nn.Linear(of.shape[1], of.shape[0], bias=False)
        plain.weight.data = of
        return Fp8Linear(plain, outliers).product(quantise(values, outliers))

    def near(found: torch.Tensor) -> float:
        return 10 * math.log10(float(exact.square().sum() / (exact - found).square().sum()))

    none = torch.zeros(0, dtype=torch.int64)
    by_inputs = (x.square().mean(0) * weight.square().sum(0)).topk(count).indices.sort().values
    others = torch.ones(x.shape[1]).index_fill(0, by_inputs, 0)
    apart = x[:, by_inputs] @ weight[:, by_inputs].T
    moved = (x.abs().amax(0).clamp(min=1e-5) / weight.abs().amax(0).clamp(min=1e-5)).sqrt()
    return {
        "none": near(product(x, weight, none)),
        "served": near(product(x, weight, fp8._outliers([layer], norm, count))),
        "by inputs": near(product(x, weight, by_inputs)),
        "LLM.int8": near(product(x * others, weight * others, none) + apart),
        "SmoothQuant": near(product(x / moved, weight * moved, none)),
    }


def report_layers(jobs: Sequence[Job], count: int) -> None:
    """Print the mean of `outputs_db` of each kind."""
    settings = worker_settings().model_copy(update={"device": "cpu", "precision": "fp16"})
    loaded = loader.load(settings)
    unet = loaded.pipeline.unet
    project_linearly(unet)
    found: dict[str, list[dict[str, float]]] = {}
    for name, x in inputs_of(ModelRunner(settings, loaded), unet, jobs).items():
        layer = unet.get_submodule(name)
        found.setdefault(kind_of(name), []).append(outputs_db(layer, fp8._norm_before(unet, name), x, count))
    for kind, each in found.items():
        means = {way: round(statistics.mean(one[way] for one in each), 1) for way in each[0]}
        print(json.dumps({"layers": kind, "outliers": count, **means}), flush=True)


@click.command(help=__doc__)
@click.option("--jobs", "count", default=64, show_default=True, help="Pictures, of a subject each.")
@click.option("--kinds", "by_kind", is_flag=True, help="Measure each kind of layers alone.")
@click.option("--layers", "by_layer", is_flag=True, help="Measure the outputs of layers, not pictures.")
@click.option("--outliers", default=fp8.OUTLIERS, show_default=True, help="Channels kept more precisely.")
def main(count: int, by_kind: bool, by_layer: bool, outliers: int) -> None:
    model, names = classifier.load_classifier()
    judge = Recogniser(model, names)
    words = [word for word in scored_words() if word in set(names)]
    words = (words * (count // len(words) + 1))[:count]
    jobs = [Job(prompt=f"a {word}", seed=seed) for seed, word in enumerate(words)]
    if by_layer:
        report_layers(jobs, outliers)
        return
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
