"""The strict layer: what a request must look like before any parser or application may see it.

Two steps, the same for every parser. `check_raw` looks at the bytes of a head; `examine_fields` and `take_target` look
at the parsed head and decide its framing. Parsers are lenient, each in its own way, and a difference in leniency
between two hops is what request smuggling is made of; so whatever one parser would let pass and another would not is
refused here first.

Sources: RFC 9112 (HTTP/1.1 syntax), RFC 9110 (semantics), and the security history of other servers.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, field
from urllib.parse import unquote_to_bytes

from apphost.protocols.base import BadRequest, Fields, Headers, RequestHead

TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"  # RFC 9110, 5.6.2
_VALUE = rb"[\t\x20-\x7e\x80-\xff]*"  # RFC 9110, 5.5: no control byte but HTAB, so no NUL, bare CR or bare LF

_REQUEST_LINE = re.compile(rb"(" + TOKEN + rb") ([!-~]+) (HTTP/[0-9]\.[0-9])\r\n")
_FIELD_LINES = re.compile(rb"(?:" + TOKEN + rb":" + _VALUE + rb"\r\n)*\r\n")
_FIELD_LINE = re.compile(TOKEN + rb":" + _VALUE)
_TOKEN_ONLY = re.compile(TOKEN)

# RFC 3986, 3.2.2: a reg-name (IPv4 is spelt in its alphabet) or an IP literal in brackets; RFC 9110, 7.2: may be empty.
_IP_LITERAL = rb"\[(?:(?P<v6>[0-9A-Fa-f:.]+)|[vV][0-9A-Fa-f]+\.[!$&'()*+,;=\-._~:0-9A-Za-z]+)\]"
_REG_NAME = rb"(?:[!$&'()*+,;=\-._~0-9A-Za-z]|%[0-9A-Fa-f]{2})*"
_HOST = re.compile(rb"(?:" + _IP_LITERAL + rb"|" + _REG_NAME + rb")(?::[0-9]{0,5})?")
_ABSOLUTE = re.compile(rb"(?i:https?)://([^/?]+)(.*)", re.DOTALL)
_DIGITS = re.compile(rb"[0-9]{1,19}")  # 19 digits stay below 2**64, the bound that h11 and llhttp have as well

# As numbers: `in` finds a number in bytes in 0.05 us, bytes of length 1 in 0.3 us.
UNDERSCORE, _NUMBER_SIGN, _SLASH = b"_#/"

METHODS = {method.encode(): method for method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")}
VERSIONS = {b"HTTP/1.0": "1.0", b"HTTP/1.1": "1.1"}

# Those that say where the message ends and what becomes of the connection then; most requests have at most the last.
_FRAMING_FIELDS = frozenset((b"content-length", b"transfer-encoding", b"expect", b"connection"))
_NO_HOST = (400, "exactly one Host field is required")  # RFC 9112, 3.2
_BAD_LENGTH = (400, "the Content-Length is malformed")
_BAD_CODING = (501, "the only transfer coding understood is chunked, once")
_ONLY_ONCE = {b"host": _NO_HOST, b"content-length": _BAD_LENGTH, b"transfer-encoding": _BAD_CODING}

# A whole head that is right, in one look; what does not match is taken apart to find out what is wrong with it.
_match_good_head = re.compile(
    rb"(" + TOKEN + rb") ([!-~]+) (HTTP/1\.[01])\r\n(?:" + TOKEN + rb":" + _VALUE + rb"\r\n)*\r\n"
).fullmatch

_HOSTS: set[bytes] = set()
_HOSTS_MAX = 256  # Host values found well-formed; most servers see a handful, and a client may make them up


@dataclass(frozen=True, slots=True)
class Limits:
    """How much a client may send before anything is known of it; sizes in bytes, 0 for the body: no limit."""

    request_line: int = 8190  # what Apache and gunicorn's upper bound allow
    fields: int = 100  # Apache, gunicorn
    field_size: int = 8190  # Apache, gunicorn; one line without its CRLF
    head: int = 65536  # the most that widely used servers buffer (Node 16 KiB, nginx 32 KiB, Apache about 800 KiB)
    body: int = 0
    chunk_extension: int = 256  # nothing uses them; Go allows 16 bytes on average per chunk
    trailers: int = 8192
    pipelined: int = 65536  # of requests that wait for their turn; then reading pauses
    easy: int = field(init=False)  # a head up to this size can break none of the limits for sizes

    def __post_init__(self) -> None:
        object.__setattr__(self, "easy", min(self.request_line, self.field_size, self.head))


def check_first_line(data: bytes, limits: Limits) -> re.Match[bytes]:
    """Check a request line that is complete in `data`, at its start: the match of it, with method, target and version.

    Raises `BadRequest`: 414 too long, 505 a version other than 1.0 and 1.1, 400 anything else.
    """
    match = _REQUEST_LINE.match(data)
    if match is None:
        if data.find(b"\n") - 1 > limits.request_line:
            raise BadRequest(414, "the request line is too long")
        raise BadRequest(400, "the request line is malformed")
    if match.end() - 2 > limits.request_line:
        raise BadRequest(414, "the request line is too long")
    if match[3] not in VERSIONS:
        raise BadRequest(505, "only HTTP/1.0 and HTTP/1.1 are spoken here")
    return match


def check_raw(head: bytes, limits: Limits) -> tuple[bytes, ...]:
    """Check the bytes of one complete head, up to and including its empty line. The three words of its request line:
    method, target, version. Raises `BadRequest`."""
    if len(head) <= limits.easy and head.count(b"\n") - 2 <= limits.fields:
        good = _match_good_head(head)
        if good is not None:
            return good.groups()
    line = check_first_line(head, limits)
    start = line.end()
    if _FIELD_LINES.fullmatch(head, start) is None:
        raise BadRequest(400, "a header field line is malformed")
    if len(head) - start > limits.field_size and _longest_line(head, start) > limits.field_size:
        raise BadRequest(431, "a header field is too large")
    # The regular expression has seen that every LF ends a line: the request line and the empty line are the other two.
    if head.count(b"\n") - 2 > limits.fields:
        raise BadRequest(431, "too many header fields")
    if len(head) > limits.head:
        raise BadRequest(431, "the request head is too large")
    return line.groups()


def _longest_line(head: bytes, start: int) -> int:
    return max(map(len, head[start:].split(b"\r\n")))


def _check_host(host: bytes | None, modern: bool) -> None:
    """RFC 9112, 3.2: there, and well-formed; an empty one is."""
    if host is None:
        if modern:
            raise BadRequest(*_NO_HOST)
        return
    if not is_host(host):
        raise BadRequest(400, "the Host field is malformed")
    if len(_HOSTS) < _HOSTS_MAX and len(host) < 256:
        _HOSTS.add(host)


def is_host(value: bytes) -> bool:
    """Whether `value` is a host with an optional port, as Host and an authority without user information have it."""
    match = _HOST.fullmatch(value)
    if match is None:
        return False
    if match["v6"] is None:
        return True
    try:
        ipaddress.IPv6Address(match["v6"].decode("ascii"))
    except ValueError:
        return False
    return True


def decode_path(raw_path: bytes) -> str:
    """The path as text: percent-decoded, then UTF-8, with U+FFFD for what is none (the ASGI spec leaves that open)."""
    return unquote_to_bytes(raw_path).decode("utf-8", "replace")


def is_field_line(line: bytes) -> bool:
    """Whether `line`, without its CRLF, is a well-formed field line (for trailers)."""
    return _FIELD_LINE.fullmatch(line) is not None


def split_fields(head: bytes) -> Headers:
    """The fields of a head that `check_raw` has passed, as sent but for the case of names and outer white space.

    For the seldom case that a parser refuses or normalises what must be judged as it was sent. Each parser refuses a
    little that is right (llhttp: methods that it does not know, a tab behind `chunked`) and finds its own fault first
    in what is wrong. So that no answer depends on the parser, a refusal is decided here.
    """
    fields = []
    for line in head.split(b"\r\n")[1:-2]:
        name, _, value = line.partition(b":")
        fields.append((name.lower(), value.strip(b" \t")))
    return fields


def check_partial(data: bytes, scanned: int, limits: Limits) -> None:
    """Check the beginning of a head whose end has not come; `scanned` bytes of it passed an earlier call.

    So nobody waits for a time-out to learn that a head can only be refused, and no head grows without bound.
    """
    first = data.find(b"\n")
    if first < 0:
        if len(data) > limits.request_line + 2:
            raise BadRequest(414, "the request line is too long")
        if scanned == 0 and not _TOKEN_ONLY.match(data):
            raise BadRequest(400, "the request line is malformed")
    elif first >= scanned:
        check_first_line(data, limits)
    lf = data.find(b"\n", max(scanned, 1))
    while lf >= 0:
        if data[lf - 1] != 0x0D:
            raise BadRequest(400, "a header field line is malformed")
        lf = data.find(b"\n", lf + 1)
    if len(data) > limits.head:
        raise BadRequest(431, "the request head is too large")


def examine(head: RequestHead, underscores: str = "drop") -> None:
    """Check what a parsed head means, and fill in all the attributes of `head`. Raises `BadRequest`."""
    fields = examine_fields(head.headers, head.version, underscores)
    head.headers = fields.headers
    head.take(fields)
    take_target(head)


def examine_fields(headers: Headers, version: str, underscores: str = "drop") -> Fields:
    """Check what the fields of a head mean together.

    `underscores` is what happens to fields with `_` in their name ("drop", "refuse", "allow"): once `-` has become `_`
    in CGI variables, `X_Real_Ip` cannot be told from `X-Real-Ip`, which a proxy may have set (CVE-2015-0219).

    Raises `BadRequest`: 400, 417 (expectation), 501 (transfer coding).
    """
    values = dict(headers)
    if len(values) != len(headers):
        values = _join_repeated(headers)
    if underscores != "allow" and UNDERSCORE in b"".join(values):
        headers = _without_underscores(headers, underscores)
    fields = Fields(version, headers)
    host = values.get(b"host")
    if host not in _HOSTS:
        _check_host(host, version == "1.1")
    if not _FRAMING_FIELDS.isdisjoint(values):
        _decide_framing(fields, values)
    return fields


def take_target(head: RequestHead) -> None:
    """Split the target into path and query. Raises `BadRequest`: 400, 501 (CONNECT)."""
    target = head.target
    if target[0] != _SLASH or _NUMBER_SIGN in target or head.method == "CONNECT":
        target = _other_form(head, target)
    head.raw_path, _, head.query = target.partition(b"?")


def _join_repeated(headers: Headers) -> dict[bytes, bytes]:
    """The fields by name, the values of repeated ones joined (RFC 9110, 5.3). Raises `BadRequest` for those that may
    come only once: equal or not, a repetition is how a message gets two meanings."""
    fields: dict[bytes, bytes] = {}
    for name, value in headers:
        if name not in fields:
            fields[name] = value
        elif name in _ONLY_ONCE:
            raise BadRequest(*_ONLY_ONCE[name])
        elif name != b"expect" or fields[name].lower() != value.lower():
            fields[name] += b"," + value
    return fields


def _without_underscores(headers: Headers, underscores: str) -> Headers:
    if underscores == "refuse":
        raise BadRequest(400, "header field names with an underscore are refused")
    return [item for item in headers if b"_" not in item[0]]


def _decide_framing(fields: Fields, values: dict[bytes, bytes]) -> None:
    """RFC 9112, 6.3, without its leniency: one coding, one length, never both. And what depends on the framing."""
    modern = fields.version == "1.1"
    length = values.get(b"content-length")
    coding = values.get(b"transfer-encoding")
    if coding is not None:
        if coding.lower() != b"chunked":
            raise BadRequest(*_BAD_CODING)
        if not modern:
            raise BadRequest(400, "Transfer-Encoding needs HTTP/1.1")
        if length is not None:
            raise BadRequest(400, "Content-Length and Transfer-Encoding exclude each other")
        fields.chunked = True
    elif length is not None:
        if _DIGITS.fullmatch(length) is None:
            raise BadRequest(*_BAD_LENGTH)
        fields.content_length = int(length)
    expect = values.get(b"expect")
    if expect is not None and modern:
        if expect.lower() != b"100-continue":
            raise BadRequest(417, "the only expectation understood is 100-continue")
        fields.expect = fields.chunked or bool(fields.content_length)
    connection = values.get(b"connection")
    if connection is not None:
        fields.keep_alive = _wishes_keep_alive(connection, modern)
        upgrade = values.get(b"upgrade")
        if upgrade is not None:
            fields.asks = b"upgrade" in _words(connection) and b"websocket" in _words(upgrade)


def _words(value: bytes) -> list[bytes]:
    """The members of a list of case-insensitive words (RFC 9110, 5.6.1)."""
    return [word.strip(b" \t").lower() for word in value.split(b",")]


def _wishes_keep_alive(connection: bytes, modern: bool) -> bool:
    if connection == b"keep-alive":  # what browsers say
        return True
    options = _words(connection)
    return b"close" not in options and (modern or b"keep-alive" in options)


def _other_form(head: RequestHead, target: bytes) -> bytes:
    """The path and query of a target that is no plain origin form (RFC 9112, 3.2: there are four forms)."""
    if head.method == "CONNECT":
        raise BadRequest(501, "CONNECT is not supported")
    if b"#" in target:
        raise BadRequest(400, "the request target has a fragment")
    if target == b"*":
        if head.method != "OPTIONS":
            raise BadRequest(400, "the target * is for OPTIONS only")
        return target
    absolute = _ABSOLUTE.fullmatch(target)
    if absolute is None:
        raise BadRequest(400, "the request target is malformed")
    authority, rest = absolute.groups()
    if not is_host(authority) or authority.startswith(b":"):
        raise BadRequest(400, "the authority of the request target is malformed")
    # RFC 9112, 3.2.2: the authority of the target replaces a received Host.
    head.headers = [(b"host", authority), *(item for item in head.headers if item[0] != b"host")]
    return rest if rest.startswith(b"/") else b"/" + rest
