"""Pictures of other tools as jobs: the files are made here, as these programs write them."""

from __future__ import annotations

import contextlib
import io
import json
import struct
import time
import warnings
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from worker.contract.errors import InvalidJobError
from worker.contract.job import Job
from worker.contract.metadata.image_texts import MAX_TEXT
from worker.contract.metadata.job_from_image import job_from_image


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


HEAD = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0))
PIXELS, END = chunk(b"IDAT", zlib.compress(b"\0\0")), chunk(b"IEND", b"")


def text_chunk(name: str, text: str, kind: str = "tEXt") -> bytes:
    key = name.encode()
    match kind:
        case "tEXt":
            return chunk(b"tEXt", key + b"\0" + text.encode("latin-1"))
        case "zTXt":
            return chunk(b"zTXt", key + b"\0\0" + zlib.compress(text.encode("latin-1")))
        case "iTXt":
            return chunk(b"iTXt", key + b"\0\0\0en\0name\0" + text.encode())
    return chunk(b"iTXt", key + b"\0\1\0\0\0" + zlib.compress(text.encode()))


def png(texts: dict[str, str], kind: str = "iTXt") -> bytes:
    return HEAD + b"".join(text_chunk(*each, kind) for each in texts.items()) + PIXELS + END


def tiff(order: str, first: dict[int, bytes], second: dict[int, bytes], kind: int = 7) -> bytes:
    """An Exif block without its mark: IFD0 and, where `second` is given, Exif's own."""

    def directory(at: int, entries: dict[int, bytes], pointer: bool) -> bytes:
        count = len(entries) + pointer
        data_at = at + 2 + 12 * count + 4
        rows, data = b"", b""
        for tag, value in entries.items():
            rows += struct.pack(f"{order}HHII", tag, kind, len(value), data_at + len(data))
            data += value
        if pointer:
            rows += struct.pack(f"{order}HHII", 0x8769, 4, 1, data_at + len(data))
        return struct.pack(f"{order}H", count) + rows + b"\0" * 4 + data

    mark = b"MM" if order == ">" else b"II"
    head = mark + struct.pack(f"{order}HI", 42, 8)
    block = head + directory(8, first, bool(second))
    return block + directory(len(block), second, False) if second else block


def jpeg(exif: bytes = b"", xmp: str = "") -> bytes:
    segments = [b"Exif\0\0" + exif] if exif else []
    if xmp:
        segments.append(b"http://ns.adobe.com/xap/1.0/\0" + xmp.encode())
    app1 = b"".join(b"\xff\xe1" + struct.pack(">H", len(each) + 2) + each for each in segments)
    return b"\xff\xd8" + app1 + b"\xff\xda\0\0\xff\xd9"


