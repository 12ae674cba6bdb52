"""A real browser for tests: the system's Chromium, headless, driven over the DevTools protocol.

The protocol runs through two pipes (`--remote-debugging-pipe`: JSON objects, each ended by a zero byte), so that no
driver, no port and no package is needed.
"""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

SECONDS = 60  # to wait for an answer
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)

_FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-extensions", "--remote-debugging-pipe",
)  # fmt: skip


class Browser:
    """One page of a running browser, and all events that it has sent."""

    def __init__(self, commands: int, answers: int) -> None:
        self._commands, self._answers = commands, answers
        self._buffer = b""
        self._number = 0
        self._session: str | None = None
        self.events: list[dict[str, Any]] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network", "Audits"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command and return its result. Raises RuntimeError if the browser answers with an error."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]

    def open(self, page: Path, width: int, height: int, *, dark: bool = False, script: bool = True) -> None:
        """Load a page in a window of this size."""
        self.events.clear()
        phone = width < 600
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=2, mobile=phone,
        )  # fmt: skip
        self.send("Emulation.setTouchEmulationEnabled", enabled=phone)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self.send("Emulation.setScriptExecutionDisabled", value=not script)
        self.send("Page.navigate", url=page.resolve().as_uri())
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self._receive()

    def evaluate(self, expression: str) -> Any:
        """The value of an expression in the page."""
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"])
        return answer["result"].get("value")

    def box(self, selector: str) -> tuple[float, float, float, float]:
        """Scroll to an element and return its left, top, width and height in the window."""
        self.evaluate(f"document.querySelector({selector!r}).scrollIntoView({{block: 'center', behavior: 'instant'}})")
        rectangle = (
            f"(r => [r.left, r.top, r.width, r.height])(document.querySelector({selector!r}).getBoundingClientRect())"
        )
        left, top, width, height = self.evaluate(rectangle)
        return left, top, width, height

    def point(self, x: float, y: float) -> None:
        """Move the mouse to a point."""
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def touch(self, *places: tuple[float, float]) -> None:
        """Touch the first point, drag the finger over the others, and lift it."""
        for number, (x, y) in enumerate(places):
            kind = "touchMove" if number else "touchStart"
            self.send("Input.dispatchTouchEvent", type=kind, touchPoints=[{"x": x, "y": y}])
        self.send("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def press(self, key: str, modifiers: int = 0) -> None:
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key, modifiers=modifiers)

    def screenshot(self, selector: str | None = None, *, whole: bool = False) -> Image.Image:
        """A screenshot of the window, an element or the whole page, with two pixels for each CSS pixel."""
        options: dict[str, Any] = {}
        if selector is not None:
            left, top, width, height = self.box(selector)
            scrolled = self.evaluate("window.scrollY")
            options = {"clip": {"x": left, "y": top + scrolled, "width": width, "height": height, "scale": 1}}
        data = self.send(
            "Page.captureScreenshot", format="png", captureBeyondViewport=whole or bool(selector), **options
        )
        return Image.open(BytesIO(base64.b64decode(data["data"]))).convert("RGB")

    def _receive(self) -> dict[str, Any]:
        """The next message. Events are also appended to `events`."""
        give_up = time.monotonic() + SECONDS
        while b"\0" not in self._buffer:
            if not select.select([self._answers], [], [], max(give_up - time.monotonic(), 0))[0]:
                raise TimeoutError("the browser does not answer")
            part = os.read(self._answers, 2**20)
            if not part:
                raise RuntimeError("the browser is gone")
            self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(line)
        if "method" in message:
            self.events.append(message)
        return message


@contextmanager
def running(profile: Path) -> Iterator[Browser]:
    """A browser with an empty folder for its profile."""
    assert CHROMIUM is not None
    ours_read, theirs_write = os.pipe()
    theirs_read, ours_write = os.pipe()
    # Above the numbers 3 and 4, which the browser's ends get.
    reading, writing = (fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (theirs_read, theirs_write))
    command = [CHROMIUM, *_FLAGS, f"--user-data-dir={profile}", "about:blank"]
    process = subprocess.Popen(
        ["bash", "-c", f'exec "$@" 3<&{reading} 4>&{writing}', "-", *command],
        pass_fds=(reading, writing),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "HOME": str(profile)},
    )
    for end in (theirs_read, theirs_write, reading, writing):
        os.close(end)
    try:
        browser = Browser(ours_write, ours_read)
        yield browser
        browser._session = None
        browser.send("Browser.close")
    finally:
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        os.close(ours_read)
        os.close(ours_write)
