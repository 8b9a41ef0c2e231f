"""What HTTP/1.1 says about some bytes: a slow, plain reading of RFC 9110 and 9112 and of the choices documented for
this server, written without a look at its parsers. It checks the corpus, and judges requests that no human has written.
"""

from __future__ import annotations

import ipaddress
import string
from dataclasses import dataclass, field

REQUEST_LINE = FIELD_LINE = 8190
FIELDS = 100
HEAD = 65536
EXTENSION = 256
TRAILERS = 8192

_TOKEN = frozenset(b"!#$%&'*+-.^_`|~" + string.ascii_letters.encode() + string.digits.encode())
_DIGITS = frozenset(string.digits.encode())
_HEX = frozenset(string.hexdigits.encode())
_VALUE = frozenset([9, *range(0x20, 0x7F), *range(0x80, 0x100)])
_REG_NAME = frozenset(b"-._~!$&'()*+,;=" + string.ascii_letters.encode() + string.digits.encode())


@dataclass
class Request:
    method: bytes
    target: bytes  # origin-form or *
    version: bytes
    fields: list[tuple[bytes, bytes]]
    body: bytes = b""


@dataclass
class Verdict:
    """`served` requests, then at most one that is not: `started` when only its body is wrong or missing.

    `statuses`: every answer that is right for the refusal; a server finds faults in its own order. `unsure`: the bytes
    end within a line that a server may refuse now or after more of it. `closed`: nothing more is read.
    """

    served: list[Request] = field(default_factory=list)
    started: Request | None = None
    statuses: set[int] = field(default_factory=set)
    closed: bool = False
    waits: bool = False
    unsure: bool = False


class _Incomplete(Exception):
    """`statuses`: of a refusal that a server may give although more could come."""

    def __init__(self, *statuses: int) -> None:
        super().__init__(*statuses)
        self.statuses = set(statuses)


class _Wrong(Exception):
    def __init__(self, *statuses: int) -> None:
        super().__init__(*statuses)
        self.statuses = set(statuses)


def judge(data: bytes, max_body: int = 0) -> Verdict:
    """The verdict on everything that a client sends on one connection."""
    verdict = Verdict()
    while True:
        while data.startswith(b"\r\n"):
            data = data[2:]
        if not data:
            return verdict
        end = data.find(b"\r\n\r\n")
        if end < 0:
            return _judge_unfinished(verdict, data)
        lines, rest = data[:end].split(b"\r\n"), data[end + 4 :]
        faults, request = _judge_head(lines, end + 4)
        declared = _first(request, b"content-length") if request else None
        if max_body and declared and declared.isdigit() and int(declared) > max_body:
            faults.add(413)
        if faults or request is None:
            verdict.statuses, verdict.closed = faults, True
            return verdict
        verdict.started = request
        try:
            data = _take_body(request, rest, max_body)
        except _Incomplete as unfinished:
            verdict.statuses = unfinished.statuses
            verdict.waits, verdict.unsure = True, bool(unfinished.statuses)
            return verdict
        except _Wrong as wrong:
            verdict.statuses, verdict.closed = wrong.statuses, True
            return verdict
        verdict.started = None
        verdict.served.append(request)
        if not _keeps_alive(request):
            verdict.closed = True
            return verdict


def _judge_unfinished(verdict: Verdict, data: bytes) -> Verdict:
    lines = data.split(b"\r\n")
    if len(lines[0]) > REQUEST_LINE + 1:
        verdict.statuses.add(414)
    if any(len(line) > FIELD_LINE + 1 for line in lines[1:]) or len(data) > HEAD or len(lines) > FIELDS + 3:
        verdict.statuses.add(431)
    verdict.waits = verdict.unsure = True
    verdict.statuses |= {400, 505}
    return verdict


def _judge_head(lines: list[bytes], size: int) -> tuple[set[int], Request | None]:
    faults: set[int] = set()
    if len(lines[0]) > REQUEST_LINE:
        faults.add(414)
    if any(len(line) > FIELD_LINE for line in lines[1:]) or len(lines) - 1 > FIELDS or size > HEAD:
        faults.add(431)
    words = lines[0].split(b" ")
    if len(words) != 3 or not _is_token(words[0]) or not words[1] or any(not 0x21 <= b <= 0x7E for b in words[1]):
        return faults | {400}, None
    method, target, version = words
    name, slash, number = version.partition(b"/")
    if name != b"HTTP" or not slash or len(number) != 3 or number[1:2] != b"." or not {number[0], number[2]} <= _DIGITS:
        return faults | {400}, None
    if number not in (b"1.0", b"1.1"):
        return faults | {505, 400}, None
    fields = []
    for line in lines[1:]:
        key, colon, value = line.partition(b":")
        if not colon or not _is_token(key) or not _VALUE.issuperset(value):
            faults.add(400)
        elif b"_" not in key:
            fields.append((key.lower(), value.strip(b"\t ")))
    request = Request(method, target, number, fields)
    for check in (_check_host, _check_framing, _check_expect, _check_target):
        faults |= check(request)
    return faults, request


def _is_token(data: bytes) -> bool:
    return bool(data) and _TOKEN.issuperset(data)


def _all(request: Request, name: bytes) -> list[bytes]:
    return [value for key, value in request.fields if key == name]


