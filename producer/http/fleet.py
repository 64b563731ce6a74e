"""What the fleet is doing: the workers, the models they serve, and what waits."""

from __future__ import annotations

import dataclasses
from typing import Any, Final

from fastapi import APIRouter
from starlette.responses import Response

from producer.http import schema
from producer.http.auth import Reader, Shared
from producer.http.jobs import as_json
from producer.http.models import allowed, may_use, models_of, offered_loras, served_models

router = APIRouter(tags=["fleet"])

_FLEET: Final = {
    "type": "object",
    "title": "Fleet",
    "required": ["workers", "models", "queues"],
    "properties": {
        "workers": {"type": "array", "items": schema.reference("WorkerInfo")},
        "models": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["name", "revision", "workers", "since"],
                "properties": {
                    "name": {"type": "string"},
                    "revision": {"type": "string"},
                    "workers": {"type": "integer"},
                    "since": {"type": "number"},
                },
            },
        },
        "queues": {
            "type": "object",
            "description": "Messages that wait, by queue: your tenant's, or those of none.",
            "additionalProperties": {"type": "integer"},
        },
    },
}


@router.get("/v1/fleet", summary="Workers, models and queues", responses=schema.answers(200, _FLEET))
async def get_fleet(caller: Reader, backend: Shared) -> Response:
    """The live workers, those that have been up longest first; the models; and the queues.

    A tenant's key gets how many of its own messages wait, and the models that it may use with their workers.
    A key without a tenant gets the messages of no tenant, and an admin's without one all.
    """
    fleet = backend.session.fleet

    def look() -> dict[str, Any]:
        return {
            "workers": [
                each.model_dump(mode="json")
                for each in fleet.workers()
                if may_use(models_of(caller), each.served.name)
            ],
            "models": [dataclasses.asdict(each) for each in allowed(caller, served_models(fleet))],
            "queues": fleet.waiting(None if caller.sees_all else caller.owner),
        }

    return as_json(await backend.run(look))


_LORAS: Final = {
    "type": "object",
    "title": "Loras",
    "required": ["loras"],
    "properties": {
        "loras": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["name", "sha256", "auto_v2", "architecture", "size", "models"],
                "properties": {
                    "name": {"type": "string"},
                    "sha256": {"type": "string"},
                    "auto_v2": {"type": "string", "description": "The hash by which Civitai knows it."},
                    "architecture": {"type": "string", "description": "What it fits, where that is known."},
                    "size": {"type": "integer", "description": "Bytes."},
                    "models": {
                        "type": "array",
                        "items": {"type": "string"},
                        "description": "The models whose workers have it.",
                    },
                },
            },
        }
    },
}


@router.get("/v1/loras", summary="The LoRAs that jobs may name", responses=schema.answers(200, _LORAS))
async def get_loras(caller: Reader, backend: Shared) -> Response:
    """The LoRAs that live workers offer and that can be used, by name.

    A tenant's key gets those of the workers of models that it may use.
    """
    found = await backend.run(offered_loras, backend.session.fleet, models_of(caller))
    names = ("name", "sha256", "auto_v2", "architecture", "size")
    return as_json(
        {
            "loras": [
                {name: getattr(entry, name) for name in names} | {"models": models}
                for entry, models in found.items()
            ]
        }
    )
