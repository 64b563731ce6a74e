"""The bundled demo model and the recipe that makes it.

The weights lie in `model/` and load by `diffusers.StableDiffusionPipeline.from_pretrained`.
The rest of `worker` uses that folder by its path only and imports nothing from here.
"""