def _first(request: Request, name: bytes) -> bytes | None:
    return next(iter(_all(request, name)), None)


def _check_host(request: Request) -> set[int]:
    hosts = _all(request, b"host")
    if len(hosts) > 1 or (not hosts and request.version == b"1.1"):
        return {400}
    return set() if not hosts or hosts == [b""] or is_authority(hosts[0]) else {400}


def is_authority(data: bytes) -> bool:
    """Whether `data` is uri-host [":" port] (RFC 3986, 3.2.2), the host may be empty."""
    if data.startswith(b"["):
        inside, bracket, port = data[1:].partition(b"]")
        return bool(bracket) and _is_ip_literal(inside.decode("latin-1")) and _is_port(port)
    host, colon, digits = data.partition(b":")
    position = 0
    while position < len(host):
        if host[position : position + 1] == b"%":
            if len(host) < position + 3 or not _HEX.issuperset(host[position + 1 : position + 3]):
                return False
            position += 3
        elif host[position] in _REG_NAME:
            position += 1
        else:
            return False
    return _is_port(colon + digits)


def _is_port(data: bytes) -> bool:
    return not data or (data.startswith(b":") and _DIGITS.issuperset(data[1:]) and len(data) <= 6)


def _is_ip_literal(text: str) -> bool:
    if text[:1] in ("v", "V"):
        number, dot, rest = text[1:].partition(".")
        alphabet = _REG_NAME | {0x3A}
        return bool(number and dot and rest) and _HEX.issuperset(number.encode()) and alphabet.issuperset(rest.encode())
    try:
        ipaddress.IPv6Address(text)
    except ValueError:
        return False
    return "%" not in text


def _check_framing(request: Request) -> set[int]:
    codings, lengths = _all(request, b"transfer-encoding"), _all(request, b"content-length")
    faults = set()
    if codings and (len(codings) > 1 or codings[0].lower() != b"chunked"):
        faults.add(501)
    if codings and (lengths or request.version == b"1.0"):
        faults.add(400)
    if len(lengths) > 1 or any(not value or len(value) > 19 or not _DIGITS.issuperset(value) for value in lengths):
        faults.add(400)
    return faults


def _check_expect(request: Request) -> set[int]:
    expectations = _all(request, b"expect")
    if request.version == b"1.0" or all(value.lower() == b"100-continue" for value in expectations):
        return set()
    return {417}


def _check_target(request: Request) -> set[int]:
    target = request.target
    if request.method == b"CONNECT":
        return {501}
    if b"#" in target:
        return {400}
    if target.startswith(b"/"):
        return set()
    if target == b"*":
        return set() if request.method == b"OPTIONS" else {400}
    scheme, mark, rest = target.partition(b"://")
    if not mark or scheme.lower() not in (b"http", b"https"):
        return {400}
    end = min((rest + b"/").index(b"/"), (rest + b"?").index(b"?"))
    authority, path = rest[:end], rest[end:]
    if not authority or authority.startswith(b":") or not is_authority(authority):
        return {400}
    request.target = path if path.startswith(b"/") else b"/" + path
    request.fields = [(b"host", authority), *(item for item in request.fields if item[0] != b"host")]
    return set()


def _keeps_alive(request: Request) -> bool:
    options = [word.strip(b"\t ").lower() for word in b",".join(_all(request, b"connection")).split(b",")]
    return b"close" not in options and (request.version == b"1.1" or b"keep-alive" in options)


# -- bodies


def _take_body(request: Request, data: bytes, max_body: int) -> bytes:
    """Put the body into `request`, as far as it goes; what follows it."""
    if not _all(request, b"transfer-encoding"):
        size = int(_first(request, b"content-length") or b"0")
        request.body = data[:size]
        if len(data) < size:
            raise _Incomplete
        return data[size:]
    while True:
        line, data = _line(data, 16 + 1 + EXTENSION)
        digits, _, extension = line.partition(b";")
        if not 1 <= len(digits) <= 16 or not _HEX.issuperset(digits) or not _VALUE.issuperset(extension):
            raise _Wrong(400)
        if len(extension) >= EXTENSION:
            raise _Wrong(400, 413)
        size = int(digits, 16)
        if not size:
            return _take_trailers(data)
        if max_body and len(request.body) + size > max_body:
            raise _Wrong(413)
        request.body += data[:size]
        after, data = data[size : size + 2], data[size + 2 :]
        if not b"\r\n".startswith(after):
            raise _Wrong(400)
        if len(after) < 2:
            raise _Incomplete


def _take_trailers(data: bytes) -> bytes:
    room = TRAILERS
    while True:
        line, data = _line(data, room)
        if not line:
            return data
        room -= len(line) + 2
        name, colon, value = line.partition(b":")
        if room < 0:
            raise _Wrong(400, 431)
        if not colon or not _is_token(name) or not _VALUE.issuperset(value):
            raise _Wrong(400, 431)


def _line(data: bytes, bound: int) -> tuple[bytes, bytes]:
    """A line without its CRLF, and what follows. A server may refuse an unfinished line that cannot become good."""
    line, lf, rest = data.partition(b"\n")
    if not lf:
        if len(data) > bound + 2:
            raise _Wrong(400, 413, 431)
        raise _Incomplete(400, 413, 431)
    if not line.endswith(b"\r"):
        raise _Wrong(400, 413, 431)
    return line[:-1], rest
