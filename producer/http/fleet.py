"""What the fleet is doing: the workers, the models they serve, and what waits."""

from __future__ import annotations

import dataclasses
from typing import Any, Final

from fastapi import APIRouter
from starlette.responses import Response

from producer.http import schema
from producer.http.auth import Reader, Shared
from producer.http.jobs import as_json
from producer.http.models import allowed, may_use, models_of, served_models

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
