"""The pidfile: a lock, not a number."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from apphost.arbiter.pidfile import PidFile
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


def test_file_that_is_replaced_while_it_is_opened(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its owner ends between our open and our lock: the lock on a removed file is worth nothing."""
    real_open = os.open
    opened: list[int] = []

    def open_then_lose(*args: object, **options: object) -> int:
        fd = real_open(*args, **options)  # type: ignore[arg-type]
        opened.append(fd)
        if len(opened) == 1:
            path.unlink()
        return fd

    monkeypatch.setattr(os, "open", open_then_lose)
    pidfile = PidFile(str(path))
    assert len(opened) == 2
    assert path.read_text() == f"{os.getpid()}\n"
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
