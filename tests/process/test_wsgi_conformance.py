"""PEP 3333 against a real server, on both parsers and both loops: environ, start_response, bodies, ends, threads.

Each test names the requirement it covers. `wsgi.input` and `wsgi.file_wrapper` have files of their own.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from urllib.parse import urlencode

import pytest

from tests.process.wsgi_probe import BAD_STARTS, BLOCK, FLOOD_BLOCKS, GOOD_STARTS, NOT_BYTES, RAISES
from tests.support import DEADLINE, RawClient, Response, Server, raw, request_bytes, wait_for

PAIRS = [("h11", "asyncio"), ("httptools", "uvloop")]
_numbers = count(1)


@pytest.fixture(scope="module", params=PAIRS, ids="-".join)
def probe(request: pytest.FixtureRequest) -> Iterator[Server]:
    parser, loop = request.param
    pytest.importorskip(parser)
    pytest.importorskip(loop)
    with Server("tests.process.wsgi_probe:app", "--http", parser, "--loop", loop, "--threads", "4") as server:
        yield server
        assert server.stop() == 0
        assert server.log.count(" booting, pid ") == 1  # no request ended the worker


@pytest.fixture
def client(probe: Server) -> Iterator[RawClient]:
    with RawClient(probe.port) as made:
        yield made


@pytest.fixture
def key() -> str:
    """A name for one request, for the lines that the probe prints about it."""
    return f"k{next(_numbers)}k"


def target(path: str, /, **query: object) -> str:
    return f"{path}?{urlencode({name: str(value) for name, value in query.items()})}"


def get(client: RawClient, path: str, /, **query: object) -> Response:
    return client.request("GET", target(path, **query))


def ask(server: Server, path: str, /, **query: object) -> object:
    """On a connection of its own: what the probe answers as JSON."""
    with RawClient(server.port) as other:
        answer = get(other, path, **query)
    assert answer.status == 200, answer
    return json.loads(answer.body)


def script(client: RawClient, method: str = "POST", **told: object) -> Response:
    return client.request(method, "/script", body=json.dumps(told).encode())


def environ_of(client: RawClient, data: bytes | None = None) -> dict[str, dict[str, str]]:
    client.send(data or request_bytes("GET", "/environ"))
    answer = client.read_response()
    assert answer.status == 200, answer
    told = json.loads(answer.body)
    assert told["dict"] is True
    return told  # type: ignore[no-any-return]


def closed_once(server: Server, key: str, after: int) -> bool:
    """Waits for the first close(); then nothing the server does later may close again."""
    server.wait_line(rf"probe {key} closed 1", after=after)
    ask(server, "/pid")
    return f"probe {key} closed 2" not in server.log


def no_complaint(server: Server, mark: int) -> bool:
    """No error was logged since `mark`. A request goes through all that the server still had to say."""
    ask(server, "/pid")
    return not [line for line in server.lines(mark) if "] error " in line or "Traceback" in line]


# ------------------------------------------------------------------------------------------------------------- environ


def test_environ_required(probe: Server, client: RawClient) -> None:
    """G1, G2, G4"""
    told = environ_of(client, request_bytes("GET", "/some/where?a=1&b=%20?c", [("Host", "example.org:1")]))
    values, types = told["values"], told["types"]
    expected = {
        "REQUEST_METHOD": "GET", "SCRIPT_NAME": "", "PATH_INFO": "/some/where", "QUERY_STRING": "a=1&b=%20?c",
        "SERVER_NAME": "127.0.0.1", "SERVER_PORT": str(probe.port), "SERVER_PROTOCOL": "HTTP/1.1",
        "REMOTE_ADDR": "127.0.0.1", "REMOTE_PORT": str(client.sock.getsockname()[1]), "HTTP_HOST": "example.org:1",
        "wsgi.version": [1, 0], "wsgi.url_scheme": "http", "wsgi.multithread": True, "wsgi.multiprocess": False,
        "wsgi.run_once": False, "wsgi.input_terminated": True,
    }  # fmt: skip
    assert expected.items() <= values.items()
    assert {"wsgi.input", "wsgi.errors", "wsgi.file_wrapper"} <= types.keys()
    for name, kind in types.items():
        if "." not in name:
            assert kind == "str", name
            assert max(values[name], default="") <= "\xff"
    assert "CONTENT_LENGTH" not in values
    assert "CONTENT_TYPE" not in values


def test_environ_does_not_leak(client: RawClient) -> None:
    """G1: the probe spoils its environ after every request."""
    first = environ_of(client)
    second = environ_of(client)
    assert first == second
    assert "LEAK" not in second["values"]


def test_environ_bytes(client: RawClient) -> None:
    """G1: the bytes of the wire as latin-1, the path decoded, the query not."""
    data = b"GET /%C3%A9%2F%FF/a+b//./%25?q=%C3%A9&+ HTTP/1.1\r\nHost: x\r\nX-Text: \xc3\xa9\xff \x80\r\n\r\n"
    values = environ_of(client, data)["values"]
    assert values["PATH_INFO"] == "/\xc3\xa9/\xff/a+b//./%"
    assert values["QUERY_STRING"] == "q=%C3%A9&+"
    assert values["HTTP_X_TEXT"] == "\xc3\xa9\xff \x80"
    assert values["REQUEST_URI"] == values["RAW_URI"] == "/%C3%A9%2F%FF/a+b//./%25?q=%C3%A9&+"


def test_environ_headers(client: RawClient) -> None:
    """G3: content fields without HTTP_; repeated ones joined; no spoofing by underscore; no httpoxy."""
    headers = [
        ("Content-Type", "text/x"), ("X-A", "1"), ("x-a", "2"), ("Cookie", "a=1"), ("Cookie", "b=2"), ("X-Empty", ""),
        ("X_Spoof", "1"), ("X-Real_Ip", "6.6.6.6"), ("Content_Length", "9"), ("Proxy", "http://evil"),
        ("PROXY", "http://worse"), ("Content-Length-X", "no"),
    ]  # fmt: skip
    values = environ_of(client, request_bytes("PUT", "/", headers, b"body"))["values"]
    assert (values["CONTENT_TYPE"], values["CONTENT_LENGTH"], values["REQUEST_METHOD"]) == ("text/x", "4", "PUT")
    assert (values["HTTP_X_A"], values["HTTP_COOKIE"], values["HTTP_X_EMPTY"]) == ("1,2", "a=1; b=2", "")
    unwanted = {"HTTP_CONTENT_TYPE", "HTTP_CONTENT_LENGTH", "HTTP_X_SPOOF", "HTTP_X_REAL_IP", "HTTP_PROXY", ""}
    assert not unwanted & values.keys()


def test_environ_http10(client: RawClient) -> None:
    """G2: SERVER_NAME and SERVER_PORT do not depend on a Host header."""
    values = environ_of(client, b"GET / HTTP/1.0\r\n\r\n")["values"]
    assert (values["SERVER_PROTOCOL"], values["SERVER_NAME"]) == ("HTTP/1.0", "127.0.0.1")
    assert "HTTP_HOST" not in values
    assert client.eof()


def test_environ_of_another_configuration(http_parser: str, tmp_path: Path, serve: Callable[..., Server]) -> None:
    """G2, G4: one thread in two processes, below a root path, on a Unix socket."""
    path = str(tmp_path / "app.sock")
    options = ("--http", http_parser, "--threads", "1", "--workers", "2", "--root-path", "/m\xf6unt/")
    serve("tests.process.wsgi_probe:app", *options, bind=f"unix:{path}")
    with RawClient(path) as client:
        values = environ_of(client, request_bytes("GET", "/m%C3%B6unt/page"))["values"]
        bare = environ_of(client, request_bytes("GET", "/m%C3%B6untain"))["values"]
        root = environ_of(client, request_bytes("GET", "/m%C3%B6unt"))["values"]
    assert (values["wsgi.multithread"], values["wsgi.multiprocess"]) == (False, True)
    assert (values["SCRIPT_NAME"], values["PATH_INFO"]) == ("/m\xc3\xb6unt", "/page")
    assert (bare["PATH_INFO"], root["PATH_INFO"]) == ("/m\xc3\xb6untain", "")
    assert (values["SERVER_NAME"], values["SERVER_PORT"], values["REMOTE_ADDR"]) == ("localhost", "80", "")


@pytest.mark.parametrize("flush", ["", "1"])
def test_errors(probe: Server, client: RawClient, key: str, flush: str) -> None:
    """G6: any text, whole lines; what has no end of line comes out with flush() or at the end of the request."""
    assert get(client, "/errors", key=key, flush=flush).status == 200
    lines = [rf"{key} snow .*and", f"{key} first second", f"{key} third", f"{key} printed 7", f"{key} lone .*surrogate",
             f"{key} without an end"]  # fmt: skip
    for line in lines:
        probe.wait_line(line)


# ------------------------------------------------------------------------------------------------------ start_response


@pytest.mark.parametrize("what", BAD_STARTS)
def test_bad_start_is_refused(probe: Server, client: RawClient, what: str) -> None:
    """G11: an exception for the application, 500 for the client, nothing of it on the wire."""
    mark = probe.mark()
    answer = get(client, "/start", what=what)
    assert answer.status == 500
    assert b"evil" not in repr(answer).lower().encode()
    probe.wait_line(r"the application raised (ValueError|TypeError|UnicodeEncodeError)", after=mark)


@pytest.mark.parametrize("what", GOOD_STARTS)
def test_good_start(client: RawClient, what: str) -> None:
    """G11: what PEP 3333 allows reaches the client as it is, in order."""
    status, headers = GOOD_STARTS[what]
    answer = get(client, "/start", what=what)
    code, _, reason = status.partition(" ")
    assert (answer.status, answer.reason, answer.body) == (int(code), reason, b"started")
    expected = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers]
    assert answer.headers[: len(expected)] == expected


@pytest.mark.parametrize("kind", ["list", "empty", "generator"])
def test_never_started(probe: Server, client: RawClient, kind: str) -> None:
    """G9: without start_response there is nothing to send but a 500."""
    mark = probe.mark()
    assert get(client, "/never-started", kind=kind).status == 500
    probe.wait_line("without calling start_response", after=mark)


def test_lazy_start(client: RawClient) -> None:
    """G9: start_response within the first iteration."""
    answer = get(client, "/lazy")
    assert (answer.status, answer.reason, answer.body) == (202, "Lazy", b"lazy body")


@pytest.mark.parametrize("exc", ["none", "empty"])
def test_second_start_without_exception(probe: Server, client: RawClient, key: str, exc: str) -> None:
    """G10: an error, before the head as after it; `(None, None, None)` is no exception either."""
    mark = probe.mark()
    assert get(client, "/twice", key=key, exc=exc).status == 500
    assert closed_once(probe, key, mark)
    late = raw(probe.port, request_bytes("GET", target("/twice", key=key, exc=exc, after="head")))
    assert late.startswith(b"HTTP/1.1 200 First\r\n")
    assert b"first block" in late
    assert b"second" not in late.lower()
    assert not late.endswith(b"0\r\n\r\n")


def test_second_start_with_exception(client: RawClient, key: str) -> None:
    """G10: before the head is out, the new status and headers replace the first ones, all of them."""
    answer = get(client, "/twice", key=key, exc="real")
    assert (answer.status, answer.reason, answer.body) == (500, "Second", b"second body")
    assert answer.header(b"x-second") == b"1"
    assert answer.header(b"x-first") is None


def test_second_start_after_the_head(probe: Server, key: str) -> None:
    """G10: after the head start_response raises the application's own exception, and the response is cut."""
    mark = probe.mark()
    late = raw(probe.port, request_bytes("GET", target("/twice", key=key, exc="real", after="head")))
    assert late.startswith(b"HTTP/1.1 200 First\r\n")
    assert b"second" not in late.lower()
    assert not late.endswith(b"0\r\n\r\n")
    probe.wait_line(r"raised LookupError \(told by exc_info\): the response was cut short", after=mark)
    assert closed_once(probe, key, mark)


