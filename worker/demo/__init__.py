"""The bundled demo model, in `model/`, and its training, in `training/`.

`diffusers.StableDiffusionPipeline.from_pretrained` loads the folder `model/`. The rest of `worker` uses it by
its path only, and imports nothing from here.
"""
