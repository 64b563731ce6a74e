"""The page of `smallcat serve` in a real Chromium, beside a fake worker: one server, one browser."""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

import pytest

from producer.http.key_store import KeyStore
from tests.browser.chromium import Chromium
from tests.fast_worker import SERVED
from tests.producer.http.conftest import NOBODYS, Api, api
from worker.contract.job import JOB_FIELDS
from worker.state.chains import Chains
from worker.state.previews import Preview, Previews
from worker.state.records import Records
from worker.state.redis_client import connect

__all__ = ["api"]

HOSTILE = "<script>window.pwned = 1</script> <img src=x onerror='window.pwned = 1'> \u202egnp.exe &amp;"


@pytest.fixture
def page(api: Api, browser: Chromium) -> Chromium:
    """The page, signed in with the key that may do everything, with its workers and its form."""
    open_page(browser, api)
    if browser.run("document.getElementById('all').hidden"):
        sign_in(browser, api.key)
    browser.wait("document.querySelector('#workers .worker')")
    # The form comes with an answer of its own, and its lists of names with the workers' news after it.
    browser.wait("document.getElementById('vae-names')")
    return browser


@pytest.fixture
def stranger(browser: Chromium) -> Iterator[Chromium]:
    """A browser that nobody has signed in with."""
    browser.send("Network.clearBrowserCookies")
    yield browser
    browser.send("Network.clearBrowserCookies")


def open_page(browser: Chromium, api: Api, hash_: str = "") -> None:
    browser.open("about:blank")
    browser.open(f"{api.url}/{hash_}")
    browser.wait("!document.getElementById('sign-in').hidden || !document.getElementById('all').hidden")


def sign_in(browser: Chromium, key: str) -> None:
    browser.run("document.getElementById('key').focus()")
    browser.type(key)
    browser.key("Enter")
    browser.wait("!document.getElementById('all').hidden")
    browser.wait("!document.getElementById('workers-section').querySelector('#workers:empty')")


def text(browser: Chromium, selector: str) -> str:
    quoted = json.dumps(selector)
    return str(browser.run(f"document.querySelector({quoted})?.textContent ?? ''"))


def fill(browser: Chromium, **fields: str) -> None:
    for name, value in fields.items():
        browser.run(
            f"document.getElementById('more').open = true; document.getElementById('field-{name}').focus()"
        )
        browser.run(f"document.getElementById('field-{name}').select?.()")
        browser.type(value)


def press(browser: Chromium, selector: str) -> None:
    """Press a button, wherever news have moved it meanwhile."""
    browser.run(f"document.querySelector({json.dumps(selector)}).click()")


def drawn(api: Api, prompt: str, **fields: Any) -> Any:
    return api.wait(api.call("POST", "/v1/jobs", {"prompt": prompt, **fields}).json)


# Signing in


def test_the_key_becomes_a_cookie_that_no_script_can_read(stranger: Chromium, api: Api) -> None:
    open_page(stranger, api)
    assert stranger.run("document.getElementById('all').hidden")
    stranger.run("document.getElementById('key').focus()")
    stranger.type("smallcat-wrong")
    stranger.key("Enter")
    assert "There is no such key" in stranger.wait("document.getElementById('sign-in-error').textContent")
    sign_in(stranger, api.key)
    [cookie] = stranger.send("Network.getCookies", urls=[api.url])["cookies"]
    assert (cookie["httpOnly"], cookie["sameSite"], cookie["path"]) == (True, "Strict", "/")
    assert api.key not in cookie["value"]
    assert stranger.run("document.cookie") == ""
    assert api.key not in str(
        stranger.run("document.documentElement.outerHTML + JSON.stringify(localStorage)")
    )
    headers = {"Cookie": f"{cookie['name']}={cookie['value']}"}
    assert api.call("GET", "/v1/jobs", key="", headers=headers).status == 200
    press(stranger, "#sign-out")
    stranger.wait("!document.getElementById('sign-in').hidden")
    assert stranger.send("Network.getCookies", urls=[api.url])["cookies"] == []
    assert api.call("GET", "/v1/jobs", key="", headers=headers).status == 401


