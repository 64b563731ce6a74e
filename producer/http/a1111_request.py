"""What a request of AUTOMATIC1111's `txt2img` means: job fields, or a refusal by name.

Source: AUTOMATIC1111 1.10 (modules/api/models.py, modules/processing.py). A name that it does not know
changes nothing there, and nothing here. A name that it knows, with a value that changes the picture there and
cannot here, is refused: nobody gets another picture in silence.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from producer.http.a1111_hires import second_pass_of
from producer.http.problems import RefusedError
from producer.prompts.entries import LineError
from producer.prompts.fields import near_miss
from producer.prompts.values import NOT_GIVEN, value_in_call
from worker.contract.choices import ETA, PromptSyntax, Scheduler
from worker.contract.errors import InvalidJobError
from worker.contract.explain import short
from worker.contract.job import WRITTEN_FIELDS
from worker.contract.job_fields import truth_of
from worker.contract.scheduler_names import Pair, pair_of

#: Pictures of one request, at most.
MAX_IMAGES: Final = 100
#: Samplers that take an eta there, and here have the one that is set where none is.
_ETA_IS_ONE: Final = (Scheduler.DPMPP_SDE, Scheduler.DPMPP_2M_SDE, Scheduler.DPMPP_3M_SDE)
#: The schedule of a request that says none.
_AUTOMATIC: Final = "Automatic"
#: Job fields whose names mean something else in these requests.
_READ_APART: Final = ("scheduler", "schedule", "model")
#: AUTOMATIC1111's names of job fields.
_NAMES: Final = {
    field.a1111_option: field.name
    for field in WRITTEN_FIELDS.values()
    if field.a1111_option and field.name not in _READ_APART
}


def is_off(value: Any) -> bool:
    """Whether a value means that something is not used."""
    return value in (None, False, 0, "", "0", "None", "none")


def switch(body: Mapping[str, Any], name: str, *, default: bool = False) -> bool:
    """Whether a switch of a request is on: AUTOMATIC1111 reads words, too. Raises `InvalidJobError`."""
    value = body.get(name)
    if value in (None, ""):
        return default
    truth = truth_of(value) if isinstance(value, str) else bool(value) if value in (0, 1) else None
    if truth is None:
        raise InvalidJobError(f"{name} is {short(value)}: it must be true or false.")
    return truth


def _is_empty(value: Any) -> bool:
    return not value


def _is_one(value: Any) -> bool:
    return value in (None, 0, 1, "1", "0", "")


def is_exactly_one(value: Any) -> bool:
    """Whether it is not given, or 1."""
    return value is None or (value in (1, "1", "1.0") and value is not True)


def _is_automatic(value: Any) -> bool:
    return value in (None, "", "Automatic", "None", "automatic", "none", "Use same VAE")


def _is_negative(value: Any) -> bool:
    return value in (None, "") or (isinstance(value, int | float) and value <= 0)


#: Names of parameters, with how their harmless values are recognised, and what to say of others.
Harmless: TypeAlias = Mapping[str, tuple[Callable[[Any], bool], str]]
#: Names that may have harmless values only: how these are recognised, and what to say of others.
HARMLESS: Final[Harmless] = {
    "styles": (_is_empty, "styles are not offered: write the style's text into the prompt"),
    "script_name": (is_off, "scripts are not offered: leave it out"),
    "restore_faces": (is_off, "restoring faces is not offered: switch it off"),
    "tiling": (is_off, "tiling is not offered: switch it off"),
    "subseed_strength": (is_off, "variation seeds are not offered: set it to 0"),
    "seed_resize_from_w": (_is_negative, "resizing from a seed is not offered: leave it out"),
    "seed_resize_from_h": (_is_negative, "resizing from a seed is not offered: leave it out"),
    "refiner_checkpoint": (_is_automatic, "refiners are not offered: leave it out"),
    "s_churn": (is_off, "it is not offered: set it to 0"),
    "s_min_uncond": (is_off, "it is not offered: set it to 0"),
    "s_noise": (is_exactly_one, "it is not offered: set it to 1"),
    "init_images": (_is_empty, "it is for img2img: send it there"),
    "mask": (_is_empty, "it is for img2img: send it there"),
    "infotext": (_is_empty, "it is not offered: send its parameters by their names"),
}
#: Further names of AUTOMATIC1111's request: read elsewhere, or without effect where the above are harmless.
_WITHOUT_EFFECT: Final = frozenset(
    (
        *("sampler_name", "sampler_index", "scheduler", "batch_size", "n_iter", "eta", "subseed"),
        *("override_settings", "override_settings_restore_afterwards", "alwayson_scripts", "script_args"),
        *("denoising_strength", "s_tmax", "s_tmin", "refiner_switch_at", "disable_extra_networks"),
        *("do_not_save_samples", "do_not_save_grid", "send_images", "save_images", "force_task_id"),
        *("enable_hr", "firstpass_image", "firstphase_width", "firstphase_height", "comments"),
        *("hr_scale", "hr_upscaler", "hr_second_pass_steps", "hr_resize_x", "hr_resize_y"),
        *("hr_checkpoint_name", "hr_sampler_name", "hr_scheduler", "hr_prompt", "hr_negative_prompt"),
    )
)
#: Likewise in `override_settings`, and among the options that may be set.
HARMLESS_SETTINGS: Final[Mapping[str, tuple[Callable[[Any], bool], str]]] = {
    "CLIP_stop_at_last_layers": (_is_one, "it is set in each request: give it in override_settings there"),
    "sd_vae": (_is_automatic, "it is set in each request: give it in override_settings there"),
    "forge_additional_modules": (_is_empty, "modules of Forge are not offered: leave it out"),
    "forge_preset": (lambda _: True, ""),
    "eta_noise_seed_delta": (is_off, "it is not offered: set it to 0"),
    "token_merging_ratio": (is_off, "merging tokens is not offered: set it to 0"),
    "randn_source": (lambda value: value in (None, "CPU"), "noise is made on the CPU: set it to CPU"),
    "samples_format": (lambda value: value in ("png", "jpg", "jpeg", "webp", None), "use png, jpg or webp"),
}


@dataclass(frozen=True)
class Asked:
    """What a request asks for."""

    #: Job fields, without a model.
    fields: dict[str, Any]
    #: The model as the client names it; None: the one that is chosen.
    model: str | None
    #: Pictures of a batch, and batches.
    batch_size: int
    n_iter: int
    #: Whether the answer is to have the pictures.
    send_images: bool


def read_request(body: Any, harmless: Harmless = HARMLESS, known: Container[str] = ()) -> Asked:
    """What a request asks for. `harmless`: names that may have harmless values only; `known`: read elsewhere.

    Raises `InvalidJobError`, and `RefusedError` for what is not offered.
    """
    if not isinstance(body, dict):
        raise InvalidJobError(f"The body is {short(body)}: it must be an object with a prompt.")
    _refuse_misspelt(body, known)
    _refuse_others(body, harmless, "")
    _refuse_scripts(body.get("alwayson_scripts"))
    settings = body.get("override_settings")
    settings = {} if settings is None else settings
    if not isinstance(settings, dict):
        raise InvalidJobError(f"override_settings is {short(settings)}: it must be an object.")
    settings = {name: value for name, value in settings.items() if value is not None}
    model = settings.pop("sd_model_checkpoint", None)
    clip_skip = settings.pop("CLIP_stop_at_last_layers", None)
    vae = settings.pop("sd_vae", None)
    for name in settings:
        if name not in HARMLESS_SETTINGS:
            raise RefusedError(
                422, f"override_settings has {short(name)}, which is not offered: leave it out."
            )
    _refuse_others(settings, HARMLESS_SETTINGS, "override_settings: ")
    if clip_skip is not None:
        body = {"clip_skip": clip_skip} | body
    if not _is_automatic(vae):
        body = {"vae": vae} | body
    if body.get("clip_skip") in (0, "0"):  # None is skipped; AUTOMATIC1111 counts from 1.
        body = body | {"clip_skip": 1}
    fields = _job_fields(body)
    if "samples_format" in settings:
        fields.setdefault("format", settings["samples_format"])
    pair = _pair(body)
    eta = _eta(fields.pop("eta", None), pair.scheduler)
    fields |= {} if eta is None else {"eta": eta}
    # Its clients write its syntax.
    fields.setdefault("prompt_syntax", PromptSyntax.A1111)
    if switch(body, "enable_hr"):
        fields |= second_pass_of(body, fields)
    batch_size, n_iter = (_count(body, name) for name in ("batch_size", "n_iter"))
    if batch_size * n_iter > MAX_IMAGES:
        raise InvalidJobError(
            f"batch_size times n_iter is {batch_size * n_iter:,}: it must be 1 to {MAX_IMAGES} pictures."
        )
    return Asked(
        fields | {name: str(value) for name, value in pair.fields().items()},
        None if model in (None, "") else str(model),
        batch_size,
        n_iter,
        switch(body, "send_images", default=True),
    )


def _job_fields(body: Mapping[str, Any]) -> dict[str, Any]:
    """The job fields by AUTOMATIC1111's names and by our own; values may be texts, as its API takes them."""
    own = {name: name for name in WRITTEN_FIELDS if name not in _READ_APART}
    found: dict[str, Any] = {}
    for name, field in (own | _NAMES).items():
        if name not in body:
            continue
        try:
            value = value_in_call(WRITTEN_FIELDS[field], body[name])
        except LineError as error:
            raise InvalidJobError(error.reason) from None
        if value is not NOT_GIVEN:
            found[field] = value
    return found


