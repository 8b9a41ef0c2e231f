"""What is compared, as data: SERVERS with their settings, CASES with their load, WANTED figures. No I/O here."""

from __future__ import annotations

import enum
import json
from dataclasses import dataclass


@dataclass(frozen=True)
class Server:
    """One server with its settings.

    ``arguments`` follow ``python -m``; ``{app}``, ``{port}``, ``{workers}`` and ``{tmp}`` (a fresh directory) in them
    are filled in. ``reload`` is the signal with which its documentation deploys new code; "" when it has none.
    """

    label: str
    arguments: str
    reload: str = ""

    @property
    def is_apphost(self) -> bool:
        return self.arguments.startswith("apphost ")

    def command(self, **values: object) -> list[str]:
        return [argument.format_map(values) for argument in self.arguments.split()]


# Keep-alive is 75 s wherever it can be set: short defaults would end connections that a case holds open.
_APPHOST = "apphost {app} --bind 127.0.0.1:{port} --workers {workers} --threads 4 --keep-alive 75s"
_BIND = "--host 127.0.0.1 --port {port} --workers {workers}"
_UVICORN = f"uvicorn {{app}} {_BIND} --timeout-keep-alive 75 --no-access-log --no-proxy-headers --log-level warning"
_GRANIAN = f"granian {{app}} {_BIND} --http 1 --no-access-log --log-level warning"
# The default of 1,000 connections would make the case with 1,000 one of queueing; /dev/shm is what its FAQ advises.
_GUNICORN = (
    "gunicorn {app} --bind 127.0.0.1:{port} --workers {workers} --keep-alive 75 --worker-connections 10000"
    " --backlog 2048 --no-control-socket --worker-tmp-dir /dev/shm --log-level warning"
)
_HYPERCORN = (
    "hypercorn {app} --bind 127.0.0.1:{port} --workers {workers} --worker-class uvloop --keep-alive 75"
    " --log-level warning"
)

SERVERS = {
    "apphost": Server("apphost", f"{_APPHOST} --http httptools --loop uvloop", "USR1"),
    "apphost-h11-uvloop": Server("apphost, h11 + uvloop", f"{_APPHOST} --http h11 --loop uvloop"),
    "apphost-h11-asyncio": Server("apphost, h11 + asyncio", f"{_APPHOST} --http h11 --loop asyncio"),
    "apphost-log": Server(
        "apphost, access log to a file", f"{_APPHOST} --http httptools --loop uvloop --access-log {{tmp}}/access.log"
    ),
    "apphost-preload": Server("apphost, --preload", f"{_APPHOST} --http httptools --loop uvloop --preload"),
    "uvicorn": Server("uvicorn", f"{_UVICORN} --http httptools --loop uvloop", "HUP"),
    "uvicorn-h11-uvloop": Server("uvicorn, h11 + uvloop", f"{_UVICORN} --http h11 --loop uvloop"),
    "uvicorn-h11-asyncio": Server("uvicorn, h11 + asyncio", f"{_UVICORN} --http h11 --loop asyncio"),
    "uvicorn-websockets": Server("uvicorn, websockets", f"{_UVICORN} --http httptools --loop uvloop --ws websockets"),
    "uvicorn-wsproto": Server("uvicorn, wsproto", f"{_UVICORN} --http httptools --loop uvloop --ws wsproto"),
    "granian": Server("granian", f"{_GRANIAN} --interface asgi --loop uvloop --no-ws", "HUP"),
    "granian-ws": Server("granian", f"{_GRANIAN} --interface asgi --loop uvloop"),
    # It takes a connection only when it may have another request in progress, and by default only 1,024.
    "granian-idle": Server(
        "granian",
        f"{_GRANIAN} --interface asgi --loop uvloop --no-ws --backlog 8192 --backpressure 8192",
    ),
    "granian-wsgi": Server("granian", f"{_GRANIAN} --interface wsgi --no-ws"),
    "granian-wsgi-4": Server(
        "granian, 4 blocking threads", f"{_GRANIAN} --interface wsgi --no-ws --blocking-threads 4"
    ),
    "gunicorn": Server("gunicorn, 4 threads", f"{_GUNICORN} --worker-class gthread --threads 4"),
    "gunicorn-preload": Server("gunicorn, --preload", f"{_GUNICORN} --worker-class gthread --threads 4 --preload"),
    "gunicorn-asgi": Server("gunicorn, asgi worker", f"{_GUNICORN} --worker-class asgi --asgi-loop uvloop", "HUP"),
    "hypercorn": Server("hypercorn", _HYPERCORN, "HUP"),
}


