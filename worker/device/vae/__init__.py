"""Latents to pixels and pictures to latents, by the model's VAE or a job's own: `vaes` is the door."""
