"""The server's log: its lines, and that nothing a client or an application says can forge one."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apphost import logs
from apphost.logs import LEVELS, Log, Outlet, escape, format_json, format_text, is_journal, open_log

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
    """A closed descriptor, a reader that is gone."""
    Outlet(99999).write(b"data")
    reader, writer = os.pipe()
    os.close(reader)
    outlet = Outlet(writer)
    outlet.write(b"data")
    os.close(writer)
    assert outlet.lost == 0
    Log(fd=99999).error("message")


@pytest.mark.parametrize("blocking", [True, False])
def test_a_reader_that_has_stopped_stops_nothing(blocking: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is waited for once; what it misses is counted, and told when it reads again, in whole lines."""
    monkeypatch.setattr(logs, "PATIENCE", 0.05)
    reader, writer = os.pipe()
    os.set_blocking(writer, blocking)
    log = Log("info", "text", writer)
    log.info("first")
    before = time.monotonic()
    for _ in range(300):
        log.info("x" * 1000)
    assert time.monotonic() - before < 5  # not 300 times the patience
    log.info("y" * 10_000)
    os.set_blocking(reader, False)
    taken = drain(reader)
    log.info("last")
    told, last = drain(reader).decode().splitlines()[-2:]
    os.close(reader)
    os.close(writer)
    assert " first\n" in taken.decode()
    dropped = 301 - taken.count(b"xxx\n")
    assert f"warning {dropped} records of this log were dropped here" in told
    assert last.endswith(" info last")


def drain(reader: int) -> bytes:
    """All that is in a pipe."""
    data = b""
    while True:
        try:
            data += os.read(reader, 65536)
        except BlockingIOError:
            return data


def test_an_outlet_goes_on_after_a_short_write(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[bytes] = []

    def write(_fd: int, data: bytes) -> int:
        written.append(data[:3])
        return len(written[-1])

    monkeypatch.setattr(os, "write", write)
    Outlet(1).write(b"0123456789")
    assert b"".join(written) == b"0123456789"


def test_a_record_that_was_torn_does_not_spoil_the_next_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "PATIENCE", 0.0)
    reader, writer = os.pipe()
    outlet = Outlet(writer)
    outlet.write(b"x" * 1_000_000 + b"\n")
    assert outlet.lost == 1
    got = os.read(reader, 1_000_000)
    assert set(got) == set(b"x")
    outlet.write(b"next\n")
    assert os.read(reader, 100) == b"\nnext\n"
    os.close(reader)
    os.close(writer)


def test_open_log(tmp_path: Path) -> None:
    """`-` is what standard output is, but not its number; a file is appended to, and no child inherits either."""
    standard = open_log("-")
    assert standard not in (0, 1, 2)
    assert os.path.samestat(os.fstat(standard), os.fstat(1))
    os.close(standard)
    path = tmp_path / "access"
    path.write_text("before\n")
    fd = open_log("access", str(tmp_path))
    Outlet(fd).write(b"after\n")
    assert not os.get_inheritable(fd)
    os.close(fd)
    assert path.read_text() == "before\nafter\n"
    with pytest.raises(IsADirectoryError):
        open_log(str(tmp_path))


def test_the_mode_of_a_new_file(tmp_path: Path) -> None:
    os.close(open_log("new", str(tmp_path)))
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o640 & ~_umask()


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def test_a_closed_standard_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then there is nobody to read; what has its number later is not written to."""

    def dup(_fd: int) -> int:
        raise OSError(9, "Bad file descriptor")

    monkeypatch.setattr(os, "dup", dup)
    fd = open_log("/dev/stderr")
    assert os.path.samestat(os.fstat(fd), os.stat(os.devnull))
    os.close(fd)


def test_levels_and_styles_can_change(file: tuple[int, Callable[[], list[str]]]) -> None:
    fd, lines = file
    log = Log("error", "text", fd)
    log.info("not said")
    log.adopt("info", "json")
    log.info("said")
    assert [json.loads(line)["message"] for line in lines()] == ["said"]


def test_relay(file: tuple[int, Callable[[], list[str]]]) -> None:
    """It hears what is written, and nothing else."""
    log = Log("warning", "text", file[0])
    heard: list[tuple[str, str, str]] = []
    log.relay = lambda *said: heard.append(said)
    log.info("one")
    log.write("error", "two", "detail")
    assert heard == [("error", "two", "detail")]
    assert len(file[1]()) == 2


# ------------------------------------------------------------------------------------------------------------- journald


def test_journal_stream(file: tuple[int, Callable[[], list[str]]], monkeypatch: pytest.MonkeyPatch) -> None:
    """sd-daemon(3): a priority in front of each line, in place of the time, but only on the stream that is meant."""
    fd, lines = file
    stat = os.fstat(fd)
    monkeypatch.setenv("JOURNAL_STREAM", f"{stat.st_dev}:{stat.st_ino}")
    log = Log("debug", "text", fd)
    for level in LEVELS:
        log.write(level, f"a {level}\nforged", "one\ntwo")
    pid = os.getpid()
    assert lines()[:3] == [f"<7>[{pid}] a debug\\nforged", "<7>    one", "<7>    two"]
    assert [line[:3] for line in lines()[::3]] == ["<7>", "<6>", "<4>", "<3>"]
    log.adopt("debug", "json")
    log.error("last")
    assert lines()[-1].startswith("<3>{")
    assert json.loads(lines()[-1][3:])["message"] == "last"


@pytest.mark.parametrize("stream", ["", "1:2", "nonsense", "0:0"])
def test_what_is_no_journal_stream(file: tuple[int, Callable[[], list[str]]], stream: str) -> None:
    assert not is_journal(file[0], {"JOURNAL_STREAM": stream})
    assert not is_journal(99999, {"JOURNAL_STREAM": stream})
