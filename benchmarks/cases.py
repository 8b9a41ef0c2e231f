"""What is compared: the servers with their settings, and the cases, as data."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Contestant:
    """One server with its settings. ``arguments`` follow ``python -m``; ``{port}`` in them becomes the port."""

    label: str
    is_apphost: bool
    arguments: tuple[str, ...]

    def command(self, port: int) -> list[str]:
        return [argument.replace("{port}", str(port)) for argument in self.arguments]


@dataclass(frozen=True)
class Case:
    """``apphost`` should answer ``at_least`` times the requests a second of ``against``; ``beside`` is shown too.

    ``message``: the load is a WebSocket echo of so many bytes, and a request is a message; 0 is HTTP.
    """

    name: str
    apphost: Contestant
    against: Contestant
    at_least: float
    beside: tuple[Contestant, ...] = ()
    message: int = 0

    @property
    def contestants(self) -> tuple[Contestant, ...]:
        return (self.apphost, self.against, *self.beside)


_PEER_BIND = "--host 127.0.0.1 --port {port} --workers 1"


def _apphost(app: str, parser: str, loop: str) -> Contestant:
    options = f"--bind 127.0.0.1:{{port}} --workers 1 --threads 4 --http {parser} --loop {loop}"
    return Contestant(f"apphost, {parser} + {loop}", True, ("apphost", app, *options.split()))


def _uvicorn(parser: str, loop: str) -> Contestant:
    options = f"{_PEER_BIND} --http {parser} --loop {loop} --no-access-log --no-proxy-headers"
    return Contestant(f"uvicorn, {parser} + {loop}", False, ("uvicorn", "hello_asgi:app", *options.split()))


def _granian(interface: str, app: str, extra: str, label: str) -> Contestant:
    options = f"{_PEER_BIND} --interface {interface} --http 1 --no-ws --no-access-log {extra}"
    return Contestant(f"granian, {label}", False, ("granian", app, *options.split()))


def _uvicorn_ws(library: str) -> Contestant:
    options = f"{_PEER_BIND} --http httptools --loop uvloop --ws {library} --no-access-log --no-proxy-headers"
    return Contestant(f"uvicorn, {library}", False, ("uvicorn", "echo_asgi:app", *options.split()))


def _gunicorn(app: str) -> Contestant:
    options = "--bind 127.0.0.1:{port} --workers 1 --worker-class gthread --threads 4 --no-control-socket"
    heartbeat = ("--worker-tmp-dir", "/dev/shm") if os.path.isdir("/dev/shm") else ()
    return Contestant("gunicorn, gthread, 4 threads", False, ("gunicorn", app, *options.split(), *heartbeat))


_GRANIAN_WS = Contestant(
    "granian, asgi + uvloop",
    False,
    ("granian", "echo_asgi:app", *f"{_PEER_BIND} --interface asgi --http 1 --no-access-log --loop uvloop".split()),
)
_GRANIAN_DEFAULT = ("", "wsgi")
_GRANIAN_AT_ITS_BEST = ("--blocking-threads 4", "wsgi, 4 blocking threads")

CASES = (
    Case("asgi-h11-asyncio", _apphost("hello_asgi:app", "h11", "asyncio"), _uvicorn("h11", "asyncio"), 1.8),
    Case("asgi-h11-uvloop", _apphost("hello_asgi:app", "h11", "uvloop"), _uvicorn("h11", "uvloop"), 2.3),
    Case(
        "asgi-fast",
        _apphost("hello_asgi:app", "httptools", "uvloop"),
        _granian("asgi", "hello_asgi:app", "--loop uvloop", "asgi + uvloop"),
        0.9,
        (_uvicorn("httptools", "uvloop"),),
    ),
    Case(
        "wsgi-fast",
        _apphost("hello_wsgi:app", "httptools", "uvloop"),
        _gunicorn("hello_wsgi:app"),
        5.0,
        (_granian("wsgi", "hello_wsgi:app", *_GRANIAN_AT_ITS_BEST),),
    ),
    Case(
        "wsgi-flask",
        _apphost("hello_flask:app", "httptools", "uvloop"),
        _granian("wsgi", "hello_flask:app", *_GRANIAN_DEFAULT),
        1.1,
        (_granian("wsgi", "hello_flask:app", *_GRANIAN_AT_ITS_BEST),),
    ),
    *(
        Case(
            f"ws-echo-{size}",
            _apphost("echo_asgi:app", "httptools", "uvloop"),
            _uvicorn_ws("wsproto"),
            1.3,
            (_uvicorn_ws("websockets"),),
            message=size,
        )
        for size in (64, 16384)
    ),
    Case("ws-echo-64-granian", _apphost("echo_asgi:app", "httptools", "uvloop"), _GRANIAN_WS, 1.0, message=64),
)
