"""LoRAs on the device: their files' factors, and layers that add each row's own: `cache` is the door."""
