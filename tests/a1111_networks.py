"""AUTOMATIC1111's extra networks, apart from the product: for tests alone, and without torch."""

from __future__ import annotations

import re


def networks(prompt: str) -> tuple[str, list[tuple[str, float, float]]]:
    """The prompt without extra networks, and (name, weight of text encoders, of the UNet) of its LoRAs.

    Version 1.10.1, modules/extra_networks.py and extensions-builtin/Lora/extra_networks_lora.py: all found by
    one expression in the prompt without comments, and read one after the other.
    """
    plain = "\n".join(line.partition("#")[0] for line in prompt.split("\n"))
    found = []
    for kind, arguments in re.findall(r"<(\w+):([^>]+)>", plain):
        if kind not in ("lora", "lyco"):
            continue
        items = [item.split("=", 2) for item in arguments.split(":")]
        values = [item[0] for item in items if len(item) == 1]
        named = {item[0]: item[1] for item in items if len(item) == 2}
        of_text = float(named.get("te", values[1] if len(values) > 1 else 1.0))
        found.append(
            (values[0], of_text, float(named.get("unet", values[2] if len(values) > 2 else of_text)))
        )
    return re.sub(r"<\w+:[^>]+>", "", plain), found
