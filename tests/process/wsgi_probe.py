"""The WSGI application of the conformance tests: each path does one thing, and what only the inside sees is printed.

Lines that start with `probe KEY` tell of the request with `?key=KEY`: how often its iterable was closed, what a read
raised. Loaded by a server as `tests.process.wsgi_probe:app`; tests import the tables of bad values from here.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from urllib.parse import parse_qsl

from tests.rawhttp import DEADLINE

Environ = dict[str, Any]
StartResponse = Callable[..., Callable[[bytes], None]]

TEXT = [("Content-Type", "text/plain")]
BLOCK = b"0123456789abcdef" * 4096  # 64 KiB
FLOOD_BLOCKS = 1024  # of BLOCK: 64 MiB, far more than the buffers of any socket

gates: defaultdict[str, threading.Event] = defaultdict(threading.Event)
crowds: dict[str, threading.Barrier] = {}
progress: dict[str, int] = {}
running = 0
most_running = 0
lock = threading.Lock()
opened_files: dict[str, Any] = {}


def say(key: str, what: str) -> None:
    sys.stdout.write(f"probe {key} {what}\n")


class Exit(BaseException):
    """As gevent's GreenletExit: no Exception."""


class BadStr(Exception):
    def __str__(self) -> str:
        raise ValueError("cannot be told")


RAISES: dict[str, Callable[[], BaseException]] = {
    "RuntimeError": lambda: RuntimeError("probe fails"),
    "SystemExit": lambda: SystemExit(0),
    "KeyboardInterrupt": KeyboardInterrupt,
    "Exit": Exit,
    "BadStr": BadStr,
}


class Counted:
    """An iterable that tells how often it was closed; `more` goes on after `blocks`."""

    def __init__(self, key: str, blocks: Iterable[Any]) -> None:
        self.key, self.blocks, self.closed = key, iter(blocks), 0

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        return next(self.blocks)

    def close(self) -> None:
        self.closed += 1
        say(self.key, f"closed {self.closed}")


def answer(start_response: StartResponse, value: object) -> list[bytes]:
    start_response("200 OK", [("Content-Type", "application/json")])
    return [json.dumps(value).encode()]


# ------------------------------------------------------------------------------------------------ environ and errors


def environ(environ: Environ, start_response: StartResponse, query: dict[str, str]) -> list[bytes]:
    """The environ as JSON; then it is spoilt, which must not reach the next request."""
    types = {name: type(value).__name__ for name, value in environ.items()}
    values = {name: value for name, value in environ.items() if isinstance(value, (str, bool, int, tuple))}
    result = answer(start_response, {"dict": type(environ) is dict, "types": types, "values": values})
    environ["LEAK"] = "leaked"
    for name in list(environ):
        if name.startswith(("SERVER_", "wsgi.")):
            environ[name] = "spoilt"
    del environ["SCRIPT_NAME"], environ["wsgi.errors"]
    return result


def errors(environ: Environ, start_response: StartResponse, query: dict[str, str]) -> list[bytes]:
    stream, key = environ["wsgi.errors"], query["key"]
    stream.write(f"{key} snow \u2603 and \U0001f40d\n")
    stream.writelines([f"{key} first ", "second\n", f"{key} third\n"])
    print(key, "printed", 7, file=stream)
    stream.write(f"{key} lone \ud800 surrogate\n")
    stream.write(f"{key} without an end")
    if query.get("flush"):
        stream.flush()
    return answer(start_response, None)


# ------------------------------------------------------------------------------------------------------ start_response


class StrSubclass(str):
    pass