@dataclass(frozen=True)
class Request:
    """What is asked, and the body of a correct answer: ``answer`` so many ``times``. ``pipelined``: so many a write.

    ``counted`` is the name of a header field whose value is another one in each request, as a proxy's request id is.
    """

    path: str = "/"
    method: str = "GET"
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = b""
    answer: bytes = b"Hello, world!"
    times: int = 1
    pipelined: int = 1
    counted: str = ""

    @property
    def whole_answer(self) -> bytes:
        return self.answer * self.times


_JSON = json.dumps({"items": [{"id": n, "name": f"item {n}", "price": n * 1.25} for n in range(20)]}).encode()
JSON_BODY = _JSON[:-1] + b', "pad": "' + b"x" * (1024 - len(_JSON) - 11) + b'"}'  # 1 KiB
MIB = 1 << 20
BROWSER = (
    ("User-Agent", "Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0"),
    ("Accept", "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"),
    ("Accept-Language", "en-GB,en;q=0.8,de-DE;q=0.5,de;q=0.3"),
    ("Accept-Encoding", "gzip, deflate, br, zstd"),
    ("Referer", "http://127.0.0.1/articles/2024/a-page-with-a-title"),
    ("Cookie", "sessionid=3f1c9d5a7b2e4c6d8f0a1b2c3d4e5f60; csrftoken=Zq8sX1vYw3UtR5pN7mK9jH2gF4dS6aLb; theme=dark"),
    ("Upgrade-Insecure-Requests", "1"),
    ("Sec-Fetch-Dest", "document"),
    ("Sec-Fetch-Mode", "navigate"),
    ("Priority", "u=0, i"),
)

HELLO = Request()
JSON = Request("/json", "POST", (("Content-Type", "application/json"),), JSON_BODY, JSON_BODY)
UPLOAD = Request("/upload", "POST", (("Content-Type", "application/octet-stream"),), b"x" * MIB, str(MIB).encode())
STREAM = Request("/stream", answer=b"x" * 1024, times=100)


def body(path: str, kib: int) -> Request:
    return Request(path, answer=b"x" * 1024, times=kib)


@dataclass(frozen=True)
class Metric:
    """One number of a sample. ``digits`` behind the point when shown."""

    key: str
    heading: str
    digits: int = 0


class Kind(enum.Enum):
    """What is done to a server, and what comes out; the first metric is the one that is compared."""

    THROUGHPUT = (Metric("rate", "requests/s"),)
    ECHO = (Metric("rate", "messages/s"),)
    LATENCY = (
        Metric("p99", "p99, ms", 2),
        Metric("p50", "p50, ms", 2),
        Metric("worst", "slowest, ms", 1),
        Metric("rate", "rate, requests/s"),
        Metric("peak", "peak, requests/s"),
        Metric("lag", "client late, p99, ms", 2),
    )
    IDLE = (Metric("connection", "KiB per idle connection", 2), Metric("tree", "PSS with 6,000 of them, MiB", 1))
    WORKERS = (
        Metric("worker", "MiB for each further worker", 1),
        Metric("one", "with 1 worker, MiB", 1),
        Metric("four", "with 4 workers, MiB", 1),
    )
    TREE = (Metric("tree", "PSS of all processes, MiB", 1),)
    START = (Metric("start", "ms to first answer"),)
    RELOAD = (Metric("reload", "ms until only new code answers"), Metric("asked", "requests meanwhile"))
    BALANCE = (
        Metric("burst", "at once: busiest worker / even share", 2),
        Metric("burst_least", "at once: least busy", 2),
        Metric("paced", "one after another: busiest", 2),
        Metric("paced_least", "one after another: least busy", 2),
    )

    @property
    def metrics(self) -> tuple[Metric, ...]:
        return self.value

    @property
    def more_is_better(self) -> bool:
        return self in (Kind.THROUGHPUT, Kind.ECHO)


@dataclass(frozen=True)
class Case:
    """``servers`` are keys of SERVERS, the first is apphost. ``app`` is in ``folder``, below benchmarks/.

    ``left_out`` says of servers that one would expect here why they are missing. ``message``: bytes of a WebSocket
    message. ``same_rate``: half of the peak of the slowest, for all; otherwise half of each server's own peak.
    """

    name: str
    title: str
    kind: Kind
    app: str
    servers: tuple[str, ...]
    request: Request = HELLO
    connections: int = 64
    workers: int = 1
    message: int = 0
    same_rate: bool = False
    folder: str = "apps"
    quick: bool = False
    left_out: tuple[tuple[str, str], ...] = ()


