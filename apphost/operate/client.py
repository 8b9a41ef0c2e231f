"""Finding a running arbiter and talking to it over its control socket (docs/control.md). Blocking, with deadlines."""

from __future__ import annotations

import json
import os
import select
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from apphost.endpoint import AUTO, OFF, abstract_sockets, find_abstract
from apphost.errors import ApphostError, GoneError, TimedOutError, UnreachableError
from apphost.logs import escape
from apphost.peers import Peer, peer_of
from apphost.settings import ENV_PREFIX

FOREVER = float("inf")
CONNECT_TIMEOUT = 5.0  # s; the kernel connects at once unless the arbiter's backlog is full
COME_BACK = 20.0  # s for an arbiter that replaces its program to answer again
LINE_MAX = 1 << 23  # bytes of a line of the answer; the arbiter sends less than half of that
SERVERS_SHOWN = 16  # of several, to choose from: a screenful
INTRODUCE_TIMEOUT = 0.5  # s for each of them to say what it is
_READ_SIZE = 65536
_CHECK = 0.05  # s between two looks at a process where the system does not tell of its end

Line = dict[str, Any]


class Ended(Exception):
    """The arbiter has closed the connection before its answer was complete."""


@dataclass(frozen=True, slots=True)
class Target:
    """Which server is meant; nothing: the only one."""

    pid: int = 0
    pidfile: str = ""
    control: str = ""

    @classmethod
    def chosen(cls, pid: int, pidfile: str, control: str, environ: Mapping[str, str]) -> Target:
        """From options, or where there are none from the variables that the server itself reads."""
        if not (pid or pidfile or control):
            control = environ.get(f"{ENV_PREFIX}CONTROL", "")
            control = "" if control in (AUTO, OFF) else control
            pidfile = "" if control else environ.get(f"{ENV_PREFIX}PIDFILE", "")
        return cls(pid, "" if pid else pidfile, control)


class Session:
    """A connection to an arbiter. `address`: to connect to again. `peer`: who it is, None where nobody tells."""

    def __init__(self, sock: socket.socket, address: bytes | str, peer: Peer | None) -> None:
        self.sock = sock
        self.address = address
        self.peer = peer
        self.process = Process(peer.pid if peer is not None else 0)
        self._rest = b""

    def talk(self, request: Line, deadline: float, patience: float = FOREVER) -> Iterator[Line]:
        """Send a request; the lines of its answer, the last of which has `done`. Raises `Ended`, `TimedOutError`,
        and `UnreachableError` for a request that was refused.

        patience: s for each line, where an answer is never silent for longer.
        """
        try:
            self.sock.settimeout(_left(min(deadline, time.monotonic() + patience)))
            self.sock.sendall(json.dumps(request).encode() + b"\n")
        except TimeoutError:
            raise TimedOutError("the arbiter does not read its control socket") from None
        except OSError:
            pass  # why may stand in what it has sent
        while True:
            line = self._line(min(deadline, time.monotonic() + patience))
            if line.get("error") and line.get("done"):
                raise UnreachableError(f"the arbiter refused: {line['error']}")
            yield line
            if line.get("done"):
                return

    def silence(self, seconds: float | None = None) -> str:
        """What to say when nothing has come, for `seconds`."""
        within = f" within {seconds:g} s" if seconds is not None else " in time"
        told = f"the arbiter{self.process} has not answered{within}"
        if self.process.stopped():
            return f"{told}: its process is stopped, by SIGSTOP or a debugger: `kill -CONT {self.process.pid}`"
        return f"{told}: it, or the machine, is very busy, or nobody reads the log that it writes. Its workers serve on"

    def ask(self, request: Line, timeout: float) -> Line:
        """The last line of the answer."""
        try:
            *_, last = self.talk(request, time.monotonic() + timeout)
        except TimedOutError:
            raise TimedOutError(self.silence(timeout)) from None
        return last

    def _line(self, deadline: float) -> Line:
        while b"\n" not in self._rest:
            if len(self._rest) > LINE_MAX:
                raise UnreachableError("what listens there is no arbiter: it sends a line without an end")
            try:
                self.sock.settimeout(_left(deadline))
                data = self.sock.recv(_READ_SIZE)
            except TimeoutError:
                raise TimedOutError(self.silence()) from None
            except OSError:
                data = b""
            if not data:
                raise Ended
            self._rest += data
        text, _, self._rest = self._rest.partition(b"\n")
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            line = None
        if not isinstance(line, dict):
            raise UnreachableError("what listens there is no arbiter: it does not send JSON objects")
        return line

    def again(self, deadline: float) -> None:
        """Connect once more to the same arbiter, which may have replaced its program. Raises `GoneError`."""
        self.sock.close()
        self._rest = b""
        limit = min(deadline, time.monotonic() + COME_BACK)
        while not self.process.gone():
            try:
                sock = connect(self.address)
            except OSError:
                sock = None
            if sock is not None:
                if peer_of(sock) == self.peer:
                    self.sock = sock
                    return
                sock.close()
                break
            if time.monotonic() > limit:
                break
            time.sleep(_CHECK)
        raise GoneError(f"the arbiter{self.process} has ended")

    def close(self) -> None:
        self.sock.close()
        self.process.close()


