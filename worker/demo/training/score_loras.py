"""Scores the bundled LoRAs: `python -m worker.demo.training.score_loras`, some minutes on two CPU cores.

Each style draws the same prompts and seeds at weight 1. The style judge names style and subject of each
picture, and the classifier, which knows the emoji's own colours only, the subject.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file

from worker.demo.training import classifier, evaluate
from worker.demo.training.scenes import contact_sheet
from worker.demo.training.style_judge import NAMES, NONE, StyleJudge
from worker.demo.training.subjects import scored_words

#: The bundled LoRAs.
LORAS = Path(__file__).parents[1] / "loras"


@contextlib.contextmanager
def with_lora(unet: UNet2DConditionModel, path: Path, weight: float = 1.0) -> Iterator[None]:
    """A context in which the UNet has one of our LoRAs added to its weights."""
    tensors = load_file(path)
    before = {}
    for name in tensors:
        module, is_down, _ = name.partition(".lora_A.")
        if not is_down:
            continue
        layer = unet.get_submodule(module.removeprefix("unet.")).get_parameter("weight")
        down, up = tensors[name].float().flatten(1), tensors[f"{module}.lora_B.weight"].float().flatten(1)
        before[layer] = layer.data.clone()
        layer.data += weight * (up @ down).view(layer.shape)
    try:
        yield
    finally:
        for layer, data in before.items():
            layer.data.copy_(data)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--loras", type=Path, default=LORAS, help="folder of the LoRAs")
    parser.add_argument(
        "--subjects", type=int, default=64, help="how many of the common subjects (default 64)"
    )
    parser.add_argument("--sheet", type=Path, help="file for a picture of the first eight of each style")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU (default 2)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    pipeline = StableDiffusionPipeline.from_pretrained(evaluate.MODEL)
    pipeline.unet.to(memory_format=torch.channels_last)
    judge, recogniser = StyleJudge(), evaluate.Recogniser(*classifier.load_classifier())
    words = scored_words()[: arguments.subjects]
    shown = []
    print(f"{'':8} style  subject  subject, by the classifier")
    for style in NAMES:
        lora = arguments.loras / f"{style}.safetensors"
        with contextlib.nullcontext() if style == NONE else with_lora(pipeline.unet, lora):
            images = evaluate.draw(pipeline, [f"a {word}" for word in words], range(len(words)))
        found = judge.judge(images)
        styles = sum(each == style for each, _ in found)
        subjects = sum(each == word for (_, each), word in zip(found, words, strict=True))
        known = round(recogniser.share(images, words) * len(words))
        print(f"{style:8} {styles:5}  {subjects:7}  {known:7} of {len(words)}", flush=True)
        shown += images[:8]
    if arguments.sheet:
        contact_sheet(shown).save(arguments.sheet)


if __name__ == "__main__":
    main()
