"""The infotext as other programs read it: sd-parsers 0.6, and AUTOMATIC1111's web UI 1.10 by its rules."""

from __future__ import annotations

import io
import json
import re
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sd_parsers import ParserManager

from worker.contract.choices import ETA, SAMPLERS, SCHEDULES, ImageFormat, Scheduler
from worker.contract.infotext import read, write
from worker.contract.job import Job
from worker.contract.scheduler_names import OFFERED
from worker.engine.runner import Picture
from worker.jobs.image_file import encode

RESOLVED: dict[str, Any] = {
    "seed": 2961093478,
    "width": 512,
    "height": 768,
    "guidance_scale": 7.5,
    "steps": 10,
}
RESOLVED |= {"prompt": "a small cat", "negative_prompt": "blurry", "model": "a/model", "revision": "abc123"}
#: Each scheduler with each of its schedules.
PAIRS = [(name, schedule) for name, schedules in OFFERED.items() for schedule in ("default", *schedules)]
#: modules/sd_samplers_kdiffusion.py of version 1.10: what "Automatic" is where it is not the sampler's own.
AUTOMATIC = {
    "DPM++ 2M": "Karras",
    "DPM++ SDE": "Karras",
    "DPM++ 2S a": "Karras",
    "DPM2": "Karras",
    "DPM2 a": "Karras",
    "DPM++ 2M SDE": "Exponential",
    "DPM++ 3M SDE": "Exponential",
}


def resolved(**fields: Any) -> Job:
    return Job.parse(RESOLVED | fields)


def picture_of(job: Job) -> Image.Image:
    pixels = Picture(np.zeros((8, 8, 3), np.uint8))
    return Image.open(io.BytesIO(encode(pixels, job.format, write(job))))


