"""Looks for bytes that the two parsers, or one parser fed in two ways, take for different things.

    python -m tests.fuzz_differential --cases 1000000 --jobs 2

A case is made from the corpus and a grammar, by mutation, from its number and the seed alone: `--seed S --case N` makes
it again. It is a finding when the server crashes, keeps its loop busy, takes longer than a second of CPU, breaks a rule
of its own (a malformed answer, a warning in the log), or when answers differ:

    http       h11, httptools and the oracle (`tests/corpus_oracle.py`), each fed whole and in pieces
    handshake  the same parsers with WebSockets on, and frames behind the handshake
    chunked    the decoder of chunked bodies, whole and in pieces, and the oracle
    frames     the reader of WebSocket frames, whole and in pieces; without compression also RFC 6455 read slowly

Differences that are right are listed in `EXPLAINED`, each with its reason. A finding is reduced to few bytes.
The exit status is 1 when there was one.
"""

from __future__ import annotations

import argparse
import base64
import multiprocessing
import random
import signal
import sys
import time
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from apphost.protocols.base import BadRequest
from apphost.protocols.body import ChunkedDecoder
from apphost.protocols.deflate import Deflate
from apphost.protocols.frames import Broken, Close, Ping, Pong, Reader
from apphost.protocols.strict import Limits
from apphost.protocols.websocket import WebSocketOptions
from tests import corpus_oracle as oracle
from tests.corpus import NEXT, SMUGGLED, Outcome, bytewise, cut, load_all, load_sweep
from tests.quick_driver import Hang, QuickDriver
from tests.test_frames import fragments, frame, reference

PARSERS = ("h11", "httptools")
CPU_MAX = 1.0  # s a case; one takes less than a millisecond
BLOCK = 1000  # cases a process does between two reports

Pieces = list[list[bytes]]


@dataclass
class Finding:
    kind: str  # crash, hang, slow, fault, parsers, splits, oracle
    target: str
    what: str
    data: bytes = b""
    where: str = ""


class Slow(Exception):
    pass


# Differences between feeding the same bytes whole and in pieces that are right: what may differ, and why. Between the
# parsers nothing may.
EXPLAINED = {
    "the status of a refusal": "what is wrong in several ways is refused for the fault that is found first, and in "
    "pieces that may be another one: what has come is judged before what is missing",
    "the requests that the application never gets complete": "in pieces it may be called for a request whose body "
    "turns out to be wrong; in the whole it is not even called",
}


def same(one: Outcome, other: Outcome) -> bool:
    """Whether two outcomes of the same bytes, fed in different pieces, agree, but for `EXPLAINED`."""
    return essence(one) == essence(other)


def essence(outcome: Outcome) -> object:
    done = [(r.method, r.target, r.version, r.headers, r.body, r.path) for r in outcome.requests if r.complete]
    statuses = ["refused" if status >= 400 else status for status in outcome.statuses]
    return done, statuses, outcome.closed, outcome.ended, outcome.aborted, outcome.fault


# -- making cases


