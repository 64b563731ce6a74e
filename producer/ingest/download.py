"""`--download`: the pictures of a run, fetched as they finish, under names made from a template.

A template such as `{line:06d}-{seed}-{slug}.png` gives a path below the folder and nowhere else: values
become plain words, and a template that leads out is refused. No file is overwritten: where a name is taken by
another picture, the job's id is appended.
"""

from __future__ import annotations

import re
import string
import threading
import unicodedata
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Final

from producer.ingest.writing import writing
from worker.contract.errors import PromptFileError, UnknownJobError
from worker.contract.job import WRITTEN_FIELDS
from worker.contract.loras import Lora

if TYPE_CHECKING:
    from producer.ingest.journal import Journal
    from producer.prompts.sources import Source
    from worker.contract.job import Job
    from worker.storage.bucket import Bucket

#: The default template. For several files the file's name goes before it.
TEMPLATE = "{line:06d}-{seed}-{slug}.png"
_JOB_FIELDS = tuple(each.name for each in WRITTEN_FIELDS.values() if each.is_hashed and not each.is_prompt)
#: What a template can name: the job's place in the run, its id, the words of its prompt, and its fields.
FIELDS = ("line", "number", "file", "id", "slug", *_JOB_FIELDS)
#: The fields that are pictures.
PICTURES: Final = ("image", "mask")
#: Pictures that are fetched at once; and that may be unsaved before the run waits for them.
_THREADS, _PENDING = 8, 256
#: Characters of a prompt in a name, and bytes of a name, at most.
_SLUG, _NAME = 60, 200


class Template:
    """A name with fields in it."""

    def __init__(self, text: str) -> None:
        """Raises `PromptFileError` for a template that is not understood, or leads out of the folder."""
        self._text = text
        try:
            fields = list(string.Formatter().parse(text))
        except ValueError as error:
            raise PromptFileError(
                f"The name {text!r} is no template ({error}): {{line}} is a field."
            ) from None
        for _, name, spec, conversion in fields:
            if name is not None and (name not in FIELDS or conversion or "{" in (spec or "")):
                raise PromptFileError(f"The name {text!r} has the field {name!r}: use {', '.join(FIELDS)}.")
        parts = PurePosixPath(text).parts
        if not parts or "\\" in text or "\0" in text or text.startswith("/") or ".." in parts:
            raise PromptFileError(f"The name {text!r} leads out of the folder: use plain names.")
        try:
            # These are numbers for every picture; the others are empty where a picture has no infotext.
            self.name({"line": 0, "number": 0, "seed": 0}, "png")
        except (ValueError, TypeError) as error:
            raise PromptFileError(f"The name {text!r} cannot be made: {error}.") from None

    def name(self, values: dict[str, Any], ending: str, *, as_first: bool = False) -> PurePosixPath:
        """The relative path for a job's values. `ending` is the picture's own, such as `png`.

        `as_first`: as the first version named it, with Python's words for lists and for what is not there.
        """
        texts = {name: values.get(name, "") for name in FIELDS}
        plain = {
            name: value if type(value) in (int, float) else _plain(str(value) if as_first else _words(value))
            for name, value in texts.items()
        }
        if as_first:
            plain |= {name: str(value).lower() for name, value in texts.items() if type(value) is bool}
        text = self._text.format(**plain) if as_first else self._filled(plain)
        # An empty field may leave a part of the path empty, or make it begin with a slash.
        parts = [part for part in text.split("/") if part.strip(". ")]
        path = PurePosixPath(*parts) if parts else PurePosixPath("picture")
        stem = path.stem if path.suffix.lower() in (".png", ".webp", ".jpeg", ".jpg") else path.name
        cut = stem.encode()[:_NAME].decode(errors="ignore").strip(". ") or "picture"
        return path.with_name(f"{cut}.{ending}")

    def _filled(self, values: Mapping[str, Any]) -> str:
        """The text with its fields; of one that is empty the dash beside it is left out, too."""
        text, is_empty = "", False
        for literal, name, spec, _ in string.Formatter().parse(self._text):
            if is_empty and literal.startswith("-") and (not text or text[-1] in "-/"):
                literal = literal[1:]
            elif is_empty and literal.startswith((".", "/")):
                text = text.removesuffix("-")
            text += literal
            if name is not None:
                value = format(values[name], spec or "")
                text, is_empty = text + value, not value
        return text.removesuffix("-") if is_empty else text


def default_template(files: int, axes: Iterable[str]) -> str:
    """The template when none is given. Pictures of one line differ in their seeds and the grid's values."""
    crossed = "".join(f"{{{axis}}}-" for axis in axes if axis in _JOB_FIELDS and axis != "seed")
    default = TEMPLATE.replace("{slug}", f"{crossed}{{slug}}")
    return default if files == 1 else "{file}-" + default


