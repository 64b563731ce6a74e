"""The pictures that a run's jobs begin with: read where lines name them, stored before their jobs are sent.

A run reads its files several times, and must have the same jobs each time. So what a line's words mean is
decided once in a process, and pictures may not change while a run is fed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from producer.prompts.sources import Source
from producer.session import Session
from worker.contract.errors import InvalidJobError

#: Pictures that are stored at once.
_AT_ONCE = 8


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

    def named(self, fields: Mapping[str, Any], source: Source | None = None) -> Mapping[str, Any]:
        """The fields of a job with references in the place of words.

        Paths in a prompt file are below its folder, or below the working folder where it has none; those of
        options (`source` is None) may lead anywhere. Raises `InvalidJobError`, `StorageError`.
        """
        image, mask = fields.get("image"), fields.get("mask")
        if not image and not mask:
            return fields
        folder = None
        if source is not None:
            folder = Path.cwd() if source.path is None else source.path.parent.resolve()
        key = folder, image, mask
        if (known := self._known.get(key)) is None:
            known = self._known[key] = self._read(key)
        if isinstance(known, str):
            raise InvalidJobError(known)
        return {**fields, **known}

    def _read(self, key: tuple[Path | None, Any, Any]) -> dict[str, Any] | str:
        folder, image, mask = key
        try:
            named = {"image": image, "mask": mask}
            given = self._session.given(named, self._tenant, folder, may_wait=False)
        except InvalidJobError as error:
            return str(error)
        found = {name: value for name, value in (given.fields if given else {}).items() if value}
        for name, words in (("image", image), ("mask", mask)):
            if words and found[name] != words:
                self._files.setdefault(found[name], (folder, name, words))
        return found

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
