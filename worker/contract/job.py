"""What a job is: one prompt with its parameters, their limits, and the id that follows from them.

A job is sent as JSON from the producer through Redis to a worker, and is stored beside its picture in the
bucket. Both sides read and write it with this module alone.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Mapping
from typing import Any, Self

from pydantic import SerializationInfo, SerializerFunctionWrapHandler, ValidationError, model_serializer

from worker.contract.choices import NoiseSchedule, PromptSyntax
from worker.contract.errors import InvalidJobError
from worker.contract.explain import explain
from worker.contract.job_checks import tenant_name
from worker.contract.job_fields import FieldEntry, table_of, version_that_has
from worker.contract.loras import key_of_lora
from worker.contract.second_pass import SecondPassParameters
from worker.contract.served_model import Defaults, ServedModel
from worker.contract.stored_jobs import NEW

#: Version of messages that this code reads, and writes at most: see `version_needed`. Every change of what a
#: job may be (a field, a choice, a wider limit) takes a new number, and says so by `JobField.since`.
FORMAT_VERSION = 4
#: Version of what is hashed into the id, which a new field does not change: at its default it is left out.
#: Another number here gives every job another id, and so orphans all stored pictures.
ID_VERSION = 1
#: How the revision of a job begins that was submitted before any worker had announced its model.
OPEN_REVISION = "open-"


class Job(SecondPassParameters):
    """One prompt with its parameters: those of `JobParameters`, of an image, and of a second pass. Frozen.

    A field that is None means the model's own default, which `resolved` fills in. The id is a hash of
    what determines the picture; what belongs to the submission is left out of it.
    """

    @model_serializer(mode="wrap")
    def _for_old_readers(self, run: SerializerFunctionWrapHandler, info: SerializationInfo) -> dict[str, Any]:
        values: dict[str, Any] = run(self)
        # As Python's values it is for people, who may submit it where the fleet's default is another.
        is_said = info.mode == "python" and self.says_syntax
        for name, default in _UNSENT.items():
            if values.get(name) == default and not (is_said and name == "prompt_syntax"):
                values.pop(name, None)
        return values

    @classmethod
    def parse(cls, fields: dict[str, Any], *, is_new: bool = True) -> Self:
        """The job that `fields` describe. Without `is_new` it may be one that only an earlier version took.

        Raises `InvalidJobError` with one sentence for each field that is unknown or outside its limits.
        """
        try:
            return cls.model_validate(fields, context=NEW if is_new else None)
        except ValidationError as error:
            raise InvalidJobError(explain(error, JOB_FIELDS)) from None

    def in_syntax(self, default: PromptSyntax) -> Self:
        """This job in the fleet's default syntax, unless it was given one. Raises `InvalidJobError`."""
        if self.says_syntax or default is PromptSyntax.PLAIN:
            return self
        return self.parse(dict(self) | {"prompt_syntax": default}, is_new=False)

    @property
    def says_syntax(self) -> bool:
        """Whether the job was given its syntax. One that was not takes the fleet's default."""
        return "prompt_syntax" in self.said

    @property
    def said(self) -> frozenset[str]:
        """Those fields that the job was given whose default depends on where it is submitted."""
        return frozenset({"prompt_syntax", "tenant"} & self.model_fields_set)

    def of_tenant(self, default: str) -> Self:
        """This job as one of the tenant `default`, unless it says whose it is. Raises `InvalidJobError`."""
        if "tenant" in self.said or not default:
            return self
        try:
            return self.model_copy(update={"tenant": tenant_name(default)})
        except ValueError as error:
            raise InvalidJobError(f"tenant {error}.") from None

    def resolved(self, served: ServedModel) -> Self:
        """This job for `served`: with the model's revision, and its defaults for what was left open.

        Raises `InvalidJobError`.
        """
        job = self.with_defaults(dict(served.defaults))
        return job.model_copy(update={"model": served.name, "revision": served.revision})

    def with_defaults(self, defaults: Mapping[str, Any]) -> Self:
        """This job with a model's `defaults` for what was left open.

        Raises `InvalidJobError` where it is no job with these, such as one of which no step is left.
        """
        filled = self.left_open(defaults)
        has_own_steps = self.schedule is NoiseSchedule.ALIGN_YOUR_STEPS
        asks_for_steps = has_own_steps or self.image or self.prompt_syntax is PromptSyntax.A1111
        if self.upscale > 1 or ("steps" in filled and asks_for_steps):
            self.parse(dict(self) | filled, is_new=False)
        return self.model_copy(update=filled)

    def left_open(self, defaults: Mapping[str, Any]) -> dict[str, Any]:
        """Those of a model's `defaults` that this job leaves open."""
        names = [name for name in Defaults.model_fields if name in defaults]
        return {name: defaults[name] for name in names if getattr(self, name) is None}

    def opened(self) -> Self:
        """This job for a model that no worker has announced yet: any revision may render it.

        Its id is its own: while the revision is unknown, so is whether two submissions mean the same picture.
        """
        return self.model_copy(update={"revision": OPEN_REVISION + secrets.token_hex(8)})

    def submitted_as(self, other: Job) -> Self:
        """This job with what belongs to `other`'s submission: equal jobs share a picture and nothing else."""
        return self.model_copy(update={name: getattr(other, name) for name in SUBMISSION_FIELDS})

    @property
    def is_open(self) -> bool:
        """Whether the job was submitted before any worker had announced its model."""
        return self.revision.startswith(OPEN_REVISION)

    @property
    def version(self) -> int:
        """The version of messages that it needs: see `version_needed`."""
        return version_needed(self.model_dump(mode="json"))

    @property
    def id(self) -> str:
        """32 hexadecimal digits: SHA-256 over all that determines the picture, cut to 128 bits."""
        return hashlib.sha256(hashed(self.model_dump(mode="json")).encode()).hexdigest()[:32]