def webp(exif: bytes) -> bytes:
    body = b"WEBPVP8X" + struct.pack("<I", 10) + b"\0" * 10
    body += b"EXIF" + struct.pack("<I", len(exif)) + exif + b"\0" * (len(exif) % 2)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def read(data: bytes) -> Job:
    """The job, where nothing is left out."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return job_from_image(data)


#: One job, and what each tool writes for it.
JOB = {
    "prompt": "a cat, étude",
    "negative_prompt": "blurry",
    "seed": 5,
    "steps": 20,
    "guidance_scale": 7.5,
    "width": 512,
    "height": 768,
    "scheduler": "dpmpp_2m_karras",
}
PAIRS = "Steps: 20, Sampler: DPM++ 2M Karras, CFG scale: 7.5, Seed: 5, Size: 512x768"
A1111 = f"a cat, étude\nNegative prompt: blurry\n{PAIRS}"
NEW_PAIRS = PAIRS.replace("DPM++ 2M Karras", "DPM++ 2M, Schedule type: Karras")
FORGE = (
    f"a cat, étude\nNegative prompt: blurry\n{NEW_PAIRS}, Model hash: 1, Model: m, "
    "Emphasis: Original, Version: f2.0.1v1.10.1"
)
CIVITAI = (
    f"a cat, étude\nNegative prompt: blurry\n{PAIRS}, Clip skip: 1, Created Date: 2025-01-01T10:11:12Z, "
    'Civitai resources: [{"type":"checkpoint","modelVersionId":290640,"modelName":"A, B: C"}], '
    "Civitai metadata: {}"
)
SWARM = json.dumps(
    {
        "sui_image_params": {
            "prompt": "a cat, étude",
            "negativeprompt": "blurry",
            "model": "sd_xl_base_1.0",
            "seed": 5,
            "steps": 20,
            "cfgscale": 7.5,
            "aspectratio": "Custom",
            "width": 512,
            "height": 768,
            "sampler": "dpmpp_2m",
            "scheduler": "karras",
            "swarm_version": "0.9.5.0",
        },
        "sui_extra_data": {"date": "2025-01-25", "generation_time": "4.84 sec"},
        "sui_models": [{"name": "sd_xl_base_1.0.safetensors", "param": "model", "hash": "0xd7"}],
    }
)
FOOOCUS = json.dumps(
    {
        "base_model": "juggernaut",
        "base_model_hash": "aa",
        "guidance_scale": 7.5,
        "lora_combined_1": "None : 1.0",
        "metadata_scheme": "fooocus",
        "negative_prompt": "blurry",
        "performance": "Speed",
        "prompt": "a cat, étude",
        "refiner_model": "None",
        "resolution": "(512, 768)",
        "sampler": "dpmpp_2m",
        "scheduler": "karras",
        "seed": "5",
        "steps": 20,
        "styles": "[]",
        "vae": "Default (model)",
        "version": "Fooocus v2.5.5",
    }
)
FOOOCUS_A1111 = (
    f"a cat, étude\nNegative prompt: blurry\n{PAIRS}, Model: m, Model hash: aa, Performance: Speed, "
    'Scheduler: karras, Raw prompt: "a cat, étude", Raw negative prompt: blurry, Version: Fooocus v2.5.5'
)
INVOKE = json.dumps(
    {
        "generation_mode": "sdxl_txt2img",
        "positive_prompt": "a cat, étude",
        "negative_prompt": "blurry",
        "width": 512,
        "height": 768,
        "seed": 5,
        "rand_device": "cpu",
        "cfg_scale": 7.5,
        "cfg_rescale_multiplier": 0,
        "steps": 20,
        "scheduler": "dpmpp_2m_k",
        "model": {"key": "k", "name": "m", "base": "sdxl"},
        "loras": [],
        "positive_style_prompt": "",
        "negative_style_prompt": "",
        "app_version": "5.4.2",
    }
)
OLD_INVOKE = json.dumps(
    {
        "model": "stable diffusion",
        "model_weights": "stable-diffusion-1.5",
        "app_id": "invoke-ai/InvokeAI",
        "app_version": "2.3.5",
        "image": {
            "prompt": [{"prompt": "a cat, étude [blurry]", "weight": 1.0}],
            "steps": 20,
            "cfg_scale": 7.5,
            "threshold": 0,
            "perlin": 0,
            "height": 768,
            "width": 512,
            "seed": 5,
            "seamless": False,
            "hires_fix": False,
            "type": "txt2img",
            "postprocessing": None,
            "sampler": "dpmpp_2m_k",
            "variations": [],
        },
    }
)
DREAM = '"a cat, étude [blurry]" -s 20 -S 5 -W 512 -H 768 -C 7.5 -A dpmpp_2m_k'


OLD_DREAM = "a cat, étude [blurry] -s20 -S5 -W512 -H768 -C7.5 -Adpmpp_2m_k"


def graph(**changes: dict[str, Any]) -> dict[str, Any]:
    """ComfyUI's first example, as its API takes it; `changes` are merged into the inputs by node."""
    nodes: dict[str, Any] = {
        "3": {
            "class_type": "KSampler",
            "inputs": {
                "seed": 5,
                "steps": 20,
                "cfg": 7.5,
                "sampler_name": "dpmpp_2m",
                "scheduler": "karras",
                "denoise": 1,
                "model": ["4", 0],
                "positive": ["6", 0],
                "negative": ["7", 0],
                "latent_image": ["5", 0],
            },
        },
        "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "m.safetensors"}},
        "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 512, "height": 768, "batch_size": 1}},
        "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "a cat, étude", "clip": ["4", 1]}},
        "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "blurry", "clip": ["4", 1]}},
        "8": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["4", 2]}},
        "9": {"class_type": "SaveImage", "inputs": {"filename_prefix": "ComfyUI", "images": ["8", 0]}},
    }
    for name, change in changes.items():
        node = nodes.setdefault(name.lstrip("n"), {"class_type": "", "inputs": {}})
        node["class_type"] = change.pop("class_type", node["class_type"])
        node["inputs"] |= change
    return nodes


COMFY = json.dumps(graph())
#: The same job by links to nodes of values, and by SDXL's and the advanced nodes.
LINKED = json.dumps(
    graph(
        n3={
            "class_type": "KSamplerAdvanced",
            "noise_seed": ["20", 0],
            "steps": ["21", 0],
            "add_noise": "enable",
            "start_at_step": 0,
            "end_at_step": 10000,
            "return_with_leftover_noise": "disable",
        },
        n20={"class_type": "Seed (rgthree)", "seed": 5},
        n21={"class_type": "PrimitiveInt", "value": 20, "control_after_generate": "fixed"},
        n6={
            "class_type": "CLIPTextEncodeSDXL",
            "width": 1024,
            "text_g": ["22", 0],
            "text_l": "a cat, étude",
        },
        n22={"class_type": "PrimitiveString", "value": "a cat, étude"},
        n5={"width": ["23", 0]},
        n23={"class_type": "INTConstant", "value": 512},
    )
)

