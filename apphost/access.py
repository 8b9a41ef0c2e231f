"""The access log: formats, which are compiled once, and the writer that gathers the lines of a turn of the loop.

A format is `common`, `combined`, `json`, or a template in the notation that gunicorn and hypercorn share, `%(h)s`: each
field has a long name, and the letter that it has there. What a client has sent is escaped once, where it enters a line.
Not on top of `logging`; see `logs`.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Sequence
from json.encoder import encode_basestring_ascii
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeAlias

from apphost.errors import nearest
from apphost.logs import PATIENCE, Log, Outlet, escape, query_hidden, show_raw

if TYPE_CHECKING:
    import asyncio

    from apphost.protocols.exchange import Exchange
    from apphost.protocols.http1 import Connection

# Requests whose lines are written without waiting for the end of the loop's turn: 12 KiB of our own format, and as many
# long targets are 1 MiB.
GATHERED = 128

# A finished request: exchange, duration in seconds, whether the response was cut short.
Finished: TypeAlias = "tuple[Any, float, bool]"
# Requests to their lines, without ends.
Format: TypeAlias = "Callable[[list[Finished]], list[str]]"

_COMMON = '%(h)s %(l)s %(u)s %(t)s "%(r)s" %(s)s %(b)s'
_NAMED = {"common": _COMMON, "combined": _COMMON + ' "%(f)s" "%(a)s"'}
_AUTO = '%(h)s - - %(t)s "%(r)s" %(s)s %(B)s %(L)s%( tail)s'
NAMES = ("auto", *_NAMED, "json")

# What a field is: its conversion, and the expression for its value. In an expression, `e` is the exchange, `d` the
# duration, `cut` whether the response is incomplete, `stamp` and `iso` the time of writing, `f` the `_Fields`. The long
# name, then aliases. 499 is nginx's code for a client that left before it got an answer.
_TABLE: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (("client", "h"), "%s", "e.client[0] if e.client else '-'"),
    (("user", "u", "l"), "%s", "'-'"),
    (("t",), "%s", "stamp"),
    (("time",), "%s", "iso"),
    (("request", "r"), "%s", "f.request(e.head)"),
    (("method", "m"), "%s", "e.head.method"),
    (("target",), "%s", "quoted(f.show(e.head.target))"),
    (("path", "U"), "%s", "quoted(e.head.raw_path.decode('latin-1'))"),
    (("query", "q"), "%s", "f.query(e.head)"),
    (("protocol", "H"), "%s", "protocol(e.head)"),
    (("scheme",), "%s", "e.scheme"),
    (("status", "s"), "%s", "e.status or 499"),
    (("bytes", "B"), "%s", "e.sent"),
    (("b",), "%s", "e.sent or '-'"),
    (("duration", "L"), "%.6f", "d"),
    (("T",), "%d", "d"),
    (("M",), "%d", "d * 1e3"),
    (("D",), "%d", "d * 1e6"),
    (("queue",), "%s", "seconds(queue(e))"),
    (("host",), "%s", "header(e.head, b'host')"),
    (("referer", "f"), "%s", "quoted(f.referer(e.head) or '-')"),
    (("user_agent", "a"), "%s", "header(e.head, b'user-agent')"),
    (("request_id",), "%s", "getattr(e, 'request_id', None) or '-'"),
    (("worker",), "%s", "f.origin.worker"),
    (("generation",), "%s", "f.origin.generation"),
    (("pid",), "%s", "f.origin.pid"),
    (("p",), "%s", "f'<{f.origin.pid}>'"),
    (("cut",), "%s", "'cut' if cut else '-'"),
    ((" tail",), "%s", "' cut' if cut else ''"),  # of our own format: no template can name it
)
# The same for `json`: the key, the conversion, the expression.
_JSON = (
    ("time", '"%s"', "iso"),
    ("client", "%s", "string(e.client[0]) if e.client else '\"-\"'"),
    ("method", "%s", "string(e.head.method)"),
    ("target", "%s", "string(f.show(e.head.target))"),
    ("version", '"%s"', "e.head.version"),
    ("status", "%d", "e.status or 499"),
    ("bytes", "%d", "e.sent"),
    ("duration", "%.6f", "d"),
    ("cut", "%s", "'true' if cut else 'false'"),
    ("queue", "%s", "seconds(queue(e), 'null')"),
    ("scheme", '"%s"', "e.scheme"),
    ("host", "%s", "string(values(e.head, b'host'))"),
    ("referer", "%s", "string(f.referer(e.head))"),
    ("user_agent", "%s", "string(values(e.head, b'user-agent'))"),
    ("request_id", "%s", "string(getattr(e, 'request_id', None))"),
    ("worker", "%d", "f.origin.worker"),
    ("generation", "%d", "f.origin.generation"),
    ("pid", "%d", "f.origin.pid"),
)
FIELDS = {name: (conversion, value) for names, conversion, value in _TABLE for name in names}
_PLACE = re.compile(r"%(?:%|\(([^)]*)\)s|(.?))", re.DOTALL)
_HEADER = re.compile(r"\{([!#$%&'*+.^_`|~0-9A-Za-z-]+)\}i")
_UNSAFE = re.compile(r"[^ !#-\[\]-~]")  # all but printable ASCII, and of that the quote and the backslash


class Origin(NamedTuple):
    """Whose lines they are."""

    worker: int = 0
    generation: int = 0
    pid: int = 0


def check_format(text: str) -> str:
    """The format as it is when it can be compiled. Raises `ValueError` that says what is wrong with it."""
    if text not in NAMES:
        _parse(text)
    return text


def needs_queue(text: str) -> bool:
    """Whether lines of this format tell how long a request has waited for its application to be called."""
    return text == "json" or (text not in NAMES and any(field == "queue" for _, field in _parse(text)))


def resolve(text: str, style: str) -> str:
    """The format that is meant: `auto` is `json` where the server's own log is JSON (`style`)."""
    return "json" if text == "auto" and style == "json" else text