BAD_STARTS: dict[str, tuple[Any, Any]] = {
    "status bytes": (b"200 OK", []),
    "status int": (200, []),
    "status words": ("OK", []),
    "status two digits": ("20 OK", []),
    "status four digits": ("2000 OK", []),
    "status below 100": ("099 Low", []),
    "status no space": ("200OK", []),
    "status other digits": ("\u0662\u0660\u0660 OK", []),
    "status CRLF": ("200 OK\r\nX-Evil: 1", []),
    "status LF": ("200 OK\nX-Evil: 1", []),
    "status NUL": ("200 O\0K", []),
    "status beyond latin-1": ("200 \u20ac", []),
    "headers None": ("200 OK", None),
    "headers tuple": ("200 OK", ()),
    "headers dict": ("200 OK", {"X-A": "1"}),
    "header triple": ("200 OK", [("X-A", "1", "2")]),
    "header one": ("200 OK", [("X-A",)]),
    "name bytes": ("200 OK", [(b"X-A", "1")]),
    "value bytes": ("200 OK", [("X-A", b"1")]),
    "value int": ("200 OK", [("X-A", 1)]),
    "value None": ("200 OK", [("X-A", None)]),
    "value CRLF": ("200 OK", [("X-A", "1\r\nX-Evil: 1")]),
    "value CR": ("200 OK", [("X-A", "1\rX-Evil: 1")]),
    "value LF": ("200 OK", [("X-A", "1\nX-Evil: 1")]),
    "value fold": ("200 OK", [("X-A", "1\r\n X-Evil: 1")]),
    "value NUL": ("200 OK", [("X-A", "1\0")]),
    "value beyond latin-1": ("200 OK", [("X-A", "\u20ac")]),
    "name CRLF": ("200 OK", [("X-A\r\nX-Evil", "1")]),
    "name colon": ("200 OK", [("X-A: 1", "1")]),
    "name space": ("200 OK", [("X A", "1")]),
    "name empty": ("200 OK", [("", "1")]),
    "name pseudo": ("200 OK", [(":status", "200")]),
    "name beyond latin-1": ("200 OK", [("X-\u20ac", "1")]),
    "length words": ("200 OK", [("Content-Length", "many")]),
    "length negative": ("200 OK", [("Content-Length", "-1")]),
    "length two": ("200 OK", [("Content-Length", "1"), ("content-length", "2")]),
} | {
    f"hop-by-hop {name}": ("200 OK", [(name, "x")])
    for name in ("Connection", "Keep-Alive", "Proxy-Authenticate", "Proxy-Authorization", "TE", "Trailer", "Trailers",
                 "transfer-encoding", "UPGRADE")
}  # fmt: skip

GOOD_STARTS: dict[str, tuple[Any, Any]] = {
    "plain": ("200 OK", [("X-A", "1")]),
    "no reason": ("299", []),
    "own reason": ("404 Gone Fishing", []),
    "unknown code": ("799 Odd", []),
    "latin-1": ("200 \xfcber", [("X-A", "\xe9t\xe9")]),
    "empty value": ("200 OK", [("X-Empty", "")]),
    "str subclass": ("200 OK", [(StrSubclass("X-A"), StrSubclass("sub"))]),
    "duplicates": ("200 OK", [("Set-Cookie", "a=1"), ("X-A", "1"), ("Set-Cookie", "b=2"), ("x-a", "2")]),
}


def start(environ: Environ, start_response: StartResponse, query: dict[str, str]) -> list[bytes]:
    """The start that `?what=` names in one of the tables."""
    status, headers = (BAD_STARTS | GOOD_STARTS)[query["what"]]
    start_response(status, headers)
    return [b"started"]


def never_started(environ: Environ, start_response: StartResponse, query: dict[str, str]) -> Iterable[bytes]:
    return {"list": [b"body"], "empty": [], "generator": (block for block in [b"body"])}[query["kind"]]


def lazy(environ: Environ, start_response: StartResponse, query: dict[str, str]) -> Iterator[bytes]:
    """All of the application is a generator, so start_response comes in the first iteration."""
    start_response("202 Lazy", TEXT)
    yield b"lazy "
    yield b"body"


