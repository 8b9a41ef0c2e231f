"""The server's log and the access log: their lines, and that nothing a client or an application says can forge one."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apphost import logs
from apphost.logs import LEVELS, AccessLog, Log, escape, format_json, format_text, open_access_log, write_all

WHEN = 1_700_000_000.1239
ANYTHING = st.text(st.characters(codec=None), max_size=60)  # lone surrogates as well


@given(ANYTHING)
def test_escape_is_one_printable_line(text: str) -> None:
    escaped = escape(text)
    assert escaped.isprintable()
    assert len(escaped.splitlines()) <= 1
    escaped.encode()
    if text.isprintable():
        assert escaped == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [("plain \xfc \u2603", "plain \xfc \u2603"), ("a\nb\r\tc", r"a\nb\r\tc"), ("\x1b[31m", r"\x1b[31m"),
     ("\u2028\u202e\ud800", r"\u2028\u202e\ud800"), ("\0\x85", r"\x00\x85")],
)  # fmt: skip
def test_escape(text: str, expected: str) -> None:
    assert escape(text) == expected


@given(ANYTHING, ANYTHING)
def test_text_cannot_be_forged(message: str, detail: str) -> None:
    """One record is one line with a stamp; whatever is below it is indented."""
    first, *rest = format_text(WHEN, "info", 7, message, detail, {}).split("\n")[:-1]
    assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.123 [+-]\d{4} \[7\] info ", first)
    assert all(line.startswith("    ") for line in rest)
    assert all(line.isprintable() for line in (first, *rest))


def test_text() -> None:
    text = format_text(WHEN, "error", 4711, "it failed", "Traceback\n  line\n", {"worker": 1})
    assert text.partition(" [4711] ")[2] == "error it failed\n    Traceback\n      line\n"


@given(ANYTHING, ANYTHING)
def test_json_is_one_object_a_line(message: str, detail: str) -> None:
    text = format_json(WHEN, "info", 7, message, detail, {"worker": 1, "odd": Path("x")})
    assert text.count("\n") == 1
    record = json.loads(text.encode())
    assert (record["message"], record.get("detail", ""), record["worker"], record["odd"]) == (message, detail, 1, "x")
    assert (record["time"], record["level"], record["pid"]) == ("2023-11-14T22:13:20.123Z", "info", 7)


@pytest.fixture
def file(tmp_path: Path) -> tuple[int, Callable[[], list[str]]]:
    fd = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT)
    return fd, lambda: (tmp_path / "log").read_text().splitlines()


@pytest.mark.parametrize("least", LEVELS)
def test_levels(file: tuple[int, Callable[[], list[str]]], least: str) -> None:
    fd, lines = file
    log = Log(least, "json", fd)
    for level in LEVELS:
        getattr(log, level)(f"a {level}", number=1)
    wanted = [level for level in LEVELS if LEVELS[level] >= LEVELS[least]]
    assert [json.loads(line)["level"] for line in lines()] == wanted
    assert json.loads(lines()[0])["number"] == 1


def test_a_record_is_one_write(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that lines of many processes do not mix."""
    written: list[bytes] = []

    def write(_fd: int, data: bytes) -> int:
        written.append(data)
        return len(data)

    monkeypatch.setattr(os, "write", write)
    Log().error("message", "detail\n" * 100)
    assert len(written) == 1


def test_a_log_that_cannot_be_written_stops_nothing() -> None:
    """A closed descriptor, a reader that is gone, a full pipe that does not block."""
    write_all(99999, b"data")
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    write_all(writer, bytes(10_000_000))
    os.close(reader)
    write_all(writer, b"data")
    os.close(writer)
    Log(fd=99999).error("message")