_MAIN = ("apphost", "granian", "uvicorn")
_ALL = (*_MAIN, "gunicorn-asgi", "hypercorn")
_WSGI = ("apphost", "granian-wsgi", "granian-wsgi-4", "gunicorn")
_SLOW = (("gunicorn-asgi", "measured in asgi-hello only"), ("hypercorn", "measured in asgi-hello only"))
_H11 = (("granian", "has no h11"), ("hypercorn", "measured in asgi-hello; its parser is always h11"))


def _asgi(name: str, title: str, request: Request = HELLO, connections: int = 64, app: str = "plain_asgi:app") -> Case:
    return Case(name, title, Kind.THROUGHPUT, app, _MAIN, request, connections, left_out=_SLOW)


def _wsgi(name: str, title: str, request: Request = HELLO, connections: int = 64, app: str = "plain_wsgi:app") -> Case:
    return Case(name, title, Kind.THROUGHPUT, app, _WSGI, request, connections)


_SITE = "../examples/django_app"
_SITE_PAGE = Request("/cookies/", answer=b'{"received": {}}')

CASES = (
    Case("asgi-hello", "ASGI hello", Kind.THROUGHPUT, "plain_asgi:app", _ALL, quick=True),
    Case(
        "asgi-h11-uvloop", "ASGI hello, h11 + uvloop", Kind.THROUGHPUT, "plain_asgi:app",
        ("apphost-h11-uvloop", "uvicorn-h11-uvloop"), quick=True, left_out=_H11,
    ),
    Case(
        "asgi-h11-asyncio", "ASGI hello, h11 + asyncio", Kind.THROUGHPUT, "plain_asgi:app",
        ("apphost-h11-asyncio", "uvicorn-h11-asyncio"), left_out=_H11,
    ),
    _asgi("asgi-1", "ASGI hello, 1 connection", connections=1),
    _asgi("asgi-1000", "ASGI hello, 1,000 connections", connections=1000),
    _asgi("asgi-headers", "ASGI hello, 10 browser headers", Request(headers=BROWSER)),
    _asgi("asgi-ids", "ASGI hello, 10 browser headers, an id each", Request(headers=BROWSER, counted="X-Request-Id")),
    _asgi("asgi-pipelined", "ASGI hello, 16 pipelined", Request(pipelined=16)),
    _asgi("asgi-fresh", "ASGI hello, a connection each", Request(headers=(("Connection", "close"),))),
    _asgi("asgi-10k", "ASGI, 10 KiB body", body("/10k", 10)),
    _asgi("asgi-json", "ASGI, JSON echo of 1 KiB", JSON),
    _asgi("asgi-upload-1m", "ASGI, 1 MiB upload", UPLOAD, 16),
    _asgi("asgi-download-1m", "ASGI, 1 MiB download", body("/1m", 1024), 16),
    _asgi("asgi-download-50m", "ASGI, 50 MiB download", body("/50m", 50 * 1024), 4),
    _asgi("asgi-stream", "ASGI, stream of 100 chunks", STREAM),
    _asgi("starlette", "Starlette hello", app="hello_starlette:app"),
    _asgi("fastapi", "FastAPI hello", app="hello_fastapi:app"),
    _wsgi("wsgi-hello", "WSGI hello"),
    _wsgi("wsgi-1", "WSGI hello, 1 connection", connections=1),
    _wsgi("wsgi-1000", "WSGI hello, 1,000 connections", connections=1000),
    _wsgi("wsgi-json", "WSGI, JSON echo of 1 KiB", JSON),
    _wsgi("wsgi-upload-1m", "WSGI, 1 MiB upload", UPLOAD, 16),
    _wsgi("wsgi-download-1m", "WSGI, 1 MiB download", body("/1m", 1024), 16),
    _wsgi("wsgi-stream", "WSGI, stream of 100 chunks", STREAM),
    _wsgi("flask", "Flask hello", app="hello_flask:app"),
    _wsgi("django", "Django hello", app="hello_django:app"),
    *(
        Case(
            f"ws-{size}", f"WebSocket echo, {title}", Kind.ECHO, "plain_asgi:app",
            ("apphost", "granian-ws", "uvicorn-websockets", "uvicorn-wsproto"), connections=32, message=size,
            left_out=(("gunicorn-asgi", "not measured"), ("hypercorn", "not measured")),
        )
        for size, title in ((64, "64 B"), (16384, "16 KiB"))
    ),
    Case(
        "access-log", "ASGI hello, access log", Kind.THROUGHPUT, "plain_asgi:app", ("apphost-log", "apphost"),
        quick=True,
    ),
    Case(
        "latency-half", "ASGI hello, each at half of its peak", Kind.LATENCY, "plain_asgi:app", _MAIN, quick=True,
        left_out=_SLOW,
    ),
    Case(
        "latency-same", "ASGI hello, all at half of the slowest's peak", Kind.LATENCY, "plain_asgi:app", _MAIN,
        same_rate=True, left_out=_SLOW,
    ),
    Case(
        "latency-wsgi", "WSGI hello, each at half of its peak", Kind.LATENCY, "plain_wsgi:app", _WSGI
    ),
    Case(
        "memory-idle", "Idle keep-alive connection", Kind.IDLE, "plain_asgi:app",
        ("apphost", "granian-idle", "uvicorn", "gunicorn-asgi", "hypercorn"), quick=True,
    ),
    Case("memory-worker", "Workers, small ASGI app", Kind.WORKERS, "plain_asgi:app", _ALL),
    Case(
        "memory-django", "4 workers of a Django site", Kind.TREE, "mysite.wsgi:application",
        ("apphost-preload", "apphost", "gunicorn-preload", "gunicorn", "granian-wsgi"), _SITE_PAGE, workers=4,
        folder=_SITE, quick=True, left_out=(("uvicorn", "calls WSGI through a deprecated adapter"),),
    ),
    Case("start-asgi", "Start, small ASGI app", Kind.START, "plain_asgi:app", _ALL, quick=True),
    Case(
        "start-django", "Start, Django site", Kind.START, "mysite.wsgi:application",
        ("apphost", "granian-wsgi", "gunicorn"), _SITE_PAGE, folder=_SITE,
    ),
    Case("reload", "New code, 2 workers", Kind.RELOAD, "versioned_asgi:app", _ALL, workers=2),
    Case("balance", "400 long connections, 4 workers", Kind.BALANCE, "plain_asgi:app", _ALL, workers=4),
)  # fmt: skip