class Maker:
    """Bytes that are nearly right: parts of the corpus and of a grammar, mutated."""

    def __init__(self) -> None:
        cases = [case for case in load_all() if case.app == "echo" and not case.eof and len(case.data) < 800]
        self.requests = [case.data for case in cases]
        self.lines = sorted({line for data in self.requests for line in data.split(b"\r\n") if line})
        self.fields = [line for row in load_sweep() for _, line in row.fields()]

    def request(self, rng: random.Random) -> bytes:
        made = rng.choice((self._known, self._grown, self._grown))(rng)
        data = self.mutated(rng, made)
        behind = rng.random()
        return data + (NEXT if behind < 0.5 else SMUGGLED if behind < 0.7 else b"")

    def _known(self, rng: random.Random) -> bytes:
        data = rng.choice(self.requests)
        if rng.random() < 0.4:
            lines = data.split(b"\r\n")
            place = rng.randrange(len(lines) + 1)
            lines[place : place + rng.randrange(2)] = [rng.choice(self.lines) for _ in range(rng.randint(1, 2))]
            data = b"\r\n".join(lines)
        return data

    def _grown(self, rng: random.Random) -> bytes:
        body, framing = self._body(rng)
        fields = [b"Host: " + rng.choice(_HOSTS)] if rng.random() < 0.95 else []
        fields += [field for field in framing if field]
        for _ in range(rng.choice((0, 0, 1, 1, 2, 4))):
            fields.append(rng.choice(self.fields if rng.random() < 0.4 else _FIELDS))
        rng.shuffle(fields)
        line = b" ".join((rng.choice(_METHODS), rng.choice(_TARGETS), rng.choice(_VERSIONS)))
        return b"\r\n".join([line, *fields, b"", body])

    def _body(self, rng: random.Random) -> tuple[bytes, list[bytes]]:
        kind = rng.randrange(5)
        data = rng.choice((b"", b"a", b"abc", SMUGGLED, rng.randbytes(rng.randrange(40))))
        if kind < 2:
            return b"", []
        if kind == 2:
            return data, [b"Content-Length: %d" % len(data)]
        return self.chunks(rng), [b"Transfer-Encoding: chunked", b"Content-Length: 5" if kind == 4 else b""]

    def chunks(self, rng: random.Random) -> bytes:
        parts = []
        for _ in range(rng.choice((0, 1, 1, 2, 3))):
            data = rng.choice((b"a", b"\r\n", SMUGGLED, rng.randbytes(rng.randint(1, 30))))
            size = rng.choice((b"%x", b"%X", b"0%x", b"%016x")) % len(data)
            parts.append(size + rng.choice(_EXTENSIONS) + b"\r\n" + data + b"\r\n")
        trailers = [rng.choice(_FIELDS) + b"\r\n" for _ in range(rng.choice((0, 0, 0, 1, 2)))]
        return b"".join((*parts, b"0", rng.choice(_EXTENSIONS), b"\r\n", *trailers, b"\r\n"))

    def mutated(self, rng: random.Random, data: bytes) -> bytes:
        for _ in range(rng.choice((0, 1, 1, 1, 2, 3, 6))):
            data = rng.choice(_MUTATIONS)(rng, data)
        return data

    def handshake(self, rng: random.Random) -> bytes:
        fields = [b"Host: a", b"Connection: Upgrade", b"Upgrade: websocket", b"Sec-WebSocket-Version: 13"]
        fields.append(b"Sec-WebSocket-Key: " + base64.b64encode(rng.randbytes(16)))
        fields += [b"Sec-WebSocket-Protocol: " + rng.choice(_PROTOCOLS) for _ in range(rng.choice((0, 0, 1, 2)))]
        fields += [b"Sec-WebSocket-Extensions: " + rng.choice(_OFFERS) for _ in range(rng.choice((0, 0, 1, 2)))]
        head = b"\r\n".join([b"GET /chat HTTP/1.1", *fields, b"", b""])
        return (self.mutated(rng, head) if rng.random() < 0.8 else head) + self.frames(rng, False)

    def frames(self, rng: random.Random, compressed: bool) -> bytes:
        parts: list[bytes] = []
        for _ in range(rng.choice((0, 1, 2, 3, 5))):
            payload = rng.choice((b"", b"hello", "h\xe9llo\u20ac".encode(), b"\xff", rng.randbytes(rng.randrange(150))))
            first = rng.choice((0x81, 0x82, 0x81, 0x82, 0x89, 0x8A, 0x88, 0x01, 0x00, 0x80, rng.randrange(256)))
            if compressed and rng.random() < 0.6:
                deflated = zlib.compressobj(6, zlib.DEFLATED, -12)
                payload = (deflated.compress(payload * rng.choice((1, 1, 9))) + deflated.flush(zlib.Z_SYNC_FLUSH))[:-4]
                first = rng.choice((0xC1, 0xC2, 0x41, 0x42))
            if first in (0x41, 0x42, 0x01, 0xC1, 0x81, 0x82) and rng.random() < 0.4:
                places = sorted(rng.randrange(len(payload) + 1) for _ in range(rng.randint(1, 3)))
                pieces = [payload[a:b] for a, b in zip([0, *places], [*places, len(payload)], strict=True)]
                made = fragments(first | 0x80, pieces)
                if rng.random() < 0.4:
                    made.insert(rng.randrange(len(made)), frame(rng.choice((0x89, 0x8A)), b"ping"))
                parts += made
            elif first == 0x88:
                parts.append(
                    frame(first, rng.choice((b"", b"\x03\xe8", b"\x03\xe8bye", b"\x03\xed", b"\x03", b"\x0f\xa0")))
                )
            else:
                parts.append(frame(first, payload, rng.randbytes(4)))
        data = b"".join(parts)
        if rng.random() < 0.5:
            for _ in range(rng.randint(1, 3)):
                data = rng.choice(_BINARY_MUTATIONS)(rng, data)
        return data


