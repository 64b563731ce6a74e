"""The bundled demo model, in `model/`, its LoRAs, in `loras/`, and its training, in `training/`.

`diffusers.StableDiffusionPipeline.from_pretrained` loads the folder `model/`. The rest of `worker` uses both
by their paths only, and imports nothing from here.
"""
