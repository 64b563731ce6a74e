"""OpenAI's images API, with the official package (openai 3.57), beside a fake worker."""

from __future__ import annotations

import base64
import io
import urllib.request
from typing import Any

import openai
import pytest
from PIL import Image

from tests.producer.http.conftest import Api
from worker.storage.bucket import Bucket


@pytest.fixture
def client(api: Api) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{api.url}/v1", api_key=api.key, max_retries=0, timeout=30)


def picture(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def test_the_package_gets_a_picture(client: openai.OpenAI) -> None:
    answer = client.images.generate(
        prompt="a cat", n=2, size="64x64", response_format="b64_json", extra_body={"seed": 5, "steps": 3}
    )
    assert answer.data is not None
    shades = [picture(base64.b64decode(each.b64_json or "")).getpixel((0, 0)) for each in answer.data]
    assert shades == [(5, 5, 5), (6, 6, 6)]  # The seeds, one after the other.
    assert answer.data[0].url is None
    assert answer.size == "64x64"
    assert answer.created > 1_700_000_000


def test_by_url_it_gets_links(client: openai.OpenAI) -> None:
    answer = client.images.generate(prompt="a cat by link", response_format="url")
    assert answer.data is not None
    assert answer.data[0].b64_json is None
    with urllib.request.urlopen(answer.data[0].url or "") as body:  # noqa: S310
        assert picture(body.read()).size == (8, 8)


def test_without_a_form_it_gets_both(client: openai.OpenAI) -> None:
    """Older clients expect a link, newer ones the bytes, and neither says so."""
    answer = client.images.generate(prompt="a cat in both ways", quality="auto", user="me", model="fast")
    assert answer.data is not None
    assert answer.data[0].url
    assert answer.data[0].b64_json


def test_a_format_can_be_asked_for(client: openai.OpenAI) -> None:
    answer = client.images.generate(prompt="a cat", output_format="webp", response_format="b64_json")
    assert answer.data is not None
    assert picture(base64.b64decode(answer.data[0].b64_json or "")).format == "WEBP"
    assert answer.output_format == "webp"


def test_the_models_are_those_that_are_served(client: openai.OpenAI) -> None:
    assert [each.id for each in client.models.list()] == ["fast"]
    assert client.models.retrieve("fast").owned_by == "smallcat"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt-image-2")
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ({"size": "63x64"}, "width is 63"),
        ({"size": "big"}, "size is 'big': write it as 512x512"),
        ({"n": 11}, "n is 11: it must be 1 to 10."),
        ({"quality": "high"}, "quality is 'high', which is not offered: ask for steps instead."),
        ({"style": "vivid"}, "style is 'vivid', which is not offered: say it in the prompt."),
        ({"background": "transparent"}, "background is 'transparent', which is not offered"),
        ({"output_format": "gif"}, "output_format is 'gif': use one of png, webp, jpeg."),
        ({"response_format": "file"}, "response_format is 'file': use url or b64_json."),
        ({"stream": True}, "stream is true, which is not offered"),
        ({"extra_body": {"stpes": 3}}, 'There is no job field "stpes": did you mean "steps"?'),
        ({"prompt": ""}, "prompt is empty: say what to draw."),
        ({"extra_body": {"seed": "x"}}, "seed is 'x'"),
    ],
)
def test_what_cannot_be_done_is_refused_in_openais_form(
    client: openai.OpenAI, given: dict[str, Any], part: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(**({"prompt": "a cat"} | given))
    assert part in str(caught.value)
    assert caught.value.type == "invalid_request_error"


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"size": "big"}, "size"),
        ({"prompt": "a\0cat"}, "prompt"),
        ({"extra_body": {"stpes": 3}}, "stpes"),
        ({"extra_body": {"loras": {"pixel": 9}}}, "loras"),
        # A number with a fraction, which has lost digits.
        ({"extra_body": {"seed": 9007199254740993.0}}, "seed"),
    ],
)
def test_a_refusal_says_which_parameter_it_is_about(
    client: openai.OpenAI, given: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(**({"prompt": "a cat"} | given))
    assert caught.value.param == param


def test_a_model_that_nobody_serves_is_refused_at_once(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.images.generate(prompt="a cat", model="dall-e-3")
    assert caught.value.code == "model_not_found"
    assert "There is no model 'dall-e-3'" in str(caught.value)


def test_a_failed_job_is_an_error(client: openai.OpenAI) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        client.images.generate(prompt="fail please")
    assert "It was asked to fail." in str(caught.value)


def test_a_wrong_key_is_an_authentication_error(api: Api) -> None:
    with pytest.raises(openai.AuthenticationError) as caught:
        openai.OpenAI(base_url=f"{api.url}/v1", api_key="wrong", max_retries=0).images.generate(prompt="a")
    assert caught.value.code == "invalid_api_key"


def test_a_key_without_the_scope_is_a_permission_error(api: Api) -> None:
    client = openai.OpenAI(base_url=f"{api.url}/v1", api_key=api.new_key("looks", "read"), max_retries=0)
    assert [each.id for each in client.models.list()] == ["fast"]
    with pytest.raises(openai.PermissionDeniedError):
        client.images.generate(prompt="a")


# Edits


def cut_out() -> bytes:
    image = Image.new("RGBA", (80, 64), (200, 10, 10, 255))
    image.paste((0, 0, 0, 0), (0, 0, 40, 64))
    return png(image)


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def job_of(api: Api, answer: Any) -> Any:
    return api.call("GET", f"/v1/jobs/{answer.data[0].id}").json["job"]


def test_the_package_edits_where_the_mask_is_transparent(
    client: openai.OpenAI, api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in api.stack.variables.items():
        monkeypatch.setenv(name, value)
    photo = Image.new("RGB", (80, 64), "navy")
    answer = client.images.edit(
        image=("photo.png", png(photo)),
        mask=("mask.png", cut_out()),
        prompt="a cat",
        n=2,
        response_format="b64_json",
        extra_body={"seed": 5, "steps": 4, "strength": 0.5},
    )
    assert answer.data is not None
    assert len(answer.data) == 2
    job = job_of(api, answer)
    assert (job["width"], job["height"], job["strength"], job["seed"]) == (80, 64, 0.5, 5)
    bucket = Bucket(api.stack.variables["S3_BUCKET"])
    stored = picture(bucket.read_input(job["mask"].split(":")[1]) or b"")
    # OpenAI's reference: fully transparent areas of the mask are where the image is edited.
    assert (stored.mode, stored.getpixel((0, 0)), stored.getpixel((79, 0))) == ("L", 255, 0)


def test_without_a_mask_a_transparent_image_is_its_own(client: openai.OpenAI, api: Api) -> None:
    answer = client.images.edit(image=[("a.png", cut_out())], prompt="a cat", size="auto", quality="auto")
    assert job_of(api, answer)["mask"] == "alpha"
    opaque = client.images.edit(image=png(Image.new("RGB", (64, 64))), prompt="a cat", size="64x64")
    assert "mask" not in job_of(api, opaque)


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ({"image": [("a.png", b"x"), ("b.png", b"y")]}, "image is 2 pictures: a job begins with one."),
        ({"image": b"GIF89a"}, "image is a GIF: give a PNG, JPEG or WebP."),
        ({"mask": png(Image.new("L", (80, 64)))}, "mask has no transparent pixel, and OpenAI's masks"),
        ({"input_fidelity": "high"}, "input_fidelity is 'high', which is not offered"),
        ({"n": 11}, "n is 11: it must be 1 to 10."),
        ({"size": "63x64"}, "width is 63"),
        (
            {"extra_body": {"loras": {"pixel": 1}}},
            "The form has 'loras[pixel]', a part of loras: send loras as",
        ),
        ({"extra_body": {"loras": [{"name": "pixel"}]}}, "The form has 'loras[][name]', a part of loras"),
        ({"extra_body": {"metadata": {"order": 17}}}, "The form has 'metadata[order]', a part of metadata"),
    ],
)
def test_an_edit_that_is_not_offered_is_refused_by_name(client: openai.OpenAI, given: Any, part: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.edit(**{"image": cut_out(), "prompt": "a cat"} | given)
    assert part in str(caught.value)