#: The table of job fields; `worker.contract.job_fields` says what is made from it.
JOB_FIELDS: Mapping[str, FieldEntry] = table_of(Job)
#: Those that whoever writes a job may give.
WRITTEN_FIELDS: Mapping[str, FieldEntry] = {
    name: each for name, each in JOB_FIELDS.items() if not each.is_set_by_producer
}
#: Fields that belong to the submission, and not to the picture.
SUBMISSION_FIELDS = tuple(each.name for each in JOB_FIELDS.values() if each.is_submission)
_HASHED = frozenset(each.name for each in JOB_FIELDS.values() if each.is_hashed)
#: Fields that the first version did not have, with their default, at which they are left out of the id.
_LATER = {each.name: each.default for each in JOB_FIELDS.values() if each.is_hashed and not each.is_original}
#: Fields that are not sent and not recorded at their default: older workers refuse fields they do not know.
_UNSENT = {each.name: each.default for each in JOB_FIELDS.values() if not each.is_original}


def version_needed(fields: Mapping[str, Any]) -> int:
    """The version of messages from which on a job with these fields, as JSON has them, is read.

    Its message says this version, so that older workers take all jobs that they can read, and no others.
    """
    return version_that_has(fields, JOB_FIELDS.values())


def hashed(fields: Mapping[str, Any]) -> str:
    """The text whose hash is a job's id: its fields, as JSON has them, that determine the picture."""
    picture = {name: value for name, value in fields.items() if name in _HASHED}
    for name, default in _LATER.items():
        if picture.get(name) == default:
            picture.pop(name, None)
    if "loras" in picture:
        picture |= _by_content(picture["loras"], picture.pop("file_hashes", {}))
    return json.dumps([ID_VERSION, picture], sort_keys=True, separators=(",", ":"))


def _by_content(loras: list[dict[str, Any]], hashes: Mapping[str, str]) -> dict[str, Any]:
    """LoRAs and hashes of files without the LoRAs' names, where their content is known.

    A file under another name is the same picture.
    """
    keys = [key_of_lora(each["name"]) for each in loras]
    known = [each | {"name": hashes.get(key, each["name"])} for key, each in zip(keys, loras, strict=True)]
    others = {key: sha256 for key, sha256 in hashes.items() if key not in keys}
    return {"loras": sorted(known, key=lambda each: each["name"])} | (
        {"file_hashes": others} if others else {}
    )
