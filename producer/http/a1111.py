"""AUTOMATIC1111's API (`/sdapi/v1`), for clients that have it: webuiapi, Open WebUI, SillyTavern.

Source: AUTOMATIC1111 1.10 (modules/api/api.py, modules/processing.py). What a caller sets by `options` is his
alone. Pictures lie in the bucket, whatever `save_images` says.
"""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Sequence
from datetime import datetime
from typing import Any, Final

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from producer.client.job_result import JobResult
from producer.http.a1111_img2img import read_img2img
from producer.http.a1111_request import HARMLESS_SETTINGS, Asked, read_request, switch
from producer.http.auth import Reader, Shared, Submitter
from producer.http.backend import Backend
from producer.http.caller import Caller
from producer.http.jobs import as_json
from producer.http.models import Model, allowed, models_of, offered_loras, served_models
from producer.http.problems import RefusedError, headers_of, name_of, sentence_of, status_of
from producer.http.reading import read_json
from producer.http.rendering import render
from producer.http.submitting import check, numbered
from worker.contract.choices import SAMPLERS, SCHEDULES, UPSCALERS, NoiseSchedule, Upscaler
from worker.contract.errors import InvalidJobError, SmallcatError
from worker.contract.explain import short
from worker.contract.infotext import write
from worker.contract.job_files import vae_of
from worker.contract.job_parameters import DEFAULT_MODEL
from worker.contract.loras import SUFFIX
from worker.state.keys import HTTP_MODEL

router = APIRouter(prefix="/sdapi/v1", include_in_schema=False)

#: How the paths begin: errors have AUTOMATIC1111's form there.
PATH: Final = "/sdapi/"
#: Digits of a model's hash, as titles have them.
_HASH: Final = 10
#: Seconds for which a caller's choice of a model is kept.
_CHOICE_S: Final = 30 * 86_400
#: Lists that clients ask for, and that are empty here.
_EMPTY: Final = (
    *("sd-vae", "hypernetworks", "face-restorers"),
    *("realesrgan-models", "prompt-styles", "script-info", "artists", "artist-categories"),
)
#: What is not offered, by path.
_NOT_OFFERED: Final = ("extra-single-image", "extra-batch-images", "interrogate", "png-info")
#: Options as clients read them, beside the model.
_OPTIONS: Final = {
    "sd_vae": "Automatic",
    "CLIP_stop_at_last_layers": 1,
    "samples_format": "png",
    "eta_noise_seed_delta": 0,
    "token_merging_ratio": 0.0,
    "randn_source": "CPU",
}


@router.post("/txt2img")
async def txt2img(request: Request, caller: Submitter, backend: Shared) -> Response:
    """Pictures of one prompt."""
    body = await read_json(request, any_type=True)
    return await _render(request, caller, backend, body, read_request(body))


@router.post("/img2img")
async def img2img(request: Request, caller: Submitter, backend: Shared) -> Response:
    """Pictures that begin with one: all of it drawn anew, or what its mask says."""
    body = await read_json(request, any_type=True)
    async with backend.unpacking:
        asked = await backend.run(read_img2img, body)
    if not switch(body, "include_init_images"):
        body = body | {"init_images": None, "mask": None}
    return await _render(request, caller, backend, body, asked)


async def _render(request: Request, caller: Caller, backend: Backend, body: Any, asked: Asked) -> Response:
    models = await _models(backend, caller)
    chosen = await _chosen(backend, caller) if asked.model is None else asked.model
    model = _find(models, chosen) if chosen else None
    fields = asked.fields | {"model": model.name if model else DEFAULT_MODEL}
    jobs = await check(backend, caller, numbered(fields, asked.batch_size * asked.n_iter), is_list=False)
    results = [each for each in await render(request, backend, caller, jobs) if each is not None]
    images = [await backend.run(result.data) for result in results] if asked.send_images else []
    return as_json(
        {
            "images": [base64.b64encode(image).decode() for image in images],
            "parameters": body,
            "info": json.dumps(_info(asked, results)),
        }
    )