def _parse(template: str) -> list[tuple[str, str]]:
    """(text in front, name of the field), at the end one with the rest and no field. Raises `ValueError`."""
    if not template.replace("\t", "").isprintable():
        raise ValueError("expected a format for one line, without control characters")
    parts: list[tuple[str, str]] = []
    literal, position = "", 0
    for match in _PLACE.finditer(template):
        literal += template[position : match.start()]
        position = match.end()
        name = match[1]
        if match[0] == "%%":
            literal += "%"
            continue
        if name is None:
            raise ValueError(f"expected fields such as %(h)s, and %% for a percent sign, not {match[0]!r}")
        if (name not in FIELDS or name == " tail") and _HEADER.fullmatch(name) is None:
            known = nearest(name, (each for each in FIELDS if len(each) > 1))
            raise ValueError(f"there is no field %({name})s.{known} Header fields of the request are %({{name}}i)s")
        parts.append((literal, name))
        literal = ""
    if not parts:
        known = nearest(template, NAMES)
        raise ValueError(f"expected one of {', '.join(NAMES)}, or a template with fields such as %(h)s.{known}")
    return [*parts, (literal + template[position:], "")]


def compile_format(text: str, origin: Origin) -> Format:
    """One function that makes the lines of finished requests. Raises `ValueError`; see `check_format`."""
    fields = _Fields(origin)
    if text == "json":
        template = "{" + ", ".join(f'"{key}": {conversion}' for key, conversion, _ in _JSON) + "}"
        return _make(fields, template, [value for _, _, value in _JSON])
    if text == "auto":
        names = re.findall(r"%\(([^)]*)\)s", _AUTO)
        parts = [*zip(re.split(r"%\([^)]*\)s", _AUTO), [*names, ""], strict=True)]
    else:
        parts = _parse(_NAMED.get(text, text))
    template, values = "", []
    for literal, name in parts:
        conversion, value = FIELDS.get(name, ("%s" if name else "", _header_value(name)))
        template += literal.replace("%", "%%") + conversion
        values += [value] if name else []
    return _make(fields, template, values)


def _make(fields: _Fields, template: str, values: list[str]) -> Format:
    """The function that fills the template with the values of the expressions, for each request."""
    # One expression, as a chain of calls would take twice as long. Its text comes from the table above, and from names
    # of header fields as literals of bytes; the template is a value.
    code = f"lambda finished, stamp, iso: [template % ({', '.join(values)},) for e, d, cut in finished]"
    names = {"f": fields, "template": template, "quoted": quoted, "header": header, "protocol": protocol,
             "queue": queue, "seconds": seconds, "string": string, "values": _values, "getattr": getattr,
             "__builtins__": {}}  # fmt: skip
    fill: Callable[[list[Finished], str, str], list[str]] = eval(code, names)  # noqa: S307
    return lambda finished: fill(finished, *fields.now())


def _header_value(name: str) -> str:
    match = _HEADER.fullmatch(name)
    return f"header(e.head, {match[1].lower().encode()!r})" if match is not None else ""


def quoted(text: str) -> str:
    """`text` as it may stand between quotes in a line: printable ASCII, with anything else as `\\xNN`, as Apache and
    nginx write it. `text` is of latin-1: bytes of a client."""
    return _UNSAFE.sub(_as_hex, text) if _UNSAFE.search(text) is not None else text


def _as_hex(match: re.Match[str]) -> str:
    return f"\\x{ord(match[0]):02x}"


def _values(head: Any, name: bytes) -> str | None:
    found: bytes | None = None
    for key, value in head.headers:
        if key == name:
            found = value if found is None else found + b", " + value
    return found.decode("latin-1") if found is not None else None


