"""`submit_file`: renders files of prompts and writes their manifest, from Python."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Unpack

from producer.ingest.download import PICTURES, Downloads, Template
from producer.ingest.feeder import Ingest
from producer.ingest.pictures import Pictures
from producer.ingest.plan import Plan
from producer.ingest.types import FILE_PRIORITY, MAX_QUEUED, Display, Gate, Options, Outcome, SilentDisplay
from producer.ingest.writing import writing
from producer.prompts import fields_v1
from producer.prompts.fields import meaning_of
from producer.prompts.sources import FORMATS, source
from producer.prompts.values import NOT_GIVEN, value_of
from producer.prompts.variants import Variants
from producer.prompts.wildcards import Wildcards
from producer.session import FEEDER_RETRY_S, session
from worker.contract.errors import PromptFileError, StorageError
from worker.contract.explain import short
from worker.contract.job import JOB_FIELDS, Job
from worker.contract.job_keywords import JobFields
from worker.contract.settings import producer_settings
from worker.contract.webhook import hook_of

#: The folder of wildcards that is used where it exists and none is named.
WILDCARDS = "wildcards"
#: Job fields whose values a grid can cross.
AXES = tuple(each.name for each in JOB_FIELDS.values() if each.is_axis)
#: A reference to a picture that stands for any.
_ANY_PICTURE: Final = f"sha256:{'0' * 64}:512x512"
#: Cells of a grid, at most.
MAX_GRID = 10_000
#: Run names: see `worker.contract.message.RUN_MARK`.
_RUN_LETTERS = set("0123456789abcdefghijklmnopqrstuvwxyz")


def submit_file(
    *files: str | Path,
    file_format: str | None = None,
    images: int = 1,
    seed_start: int | None = None,
    grid: Mapping[str, Sequence[Any]] | None = None,
    sample: int | None = None,
    wildcards: str | Path | None = None,
    literal: bool = False,
    extra: bool = False,
    strict: bool = False,
    manifest: str | Path | None = None,
    download: str | Path | None = None,
    name: str | None = None,
    run: str | None = None,
    max_queued: int = MAX_QUEUED,
    detach: bool = False,
    webhook: str | None = None,
    webhook_jobs: bool = False,
    **fields: Unpack[JobFields],
) -> Outcome:
    """Render the prompts of `files`, once each, and write their manifest. Returns when all have ended.

    Called again after an interruption, it resumes: nothing is rendered twice or left out.
    `fields` are job fields for lines that do not set them, and `tenant` is whose all of them are; `images`
    is the number of seeds for each prompt, from `seed_start` on where its line has none; `grid` renders each
    combination of values of job fields, in place of what the lines set; `sample` is how many of a line's
    variants, by `{a|b}` and `__wildcards__`, are drawn, and `literal` leaves both as they are. `download` is
    a folder for the pictures, `name` the template of their names. At most `max_queued` messages wait in the
    queue; with `detach` all are queued, and it returns. `webhook` is an address of https that is
    told, by `smallcat webhooks run`, when all jobs have ended; with `webhook_jobs` of each job, too.

    A name in a file that is nearly a job field's is refused; with `extra` it goes to metadata, as others do.
    Rejected lines are listed in `FILE.rejected.jsonl`; with `strict` a single one stops the run before
    anything is sent.

    Raises `PromptFileError`, `InvalidJobError`, `QueueError`, `StorageError`, `SettingsError`.
    """
    pictures = Pictures(session(), tenant := fields.pop("tenant", None))
    plan = make_plan(
        [str(each) for each in files],
        file_format=file_format,
        variants=make_variants(
            fields,
            images,
            seed_start,
            grid or {},
            sample,
            wildcards_folder(wildcards, files),
            literal=literal,
            pictures=pictures,
        ),
        extra=extra,
        tenant=tenant,
        pictures=pictures,
    )
    hook = webhook_of(webhook, webhook_jobs, plan.tenant)
    path, folder = (None if each is None else Path(each) for each in (manifest, download))
    options = Options(path, run, max_queued, detach, strict, hook, webhook_jobs)
    return make_ingest(plan, options, SilentDisplay(), folder, name)()


def webhook_of(webhook: str | None, of_jobs: bool, tenant: str) -> str:
    """What `Options.hook` is to be for jobs of `tenant`. Raises `InvalidJobError`, `PromptFileError`."""
    if of_jobs and webhook is None:
        raise PromptFileError("webhook_jobs is for a webhook: give its address with webhook.")
    return hook_of(webhook, producer_settings().webhook_hosts, tenant)


def make_plan(
    files: Sequence[str],
    *,
    file_format: str | None,
    variants: Variants,
    extra: bool = False,
    tenant: str | None = None,
    pictures: Pictures | None = None,
) -> Plan:
    """The plan for these files. Raises `PromptFileError` for those that are not there, `InvalidJobError`.

    `tenant`: whose jobs they are; None: `SMALLCAT_TENANT`'s.
    """
    if not files:
        raise PromptFileError("There is no file: name at least one, or - for standard input.")
    if file_format is not None and file_format not in FORMATS:
        raise PromptFileError(f"There is no file format {file_format!r}: use one of {', '.join(FORMATS)}.")
    if tenant is None:
        tenant = producer_settings().tenant
    Job.parse({"prompt": "x", "tenant": tenant})
    sources = [source(each, file_format) for each in files]
    return Plan(sources, variants, extra, tenant=tenant, pictures=pictures)


def make_variants(
    fields: Mapping[str, Any],
    images: int,
    seed_start: int | None,
    grid: Mapping[str, Sequence[Any]],
    sample: int | None,
    wildcards: Path | None,
    *,
    literal: bool,
    pictures: Pictures | None = None,
) -> Variants:
    """The variants of each line, checked. Raises `PromptFileError`, `InvalidJobError`."""
    for name, number, least, most in (("images", images, 1, 1_000_000), ("sample", sample, 1, 1_000_000)):
        if number is not None and not least <= number <= most:
            raise PromptFileError(f"{name} is {number}: it must be {least} to {most:,}.")
    if seed_start is not None and "seed" in fields:
        raise PromptFileError("seed and seed_start are the same: give one of them.")
    defaults = {"priority": FILE_PRIORITY, **fields}
    if pictures:
        defaults = dict(pictures.named(defaults))
        grid = {
            axis: [pictures.named({axis: value})[axis] for value in values] if axis in PICTURES else values
            for axis, values in grid.items()
        }
    Job.parse({**_for_check(defaults, grid), "prompt": "x", "seed": fields.get("seed", seed_start or 0)})
    size = 1
    for axis, values in grid.items():
        if axis not in AXES:
            raise PromptFileError(f"grid cannot cross {axis}: use one of {', '.join(AXES)}.")
        if isinstance(values, str) or not isinstance(values, Sequence):
            raise PromptFileError(f"grid is {short({axis: values})}: its values for {axis} must be a list.")
        if not values:
            raise PromptFileError(f"grid has no values for {axis}: write {axis}=VALUE,VALUE.")
        for value in values:
            Job.parse({**_for_check({**defaults, axis: value}, grid), "prompt": "x", "seed": 0})
        size *= len(values)
    if size > MAX_GRID:
        raise PromptFileError(f"grid has {size:,} cells, the limit is {MAX_GRID:,}: take fewer values.")
    return Variants(
        {name: value for name, value in defaults.items() if name != "prompt"},
        images,
        seed_start,
        {axis: list(values) for axis, values in grid.items()},
        sample,
        Wildcards(wildcards),
        literal,
    )


def _for_check(fields: Mapping[str, Any], grid: Mapping[str, Any]) -> dict[str, Any]:
    """The fields as a whole job's, where each line has its own picture or mask."""
    names = {*fields, *grid}
    is_of_mask = bool(names & {"mask", "mask_blur", "padding", "preserve_unmasked"})
    found = dict(fields)
    if not found.get("image") and (is_of_mask or "strength" in names):
        found["image"] = _ANY_PICTURE
        found.pop("mask", None)
    if is_of_mask and not found.get("mask"):
        found["mask"] = found["image"]
    return found


