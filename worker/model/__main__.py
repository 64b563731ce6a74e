"""Download the files of `SMALLCAT_MODEL` and `SMALLCAT_MODEL_VAE`, as a worker on a GPU would.

For images that have a model in them (deploy/Dockerfile): `HF_HOME` says where the files go.
"""

from __future__ import annotations

import sys

from worker.contract.errors import SettingsError
from worker.contract.settings import worker_settings
from worker.model import own_vae
from worker.model.files import find


def main() -> int:
    """Download, print, and return the exit code."""
    try:
        settings = worker_settings()
        files = find(settings, half=True)
        vae = own_vae.find(settings.model_vae) if settings.model_vae else None
    except SettingsError as error:
        print(f"smallcat: {error}", file=sys.stderr)
        return 1
    print(f"{files.name} at {files.revision} is in {files.path}")
    if vae is not None:
        print(f"{vae.name} is in {vae.path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