_METHODS = (b"GET", b"POST", b"HEAD", b"PUT", b"OPTIONS", b"BREW", b"get", b"CONNECT", b"PRI", b"M-SEARCH")
_TARGETS = (
    b"/",
    b"/a/b?c=d",
    b"*",
    b"http://b/c",
    b"http://b:80?x",
    b"a:443",
    b"//a",
    b"/%2F%ff",
    b"/#f",
    b"",
    b"/a b",
)
_VERSIONS = (b"HTTP/1.1",) * 7 + (b"HTTP/1.0", b"HTTP/1.0", b"HTTP/2.0", b"HTTP/0.9", b"HTTP/1.2", b"http/1.1", b"")
_HOSTS = (b"a", b"a:80", b"", b"[::1]:8", b"a b", b"a,b", b"a@b", b"a\x85", b"\xa0a")
_EXTENSIONS = (b"",) * 6 + (b";", b";a=b", b';a="b"', b" ", b";\n", b"\t;a", b";" + b"x" * 300)
_FIELDS = (
    b"Connection: close", b"Connection: keep-alive", b"Connection: Upgrade, close", b"Expect: 100-continue",
    b"Expect: 100-Continue ", b"Content-Length: 0", b"Content-Length: 3", b"Content-Length: 03", b"content-length:3",
    b"Transfer-Encoding: chunked", b"Transfer-Encoding: CHUNKED\t", b"Transfer-Encoding: identity", b"TE: trailers",
    b"Transfer_Encoding: chunked", b"Upgrade: websocket", b"Upgrade: h2c", b"X: y", b"X:", b"X: \t", b"X: \xff\x80",
    b"Trailer: x", b"Cookie: a=b; c=d", b"Cookie: e", b"X-A: " + b"y" * 300, b"Host: b", b": x", b"X", b" folded", b"",
    b"Connection: Content-Length", b"Connection: Transfer-Encoding", b"Keep-Alive: 5", b"Proxy-Connection: close",
    b"Sec-WebSocket-Key: x", b"HTTP2-Settings: AAA", b"X\x00: y", b"X: \x00", b"X: y\rZ: z", b"X: y\nZ: z",
)  # fmt: skip
_PROTOCOLS = (b"chat", b"chat, superchat", b"a,,b", b" ,a", b"a b", b"\xff", b'"a"', b"")
_OFFERS = (
    *(b"permessage-deflate" + parameters for parameters in (
        b"", b";", b"; client_max_window_bits", b"; server_max_window_bits=9", b"; server_max_window_bits=8",
        b'; server_max_window_bits="10"; client_no_context_takeover, x', b"; server_no_context_takeover; x=1")),
    b"x; a=b; c", b",", b"a=b",
)  # fmt: skip
_SPICE = (
    b"\r", b"\n", b"\r\n", b" ", b"\t", b":", b",", b";", b"0", b"\x00", b"\x0b", b"\x0c", b"\x1c", b"\x85", b"\xa0",
    b"\xad", b"\xff", b"_", b"-", b"+", b"\r\n\r\n", b"\r\n ", b"\n\n", b"0\r\n\r\n", b"chunked", b"HTTP/1.1",
    b"#", b"%00",
)  # fmt: skip


def _change(rng: random.Random, data: bytes) -> bytes:
    place = rng.randrange(len(data) + 1)
    spice = rng.choice(_SPICE) if rng.random() < 0.7 else bytes([rng.randrange(256)])
    return data[:place] + spice + data[place + rng.randrange(3) :]


def _remove(rng: random.Random, data: bytes) -> bytes:
    place = rng.randrange(len(data) + 1)
    return data[:place] + data[place + rng.choice((1, 1, 2, 5, 20)) :]


def _repeat(rng: random.Random, data: bytes) -> bytes:
    start = rng.randrange(len(data) + 1)
    piece = data[start : start + rng.choice((1, 2, 10, 30))]
    return data[:start] + piece * rng.choice((2, 2, 3, 50)) + data[start:]