def _info(asked: Asked, results: Sequence[JobResult]) -> dict[str, Any]:
    """The `info` of an answer: AUTOMATIC1111's `Processed.js()`."""
    jobs = [result.job for result in results]
    seeds = [job.seed for job in jobs]
    first = jobs[0] if jobs else None
    return {
        "prompt": first.prompt if first else asked.fields.get("prompt", ""),
        "all_prompts": [job.prompt for job in jobs],
        "negative_prompt": first.negative_prompt if first else asked.fields.get("negative_prompt", ""),
        "all_negative_prompts": [job.negative_prompt for job in jobs],
        "seed": seeds[0] if seeds else -1,
        "all_seeds": seeds,
        "subseed": seeds[0] if seeds else -1,
        "all_subseeds": seeds,
        "subseed_strength": 0,
        "width": first.width if first else 0,
        "height": first.height if first else 0,
        "sampler_name": SAMPLERS[first.scheduler] if first else "",
        "cfg_scale": first.guidance_scale if first else 0,
        "steps": first.steps if first else 0,
        "batch_size": asked.batch_size,
        "restore_faces": False,
        "face_restoration_model": None,
        "sd_model_name": first.model if first else "",
        "sd_model_hash": first.revision[:_HASH] if first else "",
        "sd_vae_name": (first.vae or None) if first else None,
        "sd_vae_hash": (vae_of(first)[:_HASH] or None) if first else None,
        "seed_resize_from_w": -1,
        "seed_resize_from_h": -1,
        "denoising_strength": first.strength if first else None,
        "extra_generation_params": {},
        "index_of_first_image": 0,
        "infotexts": [write(job) for job in jobs],
        "styles": [],
        "job_timestamp": datetime.now().strftime("%Y%m%d%H%M%S"),  # noqa: DTZ005 - as it is there
        "clip_skip": first.clip_skip if first else 1,
        "is_using_inpainting_conditioning": False,
        "version": "smallcat",
    }


# Models and options


async def _models(backend: Backend, caller: Caller) -> list[Model]:
    return allowed(caller, await backend.run(served_models, backend.session.fleet))


def _title(model: Model) -> str:
    return f"{model.name} [{model.revision[:_HASH]}]" if model.revision else model.name


def _find(models: Sequence[Model], name: str) -> Model:
    """The model of that title, name or hash. Raises `RefusedError` for one that is not served."""
    for model in models:
        if name in (_title(model), model.name, model.revision[:_HASH], model.revision):
            return model
    served = ", ".join(_title(model) for model in models) or "none"
    raise RefusedError(422, f"No worker serves the model {short(name)}: use one of those that are: {served}.")


async def _chosen(backend: Backend, caller: Caller) -> str:
    """The model that a caller has set by `options`; empty where that is none, or it is no longer served."""
    text = await backend.run(backend.session.redis.get, f"{HTTP_MODEL}{caller.mark}")
    return str(text or "")


async def _options(backend: Backend, caller: Caller) -> dict[str, Any]:
    models = await _models(backend, caller)
    chosen = await _chosen(backend, caller)
    current = next((model for model in models if model.name == chosen), models[0] if models else None)
    return {
        "sd_model_checkpoint": chosen if chosen and current is None else _title(current) if current else "",
        "sd_checkpoint_hash": current.revision if current else "",
        **_OPTIONS,
    }


@router.get("/options")
async def get_options(caller: Reader, backend: Shared) -> Response:
    """The model that is used, and options that cannot be changed."""
    return as_json(await _options(backend, caller))


@router.post("/options")
async def set_options(request: Request, caller: Submitter, backend: Shared) -> Response:
    """Choose the model of this caller's requests. Other options can only be set to what they are."""
    body = await read_json(request, any_type=True)
    if not isinstance(body, dict):
        raise InvalidJobError(f"The options are {short(body)}: send an object.")
    now = await _options(backend, caller)
    for name, value in body.items():
        if name == "sd_model_checkpoint" or value == now.get(name, _MISSING) or value is None:
            continue
        is_harmless, remedy = HARMLESS_SETTINGS.get(name, (lambda _: False, "it cannot be set: leave it out"))
        if not is_harmless(value) or name == "samples_format":
            raise RefusedError(422, f"{short(name)[1:-1]} is {short(value)}, and {remedy}.")
    if body.get("sd_model_checkpoint"):
        model = _find(await _models(backend, caller), str(body["sd_model_checkpoint"]))
        name = f"{HTTP_MODEL}{caller.mark}"
        await backend.run(lambda: backend.session.redis.set(name, model.name, ex=_CHOICE_S))
    return as_json(None)


_MISSING: Final = object()


@router.get("/sd-models")
async def sd_models(caller: Reader, backend: Shared) -> Response:
    """The models that live workers serve."""
    return as_json(
        [
            {
                "title": _title(model),
                "model_name": model.name,
                "hash": model.revision[:_HASH],
                "sha256": model.revision if len(model.revision) == 64 else None,
                "filename": model.name,
                "config": None,
            }
            for model in await _models(backend, caller)
        ]
    )


@router.get("/samplers")
async def samplers(caller: Reader) -> Response:
    """The samplers by AUTOMATIC1111's names."""
    return as_json([{"name": name, "aliases": [str(each)], "options": {}} for each, name in SAMPLERS.items()])