PICTURES = {
    "A1111": {"parameters": A1111},
    "Forge": {"parameters": FORGE},
    "Civitai": {"parameters": CIVITAI},
    "Fooocus": {"parameters": FOOOCUS, "fooocus_scheme": "fooocus"},
    "Fooocus' a1111 scheme": {"parameters": FOOOCUS_A1111, "fooocus_scheme": "a1111"},
    "SwarmUI": {"parameters": SWARM},
    "InvokeAI": {"invokeai_metadata": INVOKE},
    "InvokeAI 2": {"sd-metadata": OLD_INVOKE, "Dream": DREAM},
    "InvokeAI 1": {"Dream": DREAM},
    "lstein's first": {"Dream": OLD_DREAM},
    "ComfyUI": {"prompt": COMFY, "workflow": json.dumps({"nodes": [], "version": 0.4})},
    "ComfyUI with links": {"prompt": LINKED},
    "ComfyUI with parameters": {"prompt": "{}", "parameters": A1111},
}


def matches(job: Job, expected: dict[str, Any] | None = None) -> bool:
    expected = JOB if expected is None else expected
    assert {name: getattr(job, name) for name in expected} == expected
    # What is another machine's means nothing here.
    assert (job.model, job.revision, job.metadata) == ("default", "", {})
    return True


@pytest.mark.parametrize("kind", ["tEXt", "zTXt", "iTXt", "packed iTXt"])
@pytest.mark.parametrize("tool", PICTURES)
def test_a_picture_of_each_tool_is_the_job_that_it_says(tool: str, kind: str) -> None:
    assert matches(read(png(PICTURES[tool], kind)))


TEXTS = {"A1111": A1111, "Civitai": CIVITAI, "SwarmUI": SWARM, "Fooocus": FOOOCUS, "ComfyUI": COMFY}


@pytest.mark.parametrize("tool", TEXTS)
@pytest.mark.parametrize("file_order", [">", "<"])
@pytest.mark.parametrize(
    ("mark", "encoding"),
    [
        (b"UNICODE\0", "utf-16-be"),
        (b"UNICODE\0", "utf-16-le"),
        (b"UNICODE\0", "utf-16"),
        (b"UNICODE\0", "utf-8"),
        (b"ASCII\0\0\0", "utf-8"),
        (b"\0" * 8, "utf-8"),
        (b"", "utf-8"),
    ],
)
def test_a_user_comment_is_read_in_either_order_of_bytes_and_in_utf8(
    tool: str, file_order: str, mark: bytes, encoding: str
) -> None:
    block = tiff(file_order, {}, {0x9286: mark + TEXTS[tool].encode(encoding)})
    assert matches(read(jpeg(block)))
    assert matches(read(webp(block)))
    assert matches(read(webp(b"Exif\0\0" + block)))
    assert matches(read(HEAD + chunk(b"eXIf", block) + PIXELS + END))


def test_a_user_comment_in_jis_is_read() -> None:
    text = A1111.replace("étude", "猫")
    block = tiff(">", {}, {0x9286: b"JIS\0\0\0\0\0" + text.encode("iso2022_jp")})
    assert matches(read(jpeg(block)), JOB | {"prompt": "a cat, 猫"})


@pytest.mark.parametrize("tag", [0x010E, 0x010F, 0x0110, 0x9286])
@pytest.mark.parametrize("tool", TEXTS)
def test_the_first_directory_is_read(tool: str, tag: int) -> None:
    """SwarmUI's first versions, ComfyUI's WebP ("prompt:{...}") and Fooocus' JPEG have it there."""
    text = f"prompt:{COMFY}" if tool == "ComfyUI" else TEXTS[tool]
    assert matches(read(jpeg(tiff("<", {tag: text.encode() + b"\0"}, {}, kind=2))))


def test_a_text_of_windows_is_read() -> None:
    assert matches(read(jpeg(tiff("<", {0x9C9C: A1111.encode("utf-16-le") + b"\0\0"}, {}, kind=1))))


@pytest.mark.parametrize(
    "element",
    [
        "<dc:description><rdf:Alt><rdf:li xml:lang='x-default'>{}</rdf:li></rdf:Alt></dc:description>",
        "<exif:UserComment>{}</exif:UserComment>",
    ],
)
def test_xmp_is_read(element: str) -> None:
    inner = element.format(A1111.replace("&", "&amp;").replace("<", "&lt;"))
    packet = (
        "<?xpacket begin='\ufeff' id='W5M0MpCehiHzreSzNTczkc9d'?><x:xmpmeta xmlns:x='adobe:ns:meta/'>"
        "<rdf:RDF xmlns:rdf='http://www.w3.org/1999/02/22-rdf-syntax-ns#'><rdf:Description "
        "xmlns:dc='http://purl.org/dc/elements/1.1/' xmlns:exif='http://ns.adobe.com/exif/1.0/'>"
        f"{inner}</rdf:Description></rdf:RDF></x:xmpmeta><?xpacket end='w'?>"
    )
    assert matches(read(jpeg(xmp=packet)))
    assert matches(read(png({"XML:com.adobe.xmp": packet})))


def test_texts_behind_the_pixels_and_utf8_in_a_latin_chunk_are_read() -> None:
    latin = A1111.encode().decode("latin-1")  # What a writer of UTF-8 into tEXt leaves behind.
    assert matches(read(HEAD + PIXELS + text_chunk("parameters", latin, "tEXt") + END))