def _cut_off(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def _swap_lines(rng: random.Random, data: bytes) -> bytes:
    lines = data.split(b"\r\n")
    one, other = rng.randrange(len(lines)), rng.randrange(len(lines))
    lines[one], lines[other] = lines[other], lines[one]
    return b"\r\n".join(lines)


def _double_line(rng: random.Random, data: bytes) -> bytes:
    lines = data.split(b"\r\n")
    lines.insert(rng.randrange(len(lines) + 1), rng.choice(lines))
    return b"\r\n".join(lines)


def _other_case(rng: random.Random, data: bytes) -> bytes:
    start = rng.randrange(len(data) + 1)
    end = start + rng.choice((1, 1, 8, 30))
    return data[:start] + data[start:end].swapcase() + data[end:]


def _flip(rng: random.Random, data: bytes) -> bytes:
    if not data:
        return data
    place = rng.randrange(len(data))
    return data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :]


_MUTATIONS = (_change, _change, _change, _remove, _repeat, _cut_off, _swap_lines, _double_line, _other_case, _flip)
_BINARY_MUTATIONS = (_flip, _flip, _remove, _cut_off, _change)


# -- judging cases


class Target(ABC):
    name: str

    def __init__(self, maker: Maker) -> None:
        self.maker = maker

    @abstractmethod
    def make(self, rng: random.Random) -> bytes: ...

    @abstractmethod
    def check(self, data: bytes, split: Sequence[bytes], rng: random.Random) -> Finding | None:
        """What is wrong with the server, given these bytes, also in the pieces `split`."""

    def finding(self, kind: str, *what: object) -> Finding:
        return Finding(kind, self.name, "\n".join(map(str, what)))


class Http(Target):
    name = "http"
    # The usual limits, and such as a request of some hundred bytes meets.
    limits = (Limits(), Limits(), Limits(request_line=40, fields=4, field_size=40, head=150, body=20, chunk_extension=4,
                                         trailers=20))  # fmt: skip

    def __init__(self, maker: Maker) -> None:
        super().__init__(maker)
        self.drivers = [QuickDriver(parser) for parser in PARSERS]

    def make(self, rng: random.Random) -> bytes:
        return self.maker.request(rng)

    def check(self, data: bytes, split: Sequence[bytes], rng: random.Random) -> Finding | None:
        limits = rng.choice(self.limits)
        seen: list[Outcome] = []
        for pieces in ([[data]], [list(split)]):
            one, other = (driver.run_case(pieces, limits=limits) for driver in self.drivers)
            if one.fault:
                return self.finding("fault", one.fault)
            if one.comparable() != other.comparable():
                return self.finding("parsers", PARSERS, one, other)
            seen.append(one)
        if not same(*seen):
            return self.finding("splits", *seen)
        return self._ask_the_oracle(data, seen[0]) if limits is self.limits[0] else None

    def _ask_the_oracle(self, data: bytes, outcome: Outcome) -> Finding | None:
        verdict = oracle.judge(data)
        served = [
            (r.method.encode(), r.target, r.version.encode(), r.headers, r.body) for r in outcome.requests if r.complete
        ]
        wanted = [(r.method, plain(r.target), r.version, r.fields, r.body) for r in verdict.served]
        refusals = outcome.statuses[len(served) :]
        if (
            served == wanted
            and outcome.statuses[: len(served)] == [200] * len(served)
            and len(refusals) <= 1
            and set(refusals) <= verdict.statuses
            and (refusals or verdict.unsure or not verdict.statuses)
            and outcome.closed == (verdict.closed or bool(refusals))
        ):
            return None
        return self.finding("oracle", outcome, verdict)


def plain(target: bytes) -> bytes:
    """A target as a scope can tell it: without the question mark of an empty query."""
    path, _, query = target.partition(b"?")
    return path + b"?" + query if query else path


