"""What a worker says of itself to the fleet when it starts."""

from __future__ import annotations

import platform
from collections.abc import Mapping

from worker.contract.choices import PromptSyntax
from worker.contract.job import FORMAT_VERSION
from worker.contract.served_model import ServedModel
from worker.contract.settings import WorkerSettings
from worker.contract.versions import versions
from worker.state.fleet import WorkerInfo

#: Packages whose versions a worker announces.
VERSIONS = ("smallcat", "torch", "diffusers", "transformers", "xformers", "celery", "kombu")


def announcement(
    settings: WorkerSettings,
    name: str,
    served: ServedModel,
    choices: Mapping[str, str],
    max_rows: int,
    started_at: float,
) -> WorkerInfo:
    """The announcement of the worker `name`, whose device and attention are among `choices`.

    `started_at` is in Unix seconds by Redis' clock.
    """
    return WorkerInfo(
        name=name,
        served=served,
        started_at=started_at,
        device=choices["device"],
        attention=choices["attention"],
        max_rows=max_rows,
        reads=FORMAT_VERSION,
        versions={"python": platform.python_version(), **versions(VERSIONS)},
        prompt_syntax=PromptSyntax(settings.default_prompt_syntax),
        retiring=settings.retiring,
    )