#: As versions before this reader wrote it. The prompt is kept to the letter, and its weights are just words.
OURS = (
    "a (small:1.3) cat \r\n\nBREAK, Seed: 4 \nNegative prompt:  x\n"
    "Steps: 20, Sampler: DPM++ 2M Karras, CFG scale: 7.5, Guidance start: 0.0, Guidance stop: 1.0, Seed: 5, "
    'Size: 512x768, Model: "a, b: c", Model hash: abc, Format: png, Version: smallcat'
)


@pytest.mark.parametrize("first", ["\ufeff", "\ufffe", "\u4e00" * 1_000])
def test_a_user_comment_of_ours_is_read_to_the_letter(first: str) -> None:
    text = first + OURS
    job = read(jpeg(tiff(">", {}, {0x9286: b"UNICODE\0" + text.encode("utf-16-be")})))
    assert job.prompt.startswith(first + "a (small")


@pytest.mark.parametrize("after", ["", "\n", "\r\n\0", " "])
def test_a_picture_of_ours_is_read_to_the_letter(after: str) -> None:
    job = read(png({"parameters": OURS + after}))
    assert (job.prompt, job.negative_prompt) == ("a (small:1.3) cat \r\n\nBREAK, Seed: 4 ", " x")
    assert (job.model, job.revision, job.seed, job.width) == ("a, b: c", "abc", 5, 512)


VALUE = f'{PAIRS}, Wildcard prompt: "a\n{{red|blue}} cat: Seed: 9", Version: v1.5'


@pytest.mark.parametrize(
    "text",
    [
        A1111 + "\n",
        A1111 + "\r\n \n\0",
        A1111.replace("\n", "\r\n"),
        A1111.replace("\n", "\r"),
        "\n" + A1111,
        A1111 + "\nTemplate: {a|b} cat, Seed: 9\nNegative Template: blurry, Steps: 3",
        f"a cat, étude\nNegative prompt: blurry\n{VALUE}",
        f"a cat, étude\nNegative prompt: blurry\n{VALUE}\nTemplate: x",
        f"a cat, étude \nNegative prompt: blurry \n{PAIRS} ,",
        A1111.replace("\n", " "),
        A1111.replace("\n", "  "),
        f"a cat, étude\nNegative prompt: blurry {PAIRS}",
        f"a cat, étude Negative prompt: blurry\n{PAIRS}",
        f"a cat, étude\nNegative prompt: blurry\nSteps: 20.0, Seed: 5.0, {PAIRS}",
    ],
)
def test_an_infotext_is_read_as_it_looks_after_its_travels(text: str) -> None:
    assert matches(read(png({"parameters": text})))


@pytest.mark.parametrize(
    ("texts", "names"),
    [
        (
            {"parameters": f'a cat\n{PAIRS}, Hires upscale: 2, Clip skip: 2, VAE: None, Lora hashes: "a: b"'},
            ["Hires upscale: 2", "Lora hashes: a: b"],
        ),
        ({"parameters": f"a cat\n{PAIRS}, Refiner: xl [1], Refiner switch at: 0.8"}, ["Refiner: xl"]),
        ({"parameters": f'a cat\n{PAIRS}, ControlNet 0: "Module: canny, Weight: 1"'}, ["ControlNet 0"]),
        ({"parameters": f"a (small:1.3) cat <hypernet:x:1>\n{PAIRS}"}, ["<hypernet:x:1>"]),
        # A weight that no job has, and a name that is there twice: the other tool's own way to add them up.
        ({"parameters": f"a (small:1.3) cat <lora:x:5>\n{PAIRS}"}, ["<lora:x:5>"]),
        ({"parameters": f"a (small:1.3) cat <lora:x:1> <lora:x:1>\n{PAIRS}"}, ["<lora:x:1>"]),
        ({"Dream": DREAM.replace("cat", "cat BREAK", 1)}, ["BREAK"]),
        ({"parameters": CIVITAI.replace('"checkpoint"', '"lora"')}, ["Civitai resources: lora"]),
        ({"parameters": SWARM.replace('"aspectratio"', '"variationseed"')}, ["variationseed: Custom"]),
        ({"parameters": FOOOCUS.replace('"[]"', "\"['Fooocus V2']\"")}, ["styles: ['Fooocus V2']"]),
        ({"invokeai_metadata": INVOKE.replace('"loras": []', '"loras": [{"weight": 1}]')}, ["loras: list"]),
        (
            {
                "prompt": json.dumps(
                    graph(
                        n3={"model": ["10", 0]},
                        n10={"class_type": "LoraLoader", "lora_name": "x", "model": ["4", 0]},
                    )
                )
            },
            ["LoraLoader"],
        ),
        ({"prompt": json.dumps(graph(n5={"batch_size": 4}))}, ["batch_size: 4"]),
        ({"Dream": DREAM + " -G 0.8 -U 2 0.75 --hires_fix"}, ["-G: 0.8", "-U: 2", "--hires_fix: yes"]),
        (
            {
                "prompt": json.dumps(
                    graph(
                        n9={"images": ["10", 0]},
                        n10={"class_type": "ImageUpscaleWithModel", "image": ["8", 0]},
                    )
                )
            },
            ["ImageUpscaleWithModel"],
        ),
    ],
)
def test_what_a_job_cannot_say_is_named(texts: dict[str, str], names: list[str]) -> None:
    with pytest.warns(UserWarning, match="a job cannot say") as warned:
        job = job_from_image(png(texts))
    assert (job.seed, job.steps) == (5, 20)
    assert all(name in str(warned[0].message) for name in names)
    assert warned[0].filename == __file__


