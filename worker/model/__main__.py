"""Download the files of `SMALLCAT_MODEL`, as a worker on a GPU would, and print what they are.

For images that have a model in them (deploy/Dockerfile): `HF_HOME` says where the files go.
"""

from __future__ import annotations

import sys

from worker.contract.errors import SettingsError
from worker.contract.settings import worker_settings
from worker.model.files import find


def main() -> int:
    """Download, print, and return the exit code."""
    try:
        files = find(worker_settings(), half=True)
    except SettingsError as error:
        print(f"smallcat: {error}", file=sys.stderr)
        return 1
    print(f"{files.name} at {files.revision} is in {files.path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