def header(head: Any, name: bytes) -> str:
    """The values of a request header field, `-` for none."""
    text = _values(head, name)
    return quoted(text) if text else "-"


def protocol(head: Any) -> str:
    return "HTTP/" + head.version if head.version != "-" else "-"


def queue(exchange: Any) -> float | None:
    """Seconds from the head of the request to the call of the application; None when it was not called."""
    called: float = getattr(exchange, "called_at", 0.0)
    return max(0.0, called - exchange.started_at) if called else None


def seconds(value: float | None, none: str = "-") -> str:
    return none if value is None else f"{value:.6f}"


def string(text: str | None) -> str:
    """`text` in JSON. That may hold DEL as it is, which to a terminal is a control as well."""
    return "null" if text is None else encode_basestring_ascii(text).replace("\x7f", "\\u007f")


class _Fields:
    """The values that are made of more than the exchange."""

    def __init__(self, origin: Origin) -> None:
        self.origin = origin
        self.show = show_raw()
        self._hides = query_hidden()
        self._second = -1
        self._stamp = self._iso = ""

    def now(self) -> tuple[str, str]:
        """The second as the Common Log Format has it, and in ISO 8601."""
        now = int(time.time())
        if now != self._second:
            self._second = now
            self._stamp = time.strftime("[%d/%b/%Y:%H:%M:%S %z]", time.localtime(now))
            self._iso = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now))
        return self._stamp, self._iso

    def request(self, head: Any) -> str:
        if head.version == "-":
            return "-"
        target = self.show(head.target)
        if '"' in target or "\\" in target:  # the strict layer has seen to the rest: it is visible ASCII
            target = quoted(target)
        return f"{head.method} {target} HTTP/{head.version}"

    def query(self, head: Any) -> str:
        return ("..." if head.query else "") if self._hides else quoted(head.query.decode("latin-1"))

    def referer(self, head: Any) -> str | None:
        """It is often another URL of this site, with a query string."""
        text = _values(head, b"referer")
        if text is None or not self._hides:
            return text
        url, question, _ = text.partition("?")
        return url + ("?..." if question else "")


class _NoHead:
    """In place of the head of a request that could not be understood."""

    method = version = "-"
    target = raw_path = b"-"
    query = b""
    headers: Sequence[tuple[bytes, bytes]] = ()


class _Refused:
    """In place of the exchange of such a request."""

    head = _NoHead
    sent = 0
    started_at = 0.0

    def __init__(self, connection: Connection, status: int) -> None:
        self.client = connection.client
        self.scheme = connection.scheme
        self.status = status


class Sink(Protocol):
    """Where lines go. `write` takes whole lines without their ends; it must neither block for long nor raise."""

    def write(self, lines: list[str]) -> None: ...


class FileSink:
    """A descriptor; the lines of a turn in one write, so that those of many processes do not mix."""

    def __init__(self, fd: int, log: Log) -> None:
        """`log`: the server's own, which is told of lines that were dropped."""
        self._outlet = Outlet(fd)
        self._log = log

    def write(self, lines: list[str]) -> None:
        lost = self._outlet.take_lost()
        if lost:
            self._log.warning(
                f"{lost} lines of the access log were dropped: nobody read it for more than {PATIENCE:g} s"
            )
        lines.append("")
        self._outlet.write("\n".join(lines).encode("utf-8", "backslashreplace"), len(lines) - 1)
        lines.pop()


class AccessLog:
    """One line a request. What is finished during a turn of the loop is written at once after it. Event loop only."""

    def __init__(self, sinks: Sequence[Sink], form: Format, loop: asyncio.AbstractEventLoop) -> None:
        self._sinks = sinks
        self._format = form
        self._loop = loop
        self._finished: list[Finished] = []

    def write(self, exchange: Exchange, cut: bool = False) -> None:
        """Note a finished exchange; `cut`: its response is incomplete."""
        self._add(exchange, time.perf_counter() - exchange.started_at, cut)

    def write_refusal(self, connection: Connection, status: int) -> None:
        """Note a request that was refused before it could be understood."""
        self._add(_Refused(connection, status), 0.0, False)

    def _add(self, exchange: Exchange | _Refused, duration: float, cut: bool) -> None:
        finished = self._finished
        if not finished:
            self._loop.call_soon(self.flush)
        finished.append((exchange, duration, cut))
        if len(finished) == GATHERED:
            self.flush()

    def flush(self) -> None:
        finished = self._finished
        if finished:
            self._finished = []
            lines = self._format(finished)
            for sink in self._sinks:
                sink.write(lines)


def describe_error(exc: OSError) -> str:
    return escape(exc.strerror or os.strerror(exc.errno or 0))
