"""The strict layer by itself, one rule at a time: P1 to P9, P13, H2, H8, H13, R9 and the limits."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apphost.protocols import strict
from apphost.protocols.base import BadRequest, RequestHead
from apphost.protocols.strict import Limits
from tests.quick_driver import QuickDriver

TOKEN = "!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
NOT_TOKEN = [bytes([byte]) for byte in range(256) if chr(byte) not in TOKEN]
CONTROLS = [bytes([byte]) for byte in (*range(9), *range(10, 32), 127)]  # all but HTAB


def raw_status(head: bytes, limits: Limits | None = None) -> int:
    """What `check_raw` says to a head: 200 for nothing."""
    try:
        strict.check_raw(head, limits or Limits())
    except BadRequest as refusal:
        return refusal.status
    return 200


def partial_status(data: bytes, limits: Limits | None = None, scanned: int = 0) -> int:
    try:
        strict.check_partial(data, scanned, limits or Limits())
    except BadRequest as refusal:
        return refusal.status
    return 200


def head_of(
    *fields: tuple[str, str], method: str = "GET", target: str = "/", version: str = "1.1", host: bool = True
) -> RequestHead:
    headers = [(b"host", b"a")] if host else []
    headers += [(name.encode("latin-1"), value.encode("latin-1")) for name, value in fields]
    return RequestHead(method, target.encode(), version, headers)


def examined(head: RequestHead, underscores: str = "drop") -> RequestHead:
    strict.examine(head, underscores)
    return head


def refused(head: RequestHead, underscores: str = "drop") -> int:
    with pytest.raises(BadRequest) as caught:
        strict.examine(head, underscores)
    return caught.value.status


# -- bytes


@pytest.mark.parametrize(
    "line",
    [
        b"GET / HTTP/1.1",
        b"GET / HTTP/1.0",
        b"get /!~ HTTP/1.1",
        b"!#$%&'*+-.^_`|~09azAZ * HTTP/1.1",
        b"A \x7e HTTP/1.1",
    ],
)
def test_request_lines(line: bytes) -> None:
    """H2 P7"""
    assert raw_status(line + b"\r\nHost: a\r\n\r\n") == 200
    assert strict.check_first_line(line + b"\r\nHost", Limits()).end() == len(line) + 2


@pytest.mark.parametrize(
    ("line", "status"),
    [
        *[(b"GET / HTTP/" + version, 505) for version in (b"0.9", b"1.2", b"2.0", b"9.9", b"0.0")],
        *[(b"GET / " + version, 400) for version in (b"HTTP/1", b"HTTP/1.10", b"http/1.1", b"HTTP/1,1", b"HTTPS/1.1")],
        *[(line, 400) for line in (b"", b"GET", b"GET /", b"GET  / HTTP/1.1", b"GET /  HTTP/1.1", b"GET / HTTP/1.1 ")],
        *[(line, 400) for line in (b" GET / HTTP/1.1", b"GET\t/ HTTP/1.1", b"GET /a b HTTP/1.1", b"GET / HTTP/1.1\r")],
        *[(b"GE" + byte + b"T / HTTP/1.1", 400) for byte in NOT_TOKEN],
        *[(b"GET /" + byte + b" HTTP/1.1", 400) for byte in [*CONTROLS, b"\t", b"\x80", b"\xff"]],
    ],
)
def test_bad_request_lines(line: bytes, status: int) -> None:
    """P5 P7 H6"""
    assert raw_status(line + b"\r\nHost: a\r\n\r\n") == status


@pytest.mark.parametrize(
    "line", [b"a:", b"A: b", b"a:b", b"a: \t b\t ", b"a: \x80\xff", b"a: b: c", TOKEN.encode() + b":"]
)
def test_field_lines(line: bytes) -> None:
    """H8"""
    assert raw_status(b"GET / HTTP/1.1\r\n" + line + b"\r\n\r\n") == 200
    assert strict.is_field_line(line)


@pytest.mark.parametrize(
    "line",
    [
        *[b"a" + byte + b": b" for byte in NOT_TOKEN if byte != b":"],
        *[b"a: " + byte + b"b" for byte in CONTROLS],
        *[b"a: b" + byte for byte in CONTROLS],
        *[b"", b":", b": b", b"a", b" a: b", b"\ta: b", b"a : b", b"a: b\r\n c"],
    ],
)
def test_bad_field_lines(line: bytes) -> None:
    """P5: control bytes, bare CR and LF, folding, space before the colon, an empty name; none of them in a trailer."""
    if line:
        assert raw_status(b"GET / HTTP/1.1\r\nHost: a\r\n" + line + b"\r\n\r\n") == 400
    assert not strict.is_field_line(line)


@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\n", b"\n\r\n", b"\r\r\n\r\n", b"\r\n\r\n\r\n", b"\r\n\rX\r\n"])
def test_bad_ends(end: bytes) -> None:
    """P5"""
    assert raw_status(b"GET / HTTP/1.1\r\nHost: a" + end) == 400


@given(st.binary(max_size=80))
def test_no_bytes_do_any_harm(data: bytes) -> None:
    """P5: what passes is a request line and field lines, each with its CRLF, and nothing else."""
    head = b"GET / HTTP/1.1\r\n" + data + b"\r\n"
    if raw_status(head) == 200:
        assert data == b"" or data.endswith(b"\r\n")
        assert head.count(b"\r") == head.count(b"\n") == head.count(b"\r\n")
        fields = strict.split_fields(head)
        assert len(fields) == data.count(b"\r\n")
        assert all(name and name == name.lower() and value == value.strip(b" \t") for name, value in fields)


# -- limits

SMALL = Limits(request_line=64, fields=3, field_size=64, head=200)


def line_of(size: int) -> bytes:
    return b"GET /" + b"x" * (size - len("GET / HTTP/1.1")) + b" HTTP/1.1\r\n"


def field_of(size: int) -> bytes:
    return b"a: " + b"x" * (size - 3) + b"\r\n"


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (line_of(64) + b"\r\n", 200),
        (line_of(65) + b"\r\n", 414),
        (line_of(64) + field_of(64) + b"\r\n", 200),
        (line_of(64) + field_of(65) + b"\r\n", 431),
        (line_of(20) + field_of(10) + field_of(65) + field_of(10) + b"\r\n", 431),
        (line_of(20) + b"a: b\r\n" * 3 + b"\r\n", 200),
        (line_of(20) + b"a: b\r\n" * 4 + b"\r\n", 431),
        (line_of(20) + b"a:\r\n" * 4 + b"\r\n", 431),
        (b"x" * 65 + b"\r\n\r\n", 414),
        (line_of(65)[:-2].replace(b"/", b"\x01") + b"\r\n\r\n", 414),
    ],
)
def test_limits(head: bytes, status: int) -> None:
    """P8: exactly at the limit is within it."""
    assert raw_status(head, SMALL) == status


def test_the_default_limits_are_those_of_common_servers() -> None:
    """P8"""
    head = line_of(8190) + field_of(8190) + b"a: b\r\n" * 99 + b"\r\n"
    assert raw_status(head) == 200
    assert raw_status(line_of(8191) + b"\r\n") == 414
    assert raw_status(line_of(20) + field_of(8191) + b"\r\n") == 431
    assert raw_status(line_of(20) + b"a: b\r\n" * 101 + b"\r\n") == 431


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"G", 200),
        (b"GET / HT", 200),
        (b"\x16\x03\x01", 400),  # a TLS handshake
        (b" GET", 400),
        (b"\n", 400),
        (b"GET / HTTP/2.0\r\n", 505),
        (b"GET / HTTP/1.1\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\n\r", 200),
        (b"x" * 66, 200),
        (b"x" * 67, 414),
        (line_of(64) + b"a" * 134, 200),
        (line_of(64) + b"a" * 135, 431),
    ],
)
def test_beginnings(data: bytes, status: int) -> None:
    """P5 P7 P8: refused as soon as they can only be wrong, and none grows without bound."""
    assert partial_status(data, SMALL) == status


@given(st.integers(0, 120), st.integers(0, 120))
def test_beginnings_of_a_good_head_are_good(first: int, second: int) -> None:
    """P8 P9: whatever of it an earlier call has seen."""
    head = b"GET /path?query HTTP/1.1\r\nHost: example.org:8000\r\nAccept: */*\r\nCookie: a=b; c=d\r\nX-Empty:\r\n\r\n"
    first, second = sorted((min(first + 1, len(head) - 1), min(second + 1, len(head) - 1)))
    assert partial_status(head[:first]) == 200
    assert partial_status(head[:second], scanned=max(first - 3, 0)) == 200
    assert raw_status(head) == 200


WIDE = Limits(request_line=2**20, fields=2**20, field_size=2**20, head=2**20)
HOSTILE = {
    "one field": lambda n: b"a: " + b"a" * n,
    "one name": lambda n: b"a" * n,
    "spaces, then a bad byte": lambda n: b"a:" + b" " * n + b"\x01",
    "tabs and colons": lambda n: b"a: \t" * (n // 4),
    "colons": lambda n: b":" * n,
    "no colons": lambda n: (b"a" * 30 + b"\r\n") * (n // 32),
    "many fields": lambda n: b"a:\r\n" * (n // 4) + b"b: c",
    "a field many times": lambda n: b"cookie: a\r\n" * (n // 11) + b"b: c",
    "many names": lambda n: b"\r\n".join(b"x%d: y" % number for number in range(n // 10)),
    "carriage returns": lambda n: b"a: " + b"\r" * n,
    "line feeds": lambda n: b"\n" * n,
    "commas in Connection": lambda n: b"connection: " + b"," * n,
    "words in Connection": lambda n: b"connection: " + b"a , " * (n // 4) + b"close",
    "a long coding": lambda n: b"transfer-encoding: " + b"chunked, " * (n // 9),
    "a long length": lambda n: b"content-length: " + b"1" * n,
    "a long expectation": lambda n: b"expect: " + b"100-continue " * (n // 13),
    "a long host": lambda n: b"host: " + b"a." * (n // 2) + b"@",
    "escapes in the host": lambda n: b"host: " + b"%41" * (n // 3) + b"%",
    "an address without end": lambda n: b"host: [" + b"1:" * (n // 2),
    "an address of many parts": lambda n: b"host: [" + b":1" * (n // 2) + b"]",
    "underscores": lambda n: b"_" * n + b": a",
    "offers": lambda n: b"sec-websocket-extensions: " + b"a;b=" * (n // 4),
}
TARGETS = {
    "a long path": lambda n: b"/" + b"a" * n,
    "escapes": lambda n: b"/" + b"%41" * (n // 3) + b"%",
    "an absolute form": lambda n: b"http://" + b"a." * (n // 2) + b"?",
    "a long authority": lambda n: b"http://" + b"%41" * (n // 3) + b"@/",
    "slashes": lambda n: b"http:" + b"/" * n,
    "question marks": lambda n: b"/" + b"?" * n,
    "no target": lambda n: b" " * n,
}
HEADS = {
    **{name: lambda n, make=make: b"GET / HTTP/1.1\r\n%b\r\n\r\n" % make(n) for name, make in HOSTILE.items()},
    **{name: lambda n, make=make: b"GET %b HTTP/1.1\r\nHost: a\r\n\r\n" % make(n) for name, make in TARGETS.items()},
}


def quickest(work: Callable[[], object]) -> float:
    """Seconds of CPU, the least of some runs: what else the machine does can only make one slower."""
    times = []
    for _ in range(5):
        started = time.process_time()
        work()
        times.append(time.process_time() - started)
    return min(times)


@pytest.mark.parametrize("feed", ["whole", "in pieces"])
@pytest.mark.parametrize("kind", HEADS)
def test_time_grows_with_the_head_and_not_with_its_square(kind: str, feed: str) -> None:
    """P8, CVE-2020-5236: eight times the head takes about eight times as long, through all of the connection; with the
    square of it, as with an expression that looks at everything again and again, it were 64 times."""
    driver = QuickDriver("h11")

    def take(size: int) -> float:
        head = HEADS[kind](size)
        step = len(head) if feed == "whole" else 512
        pieces = [head[at : at + step] for at in range(0, len(head), step)]
        return quickest(lambda: driver.run_case([pieces], limits=WIDE))

    take(1024)
    assert take(65536) < 24 * take(8192) + 0.004


# -- fields together


def test_host_is_there_exactly_once() -> None:
    """P1: HTTP/1.0 may do without."""
    examined(head_of())
    examined(head_of(host=False, version="1.0"))
    assert refused(head_of(host=False)) == 400
    for version in ("1.0", "1.1"):
        assert refused(head_of(("host", "b"), version=version)) == 400


@pytest.mark.parametrize(
    "host", ["", "a", "a.b:80", "a:", "127.0.0.1:1", "[::1]:8", "[fe80::1]", "a_b", "a,b", "%41", "[v1.a:b]"]
)
def test_hosts(host: str) -> None:
    """P1"""
    for _ in range(2):  # the second time it is known
        examined(head_of(("host", host), host=False))


@pytest.mark.parametrize(
    "host", ["a b", "a/b", "a@b", "a?b", "a#b", "[::1", "::1", "[x]", "a:b", "a:123456", "%4", "\xe9"]
)
def test_bad_hosts(host: str) -> None:
    """P1"""
    for _ in range(2):
        assert refused(head_of(("host", host), host=False)) == 400


@pytest.mark.parametrize(
    ("fields", "length", "chunked"),
    [
        ([], None, False),
        ([("content-length", "0")], 0, False),
        ([("content-length", "0012")], 12, False),
        ([("content-length", "9" * 19)], int("9" * 19), False),
        ([("transfer-encoding", "chunked")], None, True),
        ([("transfer-encoding", "CHUNKED")], None, True),
    ],
)
def test_framing(fields: list[tuple[str, str]], length: int | None, chunked: bool) -> None:
    """P2 P3 P4 R2"""
    head = examined(head_of(*fields))
    assert (head.content_length, head.chunked, head.has_body) == (length, chunked, bool(length) or chunked)


LENGTHS = ["", " ", "+1", "-1", "1,1", "1, 1", "1 1", "0x1", "1e1", "1.0", "1_0", "a", "\xb2", "1" * 20, "1\x0b", "1;"]
CODINGS = [
    *["", "gzip", "identity", "gzip, chunked", "chunked, gzip", "chunked, chunked", ",chunked", "chunked,"],
    *["chunked;q", "xchunked", "chunked\x0b", "\x0bchunked", "\xa0chunked", "chun ked", '"chunked"'],
]


@pytest.mark.parametrize("length", LENGTHS)
def test_bad_lengths(length: str) -> None:
    """P4"""
    assert refused(head_of(("content-length", length))) == 400


@pytest.mark.parametrize("coding", CODINGS)
def test_bad_codings(coding: str) -> None:
    """P3"""
    assert refused(head_of(("transfer-encoding", coding))) in (400, 501)


@pytest.mark.parametrize(
    "fields",
    [
        [("content-length", "1"), ("content-length", "1")],
        [("content-length", "1"), ("content-length", "2")],
        [("content-length", "1"), ("transfer-encoding", "chunked")],
        [("transfer-encoding", "chunked"), ("content-length", "1")],
        [("transfer-encoding", "chunked"), ("transfer-encoding", "chunked")],
        [("transfer-encoding", "identity"), ("transfer-encoding", "chunked")],
        [("transfer-encoding", "chunked"), ("transfer-encoding", "identity")],
    ],
)
def test_contradictions(fields: list[tuple[str, str]]) -> None:
    """P2 P3 P4"""
    assert refused(head_of(*fields)) in (400, 501)


def test_transfer_encoding_needs_http11() -> None:
    """P3"""
    assert refused(head_of(("transfer-encoding", "chunked"), version="1.0")) == 400


@pytest.mark.parametrize(
    ("version", "value", "keep_alive"),
    [
        ("1.1", None, True),
        ("1.1", "close", False),
        ("1.1", "x ,\tCLOSE", False),
        ("1.1", "closed", True),
        ("1.0", None, False),
        ("1.0", "Keep-Alive", True),
        ("1.0", "keep-alive, close", False),
        ("1.0", "keep", False),
    ],
)
def test_keep_alive(version: str, value: str | None, keep_alive: bool) -> None:
    """S12 S13"""
    fields = [("connection", value)] if value else []
    assert examined(head_of(*fields, version=version)).keep_alive is keep_alive


def test_keep_alive_in_several_fields() -> None:
    """S12"""
    assert not examined(head_of(("connection", "close"), ("connection", "keep-alive"))).keep_alive
    assert not examined(head_of(("connection", "keep-alive"), ("connection", "close"))).keep_alive


@pytest.mark.parametrize(
    ("version", "length", "value", "expect"),
    [
        ("1.1", "4", "100-continue", True),
        ("1.1", "4", "100-Continue", True),
        ("1.1", "0", "100-continue", False),
        ("1.1", None, "100-continue", False),
        ("1.0", "4", "100-continue", False),
        ("1.0", "4", "anything", False),
    ],
)
def test_expect(version: str, length: str | None, value: str, expect: bool) -> None:
    """R9"""
    fields = [("content-length", length)] if length else []
    assert examined(head_of(("expect", value), *fields, version=version)).expect is expect


def test_unknown_expectations_are_refused() -> None:
    """R9"""
    for value in ("", "100", "100-continue, 100-continue", "200-ok"):
        assert refused(head_of(("expect", value))) == 417


def test_underscores() -> None:
    """G3: `X_A` and `X-A` are the same to CGI."""
    fields = (("x_a", "1"), ("x-a", "2"), ("_", "3"))
    assert examined(head_of(*fields)).headers == [(b"host", b"a"), (b"x-a", b"2")]
    assert examined(head_of(*fields), "allow").headers == head_of(*fields).headers
    assert refused(head_of(*fields), "refuse") == 400
    examined(head_of(("x-a", "2")), "refuse")


# -- targets


@pytest.mark.parametrize(
    ("target", "raw_path", "query"),
    [
        ("/", b"/", b""),
        ("/a%2F?b?c", b"/a%2F", b"b?c"),
        ("//a/../?", b"//a/../", b""),
        ("http://b", b"/", b""),
        ("http://b/", b"/", b""),
        ("HTTPS://b:8/c?d", b"/c", b"d"),
        ("http://b?d=/", b"/", b"d=/"),
        ("/http://b", b"/http://b", b""),
    ],
)
def test_targets(target: str, raw_path: bytes, query: bytes) -> None:
    """H5 H6 H13"""
    head = examined(head_of(target=target))
    assert (head.raw_path, head.query, head.target) == (raw_path, query, target.encode())


def test_the_authority_of_the_target_replaces_host() -> None:
    """H13"""
    head = examined(head_of(("x-a", "1"), target="http://b:8/"))
    assert head.headers == [(b"host", b"b:8"), (b"x-a", b"1")]


def test_asterisk() -> None:
    """H13"""
    assert examined(head_of(method="OPTIONS", target="*")).raw_path == b"*"
    assert refused(head_of(target="*")) == 400


BAD_TARGETS = [
    "a",
    "a/b",
    "a:80",
    "?a",
    "*a",
    "/a#b",
    "ftp://a/",
    "http:/a",
    "http://",
    "http:///a",
    "http://a@b/",
    "http://:80/",
]


@pytest.mark.parametrize("target", BAD_TARGETS)
def test_bad_targets(target: str) -> None:
    """H13"""
    for method in ("GET", "OPTIONS"):
        assert refused(head_of(method=method, target=target)) == 400


@pytest.mark.parametrize("target", ["a:80", "/", "http://a/"])
def test_connect(target: str) -> None:
    """P13"""
    assert refused(head_of(method="CONNECT", target=target)) == 501


def test_a_head_that_a_parser_refuses() -> None:
    """H8: as the strict layer itself reads it."""
    raw = b"BREW /pot HTTP/1.0\r\nHOST: a \r\nX:\t\xe9: b\t\r\nx:\r\n\r\n"
    assert strict.check_raw(raw, Limits()) == (b"BREW", b"/pot", b"HTTP/1.0")
    assert strict.check_raw(raw, Limits(field_size=10, request_line=20)) == (b"BREW", b"/pot", b"HTTP/1.0")
    assert strict.split_fields(raw) == [(b"host", b"a"), (b"x", b"\xe9: b"), (b"x", b"")]
