"""The access log: its formats, that a client cannot forge a line of any, and when it is written (requirement 6)."""

from __future__ import annotations

import json
import os
import re
import socket
import string
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apphost import logs
from apphost.access import (
    FIELDS,
    GATHERED,
    AccessLog,
    FileSink,
    Origin,
    check_format,
    compile_format,
    needs_queue,
    quoted,
    resolve,
)
from apphost.logfiles import SYSLOG_MAX, open_syslog, parse_syslog
from apphost.logs import Log
from apphost.protocols.base import RequestHead
from tests.rawhttp import DEADLINE

ORIGIN = Origin(worker=3, generation=2, pid=4711)
LONG_NAMES = sorted(name for name in FIELDS if len(name) > 1 and " " not in name)


class MadeLoop:
    def __init__(self) -> None:
        self.soon: list[Callable[[], None]] = []

    def call_soon(self, callback: Callable[[], None]) -> None:
        self.soon.append(callback)


class ListSink:
    def __init__(self) -> None:
        self.lines: list[str] = []

    def write(self, lines: list[str]) -> None:
        self.lines += lines


def exchange(
    target: bytes = b"/a?b",
    status: int = 200,
    client: tuple[str, int] | None = ("10.0.0.1", 1),
    headers: list[tuple[bytes, bytes]] | None = None,
    **more: Any,
) -> Any:
    head = RequestHead("GET", target, "1.1", headers or [])
    head.raw_path, _, head.query = target.partition(b"?")
    rest = {"scheme": "http", "sent": 13, "started_at": time.perf_counter(), **more}
    return SimpleNamespace(head=head, client=client, status=status, **rest)


def line_of(form: str, duration: float = 1.25, cut: bool = False, **about: Any) -> str:
    (line,) = compile_format(form, ORIGIN)([(exchange(**about), duration, cut)])
    return line


# -------------------------------------------------------------------------------------------------------------- formats

STAMP = r"\[\d\d/[A-Z][a-z]{2}/\d{4}:\d\d:\d\d:\d\d [+-]\d{4}\]"


def test_auto() -> None:
    """The Common Log Format with the duration, and `cut` at the end of a line that needs it."""
    log, sink = AccessLog([sink := ListSink()], compile_format("auto", ORIGIN), MadeLoop()), sink  # type: ignore[arg-type]
    log.write(exchange())
    log.write(exchange(status=0, client=None), cut=True)
    log.write(exchange(b'/"x" \\"y'))
    log.write_refusal(SimpleNamespace(client=("10.0.0.2", 2), scheme="http"), 400)  # type: ignore[arg-type]
    log.write_refusal(SimpleNamespace(client=None, scheme="http"), 431)  # type: ignore[arg-type]
    log.flush()
    pattern = re.compile(rf'(\S+) - - {STAMP} "([^"]*)" (\d+) (\d+) \d\.\d{{6}}(.*)')
    found = [pattern.fullmatch(line) for line in sink.lines]
    assert [match and match.groups() for match in found] == [
        ("10.0.0.1", "GET /a?b HTTP/1.1", "200", "13", ""),
        ("-", "GET /a?b HTTP/1.1", "499", "13", " cut"),
        ("10.0.0.1", "GET /\\x22x\\x22 \\x5c\\x22y HTTP/1.1", "200", "13", ""),
        ("10.0.0.2", "-", "400", "0", ""),
        ("-", "-", "431", "0", ""),
    ]


def test_common_and_combined() -> None:
    headers = [(b"referer", b'http://a/"'), (b"user-agent", b"curl/8 \xfc\x1b")]
    common = re.fullmatch(rf"(.*){STAMP}(.*)", line_of("common", headers=headers))
    combined = re.fullmatch(rf"(.*){STAMP}(.*)", line_of("combined", headers=headers, sent=0))
    assert common
    assert combined
    assert common.groups() == ("10.0.0.1 - - ", ' "GET /a?b HTTP/1.1" 200 13')
    told = r' "GET /a?b HTTP/1.1" 200 - "http://a/\x22" "curl/8 \xfc\x1b"'
    assert combined.groups() == ("10.0.0.1 - - ", told)