class Handshakes(Target):
    name = "handshake"

    def __init__(self, maker: Maker) -> None:
        super().__init__(maker)
        options = WebSocketOptions(message=1000)
        self.drivers = [QuickDriver(parser, websockets=options) for parser in PARSERS]

    def make(self, rng: random.Random) -> bytes:
        return self.maker.handshake(rng)

    def check(self, data: bytes, split: Sequence[bytes], rng: random.Random) -> Finding | None:
        seen = []
        for pieces in ([[data]], [list(split)]):
            one, other = (self._run(driver, pieces) for driver in self.drivers)
            if one[0].fault:
                return self.finding("fault", one[0].fault)
            if (one[0].comparable(), *one[1:]) != (other[0].comparable(), *other[1:]):
                return self.finding("parsers", PARSERS, one, other)
            seen.append(one)
        whole_, pieces_ = seen
        if (essence(whole_[0]), whole_[2]) != (essence(pieces_[0]), pieces_[2]):
            return self.finding("splits", *seen)
        return None

    @staticmethod
    def _run(driver: QuickDriver, pieces: Pieces) -> tuple[Outcome, bytes, object]:
        outcome = driver.run_case(pieces)
        socket = driver.socket
        if socket is None:
            return outcome, driver.wire, None
        told = (
            socket.subprotocol,
            socket.deflate is None,
            list(socket.messages),
            socket.life,
            socket.code,
            socket.reason,
        )
        return outcome, driver.wire, (told, driver.wire)


class Chunked(Target):
    name = "chunked"
    limits = (Limits(), Limits(body=20, chunk_extension=4, trailers=20))

    def make(self, rng: random.Random) -> bytes:
        return self.maker.mutated(rng, self.maker.chunks(rng)) + (NEXT if rng.random() < 0.5 else b"")

    def check(self, data: bytes, split: Sequence[bytes], rng: random.Random) -> Finding | None:
        limits = rng.choice(self.limits)
        one, other = self._decode([data], limits), self._decode(split, limits)
        if one != other and not (isinstance(one, int) and isinstance(other, int)):  # both refuse it: see `EXPLAINED`
            return self.finding("splits", one, other)
        if limits is self.limits[0] and (wanted := self._judge(data)) is not None and one != wanted:
            return self.finding("oracle", one, wanted)
        return None

    @staticmethod
    def _decode(pieces: Sequence[bytes], limits: Limits) -> object:
        decoder = ChunkedDecoder(limits)
        body = rest = b""
        try:
            for piece in pieces:
                if decoder.done:
                    rest += piece
                else:
                    taken, left = decoder.feed(piece)
                    body += taken
                    rest += left
        except BadRequest as refusal:
            return refusal.status
        return body, rest, decoder.done

    @staticmethod
    def _judge(data: bytes) -> object:
        """What the oracle says, None where it leaves a choice."""
        request = oracle.Request(b"POST", b"/", b"1.1", [(b"transfer-encoding", b"chunked")])
        try:
            rest = oracle._take_body(request, data, 0)
        except oracle._Incomplete as unfinished:
            return None if unfinished.statuses else (request.body, b"", False)
        except oracle._Wrong as wrong:
            return next(iter(wrong.statuses)) if len(wrong.statuses) == 1 else None
        return request.body, rest, True


class Frames(Target):
    name = "frames"
    limit = 400

    def make(self, rng: random.Random) -> bytes:
        return self.maker.frames(rng, rng.random() < 0.5)

    def check(self, data: bytes, split: Sequence[bytes], rng: random.Random) -> Finding | None:
        for deflate in (None, (12, 12, False, False), (12, 15, True, True)):
            one, other = self._read([data], deflate), self._read(split, deflate)
            if one != other:
                return self.finding("splits", deflate, one, other)
            if deflate is None and one != (wanted := reference(data, self.limit)):
                return self.finding("oracle", one, wanted)
        return None

    def _read(
        self, pieces: Sequence[bytes], deflate: tuple[Any, ...] | None
    ) -> list[str | bytes | Ping | Pong | Close | int]:
        reader = Reader(self.limit, Deflate(self.limit, *deflate) if deflate else None)
        seen: list[Any] = []
        for piece in pieces:
            events, more = reader.feed(piece)
            seen += events
            for _ in range(len(data_left := reader.buffer) + 1):
                if not more:
                    break
                events, more = reader.feed(b"")
                seen += events
            if more and len(reader.buffer) == len(data_left):
                raise Hang
        return [event.code if isinstance(event, Broken) else event for event in seen]


TARGETS: tuple[type[Target], ...] = (Http, Handshakes, Chunked, Frames)
_SHARES = (Http,) * 7 + (Handshakes, Chunked, Frames)


# -- running


