"""AUTOMATIC1111's API: with webuiapi 0.9.17, and with requests as Open WebUI and SillyTavern send them.

Open WebUI at its commit 02530d5 (`backend/open_webui/routers/images.py`) and SillyTavern 1.13, commit 02903fd
(`src/endpoints/stable-diffusion.js` and its extension): their requests are written down here.
"""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import webuiapi
from PIL import Image

from deploy.embedded.stack import Stack
from producer import job_from_image
from producer.http.a1111_request import read_request
from tests.fast_worker import announce
from tests.producer.http.conftest import Api, fast_worker
from worker.contract.file_index import FileEntry, FileIndex, Kind
from worker.contract.infotext import read
from worker.contract.job import Job
from worker.state.fleet import Fleet
from worker.state.redis_client import connect
from worker.storage.bucket import Bucket

REVISION = "f" * 10


@pytest.fixture
def client(api: Api) -> webuiapi.WebUIApi:
    made = webuiapi.WebUIApi(baseurl=f"{api.url}/sdapi/v1")
    made.set_auth("anybody", api.key)
    return made


def txt2img(api: Api, **fields: Any) -> Any:
    return api.call("POST", "/sdapi/v1/txt2img", {"prompt": "a cat", **fields})


# webuiapi


def test_webuiapi_gets_pictures(client: webuiapi.WebUIApi) -> None:
    result = client.txt2img(
        prompt="a cat", negative_prompt="dogs", seed=7, steps=4, width=64, height=64, batch_size=2, n_iter=2
    )
    assert [image.getpixel((0, 0))[0] for image in result.images] == [7, 8, 9, 10]
    info = result.info
    assert info["all_seeds"] == [7, 8, 9, 10]
    assert (info["seed"], info["sampler_name"], info["steps"]) == (7, "Euler a", 4)
    assert (info["width"], info["height"], info["cfg_scale"]) == (64, 64, 7.0)
    assert info["index_of_first_image"] == 0
    job = read(info["infotexts"][1])
    assert (job.prompt, job.negative_prompt, job.seed, job.scheduler) == (
        "a cat",
        "dogs",
        8,
        "euler_ancestral",
    )
    assert result.parameters["batch_size"] == 2


def test_webuiapi_finds_its_way(client: webuiapi.WebUIApi) -> None:
    assert client.util_get_model_names() == [f"fast [{REVISION}]"]
    assert {"Euler a", "DPM++ 2M", "DDIM"} <= set(client.util_get_sampler_names())
    assert {"automatic", "karras", "beta", "sgm_uniform"} <= set(client.util_get_scheduler_names())
    assert client.util_get_current_model() == f"fast [{REVISION}]"
    client.util_set_model("fast")
    client.util_wait_for_ready(check_interval=0.01)
    assert client.get_progress()["progress"] == 0.0
    assert client.get_sd_vae() == client.get_prompt_styles() == []
    assert [each["name"] for each in client.get_upscalers()] == ["None", "Lanczos"]
    assert client.get_latent_upscale_modes() == [{"name": "Latent"}]
    assert client.get_scripts() == {"txt2img": [], "img2img": []}
    client.refresh_checkpoints()
    client.interrupt()


def test_a_random_seed_is_told(client: webuiapi.WebUIApi) -> None:
    result = client.txt2img(prompt="a cat", seed=-1, width=64, height=64)
    assert result.info["seed"] >= 0
    assert result.image.getpixel((0, 0))[0] == result.info["seed"] % 256


def test_the_file_has_the_infotext(api: Api) -> None:
    answer = txt2img(api, seed=3, sampler_name="DPM++ 2M", scheduler="Karras").json
    job = job_from_image(base64.b64decode(answer["images"][0]))
    assert (job.seed, job.scheduler) == (3, "dpmpp_2m_karras")
    assert json.loads(answer["info"])["infotexts"][0].startswith("a cat\nSteps: ")