class Process:
    """The arbiter as a process, to see that it has gone even where its pid is given away anew."""

    def __init__(self, pid: int) -> None:
        """`pid`: 0 if it is not known or not visible."""
        self.pid = pid
        self._fd = -1
        if pid and hasattr(os, "pidfd_open"):
            try:
                self._fd = os.pidfd_open(pid)
            except OSError:
                pass

    def __str__(self) -> str:
        return f", pid {self.pid}," if self.pid else ""

    def gone(self) -> bool:
        """False also where we cannot see it."""
        if self._fd >= 0:
            return bool(select.select([self._fd], [], [], 0)[0])
        if not self.pid:
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass
        return False

    def stopped(self) -> bool:
        """Whether it is known to be suspended."""
        return _state(self.pid) in ("T", "t")

    def wait(self, deadline: float) -> bool:
        """Whether it goes in time."""
        while not self.gone():
            if not self.pid:
                return True  # the end of its control socket is all that we see
            if time.monotonic() > deadline:
                return False
            time.sleep(_CHECK)
        return True

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _left(deadline: float) -> float:
    return max(0.001, deadline - time.monotonic())


def connect(address: bytes | str) -> socket.socket:
    """Raises `OSError`."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(CONNECT_TIMEOUT)
        sock.connect(address)
    except BaseException:
        sock.close()
        raise
    return sock


def open_session(target: Target) -> Session:
    """Raises `UnreachableError` that says what was looked for, and what to do."""
    if target.control:
        return _at_path(target.control)
    pid = target.pid or (_read_pid(target.pidfile) if target.pidfile else 0)
    found = list(sessions())
    chosen = choose(found, pid, [session.named for session in found])
    for session in found:
        if session not in chosen:
            session.close()
    if len(chosen) == 1:
        return chosen[0]
    if not chosen:
        raise UnreachableError(_nothing_found(target, pid))
    pids = ", ".join(str(session.peer.pid or f"{session.named} (in its own namespace)") for session in chosen)
    served = "\n".join(map(_introduce, chosen[:SERVERS_SHOWN]))
    for session in chosen:
        session.close()
    raise UnreachableError(f"there are several servers: pid {pids}. Name one with --pid or --pidfile", served)


def _introduce(session: Discovered) -> str:
    """What distinguishes it from other servers of this user, as far as it tells."""
    which = f"    --pid {session.peer.pid or session.named}"
    try:
        found = session.ask({"do": "status"}, INTRODUCE_TIMEOUT)["status"]
        return escape(f"{which}  {found['app']} in {found['cwd']}, {', '.join(found['listening']) or 'stopping'}")
    except (ApphostError, Ended, LookupError, TypeError):
        return f"{which}  does not say what it serves"


def _nothing_found(target: Target, pid: int) -> str:
    hint = "a server whose setting `control` is a path is found with --control PATH, one where it is off is not"
    if not abstract_sockets():
        return "on this system the server needs the setting `control` with a path: name it with --control PATH"
    if not pid:
        return f"no server of this user is running here ({hint})"
    whose = f", which {target.pidfile} names," if target.pidfile else ""
    if _ended(pid):
        return f"there is no process {pid}{whose.rstrip(',')}: that server has ended"
    owner = _owner(pid)
    if os.geteuid() not in (0, owner) and owner is not None:
        return f"process {pid}{whose} belongs to user {owner}: only that user and root may command it"
    return f"process {pid}{whose} is no server that this user may command ({hint})"


def _state(pid: int) -> str:
    """The letter of proc(5), empty where nobody tells."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""


