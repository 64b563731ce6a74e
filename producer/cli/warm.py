"""The command `warm`: compiles ahead of a rollout what workers run. It needs what they need, and a GPU."""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import Any

import click

from producer.cli.json_output import json_option, print_json, say
from worker.contract.errors import CallerError, SettingsError, StorageError
from worker.contract.settings import WorkerSettings, worker_settings


@click.command()
@json_option
def warm(as_json: bool) -> None:
    """Compile ahead of a rollout what workers run, into SMALLCAT_KERNEL_CACHE.

    Run it with the workers' settings and packages, on a machine with a GPU of their kind. Their first start
    then loads in seconds what would take minutes to compile. What is there already is left as it is.
    """
    if not importlib.util.find_spec("torch"):
        raise CallerError('torch is not installed: pip install "smallcat[worker,cuda]", as for a worker.')
    settings = _checked(worker_settings())
    from worker.device.compiling import filling
    from worker.storage.shared_code import store_of

    shared = store_of(settings)
    assert shared is not None  # noqa: S101 - the settings were checked
    say(f"loading the model; compiled code goes to {shared}", err=True)
    found: list[dict[str, Any]] = []
    try:
        for each in filling.fill(settings, shared):
            found.append(dataclasses.asdict(each))
            if not as_json:
                how = "was there already" if each.was_there else f"compiled in {each.seconds:.0f} s"
                say(f"{each.what} for {each.lane}: {each.problem or how}")
    except OSError as error:
        raise StorageError(f"{shared} cannot be used ({error}): check SMALLCAT_KERNEL_CACHE.") from error
    if as_json:
        print_json(found)
    lacking = sum(bool(each["problem"]) for each in found)
    if lacking:
        raise StorageError(f"{lacking} of {len(found)} are not in {shared}, see above.")


def _checked(settings: WorkerSettings) -> WorkerSettings:
    """The settings, if workers with them share compiled code. Raises `SettingsError`."""
    if not settings.kernel_cache:
        raise SettingsError("SMALLCAT_KERNEL_CACHE is not set: name the folder or s3:// prefix to fill.")
    if not settings.kernel_cache_key:
        raise SettingsError(
            "SMALLCAT_KERNEL_CACHE_KEY is not set: give it the workers' key, which signs compiled code."
        )
    if not settings.compile:
        raise SettingsError("SMALLCAT_COMPILE=0: workers with these settings run nothing compiled.")
    if settings.exact:
        raise SettingsError("SMALLCAT_EXACT=1: workers in exact mode compile for themselves.")
    return settings