def test_json() -> None:
    headers = [(b"host", b"example.org"), (b"user-agent", b"\xfc\x7f")]
    about = {"headers": headers, "started_at": 5.0, "called_at": 5.5, "request_id": "abc", "target": b'/"x"'}
    record = json.loads(line_of("json", cut=True, **about))
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", record.pop("time"))
    assert record == {
        "client": "10.0.0.1", "method": "GET", "target": '/"x"', "version": "1.1", "status": 200, "bytes": 13,
        "duration": 1.25, "cut": True, "queue": 0.5, "scheme": "http", "host": "example.org", "referer": None,
        "user_agent": "\xfc\x7f", "request_id": "abc", "worker": 3, "generation": 2, "pid": 4711,
    }  # fmt: skip
    bare = json.loads(line_of("json"))
    assert (bare["queue"], bare["request_id"], bare["host"]) == (None, None, None)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("%(h)s|%(client)s|%(l)s|%(u)s", "10.0.0.1|10.0.0.1|-|-"),
        ("%(m)s %(target)s %(U)s %(q)s %(H)s", "GET /a?b /a b HTTP/1.1"),
        ("%(s)s %(B)s %(b)s %(scheme)s", "200 13 13 http"),
        ("%(T)s %(M)s %(D)s %(L)s %(duration)s", "1 1250 1250000 1.250000 1.250000"),
        ("%(worker)s/%(generation)s/%(pid)s/%(p)s", "3/2/4711/<4711>"),
        ("%(queue)s %(request_id)s %(cut)s", "0.250000 abc -"),
        ("%(host)s %(f)s %({X-Thing}i)s %({none}i)s", "a.example - one, two -"),
        ("100%% of %(s)s\tall \u2603 %s{}".replace("%s", ""), "100% of 200\tall \u2603 {}"),
    ],
)
def test_templates(template: str, expected: str) -> None:
    headers = [(b"host", b"a.example"), (b"x-thing", b"one"), (b"x-thing", b"two")]
    check_format(template)
    about: dict[str, Any] = {"headers": headers, "started_at": 5.0, "called_at": 5.25, "request_id": "abc"}
    assert line_of(template, **about) == expected


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("combind", r"one of auto, .* Did you mean 'combined'\?"),
        ("", "one of auto"),
        ("%(statu)s", r"no field %\(statu\)s\. Did you mean 'status'"),
        ("%({a b}i)s", "no field"),
        ("%( tail)s", "no field"),
        ("%({x-a}o)s", "no field"),
        ("%(h)d", "fields such as"),
        ("%h", "not '%h'"),
        ("100%", "not '%'"),
        ("%(h)s\n%(s)s", "one line"),
        ("%(h)s\x1b", "one line"),
        ("%(h)s\u2028", "one line"),
    ],
)
def test_bad_templates(template: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        check_format(template)


def test_every_field_has_a_value_for_a_refused_request() -> None:
    """Also where there is no head at all."""
    for name in LONG_NAMES:
        sink = ListSink()
        log = AccessLog([sink], compile_format(f"<%({name})s>", ORIGIN), MadeLoop())  # type: ignore[arg-type]
        log.write_refusal(SimpleNamespace(client=None, scheme="https"), 400)  # type: ignore[arg-type]
        log.flush()
        assert len(sink.lines) == 1
        assert re.fullmatch(r"<[ -~]+>", sink.lines[0]) or name == "query"


def test_which_formats_need_the_time_of_the_call() -> None:
    assert [form for form in ("auto", "common", "combined", "json") if needs_queue(form)] == ["json"]
    assert needs_queue("%(h)s %(queue)s")
    assert not needs_queue("%(h)s %%(queue)s")
    assert [resolve("auto", style) for style in ("text", "json")] == ["auto", "json"]
    assert resolve("common", "json") == "common"


ANY_BYTES = st.binary(max_size=40)
VISIBLE = st.text(st.sampled_from(string.ascii_letters + string.punctuation), max_size=40).map(str.encode)


@given(VISIBLE, ANY_BYTES, ANY_BYTES)
def test_no_client_forges_a_line(target: bytes, agent: bytes, other: bytes) -> None:
    """One line, printable ASCII, and each quoted part ends where ours does, whatever the bytes are."""
    headers = [(b"user-agent", agent), (b"referer", other), (b"host", other), (b"x-any", agent)]
    everything = " ".join(f'"%({name})s"' for name in LONG_NAMES) + ' "%({x-any}i)s"'
    for form, count in (("combined", 6), ("auto", 2), (everything, 2 * len(LONG_NAMES) + 2)):
        line = line_of(form, target=b"/" + target, headers=headers)
        assert re.fullmatch("[ -~]+", line)
        assert line.count('"') == count
    record = line_of("json", target=b"/" + target, headers=headers)
    assert re.fullmatch("[ -~]+", record)
    assert json.loads(record)["user_agent"] == (agent.decode("latin-1") if agent else "")


@given(ANY_BYTES)
def test_escapes_can_be_undone(data: bytes) -> None:
    """So each byte is escaped once, and none twice."""
    shown = quoted(data.decode("latin-1"))
    assert re.sub(r"\\x([0-9a-f]{2})", lambda match: chr(int(match[1], 16)), shown).encode("latin-1") == data


@pytest.fixture
def _no_queries() -> Iterator[None]:
    logs.hide_queries(True)
    yield
    logs.hide_queries(False)


@pytest.mark.usefixtures("_no_queries")
def test_queries_are_left_out_of_every_format() -> None:
    everything = " ".join(f"%({name})s" for name in LONG_NAMES)
    for form in ("auto", "common", "combined", "json", everything, "%(q)s"):
        line = line_of(form, target=b"/path?s3cret", headers=[(b"referer", b"http://a/b?s3cret?s3cret")])
        assert "s3cret" not in line
        assert "..." in line


# -------------------------------------------------------------------------------------------------------------- writing


@pytest.fixture
def written(tmp_path: Path) -> tuple[AccessLog, MadeLoop, Callable[[], list[str]]]:
    """An access log to a file, its loop, and the lines that are there."""
    fd = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT)
    loop = MadeLoop()
    log = AccessLog([FileSink(fd, Log())], compile_format("auto", ORIGIN), loop)  # type: ignore[arg-type]
    return log, loop, lambda: (tmp_path / "log").read_text().splitlines()