class Fuzzer:
    """Does cases by their numbers; each depends on the seed and its number alone."""

    def __init__(self, seed: str, only: str = "") -> None:
        self.seed = seed
        maker = Maker()
        self.targets = {kind: kind(maker) for kind in TARGETS if only in ("", kind.name)}
        self.shares = [kind for kind in _SHARES if kind in self.targets]

    def run(self, number: int) -> Finding | None:
        rng = random.Random(f"{self.seed}/{number}")
        target = self.targets[rng.choice(self.shares)]
        data = target.make(rng)
        bytes_alone = rng.random() < 0.25 and len(data) < 400
        cuts = f"{self.seed}/{number}/cuts"

        def check(data: bytes) -> Finding | None:
            split = bytewise([data])[0] if bytes_alone else (cut([data], cuts)[0] if data else [])
            return guarded(lambda: target.check(data, split, random.Random(cuts)), target.name)

        finding = check(data)
        if finding is None:
            return None
        kind = finding.kind
        data = reduce(data, lambda shorter: (found := check(shorter)) is not None and found.kind == kind)
        finding = check(data) or finding
        finding.data = data
        finding.where = f"--seed {self.seed} --case {number}, {'byte by byte' if bytes_alone else 'cut'}"
        return finding


def guarded(check: Callable[[], Finding | None], target: str) -> Finding | None:
    """The finding of a check, also when it raises or does not come to an end."""
    signal.setitimer(signal.ITIMER_VIRTUAL, CPU_MAX)
    try:
        return check()
    except Slow:
        return Finding("slow", target, f"more than {CPU_MAX} s of CPU")
    except Hang:
        return Finding("hang", target, "the loop is kept busy")
    except Exception as exc:
        return Finding("crash", target, repr(exc))
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)


def out_of_time(*_: object) -> None:
    raise Slow


def reduce(data: bytes, still: Callable[[bytes], bool]) -> bytes:
    """Leave out what is not needed for `still` to hold: halves first, single bytes last."""
    size = max(len(data) // 2, 1)
    while True:
        place = 0
        while place < len(data):
            shorter = data[:place] + data[place + size :]
            if still(shorter):
                data = shorter
            else:
                place += size
        if size == 1:
            return data
        size = max(size // 2, 1)


def _block(task: tuple[str, str, int, int]) -> tuple[int, list[Finding]]:
    seed, only, start, end = task
    signal.signal(signal.SIGVTALRM, out_of_time)
    fuzzer = _fuzzers.get((seed, only))
    if fuzzer is None:
        fuzzer = _fuzzers[seed, only] = Fuzzer(seed, only)
    return end - start, [found for number in range(start, end) if (found := fuzzer.run(number)) is not None]


_fuzzers: dict[tuple[str, str], Fuzzer] = {}


def blocks(seed: str, only: str, start: int, end: int) -> Iterator[tuple[str, str, int, int]]:
    for first in range(start, end, BLOCK):
        yield seed, only, first, min(first + BLOCK, end)


def show(finding: Finding) -> None:
    print(f"\n{finding.target}, {finding.kind}: {finding.data!r}\n  {finding.where}\n  {finding.what}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="Differential fuzzing; see the head of tests/fuzz_differential.py.")
    parser.add_argument("--cases", type=int, default=10000)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--seed", default="1")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--target", default="", choices=("", *(kind.name for kind in TARGETS)))
    parser.add_argument("--case", type=int, help="only this one")
    parser.add_argument("--stop-after", type=int, default=20, help="findings")
    asked = parser.parse_args()
    start, end = (asked.first, asked.first + asked.cases) if asked.case is None else (asked.case, asked.case + 1)
    began = told = time.monotonic()
    done, findings = 0, 0
    with multiprocessing.Pool(asked.jobs) as pool:
        for count, found in pool.imap_unordered(_block, blocks(asked.seed, asked.target, start, end)):
            done += count
            findings += len(found)
            for finding in found:
                show(finding)
            now = time.monotonic()
            if now - told > 10:
                told = now
                print(f"{done} cases, {done / (now - began):.0f}/s, {findings} findings", flush=True)
            if findings >= asked.stop_after:
                break
    seconds = time.monotonic() - began
    print(f"seed {asked.seed}: {done} cases in {seconds:.0f} s, {done / seconds:.0f}/s, {findings} findings")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