def _ended(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass
    return _state(pid) == "Z"


def _owner(pid: int) -> int | None:
    """The user of a process, None where nobody tells."""
    try:
        return os.stat(f"/proc/{pid}").st_uid
    except OSError:
        return None


class Discovered(Session):
    """`named`: the pid in the name of its socket, as the arbiter sees itself."""

    peer: Peer

    def __init__(self, sock: socket.socket, address: bytes, peer: Peer, named: int) -> None:
        super().__init__(sock, address, peer)
        self.named = named


def sessions() -> Iterator[Discovered]:
    """With all arbiters of this network namespace that belong to us; for root, with everybody's."""
    try:
        table = find_abstract() if abstract_sockets() else []
    except OSError as exc:
        raise UnreachableError(
            f"/proc/net/unix cannot be read ({exc.strerror}), so servers cannot be found: give the server a path with "
            "the setting `control`, and name it with --control"
        ) from None
    for found in table:
        try:
            sock = connect(found.address)
        except OSError:
            continue  # it has just ended
        peer = peer_of(sock)
        # Anybody may bind such a name: what an arbiter of another user says does not interest, and orders are not
        # for it.
        if peer is None or (os.geteuid() not in (0, peer.uid)):
            sock.close()
            continue
        yield Discovered(sock, found.address, peer, found.pid)


def choose(found: list[Discovered], pid: int, named: list[int]) -> list[Discovered]:
    """Those that are meant. `pid`: 0 for any. One that lives in a pid namespace that we do not see into has no pid for
    us; then it is the one that it names itself by, but only if no visible one fits."""
    visible = [session for session in found if session.peer.pid and pid in (0, session.peer.pid)]
    hidden = [each for each, name in zip(found, named, strict=True) if not each.peer.pid and pid in (0, name)]
    fitting = visible or hidden
    own = [session for session in fitting if session.peer.uid == os.geteuid()]
    return own or fitting


def _at_path(path: str) -> Session:
    try:
        sock = connect(path)
    except OSError as exc:
        raise UnreachableError(f"cannot connect to the control socket {path}: {exc.strerror or exc}") from None
    return Session(sock, os.path.abspath(path), peer_of(sock))


def _read_pid(path: str) -> int:
    try:
        with open(path, encoding="ascii") as file:
            pid = int(file.read(32))
    except OSError as exc:
        raise UnreachableError(f"cannot read the pidfile {path}: {exc.strerror}") from None
    except ValueError:
        pid = 0
    if not 0 < pid < 2**31:  # 0 would be any server
        raise UnreachableError(f"{path} is no pidfile: it does not hold the number of a process")
    return pid


def follow(session: Session, request: Line, deadline: float, show: Callable[[Line], None]) -> Line:
    """Talk, and go on after the arbiter has replaced its program (USR2): the last line. `show` gets every line."""
    generation = 0
    while True:
        try:
            for line in session.talk(request, deadline):
                if line.get("event") == "waiting":
                    generation = int(line["generation"])
                show(line)
                if line.get("done"):
                    return line
        except Ended:
            session.again(deadline)
            request = {"do": "wait", "generation": generation}


__all__ = ["ApphostError", "Ended", "Line", "Session", "Target", "follow", "open_session", "sessions"]
