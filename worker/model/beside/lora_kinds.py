"""What lies among LoRAs and is not offered, by the names of its tensors. No torch here.

The names are those that the kinds' own tools write: LyCORIS, PEFT, OneTrainer, ComfyUI and the models'
authors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_SERVED = "use one for SD 1.x, SD 2.x or SDXL"
_OFFERED = "LoRA, LoCon and DoRA are"
#: A name that only this kind has, and what the error says. The first one that fits counts.
_KINDS = tuple(
    (re.compile(name), sentence)
    for name, sentence in (
        (
            r"^(model\.diffusion_model|first_stage_model|cond_stage_model|conditioner)\.",
            "it is a checkpoint and no LoRA: SMALLCAT_MODEL is for it",
        ),
        (
            r"^(emb_params|string_to_param|string_to_token)(\.|$)|^clip_[lg]$",
            "it is a textual inversion and no LoRA: SMALLCAT_EMBEDDINGS is for it",
        ),
        (
            r"^lora_controlnet$|^(control_model|control_lora)\.|^(controlnet|lllite_unet)_|input_hint_block",
            "it is a ControlNet, which is not served",
        ),
        (r"^(image_proj|ip_adapter)\.", "it is an IP-Adapter, which is not served"),
        (r"motion_modules?[._]", f"it is for AnimateDiff, which is not served: {_SERVED}"),
        # --- LoRAs for other models
        (
            r"(double|single)_blocks[._]\d|single_transformer_blocks[._]\d",
            f"it is for FLUX or a model of its kind, which is not served: {_SERVED}",
        ),
        (r"joint_blocks[._]\d|^lora_te3[._]", f"it is for SD 3, which is not served: {_SERVED}"),
        (
            r"^lora_prior|[._]channelwise[._]|clip_(txt_)?mapper",
            f"it is for Stable Cascade, which is not served: {_SERVED}",
        ),
        (
            r"^(lora_)?transformer[._]|^(lora_unet_|diffusion_model[._])?(transformer_blocks|blocks|layers)[._]\d",
            f"it is for a transformer for diffusion, such as SD 3 or Wan, which is not served: {_SERVED}",
        ),
        # --- other ways to change a model
        (r"\.hada_", f"it is a LoHa, which is not offered: {_OFFERED}"),
        (r"\.lokr_", f"it is a LoKr, which is not offered: {_OFFERED}"),
        (r"[._](boft_|oft_)", f"it is an OFT or BOFT, which is not offered: {_OFFERED}"),
        (r"\.on_input$|[._]ia3_", f"it is an IA3, which is not offered: {_OFFERED}"),
        (r"\.(a1|a2|b1|b2|bm1|bm2)\.weight$", f"it is a GLoRA, which is not offered: {_OFFERED}"),
        (r"[._](vera_|randlora_|delora_)|\.lora_E$", f"it is no plain LoRA, and not offered: {_OFFERED}"),
        (
            r"\.(diff|diff_b|set_weight|reshape_weight)$|\.(w_norm|b_norm)$",
            f"it has full differences of weights, biases or norms, which are not offered: {_OFFERED}",
        ),
        (r"\.scalar$", "it has LyCORIS' scalars, which are not read: save it with LyCORIS 1.9 or later"),
        (
            r"^bundle_emb\.",
            "it has an embedding in it, which would be left out: save the LoRA without it",
        ),
        (
            r"\.lora_embedding_[AB]",
            f"it changes the words of a text encoder, which is not offered: {_OFFERED}",
        ),
        (r"\.lora_[AB](\.default)?\.bias$", f"it has biases (lora_bias), which are not offered: {_OFFERED}"),
    )
)


def refusal(names: Iterable[str]) -> str:
    """Why a file with tensors of these names cannot be used, and one of them; empty where none is known."""
    names = list(names)
    for name, sentence in _KINDS:
        if (found := next((each for each in names if name.search(each)), None)) is not None:
            what, colon, remedy = sentence.partition(": ")
            return f"{what} (it has {found[:100]}){colon}{remedy}"
    return ""
