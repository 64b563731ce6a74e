"""A real headless Chromium, controlled over its DevTools pipe: no driver program, no port, no package.

The protocol is JSON with a zero byte after each message, on file descriptors 3 and 4
(`--remote-debugging-pipe`; https://chromedevtools.github.io/devtools-protocol/).
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any, Self

#: The names under which systems install it.
PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)


def _moved(descriptor: int) -> int:
    """The same file at a descriptor of 10 or above."""
    higher = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 10)
    os.close(descriptor)
    return higher


def program() -> str | None:
    """The path of a Chromium or Chrome on this machine, or None."""
    return next((found for name in PROGRAMS if (found := shutil.which(name))), None)


class Chromium:
    """One browser with one page, 1280 by 800. Errors of the page are collected in `.errors`."""

    def __init__(self) -> None:
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        to_read, self._write = os.pipe()
        self._read, to_write = os.pipe()
        # Not 3 or 4, which the shell below sets one after the other.
        to_read, to_write = _moved(to_read), _moved(to_write)
        command = [str(program()), *_OPTIONS, f"--user-data-dir={self._profile.name}", "about:blank"]
        # The shell puts the pipes where Chromium looks for them.
        shell = f'exec "$@" 3<&{to_read} 4>&{to_write}'
        self._process = subprocess.Popen(
            ["bash", "-c", shell, "chromium", *command],
            pass_fds=(to_read, to_write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_read)
        os.close(to_write)
        self._buffer = b""
        self._count = 0
        self._session: str | None = None
        self._events: list[dict[str, Any]] = []
        #: Exceptions, console errors and refusals by the page's policy, as text.
        self.errors: list[str] = []
        #: Every address that the page asked for.
        self.requests: list[str] = []
        target = next(t for t in self.send("Target.getTargets")["targetInfos"] if t["type"] == "page")
        attached = self.send("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")
        self.resize(1280, 800)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._write)
        os.close(self._read)
        self._profile.cleanup()

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the protocol, and its answer. Raises `RuntimeError` where it is refused."""
        self._count += 1
        message: dict[str, Any] = {"id": self._count, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != self._count:
            self._note(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return dict(answer["result"])

    def open(self, address: str | Path) -> None:
        """Open a page and wait until it has loaded."""
        self._events.clear()
        self.errors.clear()
        self.requests.clear()
        where = address.resolve().as_uri() if isinstance(address, Path) else address
        self.send("Page.navigate", url=where)
        while not any(event["method"] == "Page.loadEventFired" for event in self._events):
            self._note(self._receive())

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression; a promise is waited for. Raises `RuntimeError`."""
        how = {"awaitPromise": True, "returnByValue": True, "allowUnsafeEvalBlockedByCSP": False}
        answer = self.send("Runtime.evaluate", expression=script, **how)
        if "exceptionDetails" in answer:
            raise RuntimeError(str(answer["exceptionDetails"].get("exception", {}).get("description")))
        return answer["result"].get("value")

    def wait(self, script: str, timeout_s: float = 20) -> Any:
        """The value of an expression once it is true; checked in every frame. Raises `RuntimeError`."""
        text = f"""new Promise((done, fail) => {{
            const end = performance.now() + {timeout_s * 1000};
            const check = () => {{
                const value = ({script});
                if (value) done(value);
                else if (performance.now() > end) fail(new Error("Never true: " + {json.dumps(script)}));
                else requestAnimationFrame(check);
            }};
            check();
        }})"""
        return self.run(text)

    def key(self, name: str) -> None:
        """Press a key: a character, or a name such as `ArrowLeft`."""
        codes = {"Enter": 13, "Escape": 27, "End": 35, "Home": 36}
        codes |= {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Tab": 9}
        text = {"Enter": "\r"}.get(name, name if len(name) == 1 else "")
        code = codes.get(name, ord(name.upper()) if len(name) == 1 else 0)
        shared = {"key": name, "windowsVirtualKeyCode": code}
        self.send("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", text=text, **shared)
        self.send("Input.dispatchKeyEvent", type="keyUp", **shared)

    def type(self, text: str) -> None:
        """Type into what has the focus."""
        self.send("Input.insertText", text=text)

    def click(self, selector: str) -> None:
        """Click in the middle of the first element of a CSS selector, with a real mouse event.

        What is out of sight is scrolled into it.
        """
        quoted = json.dumps(selector)
        x, y = self.run(f"""(() => {{
            const element = document.querySelector({quoted});
            element.scrollIntoView({{ block: "nearest", behavior: "instant" }});
            const box = element.getBoundingClientRect();
            return [box.x + box.width / 2, box.y + box.height / 2];
        }})()""")
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def resize(self, width: int, height: int, scale: float = 1, *, mobile: bool = False) -> None:
        """Give the window a size in CSS pixels."""
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=scale,
            mobile=mobile,
        )

    def prefer(self, scheme: str) -> None:
        """Prefer "light" or "dark"."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.send("Emulation.setEmulatedMedia", features=features)

    def screenshot(self, path: Path) -> None:
        """Save what the window shows as PNG."""
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot")["data"]))

    def _note(self, event: dict[str, Any]) -> None:
        parameters = event.get("params", {})
        match event.get("method"):
            case "Runtime.exceptionThrown":
                details = parameters["exceptionDetails"]
                self.errors.append(str(details.get("exception", {}).get("description", details["text"])))
            case "Log.entryAdded" if parameters["entry"]["level"] == "error":
                self.errors.append(str(parameters["entry"]["text"]))
            case "Network.requestWillBeSent":
                self.requests.append(str(parameters["request"]["url"]))
            case str():
                self._events.append(event)

    def _receive(self) -> dict[str, Any]:
        """The next message. Raises `TimeoutError` after 30 seconds, `RuntimeError` when the browser ended."""
        until = time.monotonic() + 30
        while b"\0" not in self._buffer:
            if not select.select([self._read], [], [], max(0.0, until - time.monotonic()))[0]:
                raise TimeoutError("Chromium does not answer.")
            if not (more := os.read(self._read, 1 << 20)):
                raise RuntimeError("Chromium ended.")
            self._buffer += more
        text, _, self._buffer = self._buffer.partition(b"\0")
        return dict(json.loads(text))
