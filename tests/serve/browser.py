"""Headless Chromium, driven by the DevTools protocol through a pipe."""

import base64
import fcntl
import json
import os
import pathlib
import select
import shutil
import signal
import time
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
PROGRAM = next(filter(None, map(shutil.which, NAMES)), None)
DEADLINE = 60  # seconds of a call


class Browser:
    """A browser; use it in a `with`."""

    def __init__(self, folder: pathlib.Path):
        read, self._write, self._read, write = (*_make_pipe(), *_make_pipe())
        options = [
            "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
            "--no-first-run", "--remote-debugging-pipe", f"--user-data-dir={folder}",
        ]  # fmt: skip
        actions = [
            (os.POSIX_SPAWN_DUP2, read, 3),  # where the browser reads and writes
            (os.POSIX_SPAWN_DUP2, write, 4),
            *((os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in (0, 1, 2)),
        ]
        self._pid = os.posix_spawn(PROGRAM, [PROGRAM, *options], os.environ, file_actions=actions)
        os.close(read)
        os.close(write)
        self._number, self._buffer = 0, b""

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *error):
        os.kill(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)
        os.close(self._write)
        os.close(self._read)

    def call(self, method: str, session: str = "", **params) -> dict[str, Any]:
        """Call a method of the protocol, and return its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        message |= {"sessionId": session} if session else {}
        os.write(self._write, json.dumps(message).encode() + b"\0")
        until = time.monotonic() + DEADLINE
        while True:
            answer = self._receive(until)
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer)
                return answer["result"]

    def _receive(self, until: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready = select.select([self._read], [], [], max(0, until - time.monotonic()))[0]
            part = os.read(self._read, 1 << 16) if ready else b""
            assert part, "the browser does not answer"
            self._buffer += part
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def open(self, url: str, script: str = "") -> "Tab":
        """Open a page, after a script that runs before its own."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        tab = self.attach(target)
        tab.call("Page.enable")
        if script:
            tab.call("Page.addScriptToEvaluateOnNewDocument", source=script)
        tab.call("Page.navigate", url=url)
        tab.wait(f"location.href === {json.dumps(url)} && document.readyState === 'complete'")
        return tab

    def attach(self, target: str) -> "Tab":
        """Return a tab by the id of its target."""
        found = self.call("Target.attachToTarget", targetId=target, flatten=True)
        return Tab(self, target, found["sessionId"])

    def list_pages(self) -> list[str]:
        """Return the ids of the pages that are open."""
        found = self.call("Target.getTargets")["targetInfos"]
        return [each["targetId"] for each in found if each["type"] == "page"]


def _make_pipe() -> list[int]:
    """Return a pipe whose numbers are not those that the browser is given."""
    ends = os.pipe()
    moved = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 100) for end in ends]
    for end in ends:
        os.close(end)
    return moved


class Tab:
    """A page of a browser."""

    def __init__(self, browser: Browser, target: str, session: str):
        self.browser, self.target, self._session = browser, target, session

    def call(self, method: str, **params) -> dict[str, Any]:
        """Call a method of the protocol for this page."""
        return self.browser.call(method, self._session, **params)

    def run(self, script: str) -> Any:
        """Return the value of an expression, as if a user had caused it; promises are awaited."""
        found = self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True,
            userGesture=True,
        )  # fmt: skip
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, condition: str):
        """Wait until an expression is true."""
        until = time.monotonic() + DEADLINE
        while not self.run(f"Boolean({condition})"):
            assert time.monotonic() < until, f"not so in time: {condition}"
            time.sleep(0.02)

    def press(self, key: str, code: int, **more):
        """Press a key."""
        for kind in ("keyDown", "keyUp"):
            self.call(
                "Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, **more
            )

    def write(self, text: str):
        """Write a text where the focus is."""
        self.call("Input.insertText", text=text)

    def save_picture(self, path: pathlib.Path, width: int, height: int, is_dark: bool = False):
        """Save what is seen as a PNG."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=False,
        )  # fmt: skip
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))