def _pair(body: Mapping[str, Any]) -> Pair:
    sampler = body.get("sampler_name") or body.get("sampler_index")
    schedule = body.get("scheduler")
    for name, value in (("sampler_name", sampler), ("scheduler", schedule)):
        if value is not None and not isinstance(value, str):
            raise InvalidJobError(f"{name} is {short(value)}: it must be a text such as Euler a.")
    # What is left out is "Automatic" there: Karras for DPM++ 2M, not that sampler's own schedule.
    return pair_of(sampler, schedule if schedule and schedule.strip() else _AUTOMATIC)


def _eta(eta: Any, scheduler: Scheduler) -> Any:
    """The job's eta. A sampler that has none there, does not look at it; one that has one here, too."""
    if eta in (None, "") or scheduler in ETA:
        return eta
    if scheduler in _ETA_IS_ONE and eta != 1:
        raise RefusedError(
            422,
            f"eta is {short(eta)}, which is not offered with {scheduler}: set it to 1.",
        )
    return None


def _refuse_others(
    values: Mapping[str, Any], harmless: Mapping[str, tuple[Callable[[Any], bool], str]], where: str
) -> None:
    for name, (is_harmless, remedy) in harmless.items():
        if name in values and not is_harmless(values[name]):
            raise RefusedError(422, f"{where}{name} is {short(values[name])}, and {remedy}.")