def test_the_loras_of_a_prompt_are_those_of_the_job_by_name_and_by_hash() -> None:
    """AUTOMATIC1111 1.10.1: extensions-builtin/Lora/scripts/lora_script.py, `infotext_pasted`."""
    hashes = 'Lora hashes: "x: 7c6bad76eb54, y: 0123456789ab"'
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        job = job_from_image(
            png({"parameters": f"a cat <lora:x:0.8>, <lora:z> <lyco:y:1:0.5>\n{PAIRS}, {hashes}"})
        )
    assert job.prompt == "a cat ,"
    assert [each.model_dump() for each in job.loras] == [
        {"name": "x@7c6bad76eb54", "weight": 0.8},
        {"name": "y@0123456789ab", "weight": 0.5, "text_encoder_weight": 1.0},
        {"name": "z", "weight": 1.0},
    ]
    # Other tools write the hashes for Civitai alone.
    hashes_for_civitai = 'Hashes: {"LORA:x": "7c6bad76eb", "lora:y": "0123456789", "model": "1111111111"}'
    text = f'a cat <lora:x> <lora:y>\n{PAIRS}, {hashes_for_civitai}, Lora hashes: "y: 0123456789ab"'
    assert [each.name for each in job_from_image(png({"parameters": text})).loras] == [
        "x@7c6bad76eb",
        "y@0123456789ab",
    ]
    for broken in ("[", '{"lora:x": 5}', "5", '{"lora:x": "?"}'):
        text = f"a cat <lora:x>\n{PAIRS}, Hashes: {broken}"
        assert [each.name for each in job_from_image(png({"parameters": text})).loras] == ["x"]
    # That of a network which the prompt has not is named.
    with pytest.warns(UserWarning, match="Lora hashes: x: 7c6bad76eb54, y"):
        assert len(job_from_image(png({"parameters": f"a cat <lora:x:1>\n{PAIRS}, {hashes}"})).loras) == 1


@pytest.mark.parametrize(
    ("texts", "sentence"),
    [
        ({"parameters": A1111.replace("Karras", "SDE Turbo")}, "scheduler is 'DPM++ 2M SDE Turbo'"),
        ({"parameters": FORGE.replace("type: Karras", "type: Turbo")}, "with the schedule 'Turbo'"),
        ({"parameters": SWARM.replace('"karras"', '"kl_optimal"')}, "with the schedule 'kl_optimal'"),
        ({"parameters": FOOOCUS.replace('"dpmpp_2m"', '"heunpp2"')}, "scheduler is 'heunpp2'"),
        ({"parameters": SWARM.replace('"seed": 5', '"seed": "x"')}, "seed: 'x', which is no number"),
        ({"parameters": FOOOCUS.replace("(512, 768)", "wide")}, "resolution: 'wide'"),
        ({"parameters": f"a cat\nSteps: 20, {PAIRS}\nb\nNegative prompt: c"}, "parameters where the prompt"),
        ({"parameters": "a cat Steps: 20 Sampler: Euler a Seed: 5"}, "parameters where the prompt"),
        ({"parameters": "a cat\nSteps: 20, Schedule type: Karras, Seed: 5"}, "'Karras', which is a schedule"),
        ({"parameters": "a cat"}, "holds no infotext"),
        ({"parameters": '{"some": "thing"}'}, "holds no infotext"),
        ({"parameters": '{"prompt": 3, "resolution": "(1, 2)"}'}, "prompt: 3, which is no text"),
        ({"parameters": "{" * 100_000}, "holds no infotext"),
        ({"parameters": '{"a":' * 100_000}, "holds no infotext"),
        ({"Comment": '{"prompt": "a cat", "uc": "b", "scale": 5.0}', "Software": "NovelAI"}, "no infotext"),
        ({"workflow": '{"nodes": []}'}, "holds no infotext"),
        ({"invokeai_metadata": INVOKE.replace("sdxl_txt2img", "img2img")}, "which is no text to image"),
        ({"sd-metadata": OLD_INVOKE.replace('"txt2img"', '"img2img"')}, "began with another one"),
        ({"sd-metadata": OLD_INVOKE.replace("[{", '[{"prompt": "b", "weight": 1}, {')}, "2 prompts"),
        ({"Dream": DREAM + " -I a.png"}, "began with another one"),
        ({"prompt": json.dumps(graph(n3={"denoise": 0.5}))}, "denoise 0.5: a job begins with noise"),
        ({"prompt": json.dumps(graph(n5={"class_type": "VAEEncode"}))}, "begins with 'VAEEncode'"),
        (
            {"prompt": json.dumps(graph(n6={"class_type": "MyEncode"}))},
            "positive condition is made by 'MyEncode'",
        ),
        ({"prompt": json.dumps(graph(n6={"text": ["6", 0]}))}, "takes its text from 'CLIPTextEncode'"),
        ({"prompt": json.dumps(graph(n6={"text": ["30", 0]}))}, "whose value is not in the graph"),
        (
            {
                "prompt": json.dumps(
                    graph(
                        n6={"text": ["30", 0]},
                        n30={"class_type": "Concat", "text": "a", "prefix": "b"},
                    )
                )
            },
            "takes its text from 'Concat'",
        ),
        (
            {
                "prompt": json.dumps(
                    graph(n6={"class_type": "CLIPTextEncodeSDXL", "text_g": "a", "text_l": "b"})
                )
            },
            "two texts, text_g and text_l",
        ),
        (
            {
                "prompt": json.dumps(
                    graph(
                        n8={"samples": ["10", 0]},
                        n10={"class_type": "KSampler", "latent_image": ["3", 0]},
                    )
                )
            },
            "2 samplers (KSampler 3, KSampler 10): a job is one pass",
        ),
        (
            {
                "prompt": json.dumps(
                    graph(
                        n3={
                            "class_type": "KSamplerAdvanced",
                            "noise_seed": 5,
                            "start_at_step": 0,
                            "end_at_step": 15,
                        }
                    )
                )
            },
            "the steps 0 to 15 of 20",
        ),
        (
            {"prompt": json.dumps(graph(n3={"class_type": "SamplerCustomAdvanced"}))},
            "'SamplerCustomAdvanced'",
        ),
        ({"prompt": json.dumps(graph(n3={"class_type": "Other"}))}, "no KSampler"),
        ({"XML:com.adobe.xmp": "<!DOCTYPE x [<!ENTITY a 'b'>]><x>&a;</x>"}, "XMP declares entities"),
    ],
)
def test_what_cannot_be_read_is_refused_with_the_reason(texts: dict[str, str], sentence: str) -> None:
    with pytest.raises(InvalidJobError) as error:
        job_from_image(png(texts))
    assert sentence in str(error.value)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("tool", PICTURES)
