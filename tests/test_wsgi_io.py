"""`wsgi.input`, `wsgi.errors` and `wsgi.file_wrapper` without a server: their own rules."""

from __future__ import annotations

import gzip
import io
import json
import os
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apphost.interfaces.wsgi_io import BodyInput, ErrorLog, FileWrapper, file_to_send, plain_file
from apphost.logs import Log
from apphost.protocols.base import ClientDisconnected
from tests.rawhttp import DEADLINE


class FakeRequest:
    """A request whose body arrives in `pieces`, one for each time that the application waits; None: the client goes.

    `post` runs at once what should run on the loop, as if the loop were infinitely fast.
    """

    def __init__(self, pieces: list[bytes | None]) -> None:
        self.pieces = pieces
        self.gone = self.complete = False
        self.asked = 0
        self.interface = self.pool = self.stream = self

    def post(self, job: Callable[[], None]) -> None:
        self.asked += 1
        if self.pieces and self.pieces[0] is None:
            self.gone = True
        job()

    def take_body(self) -> tuple[bytes, bool]:
        piece = self.pieces.pop(0) if self.pieces else b""
        assert piece is not None
        return piece, bool(self.pieces)


def made(pieces: list[bytes | None], start: bytes = b"") -> tuple[BodyInput, FakeRequest]:
    request = FakeRequest(list(pieces))
    return BodyInput(request, start), request  # type: ignore[arg-type]


STEPS = st.one_of(
    st.tuples(st.sampled_from(["read", "readline", "readlines"]), st.one_of(st.none(), st.integers(-1, 40))),
    st.tuples(st.just("readinto"), st.integers(0, 40)),
    st.tuples(st.just("iterate"), st.integers(1, 3)),
)


def perform(file: Any, step: tuple[str, Any]) -> object:
    name, argument = step
    if name == "readinto":
        return file.read(argument) if isinstance(file, io.BytesIO) else into(file, argument)
    if name == "iterate":
        return [line for line, _ in zip(file, range(argument), strict=False)]
    return getattr(file, name)(argument)


def into(file: BodyInput, size: int) -> bytes:
    buffer = bytearray(size)
    return bytes(buffer[: file.readinto(buffer)])


@given(
    pieces=st.lists(st.text("ab\n", min_size=1, max_size=20).map(str.encode), max_size=6),
    start=st.text("ab\n", max_size=20).map(str.encode),
    steps=st.lists(STEPS, max_size=8),
)
def test_like_a_file_of_python(pieces: list[bytes], start: bytes, steps: list[tuple[str, Any]]) -> None:
    """G5: every sequence of reads gives what `BytesIO` gives, in whatever pieces the body arrives; then b""."""
    body, _ = made([*pieces], start)
    file = io.BytesIO(start + b"".join(pieces))
    for step in steps:
        assert perform(body, step) == perform(file, step)
    assert body.read() == file.read()
    assert (body.read(), body.readline(), body.readlines(), list(body)) == (b"", b"", [], [])


def test_asks_for_no_more_than_it_needs() -> None:
    """G5, G7: the client is only asked (and told to go on) when what has arrived is not enough."""
    body, request = made([b"lo\nwor", b"ld"], b"hel")
    assert (body.read(2), request.asked) == (b"he", 0)
    assert (body.readline(), request.asked) == (b"llo\n", 1)
    assert (body.read(3), request.asked) == (b"wor", 1)
    assert (body.read(0), body.readline(0), request.asked) == (b"", b"", 1)
    assert (body.read(5), request.asked) == (b"ld", 2)
    assert (body.read(), request.asked) == (b"", 2)  # the end is known: nobody is asked again


def test_client_goes() -> None:
    """G5, R5: an OSError for every read from then on; what has arrived before may be had by smaller reads."""
    body, _ = made([b"more", None], b"some")
    assert body.read(6) == b"somemo"
    with pytest.raises(ClientDisconnected):
        body.read()
    with pytest.raises(OSError, match="before its request body was complete"):
        body.readline()


def test_client_goes_while_the_application_waits() -> None:
    """G5: the waiting thread is woken."""
    request = FakeRequest([])
    posted = threading.Event()
    request.post = lambda job: posted.set()  # type: ignore[method-assign]
    body = BodyInput(request, b"")  # type: ignore[arg-type]
    raised: list[type[BaseException]] = []

    def read() -> None:
        try:
            body.read()
        except ClientDisconnected as exc:
            raised.append(type(exc))

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    assert posted.wait(DEADLINE)
    request.gone = True
    body.arrived()
    thread.join(DEADLINE)
    assert raised == [ClientDisconnected]


def test_what_is_left_when_the_response_is_complete() -> None:
    """G5: thrown away, so a read raises: it neither waits for ever nor looks like the end of the body."""
    body, request = made([b"more", b"and more"], b"some")
    assert body.read(6) == b"somemo"
    request.complete = True
    assert body.read(2) == b"re"
    for _ in range(2):
        with pytest.raises(ClientDisconnected, match="the response is complete"):
            body.read(1)


def test_is_a_binary_file() -> None:
    """G5: for io.TextIOWrapper, io.BufferedReader and what else takes a file."""
    body, _ = made([b"eins\nzw", b"\xc3\xb6lf\n"])
    assert (body.readable(), body.writable(), body.seekable(), body.closed) == (True, False, False, False)
    assert io.TextIOWrapper(io.BufferedReader(body), "utf-8").read() == "eins\nzw\xf6lf\n"


# -------------------------------------------------------------------------------------------------------------- errors


