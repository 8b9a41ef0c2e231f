"""A headless Chromium, driven through its DevTools protocol: open a page, run a line of JavaScript in it."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.sync.client import ClientConnection, connect

from tests.support import DEADLINE, wait_for

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# Nothing of it may look for a network.
OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-quic",
    "--remote-debugging-port=0",
)  # fmt: skip


class Page:
    """One open page."""

    def __init__(self, devtools: ClientConnection) -> None:
        self._devtools = devtools
        self._number = 0

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        self._devtools.send(json.dumps({"id": self._number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._devtools.recv(timeout=DEADLINE))
            if message.get("id") == self._number:
                assert "error" not in message, message
                result: dict[str, Any] = message["result"]
                return result

    def run(self, javascript: str) -> Any:
        """The value of an expression, once it is settled."""
        result = self.call("Runtime.evaluate", expression=javascript, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def text(self, selector: str) -> str:
        return str(self.run(f"document.querySelector({selector!r}).innerText"))

    def wait_for(self, javascript: str, timeout: float = DEADLINE) -> None:
        wait_for(lambda: self.run(javascript), timeout, javascript)

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))


class Browser:
    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}"
        self._stack = contextlib.ExitStack()

    def open(self, url: str) -> Page:
        target = httpx.put(f"{self._url}/json/new?{url}", timeout=DEADLINE, trust_env=False).json()
        devtools = connect(target["webSocketDebuggerUrl"], max_size=None, compression=None, proxy=None)
        self._stack.enter_context(devtools)
        page = Page(devtools)
        page.wait_for("document.readyState === 'complete' && location.href !== 'about:blank'")
        return page

    def close(self) -> None:
        self._stack.close()


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """Skips the test where there is none."""
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip("no Chromium is installed")
    with tempfile.TemporaryDirectory(prefix="apphost-browser-", ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            [program, *OPTIONS, f"--user-data-dir={profile}", "about:blank"],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            told = Path(profile, "DevToolsActivePort")
            wait_for(lambda: told.exists() and told.read_text().count("\n"), what="the browser starts")
            session = Browser(int(told.read_text().split()[0]))
            try:
                yield session
            finally:
                session.close()
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            deadline = time.monotonic() + DEADLINE
            while process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.02)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