@pytest.mark.parametrize("kind", ["list", "iterable"])
def test_write(probe: Server, client: RawClient, key: str, kind: str) -> None:
    """G8: what is written goes out at once, and before what the iterable gives."""
    client.send(request_bytes("GET", target("/write", key=key, kind=kind)))
    head = client.read_head()
    body = client.read_body(head)
    assert next(body) == b"written "  # the application waits at its gate
    ask(probe, "/open", key=key)
    assert b"".join(body) == b"twice returned"
    assert get(client, "/pid").status == 200


# ---------------------------------------------------------------------------------------------------------------- body


@pytest.mark.parametrize("empty", ["", "1"])
def test_head_waits_for_the_first_block(probe: Server, client: RawClient, key: str, empty: str) -> None:
    """G12, G13: an empty block sends nothing; a block that is not empty is sent before the next is there."""
    mark = probe.mark()
    client.send(request_bytes("GET", target("/gated", key=key, empty=empty)))
    if empty:
        probe.wait_line(f"probe {key} gave an empty block", after=mark)
        client.sock.settimeout(0.3)
        with pytest.raises(TimeoutError):
            client.sock.recv(1)
        client.sock.settimeout(DEADLINE)
        ask(probe, "/open", key=key)
        assert client.read_response().body == b"after"
    else:
        body = client.read_body(client.read_head())
        assert next(body) == b"before "
        ask(probe, "/open", key=key)
        assert list(body) == [b"after"]
    assert closed_once(probe, key, mark)


