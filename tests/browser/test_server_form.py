"""The form of the server's page: what it says of prompts, which choices it offers, and in which words."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from tests.browser.chromium import Chromium
from tests.browser.test_server_page import fill, open_page, page, press, stranger, text
from tests.fast_worker import SERVED, announce
from tests.producer.http.conftest import Api, api
from worker.contract.choices import PromptSyntax, Scheduler
from worker.contract.errors import InvalidJobError
from worker.contract.file_index import FileEntry, FileIndex, Kind
from worker.contract.job import Job
from worker.contract.prompt_syntax import warnings_of
from worker.state.fleet import Fleet
from worker.state.redis_client import connect

__all__ = ["api", "page", "stranger"]

#: Prompts with AUTOMATIC1111's syntax, and without it.
PROMPTS = (
    "a (green:1.4) frog",
    r"a \(green:1.4) frog",
    "<LoRA:cat:0.5> a cat",
    "[cat:dog:.5]",
    "a cat BREAK a dog AND (a bird: +2.)",
    "a cat, a dog and a BREAKfast at 10:30",
)


def test_what_is_drawn_as_words_is_said_in_the_sentence_of_the_record(page: Chromium) -> None:
    for field in ("prompt", "negative_prompt"):
        press(page, "#clear")
        for prompt in PROMPTS:
            fill(page, **{field: prompt})
            said = warnings_of(Job(**{"prompt": "x", "seed": 1, "guidance_scale": 7, field: prompt}))
            assert text(page, ".prompt-note span") == "".join(said), prompt
    press(page, "#clear")
    assert text(page, ".prompt-note span") == ""
    fill(page, prompt=PROMPTS[0])
    page.click(".prompt-note button")
    assert page.run("document.getElementById('field-prompt_syntax').value") == "a1111"
    fill(page, prompt=PROMPTS[0])
    assert text(page, ".prompt-note span") == ""
    press(page, "#clear")


def test_only_the_schedules_of_the_chosen_scheduler_are_offered(page: Chromium) -> None:
    everything = set(Job(prompt="x", seed=1).model_json_schema()["$defs"]["NoiseSchedule"]["enum"])
    for scheduler in Scheduler:
        value = "" if scheduler is Scheduler.DEFAULT else str(scheduler)
        choose(page, "scheduler", value)
        offered = page.run("[...document.getElementById('field-schedule').options].map((each) => each.text)")
        taken = {each for each in everything if is_taken(scheduler, each)}
        # A pair with a name of its own is offered under its scheduler.
        assert set(offered) <= taken, scheduler
        assert taken - set(offered) <= ({"karras"} if "karras" in scheduler else {"sgm_uniform"}), scheduler
    choose(page, "scheduler", "euler")
    choose(page, "schedule", "beta")
    choose(page, "scheduler", "heun")
    assert page.run("document.getElementById('field-schedule').value") == "beta"
    choose(page, "scheduler", "lcm")
    assert page.run("document.getElementById('field-schedule').value") == ""
    assert "lcm has its own schedule alone" in text(page, "#schedule-note")
    press(page, "#clear")
    assert "default has its own" in text(page, "#schedule-note")


def choose(page: Chromium, field: str, value: str) -> None:
    page.run(f"""(() => {{
        const element = document.getElementById("field-{field}");
        element.value = {json.dumps(value)};
        element.dispatchEvent(new Event("input", {{ bubbles: true }}));
    }})()""")


def is_taken(scheduler: str, schedule: str) -> bool:
    try:
        Job(prompt="x", seed=1, steps=10, scheduler=scheduler, schedule=schedule)
    except (InvalidJobError, ValueError):
        return False
    return True


def test_a_picture_that_was_sent_is_told_beside_the_button(page: Chromium) -> None:
    page.resize(390, 844, mobile=True)
    fill(page, prompt="a sent cat")
    page.run("document.getElementById('images').value = 2")
    assert page.run("document.getElementById('sent-link').hidden")
    press(page, "#draw-button")
    page.wait("document.getElementById('sent-text').textContent === '2 pictures sent.'")
    assert page.run("document.getElementById('sent-text').getAttribute('role')") == "status"
    page.click("#sent-link")
    page.wait(
        "Math.abs(document.getElementById('now-section').getBoundingClientRect().top) < innerHeight / 2"
    )
    press(page, "#clear")
    assert text(page, "#sent-text") == ""


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("guidance_start", "1.5", "guidance_start is 1.5: write a number from 0 to 1, or nothing."),
        ("steps", "4.5", "steps is 4.5: write a whole number from 1 to 150, or nothing."),
        ("width", "65", "width is 65: write a multiple of 8 from"),
    ],
)
def test_a_wrong_number_is_told_in_the_page_s_own_words(
    page: Chromium, field: str, value: str, said: str
) -> None:
    fill(page, prompt="a cat", **{field: value})
    press(page, "#draw-button")
    assert page.wait("document.getElementById('draw-error').textContent").startswith(said)
    press(page, "#clear")


def test_its_texts_are_for_a_page(page: Chromium) -> None:
    assert "`" not in page.run("document.body.innerText + document.getElementById('more').textContent")
    assert page.run("[...document.querySelectorAll('[title]')].every((each) => !each.title.includes('`'))")
    assert page.run("document.querySelectorAll('#more-fields small code').length > 3")
    assert text(page, ".is-vae").startswith("VAE")
    lefts = page.run("""[...document.querySelectorAll("#more-fields :is(input:not([type=checkbox]), select)")]
        .map((each) => Math.round(each.getBoundingClientRect().left))""")
    assert len(set(lefts)) == 1


def test_a_missing_key_is_told_by_the_server(stranger: Chromium, api: Api) -> None:
    open_page(stranger, api)
    assert "SMALLCAT_HTTP_KEY" in text(stranger, "#sign-in")
    stranger.run("document.getElementById('key').focus()")
    stranger.key("Enter")
    stranger.wait("document.querySelector('#sign-in-error code')")
    assert text(stranger, "#sign-in-error").startswith("The key is missing")


def test_a_prompt_file_becomes_a_run(page: Chromium, tmp_path: Path) -> None:
    press(page, "#run-form button")
    assert "No file is chosen" in page.wait("document.getElementById('run-said').textContent")
    file = tmp_path / "a few & cats.txt"
    file.write_text("a cat of a sent file\n")
    root = page.send("DOM.getDocument")["root"]["nodeId"]
    node = page.send("DOM.querySelector", nodeId=root, selector="#run-file")["nodeId"]
    page.send("DOM.setFileInputFiles", nodeId=node, files=[str(file)])
    press(page, "#run-form button")
    page.wait("document.querySelector('#runs .prompt')?.textContent === 'a few & cats.txt'")
    assert text(page, "#run-said") == ""
    assert page.errors == []


def test_files_are_offered_and_rates_at_rest_are_of_before(page: Chromium, api: Api) -> None:
    index = FileIndex.of(
        [
            FileEntry(kind=Kind.VAE, name="good", sha256="1" * 64),
            FileEntry(kind=Kind.VAE, name="broken", sha256="2" * 64, problem="It is broken."),
            FileEntry(kind=Kind.EMBEDDING, name="word", sha256="3" * 64),
            FileEntry(kind=Kind.LORA, name="detail", sha256="4" * 64),
            FileEntry(kind=Kind.LORA, name="pixel", sha256="5" * 64),
        ]
    )
    try:
        with connect(api.stack.valkey.url, 2) as client:
            fleet = Fleet(client, 60)
            fleet.indexes.put(index)
            [worker] = fleet.workers()
            news = {
                "files": index.digest,
                "images_s": 2.0,
                "step_rows": 1.5,
                "prompt_syntax": PromptSyntax.A1111,
            }
            fleet.announce(worker.model_copy(update=news))
        page.wait("document.getElementById('vae-names').options.length")
        assert page.run("[...document.getElementById('vae-names').options].map((each) => each.value)") == [
            "good"
        ]
        page.wait("document.getElementById('loras-names')?.options.length === 2")
        fill(page, loras="detail=0.5; pi")
        offered = "[...document.getElementById('loras-names').options].map((each) => each.value)"
        assert page.run(offered) == ["detail=0.5; pixel=1"]
        fill(page, prompt="a cat", loras="detial=0.5")
        # The server looks at the fleet every second: until then it knows of no such files.
        until_s = time.monotonic() + 30
        while 'loras has "detial", which no worker offers: did you mean detail?' not in text(
            page, "#draw-error"
        ):
            assert time.monotonic() < until_s
            press(page, "#draw-button")
            page.wait("document.getElementById('draw-error').textContent")
        fill(page, loras="detail=0.5")
        assert page.run("document.getElementById('model-names').options[0].value") == SERVED.name
        assert "lately 2 pictures a second" in text(page, "#summary")
        assert "lately 2 pictures a second" in text(page, ".worker .numbers-of")
        assert "rows a step has had" in page.run("document.querySelector('.worker .numbers-of').title")
        # Where the workers read weights, nothing is said of them.
        fill(page, prompt=PROMPTS[0])
        assert text(page, ".prompt-note span") == ""
    finally:
        announce(api.stack.valkey.url)