@pytest.mark.parametrize(
    ("given", "scheduler", "schedule"),
    [
        ({"sampler_name": "DPM++ 2M"}, "dpmpp_2m_karras", None),
        ({"sampler_index": "DPM2 a", "scheduler": None}, "dpm2_ancestral", "karras"),
        ({"sampler_name": "DPM++ 3M SDE", "scheduler": ""}, "dpmpp_3m_sde", "exponential"),
        ({"sampler_name": "DPM++ 2M", "scheduler": "Uniform"}, "dpmpp_2m", None),
        ({"sampler_name": "DPM++ 2M Exponential"}, "dpmpp_2m", "exponential"),
        ({"sampler_name": "Euler a"}, "euler_ancestral", None),
        ({}, "default", None),
    ],
)
def test_a_scheduler_that_is_left_out_is_automatic(
    given: dict[str, Any], scheduler: str, schedule: str | None
) -> None:
    fields = read_request({"prompt": "a cat", **given}).fields
    assert (fields["scheduler"], fields.get("schedule")) == (scheduler, schedule)


# Open WebUI


def test_open_webui_draws(api: Api) -> None:
    auth = {"authorization": "Basic " + base64.b64encode(f"user:{api.key}".encode()).decode()}
    verify = api.call("GET", "/sdapi/v1/options", headers=auth, key="")
    assert verify.status == 200
    models = api.call("GET", "/sdapi/v1/sd-models", headers=auth, key="").json
    assert [(each["title"], each["model_name"]) for each in models] == [(f"fast [{REVISION}]", "fast")]
    # It sends all options back, with another model.
    options = verify.json | {"sd_model_checkpoint": models[0]["title"]}
    assert api.call("POST", "/sdapi/v1/options", options, headers=auth, key="").status == 200
    answer = api.call(
        "POST",
        "/sdapi/v1/txt2img",
        {"prompt": "a cat", "batch_size": 1, "width": 512, "height": 512, "steps": 50, "negative_prompt": ""},
        headers=auth,
        key="",
    )
    assert Image.open(io.BytesIO(base64.b64decode(answer.json["images"][0]))).format == "PNG"
    assert json.loads(answer.json["info"])["steps"] == 50


# SillyTavern


def silly_tavern(api: Api) -> dict[str, Any]:
    """Its request for a picture: what its extension makes, with the server's address and password."""
    return {
        "url": api.url,
        "auth": f"user:{api.key}",
        "prompt": "best quality, absurdres, aesthetic, a cat",
        "negative_prompt": "lowres, bad anatomy",
        "sampler_name": "DDIM",
        "scheduler": "Automatic",
        "steps": 20,
        "cfg_scale": 7,
        "width": 512,
        "height": 512,
        "restore_faces": False,
        "enable_hr": False,
        "hr_upscaler": "Latent",
        "hr_scale": 1.0,
        "hr_additional_modules": [],
        "denoising_strength": 0.7,
        "hr_second_pass_steps": 0,
        "seed": -1,
        "override_settings": {
            "CLIP_stop_at_last_layers": 1,
            "sd_vae": "Automatic",
            "forge_additional_modules": [],
        },
        "override_settings_restore_afterwards": True,
        "clip_skip": 1,
        "save_images": True,
        "send_images": True,
        "do_not_save_grid": False,
        "do_not_save_samples": False,
    }


def test_silly_tavern_draws(api: Api) -> None:
    headers = {"Authorization": "Basic " + base64.b64encode(f"user:{api.key}".encode()).decode()}
    for path in ("options", "upscalers", "latent-upscale-modes", "sd-vae", "samplers", "schedulers"):
        assert api.call("GET", f"/sdapi/v1/{path}", headers=headers).status == 200
    assert api.call("GET", "/sdapi/v1/sd-modules", headers=headers).status == 404  # As where no Forge is.
    title = api.call("GET", "/sdapi/v1/sd-models", headers=headers).json[0]["title"]
    chosen = {"sd_model_checkpoint": title}
    assert api.call("POST", "/sdapi/v1/options", chosen, headers=headers).status == 200
    state = api.call("GET", "/sdapi/v1/progress", headers=headers).json
    assert (state["progress"], state["state"]["job_count"]) == (0.0, 0)
    answer = api.call("POST", "/sdapi/v1/txt2img", silly_tavern(api), headers=headers)
    assert answer.status == 200, answer.body
    assert len(answer.json["images"]) == 1


# Hires fix

HIRES: dict[str, Any] = {"enable_hr": True, "steps": 10, "width": 512, "height": 768, "hr_prompt": ""}