def test_the_order_of_pairs_in_a_picture_never_matters_to_other_texts(tool: str) -> None:
    """A description of another kind beside it is no obstacle."""
    assert matches(read(png({"Description": "holiday", "Comment": "{}"} | PICTURES[tool])))


#: What would take long, or much memory, if a reader went over it again and again, or unpacked it.
HOSTILE = {
    "a long name": "a" * MAX_TEXT,
    "many names": "Steps: 20, " + "a:" * (MAX_TEXT // 2 - 10),
    "commas": "x\nSteps: 20, Seed: 1" + "," * (MAX_TEXT - 30),
    "open quotes": "x\nSteps: 20, Seed: 1, " + 'a: "' * (MAX_TEXT // 4 - 10),
    "escapes": "x\nSteps: 20, Seed: 1, " + 'a: "\\' * (MAX_TEXT // 5 - 10),
    "open lists": "x\nSteps: 20, Seed: 1, " + "a: [" * (MAX_TEXT // 4 - 10),
    "lists of numbers": "x\nSteps: 20, Seed: 1, a: [" + "0," * (MAX_TEXT // 2 - 20),
    "lines of steps": "Steps: 20, Seed: 1\n" * (MAX_TEXT // 20),
    "blank lines": "x" + "\n" * (MAX_TEXT - 100) + "Steps: 20, Seed: 1",
    "blanks": "x" + " " * (MAX_TEXT - 100) + "\nSteps: 20, Seed: 1",
    "steps": "x " + "Steps: 2 " * (MAX_TEXT // 9 - 10),
    "negatives": "Negative prompt: " * (MAX_TEXT // 17 - 10) + "\nSteps: 20, Seed: 1",
    "braces": "{" + '"a":{' * (MAX_TEXT // 5 - 10),
    "numbers": '{"sui_image_params": {"seed": ' + "9" * (MAX_TEXT - 100) + "}}",
    "brackets": '{"image": {"prompt": "' + "[" * (MAX_TEXT - 100) + '"}}',
    "parentheses": "(" * (MAX_TEXT - 100) + "\nSteps: 20, Seed: 1",
    "dream": '"' + "\\" * 19_000,
    "dream without quotes": "a -s" * 4_000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_small_file_takes_no_long_time(name: str) -> None:
    """166 bytes of PNG took ten seconds once. Each of these unpacks to 4 MiB, the limit."""
    keys = ("Dream",) if name.startswith("dream") else ("parameters",)
    started = time.process_time()
    for key in keys:
        with contextlib.suppress(InvalidJobError), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            job_from_image(png({key: HOSTILE[name]}, "zTXt"))
    assert time.process_time() - started < 5


@pytest.mark.parametrize("kind", ["zTXt", "packed iTXt"])
def test_what_is_packed_is_not_unpacked_past_the_limit(kind: str) -> None:
    bomb = text_chunk("parameters", "a" * (12 * MAX_TEXT), kind)
    started = time.process_time()
    with pytest.raises(InvalidJobError, match="unpacks to more than 4,194,304 bytes, the limit"):
        job_from_image(HEAD + bomb + PIXELS + END)
    # Other names are not unpacked at all, and what is read has a limit for all of it together.
    large = "a" * (12 * MAX_TEXT)
    other = text_chunk("other", large, kind) + text_chunk("workflow", large, kind)
    assert matches(read(HEAD + other * 200 + text_chunk("parameters", A1111, kind) + PIXELS + END))
    with pytest.raises(InvalidJobError, match="the limit"):
        job_from_image(HEAD + text_chunk("Comment", "a" * MAX_TEXT, kind) * 500 + PIXELS + END)
    assert time.process_time() - started < 5


def test_graphs_without_end_are_refused_soon() -> None:
    loop = graph(n6={"text": ["30", 0]}, n30={"class_type": "A", "text": ["31", 0]})
    loop["31"] = {"class_type": "B", "inputs": {"text": ["30", 0]}}
    many = {str(n): {"class_type": "KSampler", "inputs": {"latent_image": [str(n), 0]}} for n in range(4_000)}
    reroutes = graph(n3={"latent_image": ["40", 0]}, n40={"class_type": "Reroute", "": ["40", 0]})
    started = time.process_time()
    for each in (loop, many, reroutes, {str(n): {"class_type": "", "inputs": {}} for n in range(6_000)}):
        with pytest.raises(InvalidJobError):
            job_from_image(png({"prompt": json.dumps(each)}))
    assert time.process_time() - started < 5


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no picture",
        b"\x89PNG\r\n\x1a\n",
        b"\xff\xd8\xff\xe1\x00",
        b"\xff\xd8\xff\xe1\0\0",
        b"RIFF\0\0\0\0WEBP",
        HEAD,
        HEAD + b"\xff\xff\xff\xfftEXtparameters\0a",
        jpeg(b"MM\0*\0\0\0\x08\xff\xff" + b"\x92\x86\0\7\xff\xff\xff\xff\0\0\0\0" * 5_000),
    ],
)
def test_what_is_broken_is_refused(data: bytes) -> None:
    with pytest.raises(InvalidJobError):
        job_from_image(data)


WHOLE = [png(PICTURES[tool], "iTXt") for tool in PICTURES]
WHOLE += [jpeg(tiff(order, {0x10F: b"x"}, {0x9286: b"UNICODE\0" + A1111.encode("utf-16")})) for order in "<>"]
WHOLE += [webp(tiff("<", {0x110: SWARM.encode()}, {}, kind=2))]


@settings(deadline=None, max_examples=300)
@given(
    data=st.sampled_from(WHOLE),
    edits=st.lists(st.tuples(st.integers(0, 4_000), st.binary(max_size=6), st.integers(0, 8)), max_size=8),
)
def test_a_damaged_picture_is_a_job_or_an_invalid_job(
    data: bytes, edits: list[tuple[int, bytes, int]]
) -> None:
    for at, new, dropped in edits:
        at %= len(data)
        data = data[:at] + new + data[at + dropped :]
    with contextlib.suppress(InvalidJobError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert isinstance(job_from_image(data), Job)


def values() -> st.SearchStrategy[Any]:
    names = st.sampled_from(
        [
            *JOB,
            "sui_image_params",
            "image",
            "positive_prompt",
            "inputs",
            "class_type",
            "sampler",
            "resolution",
        ]
    )
    leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | names
    return st.recursive(
        leaves,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=4),
        max_leaves=12,
    )


@settings(deadline=None, max_examples=300)
@given(value=values(), key=st.sampled_from(["parameters", "prompt", "invokeai_metadata", "sd-metadata"]))
def test_any_json_is_a_job_or_an_invalid_job(value: Any, key: str) -> None:
    with contextlib.suppress(InvalidJobError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        job_from_image(png({key: json.dumps(value)}))


@settings(deadline=None, max_examples=200)
@given(
    node=st.sampled_from(["3", "5", "6", "8"]),
    key=st.sampled_from(["seed", "cfg", "positive", "latent_image", "text", "width", "samples", "scheduler"]),
    value=values() | st.just(["3", 0]) | st.just(["8", 0]),
)
def test_any_graph_is_a_job_or_an_invalid_job(node: str, key: str, value: Any) -> None:
    with contextlib.suppress(InvalidJobError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        job_from_image(png({"prompt": json.dumps(graph(**{f"n{node}": {key: value}}))}))


def test_other_formats_are_read_as_pillow_reads_them() -> None:
    file = io.BytesIO()
    Image.new("P", (8, 8)).save(file, "GIF", comment=A1111.encode())
    assert matches(read(file.getvalue()))


def test_what_a_job_cannot_say_goes_with_it_in_its_metadata() -> None:
    """A warning is gone with the process that read the picture; metadata is in the record."""
    infotext = (
        "a cat <hypernet:x:1>\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, Size: 64x64, "
        "Tiling: True, Hires upscale: 2, Note: " + "y" * 9_000
    )
    with pytest.warns(UserWarning, match="Tiling: True"):
        job = job_from_image(png({"parameters": infotext}))
    left = job.metadata["left_out"]
    assert {"Tiling: True", "Hires upscale: 2", "<hypernet:x:1>"} <= set(left)
    assert Job.parse(job.model_dump()) == job
    plain = infotext.partition(" <hypernet")[0] + infotext[infotext.index("\n") : infotext.index(", Tiling")]
    assert job_from_image(png({"parameters": plain})).metadata == {}
    many = ", ".join(f"Key {number}: {'z' * 200}" for number in range(500))
    with pytest.warns(UserWarning, match="and 4"):
        assert len(job_from_image(png({"parameters": f"{plain}, {many}"})).metadata["left_out"]) == 30


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ("Denoising strength: 0.75", "Denoising strength"),
        ("Denoising strength: 0.75, Mask blur: 4", "Mask blur"),
        ("Denoising strength: 0.75, Inpaint area: Only masked, Masked area padding: 32", "Inpaint area"),
        ("Operations: img2img, Denoising strength: 0.3", "Operations"),
        ("Operations: txt2img; inpaint", "Operations"),
    ],
)
def test_a_picture_that_began_with_another_one_is_no_job(more: str, named: str) -> None:
    """AUTOMATIC1111 1.10 (processing.py, img2img and inpainting), SD.Next's operations."""
    text = f"a cat\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 5, Size: 512x512, {more}"
    with pytest.raises(InvalidJobError, match=f"{named}: .* began with another one"):
        job_from_image(png({"parameters": text}))


@pytest.mark.parametrize(
    "more", ["Denoising strength: 0.7, Hires upscale: 2", "Denoising strength: 0.7, First pass size: 0x0"]
)
def test_hires_fix_has_a_denoising_strength_too_and_is_named(more: str) -> None:
    text = f"a cat\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 5, Size: 512x512, {more}"
    with pytest.warns(UserWarning, match="Denoising strength"):
        assert job_from_image(png({"parameters": text})).steps == 20


def test_nodes_that_lead_to_the_sampler_are_named_whatever_node_saves_the_picture() -> None:
    """As with a custom node that saves, and a PreviewImage of something else."""
    graph = {
        "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "x"}},
        "2": {"class_type": "LoraLoader", "inputs": {"model": ["1", 0], "clip": ["1", 1]}},
        "3": {"class_type": "CLIPTextEncode", "inputs": {"text": "a cat", "clip": ["2", 1]}},
        "4": {"class_type": "EmptyLatentImage", "inputs": {"width": 512, "height": 512, "batch_size": 1}},
        "5": {
            "class_type": "KSampler",
            "inputs": {
                "seed": 5,
                "steps": 20,
                "cfg": 7,
                "sampler_name": "euler",
                "scheduler": "normal",
                "denoise": 1,
                "model": ["2", 0],
                "positive": ["3", 0],
                "negative": ["3", 0],
                "latent_image": ["4", 0],
            },
        },
        "6": {"class_type": "Image Save", "inputs": {"images": ["5", 0]}},
        "7": {"class_type": "PreviewImage", "inputs": {"images": ["8", 0]}},
        "8": {"class_type": "LoadImage", "inputs": {"image": "x.png"}},
    }
    with pytest.warns(UserWarning, match="LoraLoader"):
        assert job_from_image(png({"prompt": json.dumps(graph)})).seed == 5


@pytest.mark.parametrize("data", [b"hello", b"", b"GIF89a...."])
def test_what_is_no_picture_is_one_sentence_without_python_in_it(data: bytes) -> None:
    with pytest.raises(InvalidJobError, match=r"That is no picture that can be read") as error:
        job_from_image(data)
    assert "object at" not in str(error.value)


def test_prompts_of_who_writes_infotexts_are_in_his_syntax() -> None:
    job = job_from_image(png({"parameters": f"a (small:1.3) cat BREAK a dog\n{PAIRS}"}))
    assert (job.prompt_syntax, job.prompt) == ("a1111", "a (small:1.3) cat BREAK a dog")
    assert not job_from_image(png({"invokeai_metadata": INVOKE})).says_syntax


def test_a_picture_is_given_by_its_path_or_its_bytes(tmp_path: Path) -> None:
    data = png({"parameters": f"a cat\n{PAIRS}"})
    path = tmp_path / "cat.png"
    path.write_bytes(data)
    assert len({job_from_image(each).id for each in (path, str(path), data, bytearray(data))}) == 1


@pytest.mark.parametrize(
    ("image", "part"),
    [
        ("no-such.png", "image is 'no-such.png': there is no such file"),
        ("~nobody-here/a.png", "image is '~nobody-here/a.png': there is no such file"),
        ("/", "image is '/': that is a folder"),
        ("a\0b", "image is "),
        (None, "image is None: give a path, or the bytes of a file"),
        (Image.new("RGB", (8, 8)), "give a path, or the bytes of a file"),
    ],
)
def test_what_is_no_file_is_said_with_what_it_takes(image: Any, part: str) -> None:
    with pytest.raises(InvalidJobError) as error:
        job_from_image(image)
    assert part in str(error.value)