def test_write_all_goes_on_after_a_short_write(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[bytes] = []

    def write(_fd: int, data: bytes) -> int:
        written.append(data[:3])
        return len(written[-1])

    monkeypatch.setattr(os, "write", write)
    write_all(1, b"0123456789")
    assert b"".join(written) == b"0123456789"


# ----------------------------------------------------------------------------------------------------------- access log


class MadeLoop:
    def __init__(self) -> None:
        self.soon: list[Callable[[], None]] = []

    def call_soon(self, callback: Callable[[], None]) -> None:
        self.soon.append(callback)


def exchange(target: bytes = b"/a?b", status: int = 200, client: tuple[str, int] | None = ("10.0.0.1", 1)) -> Any:
    head = SimpleNamespace(method="GET", target=target, version="1.1")
    return SimpleNamespace(head=head, client=client, status=status, sent=13, started_at=logs.time.perf_counter())


@pytest.fixture
def access(file: tuple[int, Callable[[], list[str]]]) -> Callable[..., Any]:
    """`access(style)`: an access log, its loop, and the lines that it has written."""

    def access(style: str = "text") -> tuple[AccessLog, MadeLoop, Callable[[], list[str]]]:
        loop = MadeLoop()
        return AccessLog(file[0], style, loop), loop, file[1]  # type: ignore[arg-type]

    return access


LINE = re.compile(
    r'(\S+) - - \[\d\d/[A-Z][a-z]{2}/\d{4}:\d\d:\d\d:\d\d [+-]\d{4}\] "([^"]*)" (\d+) (\d+) \d\.\d{6}(.*)'
)


def test_access_in_the_common_format(access: Callable[..., Any]) -> None:
    log, _, lines = access()
    log.write(exchange())
    log.write(exchange(status=0, client=None), cut=True)
    log.write(exchange(b'/"x" \\"y'))
    log.write_refusal(SimpleNamespace(client=("10.0.0.2", 2)), 400)
    log.write_refusal(SimpleNamespace(client=None), 431)
    log.flush()
    found = [LINE.fullmatch(line) for line in lines()]
    assert [match and match.groups() for match in found] == [
        ("10.0.0.1", "GET /a?b HTTP/1.1", "200", "13", ""),
        ("-", "GET /a?b HTTP/1.1", "499", "13", " cut"),
        ("10.0.0.1", "GET /\\x22x\\x22 \\x5c\\x22y HTTP/1.1", "200", "13", ""),
        ("10.0.0.2", "-", "400", "0", ""),
        ("-", "-", "431", "0", ""),
    ]


def test_access_in_json(access: Callable[..., Any]) -> None:
    log, _, lines = access("json")
    log.write(exchange(b'/"x"'), cut=True)
    log.flush()
    record = json.loads(lines()[0])
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", record.pop("time"))
    assert 0 <= record.pop("duration") < 60
    assert record == {"client": "10.0.0.1", "method": "GET", "target": '/"x"', "version": "1.1", "status": 200,
                      "bytes": 13, "cut": True}  # fmt: skip


def test_access_is_written_once_a_turn(access: Callable[..., Any]) -> None:
    log, loop, lines = access()
    for _ in range(10):
        log.write(exchange())
    assert (len(loop.soon), lines()) == (1, [])
    loop.soon.pop()()
    assert len(lines()) == 10
    log.flush()
    assert len(lines()) == 10
    log.write(exchange())
    assert len(loop.soon) == 1


def test_access_does_not_gather_without_bound(access: Callable[..., Any]) -> None:
    log, loop, lines = access()
    for _ in range(1000):
        log.write(exchange(b"/" + b"x" * 1000))
    assert len(lines()) > 900
    assert len(loop.soon) > 0


def test_open_access_log(tmp_path: Path) -> None:
    """`-` is standard output; a file is appended to, and no child inherits it."""
    assert open_access_log("-") == 1
    path = tmp_path / "access"
    path.write_text("before\n")
    fd = open_access_log(str(path))
    write_all(fd, b"after\n")
    assert not os.get_inheritable(fd)
    os.close(fd)
    assert path.read_text() == "before\nafter\n"
    with pytest.raises(IsADirectoryError):
        open_access_log(str(tmp_path))