def first_variants(variants: Variants, fields: Mapping[str, Any], grid: Sequence[str]) -> Variants:
    """The variants that the first version made of options: `fields` as given, and the words of the `grid`."""
    defaults = {"priority": FILE_PRIORITY, **fields}
    return replace(variants, defaults=defaults, grid=fields_v1.grid_of(grid))


def check_options(options: Options, download: Path | None, name: str | None) -> None:
    """Raise `PromptFileError` for options that no run can have."""
    if options.max_queued < 1:
        raise PromptFileError(f"max_queued is {options.max_queued}: it must be at least 1.")
    if options.run is not None and not (0 < len(options.run) <= 40 and set(options.run) <= _RUN_LETTERS):
        raise PromptFileError(f"run is {options.run!r}: use up to 40 lower-case letters and digits.")
    if name is not None and download is None:
        raise PromptFileError("name is for pictures that are saved: add a folder with download.")
    if name is not None:
        Template(name)


def make_ingest(
    plan: Plan,
    options: Options,
    display: Display,
    download: Path | None = None,
    name: str | None = None,
    *,
    gate: Gate | None = None,
) -> Ingest:
    """A run that is ready to start; the folder of its manifest is made where there is none.

    `gate` says what of it may be sent, and when; None: all, at once.

    Raises `PromptFileError`, `SettingsError`, `StorageError`.
    """
    check_options(options, download, name)
    if options.manifest is not None:
        with writing(options.manifest):
            options.manifest.parent.mkdir(parents=True, exist_ok=True)
    feeder_session = session(FEEDER_RETRY_S)
    downloads = None
    if download is not None:
        if feeder_session.bucket is None:
            raise StorageError("S3_BUCKET is not set: name the bucket that the pictures are in.")
        downloads = Downloads(
            download,
            feeder_session.bucket,
            plan.sources,
            name,
            display.notice,
            plan.variants.grid,
            plan.pictures.file_of if plan.pictures else lambda _: "",
        )
    return Ingest(plan, options, feeder_session, display, downloads, gate)


def grid_of(words: Sequence[str]) -> dict[str, list[Any]]:
    """The axes of a grid from words such as `steps=20,30`. Values with commas are quoted as in CSV."""
    grid: dict[str, list[Any]] = {}
    for word in words:
        axis, equals, text = word.partition("=")
        axis = meaning_of(axis) or axis.strip().replace("-", "_")
        if not equals:
            raise PromptFileError(f'grid is "{word}": write it as steps=20,30.')
        values = next(csv.reader([text], skipinitialspace=True), [])
        field = JOB_FIELDS.get(axis)
        typed = [value_of(field, value) if field else value for value in values if value.strip()]
        if NOT_GIVEN in typed:
            raise PromptFileError(f'grid is "{word}": each of its values must be given.')
        grid[axis] = typed
    return grid


def wildcards_folder(wildcards: str | Path | None, files: Sequence[str | Path]) -> Path | None:
    """The folder of wildcards: the named one, else the one beside the first file, else None."""
    if wildcards is not None:
        if not Path(wildcards).is_dir():
            raise PromptFileError(f"There is no folder of wildcards at {wildcards}.")
        return Path(wildcards)
    beside = Path(str(files[0])).parent / WILDCARDS if files else Path(WILDCARDS)
    return beside if beside.is_dir() else None