@pytest.mark.parametrize(
    ("given", "fields"),
    [
        ({}, {"upscale": 2.0, "upscale_strength": 0.75, "upscale_steps": 14, "upscaler": "latent"}),
        ({"hr_second_pass_steps": 15, "denoising_strength": 0.7}, {"upscale_steps": 22}),
        ({"hr_second_pass_steps": 15, "denoising_strength": 1}, {"upscale_steps": 15}),
        ({"hr_upscaler": "Lanczos", "hr_scale": 1.5}, {"upscale": 1.5, "upscaler": "lanczos"}),
        ({"hr_resize_x": 768}, {"upscale": 1.5}),
        ({"hr_resize_y": 1536, "hr_scale": 9}, {"upscale": 2.0}),
        ({"hr_resize_x": 1024, "hr_resize_y": 1536}, {"upscale": 2.0}),
        ({"hr_sampler_name": "Use same sampler", "hr_prompt": "a cat"}, {"upscale": 2.0}),
    ],
)
def test_hires_fix_is_a_second_pass(given: dict[str, Any], fields: dict[str, Any]) -> None:
    """Its steps are those that are run, as in version 1.10 (modules/sd_samplers_common.py)."""
    found = read_request({"prompt": "a cat", **HIRES, **given}).fields
    assert {name: found[name] for name in fields} == fields
    second = Job.parse(found | {"seed": 1}).second_pass
    assert second is not None
    assert second.steps_run == given.get("hr_second_pass_steps", 10)


# What is not offered


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ({"enable_hr": True}, "enable_hr needs the steps that it has in its second pass: give steps"),
        ({"enable_hr": True, "hr_upscaler": "R-ESRGAN 4x+"}, "hr_upscaler is 'R-ESRGAN 4x+', which is not"),
        ({"enable_hr": True, "hr_upscaler": ["Latent"]}, 'hr_upscaler is ["Latent"], which is not'),
        *(
            (
                {"enable_hr": True, "steps": 9, "denoising_strength": tiny},
                f"strength of {tiny:g}, which are a share",
            )
            for tiny in (5e-324, 1e-300, 0.0119)
        ),
        ({"enable_hr": True, "hr_prompt": "a dog"}, "hr_prompt is 'a dog', and a second pass is as the"),
        ({"enable_hr": True, "steps": 9, "hr_scale": 1.0}, "hr_scale is 1, and a second pass makes the"),
        ({"enable_hr": True, "steps": 9, "hr_resize_x": 512}, "they must be pixels, beside width and height"),
        (
            {**HIRES, "hr_resize_x": 1024, "hr_resize_y": 1024},
            "which are not of the proportions of width and",
        ),
        ({**HIRES, "hr_scale": 8}, "upscale is 8: it must be 1 to 4"),
        ({**HIRES, "hr_scale": 4, "width": 1024}, "upscale is 4, which makes 4096x3072 px of 1024x768"),
        ({**HIRES, "denoising_strength": 0}, "upscale_strength is 0: it must be above 0 and up to 1"),
        ({"styles": ["anime"]}, 'styles is ["anime"], and styles are not offered'),
        ({"script_name": "X/Y/Z plot"}, "script_name is 'X/Y/Z plot', and scripts are not offered"),
        (
            {"alwayson_scripts": {"ControlNet": {"args": [{"model": "x"}]}}},
            "has 'ControlNet'",
        ),
        ({"restore_faces": True}, "restoring faces is not offered"),
        ({"s_noise": 0}, "s_noise is 0, and it is not offered: set it to 1"),
        ({"tiling": True}, "tiling is not offered"),
        ({"subseed_strength": 0.5}, "variation seeds are not offered"),
        ({"refiner_checkpoint": "xl-refiner"}, "refiners are not offered"),
        ({"init_images": ["x"]}, "it is for img2img: send it there"),
        ({"clip_skip": 13}, "clip_skip is 13"),
        ({"override_settings": {"CLIP_stop_at_last_layers": 13}}, "clip_skip is 13"),
        ({"override_settings": {"sd_vae": "x.vae.pt"}}, 'vae is "x.vae.pt", which no worker offers'),
        ({"override_settings": {"sd_hypernetwork": "x"}}, "override_settings has 'sd_hypernetwork'"),
        ({"override_settings": {"sd_model_checkpoint": "sdxl"}}, "No worker serves the model 'sdxl'"),
        ({"sampler_name": "DPM fast"}, "scheduler is 'DPM fast'"),
        ({"sampler_name": "Euler a", "scheduler": "Beta"}, "with the schedule 'Beta', which is not offered"),
        ({"sampler_name": "DDIM", "eta": 1.5}, "eta is 1.5: it must be 0 to 1"),
        ({"sampler_name": "DPM++ 2M SDE", "eta": 0.5}, "eta is 0.5, which is not offered with dpmpp_2m_sde"),
        ({"prompt": "a <hypernet:cats:1> cat"}, "the prompt asks for <hypernet:cats:1>: not offered"),
        ({"prompt": "a <lora:cats:1> cat"}, 'loras has "cats", which no worker offers'),
        ({"prompt": "a <lora:cats:9> cat"}, "loras has the weight 9.0 for 'cats': it must be -4 to 4"),
        ({"stpes": 3}, "There is no 'stpes' in txt2img: did you mean steps?"),
        ({"cfg_scal": 3}, "There is no 'cfg_scal' in txt2img: did you mean cfg_scale?"),
        ({"steps": 1_000}, "steps is 1000"),
        ({"width": 500}, "width is 500, which is no multiple of 8"),
        ({"batch_size": 0}, "batch_size is 0: it must be 1 to 100."),
        ({"batch_size": 50, "n_iter": 50}, "it must be 1 to 100 pictures"),
        ({"prompt": ""}, "prompt is empty"),
        *(({"override_settings": value}, "override_settings is ") for value in (7, [], "", False, 0)),
        *(({"alwayson_scripts": value}, "alwayson_scripts is ") for value in (7, [], [1], "", False, "x")),
        *(
            ({name: value}, f"{name} is {value!r}, which is no whole number: use 1 to 100.")
            for name in ("n_iter", "batch_size")
            for value in ("abc", 1.5, [], {})
        ),
    ],
)
def test_what_would_be_another_picture_is_refused_by_name(api: Api, given: dict[str, Any], part: str) -> None:
    answer = txt2img(api, **given)
    assert answer.status == 422, answer.body
    assert part in answer.json["detail"]


