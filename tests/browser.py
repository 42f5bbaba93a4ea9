"""A headless Chromium by the WebDriver protocol (W3C), for the tests of the demo."""

from __future__ import annotations

import base64
import json
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))
FLAGS = """
--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync
--disable-background-networking --disable-component-update --disable-dev-shm-usage
--force-device-scale-factor=1 --hide-scrollbars
"""
# Names outside this machine do not resolve, so a page that needs them fails.
OFFLINE = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the standard's name of a reference


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def wait(condition: Callable[[], Any], what: str, seconds: float = 120) -> Any:
    """The first true value of ``condition``."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"{what}: not within {seconds} seconds"
        time.sleep(0.25)
    return value


class Browser:
    def __init__(self, address: str) -> None:
        self.session = address

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        data = json.dumps(body or {}).encode() if method == "POST" else None
        request = urllib.request.Request(self.session + path, data, method=method)
        request.add_header("Content-Type", "application/json")
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=180) as answer:
            return json.load(answer)["value"]

    def open(self, address: str) -> None:
        self.call("POST", "/url", {"url": address})

    def run(self, script: str) -> Any:
        """The value that JavaScript code returns."""
        return self.call("POST", "/execute/sync", {"script": script, "args": []})

    def upload(self, selector: str, file: Path) -> None:
        """Choose a file in an <input type=file>."""
        found = self.call("POST", "/element", {"using": "css selector", "value": selector})
        self.call("POST", f"/element/{found[ELEMENT]}/value", {"text": str(file)})

    def text(self) -> str:
        return str(self.run("return document.body.innerText"))

    def captions(self) -> list[str]:
        """Of a gradio gallery, in order."""
        found = self.run(
            "return [...document.querySelectorAll('.caption-label')].map(e => e.textContent)"
        )
        return [caption.strip() for caption in found]

    def images(self, selector: str) -> int:
        """How many images below an element are there and decoded."""
        return int(
            self.run(
                f"return [...document.querySelectorAll('{selector} img')]"
                ".filter(e => e.complete && e.naturalWidth > 0).length"
            )
        )

    def screenshot(self, file: Path) -> None:
        file.write_bytes(base64.b64decode(self.call("GET", "/screenshot")))


@contextmanager
def chromium(profile: Path, size: tuple[int, int] = (1180, 1050)) -> Iterator[Browser]:
    """A browser with an empty profile that reaches nothing but 127.0.0.1."""
    assert CHROMIUM and DRIVER
    port = free_port()
    driver = subprocess.Popen([DRIVER, f"--port={port}"], stdout=subprocess.DEVNULL)
    arguments = [
        *FLAGS.split(),
        OFFLINE,
        f"--user-data-dir={profile}",
        "--window-size={},{}".format(*size),
    ]
    wanted = {"goog:chromeOptions": {"binary": CHROMIUM, "args": arguments}}
    browser = Browser(f"http://127.0.0.1:{port}")
    try:
        wait(lambda: _ready(browser), "chromedriver", 60)
        started = browser.call("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        browser.session += f"/session/{started['sessionId']}"
        try:
            yield browser
        finally:
            browser.call("DELETE", "")
    finally:
        driver.terminate()
        driver.wait(30)


def _ready(browser: Browser) -> bool:
    try:
        return bool(browser.call("GET", "/status")["ready"])
    except OSError:
        return False
