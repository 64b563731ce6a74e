"""What a .safetensors file is that is no checkpoint to serve, by the names of its tensors. No torch here.

The names are those that the formats' own tools write: kohya's sd-scripts, PEFT, LyCORIS, diffusers, ComfyUI
and the models' authors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from worker.contract.errors import SettingsError
from worker.model.headers import Tensor

_SERVED = "use a checkpoint of Stable Diffusion 1.x, 2.x or SDXL"
_WHOLE = "use the complete checkpoint, with UNet, VAE and text encoder"
_ITS_OWN = "set SMALLCAT_MODEL to the checkpoint that it is for. {} are not served yet"


class Rule(NamedTuple):
    """How a kind of file is recognised, and what the error says about it."""

    #: A name of a tensor that only this kind has.
    name: re.Pattern[str]
    #: What the file is.
    what: str
    #: What to do instead.
    remedy: str


def _rule(names: Iterable[str], what: str, remedy: str) -> Rule:
    return Rule(re.compile("|".join(names)), what, remedy)


#: Files for a model. A checkpoint with a UNet may hold leftovers of one, which mean nothing.
_ADDITIONS = (
    _rule(
        [
            r"^lora_(unet|te\d?|transformer|prior)_",
            r"[._]lora(_linear_layer)?[._](up|down|mid|A|B)(\.|$)",
            r"\.(hada_w[12]_[ab]|lokr_w[12](_[ab])?|lokr_t2|oft_(diag|blocks|R)|dora_scale)(\.|$)",
        ],
        "is a LoRA, which changes a model and is none",
        _ITS_OWN.format("LoRAs"),
    ),
    _rule(
        [r"^(image_proj|ip_adapter)\."],
        "is an IP-Adapter, which steers a model and is none",
        _ITS_OWN.format("IP-Adapters"),
    ),
    _rule(
        [r"^(adapter\.)?body\.\d+\.(block1|block2|in_conv|resnets)\.", r"^adapter\.(conv_in|body)\."],
        "is a T2I-Adapter, which steers a model and is none",
        _ITS_OWN.format("T2I-Adapters"),
    ),
    _rule(
        [r"^(emb_params|string_to_param|string_to_token)(\.|$)", r"^clip_[lg]$"],
        "is a textual inversion, which is a new word for a model",
        _ITS_OWN.format("Textual inversions"),
    ),
)

#: Other models and uses, with a UNet or without.
_KINDS = (
    _rule(
        [
            r"^lora_controlnet$",
            r"^(control_model|control_lora)\.",
            r"^(controlnet|lllite_unet)_",
            r"(^|\.)input_hint_block\.",
        ],
        "is a ControlNet, which steers a model and is none",
        _ITS_OWN.format("ControlNets"),
    ),
    _rule([r"(^|\.)motion_modules?\."], "is a motion module for AnimateDiff, and no picture model", _SERVED),
    _rule([r"\btime_(stack|mixer)\."], "is a video model, which is not served", _SERVED),
    _rule([r"(^|\.)joint_blocks\.\d+\."], "is a Stable Diffusion 3 model, which is not served yet", _SERVED),
    _rule(
        [r"(^|\.)double_blocks\.\d+\.img_attn\.(norm|qkv)\.", r"(^|\.)distilled_guidance_layer\."],
        "is a FLUX model or of its kind, which is not served yet",
        _SERVED,
    ),
    _rule(
        [r"(^|\.)clip_(txt_)?mapper\.", r"\.channelwise\."],
        "is a Stable Cascade model, which is not served",
        _SERVED,
    ),
    _rule(
        [r"^(cond_stage_model\.)?(roberta|transformation)\."],
        "is an AltDiffusion model, which is not served",
        _SERVED,
    ),
    _rule(
        [r"^(embedder|noise_augmentor)\."], "is an unCLIP model, which takes a picture, no prompt", _SERVED
    ),
    _rule([r"^cc_projection\."], "is a Zero123 model, which takes a picture, no prompt", _SERVED),
    _rule([r"^depth_model\."], "is a depth-to-image model, which takes a picture as well", _SERVED),
    _rule(
        [r"^edm_(mean|std)$"], "is Playground 2.5 or of its kind, whose noise (EDM) is not served", _SERVED
    ),
    _rule([r"^edm_vpred\."], "is CosXL or of its kind, whose noise (EDM) is not served", _SERVED),
)

#: Parts of a model, and what is none: where no UNet in Stable Diffusion's original layout is in the file.
_PARTS = (
    _rule([r"^(diffusion_model\.|unet\.)?input_blocks\.\d+\."], "is a UNet alone", _WHOLE),
    _rule(
        [r"^unet\.(conv_in|down_blocks\.\d+)\."],
        "has the names of a folder in the format of diffusers, with all components in one file",
        "set SMALLCAT_MODEL to the folder with model_index.json that it was made from",
    ),
    _rule(
        [r"^(taesd_)?(encoder|decoder)\.(layers\.)?\d+\.(conv\.|weight$|bias$)", r"^taesd_"],
        "is a tiny VAE for previews (TAESD)",
        _WHOLE,
    ),
    _rule(
        [r"^conv_in\.", r"^down_blocks\.\d+\."],
        "is the UNet of a folder in the format of diffusers, without the other components",
        "set SMALLCAT_MODEL to the folder with model_index.json that it belongs to",
    ),
    _rule(
        [
            r"^(\w+\.)*(single_|double_|double_stream_)?(transformer_)?(blocks|layers)\.\w+\.(img_|txt_|attn)",
            r"(^|\.)(scale_shift_table$|adaLN_modulation\.|cross_attn\.)",
        ],
        "is a transformer for diffusion, such as PixArt's or Wan's, which is not served",
        _SERVED,
    ),
    _rule(
        [r"^model_ema\.diffusion_model"],
        "has nothing but averaged weights for training (model_ema)",
        "use the version of the model that is made for drawing",
    ),
    _rule(
        [r"^(first_stage_model\.|vae\.)?(encoder|decoder)\.(down|up|mid|conv_in|down_blocks|mid_block)\."],
        "is a VAE alone",
        "set SMALLCAT_MODEL to a checkpoint NAME.safetensors, with the VAE beside it as NAME.vae.safetensors",
    ),
    _rule(
        [r"^(vision_model|visual)\.", r"\.(vision_model|visual)\."],
        "is CLIP's image encoder, or all of CLIP",
        _WHOLE,
    ),
    _rule(
        [
            r"(^|\.)encoder\.layers\.\d+\.",
            r"(^|\.)transformer\.resblocks\.\d+\.",
            r"(^|\.)encoder\.block\.\d+\.layer\.",
            r"^(model\.)?layers\.\d+\.self_attn\.",
        ],
        "is a text encoder alone",
        _WHOLE,
    ),
    _rule([r"^model\.\d+\.", r"^(body|conv_first|params_ema)\."], "is an upscaler", _SERVED),
)


def refuse_foreign(tensors: Mapping[str, Tensor], source: str, *, has_unet: bool) -> None:
    """Raise `SettingsError` if a file with these `tensors` is something that is never served.

    `has_unet`: whether it has a UNet in Stable Diffusion's original layout. A file without one is refused in
    any case. The first rule that fits counts.
    """
    for rule in _KINDS if has_unet else (*_ADDITIONS, *_KINDS, *_PARTS):
        if any(rule.name.search(name) for name in tensors):
            raise SettingsError(f"The file {source} {rule.what}: {rule.remedy}.")
    if not has_unet:
        shown = ", ".join(sorted(tensors)[:2]) or "no tensors"
        raise SettingsError(
            f"The file {source} is not a Stable Diffusion checkpoint (it has {shown}): {_SERVED}."
        )