def test_what_automatic1111_has_and_changes_nothing_here_is_taken(api: Api) -> None:
    """Further fields of its request (1.10, modules/processing.py), each at its default; and others' own."""
    names = """denoising_strength disable_extra_networks do_not_save_grid do_not_save_samples
    firstphase_height
    firstphase_width firstpass_image force_task_id hr_checkpoint_name hr_negative_prompt
    hr_prompt hr_resize_x hr_resize_y hr_sampler_name hr_scale hr_scheduler hr_second_pass_steps
    hr_upscaler infotext refiner_checkpoint refiner_switch_at restore_faces s_churn s_min_uncond
    s_noise s_tmax s_tmin save_images script_args script_name seed_resize_from_h
    seed_resize_from_w styles subseed subseed_strength tiling comments
    override_settings_restore_afterwards their_own_note"""
    answer = txt2img(api, **dict.fromkeys(names.split()))
    assert answer.status == 200, answer.body


@pytest.mark.parametrize("path", ["extra-single-image", "extra-batch-images", "interrogate", "png-info"])
def test_what_is_no_text_to_image_is_not_offered(api: Api, path: str) -> None:
    answer = api.call("POST", f"/sdapi/v1/{path}", {"init_images": []})
    assert (answer.status, answer.json["detail"]) == (501, f"{path} is not offered: txt2img and img2img are.")


def test_an_option_can_only_be_set_to_what_it_is(api: Api) -> None:
    assert api.call("POST", "/sdapi/v1/options", {"CLIP_stop_at_last_layers": 1}).status == 200
    answer = api.call("POST", "/sdapi/v1/options", {"CLIP_stop_at_last_layers": 2})
    assert (answer.status, answer.json["error"]) == (422, "UnprocessableEntity")
    assert api.call("POST", "/sdapi/v1/options", {"sd_model_checkpoint": "nothing"}).status == 422


