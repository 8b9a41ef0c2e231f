"""Talking to a server that runs the application of `probe.py`."""

from __future__ import annotations

import ast
import contextlib
import itertools
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from tests.support import DEADLINE, Address, RawClient, Response, Server, wait_for

_numbers = itertools.count()


def start(status: Any = 200, headers: Sequence[Any] = ()) -> dict[str, Any]:
    return {"type": "http.response.start", "status": status, "headers": list(headers)}


def body(data: Any = b"", more: bool = False) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, "more_body": more}


ANSWER: tuple[tuple[str, Any], ...] = (("send", start()), ("send", body(b"answer")))
STREAM: tuple[tuple[str, Any], ...] = (
    ("send", start()),
    ("send", body(b"one", True)),
    ("send", body(b"two", True)),
    ("send", body(b"three")),
)


@dataclass(frozen=True)
class Script:
    key: str
    target: str


def script(*steps: Sequence[Any]) -> Script:
    """A request target that makes the application take these steps, and the key of what they note."""
    key = f"k{next(_numbers)}"
    return Script(key, "/script?" + quote(repr((key, list(steps)))))


@dataclass
class Probe:
    server: Server
    socket_path: str = ""

    @property
    def port(self) -> int:
        return self.server.port

    @property
    def port6(self) -> int:
        return int(self.server.wait_line(r"listening at https?://\[::1\]:(\d+)")[1])

    def client(self, address: Address | None = None) -> RawClient:
        return RawClient(self.port if address is None else address)

    def request(
        self, target: str | Script, method: str = "GET", headers: Sequence[tuple[str, str]] = (), data: bytes = b""
    ) -> Response:
        """One request on a connection of its own."""
        with self.client() as client:
            return client.request(method, target.target if isinstance(target, Script) else target, headers, data)

    def scope(self, raw: bytes, address: Address | None = None) -> dict[str, Any]:
        """The scope that the application got for a raw request; `is a` names the type of the object itself."""
        with self.client(address) as client:
            client.send(raw)
            return parsed(client.read_response())

    def get_scope(self, target: str = "/", headers: Sequence[tuple[str, str]] = (), method: str = "GET") -> Any:
        return parsed(self.request(target, method, headers))

    def records(self, of: Script) -> list[Any]:
        return parsed(self.request(f"/records?{of.key}")) or []

    def ended(self, of: Script) -> list[Any]:
        """What the script has noted, once it is over."""
        return wait_for(lambda: (found := self.records(of))[-1:] == ["end"] and found, what=of.key)[:-1]

    def noted(self, of: Script, count: int = 1) -> list[Any]:
        """What the script has noted, once that is `count` entries."""
        return wait_for(lambda: len(found := self.records(of)) >= count and found, what=of.key)

    def set(self, flag: str) -> None:
        self.request(f"/set?{flag}")

    def complaints(self, about: Script) -> list[str]:
        """Warnings and errors in the log that name the request."""
        name = quote(repr(about.key))
        return [line for line in self.server.lines() if name in line and re.search(r"\] (warning|error) ", line)]


def parsed(response: Response) -> Any:
    assert response.status == 200, response
    return ast.literal_eval(response.body.decode())


def settled(look: Callable[[], Any], quiet: float = 0.3, timeout: float = DEADLINE) -> Any:
    """What `look` returns once it has returned the same for `quiet` seconds."""
    deadline = time.monotonic() + timeout
    last, since = look(), time.monotonic()
    while time.monotonic() < since + quiet:
        assert time.monotonic() < deadline, f"never settled: {last!r}"
        time.sleep(0.02)
        if (found := look()) != last:
            last, since = found, time.monotonic()
    return last


WS_APP = "tests.process.ws_probe:app"
WS_PAIRS = [("h11", "asyncio"), ("httptools", "uvloop")]
flags = map("flag{}".format, itertools.count())


@contextlib.contextmanager
def serving_websockets(flavour: tuple[str, str], folder: Path, *options: str) -> Iterator[Probe]:
    """A server with the application of `ws_probe.py`, on TCP and a Unix socket; skips without parser or loop."""
    parser, loop = flavour
    pytest.importorskip(parser)
    pytest.importorskip(loop)
    path = str(folder / "socket")
    binds = ("--bind", "127.0.0.1:0", "--bind", f"unix:{path}")
    with Server(WS_APP, *binds, "--http", parser, "--loop", loop, *options) as server:
        yield Probe(server, path)
