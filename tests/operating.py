"""Using the commands, and the control socket itself, against a `Server`."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from apphost.endpoint import find_abstract
from tests.support import DEADLINE, Server

Line = dict[str, Any]


def command(
    *args: str, env: Mapping[str, str] | None = None, prefix: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    """`apphost ARGS`, to its end."""
    return subprocess.run(
        [*prefix, sys.executable, "-m", "apphost", *args],
        capture_output=True, text=True, env=Server._environment(env or {}), timeout=DEADLINE, check=False,
    )  # fmt: skip


def begin(*args: str) -> subprocess.Popen[str]:
    """`apphost ARGS`, running."""
    return subprocess.Popen(
        [sys.executable, "-m", "apphost", *args],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=Server._environment({"PYTHONUNBUFFERED": "1"}),
    )  # fmt: skip


def operate(server: Server, name: str, *args: str) -> subprocess.CompletedProcess[str]:
    """A command for this server."""
    return command(name, *args, "--pid", str(server.pid))


def address(server: Server) -> bytes:
    (found,) = [each.address for each in find_abstract() if each.pid == server.pid]
    return found


class Control:
    """A connection to the control socket."""

    def __init__(self, where: Server | str | bytes) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(DEADLINE)
        self.sock.connect(address(where) if isinstance(where, Server) else where)
        self.file = self.sock.makefile("rb")

    def __enter__(self) -> Control:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.file.close()
        self.sock.close()

    def send(self, request: Line | bytes) -> None:
        self.sock.sendall(request if isinstance(request, bytes) else json.dumps(request).encode() + b"\n")

    def line(self) -> Line:
        """The next one; AssertionError at the end of the connection."""
        text = self.file.readline()
        assert text.endswith(b"\n"), f"the connection ended, after {text!r}"
        line = json.loads(text)
        assert isinstance(line, dict)
        return line

    def lines(self) -> list[Line]:
        """The rest of an answer."""
        found = [self.line()]
        while not found[-1].get("done"):
            found.append(self.line())
        return found

    def ask(self, request: Line | bytes) -> Line:
        """The last line of the answer."""
        self.send(request)
        return self.lines()[-1]

    def until(self, event: str) -> Line:
        while (line := self.line()).get("event") != event:
            assert not line.get("done"), line
        return line

    @property
    def ended(self) -> bool:
        """Whether the other side has closed, after whatever it has still said."""
        try:
            while self.sock.recv(65536):
                pass
        except TimeoutError:
            return False
        except OSError:
            pass
        return True


def status(server: Server) -> Line:
    with Control(server) as control:
        found = control.ask({"do": "status"})["status"]
    assert isinstance(found, dict)
    return found


NOBODY = 65534  # a user that owns nothing


def as_nobody(code: str, *args: str) -> subprocess.CompletedProcess[str]:
    """Run Python code as another user; only root can. `socket` and `sys` are imported: that user may not be able to."""
    script = f"import os, socket, sys; os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})\n{code}"
    return subprocess.run(
        [sys.executable, "-c", script, *args], capture_output=True, text=True, timeout=DEADLINE, check=False
    )


def is_root() -> bool:
    return os.geteuid() == 0