def test_access_is_written_once_a_turn(written: tuple[AccessLog, MadeLoop, Callable[[], list[str]]]) -> None:
    log, loop, lines = written
    for _ in range(10):
        log.write(exchange())
    assert (len(loop.soon), lines()) == (1, [])
    loop.soon.pop()()
    assert len(lines()) == 10
    log.flush()
    assert len(lines()) == 10
    log.write(exchange())
    assert len(loop.soon) == 1


def test_access_does_not_gather_without_bound(written: tuple[AccessLog, MadeLoop, Callable[[], list[str]]]) -> None:
    log, loop, lines = written
    for _ in range(1000):
        log.write(exchange(b"/" + b"x" * 1000))
    assert len(lines()) > 1000 - GATHERED
    assert len(loop.soon) > 0


def test_every_sink_has_every_line(tmp_path: Path) -> None:
    path = tmp_path / "log"
    first, last = ListSink(), ListSink()
    sinks = [first, FileSink(os.open(path, os.O_WRONLY | os.O_CREAT), Log()), last]
    log = AccessLog(sinks, compile_format("%(target)s", ORIGIN), MadeLoop())  # type: ignore[arg-type]
    log.write(exchange(b"/1"))
    log.write(exchange(b"/2"))
    log.flush()
    assert first.lines == last.lines == path.read_text().splitlines() == ["/1", "/2"]


# --------------------------------------------------------------------------------------------------------------- syslog


@pytest.mark.parametrize(
    ("where", "place"),
    [("", "/dev/log"), ("/run/log", "/run/log"), ("udp://localhost:5140", ("localhost", 5140)),
     ("udp://logs", ("logs", 514)), ("udp://[::1]:99", ("::1", 99)), ("udp://[::1]", ("::1", 514))],
)  # fmt: skip
def test_syslog_places(where: str, place: object) -> None:
    assert parse_syslog(where) == place


@pytest.mark.parametrize("where", ["log", "udp:", "udp://", "udp://a:b", "udp://a:0", "udp://a:70000", "tcp://a:1"])
def test_no_syslog_places(where: str) -> None:
    with pytest.raises(ValueError, match="expected syslog:"):
        parse_syslog(where)


def quiet(tmp_path: Path) -> tuple[Log, Callable[[], str]]:
    path = tmp_path / "own.log"
    return Log("info", "text", os.open(path, os.O_WRONLY | os.O_CREAT)), path.read_text


def test_syslog_of_this_machine(tmp_path: Path) -> None:
    """A datagram for each line, as syslog(3) makes them; long ones are cut to what a daemon takes."""
    log, said = quiet(tmp_path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as daemon:
        path = str(tmp_path / "s")
        daemon.bind(path)
        with closing(open_syslog(path, log)) as sink:
            sink.write(["one", "two", "x" * 10000])
        first, second, third = (daemon.recv(65536) for _ in range(3))
    pattern = rf"<14>[A-Z][a-z]{{2}} [ \d]\d \d\d:\d\d:\d\d apphost\[{os.getpid()}\]: ".encode()
    assert re.fullmatch(pattern + b"one", first)
    assert re.fullmatch(pattern + b"two", second)
    assert len(third) == SYSLOG_MAX
    assert said() == ""


def test_syslog_over_udp(tmp_path: Path) -> None:
    """RFC 5424, 6."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as daemon:
        daemon.bind(("127.0.0.1", 0))
        daemon.settimeout(DEADLINE)
        where = f"udp://127.0.0.1:{daemon.getsockname()[1]}"
        with closing(open_syslog(where, quiet(tmp_path)[0])) as sink:
            sink.write(["a line"])
        data = daemon.recv(65536)
    stamp = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ"
    assert re.fullmatch(rf"<14>1 {stamp} [!-~]+ apphost {os.getpid()} access - a line".encode(), data)


def test_a_syslog_that_takes_nothing(tmp_path: Path) -> None:
    """It blocks nobody: lines are dropped and counted, which is said once in a while; one that comes later is found."""
    log, said = quiet(tmp_path)
    path = str(tmp_path / "s")
    with closing(open_syslog(path, log)) as sink, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as daemon:
        sink.write(["lost"] * 3)
        assert "lines dropped: 3" in said()
        daemon.bind(path)
        sink.write(["taken"] * 5000)  # more than the queue of a socket holds
        assert daemon.recv(100).endswith(b"taken")
    assert said().count("lines dropped") == 1
