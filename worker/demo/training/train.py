"""Trains the demo model: `python -m worker.demo.training.train --out OUT`, one GPU, under 20 minutes.

Three stages, each with its minutes in `recipe.py`: the autoencoder, the classifier, and the denoiser with its
text encoder. The model is saved after each stage, and every two minutes within the last. `--resume` continues
from what OUT holds. At the end the model is scored.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from worker.demo.training import autoencoder, classifier, denoiser, evaluate
from worker.demo.training.captions import Scene, SceneWriter
from worker.demo.training.recipe import Clock, Recipe
from worker.demo.training.scenes import Composer, SceneBatch, contact_sheet, to_images
from worker.demo.training.subjects import Subject, load_subjects
from worker.demo.training.tokenizer import train_tokenizer

STAGES = ("autoencoder", "classifier", "denoiser")
#: Captions from which the vocabulary is learnt.
_VOCABULARY_CAPTIONS = 60_000
#: Minutes after which the denoiser is saved again.
_SAVE_EVERY = 2.0


@dataclass
class Run:
    """One run of the recipe: the data, the models so far, and the time spent on each stage."""

    recipe: Recipe
    out: Path
    device: torch.device
    #: Minutes that this run may take.
    minutes: float
    subjects: list[Subject]
    composer: Composer
    writer: SceneWriter
    tokenizer: CLIPTokenizer
    vae: AutoencoderKL
    model: denoiser.Denoiser
    classifier: classifier.Classifier
    #: Minutes spent by stage, over all runs.
    spent: dict[str, float]
    started: float

    def clock(self, stage: str) -> Clock:
        """A clock for a stage, which counts the time of earlier runs."""
        planned = getattr(self.recipe, f"{stage}_minutes")
        left = self.minutes - (time.monotonic() - self.started) / 60
        return Clock(planned, self.spent[stage], max(0.0, left))

    def finish(self, stage: str, clock: Clock) -> None:
        """Records the time spent on a stage, and saves everything."""
        self.spent[stage] = clock.elapsed
        self.save()
        print(f"{stage}: {clock.elapsed:.1f} of {clock.minutes} min, saved", flush=True)

    def pipeline(self) -> StableDiffusionPipeline:
        """The model as a pipeline. Call it between two `model.swap()`."""
        return StableDiffusionPipeline(
            vae=self.vae,
            text_encoder=self.model.text_encoder,
            tokenizer=self.tokenizer,
            unet=self.model.unet,
            scheduler=denoiser.build_scheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )

    def save(self) -> None:
        """Writes OUT: model and classifier as the repository has them, and the full state for `--resume`."""
        torch.save(
            {
                "weights": [parameter.detach() for parameter in self.model.parameters],
                "average": self.model.average,
                "steps": self.model.steps,
                "vae": self.vae.state_dict(),
                "scaling_factor": self.vae.config.scaling_factor,
                "judge": self.classifier.state_dict(),
                "spent": self.spent,
            },
            self.out / "state.pt",
        )
        self.model.swap()
        save_half(self.pipeline(), self.out / "model")
        self.model.swap()
        recommended = {"steps": evaluate.STEPS, "guidance_scale": evaluate.GUIDANCE}
        (self.out / "model" / "smallcat.json").write_text(json.dumps(recommended) + "\n", encoding="utf-8")
        classifier.save_classifier(
            self.classifier, [subject.name for subject in self.subjects], self.out / classifier.WEIGHTS.name
        )
        (self.out / "spent.json").write_text(json.dumps(self.spent) + "\n", encoding="utf-8")

    def load(self) -> None:
        """Reads OUT: the full state or, where that is missing, the model in half precision."""
        if (self.out / "state.pt").exists():
            state = torch.load(self.out / "state.pt", map_location=self.device)
            with torch.no_grad():
                for parameter, kept in zip(self.model.parameters, state["weights"], strict=True):
                    parameter.copy_(kept)
            self.model.average, self.model.steps, self.spent = (
                state["average"],
                state["steps"],
                state["spent"],
            )
            self.vae.load_state_dict(state["vae"])
            self.vae.register_to_config(scaling_factor=state["scaling_factor"])
            self.classifier.load_state_dict(state["judge"])
            return
        model = self.out / "model"
        vae = AutoencoderKL.from_pretrained(model, subfolder="vae")
        self.vae.load_state_dict(vae.state_dict())
        self.vae.register_to_config(scaling_factor=vae.config.scaling_factor)
        unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet")
        self.model.unet.load_state_dict(unet.state_dict())
        text_encoder = CLIPTextModel.from_pretrained(model, subfolder="text_encoder", dtype=torch.float32)
        self.model.text_encoder.load_state_dict(text_encoder.state_dict())
        self.model.average = [parameter.detach().clone() for parameter in self.model.parameters]
        self.classifier.load_state_dict(
            classifier.load_classifier(self.out / classifier.WEIGHTS.name)[0].state_dict()
        )
        self.spent = json.loads((self.out / "spent.json").read_text(encoding="utf-8"))


def save_half(pipeline: StableDiffusionPipeline, path: Path) -> None:
    """Saves the pipeline with fp16 weights. The pipeline itself stays in fp32."""
    for name in ("vae", "text_encoder", "unet"):
        part: Any = getattr(pipeline, name)
        original = {key: value.clone() for key, value in part.state_dict().items()}
        part.half().save_pretrained(path / name)
        part.float().load_state_dict(original)
    # transformers loads in the precision that is named here, and diffusers in fp32: both must be the same.
    config = path / "text_encoder" / "config.json"
    settings = json.loads(config.read_text(encoding="utf-8")) | {"dtype": "float32"}
    config.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    pipeline.tokenizer.save_pretrained(path / "tokenizer")
    pipeline.scheduler.save_pretrained(path / "scheduler")
    pipeline.save_config(path)


def begin(recipe: Recipe, data: Path, out: Path, minutes: float, limit: int | None = None) -> Run:
    """Reads the data and builds untrained models. `limit`: only the first so many subjects, for tests."""
    started = time.monotonic()
    torch.manual_seed(recipe.seed)
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    out.mkdir(parents=True, exist_ok=True)
    subjects = load_subjects(data)[:limit]
    # A writer of its own, so that the vocabulary does not depend on what the stages draw.
    words = SceneWriter(subjects, recipe.seed)
    tokenizer = train_tokenizer(words.draw().caption for _ in range(min(recipe.scenes, _VOCABULARY_CAPTIONS)))
    unet: Any = denoiser.build_unet(recipe)
    text_encoder: Any = denoiser.build_text_encoder(recipe, tokenizer)
    model = denoiser.Denoiser(unet.to(device, memory_format=torch.channels_last), text_encoder.to(device))
    run = Run(
        recipe=recipe,
        out=out,
        device=device,
        minutes=minutes,
        subjects=subjects,
        composer=Composer(subjects, data, device),
        writer=SceneWriter(subjects, recipe.seed + 1),
        tokenizer=tokenizer,
        vae=autoencoder.build_autoencoder(recipe).to(device, memory_format=torch.channels_last),
        model=model,
        classifier=classifier.Classifier(len(subjects)).to(device),
        spent=dict.fromkeys(STAGES, 0.0),
        started=started,
    )
    print(f"{len(subjects)} subjects on {device}, ready after {time.monotonic() - started:.0f} s", flush=True)
    return run


def make_autoencoder(run: Run) -> None:
    """The first stage: trains the VAE, and sets the scaling factor of its latents."""
    clock = run.clock("autoencoder")
    autoencoder.train_autoencoder(run.vae, run.composer, run.recipe, clock)
    scenes = draw_scenes(run.writer, min(1024, run.recipe.scenes), run.device)
    with torch.no_grad():
        pictures = run.composer.draw(
            scenes.layout(run.recipe.size, run.recipe.size), run.recipe.size, run.recipe.size
        )
        latents = torch.cat([run.vae.encode(chunk).latent_dist.mode() for chunk in pictures.split(128)])
    run.vae.register_to_config(scaling_factor=round(float(1 / latents.std()), 4))
    print(f"latents: mean {float(latents.mean()):.3f} deviation {float(latents.std()):.3f}", flush=True)
    report_autoencoder(run, pictures[:256])
    run.finish("autoencoder", clock)


def report_autoencoder(run: Run, pictures: torch.Tensor) -> None:
    """Prints the PSNR, and saves 16 pictures above their reconstructions as `autoencoder.png`."""
    print(f"autoencoder: {autoencoder.peak_signal_to_noise(run.vae, pictures):.2f} dB", flush=True)
    with torch.no_grad():
        again = run.vae.decode(run.vae.encode(pictures[:16]).latent_dist.mode()).sample
    pairs = torch.cat([pictures[:8], again[:8], pictures[8:16], again[8:16]])
    contact_sheet(to_images(pairs)).save(run.out / "autoencoder.png")


def make_classifier(run: Run) -> None:
    """The second stage: trains the classifier."""
    clock = run.clock("classifier")
    classifier.train_classifier(run.classifier, run.composer, run.recipe, clock)
    run.finish("classifier", clock)


def draw_scenes(writer: SceneWriter, count: int, device: torch.device) -> SceneBatch:
    """`count` scenes as tensors, without their captions."""
    return SceneBatch.of([writer.draw() for _ in range(count)], device)


def make_denoiser(run: Run) -> None:
    """The third stage: trains the denoiser and its text encoder, and saves them every two minutes."""
    recipe, composer = run.recipe, run.composer
    clock = run.clock("denoiser")

    def pool(count: int, canvas: tuple[int, int]) -> denoiser.LatentPool:
        scenes: list[Scene] = [run.writer.draw() for _ in range(count)]
        tokens = denoiser.tokens_of([scene.caption for scene in scenes], run.tokenizer)
        square = canvas == (recipe.size, recipe.size)
        filled = denoiser.LatentPool(scenes, tokens, canvas, composer, run.vae, recipe.compiled and square)
        filled.fill()
        return filled

    main = pool(recipe.scenes, (recipe.size, recipe.size))
    others = [pool(recipe.other_scenes, canvas) for canvas in recipe.other_sizes]
    print(f"pools filled after {clock.elapsed - clock.spent:.2f} min", flush=True)
    trainer = denoiser.DenoiserTrainer(run.model, recipe, denoiser.tokens_of([""], run.tokenizer), run.device)
    end = clock.spent + clock.allowed
    while not clock.over:
        clock.allowed = min(end, clock.elapsed + _SAVE_EVERY) - clock.spent
        trainer.train(main, others, clock)
        clock.allowed = end - clock.spent
        run.finish("denoiser", clock)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the model and the state")
    parser.add_argument(
        "--data",
        type=Path,
        default=Path("data"),
        help="folder for the npm tarballs, which are downloaded if missing",
    )
    parser.add_argument("--minutes", type=float, default=18.5, help="minutes for this run (default 18.5)")
    parser.add_argument("--resume", action="store_true", help="continue from what --out holds")
    parser.add_argument(
        "--stages", nargs="+", choices=STAGES, default=STAGES, help="stages to run (default all)"
    )
    parser.add_argument(
        "--seed", type=int, default=Recipe().seed, help="seed of data and weights (default 0)"
    )
    arguments = parser.parse_args()
    recipe = dataclasses.replace(Recipe(seed=arguments.seed), compiled=torch.cuda.is_available())
    run = begin(recipe, arguments.data, arguments.out, arguments.minutes)
    if arguments.resume:
        run.load()
    stages = (make_autoencoder, make_classifier, make_denoiser)
    for name, stage in zip(STAGES, stages, strict=True):
        if name in arguments.stages and run.spent[name] < getattr(recipe, f"{name}_minutes"):
            stage(run)
    run.model.swap()
    evaluate.report(run.pipeline(), run.out, run.classifier, [subject.name for subject in run.subjects])


if __name__ == "__main__":
    main()