@router.get("/schedulers")
async def schedulers(caller: Reader) -> Response:
    """The schedules by AUTOMATIC1111's names: those that some sampler is offered with."""
    names = {"automatic": "Automatic", "uniform": "Uniform"}
    names |= {str(name): label for name, label in SCHEDULES.items() if name != NoiseSchedule.DEFAULT}
    return as_json(
        [
            {"name": name, "label": label, "aliases": None, "default_rho": -1.0, "need_inner_model": False}
            for name, label in names.items()
        ]
    )


@router.get("/upscalers")
async def upscalers(caller: Reader) -> Response:
    """Those of a second pass that work on pixels."""
    about = {"model_name": None, "model_path": None, "model_url": None, "scale": 4}
    return as_json([{"name": name, **about} for name in ("None", UPSCALERS[Upscaler.LANCZOS])])


@router.get("/latent-upscale-modes")
async def latent_upscale_modes(caller: Reader) -> Response:
    """Those of a second pass that work on latents."""
    return as_json([{"name": UPSCALERS[Upscaler.LATENT]}])


@router.get("/scripts")
async def scripts(caller: Reader) -> Response:
    """None."""
    return as_json({"txt2img": [], "img2img": []})


@router.get("/embeddings")
async def embeddings(caller: Reader) -> Response:
    """None."""
    return as_json({"loaded": {}, "skipped": {}})


@router.get("/loras")
async def loras(caller: Reader, backend: Shared) -> Response:
    """The LoRAs that live workers offer. Where their files are is not told."""
    found = await backend.run(offered_loras, backend.session.fleet, models_of(caller))
    names = dict.fromkeys(entry.name for entry in found)
    return as_json(
        [{"name": name, "alias": name, "path": f"{name}{SUFFIX}", "metadata": {}} for name in names]
    )


@router.get("/cmd-flags")
async def cmd_flags(caller: Reader) -> Response:
    """None."""
    return as_json({})


@router.get("/memory")
async def memory(caller: Reader) -> Response:
    """Of the workers' memory nothing is known here."""
    return as_json({"ram": {"error": "not known"}, "cuda": {"error": "not known"}})


async def _nothing(caller: Reader) -> Response:
    return as_json([])


async def _done(caller: Submitter) -> Response:
    return as_json(None)


async def _refuse(request: Request, caller: Submitter) -> Response:
    raise RefusedError(
        501,
        f"{request.url.path.rpartition('/')[2]} is not offered: txt2img and img2img are.",
        code="NotOffered",
    )


for _name in _EMPTY:
    router.add_api_route(f"/{_name}", _nothing, methods=["GET"])
for _name in ("refresh-checkpoints", "refresh-loras", "refresh-vae", "reload-checkpoint"):
    router.add_api_route(f"/{_name}", _done, methods=["POST"])
for _name in _NOT_OFFERED:
    router.add_api_route(f"/{_name}", _refuse, methods=["POST"])


# While pictures are made


@router.get("/progress")
async def progress(caller: Reader, backend: Shared) -> Response:
    """How far the pictures are that this caller waits for at this server."""
    handles = backend.waiting.of(caller)
    records = await backend.run(_look, backend, [handle.id for handle in handles])
    done = sum(record.step / record.steps if record.steps else 0.0 for record in records)
    current = next((record for record in records if not record.state.is_final and record.steps), None)
    oldest = min((record.submitted_at for record in records if record.submitted_at), default=time.time())
    share = done / len(records) if records else 0.0
    spent_s = max(0.0, time.time() - oldest)
    return as_json(
        {
            "progress": min(share, 0.99),
            "eta_relative": spent_s / share - spent_s if share else 0.0,
            "state": {
                "skipped": False,
                "interrupted": False,
                "stopping_generation": False,
                "job": "txt2img" if handles else "",
                "job_count": len(handles),
                "job_timestamp": time.strftime("%Y%m%d%H%M%S"),
                "job_no": sum(record.state.is_final for record in records),
                "sampling_step": current.step if current else 0,
                "sampling_steps": current.steps if current else 0,
            },
            "current_image": None,
            "textinfo": None,
        }
    )


def _look(backend: Backend, ids: Sequence[str]) -> list[Any]:
    if not ids:
        return []
    backend.session.records.watch()
    return list(backend.session.records.read(ids).values())


@router.post("/interrupt")
@router.post("/skip")
async def interrupt(caller: Submitter, backend: Shared) -> Response:
    """Give up the pictures that this caller waits for at this server: those requests get what is done."""

    def cancel() -> None:
        for handle in backend.waiting.of(caller):
            try:
                handle.cancel()
            except SmallcatError:
                continue

    await backend.run(cancel)
    return as_json(None)


def answer(error: Exception) -> Response:
    """The answer that says `error`, in AUTOMATIC1111's form."""
    body = {"error": name_of(error), "detail": sentence_of(error), "body": "", "errors": sentence_of(error)}
    return Response(json.dumps(body), status_of(error), headers_of(error), "application/json")
