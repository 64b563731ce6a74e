"""The pictures that a run's jobs begin with: read where lines name them, stored before their jobs are sent.

A run reads its files several times, and must have the same jobs each time. So what a line's words mean is
decided once in a process, and pictures may not change while a run is fed. What becomes of a job whose picture
a line names is in nobody's hands: what its id meant at first is noted with the run, unless it was done.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from producer.prompts.sources import Source
from producer.session import Session
from worker.contract.errors import InvalidJobError
from worker.contract.input_reference import InputReference

if TYPE_CHECKING:
    from producer.ingest.run_state import Run
    from worker.contract.given_picture import Given

#: Pictures that are stored at once.
_AT_ONCE = 8
#: A run's field of what a job's id means: its picture's size, or why it is refused.
_PICTURE_OF, _REFUSED = "picture:", "!"


def _is_empty(value: object) -> bool:
    return value is None or (isinstance(value, str) and not value)


class Pictures:
    """The pictures of the runs of one process, for jobs of `tenant`; None: of `SMALLCAT_TENANT`'s."""

    def __init__(self, session: Session, tenant: str | None = None) -> None:
        self._session = session
        self._tenant = session.settings.tenant if tenant is None else tenant
        #: What the words of a line mean, by them and the folder: references by field, or what is wrong.
        self._known: dict[tuple[Path | None, Any, Any], dict[str, Any] | str] = {}
        #: Where each file is, by its reference: the folder, the field, the words.
        self._files: dict[str, tuple[Path | None, str, Any]] = {}
        #: The references that were stored, or renewed.
        self._stored: set[str] = set()
        self._run: Run | None = None
        #: What ids of jobs mean, while it may not be noted with the run yet; None: it may.
        self._unnoted: dict[str, str] | None = {}

    def of(self, run: Run) -> None:
        """From now on ids of jobs mean what they meant when `run` was begun."""
        self._run = run
        self._known.clear()

    def note(self) -> None:
        """From now on what ids of jobs mean is noted with the run, which this process feeds."""
        unnoted, self._unnoted = self._unnoted or {}, None
        for job_id, meaning in unnoted.items():
            self._noted(job_id, meaning)

    def named(self, fields: Mapping[str, Any], source: Source | None = None) -> Mapping[str, Any]:
        """The fields of a job with references in the place of words.

        Paths in a prompt file are below its folder, or below the working folder where it has none; those of
        options (`source` is None) may lead anywhere. Raises `InvalidJobError`, `StorageError`.
        """
        image, mask = fields.get("image"), fields.get("mask")
        if _is_empty(image) and _is_empty(mask):
            return fields
        folder = None
        if source is not None:
            folder = Path.cwd() if source.path is None else source.path.parent.resolve()
        key = folder, image, mask
        if not all(each is None or isinstance(each, str) for each in (image, mask)):
            known = self._read(key)  # It may be no key: an array, an open file, a list in a line of JSON.
        elif (known := self._known.get(key)) is None:  # type: ignore[assignment]
            known = self._known[key] = self._read(key)
        if isinstance(known, str):
            raise InvalidJobError(known)
        return {**fields, **known}

    def _read(self, key: tuple[Path | None, Any, Any]) -> dict[str, Any] | str:
        folder, image, mask = key
        try:
            given = self._given({"image": image, "mask": mask}, folder)
        except InvalidJobError as error:
            return str(error)
        found = {name: value for name, value in (given.fields if given else {}).items() if value}
        data = {each.sha256: each.data for each in given.files} if given else {}
        for name, words in (("image", image), ("mask", mask)):
            if isinstance(words, str | os.PathLike):
                if words and found[name] != words:
                    self._files.setdefault(found[name], (folder, name, words))
            elif name in found and (sha256 := found[name].split(":")[1]) in data:
                # An open file is read once.
                self._files.setdefault(found[name], (folder, name, data[sha256]))
        return found

    def _given(self, named: dict[str, Any], folder: Path | None) -> Given | None:
        """What words mean, wherever that is. Raises as `Session.given` does."""
        return self._session.given(named, self._tenant, folder, self._picture_of)

    def _known_picture(self, job_id: str, name: str) -> tuple[InputReference, bool]:
        """The reference to a job's picture as it is known now, and whether it is done. Raises likewise."""
        return self._session.picture_of(job_id, self._tenant, name)

    def _picture_of(self, job_id: str, name: str) -> InputReference:
        """The reference to a job's picture, also of one that is not done. Raises as `Session.given` does."""
        meaning = self._run.noted(_PICTURE_OF + job_id) if self._run else None
        if meaning is None:
            try:
                reference, is_done = self._known_picture(job_id, name)
                meaning = f"{reference.width}x{reference.height}"
            except InvalidJobError as error:
                meaning, is_done = _REFUSED + str(error).removeprefix(f"{name} "), False
            if not is_done:
                meaning = self._noted(job_id, meaning)
        if meaning.startswith(_REFUSED):
            raise InvalidJobError(f"{name} {meaning.removeprefix(_REFUSED)}")
        return InputReference.parse(f"job:{job_id}:{meaning}")

    def _noted(self, job_id: str, meaning: str) -> str:
        """Note what a job's id means. Returns what it has meant before."""
        if self._unnoted is not None:
            return self._unnoted.setdefault(job_id, meaning)
        assert self._run is not None  # noqa: S101 - `of` comes before `note`
        return self._run.note_once(_PICTURE_OF + job_id, meaning)

    def file_of(self, reference: str) -> str:
        """The name without its ending of the file that a reference was read from; "" where none is known."""
        words = self._files.get(reference, (None, "", None))[2]
        is_file = isinstance(words, str | os.PathLike) and reference.startswith("sha256:")
        return PurePath(words).stem if is_file and not str(words).startswith("sha256:") else ""

    def store(self, shapes: Iterable[Mapping[str, Any]]) -> None:
        """Store what jobs of these fields begin with, unless that was done. Raises `StorageError`.

        A picture that has changed since it was read, or is gone, is left out: its job fails by itself.
        """
        named = {str(shape.get(name) or "") for shape in shapes for name in ("image", "mask")}
        todo = [each for each in named - self._stored if each.startswith("sha256:")]
        if not todo:
            return
        with ThreadPoolExecutor(_AT_ONCE) as threads:
            list(threads.map(self._store, todo))
        self._stored.update(todo)

    def _store(self, reference: str) -> None:
        folder, name, words = self._files.get(reference, (None, "image", reference))
        try:
            given = self._session.given({name: words}, self._tenant, folder)
            if given is not None and given.fields[name] == reference:
                self._session.store(given, self._tenant)
        except InvalidJobError:
            return