def test_a_session_alone_changes_nothing_without_its_proof(api: Api) -> None:
    """A page of another site can make a browser send the cookie at most, where it is not SameSite."""
    answer = api.call("POST", "/page/session", {"key": api.key}, key="")
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie
    headers = {"Cookie": cookie.partition(";")[0]}
    job = {"prompt": "a", "model": NOBODYS}
    refused = api.call("POST", "/v1/jobs", job, key="", headers=headers)
    assert (refused.status, "x-csrf-token" in refused.json["detail"]) == (403, True)
    with_proof = {**headers, "X-CSRF-Token": answer.json["proof"]}
    for path, method, status in (
        ("/v1/jobs", "POST", 202),
        ("/v1/images/generations", "POST", 404),
        ("/sdapi/v1/options", "POST", 400),
    ):
        body = {**job, "n": 1} if "jobs" not in path else job
        assert api.call(method, path, body, key="", headers=headers).status == 403, path
        assert api.call(method, path, body, key="", headers=with_proof).status in (status, 422), path
    assert api.call("DELETE", "/page/session", key="", headers=headers).status == 403
    assert api.call("DELETE", "/page/session", key="", headers=with_proof).status == 200
    found = api.call("GET", "/v1/jobs", key="", headers=headers)
    # Without Basic, at which a browser would ask for a password.
    assert (found.status, found.headers["www-authenticate"]) == (401, 'Bearer realm="smallcat"')


@pytest.mark.slow
def test_a_session_ends_with_its_key(api: Api) -> None:
    key = api.new_key("page-visitor")
    cookie = api.call("POST", "/page/session", {"key": key}, key="").headers["set-cookie"]
    headers = {"Cookie": cookie.partition(";")[0]}
    assert api.call("GET", "/page/session", key="", headers=headers).json["name"] == "page-visitor"
    with connect(api.stack.valkey.url, 2) as client:
        KeyStore(client).revoke("page-visitor")
    deadline_s = time.monotonic() + 8
    while api.call("GET", "/page/session", key="", headers=headers).json["name"]:
        assert time.monotonic() < deadline_s
        time.sleep(0.1)


# The form


def test_the_form_has_every_field_of_a_job(page: Chromium, api: Api) -> None:
    """Of those that a caller may say: the OpenAPI document has them from the table of job fields."""
    names = page.run("[...document.querySelectorAll('#draw [name]')].map((each) => each.name)")
    document = api.call("GET", "/openapi.json", key="").json
    # The server fills in the hashes of files.
    assert sorted([*names, "file_hashes"]) == sorted(document["components"]["schemas"]["Job"]["properties"])
    assert len(names) >= len(JOB_FIELDS) - 2
    assert page.run("document.getElementById('field-steps').max") == "150"
    choices = page.run("[...document.getElementById('field-scheduler').options].map((each) => each.text)")
    assert sorted(choices) == sorted(JOB_FIELDS["scheduler"].choices)
    page.wait("document.getElementById('field-width').placeholder === '64'")  # The model's own.
    assert page.errors == []


def test_a_picture_is_drawn_shown_and_copied(page: Chromium, api: Api) -> None:
    page.send("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
    page.key("n")
    fill(page, prompt=HOSTILE, seed="9007199254740993", steps="7", metadata='{"order": "17"}')
    press(page, "#draw-button")
    page.wait("document.querySelector('#pictures .tile img')?.naturalWidth")
    assert text(page, "#pictures .caption") == HOSTILE
    press(page, "#pictures .tile")
    page.wait("viewer.open".replace("viewer", "document.getElementById('viewer')"))
    assert text(page, "#viewer-prompt") == HOSTILE
    page.wait("document.getElementById('viewer-list').textContent.includes('order17')")
    page.click("#copy")
    page.wait("document.getElementById('copy').textContent !== 'Copy parameters'")
    copied = page.run("navigator.clipboard.readText()")
    assert HOSTILE in copied
    assert "Seed: 9007199254740993" in copied  # More than a number of JavaScript holds.
    press(page, "#viewer .actions button:nth-of-type(2)")  # Use again.
    page.wait("document.getElementById('field-seed').value === '9007199254740993'")
    assert page.run("document.getElementById('field-prompt').value") == HOSTILE
    assert page.run("window.pwned") is None
    assert page.errors == []
    assert {url.partition("/page")[0].partition("/v1")[0] for url in page.requests} - {"about:blank"} <= {
        api.url,
        f"{api.url}/",
        f"{api.url}/openapi.json",
    }


def test_a_wrong_value_is_named_where_it_is(page: Chromium) -> None:
    fill(page, prompt="a cat", guidance_start="1.5")
    page.key("Enter")
    page.wait("document.getElementById('draw-error').textContent")
    assert page.run("document.activeElement.id") == "field-guidance_start"
    assert page.run("document.activeElement.getAttribute('aria-invalid')") == "true"
    page.run("document.getElementById('field-guidance_start').value = ''")
    fill(page, steps="40", model="no such\u0001model")
    page.key("Enter")
    said = page.wait("(t => t.includes('model') && t)(document.getElementById('draw-error').textContent)")
    assert said.startswith("model ")  # The server's own sentence.
    press(page, "#clear")
    assert page.run("document.getElementById('field-prompt').value") == ""


# What goes on


def test_what_waits_runs_and_fails_is_shown_and_can_be_cancelled(page: Chromium, api: Api) -> None:
    job = api.call("POST", "/v1/jobs", {"prompt": "waits for ever", "model": NOBODYS}).json
    api.call("POST", "/v1/jobs", {"prompt": "fail, please"})
    row = f'#now [data-job="{job["id"]}"]'
    page.wait(f"document.querySelector({json.dumps(row)})")
    assert "waits since" in text(page, row)
    assert "no worker that takes them is running" in page.wait(
        "document.getElementById('now-note').textContent"
    )
    page.wait("document.querySelector('#failed .why')")
    assert "It was asked to fail." in text(page, "#failed .why")
    with connect(api.stack.valkey.url, 2) as client:
        records = Records(client, 1_000)
        made = records.get(job["id"]).job
        records.claim(made, "m1", worker="w1", lease_s=30, max_attempts=3, queue="q")
        records.progress({job["id"]: (7, 20)}, 30)
        page.wait(f"document.querySelector({json.dumps(row)}).textContent.includes('step 7 of 20')")
        assert page.run("document.querySelector('#now progress').value") == 7
        Previews(client).put(job["id"], Preview(7, 20, webp()))
    press(page, "#previews")
    page.wait("document.querySelector('#now .preview img')?.naturalWidth === 8")
    press(page, f"{row} ~ .cancel")
    page.wait(
        f"!document.querySelector({json.dumps(row)}) || document.querySelector('#now .cancel').disabled"
    )
    assert page.errors == []


def webp() -> bytes:
    import io

    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (8, 8), "teal").save(file, "WEBP")
    return file.getvalue()


