"""How diffusers' schedulers are asked for a noise schedule."""

from __future__ import annotations

from typing import Any

#: The table "Noise schedules and schedule types" of diffusers' documentation, api/schedulers/overview.
IN_DIFFUSERS: dict[str, dict[str, Any]] = {
    "default": {},
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True, "timestep_spacing": "linspace"},
    "beta": {"use_beta_sigmas": True, "timestep_spacing": "linspace"},
    "sgm_uniform": {"timestep_spacing": "trailing"},
    "simple": {"timestep_spacing": "trailing"},
    "align_your_steps": {},
}
