"""Every error of smallcat, by whose fault it is: that decides what happens to the job.

    SmallcatError
    ├── CallerError                 the caller's fault: never tried again
    │   ├── InvalidJobError         a field is outside its limits
    │   ├── InputError              a picture that the job begins with is gone, or is none
    │   ├── PromptFileError         a file of prompts cannot be read, or does not fit the run
    │   ├── UnknownModelError       no worker may serve that model
    │   ├── UnknownJobError         there is no job of that id
    │   ├── JobCancelledError       the caller took the job back
    │   └── SettingsError           an environment variable is wrong or misspelt
    ├── JobError                    the job's own fault: tried again a few times, then set aside
    │   ├── RenderError             the model raised while rendering this job alone
    │   ├── NotFiniteError          its latents turned NaN or infinite
    │   ├── JobTooLargeError        it does not fit in the device's memory, even alone
    │   ├── JobTimeoutError         it was not done within its time limit
    │   └── PoisonJobError          it was in flight each time a worker died
    ├── MachineError                the worker's fault: the job goes back to the queue, at once
    │   ├── OutOfMemoryError        a batch did not fit; the engine tries again with fewer rows
    │   ├── DeviceError             the device failed, and will for every job
    │   ├── EngineStoppedError      the engine is stopping or lost
    │   │   └── EngineFailedError   it failed while it had the job, as when a worker dies
    │   ├── BucketRefusedError      the bucket refuses all that this worker puts
    │   ├── MissingFileError        this worker lacks a file that the job uses
    │   └── NewerMessageError       the message is of a newer version than this worker reads
    └── ServiceError                a service is out of reach: tried again for a limited time
        ├── QueueError              Redis
        └── StorageError            the S3 bucket
            └── PermanentStorageError   it refuses for a reason that lasts

Each text names the value, the limit and the remedy. Constructor arguments are positional and go to
`super().__init__`, so that an error survives pickling and a job's record.
"""

from __future__ import annotations

from typing import ClassVar


class SmallcatError(Exception):
    """The root: catch it to catch every error that smallcat raises on purpose."""


class CallerError(SmallcatError):
    """Raised when the caller asked for something that cannot be done. Trying again does not help."""


class InvalidJobError(CallerError):
    """Raised when a field of a job is unknown or outside its limits. Nothing has been sent."""


class InputError(CallerError):
    """Raised when a picture that the job begins with is not there any more, or is not what it was."""


class PromptFileError(CallerError):
    """Raised when a file of prompts cannot be read, or what is asked of it cannot be done."""


class UnknownModelError(CallerError):
    """Raised when a job names a model that this worker does not serve."""


class UnknownJobError(CallerError):
    """Raised when neither Redis nor the bucket knows the job's id."""


class JobCancelledError(CallerError):
    """Raised when the job was cancelled before its picture was done."""


class SettingsError(CallerError):
    """Raised when a setting is misspelt or has a value it cannot have."""


class JobError(SmallcatError):
    """Raised when this job cannot be rendered, although the other jobs of its batch can."""


class RenderError(JobError):
    """Raised when the model fails on this job alone."""


class NotFiniteError(JobError):
    """Raised when the job's latents hold NaN or infinity."""


class JobTooLargeError(JobError):
    """Raised when one row of this job alone does not fit in the device's memory."""


class JobTimeoutError(JobError):
    """Raised when a job is not done within `SMALLCAT_JOB_TIMEOUT_S`."""


class PoisonJobError(JobError):
    """Raised when a job or its message was in flight each time a worker died, `SMALLCAT_MAX_ATTEMPTS` times.

    Of a message that kills workers before they have its job, so many deaths and ten more.
    """


class MachineError(SmallcatError):
    """Raised when this worker cannot continue, whatever the job. Another worker can do the job."""

    #: Seconds until the message is fetched again, by this worker or another one.
    delay_s: ClassVar[float] = 0.0


class OutOfMemoryError(MachineError):
    """Raised when a batch does not fit in the device's memory. The same batch in halves may."""


class DeviceError(MachineError):
    """Raised when the device itself fails. The process must end: its CUDA context does not recover."""


class EngineStoppedError(MachineError):
    """Raised when the engine is draining, stopped or lost. The job goes back to the queue."""


class EngineFailedError(EngineStoppedError):
    """Raised when the engine failed while it had the job. That counts as a worker's death."""

    #: Whether the device or the machine failed, which is seldom a job's fault.
    by_machine: bool = False


class BucketRefusedError(MachineError):
    """Raised when the bucket refuses this worker whatever the object. Another worker may have the rights."""


class MissingFileError(MachineError):
    """Raised when this worker lacks a file that the job uses beside its model. Another one may have it."""

    #: Where no worker has it, the message goes from one to the next until one has.
    delay_s = 2.0


class NewerMessageError(MachineError):
    """Raised when a message is of a newer version than this worker reads. It waits for one that does."""

    #: The message's version.
    version: int = 0


class ServiceError(SmallcatError):
    """Raised when Redis or the bucket is out of reach, or refuses."""


class QueueError(ServiceError):
    """Raised when Redis is out of reach, full, read-only or refuses the password."""


class StorageError(ServiceError):
    """Raised when the bucket is out of reach, missing, full or refuses the keys."""


class PermanentStorageError(StorageError):
    """Raised when the bucket refuses for a reason that lasts, such as wrong keys. Waiting does not help."""


def _tree(root: type[SmallcatError]) -> dict[str, type[SmallcatError]]:
    """Name to class for `root` and all below it."""
    found = {root.__name__: root}
    for child in root.__subclasses__():
        found |= _tree(child)
    return found


def named(name: str, message: str) -> SmallcatError:
    """The error that a worker raised, for raising it again on the caller's side: by class name and text.

    A name that this version does not know becomes a plain `JobError` that mentions it, so that an old
    producer can read a newer worker's record.
    """
    kind = _tree(SmallcatError).get(name)
    return kind(message) if kind else JobError(f"{name}: {message}")


def first_line(error: Exception) -> str:
    """The first line of a library's error, up to 300 characters, for the text of our own."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]
