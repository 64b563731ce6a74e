"""Fits the linear map from the bundled model's latents to RGB, for previews.

    python -m worker.demo.training.latent_rgb     prints what `worker.device.latent_rgb` has

Least squares over the pictures of some prompts: each pixel of their latents, and the mean colour of the 8 x 8
pixels that the VAE makes of it.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

#: The prompts, and the seeds of each.
PROMPTS = ("a small cat", "a red house", "a rocket", "a green tree", "a blue fish", "a yellow sun")
SEEDS = 2


@torch.no_grad()
def main() -> None:
    """Print the factors, a line a channel, and how well they fit."""
    pipeline = StableDiffusionPipeline.from_pretrained(str(Path(__file__).parents[1] / "model"))
    pipeline.set_progress_bar_config(disable=True)
    points, colours = [], []
    for prompt in PROMPTS:
        for seed in range(SEEDS):
            generator = torch.Generator().manual_seed(seed)
            latents = pipeline(
                prompt, num_inference_steps=20, guidance_scale=2.0, generator=generator, output_type="latent"
            ).images
            images = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample.clamp(-1, 1)
            factor = images.shape[-1] // latents.shape[-1]
            points.append(latents[0].flatten(1).T)
            colours.append(torch.nn.functional.avg_pool2d(images, factor)[0].flatten(1).T)
    known, wanted = torch.cat(points), torch.cat(colours)
    with_one = torch.cat([known, torch.ones(len(known), 1)], dim=1)
    found = torch.linalg.lstsq(with_one, wanted).solution
    error = (with_one @ found - wanted).pow(2).mean().sqrt()
    for row in found.tolist():
        print("            (" + ", ".join(f"{value:.4f}" for value in row) + "),")
    print(f"the last row is the bias; root mean square error {error:.3f} of 2")


if __name__ == "__main__":
    main()