def _refuse_misspelt(body: Mapping[str, Any], beside: Container[str]) -> None:
    """A name that is nearly a job field's would change nothing, and the picture would be another one."""
    known = {*WRITTEN_FIELDS, *_NAMES, *HARMLESS, *_WITHOUT_EFFECT}
    for name in body:
        if name not in known and name not in beside and (near := near_miss(name)):
            near = WRITTEN_FIELDS[near].a1111_option or near if near in WRITTEN_FIELDS else near
            raise InvalidJobError(f"There is no {short(name)} in txt2img: did you mean {near}?")


def _refuse_scripts(scripts: Any) -> None:
    """Extensions that are sent without arguments, or switched off, do nothing."""
    scripts = {} if scripts is None else scripts
    if not isinstance(scripts, dict):
        raise InvalidJobError(
            f"alwayson_scripts is {short(scripts)}: it must be an object, and scripts are not offered: "
            "leave it out."
        )
    for name, script in scripts.items():
        arguments = script.get("args") if isinstance(script, dict) else script
        is_unused = not arguments or (isinstance(arguments, list) and arguments[0] is False)
        if not is_unused:
            raise RefusedError(
                422, f"alwayson_scripts has {short(name)}, and scripts are not offered: leave it out."
            )


def _count(body: Mapping[str, Any], name: str) -> int:
    value = value_in_call(WRITTEN_FIELDS["steps"], body.get(name, 1))
    if value is NOT_GIVEN:
        return 1
    if type(value) is not int:
        raise InvalidJobError(f"{name} is {short(value)}, which is no whole number: use 1 to {MAX_IMAGES}.")
    if value < 1:
        raise InvalidJobError(f"{name} is {short(value)}: it must be 1 to {MAX_IMAGES}.")
    return value
