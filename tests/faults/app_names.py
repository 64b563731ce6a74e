"""What `tests.faults.app` writes and the oracle reads."""

from typing import Final

#: Hash: job id -> how often it was marked done.
MARKS: Final = "faults:marks"
#: Hash: job id -> how often its process was asked to die for it.
DIED: Final = "faults:died"
