"""ASGI 3 on the wire: A (the application's side) and H (the scope), on every parser and event loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.process.conftest import PROBE
from tests.process.probing import ANSWER, Probe, body, parsed, script, settled, start
from tests.support import Server, raw, request_bytes, wait_for

DISCONNECT = {"type": "http.disconnect"}
MIB = 2**20


@pytest.fixture(scope="module")
def mounted() -> Iterator[Probe]:
    """A server with other settings than the rest: a root path, no lifespan, any header name."""
    options = ("--root-path", "/mount/", "--lifespan", "off", "--underscore-headers", "allow")
    with Server(PROBE, *options) as server:
        yield Probe(server)


# -- A: the application


def test_a1_the_scope_is_a_real_dict(probe: Probe) -> None:
    """A1: the probe takes scope, receive and send by position, and nothing else."""
    scope = probe.get_scope()
    assert (scope["is a"], scope["type"]) == ("dict", "http")


def test_a1_applications_of_two_callables_still_work(serve: Callable[..., Server]) -> None:
    """A1"""
    legacy = Probe(serve(PROBE.replace(":app", ":legacy")))
    assert legacy.get_scope("/old")["path"] == "/old"
    assert legacy.request(script(("body",), *ANSWER), "POST", data=b"data").body == b"answer"


def test_a2_versions(probe: Probe) -> None:
    """A2"""
    assert probe.get_scope()["asgi"] == {"version": "3.0", "spec_version": "2.5"}
    lifespan = {"type": "lifespan", "asgi": {"version": "3.0", "spec_version": "2.0"}}
    assert parsed(probe.request("/lifespan")) == [lifespan]


def test_a3_h12_nothing_leaks_into_the_next_request(probe: Probe) -> None:
    """A3 H12: of all that a request does to its scope, only objects inside the state are seen by the next one."""
    with probe.client() as client:
        scopes = [parsed(client.request("GET", path)) for path in ("/clean", "/mutate", "/clean")]
    with probe.client() as client:
        scopes.append(parsed(client.request("GET", "/clean")))
    for scope in scopes:
        assert scope.keys() == scopes[0].keys()
        assert scope["asgi"] == {"version": "3.0", "spec_version": "2.5"}
        assert scope["headers"] == [(b"host", b"127.0.0.1")]
        assert scope["extensions"] == scopes[0]["extensions"]
        assert scope["state"].keys() == {"shared"}
    assert scopes[2]["state"]["shared"] == scopes[1]["state"]["shared"] + ["seen by all"]


def test_a4_unknown_keys_in_events_are_tolerated(probe: Probe) -> None:
    """A4"""
    steps = [("send", {**start(), "novelty": object.__name__}), ("send", {**body(b"fine"), "novelty": [1]})]
    assert probe.request(script(*steps)).body == b"fine"


NOT_EVENTS: list[tuple[str, Any]] = [
    ("unknown type", {"type": "http.response.novelty"}),
    ("type of another protocol", {"type": "websocket.accept"}),
    ("no type", {"status": 200}),
    ("no dict", None),
    ("no status", {"type": "http.response.start"}),
    ("str status", start("200")),
    ("bool status", start(True)),
    ("float status", start(200.0)),
    ("None status", start(None)),
    ("str header name", start(200, [("x-a", b"1")])),
    ("str header value", start(200, [(b"x-a", "1")])),
    ("int header value", start(200, [(b"x-a", 1)])),
    ("header of one item", start(200, [(b"x-a",)])),
    ("None headers", {**start(), "headers": None}),
]
NOT_BODIES: list[tuple[str, Any]] = [("str", "text"), ("None", None), ("int", 3), ("list", [b"text"])]


@pytest.mark.parametrize("event", [pytest.param(event, id=what) for what, event in NOT_EVENTS])
def test_a5_a_bad_event_raises_and_a_good_one_may_follow(probe: Probe, event: Any) -> None:
    """A5 S9: the exception comes out of `send`, and nothing of the event was taken."""
    it = script(("attempt", event), *ANSWER)
    response = probe.request(it)
    assert (response.status, response.body) == (200, b"answer")
    assert "Exception" in probe.ended(it)[0]


@pytest.mark.parametrize("data", [pytest.param(data, id=what) for what, data in NOT_BODIES])
def test_a5_a_bad_body_raises(probe: Probe, data: Any) -> None:
    """A5"""
    it = script(("send", start()), ("attempt", body(data)), ("send", body(b"answer")))
    assert probe.request(it).body == b"answer"
    assert probe.ended(it)[0][0] == "TypeError"


@pytest.mark.parametrize("kind", ["bytearray", "memoryview"])
def test_a5_bytes_like_bodies_are_taken(probe: Probe, kind: str) -> None:
    """A5: what is unmistakably bytes is no wrong type."""
    it = script(("send", start()), ("attempt_made", body(b"like bytes"), "body", kind))
    assert probe.request(it).body == b"like bytes"


@pytest.mark.parametrize("exception", ["RuntimeError", "SystemExit", "KeyboardInterrupt", "GeneratorExit"])
def test_a6_exception_before_the_response(probe: Probe, exception: str) -> None:
    """A6 S1 S12: 500, the end of the connection, and the worker goes on."""
    mark = probe.server.mark()
    with probe.client() as client:
        response = client.request("GET", script(("raises", exception)).target)
        assert (response.status, response.header(b"connection")) == (500, b"close")
        assert b"said the script" not in response.body
        assert client.eof()
    probe.server.wait_line(f"raised {exception} .so said the script.: the client got a 500", after=mark)
    assert probe.get_scope()["method"] == "GET"


def test_a6_exception_within_the_response(probe: Probe) -> None:
    """A6: never the clean end of a chunked body."""
    mark = probe.server.mark()
    it = script(("send", start()), ("send", body(b"part", True)), ("raises", "RuntimeError"))
    wire = raw(probe.port, request_bytes("GET", it.target))
    assert wire.endswith(b"\r\n\r\n4\r\npart\r\n")
    probe.server.wait_line("raised RuntimeError .*: the response was cut short", after=mark)


def test_a6_exception_within_a_response_that_ends_with_the_connection(probe: Probe) -> None:
    """A6 S5: HTTP/1.0 knows only the connection's end as the end of the body, so that must be a reset."""
    it = script(("send", start()), ("send", body(b"part", True)), ("wait", "a6-1.0"), ("raises", "RuntimeError"))
    with probe.client() as client:
        client.send(f"GET {it.target} HTTP/1.0\r\n\r\n".encode())
        pieces = client.read_body(client.read_head())
        assert next(pieces) == b"part"
        probe.set("a6-1.0")
        with pytest.raises(ConnectionResetError):
            next(pieces)


