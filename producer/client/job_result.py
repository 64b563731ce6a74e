"""What became of a job, for people: its record, and the way to its picture."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import SerializerFunctionWrapHandler, model_serializer

from producer.session import session
from worker.contract.errors import UnknownJobError
from worker.contract.record import JobRecord

if TYPE_CHECKING:
    from PIL import Image


class JobResult(JobRecord):
    """A finished job: its record, and the way to its picture."""

    @classmethod
    def of(cls, record: JobRecord) -> JobResult:
        """The result that `record` describes."""
        return cls.model_validate(dict(record))

    @model_serializer(mode="wrap")
    def _for_people(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """With the job's syntax, which messages and records leave out where it is plain.

        Without it, the job would be submitted again in the fleet's default.
        """
        values: dict[str, Any] = serialize(self)
        if "job" in values:
            values["job"].setdefault("prompt_syntax", self.job.prompt_syntax.value)
        return values

    def __repr__(self) -> str:
        values: dict[str, object] = {"state": str(self.state), "uri": self.uri, "seed": self.seed}
        size = f"{self.width}x{self.height}" if self.width and self.height else None
        values |= {"size": size, "seconds": round(self.seconds, 3)}
        shown = ", ".join(f"{name}={value!r}" for name, value in values.items())
        return f"JobResult({self.id!r}, {shown})"

    __str__ = __repr__

    @property
    def seed(self) -> int:
        """The seed that was used, given or drawn."""
        return self.job.seed

    @property
    def seconds(self) -> float:
        """Seconds from submission until the picture was in the bucket, or as far as the job came."""
        stages = (self.timings.queued, self.timings.rendered, self.timings.uploaded)
        return sum((stage for stage in stages if stage is not None), 0.0)

    @property
    def width(self) -> int | None:
        """Pixels of the picture."""
        return self.job.picture_size[0]

    @property
    def height(self) -> int | None:
        """Pixels of the picture."""
        return self.job.picture_size[1]

    def url(self, expires_s: int = 3_600) -> str:
        """A link to the picture that any browser opens for `expires_s` seconds (1 to 604,800)."""
        uri = self._where()
        return session().bucket_of(uri).url(uri, expires_s)

    def data(self) -> bytes:
        """The picture's file as it is in the bucket. Raises `StorageError`, `UnknownJobError`."""
        uri = self._where()
        return session().bucket_of(uri).get(uri)

    def image(self) -> Image.Image:
        """The picture. Raises `StorageError`, `UnknownJobError`."""
        import io

        from PIL import Image

        image = Image.open(io.BytesIO(self.data()))
        image.load()
        return image

    def _where(self) -> str:
        if self.uri is None:
            raise UnknownJobError(f"Job {self.id} is {self.state}: it has no picture.")
        return session().address_of(self.id, self.job.format, self.uri, self.job.tenant)

    def _repr_png_(self) -> bytes:
        """The picture in a notebook."""
        import io

        file = io.BytesIO()
        self.image().save(file, "PNG")
        return file.getvalue()