def errors(tmp_path: Path) -> tuple[ErrorLog, Callable[[], list[dict[str, str]]]]:
    fd = os.open(tmp_path / "log", os.O_RDWR | os.O_CREAT)

    def written() -> list[dict[str, str]]:
        return [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]

    return ErrorLog(Log("info", "json", fd), "worker 1 gen 1"), written


def test_errors_in_whole_lines(tmp_path: Path) -> None:
    """G6: pieces are put together to lines; several lines in one write are one record; flush ends a line."""
    log, written = errors(tmp_path)
    assert log.write("first ") == 6
    assert written() == []
    log.write("line\nsecond")
    assert [record["message"] for record in written()] == ["worker 1 gen 1: wsgi.errors: first line"]
    log.flush()
    log.flush()
    log.writelines(["Traceback\n  one\n", "  two\n"])
    print("a", 1, file=log)
    records = written()[1:]
    assert [record["message"].rpartition(": ")[2] for record in records] == ["second", "Traceback", "  two", "a 1"]
    assert records[1]["detail"] == "  one"
    assert {record["level"] for record in records} == {"error"}


def test_errors_any_text(tmp_path: Path) -> None:
    """G6"""
    log, written = errors(tmp_path)
    log.write("\u2603 \U0001f40d \ud800 \0 \x1b[31m\n")
    assert written()[0]["message"].endswith("\u2603 \U0001f40d \ud800 \0 \x1b[31m")
    assert log.writable()
    with pytest.raises(TypeError):
        log.write(b"bytes\n")  # type: ignore[arg-type]


def test_errors_stay_open(tmp_path: Path) -> None:
    """G6: they belong to every request of the worker, also those after one that has closed them."""
    path = tmp_path / "log"
    log = ErrorLog(Log(fd=os.open(path, os.O_WRONLY | os.O_CREAT)), "worker 1")
    log.close()
    log.writelines(["still\n", "there\n"])
    assert not log.closed
    assert [line.rpartition(": ")[2] for line in path.read_text().splitlines()] == ["still", "there"]


def test_errors_of_two_threads_do_not_mix(tmp_path: Path) -> None:
    """G6: half a line of one request is not continued by another."""
    log, written = errors(tmp_path)
    log.write("mine ")
    thread = threading.Thread(target=lambda: log.write("other\n"))
    thread.start()
    thread.join()
    log.write("still mine\n")
    assert [record["message"].rpartition(": ")[2] for record in written()] == ["other", "mine still mine"]


# --------------------------------------------------------------------------------------------------------------- files


class Plain:
    def read(self, size: int) -> bytes:
        return b""


def test_wrapper_iterates_in_blocks() -> None:
    """G18"""
    file = io.BytesIO(b"0123456789")
    assert list(FileWrapper(file, 4)) == [b"0123", b"4567", b"89"]
    wrapper = FileWrapper(file)
    wrapper.close()
    assert file.closed
    assert not hasattr(FileWrapper(Plain()), "close")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(b"0123456789" * 1000)
    return path


def test_file_to_send(path: Path) -> None:
    """G18: from where the application has read to, to the end."""
    with open(path, "rb") as file:
        assert file_to_send(FileWrapper(file), False) == (file.fileno(), 0, 10_000)
        file.read(10)
        assert file_to_send(FileWrapper(file), False) == (file.fileno(), 10, 9_990)
        assert file_to_send(FileWrapper(file), True) is None  # something has been written before
        file.read()
        assert file_to_send(FileWrapper(file), False) is None  # nothing is left
    assert file_to_send(FileWrapper(file), False) is None  # closed


def test_a_file_with_writes_that_are_not_out_yet() -> None:
    """G18: the kernel sends what `read` would give. A seek within what was read ahead writes nothing out."""
    with tempfile.TemporaryFile() as file:
        file.write(b"A" * 100)
        file.seek(0)
        file.read(10)
        file.write(b"C" * 20)
        file.seek(2)
        sent = file_to_send(FileWrapper(file), False)
        assert sent is not None
        assert os.pread(sent[0], sent[2], sent[1]) == file.read() == b"A" * 8 + b"C" * 20 + b"A" * 70


def test_files_that_are_not_sent(path: Path) -> None:
    """G18: only what the kernel would read as the application's `read` does."""
    path.with_suffix(".gz").write_bytes(gzip.compress(b"packed"))
    reader, writer = os.pipe()
    os.close(writer)
    with (
        gzip.open(path.with_suffix(".gz")) as unpacked,
        open(path, encoding="ascii") as text,
        open(reader, "rb") as pipe,
        io.BufferedReader(unpacked) as over,  # type: ignore[arg-type]
    ):
        assert unpacked.fileno() > 0
        for file in (unpacked, text, pipe, over, io.BytesIO(b"x"), Plain()):
            assert file_to_send(FileWrapper(file), False) is None


class Passing:
    """As a File of Django: `read` is the one of the file within."""

    def __init__(self, file: Any) -> None:
        self.file = file
        self.read = file.read


class Changing:
    def __init__(self, file: Any) -> None:
        self.file = file
        self.fileno = file.fileno
        self.tell = file.tell

    def read(self, size: int) -> bytes:
        return bytes(self.file.read(size)).swapcase()


def test_plain_files(path: Path) -> None:
    """G18"""
    with open(path, "rb") as file, open(path, "rb", buffering=0) as raw, tempfile.NamedTemporaryFile() as temporary:
        assert plain_file(file) is file
        assert plain_file(raw) is raw
        assert plain_file(temporary) is temporary.file
        assert plain_file(Passing(file)) is file
        assert plain_file(Changing(file)) is None