class Downloads:
    """Fetches pictures into a folder. Called from one thread; fetches on several."""

    def __init__(
        self,
        folder: Path,
        storage: Bucket,
        sources: Sequence[Source],
        template: str | None = None,
        notice: Callable[[str], None] = lambda _: None,
        axes: Iterable[str] = (),
        file_of: Callable[[str], str] = lambda _: "",
    ) -> None:
        """`notice` gets a sentence for a picture that is gone from the bucket.

        `axes` are the fields that a grid crosses: names of the default template have them. `file_of` says
        what the file of a picture that jobs begin with is called, by its reference; "": not known.

        Raises `PromptFileError` for a bad template or a folder that cannot be made.
        """
        self._notice = notice
        self._template = Template(template or default_template(len(sources), axes))
        self._folder, self._sources = folder, sources
        self._file_of = file_of
        #: Whether pictures are named as in the first version, which has begun the run.
        self.as_first = False
        #: Where the pictures are.
        self.storage = storage
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="download")
        self._pending: deque[tuple[int, Future[Path]]] = deque()
        #: Held while a name is checked and taken.
        self._lock = threading.Lock()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise PromptFileError(f"{folder} cannot be made: {error.strerror}.") from None

    def resume(self, journal: Journal) -> None:
        """Fetch what finished in an earlier call and is not in the folder."""
        for result in journal.done():
            if result["uri"] and not self._has(result.get("path")):
                self.fetch(result["number"], result["line"], result["file"], result["uri"])
                self.collect(journal)

    def fetch(self, number: int, line: int, file: int, uri: str) -> None:
        """Begin to fetch the picture of job `number` of the run, from line `line` of file number `file`."""
        self._pending.append((number, self._pool.submit(self._save, number, line, file, uri)))

    def collect(self, journal: Journal) -> None:
        """Write into the journal what was saved; waits while too much is pending.

        Raises `StorageError`, `PromptFileError`.
        """
        while self._pending and (self._pending[0][1].done() or len(self._pending) > _PENDING):
            number, future = self._pending.popleft()
            try:
                journal.write_path(number, future.result())
            except UnknownJobError as error:
                # Somebody has deleted it: the others are saved.
                self._notice(f"A picture is gone from the bucket and not saved. {error}")

    def flush(self, journal: Journal) -> bool:
        """Wait for all that is pending; True."""
        while self._pending:
            self._pending[0][1].exception()
            self.collect(journal)
        return True

    def close(self) -> None:
        """Stop. Pictures that no thread has begun to fetch are not fetched."""
        self._pool.shutdown(cancel_futures=True)

    def _has(self, path: str | None) -> bool:
        """Whether a picture lies at the path, and that in this folder."""
        return path is not None and self._folder in Path(path).parents and Path(path).is_file()

    def _save(self, number: int, line: int, file: int, uri: str) -> Path:
        data = self.storage.get(uri)
        source = self._sources[file].name if file < len(self._sources) else ""
        job = _job_of(data)
        ending = slug(uri.rpartition(".")[2])
        job_id = PurePosixPath(uri).stem
        values = {"line": line, "number": number, "file": PurePosixPath(source).name.partition(".")[0]}
        values |= {"id": job_id, "slug": slug(job.prompt) if job else job_id}
        values |= {name: getattr(job, name) for name in _JOB_FIELDS} if job else {"seed": 0}
        if not self.as_first:
            values |= {
                name: known for name in PICTURES if (known := self._file_of(str(values.get(name) or "")))
            }
        path = self._folder / self._template.name(values, ending, as_first=self.as_first)
        with writing(path, f"The picture of job {job_id}"):
            path.parent.mkdir(parents=True, exist_ok=True)
            draft = path.with_name(f".{job_id}-{number}.part")
            try:
                draft.write_bytes(data)
                with self._lock:
                    if path.exists() and path.read_bytes() != data:
                        path = path.with_name(f"{path.stem}-{job_id}{path.suffix}")
                    draft.replace(path)
            finally:
                draft.unlink(missing_ok=True)
        return path


def slug(text: str) -> str:
    """A prompt as a part of a file's name: words in lower case with dashes, up to 60 characters."""
    words = re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", text).lower())
    joined = "-".join(words)
    return joined if len(joined) <= _SLUG else joined[:_SLUG].rpartition("-")[0] or joined[:_SLUG]


def _words(value: object) -> str:
    """A field's value in words: `pixel-0.5` for a LoRA; nothing for what is not there."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Lora):
        text = value.name if value.weight == 1 else f"{value.name}-{value.weight:g}"
        return text if value.text_encoder_weight is None else f"{text}-te-{value.text_encoder_weight:g}"
    if isinstance(value, Mapping):
        return "+".join(f"{_words(key)}-{_words(each)}" for key, each in value.items())
    return "+".join(map(_words, value)) if isinstance(value, list | tuple) else str(value)


def _plain(text: str) -> str:
    """A value without any character that has a meaning in a path."""
    return re.sub(r"[^\w.+-]+", "-", text).strip(".-")


def _job_of(data: bytes) -> Job | None:
    """The job that a picture's infotext describes; None where it has none."""
    from worker.contract.errors import InvalidJobError
    from worker.contract.metadata.job_from_image import job_from_image

    try:
        return job_from_image(data)
    except InvalidJobError:
        return None
