"""The request corpus: loads `tests/data/*.txt` (format: `tests/data/README.md`), makes the mutations of the framing
fields, cuts requests into pieces, and says what is wrong with an `Outcome`. `tests/corpus_driver.py` feeds a server.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

DATA = Path(__file__).parent / "data"
SWEEP_FILE = "te_cl_sweep.txt"

SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: smuggled\r\n\r\n"
NEXT = b"GET /next HTTP/1.1\r\nHost: next\r\n\r\n"

Headers = list[tuple[bytes, bytes]]


@dataclass
class Seen:
    """A request as the application saw it. `complete`: its body ended well, or was not asked for."""

    method: str
    target: bytes  # raw path, and "?" and the query when there is one
    version: str
    headers: Headers = field(default_factory=list)
    body: bytes = b""
    path: str = ""
    scheme: str = ""
    complete: bool = False


@dataclass
class Response:
    status: int
    headers: Headers
    body: bytes

    def all(self, name: bytes) -> list[bytes]:
        return [value for key, value in self.headers if key == name]


@dataclass
class Outcome:
    """What a server made of some bytes. `closed` is its state before the client left, `ended` after that."""

    requests: list[Seen]
    responses: list[Response]
    closed: bool
    ended: bool
    aborted: bool = False  # a reset, which may take the last answer with it
    interim: int = 0  # number of 100 (Continue) among the responses; they are not in `responses`
    fault: str = ""  # a malformed response, an exception out of the protocol

    @property
    def statuses(self) -> list[int]:
        return [response.status for response in self.responses]

    def comparable(self) -> object:
        """What two parsers must have in common: everything but how far a doomed request got."""
        done = [
            (r.method, r.target, r.version, r.headers, r.body, r.path, r.scheme) for r in self.requests if r.complete
        ]
        return done, self.statuses, [r.body for r in self.responses], self.closed, self.ended, self.aborted, self.fault


@dataclass(frozen=True)
class Expected:
    """A request as the application must see it."""

    method: str
    target: bytes
    version: str
    headers: tuple[tuple[bytes, tuple[bytes, ...]], ...] = ()  # all values of a name; none: absent
    body: bytes = b""
    path: str | None = None
    scheme: str | None = None

    def problems(self, seen: Seen, *, body: bool = True) -> Iterator[str]:
        path, _, query = self.target.partition(b"?")
        target = path + b"?" + query if query else path  # an empty query cannot be told from none in a scope
        for name, wanted, got in (
            ("method", self.method, seen.method),
            ("target", target, seen.target),
            ("version", self.version, seen.version),
            ("path", seen.path if self.path is None else self.path, seen.path),
            ("scheme", seen.scheme if self.scheme is None else self.scheme, seen.scheme),
            *((k.decode(), list(v), [w for n, w in seen.headers if n == k]) for k, v in self.headers),
        ):
            if wanted != got:
                yield f"{name}: expected {wanted!r}, got {got!r}"
        if body and seen.body != self.body:
            yield f"body: expected {self.body[:80]!r} ({len(self.body)}), got {seen.body[:80]!r} ({len(seen.body)})"
        if not body and not self.body.startswith(seen.body):
            yield f"partial body: expected a beginning of {self.body[:80]!r}, got {seen.body[:80]!r}"


@dataclass(frozen=True)
class Case:
    """Bytes and what a server must make of them."""

    id: str
    segments: tuple[bytes, ...]  # the server settles between two of them
    accepts: tuple[Expected, ...] = ()
    partial: Expected | None = None  # may reach the application, but never completely
    statuses: frozenset[int] = frozenset()  # of the refusal; empty: none
    end: str = "open"  # open, closed, either, wait
    covers: tuple[str, ...] = ()
    app: str = "echo"
    eof: bool = False
    interim: str = "never"
    max_body: int = 0
    file: str = ""

    @property
    def data(self) -> bytes:
        return b"".join(self.segments)

    def fed(self) -> tuple[bytes, ...]:
        """The segments with the second request that shows whether the framing was right."""
        if self.end == "wait" or self.eof:
            return self.segments
        return (*self.segments[:-1], self.segments[-1] + (NEXT if self.end in ("open", "either") else SMUGGLED))


# -- loading


class CorpusError(Exception):
    """The corpus itself is wrong."""


_REPEAT = re.compile(r"\\\{(.*?)\*(\d+)\}")
_ESCAPE = re.compile(rb"\\(?:x([0-9a-f]{2})|(.?))")
_PLAIN = {b"r": b"\r", b"n": b"\n", b"t": b"\t", b"s": b" ", b"\\": b"\\"}
_OPTIONS = {"app", "eof", "interim", "max_body"}
_ENDS = {"", "open", "closed", "either", "wait"}
_CHECK = re.compile(r"([^ :]+)( = | absent|: ?)(.*)")
_REQUEST = re.compile(r"([^ ]+) ([^ ]+) (1\.[01])")


def unescape(text: str) -> bytes:
    """The bytes that a line of the corpus stands for."""

    def plain(match: re.Match[bytes]) -> bytes:
        if match[1] is not None:
            return bytes.fromhex(match[1].decode())
        if match[2] not in _PLAIN:
            raise CorpusError(f"unknown escape in {text!r}")
        return _PLAIN[match[2]]

    text = _REPEAT.sub(lambda match: match[1] * int(match[2]), text)
    return _ESCAPE.sub(plain, text.encode("latin-1"))


def load(path: Path) -> list[Case]:
    """The cases of one file."""
    cases: list[Case] = []
    block: list[str] = []
    for line in [*path.read_text("ascii").split("\n"), "=="]:
        if line.startswith("=="):
            if block:
                try:
                    cases.append(_case(block, path.stem))
                except (ValueError, KeyError, CorpusError) as exc:
                    raise CorpusError(f"{path.name}: {block[0]}: {exc}") from exc
            block = [line]
        elif block and line:
            block.append(line)
    return cases


def load_all() -> list[Case]:
    return [case for path in sorted(DATA.glob("*.txt")) if path.name != SWEEP_FILE for case in load(path)]


def _case(block: list[str], file: str) -> Case:
    name, covers = block[0][2:].split(" : ")
    segments = [b""]
    options: dict[str, str] = {}
    requests: dict[str, list[tuple[str, list[str]]]] = {"<": [], "~": []}
    statuses: list[int] = []
    end = ""
    for line in block[1:]:
        mark, _, text = line.partition(" ")
        if mark in (">", ">>"):
            segments[-1] += unescape(text) + (b"\r\n" if mark == ">" else b"")
        elif mark == "...":
            segments.append(b"")
        elif mark == "@":
            options.update((name, value) for name, _, value in (item.partition("=") for item in text.split()))
        elif mark in requests:
            if text.startswith("  "):
                requests[mark][-1][1].append(text[2:])
            else:
                requests[mark].append((text, []))
        elif mark == "!":
            statuses = [int(word) for word in text.split()]
        elif mark == ".":
            end = text
        elif mark not in ("--", "#"):
            raise CorpusError(f"unknown mark {mark!r}")
    if statuses and end:
        raise CorpusError("a refusal always closes")
    if unknown := (set(options) - _OPTIONS) | ({end} - _ENDS):
        raise CorpusError(f"unknown: {unknown}")
    partial = [_expected(*item) for item in requests["~"]]
    return Case(
        id=name.strip(),
        segments=tuple(segments),
        accepts=tuple(_expected(*item) for item in requests["<"]),
        partial=partial[0] if partial else None,
        statuses=frozenset(statuses),
        end="closed" if statuses else end or "open",
        covers=tuple(covers.split()),
        app=options.get("app", "echo"),
        eof=options.get("eof", "no") == "yes",
        interim=options.get("interim", "never"),
        max_body=int(options.get("max_body", "0")),
        file=file,
    )


def _expected(line: str, checks: list[str]) -> Expected:
    target_line = unescape(line).decode("latin-1")
    match = _REQUEST.fullmatch(target_line)
    if match is None:
        raise CorpusError(f"bad request {line!r}")
    method, target, version = match.groups()
    headers: dict[bytes, tuple[bytes, ...]] = {}
    more: dict[str, str] = {}
    body = b""
    for check in checks:
        found = _CHECK.fullmatch(check)
        if found is None:
            raise CorpusError(f"bad check {check!r}")
        name, sign, value = found[1], found[2], found[3]
        if sign == " = " and name == "body":
            body = unescape(value)
        elif sign == " = ":
            more[name] = unescape(value).decode("utf-8")
        elif sign == " absent":
            headers[name.encode()] = ()
        else:
            headers[name.encode()] = (*headers.get(name.encode(), ()), unescape(value))
    return Expected(method, target.encode("latin-1"), version, tuple(headers.items()), body, **more)


# -- mutations of the framing fields


@dataclass(frozen=True)
class Row:
    """A row of the sweep table; see the head of `tests/data/te_cl_sweep.txt`."""

    kind: str
    id: str
    template: str
    values: tuple[int, ...]
    verdict: str
    why: str

    def fields(self) -> Iterator[tuple[str, bytes]]:
        """Each mutation: its name, and the bytes of its lines without the last CRLF."""
        plain = unescape(self.template).replace(b"{n}", b"%d" % len(SMUGGLED))
        for byte in self.values:
            yield f"{self.kind}-{self.id}-{byte:02x}", plain.replace(b"{b}", bytes([byte]))
        if not self.values:
            yield f"{self.kind}-{self.id}", plain

    def cases(self) -> Iterator[Case]:
        for name, line in self.fields():
            for probe, case in enumerate(_PROBES[self.kind](line, self.verdict)):
                yield Case(id=f"{name}-{probe}", covers=("P2", "P3", "P4", "P5"), file="sweep", **case)  # type: ignore[arg-type]


def load_sweep() -> list[Row]:
    rows = []
    for line in (DATA / SWEEP_FILE).read_text("ascii").splitlines():
        if line and not line.startswith("#"):
            kind, name, template, ranges, verdict, why = (part.strip(" ") for part in line.split(" | "))
            rows.append(Row(kind, name, template, tuple(_byte_set(ranges)), verdict, why))
    return rows


def _byte_set(text: str) -> Iterator[int]:
    for item in text.split() if text != "-" else ():
        first, _, last = item.partition("-")
        yield from range(int(first, 16), int(last or first, 16) + 1)


_POST = b"POST / HTTP/1.1\r\nHost: a\r\n"
_CHUNKS = b"%x\r\n%b\r\n0\r\n\r\n" % (len(SMUGGLED), SMUGGLED)
_HIDDEN = b"0\r\n\r\n" + SMUGGLED  # the body for Content-Length, an end and one more request for chunked
_LENGTH = b"Content-Length: %d\r\n"
_BAD_REQUEST: dict[str, object] = {"statuses": frozenset({400}), "end": "closed"}


def _served(body: bytes, **more: object) -> dict[str, object]:
    return {"accepts": (Expected("POST", b"/", "1.1", body=body),), **more}


def _refused(verdict: str) -> dict[str, object]:
    return {"statuses": frozenset(map(int, verdict.split())), "end": "closed"}


def _te_probes(line: bytes, verdict: str) -> Iterator[dict[str, object]]:
    alone: dict[str, object]
    beside: dict[str, object]
    if verdict == "chunked":
        alone, beside = _served(SMUGGLED), _BAD_REQUEST
    elif verdict == "other":
        alone, beside = _served(b"", **_BAD_REQUEST), _served(_HIDDEN)  # alone: the first chunk size is no request line
    else:
        alone = beside = _refused(verdict)
    length = _LENGTH % len(_HIDDEN)
    yield {"segments": (_POST + line + b"\r\n\r\n" + _CHUNKS,), **alone}
    yield {"segments": (_POST + length + line + b"\r\n\r\n" + _HIDDEN,), **beside}
    yield {"segments": (_POST + line + b"\r\n" + length + b"\r\n" + _HIDDEN,), **beside}


def _cl_probes(line: bytes, verdict: str) -> Iterator[dict[str, object]]:
    alone: dict[str, object]
    beside: dict[str, object]
    before = b""
    if verdict == "length":
        alone, beside = _served(SMUGGLED), _BAD_REQUEST
    elif verdict == "other":
        alone = beside = _served(SMUGGLED)
        before = _LENGTH % len(SMUGGLED)
    elif verdict == "wait":
        alone, beside = {"partial": Expected("POST", b"/", "1.1", body=SMUGGLED), "end": "wait"}, _BAD_REQUEST
    else:
        alone = beside = _refused(verdict)
    yield {"segments": (_POST + before + line + b"\r\n\r\n" + SMUGGLED,), **alone}
    yield {"segments": (_POST + b"Transfer-Encoding: chunked\r\n" + line + b"\r\n\r\n" + _CHUNKS,), **beside}


def _ex_probes(line: bytes, verdict: str) -> Iterator[dict[str, object]]:
    wanted = _served(SMUGGLED, interim="maybe") if verdict == "length" else _refused(verdict)
    length = _LENGTH % len(SMUGGLED)
    yield {"segments": (_POST + length + line + b"\r\n\r\n" + SMUGGLED,), **wanted}
    yield {"segments": (_POST + line + b"\r\n" + length + b"\r\n" + SMUGGLED,), **wanted}


_PROBES = {"te": _te_probes, "cl": _cl_probes, "ex": _ex_probes}


# -- cutting

BYTEWISE_LIMIT = 1200  # bytes of a segment that are fed one by one; of longer ones the beginning and the end are


def whole(segments: Sequence[bytes]) -> list[list[bytes]]:
    return [[segment] for segment in segments]


def bytewise(segments: Sequence[bytes]) -> list[list[bytes]]:
    return [_bytes_of(segment) for segment in segments]


def _bytes_of(segment: bytes) -> list[bytes]:
    if len(segment) <= BYTEWISE_LIMIT:
        return [bytes([byte]) for byte in segment]
    half = BYTEWISE_LIMIT // 2
    middle = segment[half:-half]
    size = max(997, len(middle) // 100)  # a prime, so that the cuts fall everywhere in repeated lines
    pieces = [middle[start : start + size] for start in range(0, len(middle), size)]
    return [*_bytes_of(segment[:half]), *pieces, *_bytes_of(segment[-half:])]


def cut(segments: Sequence[bytes], seed: int | str) -> list[list[bytes]]:
    """A few cuts at random places; the same for the same seed."""
    rng = random.Random(seed)
    pieces = []
    for segment in segments:
        places = sorted(rng.sample(range(len(segment) + 1), min(rng.randint(1, 6), len(segment) + 1)))
        pieces.append([segment[a:b] for a, b in zip([0, *places], [*places, len(segment)], strict=True) if a < b])
    return pieces


# -- judging


_NEXT_SEEN = Expected("GET", b"/next", "1.1", ((b"host", (b"next",)),))


def problems(case: Case, outcome: Outcome) -> list[str]:
    """What is wrong with `outcome`; nothing when it is what the case asks for."""
    return list(_problems(case, outcome))


def _problems(case: Case, outcome: Outcome) -> Iterator[str]:
    if outcome.fault:
        yield outcome.fault
    accepts = list(case.accepts)
    if case.end == "open":
        accepts.append(_NEXT_SEEN)
    complete = [seen for seen in outcome.requests if seen.complete]
    if case.end == "either" and [seen.target for seen in complete][-1:] == [b"/next"]:
        accepts.append(_NEXT_SEEN)
    if len(complete) != len(accepts):
        yield f"application called for {[(s.method, s.target) for s in complete]}, expected {len(accepts)} requests"
    for wanted, seen in zip(accepts, complete, strict=False):
        yield from wanted.problems(seen, body=case.app != "early")
    yield from _partial_problems(case, outcome)
    if any(seen.target == b"/smuggled" for seen in outcome.requests):
        yield "GET /smuggled reached the application"
    yield from _answer_problems(case, outcome, len(accepts))


def _partial_problems(case: Case, outcome: Outcome) -> Iterator[str]:
    partial = [seen for seen in outcome.requests if not seen.complete]
    if partial and case.partial is None:
        yield f"{partial[0].method} {partial[0].target!r} reached the application"
    elif len(partial) > 1:
        yield "two requests left incomplete"
    elif partial and case.partial is not None:
        yield from case.partial.problems(partial[0], body=False)


def _answer_problems(case: Case, outcome: Outcome, accepted: int) -> Iterator[str]:
    answers = outcome.statuses
    if answers[:accepted] != [200] * accepted:
        yield f"answers {answers}, expected {accepted} times 200 first"
    rest = answers[accepted:]
    if case.statuses:
        if len(rest) != 1 or rest[0] not in case.statuses:
            yield f"refused with {rest}, expected one of {sorted(case.statuses)}"
        if b"script" in b"".join(response.body for response in outcome.responses[accepted:]):
            yield "the error page repeats the request"
    elif rest and not (case.eof and case.partial):
        yield f"more answers than expected: {rest}"
    served_next = accepted > len(case.accepts)
    if outcome.closed != (not served_next if case.end == "either" else case.end == "closed"):
        yield f"connection {'closed' if outcome.closed else 'open'}, expected {case.end}"
    if not outcome.ended:
        yield "connection not closed after the client left"
    if outcome.aborted and (case.statuses or case.accepts):
        yield "connection reset"
    if (case.interim == "always" and outcome.interim != 1) or (case.interim == "never" and outcome.interim):
        yield f"{outcome.interim} interim answers, expected {case.interim}"
    if outcome.interim > 1:
        yield f"{outcome.interim} interim answers"
    yield from _announcement_problems(case, outcome)


def _announcement_problems(case: Case, outcome: Outcome) -> Iterator[str]:
    """What the answers say about the connection (S12, S13). A half-close or bad bytes may come after the answer."""
    for wanted, response in zip(case.accepts, outcome.responses, strict=False):
        if (
            wanted.version == "1.0"
            and not _announces_close(response)
            and response.all(b"connection") != [b"keep-alive"]
        ):
            yield "the connection stays open for HTTP/1.0 without Connection: keep-alive"
    if outcome.closed and outcome.responses and not case.eof and case.app != "early":
        if not _announces_close(outcome.responses[-1]):
            yield "the connection closes without Connection: close in the last answer"
        if any(map(_announces_close, outcome.responses[:-1])):
            yield "an answer says Connection: close and is not the last"


def _announces_close(response: Response) -> bool:
    options = b",".join(response.all(b"connection")).lower().split(b",")
    return b"close" in [option.strip() for option in options]
