"""Pages in a headless Chromium, driven by its DevTools protocol over a pipe.

``python tests/browser.py PAGE PICTURE [--width PIXELS] [--height PIXELS] [--dark]`` photographs a
page.
"""

from __future__ import annotations

import argparse
import base64
import fcntl
import json
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless=new",
    "--no-sandbox",  # root has none
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--remote-debugging-pipe",
)


def find() -> str | None:
    """The path of a Chromium or Chrome that runs; a package may be an empty shell."""
    return next((path for path in map(shutil.which, NAMES) if path and _runs(path)), None)


def _runs(program: str) -> bool:
    return subprocess.run([program, "--version"], capture_output=True, check=False).returncode == 0


@dataclass
class Page:
    """One page of a browser.

    Attributes:
        complaints: errors and warnings of its console, uncaught exceptions.
        requests: addresses that it asked for, data URIs aside.
    """

    to: BinaryIO
    back: BinaryIO
    session: str = ""
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    _count: int = 0
    _loaded: bool = False

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The answer to a command of the protocol; what happens meanwhile is noted."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        self.to.write(json.dumps(message).encode() + b"\0")
        self.to.flush()
        while True:
            answer = self._next()
            if answer.get("id") == self._count:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]

    def _next(self) -> dict[str, Any]:
        content = bytearray()
        while (byte := self.back.read(1)) != b"\0":
            assert byte, "the browser has gone"
            content += byte
        message: dict[str, Any] = json.loads(content)
        self._note(message.get("method", ""), message.get("params", {}))
        return message

    def _note(self, method: str, given: dict[str, Any]) -> None:
        if method == "Page.loadEventFired":
            self._loaded = True
        elif method == "Network.requestWillBeSent":
            address = given["request"]["url"]
            self.requests += [] if address.startswith("data:") else [address]
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(given["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and given["type"] in ("error", "warning"):
            self.complaints.append(json.dumps(given["args"]))
        elif method == "Log.entryAdded":
            self.complaints.append(given["entry"]["text"])

    def look(self, width: int, height: int, scheme: str = "light") -> None:
        """Sets the window's size and the colours that the user prefers."""
        self.ask(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=False,
        )  # fmt: skip
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.ask("Emulation.setEmulatedMedia", features=features)

    def open(self, file: Path) -> None:
        """Loads a file to its end."""
        self._loaded = False
        self.ask("Page.navigate", url=file.resolve().as_uri())
        while not self._loaded:
            self._next()

    def value(self, expression: str) -> Any:
        """Of a JavaScript expression, after what is still to be drawn."""
        drawn = "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
        found = self.ask(
            "Runtime.evaluate",
            expression=f"{drawn}.then(() => ({expression}))", awaitPromise=True, returnByValue=True,
        )  # fmt: skip
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def photograph(self, file: Path, whole: bool = False) -> None:
        """Writes a PNG of the window, or of the whole page."""
        self.value("0")
        taken = self.ask("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        file.write_bytes(base64.b64decode(taken["data"]))


@contextmanager
def page(program: str) -> Iterator[Page]:
    """A browser with an empty page; it ends with the context."""
    read_here, write_there = map(_above_four, os.pipe())
    read_there, write_here = map(_above_four, os.pipe())
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        # The protocol's pipe is at the descriptors 3 and 4.
        script = f'exec "$@" 3<&{read_there} 4>&{write_there}'
        words = ["bash", "-c", script, "bash", program, *FLAGS, f"--user-data-dir={profile}"]
        with subprocess.Popen(
            words,
            pass_fds=(read_there, write_there),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        ) as running:
            os.close(read_there)
            os.close(write_there)
            with open(write_here, "wb") as to, open(read_here, "rb") as back:
                try:
                    yield _new_page(to, back)
                finally:
                    os.killpg(running.pid, signal.SIGKILL)


def _above_four(descriptor: int) -> int:
    """The same under a number that the redirections to 3 and 4 do not take away."""
    moved = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 5)
    os.close(descriptor)
    return moved


def _new_page(to: BinaryIO, back: BinaryIO) -> Page:
    new = Page(to, back)
    target = new.ask("Target.createTarget", url="about:blank")["targetId"]
    new.session = new.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
    for domain in ("Page", "Runtime", "Network", "Log"):
        new.ask(f"{domain}.enable")
    return new


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("page", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--height", type=int, default=900)
    parser.add_argument("--dark", action="store_true")
    given = parser.parse_args()
    program = find()
    assert program, f"there is none of {', '.join(NAMES)}"
    with page(program) as opened:
        opened.look(given.width, given.height, "dark" if given.dark else "light")
        opened.open(given.page)
        opened.photograph(given.picture)


if __name__ == "__main__":
    main()
