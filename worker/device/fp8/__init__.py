"""Linear layers of a UNet in FP8 (e4m3): `unet` is the door."""