def twice(environ: Environ, start_response: StartResponse, query: dict[str, str]) -> Iterable[bytes]:
    """A second start: `?exc=` none, `empty` (sys.exc_info() outside of an except), or `real`; `?after=` the head."""

    def blocks() -> Iterator[bytes]:
        if query.get("after") == "head":
            yield b"first block"
        else:
            yield b""
        try:
            raise LookupError("told by exc_info")
        except LookupError:
            info = sys.exc_info()
        if query["exc"] == "none":
            start_response("500 Second", [("X-Second", "1")])
        elif query["exc"] == "empty":
            start_response("500 Second", [("X-Second", "1")], (None, None, None))
        else:
            start_response("500 Second", [("X-Second", "1")], info)
        yield b"second body"

    start_response("200 First", [("X-First", "1")])
    return Counted(query["key"], blocks())


def write(environ: Environ, start_response: StartResponse, query: dict[str, str]) -> Iterable[bytes]:
    """write() before the iterable; the test sees it before the gate opens."""
    put = start_response("200 OK", TEXT)
    put(b"")
    put(b"written ")
    gates[query["key"]].wait(DEADLINE)
    put(b"twice ")
    return [b"returned"] if query["kind"] == "list" else Counted(query["key"], [b"re", b"turned"])


# ------------------------------------------------------------------------------------------------------------- bodies


class Twice(list[bytes]):
    """What it holds is not what it gives, as PEP 3333 only speaks of the latter."""

    def __iter__(self) -> Iterator[bytes]:
        yield from [*super().__iter__(), *super().__iter__()]


def script(environ: Environ, start_response: StartResponse, query: dict[str, str]) -> Iterable[Any]:
    """A response that the request's JSON describes: status, headers, blocks (latin-1), kind, key, raise_at."""
    told = json.loads(environ["wsgi.input"].read())
    start_response(told.get("status", "200 OK"), [tuple(header) for header in told.get("headers", [])])
    blocks = [block.encode("latin-1") for block in told["blocks"]]
    kind = told.get("kind", "iterable")
    if kind == "list":
        return blocks
    if kind == "tuple":
        return tuple(blocks)
    if kind == "generator":
        return (block for block in blocks)
    if kind == "subclass":
        return Twice(blocks)
    return Counted(told["key"], blocks)


def raising(environ: Environ, start_response: StartResponse, query: dict[str, str]) -> Iterable[bytes]:
    """Raises `?what=` at `?at=`: call, start, first (block), second, or close."""
    at, error = query["at"], RAISES[query["what"]]

    def blocks() -> Iterator[bytes]:
        if at == "first":
            raise error()
        yield b"first block"
        if at == "second":
            raise error()

    class Closing(Counted):
        def close(self) -> None:
            super().close()
            if at == "close":
                raise error()

    if at == "call":
        raise error()
    start_response("200 OK", TEXT)
    if at == "start":
        raise error()
    return Closing(query["key"], blocks())


NOT_BYTES: dict[str, Any] = {"str": "text", "int": 7, "None": None, "list": [65], "bytearray": bytearray(b"array"),
                             "empty str": ""}  # fmt: skip


def not_bytes(environ: Environ, start_response: StartResponse, query: dict[str, str]) -> Iterable[Any]:
    start_response("200 OK", TEXT)
    value = NOT_BYTES[query["what"]]
    if query["kind"] == "list":
        return [value]
    if query["kind"] == "late":
        return Counted(query["key"], [b"good", value, b"never"])
    if query["kind"] == "result":
        return value  # type: ignore[no-any-return]
    return Counted(query["key"], [value])


def gated(environ: Environ, start_response: StartResponse, query: dict[str, str]) -> Iterable[bytes]:
    """A block, and the next one only when the gate is open."""

    def blocks() -> Iterator[bytes]:
        if query.get("empty"):
            yield b""
            say(query["key"], "gave an empty block")
        else:
            yield b"before "
        gates[query["key"]].wait(DEADLINE)
        yield b"after"

    start_response("200 OK", TEXT)
    return Counted(query["key"], blocks())


