"""The pidfile: a lock, not a number."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from apphost.arbiter.pidfile import PidFile, is_at_path
from apphost.errors import AlreadyRunningError, PrivilegesError
from tests.support import OWN_CODE

HOLD = "import sys, apphost.arbiter.pidfile as p; f = p.PidFile(sys.argv[1]); print('held', flush=True); input()"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "apphost.pid"


def test_content_and_removal(path: Path) -> None:
    pidfile = PidFile(str(path))
    assert path.read_text() == f"{os.getpid()}\n"
    assert path.stat().st_mode & 0o777 & ~0o644 == 0
    pidfile.remove()
    assert not path.exists()
    PidFile(str(path)).remove()  # the lock is free again


def test_held_by_another(path: Path) -> None:
    """Named in the message; its file is not touched. A lock of ours counts like one of another process."""
    pidfile = PidFile(str(path))
    with pytest.raises(AlreadyRunningError, match=f"process {os.getpid()} holds the pidfile {path}"):
        PidFile(str(path))
    assert path.read_text() == f"{os.getpid()}\n"
    pidfile.remove()


def test_holder_that_was_killed(path: Path) -> None:
    """The lock ends with the process; what it left is taken over, whoever has its number by now."""
    command = [sys.executable, "-c", HOLD, str(path)]
    env = {**os.environ, "PYTHONPATH": str(OWN_CODE.parent)}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(AlreadyRunningError, match=f"process {holder.pid} holds"):
            PidFile(str(path))
        holder.kill()
        holder.wait()
    assert path.read_text() == f"{holder.pid}\n"
    pidfile = PidFile(str(path))
    assert path.read_text() == f"{os.getpid()}\n"
    pidfile.remove()


@pytest.mark.parametrize("text", ["", "1\n", "999999999999999999999\n", "nonsense", "\xff\xfe"])
def test_stale_file(path: Path, text: str) -> None:
    """Whatever it says, even the number of a living process: nobody holds the lock."""
    path.write_text(text, encoding="latin-1")
    pidfile = PidFile(str(path))
    assert path.read_text() == f"{os.getpid()}\n"
    pidfile.remove()


def test_file_of_a_successor_is_not_removed(path: Path) -> None:
    """Somebody removed ours by hand, and another one started."""
    first = PidFile(str(path))
    path.unlink()
    second = PidFile(str(path))
    first.remove()
    assert path.exists()
    second.remove()
    assert not path.exists()


def test_file_that_is_gone(path: Path) -> None:
    pidfile = PidFile(str(path))
    path.unlink()
    pidfile.remove()
    assert not path.exists()


def test_file_that_is_gone_before_it_is_opened(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its owner ends between our finding it and our opening it."""
    path.write_text("1\n")
    real_open = os.open

    def lose_then_open(name: str, flags: int, *args: int) -> int:
        if name == str(path) and path.exists():
            path.unlink()
        return real_open(name, flags, *args)

    monkeypatch.setattr(os, "open", lose_then_open)
    PidFile(str(path)).remove()
    assert not path.exists()


def test_file_that_is_replaced_before_it_is_locked(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another one has replaced the stale file: the lock on what is not there any more is worth nothing."""
    path.write_text("1\n")
    real_flock = fcntl.flock
    others: list[PidFile] = []

    def let_another_win(fd: int, operation: int) -> None:
        if is_at_path(fd, str(path)) and not others:
            monkeypatch.setattr(fcntl, "flock", real_flock)
            others.append(PidFile(str(path)))
        real_flock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", let_another_win)
    with pytest.raises(AlreadyRunningError, match=f"process {os.getpid()} holds"):
        PidFile(str(path))
    assert path.read_text() == f"{os.getpid()}\n"
    others[0].remove()


def test_whoever_reads_it_finds_a_whole_number(path: Path) -> None:
    """Atomic: it comes complete, and in place of a longer stale one."""
    path.write_text("123456789\n")
    found: set[str] = set()
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            with contextlib.suppress(FileNotFoundError):
                found.add(path.read_text())

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(200):
        pidfile = PidFile(str(path))
        if number % 2:
            pidfile.remove()
        else:
            os.close(pidfile.fileno())  # as if killed: stale, and replaced by the next one
    done.set()
    reader.join()
    assert found <= {"123456789\n", f"{os.getpid()}\n"}


def test_of_many_starters_one_wins(path: Path) -> None:
    """All at once, over a stale file: exactly one holds it, and its number stands there."""
    path.write_text("1\n")
    command = [sys.executable, "-c", HOLD, str(path)]
    env = {**os.environ, "PYTHONPATH": str(OWN_CODE.parent)}
    pipe = subprocess.PIPE
    starters = [subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, env=env) for _ in range(6)]
    held = [each for each in starters if each.stdout is not None and each.stdout.readline() == b"held\n"]
    try:
        assert len(held) == 1
        assert path.read_text() == f"{held[0].pid}\n"
    finally:
        errors = [each.communicate(b"\n")[1] for each in starters]
    assert sum(b"AlreadyRunningError" in error for error in errors) == 5
    assert [each.name for each in path.parent.iterdir()] == [path.name], "no drafts are left"


@pytest.mark.parametrize("kind", ["link to a file", "dangling link", "pipe", "socket"])
def test_something_else_in_its_place(path: Path, kind: str) -> None:
    """In a folder that others may write to, a link leads anywhere: it is refused, and nothing is written through it."""
    precious = path.parent / "precious"
    with socket.socket(socket.AF_UNIX) as sock:
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "socket":
            sock.bind(str(path))
        else:
            path.symlink_to(precious)
        if kind == "link to a file":
            precious.write_text("data")
        with pytest.raises(PrivilegesError, match=f"cannot write the pidfile {path}: "):
            PidFile(str(path))
    assert not precious.exists() or precious.read_text() == "data"
    assert precious.exists() == (kind == "link to a file")
    assert not list(path.parent.glob(".*"))


def test_a_stale_file_is_replaced_and_not_written_to(path: Path) -> None:
    """Somebody else has left it, writable for everybody, and under a second name: neither is a way into ours."""
    path.write_text("1\n")
    path.chmod(0o666)
    os.link(path, path.parent / "second")
    pidfile = PidFile(str(path))
    assert path.stat().st_mode & 0o022 == 0
    assert (path.parent / "second").read_text() == "1\n"
    pidfile.remove()


@pytest.mark.parametrize("where", ["missing/pid", "."])
def test_cannot_be_written(tmp_path: Path, where: str) -> None:
    with pytest.raises(PrivilegesError, match=r"cannot write the pidfile .*: (No such file|Is a directory)"):
        PidFile(os.path.join(tmp_path, where))


def test_is_not_inherited(path: Path) -> None:
    """A child that lives on would keep the lock."""
    pidfile = PidFile(str(path))
    assert not os.get_inheritable(pidfile._fd)
    pidfile.remove()
