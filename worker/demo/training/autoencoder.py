"""The VAE: pictures to latents of an eighth of the width and height, and back. Trained on emoji alone.

A `diffusers.AutoencoderKL` with 16 latent channels, as Stable Diffusion 3's has; 4 blur edges.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from diffusers import AutoencoderKL
from torch.nn import functional

from worker.demo.training.captions import BACKGROUNDS
from worker.demo.training.recipe import Clock, Recipe, rate_factor, searched_convolutions
from worker.demo.training.scenes import Composer, Layout

#: Pixels a side of the windows that the VAE trains on. The subjects fill them: a whole picture is mostly
#: background, from which little is learnt.
_WINDOW = 96


def build_autoencoder(recipe: Recipe) -> AutoencoderKL:
    """An untrained VAE, without attention, so that it decodes pictures of any size equally well."""
    levels = len(recipe.autoencoder_channels)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=recipe.autoencoder_channels,
        latent_channels=recipe.latent_channels,
        norm_num_groups=8,
        sample_size=recipe.size,
        scaling_factor=1.0,
        force_upcast=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )


def windows(count: int, composer: Composer) -> torch.Tensor:
    """Training windows (count, 3, 96, 96): one or two subjects of 28 to 130 px, some cut off."""
    device = composer.device
    subjects = torch.randint(composer.count, (count, 2), device=device)
    subjects[:, 1] = torch.where(torch.rand(count, device=device) < 0.3, subjects[:, 1], -1)
    # Uniform in the logarithm, so that small subjects are frequent enough.
    side = 28 * (130 / 28) ** torch.rand(count, 2, device=device)
    centre = (0.5 + (torch.rand(count, 2, 2, device=device) - 0.5) * 0.7) * _WINDOW
    # The background is pure white, one of the named colours, or any colour.
    named = torch.tensor(list(BACKGROUNDS.values()), device=device) / 255
    kind = torch.rand(count, 1, device=device)
    colour = torch.where(
        kind < 0.35,
        named[torch.randint(len(named), (count,), device=device)],
        torch.rand(count, 3, device=device),
    )
    return composer.draw(
        Layout(subjects, side, centre, torch.where(kind > 0.5, 1.0, colour)), _WINDOW, _WINDOW
    )


def picture_loss(drawn: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """L1 and squared error of pixels, and L1 of their differences to the right and down, in two sizes.

    The differences sharpen edges, which plain L1 leaves soft.
    """
    loss = torch.zeros((), device=wanted.device)
    for scale in range(2):
        if scale:
            drawn, wanted = functional.avg_pool2d(drawn, 2), functional.avg_pool2d(wanted, 2)
        error = drawn - wanted
        right = error[..., :, 1:] - error[..., :, :-1]
        down = error[..., 1:, :] - error[..., :-1, :]
        loss = loss + error.abs().mean() + right.abs().mean() + down.abs().mean() + error.square().mean()
    return loss


def train_autoencoder(vae: AutoencoderKL, composer: Composer, recipe: Recipe, clock: Clock) -> None:
    """Trains encoder and decoder until the clock is over, and gives the latents mean 0 and deviation 1."""

    def loss_of(pictures: torch.Tensor) -> torch.Tensor:
        posterior = vae.encode(pictures).latent_dist
        excess = posterior.mean.float().square() + posterior.var.float() - 1 - posterior.logvar.float()
        loss = picture_loss(vae.decode(posterior.sample()).sample.float(), pictures)
        total: torch.Tensor = loss + recipe.kl_weight * 0.5 * excess.mean()
        return total

    normalised = False
    optimizer = torch.optim.AdamW(
        vae.parameters(), lr=recipe.autoencoder_rate, betas=(0.9, 0.99), weight_decay=0.01
    )
    run = _stepper(loss_of, composer, recipe, optimizer)
    step = 0
    while not clock.over:
        _set_rate(optimizer, recipe.autoencoder_rate * rate_factor(step, clock.progress))
        with searched_convolutions():
            loss = run(windows(recipe.autoencoder_batch, composer))
        if not normalised and clock.progress > 0.6:
            # Before the end, because it changes what the convolutions' zero padding means at the border. The
            # rest of the training corrects that.
            normalise_latents(vae, windows(8 * recipe.autoencoder_batch, composer))
            normalised = True
        if step % 250 == 0:
            print(f"autoencoder step {step} {clock.elapsed:.2f} min loss {float(loss):.4f}", flush=True)
        step += 1
    print(f"autoencoder: {step} steps", flush=True)


def _stepper(
    loss_of: Callable[[torch.Tensor], torch.Tensor],
    composer: Composer,
    recipe: Recipe,
    optimizer: torch.optim.Optimizer,
) -> Callable[[torch.Tensor], torch.Tensor]:
    """One optimiser step on a batch of pictures, in bfloat16 on a GPU. Returns the loss."""
    fast = torch.compile(loss_of) if recipe.compiled else loss_of
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def run(pictures: torch.Tensor) -> torch.Tensor:
        pictures = pictures.contiguous(memory_format=torch.channels_last)
        with torch.autocast(composer.device.type, torch.bfloat16, enabled=composer.device.type == "cuda"):
            loss = fast(pictures)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return run


def _set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


@torch.no_grad()
def normalise_latents(vae: AutoencoderKL, pictures: torch.Tensor) -> None:
    """Gives every latent channel mean 0 and deviation 1, by folding both into the weights.

    The pipeline has one scaling factor for all channels and no shift.
    """
    latents = torch.cat([vae.encode(chunk).latent_dist.mode() for chunk in pictures.split(128)])
    mean, deviation = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3)).clamp(min=1e-4)
    out, entry = vae.encoder.conv_out, vae.decoder.conv_in
    channels = len(mean)
    out.weight[:channels] /= deviation[:, None, None, None]
    out.bias[:channels] = (out.bias[:channels] - mean) / deviation
    out.bias[channels:] -= 2 * deviation.log()
    entry.bias += (entry.weight * mean[None, :, None, None]).sum(dim=(1, 2, 3))
    entry.weight *= deviation[None, :, None, None]


@torch.no_grad()
def peak_signal_to_noise(vae: AutoencoderKL, pictures: torch.Tensor) -> float:
    """The mean PSNR of the reconstructions of pictures (n, 3, height, width; -1..1), decibels."""
    values = []
    for chunk in pictures.split(64):
        drawn = vae.decode(vae.encode(chunk).latent_dist.mode()).sample.float().clamp(-1, 1)
        values.append(10 * torch.log10(4 / (drawn - chunk).square().mean(dim=(1, 2, 3)).clamp(min=1e-8)))
    return float(torch.cat(values).mean())