def flood(environ: Environ, start_response: StartResponse, query: dict[str, str]) -> Iterable[bytes]:
    """64 MiB, by iteration or (`?by=write`) by write(); `/progress` tells how many blocks were asked for."""
    key = query["key"]

    def blocks() -> Iterator[bytes]:
        for number in range(FLOOD_BLOCKS):
            progress[key] = number + 1
            yield BLOCK

    put = start_response("200 OK", TEXT)
    if query.get("by") == "write":
        try:
            for block in blocks():
                put(block)
        except OSError as exc:
            say(key, f"write raised {type(exc).__name__}")
            raise
        return []
    return Counted(key, blocks())


def tell_progress(environ: Environ, start_response: StartResponse, query: dict[str, str]) -> list[bytes]:
    return answer(start_response, progress.get(query["key"], 0))


# -------------------------------------------------------------------------------------------------------------- input


def read_input(environ: Environ, start_response: StartResponse, query: dict[str, str]) -> list[bytes]:
    """Do what `?steps=` says to wsgi.input, such as `read:3 readline: readlines:10 iter: readinto:4 read:None`."""
    body, key = environ["wsgi.input"], query["key"]
    say(key, "called")
    if query.get("gate"):
        gates[key].wait(DEADLINE)
    results: list[Any] = []
    try:
        for step in query["steps"].split():
            name, _, text = step.partition(":")
            arguments = [None if text == "None" else int(text)] if text else []
            if name == "iter":
                result: Any = list(body)
            elif name == "next":
                result = next(iter(body))
            elif name == "readinto":
                buffer = bytearray(int(text))
                result = bytes(buffer[: body.readinto(buffer)])
            else:
                result = getattr(body, name)(*arguments)
            say(key, f"did {step}")
            results.append([line.decode("latin-1") for line in result] if isinstance(result, list)
                           else result.decode("latin-1"))  # fmt: skip
    except BaseException as exc:
        say(key, f"read raised {type(exc).__name__}, {'an OSError' if isinstance(exc, OSError) else 'no OSError'}")
        raise
    return answer(start_response, {"results": results, "terminated": environ["wsgi.input_terminated"]})


def ignore_input(environ: Environ, start_response: StartResponse, query: dict[str, str]) -> list[bytes]:
    return answer(start_response, "ignored")


def digest(environ: Environ, start_response: StartResponse, query: dict[str, str]) -> list[bytes]:
    """Reads in pieces of `?size=`; with a key waits at its gate after the first piece."""
    import hashlib

    body, total, size, key = environ["wsgi.input"], hashlib.sha256(), 0, query.get("key")
    while piece := body.read(int(query["size"])):
        total.update(piece)
        size += len(piece)
        if key is not None:
            gates[key].wait(DEADLINE)
    return answer(start_response, [size, total.hexdigest()])


def count_lines(environ: Environ, start_response: StartResponse, query: dict[str, str]) -> list[bytes]:
    return answer(start_response, sum(1 for _ in environ["wsgi.input"]))


# -------------------------------------------------------------------------------------------------------------- files


def _sendfile(*arguments: Any, send: Any = os.sendfile) -> Any:
    progress["sendfile"] = progress.get("sendfile", 0) + 1
    return send(*arguments)


os.sendfile = _sendfile  # so that tests see whether a file went through the kernel


class Noted:
    """A file-like object that tells of its reads and its close(); no real file for anybody who looks."""

    def __init__(self, key: str, file: Any) -> None:
        self.key, self.file, self.reads = key, file, 0

    def read(self, size: int = -1) -> bytes:
        self.reads += 1
        return self.file.read(size)  # type: ignore[no-any-return]

    def close(self) -> None:
        say(self.key, f"file closed after {self.reads} reads")
        self.file.close()