def test_workers_are_listed_with_what_they_do(page: Chromium) -> None:
    said = text(page, "#workers .worker")
    assert SERVED.name in said
    assert "row a step" in said
    assert "1 worker" in page.wait("document.getElementById('summary').textContent")


def test_a_run_has_its_gallery_and_its_pictures_are_among_the_latest(page: Chromium, api: Api) -> None:
    headers = {"Content-Type": "application/octet-stream"}
    run = api.call("POST", "/v1/runs?name=cats.txt", raw=b"a cat of a run\n", headers=headers).json
    page.wait(
        "[...document.querySelectorAll('.caption')].some((each) => each.textContent === 'a cat of a run')"
    )
    while api.call("GET", run["links"]["self"]).json["state"] != "finished":
        time.sleep(0.05)
    page.run("document.dispatchEvent(new Event('visibilitychange'))")
    page.wait("[...document.querySelectorAll('#runs a')].some((each) => each.textContent === 'Gallery')")
    assert "cats.txt" in text(page, "#runs")
    page.open(api.url + run["links"]["gallery"])
    page.wait("document.querySelector('.tile img')?.naturalWidth")
    assert text(page, "h1") == "cats.txt"
    assert page.errors == []


@pytest.mark.parametrize(
    ("lines", "sentence"), [(1, "1 waits for another job's picture"), (2, "2 wait for other jobs' pictures")]
)
def test_a_run_says_how_many_of_its_jobs_wait_for_other_jobs_pictures(
    page: Chromium, api: Api, lines: int, sentence: str
) -> None:
    asked = {"prompt": "a first one", "seed": lines, "width": 64, "height": 64, "steps": 2, "model": NOBODYS}
    first = api.call("POST", "/v1/jobs", asked).json
    line = json.dumps({"prompt": "a second one", "image": first["id"], "steps": 2, "model": NOBODYS})
    headers = {"Content-Type": "application/octet-stream"}
    data = f"{line}\n".encode() * lines
    run = api.call("POST", f"/v1/runs?name={lines}-chained.jsonl", raw=data, headers=headers).json
    found = "[...document.querySelectorAll('#runs .run')].map((each) => each.textContent)"
    of_run = f"{found}.find((each) => each.includes('{lines}-chained'))"
    while api.call("GET", run["links"]["self"]).json["waiting"] < lines:
        time.sleep(0.05)
    page.run("document.dispatchEvent(new Event('visibilitychange'))")
    page.wait(f"{of_run}?.includes({json.dumps(sentence)})")
    api.call("DELETE", first["links"]["self"])
    with connect(api.stack.valkey.url, 2) as client:
        Chains(client).look(lambda job_id, tenant: False)  # As each worker does every few seconds.
    page.wait(f"((said) => said.includes('{lines} failed') && !said.includes('wait'))({of_run})", 30)
    assert page.errors == []