def test_a7_own_exception_comes_back_without_an_error_in_the_log(probe: Probe) -> None:
    """A7 S16: `send` raises for the client that has gone; an application that does not care is no failure."""
    it = script(("send", start()), ("send", body(b"first", True)), ("flood",))
    with probe.client() as client:
        client.send(request_bytes("GET", it.target))
        client.read_head()
    assert probe.ended(it) == []
    probe.request(failing := script(("raises", "ValueError")))
    wait_for(lambda: probe.complaints(failing))  # so the log has all that came before
    assert probe.complaints(it) == []


def test_a8_events_from_other_tasks_do_not_mix(probe: Probe) -> None:
    """A8: `send` and `receive` in tasks of the application, several at once."""
    letters = [bytes([letter]) for letter in b"abcdefgh"]
    pieces = [("send", body(letter * 300, True)) for letter in letters]
    it = script(("send", start()), ("together", [*pieces, ("receive",)]), ("send", body()))
    with probe.client() as client:
        client.send(request_bytes("POST", it.target, body=b"data"))
        chunks = list(client.read_body(client.read_head()))
    assert sorted(chunks) == [letter * 300 for letter in letters]
    assert probe.ended(it) == [{"type": "http.request", "body": b"data", "more_body": False}]


def test_a8_send_waits_for_a_client_that_does_not_read(probe: Probe) -> None:
    """A8: bounded memory, and every byte arrives in the end."""
    it = script(("send", start()), ("push", 32 * MIB, MIB // 4), ("send", body()))
    with probe.client() as client:
        client.send(request_bytes("GET", it.target))
        client.read_head()
        taken = settled(lambda: probe.records(it))
        assert len(taken) == 1, "it ended"
        assert taken[0] < 24 * MIB
    assert probe.ended(it)[0] < 32 * MIB  # the client has gone, and `send` has raised
    assert len(probe.request(script(("send", start()), ("push", 8 * MIB, MIB), ("send", body()))).body) == 8 * MIB


EXTENSION_EVENTS = {
    "http.response.push": {"type": "http.response.push", "path": "/pushed", "headers": []},
    "http.response.zerocopysend": {"type": "http.response.zerocopysend", "file": 0, "count": 0, "more_body": True},
    "http.response.pathsend": {"type": "http.response.pathsend", "path": "/dev/null"},
    "http.response.early_hint": {"type": "http.response.early_hint", "links": [b"</a.css>; rel=preload"]},
    "http.response.trailers": {"type": "http.response.trailers", "headers": [(b"x-t", b"1")], "more_trailers": True},
    "http.response.debug": {"type": "http.response.debug", "info": {}},
}


@pytest.mark.parametrize("name", EXTENSION_EVENTS)
def test_a9_an_extension_is_announced_exactly_where_its_event_works(probe: Probe, name: str) -> None:
    """A9 X8"""
    announced = probe.get_scope()["extensions"]
    assert all(isinstance(value, dict) for value in announced.values())
    it = script(("send", start()), ("attempt", EXTENSION_EVENTS[name]), ("send", body(b"end")))
    if name not in announced:
        assert probe.request(it).body == b"end"
        assert "Exception" in probe.ended(it)[0]
    else:
        probe.request(it)
        assert probe.ended(it)[:1] == ["sent"]


# -- H: the scope


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_h1_http_version(probe: Probe, version: str) -> None:
    """H1"""
    assert probe.scope(f"GET / HTTP/{version}\r\nHost: a\r\n\r\n".encode())["http_version"] == version


@pytest.mark.parametrize("method", ["GET", "DELETE", "PROPFIND", "PURGE", "BREW", "get", "M-SEARCH", "SOURCE", "PRI"])
def test_h2_method(probe: Probe, method: str) -> None:
    """H2: every token passes, unchanged."""
    assert probe.get_scope(method=method)["method"] == method


def test_h3_scheme(probe: Probe) -> None:
    """H3: nobody is trusted to say otherwise, and the target's scheme is no evidence either."""
    for header in ("X-Forwarded-Proto: https", "X-Forwarded-Ssl: on", "Forwarded: proto=https", "X-Scheme: https"):
        scope = probe.scope(f"GET https://a/ HTTP/1.1\r\nHost: a\r\n{header}\r\n\r\n".encode())
        assert scope["scheme"] == "http"


PATHS = [
    ("/", "/"),
    ("//a", "//a"),
    ("/a//b/", "/a//b/"),
    ("/./a/../b", "/./a/../b"),
    ("/a+b", "/a+b"),
    ("/a%20b", "/a b"),
    ("/a%2Fb%2fc", "/a/b/c"),
    ("/%25%32%35", "/%25"),
    ("/%C3%BC", "/ü"),
    ("/%E2%82%AC", "/€"),
    ("/%FF%C3", "/��"),
    ("/%zz%", "/%zz%"),
    ("/%0d%0aX:%20y%00", "/\r\nX: y\0"),
    ("/a;b=c,d", "/a;b=c,d"),
]


@pytest.mark.parametrize(("target", "path"), PATHS)
@pytest.mark.parametrize("query", ["", "?", "?a?b", "?x=%2F+%FF&y"])
def test_h4_h5_h6_path_raw_path_query(probe: Probe, target: str, path: str, query: str) -> None:
    """H4 H5 H6: decoded path, raw path and raw query; invalid UTF-8 becomes U+FFFD."""
    scope = probe.get_scope(target + query)
    assert (scope["path"], scope["raw_path"], scope["query_string"]) == (path, target.encode(), query[1:].encode())


@pytest.mark.parametrize("target", [b"/\xc3\xbc", b"/?q=\xff", b"/\x80"])
def test_h6_bytes_beyond_ascii_are_refused(probe: Probe, target: bytes) -> None:
    """H6"""
    answer = raw(probe.port, b"GET " + target + b" HTTP/1.1\r\nHost: a\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 400 ")


def test_h7_no_root_path(probe: Probe) -> None:
    """H7"""
    assert probe.get_scope()["root_path"] == ""


@pytest.mark.parametrize(
    ("target", "path", "raw_path"),
    [
        ("/a%2Fb", "/mount/a/b", b"/mount/a%2Fb"),
        ("/", "/mount/", b"/mount/"),
        ("/mount", "/mount", b"/mount"),
        ("/mount/a", "/mount/a", b"/mount/a"),
        ("/mountain", "/mount/mountain", b"/mount/mountain"),
        ("/%6Dount/a", "/mount/a", b"/%6Dount/a"),
    ],
)
def test_h5_h7_root_path_is_in_path(mounted: Probe, target: str, path: str, raw_path: bytes) -> None:
    """H5 H7: in both of them, added unless it is there already; a slash at its end is taken off."""
    scope = mounted.get_scope(target)
    assert (scope["root_path"], scope["path"], scope["raw_path"]) == ("/mount", path, raw_path)


def test_h7_asterisk_has_no_root_path(mounted: Probe) -> None:
    """H7 H13"""
    scope = mounted.get_scope("*", method="OPTIONS")
    assert (scope["path"], scope["raw_path"]) == ("*", b"*")


def test_h8_headers(probe: Probe) -> None:
    """H8: lower-case names, order, duplicates, white space, empty and 8-bit values."""
    scope = probe.scope(
        b"GET / HTTP/1.1\r\nX-A: 1\r\nHOST: a\r\nCookie: c=1\r\nx-a:2\r\nCookie:\t d=2 \t\r\nX-Empty:\r\n"
        b"X-Blank:  \t\r\nX-8: \x80caf\xe9\xff\r\nX-In:  a \t b  \r\nX-A: 1\r\nX_Under: no\r\n\r\n"
    )
    assert [tuple(item) for item in scope["headers"]] == [
        (b"x-a", b"1"),
        (b"host", b"a"),
        (b"cookie", b"c=1"),
        (b"x-a", b"2"),
        (b"cookie", b"d=2"),
        (b"x-empty", b""),
        (b"x-blank", b""),
        (b"x-8", b"\x80caf\xe9\xff"),
        (b"x-in", b"a \t b"),
        (b"x-a", b"1"),
    ]


def test_h8_names_with_an_underscore_can_be_allowed(mounted: Probe) -> None:
    """H8"""
    assert (b"x_under", b"yes") in mounted.get_scope("/", [("X_Under", "yes")])["headers"]


def test_h9_pseudo_headers_cannot_come_through_http1(probe: Probe) -> None:
    """H9: on HTTP/1.1 they are no header names at all."""
    answer = raw(probe.port, b"GET / HTTP/1.1\r\n:authority: b\r\nHost: a\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 400 ")


def test_h10_h11_addresses_of_ipv4(probe: Probe) -> None:
    """H10 H11"""
    with probe.client() as client:
        own = client.sock.getsockname()
        scope = parsed(client.request("GET", "/"))
    assert (scope["client"], scope["server"]) == (own, ("127.0.0.1", probe.port))


def test_h10_h11_addresses_of_ipv6(probe: Probe) -> None:
    """H10 H11: two items, not the four of the socket."""
    with probe.client(("::1", probe.port6)) as client:
        own = client.sock.getsockname()
        scope = parsed(client.request("GET", "/"))
    assert (scope["client"], scope["server"]) == (own[:2], ("::1", probe.port6))


def test_h10_h11_addresses_of_a_unix_socket(probe: Probe) -> None:
    """H10 H11"""
    scope = probe.scope(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", probe.socket_path)
    assert (scope["client"], scope["server"]) == (None, (probe.socket_path, None))


def test_h12_state_needs_lifespan(probe: Probe, mounted: Probe) -> None:
    """H12"""
    assert "state" in probe.get_scope()
    assert "state" not in mounted.get_scope()


@pytest.mark.parametrize(
    ("target", "path", "query", "host"),
    [
        ("http://b:81/p%20q?x", "/p q", b"x", b"b:81"),
        ("HTTP://b?x=/y", "/", b"x=/y", b"b"),
        ("https://[::1]", "/", b"", b"[::1]"),
    ],
)
def test_h13_absolute_form(probe: Probe, target: str, path: str, query: bytes, host: bytes) -> None:
    """H13: the authority of the target is the host, whatever the field says."""
    scope = probe.scope(f"GET {target} HTTP/1.1\r\nX-A: 1\r\nHost: a\r\n\r\n".encode())
    assert (scope["path"], scope["query_string"]) == (path, query)
    assert [value for name, value in scope["headers"] if name == b"host"] == [host]


@pytest.mark.parametrize("line", ["GET *", "OPTIONS b:80", "GET b:80", "GET a/b", "GET ftp://a/", "GET /a#b"])
def test_h13_other_targets_are_refused(probe: Probe, line: str) -> None:
    """H13: the asterisk is for OPTIONS, an authority for CONNECT."""
    assert raw(probe.port, f"{line} HTTP/1.1\r\nHost: a\r\n\r\n".encode()).startswith(b"HTTP/1.1 400 ")
