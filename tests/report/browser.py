"""A headless Chromium, driven by its DevTools protocol over a pipe."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One page of a browser; ``events`` are what it has reported, oldest first."""

    def __init__(self, asked: int, said: int) -> None:
        self.events: list[dict[str, Any]] = []
        self._asked, self._said = asked, said
        self._number, self._rest, self._session = 0, b"", ""
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        attached = self.send("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """Ask for something and return the answer; `RuntimeError` if the browser refuses."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        data = json.dumps(message).encode() + b"\0"
        while data:  # a pipe may take less than all of a long one
            data = data[os.write(self._asked, data) :]
        while True:
            found = self._read()
            if found.get("id") == self._number:
                if "error" in found:
                    raise RuntimeError(f"{method}: {found['error']}")
                return dict(found["result"])
            self.events.append(found)

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            data = os.read(self._said, 1 << 16)
            if not data:
                raise RuntimeError("the browser has ended")
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\0")
        return dict(json.loads(line))

    def show(
        self, file: Path, *, width: int = 1280, scheme: str = "light", media: str = "screen"
    ) -> None:
        """Open a file in a window of this width and wait until it is loaded."""
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=False,
        )
        preference = {"name": "prefers-color-scheme", "value": scheme}
        self.send("Emulation.setEmulatedMedia", media=media, features=[preference])
        self.events.clear()
        self.send("Page.navigate", url=file.as_uri())
        while not self.reported("Page.loadEventFired"):
            self.events.append(self._read())

    def run(self, script: str) -> Any:
        """Return the value of an expression in the page; of a promise, once it is there."""
        found = self.send(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        if "exceptionDetails" in found:
            raise RuntimeError(str(found["exceptionDetails"]))
        return found["result"].get("value")

    def press(self, key: str) -> None:
        """Press a key, and let what it does come to rest."""
        code = {"Tab": 9, "Enter": 13, "ArrowRight": 39}[key]
        given = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        text = {"text": "\r"} if key == "Enter" else {}
        self.send("Input.dispatchKeyEvent", type="keyDown", **given, **text)
        self.send("Input.dispatchKeyEvent", type="keyUp", **given)
        self.run("new Promise(done => setTimeout(done, 50))")

    def reported(self, method: str) -> list[dict[str, Any]]:
        """Return what was reported under a name."""
        return [event["params"] for event in self.events if event.get("method") == method]


@contextmanager
def open_browser(profile: Path) -> Iterator[Browser]:
    """Start a browser with an empty profile, and end it."""
    assert CHROMIUM is not None
    its_in, asked = os.pipe()
    said, its_out = os.pipe()
    words = [
        CHROMIUM,
        "--headless=new",
        "--no-sandbox",  # in a container there is none, and the page is our own
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--no-first-run",
        "--hide-scrollbars",
        f"--user-data-dir={profile}",
        "--remote-debugging-pipe",
    ]
    # It reads from 3 and writes to 4. The shell moves them there, by way of numbers out of the way.
    move = f'exec 8<&{its_in} 9>&{its_out}; exec "$@" 3<&8 4>&9'
    child = subprocess.Popen(
        ["bash", "-c", move, "bash", *words],
        pass_fds=(its_in, its_out),
        stderr=subprocess.DEVNULL,
    )
    os.close(its_in)
    os.close(its_out)
    browser = Browser(asked, said)
    try:
        yield browser
    finally:
        browser.send("Browser.close")
        os.close(asked)
        os.close(said)
        child.wait(30)