def test_who_may_only_read_is_offered_no_more(stranger: Chromium, api: Api) -> None:
    open_page(stranger, api)
    api.call("POST", "/v1/jobs", {"prompt": "somebody else's", "model": NOBODYS})
    sign_in(stranger, api.new_key("reader", "read"))
    stranger.wait("document.querySelector('#now .job')")
    assert stranger.run("document.getElementById('draw').hidden")
    assert stranger.run("document.querySelectorAll('.cancel').length") == 0


def test_an_address_with_a_job_opens_it(page: Chromium, api: Api) -> None:
    job = drawn(api, "linked to")
    open_page(page, api, f"#{job['id']}")
    page.wait("document.getElementById('viewer').open")
    assert text(page, "#viewer-prompt") == "linked to"


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_redis_that_is_away_and_comes_back_is_said_in_a_sentence(page: Chromium, api: Api) -> None:
    api.stack.valkey.kill()
    try:
        said = page.wait("document.getElementById('notice').textContent", 30)
        assert "is out of reach" in said
        assert api.stack.valkey.password not in said
    finally:
        api.stack.valkey.start()
    page.wait("document.getElementById('notice').hidden", 30)


# How it is shown


def test_nothing_is_inline_and_no_other_host_may_be_asked(page: Chromium, api: Api) -> None:
    with urllib.request.urlopen(api.url) as answer:  # noqa: S310
        policy, html = answer.headers["content-security-policy"], answer.read().decode()
    assert "unsafe" not in policy
    assert "default-src 'none'" in policy
    assert "style=" not in html
    assert "onclick" not in html
    for attempt in (
        "document.body.innerHTML = '<b>x</b>'",
        "document.body.append(Object.assign(document.createElement('script'), {text: 'window.pwned = 1'}))",
        "new Function('return 1')()",
    ):
        with pytest.raises(RuntimeError, match=r"Trusted|unsafe-eval"):
            page.run(attempt)
    assert page.run("fetch('http://127.0.0.1:9/').then(() => 1, () => 0)") == 0


def test_the_keyboard_moves_opens_and_closes(page: Chromium, api: Api) -> None:
    for number in range(3):
        drawn(api, f"picture {number}", seed=number + 1_000)
    page.wait("document.querySelectorAll('#pictures .tile').length >= 3")
    page.wait("document.querySelector('#pictures .caption').textContent === 'picture 2'")
    page.run("document.querySelector('#pictures .tile').focus()")
    page.key("ArrowRight")
    assert text(page, ":focus .caption") == "picture 1"
    page.key("Enter")
    page.wait("document.getElementById('viewer').open")
    page.key("ArrowRight")
    assert text(page, "#viewer-prompt") == "picture 0"
    page.key("Escape")
    page.wait("document.activeElement.querySelector('.caption')?.textContent === 'picture 0'")
    page.key("n")
    assert page.run("document.activeElement.id") == "field-prompt"


def test_nothing_is_wider_than_the_window(page: Chromium, api: Api) -> None:
    drawn(api, "x" * 400, seed=1)
    page.wait("[...document.querySelectorAll('.caption')].some((each) => each.textContent.length === 400)")
    for width in (320, 390, 1024, 1920):
        page.resize(width, 800, mobile=width < 500)
        for is_open in ("false", "true"):
            page.run(f"document.getElementById('more').open = {is_open}")
            assert page.run("document.documentElement.scrollWidth <= innerWidth"), width


def axe(browser: Chromium) -> list[str]:
    """What axe-core 4.4 finds, as sentences."""
    script = files("axe_core_python").joinpath("axe.min.js").read_text(encoding="utf-8")
    browser.run(f"window.axe ? 0 : (() => {{ {script}\n }})()")
    found = browser.run("axe.run().then((found) => found.violations)")
    return [f"{each['id']}: {each['help']}: {[node['html'] for node in each['nodes']]}" for each in found]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(stranger: Chromium, api: Api, scheme: str) -> None:
    # Without movement: what fades in has little contrast for a moment.
    features = {"prefers-color-scheme": scheme, "prefers-reduced-motion": "reduce"}
    stranger.send(
        "Emulation.setEmulatedMedia", features=[{"name": n, "value": v} for n, v in features.items()]
    )
    open_page(stranger, api)
    assert axe(stranger) == []
    api.call("POST", "/v1/jobs", {"prompt": "waits", "model": NOBODYS})
    drawn(api, "a cat for axe", seed=1)
    sign_in(stranger, api.key)
    stranger.wait("document.querySelector('#pictures .tile img')?.naturalWidth")
    stranger.run("document.getElementById('more').open = true")
    assert axe(stranger) == []
    press(stranger, "#pictures .tile")
    stranger.wait("document.getElementById('viewer').open")
    assert axe(stranger) == []