def _open(kind: str, path: str, key: str) -> Any:
    if kind == "buffered":
        return open(path, "rb")
    if kind == "raw":
        return open(path, "rb", buffering=0)
    if kind == "bytesio":
        return io.BytesIO(open(path, "rb").read())
    if kind == "gzip":
        return gzip.open(path, "rb")
    if kind == "temporary":
        file = tempfile.NamedTemporaryFile()  # noqa: SIM115
        file.write(open(path, "rb").read())  # noqa: SIM115
        file.seek(0)
        return file
    if kind == "pipe":
        reader, writer = os.pipe()
        os.write(writer, b"through a pipe")
        os.close(writer)
        return open(reader, "rb")
    return Noted(key, open(path, "rb"))


def file(environ: Environ, start_response: StartResponse, query: dict[str, str]) -> Iterable[bytes]:
    """`?path=` through wsgi.file_wrapper: `?kind=`, `?offset=`, `?length=` (the header), `?wrapped=` by middleware."""
    key = query.get("key", "-")
    opened = opened_files[key] = _open(query.get("kind", "buffered"), query["path"], key)
    if "offset" in query:
        opened.read(1)  # the buffer is full now: the descriptor stands elsewhere than the application has read to
        opened.seek(int(query["offset"]))
    headers = TEXT + ([("Content-Length", query["length"])] if "length" in query else [])
    put = start_response(query.get("status", "200 OK"), headers)
    if "written" in query:
        put(query["written"].encode())
    wrapper = environ["wsgi.file_wrapper"](opened, 8192)
    if not query.get("wrapped"):
        return wrapper  # type: ignore[no-any-return]

    def middleware() -> Iterator[bytes]:
        try:
            for block in wrapper:
                yield block.lower()
        finally:
            wrapper.close()

    return middleware()


def file_closed(environ: Environ, start_response: StartResponse, query: dict[str, str]) -> list[bytes]:
    return answer(start_response, query["key"] in opened_files and opened_files[query["key"]].closed)


# ------------------------------------------------------------------------------------------------------------ threads


def busy(environ: Environ, start_response: StartResponse, query: dict[str, str]) -> list[bytes]:
    """Takes 0.1 s of a thread; answers with the most that ever were in here at the same time.

    With `?together=NUMBER` only when that many have come; 500 if they do not. The time is for one more to show itself.
    """
    global running, most_running
    with lock:
        running += 1
        most_running = max(running, most_running)
    if "together" in query:
        with lock:
            crowd = crowds.setdefault(query["together"], threading.Barrier(int(query["together"])))
        crowd.wait(DEADLINE)
    time.sleep(0.1)
    with lock:
        running -= 1
    return answer(start_response, most_running)


def open_gate(environ: Environ, start_response: StartResponse, query: dict[str, str]) -> list[bytes]:
    gates[query["key"]].set()
    return answer(start_response, None)


def pid(environ: Environ, start_response: StartResponse, query: dict[str, str]) -> list[bytes]:
    return answer(start_response, os.getpid())


ROUTES: dict[str, Callable[[Environ, StartResponse, dict[str, str]], Iterable[Any]]] = {
    "/errors": errors, "/start": start, "/never-started": never_started, "/lazy": lazy, "/twice": twice,
    "/write": write, "/script": script, "/raise": raising, "/not-bytes": not_bytes, "/gated": gated, "/flood": flood,
    "/progress": tell_progress, "/input": read_input, "/ignore": ignore_input, "/digest": digest,
    "/lines": count_lines, "/file": file, "/closed": file_closed,
    "/busy": busy, "/open": open_gate, "/pid": pid,
}  # fmt: skip


def app(environ_: Environ, start_response: StartResponse) -> Iterable[Any]:
    query = dict(parse_qsl(environ_["QUERY_STRING"]))
    return ROUTES.get(environ_["PATH_INFO"], environ)(environ_, start_response, query)