def as_automatic1111_reads(text: str) -> dict[str, str]:
    """modules/infotext_utils.py of version 1.10: a value is in quotes, or ends at the next comma."""
    line = text.rpartition("\n")[2]
    pairs = dict(re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', line))
    read = {key: json.loads(value) if value.startswith('"') else value for key, value in pairs.items()}
    for schedule in ("Karras", "Exponential"):
        # Versions before 1.9 wrote both in one.
        if "Schedule type" not in read and read["Sampler"].endswith(f" {schedule}"):
            read |= {"Sampler": read["Sampler"].removesuffix(f" {schedule}"), "Schedule type": schedule}
    if read.setdefault("Schedule type", "Automatic") == "Automatic":
        read["Schedule type"] = AUTOMATIC.get(read["Sampler"], "Uniform")
    return {"Clip skip": "1"} | read


@pytest.mark.parametrize("image_format", ImageFormat)
def test_sd_parsers_reads_the_same_prompts_and_parameters(image_format: ImageFormat) -> None:
    found = ParserManager().parse(picture_of(resolved(format=image_format, scheduler="heun", clip_skip=2)))
    assert found is not None
    [sampler] = found.samplers
    assert (found.full_prompt, found.full_negative_prompt) == ("a small cat", "blurry")
    assert sampler.model is not None
    assert (sampler.model.name, sampler.model.hash) == ("a/model", "abc123")
    assert sampler.name == "Heun"
    assert sampler.parameters == {"cfg_scale": "7.5", "seed": "2961093478", "steps": "10"}
    assert (found.metadata["Size"], found.metadata["Clip skip"]) == ("512x768", "2")


@pytest.mark.parametrize(("scheduler", "schedule"), PAIRS)
def test_a_sampler_and_its_schedule_are_the_same_elsewhere(scheduler: Scheduler, schedule: str) -> None:
    job = resolved(scheduler=scheduler, schedule=schedule)
    found = as_automatic1111_reads(write(job))
    own = schedule == "default"
    assert found["Sampler"] == SAMPLERS[scheduler]
    assert found["Schedule type"] == ("Uniform" if own else SCHEDULES[schedule])
    elsewhere = ParserManager().parse(picture_of(job))
    assert elsewhere is not None
    [sampler] = elsewhere.samplers
    names = f"{sampler.name} {sampler.parameters.get('scheduler', '')}".split()
    assert names in (f"{found['Sampler']} {found['Schedule type']}".split(), found["Sampler"].split())


@pytest.mark.parametrize("scheduler", ETA)
def test_eta_has_the_key_that_the_sampler_there_reads(scheduler: Scheduler) -> None:
    """modules/sd_samplers_timesteps.py of version 1.10: "Eta DDIM"; its other samplers read "Eta"."""
    found = as_automatic1111_reads(write(resolved(scheduler=scheduler, eta=0.25)))
    keys = {key: value for key, value in found.items() if key.startswith("Eta")}
    assert keys == {"Eta DDIM" if scheduler is Scheduler.DDIM else "Eta": "0.25"}


def test_files_and_the_rest_are_where_automatic1111_and_civitai_look() -> None:
    hashes = {"embedding:EasyNegative": "c74b4e810b03" + "0" * 52, "embedding:b": "1" * 64}
    hashes |= {"vae:vae-ft-mse": "63aeecb90f" + "2" * 54}
    text = write(
        resolved(file_hashes=hashes, vae="vae-ft-mse", clip_skip=2, guidance_rescale=0.7, scheduler="euler")
    )
    found = as_automatic1111_reads(text)
    assert found["TI hashes"] == "EasyNegative: c74b4e810b03, b: 111111111111"
    assert (found["VAE"], found["VAE hash"]) == ("vae-ft-mse", "63aeecb90f")
    assert (found["Clip skip"], found["CFG scale"], found["CFG rescale"]) == ("2", "7.5", "0.7")
    # As its extension for Civitai writes them: bare JSON, AutoV2 hashes by kind and name.
    expected = {"embed:EasyNegative": "c74b4e810b", "embed:b": "1" * 10, "vae": "63aeecb90f"}
    json_there = re.search(r", Hashes: (\{[^}]+\})", text)
    assert json_there is not None
    assert json.loads(json_there[1]) == expected
    elsewhere = ParserManager().parse(picture_of(resolved(file_hashes=hashes, vae="vae-ft-mse")))
    assert elsewhere is not None
    assert elsewhere.metadata["Hashes"] == expected


LORAS = {
    "loras": "detail=0.8; pixel-art_v1.2=1:te=0.5",
    "file_hashes": {
        "lora:detail": "7c6bad76eb" + "0" * 54,
        "lora:pixel-art_v1.2": "63aeecb90f" + "1" * 54,
    },
}


@pytest.mark.parametrize("prompt", ["a small cat", "a (small:1.2) cat\non a roof", "a cat # of mine"])
def test_loras_are_where_automatic1111_and_civitai_look(prompt: str) -> None:
    """AUTOMATIC1111 1.10.1: modules/extra_networks.py and extensions-builtin/Lora.

    Civitai in 2025: src/utils/metadata/automatic.metadata.ts, its expressions.
    """
    job = resolved(prompt=prompt, prompt_syntax="a1111", **LORAS)
    text = write(job)
    there = text.partition("\nNegative prompt: ")[0]
    without_comments = re.sub(r"#[^\n]*", "", there)
    assert re.findall(r"<(\w+):([^>]+)>", without_comments) == [
        ("lora", "detail:0.8"),
        ("lora", "pixel-art_v1.2:0.5:1"),
    ]
    # What it takes for the prompt, and for the LoRAs' names and hashes when it is pasted.
    assert re.sub(r"<(\w+):([^>]+)>", "", without_comments).strip() == prompt.partition("#")[0].strip()
    pairs = as_automatic1111_reads(text)
    assert pairs["Lora hashes"] == "detail: 7c6bad76eb, pixel-art_v1.2: 63aeecb90f"
    # Civitai: a resource of that weight, and hashes by kind and name, AutoV2 in either place.
    extra = re.findall(r"<(lora|hypernet):([a-zA-Z0-9_\.\-]+):([0-9.]+)>", there)
    assert extra == [("lora", "detail", "0.8")]
    hashes = re.search(r", Hashes:\s*({[^}]+})", text)
    assert hashes is not None
    assert json.loads(hashes[1]) == {"lora:detail": "7c6bad76eb", "lora:pixel-art_v1.2": "63aeecb90f"}
    elsewhere = ParserManager().parse(picture_of(job))
    assert elsewhere is not None
    assert elsewhere.full_prompt == there
    assert elsewhere.metadata["Hashes"] == json.loads(hashes[1])
    assert read(text) == job
    assert read(text).id == job.id


def test_a_name_that_cannot_stand_in_a_tag_is_in_our_own_key_alone() -> None:
    job = resolved(loras={"strange=name": -1}, file_hashes={"lora:strange=name": "2" * 64})
    text = write(job)
    assert text.partition("\nNegative prompt: ")[0] == "a small cat"
    assert read(text) == job


def test_of_a_key_that_stands_twice_the_value_counts_that_counts_there() -> None:
    text = "a cat\nSteps: 20, Sampler: Euler, CFG scale: 7, Seed: 1, Size: 64x64, Seed: 2, CFG scale: 5"
    there = as_automatic1111_reads(text)
    assert (there["Seed"], there["CFG scale"]) == ("2", "5")
    assert (read(text).seed, read(text).guidance_scale) == (2, 5)
