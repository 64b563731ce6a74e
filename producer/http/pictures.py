"""Pictures in requests: bytes of a form, base64 in JSON, references and ids of jobs. No path and no address.

What a request names is its caller's own: files of his tenant, jobs that he may see.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request

from producer.http.problems import InvalidJobsError, RefusedError
from producer.prompts.entries import LineError
from producer.prompts.values import NOT_GIVEN, value_in_call
from producer.session import unknown_picture
from worker.contract.errors import InvalidJobError
from worker.contract.explain import short
from worker.contract.input_reference import MAX_INPUT_BYTES, InputReference
from worker.contract.job import WRITTEN_FIELDS
from worker.state.submissions import Submissions

if TYPE_CHECKING:
    from producer.http.backend import Backend
    from producer.http.caller import Caller
    from worker.contract.given_picture import Given

#: Parts of a form, at most: of files, and of texts.
MAX_FILES, MAX_TEXTS = 20, 100
#: Bytes of a text in a form, at most.
MAX_TEXT: Final = 1_000_000
#: What to send instead of a path or an address.
_INSTEAD: Final = (
    "send the file in a form (multipart/form-data), or as data:image/png;base64,..., or name it by what a "
    "record has (sha256:...) or by a job's id"
)
#: A picture as base64, with or without what names it.
_DATA_URL: Final = re.compile(r"data:image/[\w.+-]{1,30};base64,")


def is_form(request: Request) -> bool:
    """Whether a request's body is a form with files."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower() == "multipart/form-data"


async def read_form(request: Request) -> list[tuple[str, Any]]:
    """The parts of a form: texts, and the bytes of files. Raises `RefusedError` (400).

    Names may come several times.
    """
    await request.body()  # Kept, and counted by the guard.
    try:
        form = await request.form(max_files=MAX_FILES, max_fields=MAX_TEXTS, max_part_size=MAX_TEXT)
    except HTTPException as error:
        raise RefusedError(400, f"The form cannot be read: {error.detail}") from None
    try:
        return [
            (name, await value.read(MAX_INPUT_BYTES + 1) if isinstance(value, UploadFile) else value)
            for name, value in form.multi_items()
        ]
    finally:
        await form.close()


def fields_of(parts: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """A job's fields by the parts of a form, where all values are texts but those of files.

    Names that are no job field's stay, and the job's own error names them. Raises `InvalidJobError`.
    """
    found: dict[str, Any] = {}
    for name, value in parts:
        if name in found:
            raise InvalidJobError(f"The form has {short(name)} twice: send it once.")
        if "[" in name and (whole := name.partition("[")[0]) in WRITTEN_FIELDS:
            # So OpenAI's client sends what its `extra_body` has nested; their types are lost by then.
            raise InvalidJobError(
                f"The form has {short(name)}, a part of {whole}: send {whole} as one text, which may be JSON."
            )
        if isinstance(value, bytes) and name not in ("image", "mask"):
            raise InvalidJobError(
                f"The form has {short(name)} as a file: files are image and mask, send the others as texts."
            )
        if name in WRITTEN_FIELDS and isinstance(value, str):
            try:
                value = value_in_call(WRITTEN_FIELDS[name], value)
            except LineError as error:
                raise InvalidJobError(error.reason) from None
            if value is NOT_GIVEN:
                continue
        found[name] = value
    return found


def of_base64(name: str, text: object) -> bytes:
    """The bytes of a picture in base64, also of a data URL. Raises `InvalidJobError`."""
    if not isinstance(text, str):
        raise InvalidJobError(f"{name} is {short(text)}: it must be a picture in base64.")
    bare = text[match.end() :] if (match := _DATA_URL.match(text)) else text
    try:
        return base64.b64decode("".join(bare.split()), validate=True)
    except (ValueError, binascii.Error):
        raise InvalidJobError(f"{name} is {short(text)}, which is no base64: encode the file so.") from None


async def take(
    backend: Backend, caller: Caller, items: Sequence[Any], *, is_list: bool
) -> tuple[Sequence[Any], list[Given]]:
    """Jobs with references in the place of pictures, and what is to be stored before they are sent.

    Raises `InvalidJobError`, for a list `InvalidJobsError`; `StorageError`.
    """
    found, errors = list(items), list[tuple[int, str]]()
    #: Several jobs of one request may begin with the same.
    known: dict[tuple[Any, Any], Given] = {}
    for number, item in enumerate(items):
        if not isinstance(item, Mapping):
            continue
        # An empty file is one that was sent.
        pictures = {name: item[name] for name in ("image", "mask") if item.get(name) not in (None, "")}
        if not pictures:
            continue
        try:
            for name, value in pictures.items():
                if not isinstance(value, str | bytes):
                    raise InvalidJobError(f"{name} is {short(value)}: it must be a text, or a form's file.")
            key = pictures.get("image"), pictures.get("mask")
            if key not in known:
                async with backend.unpacking:
                    known[key] = await backend.run(_given, backend, caller, pictures)
        except InvalidJobError as error:
            if not is_list:
                raise
            errors.append((number, str(error)))
        else:
            found[number] = {**item, **known[key].fields}
    if errors:
        raise InvalidJobsError(errors, len(items))
    return found, list(known.values())


def _given(backend: Backend, caller: Caller, pictures: dict[str, Any]) -> Given:
    from worker.contract.given_picture import Reach, read_given

    for name, value in pictures.items():
        if isinstance(value, str) and _DATA_URL.match(value):
            pictures[name] = of_base64(name, value)
    reach = Reach(job=lambda *which: _picture_of(backend, caller, *which), instead=_INSTEAD)
    found = read_given(pictures, reach)
    if found.named:
        # Now, so that the error of a list says which job it is.
        backend.session.store(replace(found, files=()), caller.owner)
    return replace(found, named=())


def _picture_of(backend: Backend, caller: Caller, job_id: str, name: str) -> InputReference:
    if caller.shares:
        # Other tenants' jobs have the same owner.
        found = Submissions(backend.session.redis, 1).of(job_id)
        if not any(each.startswith(caller.tenant_mark) for each in found):
            raise unknown_picture(name, job_id)
    return backend.session.picture_of(job_id, caller.owner, name)[0]


async def store(backend: Backend, caller: Caller, given: Sequence[Given]) -> None:
    """Store what checked jobs begin with. Raises `StorageError`."""
    for each in given:
        if each.files:
            await backend.run(backend.session.store, each, caller.owner)
