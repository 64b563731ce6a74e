"""The parameters of a second pass: the picture is made larger, and drawn on at its new size.

Such a job has an `upscale` above 1. A job without one has the others at their defaults, or it is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Final, NamedTuple

from annotated_types import Gt
from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo

from worker.contract import a1111_syntax
from worker.contract.choices import ALIGN_YOUR_STEPS, UPSCALERS, NoiseSchedule, PromptSyntax, Upscaler
from worker.contract.explain import short
from worker.contract.input_parameters import InputParameters, least_strength, leaves_steps
from worker.contract.input_reference import InputReference
from worker.contract.job_checks import spelled_as
from worker.contract.job_fields import JobField
from worker.contract.job_parameters import MAX_SIZE, MAX_STEPS, SIZE_STEP
from worker.contract.stored_jobs import NarrowedTo

#: The version of messages that has these fields.
SECOND_PASS_SINCE: Final = 4
#: `upscale_strength` where it is not given.
UPSCALE_STRENGTH: Final = 0.5
#: How many times larger a picture becomes, at most.
MAX_UPSCALE: Final = 4.0
#: Steps that `upscale_strength` takes its share of, at most: 150 are run of 750 at a strength of 0.2.
MAX_UPSCALE_STEPS: Final = 750


class SecondPass(NamedTuple):
    """The second pass of a job whose fields are all known."""

    #: Pixels.
    width: int
    height: int
    #: Steps of its schedule, of which `int(steps * strength)` are run: the last ones.
    steps: int
    strength: float

    @property
    def steps_run(self) -> int:
        """Steps that are run, as diffusers' image-to-image pipelines count them."""
        return int(self.steps * self.strength)


def upscaled(side: int, upscale: float) -> int:
    """A side in pixels, so many times larger, rounded down to a multiple of 8 as AUTOMATIC1111 does."""
    # A little above, because 1.6 * 640 may be a little less than 1,024.
    return int(side * upscale + 1e-6) // SIZE_STEP * SIZE_STEP


def pixel_steps(fields: Mapping[str, Any]) -> int | None:
    """Width x height x steps of a job, those of its second pass included; None where a part is not known."""
    sides = [fields.get(name) for name in ("width", "height", "steps")]
    if None in sides:
        return None
    width, height, steps = (int(each or 0) for each in sides)
    work, upscale = width * height * steps, float(fields.get("upscale") or 1)
    if upscale > 1:
        strength = float(fields.get("upscale_strength") or UPSCALE_STRENGTH)
        run = int(int(fields.get("upscale_steps") or steps) * strength)
        work += upscaled(width, upscale) * upscaled(height, upscale) * run
    return work


def _upscale(value: float, info: ValidationInfo) -> float:
    """Refuse what makes the picture too large, and a job that draws a part of an image."""
    if value == 1:
        return value
    if info.data.get("mask"):
        raise ValueError(f"is {value:g}, and is not for a job with a mask: leave one of them out")
    sides = info.data.get("width"), info.data.get("height")
    given = [side for side in sides if side is not None]
    if any(upscaled(side, value) > MAX_SIZE for side in given):
        of, to = (
            "x".join(str(each) for each in sizes)
            for sizes in (given, [upscaled(each, value) for each in given])
        )
        most = int(100 * MAX_SIZE / max(given)) / 100
        remedy = f"use at most {most:g}" if most > 1 else "leave it out"
        side = int(MAX_SIZE / value) // SIZE_STEP * SIZE_STEP
        remedy += f", or use a width and height of at most {side:,}"
        raise ValueError(
            f"is {value:g}, which makes {to} px of {of}, the limit is {MAX_SIZE:,} a side: {remedy}"
        )
    return value + 0.0


def _for_a_second_pass(default: object) -> AfterValidator:
    """Refuse another value than the default where there is no second pass."""

    def check(value: object, info: ValidationInfo) -> object:
        if value != default and info.data.get("upscale") == 1:
            shown = short(str(value) if isinstance(value, str) else value)
            raise ValueError(f"is {shown}, and is for a second pass: give upscale, or leave it out")
        return value

    return AfterValidator(check)


def _steps(value: int | None, info: ValidationInfo) -> int | None:
    """Refuse numbers of steps that the schedule has no noise levels for."""
    schedule = info.data.get("schedule")
    if value is not None and schedule is NoiseSchedule.ALIGN_YOUR_STEPS and value != ALIGN_YOUR_STEPS:
        raise ValueError(f'is {value}, but schedule "{schedule}" has {ALIGN_YOUR_STEPS}: leave it out')
    return value