@dataclass(frozen=True)
class Wanted:
    """The figure that ``ours`` is developed for: its ratio to the best of ``against``, or without those a limit.

    ``figure`` is a least value where more is better, else a highest one; ``newer`` is the one from Python 3.12 on.
    """

    case: str
    against: tuple[str, ...]
    figure: float
    ours: str = "apphost"
    newer: float | None = None


WANTED = (
    Wanted("asgi-hello", ("granian",), 1.15, newer=1.3),
    Wanted("asgi-hello", ("uvicorn",), 1.7),
    Wanted("asgi-h11-uvloop", ("uvicorn-h11-uvloop",), 2.7, "apphost-h11-uvloop"),
    Wanted("asgi-h11-asyncio", ("uvicorn-h11-asyncio",), 1.8, "apphost-h11-asyncio"),
    Wanted("starlette", ("granian",), 1.1),
    Wanted("wsgi-hello", ("granian-wsgi",), 0.85),
    Wanted("wsgi-hello", ("granian-wsgi-4",), 0.85),
    Wanted("wsgi-hello", ("gunicorn",), 5.0),
    Wanted("flask", ("granian-wsgi",), 1.3),
    Wanted("flask", ("granian-wsgi-4",), 1.3),
    Wanted("asgi-upload-1m", ("granian", "uvicorn"), 1.0),
    Wanted("asgi-download-1m", ("granian", "uvicorn"), 1.0),
    Wanted("ws-64", ("uvicorn-wsproto",), 1.3),
    Wanted("ws-64", ("granian-ws",), 1.0),
    Wanted("ws-16384", ("uvicorn-wsproto",), 1.3),
    Wanted("latency-half", ("granian", "uvicorn"), 1.0),
    Wanted("memory-idle", (), 6.0),
    Wanted("memory-django", (), 75.0, "apphost-preload"),
    Wanted("access-log", ("apphost",), 0.85, "apphost-log"),
)

BY_NAME = {case.name: case for case in CASES}