@pytest.mark.parametrize("kind", ["list", "tuple", "generator", "iterable"])
@pytest.mark.parametrize("blocks", [[], [""], ["", "", ""], ["one"], ["", "one"], ["one", "", "two", ""]], ids=str)
def test_blocks(client: RawClient, key: str, kind: str, blocks: list[str]) -> None:
    """G13, G15: any number of blocks, empty ones too; a single block tells its length; the connection goes on."""
    answer = script(client, kind=kind, blocks=blocks, key=key)
    assert (answer.status, answer.body) == (200, "".join(blocks).encode())
    if (kind in ("list", "tuple") and len(blocks) <= 1) or not "".join(blocks):
        assert answer.header(b"content-length") == b"%d" % len(answer.body)
    else:
        assert answer.header(b"transfer-encoding") == b"chunked"
    assert get(client, "/pid").status == 200


def test_a_subclass_of_list_is_iterated(client: RawClient, key: str) -> None:
    """G13: a result is an iterable; that this one can be indexed as well, and has a length, says nothing."""
    answer = script(client, kind="subclass", blocks=["one "], key=key)
    assert (answer.status, answer.body) == (200, b"one one ")
    assert get(client, "/pid").status == 200


def test_http10_without_length(client: RawClient) -> None:
    """G13, S5: a stream to an HTTP/1.0 client ends with the connection, even one that wants to keep it."""
    client.send(b"GET /lazy HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
    answer = client.read_response()
    assert (answer.status, answer.body) == (202, b"lazy body")
    assert answer.header(b"transfer-encoding") is None
    assert answer.header(b"connection") == b"close"


@pytest.mark.parametrize("kind", ["list", "iterable"])
@pytest.mark.parametrize(
    ("length", "blocks", "received"),
    [(5, ["hello"], "hello"), (5, ["he", "llo", ""], "hello"), (3, ["hello"], "hel"), (3, ["he", "llo", "!"], "hel"),
     (0, ["x"], ""), (2, ["he", "llo"], "he")],
    ids=str,
)  # fmt: skip
def test_length_is_kept(
    probe: Server, client: RawClient, key: str, kind: str, length: int, blocks: list[str], received: str
) -> None:
    """G16: exactly Content-Length bytes; the rest is dropped, and said in the log; the connection goes on."""
    mark = probe.mark()
    answer = script(client, kind=kind, blocks=blocks, key=key, headers=[["Content-Length", str(length)]])
    assert answer.all(b"content-length") == [b"%d" % length]
    assert answer.body == received.encode()
    assert get(client, "/pid").status == 200
    if len("".join(blocks)) > length:
        probe.wait_line(f"gave more than the {length} bytes of its Content-Length", after=mark)
    if kind == "iterable":
        assert closed_once(probe, key, mark)


@pytest.mark.parametrize("kind", ["list", "iterable"])
def test_length_is_not_reached(probe: Server, client: RawClient, key: str, kind: str) -> None:
    """G16: a visible failure: 500 while that is possible, else the end of the connection."""
    mark = probe.mark()
    client.send(request_bytes("POST", "/script", body=json.dumps(
        {"kind": kind, "blocks": ["short"], "key": key, "headers": [["Content-Length", "9"]]}).encode()))  # fmt: skip
    answer = client.read_head()
    if kind == "list":
        assert answer.status == 500
    else:
        assert answer.status == 200
        with pytest.raises(AssertionError, match="ended 4 bytes too early"):
            list(client.read_body(answer))
    probe.wait_line("shorter than its Content-Length", after=mark)


@pytest.mark.parametrize("kind", ["list", "iterable"])
@pytest.mark.parametrize(("status", "method"), [("200 OK", "HEAD"), ("204 No Content", "GET"), ("304 Same", "GET")])
def test_no_body_allowed(probe: Server, key: str, kind: str, status: str, method: str) -> None:
    """G14, G17: the body is not sent, the iterable is closed, the connection goes on."""
    told = {"status": status, "kind": kind, "blocks": ["some", " body"], "key": key, "headers": [["X-A", "1"]]}
    mark = probe.mark()
    with RawClient(probe.port) as client:
        client.send(request_bytes(method, "/script", body=json.dumps(told).encode()))
        answer = client.read_response(method)
        assert (answer.status, answer.body, answer.header(b"x-a")) == (int(status[:3]), b"", b"1")
        assert get(client, "/pid").status == 200
    if kind == "iterable":
        assert closed_once(probe, key, mark)
    assert no_complaint(probe, mark)


def test_head_with_length(client: RawClient) -> None:
    """G17: the length of the body that GET would have had, declared or seen."""
    body = json.dumps({"kind": "list", "blocks": ["hello"]}).encode()
    client.send(request_bytes("HEAD", "/script", body=body))
    assert client.read_response("HEAD").header(b"content-length") == b"5"
    body = json.dumps({"kind": "list", "blocks": [], "headers": [["Content-Length", "7"]]}).encode()
    client.send(request_bytes("HEAD", "/script", body=body))
    assert client.read_response("HEAD").header(b"content-length") == b"7"
    assert get(client, "/pid").status == 200


# ----------------------------------------------------------------------------------------------------------------- ends


@pytest.mark.parametrize("what", RAISES)
@pytest.mark.parametrize("at", ["call", "start", "first"])
def test_raises_before_the_head(probe: Server, client: RawClient, key: str, what: str, at: str) -> None:
    """G14, G19, G20: 500, the log, and the worker goes on, whatever was raised."""
    mark = probe.mark()
    worker = ask(probe, "/pid")
    answer = get(client, "/raise", what=what, at=at, key=key)
    assert answer.status == 500
    assert b"probe" not in answer.body
    probe.wait_line(rf"the application raised {what}.*500 answer.*GET /raise", after=mark)
    if at == "first":
        assert closed_once(probe, key, mark)
    for _ in range(4):  # each of the threads is still there
        assert ask(probe, "/pid") == worker


@pytest.mark.parametrize("what", RAISES)
def test_raises_after_the_head(probe: Server, key: str, what: str) -> None:
    """G14, G19, G20: cut so that the client sees it, logged with the traceback, closed once."""
    mark = probe.mark()
    data = raw(probe.port, request_bytes("GET", target("/raise", what=what, at="second", key=key)))
    assert b"first block" in data
    assert not data.endswith(b"0\r\n\r\n")
    probe.wait_line(rf"the application raised {what}.*cut short", after=mark)
    probe.wait_line(r"wsgi_probe\.py.*in blocks", after=mark)
    assert closed_once(probe, key, mark)


@pytest.mark.parametrize("what", RAISES)
def test_close_raises(probe: Server, client: RawClient, key: str, what: str) -> None:
    """G14, G20: the response is complete by then; logged as what it is, and the connection goes on."""
    mark = probe.mark()
    answer = get(client, "/raise", what=what, at="close", key=key)
    assert (answer.status, answer.body) == (200, b"first block")
    line = probe.wait_line(rf"the application raised {what}.*", after=mark)[0]
    assert "cut short" not in line
    assert "500" not in line
    assert get(client, "/pid").status == 200
    assert closed_once(probe, key, mark)


@pytest.mark.parametrize("what", NOT_BYTES)
@pytest.mark.parametrize("kind", ["list", "iterable", "late"])
def test_blocks_that_are_no_bytes(probe: Server, key: str, what: str, kind: str) -> None:
    """G13: an error like any other, never a guess at an encoding, the same however the block is given."""
    mark = probe.mark()
    data = raw(probe.port, request_bytes("GET", target("/not-bytes", what=what, kind=kind, key=key),
                                         [("Connection", "close")]))  # fmt: skip
    probe.wait_line(r"raised TypeError .*must be bytes, not ", after=mark)
    if kind == "late":
        assert data.startswith(b"HTTP/1.1 200")
        assert b"never" not in data
        assert not data.endswith(b"0\r\n\r\n")
    else:
        assert data.startswith(b"HTTP/1.1 500")
    if kind != "list":
        assert closed_once(probe, key, mark)


@pytest.mark.parametrize("what", ["int", "None", "str"])
def test_results_that_are_no_iterable_of_bytes(probe: Server, client: RawClient, key: str, what: str) -> None:
    """G13, G19"""
    mark = probe.mark()
    assert get(client, "/not-bytes", what=what, kind="result", key=key).status == 500
    probe.wait_line("raised TypeError", after=mark)


@pytest.mark.parametrize("by", ["iteration", "write"])
def test_client_that_does_not_read(probe: Server, key: str, by: str) -> None:
    """G13, A8: the generator waits with the client, memory does not grow; then all of it arrives."""
    worker = Path(f"/proc/{ask(probe, '/pid')}/statm")
    before = int(worker.read_text().split()[1]) * 4096 if worker.exists() else 0
    with RawClient(probe.port) as client:
        client.send(request_bytes("GET", target("/flood", key=key, by=by)))
        made = standstill(lambda: int(str(ask(probe, "/progress", key=key))))
        assert 0 < made < FLOOD_BLOCKS / 4  # the buffers of the kernel take some MiB
        if before:
            assert int(worker.read_text().split()[1]) * 4096 - before < 16 * 2**20
        answer = client.read_head()
        total = sum(map(len, client.read_body(answer)))
    assert total == FLOOD_BLOCKS * len(BLOCK)
    assert ask(probe, "/progress", key=key) == FLOOD_BLOCKS


def standstill(measure: Callable[[], int]) -> int:
    """The value of `measure` once it is above 0 and has not changed for 0.3 s."""
    last, since = -1, time.monotonic()

    def still() -> bool:
        nonlocal last, since
        now = measure()
        if now != last:
            last, since = now, time.monotonic()
        return now > 0 and time.monotonic() - since > 0.3

    wait_for(still)
    return last


@pytest.mark.parametrize("by", ["iteration", "write"])
@pytest.mark.parametrize("when", ["at once", "after the head", "while the application waits"])
def test_client_leaves(probe: Server, key: str, by: str, when: str) -> None:
    """G14: close() once, the thread is free again, and nothing in the log: it is not the application's fault."""
    mark = probe.mark()
    with RawClient(probe.port) as client:
        client.send(request_bytes("GET", target("/flood", key=key, by=by)))
        if when != "at once":
            assert client.read_head().status == 200
        if when == "while the application waits":
            standstill(lambda: int(str(ask(probe, "/progress", key=key))))
    if by == "iteration":
        assert closed_once(probe, key, mark)
    else:
        probe.wait_line(f"probe {key} write raised ClientDisconnected", after=mark)
    assert no_complaint(probe, mark)
    assert int(str(ask(probe, "/progress", key=key))) < FLOOD_BLOCKS


# -------------------------------------------------------------------------------------------------------------- threads


def test_more_requests_than_threads(probe: Server) -> None:
    """G4: every one is answered, in turn; never more at once than there are threads, and really that many."""
    answers: list[object] = []
    # Each waits for three more: a crowd that gathers however slowly the clients start.
    clients = [threading.Thread(target=lambda: answers.append(ask(probe, "/busy", together=4))) for _ in range(12)]
    for each in clients:
        each.start()
    for each in clients:
        each.join(DEADLINE)
    assert len(answers) == 12
    assert max(map(int, map(str, answers))) == 4


def test_pipelined_requests(client: RawClient) -> None:
    """S14: answers in the order of the requests, whichever application call is slow."""
    client.send(request_bytes("GET", "/busy") + request_bytes("GET", "/lazy") + request_bytes("GET", "/pid"))
    assert [client.read_response().status for _ in range(3)] == [200, 202, 200]