@pytest.mark.parametrize("given", [{"clip_skip": 2}, {"override_settings": {"CLIP_stop_at_last_layers": 2}}])
def test_layers_of_clip_are_skipped_where_a_request_says_so(api: Api, given: dict[str, Any]) -> None:
    answer = txt2img(api, **given)
    assert answer.status == 200, answer.body
    info = json.loads(answer.json["info"])
    assert info["clip_skip"] == 2
    assert "Clip skip: 2" in info["infotexts"][0]


def test_values_may_be_texts_as_its_api_takes_them(api: Api) -> None:
    info = json.loads(txt2img(api, steps="4", seed="9", cfg_scale="2.5", width="64").json["info"])
    assert (info["steps"], info["seed"], info["cfg_scale"], info["width"]) == (4, 9, 2.5, 64)


def test_without_pictures_only_the_info_is_answered(api: Api) -> None:
    answer = txt2img(api, send_images=False).json
    assert answer["images"] == []
    assert len(json.loads(answer["info"])["all_seeds"]) == 1


@pytest.fixture
def slow() -> Iterator[Api]:
    """A server of its own, beside a worker that takes half a second a picture."""
    with Stack(workers=0, http=True) as stack:
        worker = fast_worker(stack, seconds=0.5)
        try:
            assert stack.http is not None
            yield Api(stack, stack.http.url, stack.http.key)
        finally:
            worker.kill()
            worker.wait()


def test_an_interrupted_request_gets_what_is_done(slow: Api) -> None:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(txt2img(slow, prompt="slow", n_iter=40)))
    thread.start()
    while (state := slow.call("GET", "/sdapi/v1/progress").json["state"])["job_no"] == 0:
        time.sleep(0.02)
    assert state["job_count"] == 40
    assert slow.call("POST", "/sdapi/v1/interrupt", {}).status == 200
    thread.join(30)
    assert found[0].status == 200
    assert 0 < len(found[0].json["images"]) < 40
    assert slow.call("GET", "/sdapi/v1/progress").json["state"]["job_count"] == 0


def test_loras_are_listed_and_named_in_prompts(api: Api, client: webuiapi.WebUIApi) -> None:
    index = FileIndex.of(
        [
            FileEntry(kind=Kind.LORA, name="cats", sha256="ab" * 32, architecture="SD 1.x", size=7),
            FileEntry(kind=Kind.LORA, name="broken", problem="It is broken"),
            FileEntry(kind=Kind.VAE, name="vae", sha256="cd" * 32),
        ]
    )
    with connect(api.stack.valkey.url, 2) as redis:
        fleet = Fleet(redis, 60)
        fleet.indexes.put(index)
        [worker] = fleet.workers()
        fleet.announce(worker.model_copy(update={"files": index.digest}))
        try:
            assert client.get_loras() == [
                {"name": "cats", "alias": "cats", "path": "cats.safetensors", "metadata": {}}
            ]
            assert api.call("GET", "/v1/loras").json == {
                "loras": [
                    {
                        "name": "cats",
                        "sha256": "ab" * 32,
                        "auto_v2": "ABABABABAB",
                        "architecture": "SD 1.x",
                        "size": 7,
                        "models": ["fast"],
                    }
                ]
            }
            # The server looks at the fleet every second.
            until_s = time.monotonic() + 30
            while (refused := txt2img(api, prompt="a cat <lora:cat:0.5>")).status == 422:
                if "did you mean cats?" in refused.json["errors"]:
                    break
                assert time.monotonic() < until_s
            for loras in ("cats=0.5", {"cats": 0.5}, [{"name": "ABABABABAB", "weight": 0.5}]):
                sent = api.call("POST", "/v1/jobs", {"prompt": "a cat", "loras": loras, "seed": 1}).json
                job = api.call("GET", f"/v1/jobs/{sent['id']}").json["job"]
                assert job["loras"] == [{"name": "cats", "weight": 0.5}]
                assert job["file_hashes"] == {"lora:cats": "ab" * 32}
                api.call("DELETE", f"/v1/jobs/{sent['id']}")
        finally:
            announce(api.stack.valkey.url)


# img2img