def _strength(value: float, info: ValidationInfo) -> float:
    """Refuse a strength that leaves no step, or more than a job may have."""
    steps = info.data.get("upscale_steps") or info.data.get("steps")
    if info.data.get("upscale", 1) == 1 or steps is None:
        return value
    if not leaves_steps(value, steps):
        raise ValueError(
            f"is {value:g}, which leaves none of {steps} steps: use at least {least_strength(steps)}, or "
            "more upscale_steps"
        )
    if int(steps * value) > MAX_STEPS:
        raise ValueError(
            f"is {value:g}, which runs {int(steps * value)} of {steps} steps, the limit is {MAX_STEPS}: use "
            "less"
        )
    # A prompt that is wrong by itself has its own error.
    has_prompts = {"prompt", "negative_prompt"} <= info.data.keys()
    if has_prompts and info.data.get("prompt_syntax") is PromptSyntax.A1111 and info.data.get("steps"):
        a1111_syntax.check(
            info.data["prompt"], info.data["negative_prompt"], int(steps * value), info.data["steps"]
        )
    return value


class SecondPassParameters(InputParameters):
    """The parameters of one picture and of its submission, with those of its second pass. Frozen."""

    #: How many times larger the picture is made in a second pass, 1 to 4; 1: there is none. Each side is
    #: rounded down to a multiple of 8, and has at most 2,048 pixels.
    upscale: Annotated[
        float,
        Field(ge=1, le=MAX_UPSCALE, strict=True, allow_inf_nan=False),
        AfterValidator(_upscale),
        JobField(
            since=SECOND_PASS_SINCE,
            infotext="Hires upscale",
            infotext_ours_only=True,
            headings=("hires_upscale", "upscale_by"),
        ),
    ] = 1.0
    #: Steps of the second pass, 1 to 750, of which `int(upscale_steps * upscale_strength)` are run. Not
    #: given: as many as `steps`.
    upscale_steps: Annotated[
        int | None,
        Field(ge=1, le=MAX_UPSCALE_STEPS, strict=True),
        _for_a_second_pass(None),
        AfterValidator(_steps),
        JobField(since=SECOND_PASS_SINCE, infotext_ours_only=True, is_left_open=True),
    ] = None
    #: How much the second pass draws anew, above 0 and up to 1. AUTOMATIC1111 calls it denoising strength.
    upscale_strength: Annotated[
        float,
        Field(ge=0, le=1, strict=True, allow_inf_nan=False, validate_default=True),
        NarrowedTo(Gt(0)),
        _for_a_second_pass(UPSCALE_STRENGTH),
        AfterValidator(_strength),
        JobField(since=SECOND_PASS_SINCE, infotext_ours_only=True),
    ] = UPSCALE_STRENGTH
    #: What makes it larger: `latent` resizes its latents, `lanczos` its pixels.
    upscaler: Annotated[
        Upscaler,
        BeforeValidator(spelled_as(Upscaler, {})),
        _for_a_second_pass(Upscaler.LATENT),
        JobField(
            since=SECOND_PASS_SINCE,
            infotext="Hires upscaler",
            infotext_ours_only=True,
            a1111_values=UPSCALERS,
            headings=("hires_upscaler",),
        ),
    ] = Upscaler.LATENT

    @property
    def second_pass(self) -> SecondPass | None:
        """Its second pass; None where it has none, or its size and steps are not known."""
        if self.upscale == 1 or not (self.width and self.height and self.steps):
            return None
        width, height = (upscaled(side, self.upscale) for side in (self.width, self.height))
        return SecondPass(width, height, self.upscale_steps or self.steps, self.upscale_strength)

    @property
    def picture_size(self) -> tuple[int | None, int | None]:
        """Width and height of its picture in pixels; None where the model says them."""
        if self.padding is not None:
            image = InputReference.parse(self.image)
            return image.width, image.height
        if self.upscale == 1:
            return self.width, self.height
        width, height = (side and upscaled(side, self.upscale) for side in (self.width, self.height))
        return width, height

    @property
    def all_steps(self) -> int:
        """The steps that it counts: those asked for, and those that its second pass runs; 0: not known."""
        second = self.second_pass
        return (self.steps or 0) + (second.steps_run if second else 0)