@pytest.fixture
def bucket(api: Api, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    for name, value in api.stack.variables.items():
        monkeypatch.setenv(name, value)
    return Bucket(api.stack.variables["S3_BUCKET"])


def stored(bucket: Bucket, reference: str) -> Image.Image:
    image = Image.open(io.BytesIO(bucket.read_input(reference.split(":")[1]) or b""))
    image.load()
    return image


def photo() -> Image.Image:
    image = Image.new("RGB", (80, 64), "navy")
    image.paste("white", (40, 0, 80, 64))
    return image


def mask() -> Image.Image:
    made = Image.new("RGB", (80, 64))
    made.paste("white", (0, 0, 40, 64))
    return made


def base64_of(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def test_webuiapi_draws_from_an_image(client: webuiapi.WebUIApi, bucket: Bucket) -> None:
    result = client.img2img(
        images=[photo()], prompt="a cat", seed=7, steps=4, width=64, height=64, batch_size=2
    )
    assert [image.getpixel((0, 0))[0] for image in result.images] == [7, 8]
    assert result.info["denoising_strength"] == 0.75
    job = read(result.info["infotexts"][0])
    assert (job.strength, job.width, job.mask) == (0.75, 64, "")
    assert stored(bucket, job.image).tobytes() == photo().tobytes()


def test_webuiapi_draws_a_part(client: webuiapi.WebUIApi, bucket: Bucket) -> None:
    result = client.img2img(
        images=[photo()],
        mask_image=mask(),
        prompt="a cat",
        seed=7,
        steps=4,
        width=64,
        height=64,
        denoising_strength=0.6,
        mask_blur=2,
        inpainting_fill=1,
        inpaint_full_res=True,
        inpaint_full_res_padding=16,
        inpainting_mask_invert=1,
    )
    job = read(result.info["infotexts"][0])
    assert (job.strength, job.mask_blur, job.padding) == (0.6, 2, 16)
    assert (result.image.size, result.info["width"]) == (photo().size, 64)
    kept = (0, 0, 40, 64)  # The mask was inverted.
    assert result.image.convert("RGB").crop(kept).tobytes() == photo().crop(kept).tobytes()
    assert result.image.getpixel((60, 30))[0] == 7
    drawn = stored(bucket, job.mask)
    assert (drawn.mode, drawn.getpixel((0, 0)), drawn.getpixel((79, 0))) == ("L", 0, 255)


def test_what_is_masked_is_filled_by_the_colours_around_unless_it_is_said_otherwise(
    api: Api, bucket: Bucket
) -> None:
    """As modules/masking.py `fill` of AUTOMATIC1111 1.10 does: what is not masked stays as it is."""
    body = {"init_images": [base64_of(photo())], "mask": base64_of(mask()), "inpaint_full_res": False}
    answer = api.call("POST", "/sdapi/v1/img2img", {"prompt": "a cat", "seed": 3, "steps": 4, **body})
    assert answer.status == 200, answer.body
    job = read(json.loads(answer.json["info"])["infotexts"][0])
    image = stored(bucket, job.image)
    assert image.crop((40, 0, 80, 64)).tobytes() == photo().crop((40, 0, 80, 64)).tobytes()
    assert image.getpixel((5, 30)) == (255, 255, 255), "the white beside it, and not the blue that was there"
    assert (job.padding, job.mask_blur, job.width) == (None, 4, 80)
    assert answer.json["parameters"]["init_images"] is None


def test_a_mask_with_an_alpha_channel_draws_what_is_opaque(api: Api, bucket: Bucket) -> None:
    """As modules/processing.py `create_binary_mask` of AUTOMATIC1111 1.10."""
    drawn = Image.new("RGBA", (80, 64))
    drawn.paste((0, 0, 0, 200), (0, 0, 40, 64))
    body = {"init_images": [f"data:image/png;base64,{base64_of(photo())}"], "mask": base64_of(drawn)}
    answer = api.call("POST", "/sdapi/v1/img2img", {"prompt": "a cat", "seed": 4, "steps": 4, **body})
    job = read(json.loads(answer.json["info"])["infotexts"][0])
    found = stored(bucket, job.mask)
    assert (found.getpixel((0, 0)), found.getpixel((79, 0)), job.padding) == (255, 0, 0)


def test_only_the_masked_part_is_drawn_unless_it_is_said_otherwise(api: Api) -> None:
    """As StableDiffusionProcessingImg2Img of AUTOMATIC1111 1.10: inpaint_full_res is true, its padding 0."""
    body = {"init_images": [base64_of(photo())], "mask": base64_of(mask()), "inpainting_fill": 1}
    answer = api.call("POST", "/sdapi/v1/img2img", {"prompt": "a cat", "seed": 9, "steps": 4, **body})
    assert answer.status == 200, answer.body
    text = json.loads(answer.json["info"])["infotexts"][0]
    assert "Masked area padding: 0, " in text
    assert "Inpaint area: Only masked" in text
    job = read(text)
    assert (job.padding, job.width, job.height) == (0, 64, 64), "the model's own size"
    picture = Image.open(io.BytesIO(base64.b64decode(answer.json["images"][0])))
    assert picture.size == photo().size
    kept = (40, 0, 80, 64)
    assert picture.convert("RGB").crop(kept).tobytes() == photo().crop(kept).tobytes()
    assert picture.getpixel((5, 30))[0] == 9


def test_switches_are_read_also_as_words_as_automatic1111_does(api: Api) -> None:
    """A mask is not inverted, nor its part drawn alone, because `"false"` is a text with letters."""
    path, masked = "/sdapi/v1/img2img", {"init_images": [base64_of(photo())], "mask": base64_of(mask())}
    names = ("inpainting_mask_invert", "inpaint_full_res", "mask_round")
    jobs = []
    for word in (False, 0, "false", "No", "0", True, 1, "true", "on", "1"):
        body = {"prompt": "a cat", "seed": 3, "steps": 4, **masked, **dict.fromkeys(names, word)}
        answer = api.call("POST", path, body)
        assert answer.status == 200, answer.body
        jobs.append(read(json.loads(answer.json["info"])["infotexts"][0]))
    assert [each.padding for each in jobs] == [None] * 5 + [0] * 5
    assert len({each.mask for each in jobs[:5]}) == len({each.mask for each in jobs[5:]}) == 1
    assert jobs[0].mask != jobs[5].mask
    for name in names:
        answer = api.call("POST", path, {"prompt": "a cat", **masked, name: "perhaps"})
        assert (answer.status, answer.json["detail"]) == (
            422,
            f"{name} is 'perhaps': it must be true or false.",
        )
    text = {"prompt": "a cat", "seed": 3, "steps": 4, "enable_hr": "false", "send_images": "false"}
    answer = api.call("POST", "/sdapi/v1/txt2img", text)
    assert (answer.status, answer.json["images"]) == (200, [])
    assert read(json.loads(answer.json["info"])["infotexts"][0]).upscale == 1


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ({"init_images": [""]}, "image is empty: give a PNG, JPEG or WebP."),
        ({"init_images": []}, "init_images is 0 pictures: send a list of one picture in base64."),
        ({"init_images": ["?"]}, "init_images is '?', which is no base64: encode the file so."),
        ({"init_images": ["R0lGODlh"]}, "image is a GIF: give a PNG, JPEG or WebP."),
        ({"resize_mode": 1}, "resize_mode is 1, and cropping and filling are not offered: set it to 0"),
        ({"latent_mask": "x"}, "latent_mask is 'x', and it is not offered: send a mask."),
        ({"mask": base64_of(mask()), "inpainting_fill": 2}, "inpainting_fill is 2, which is not offered"),
        ({"mask": base64_of(mask()), "mask_blur_x": 3}, "mask_blur_x and mask_blur_y are [3, 4]"),
        ({"denoising_strength": 2}, "strength is 2: it must be above 0 and up to 1."),
        ({"denoising_strenght": 0.5}, "There is no 'denoising_strenght' in"),
        ({"script_name": "loopback"}, "scripts are not offered"),
    ],
)
def test_what_img2img_does_not_offer_is_refused_by_name(api: Api, given: Any, part: str) -> None:
    body = {"prompt": "a cat", "steps": 4, "init_images": [base64_of(photo())], **given}
    answer = api.call("POST", "/sdapi/v1/img2img", body)
    assert answer.status == 422
    assert part in answer.json["detail"]
