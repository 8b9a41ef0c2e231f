"""What the arbiter takes from its processes, which may be of another user than it is, and what it leaves."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apphost.arbiter import hub, processes
from apphost.arbiter.hearsay import _NEEDED, _OPTIONAL, examine
from apphost.arbiter.processes import Failure, WorkerProcess
from apphost.errors import ExitCode
from apphost.logs import Log
from apphost.messages import Channel, Message, ProtocolError, encode
from apphost.peers import Peer, is_of_parent, peer_of, take_channels
from apphost.settings import SETTINGS, Settings
from tests.support import linux, wait_for

HONEST: list[Message] = [
    {"t": "beat", "requests": 0, "connections": 3, "active": 1, "errors": 2},
    {"t": "beat", "requests": 2**40, "connections": 3, "active": 1},
    {"t": "ready", "seconds": 0.25, "interface": "asgi", "parser": "h11", "loop": "asyncio"},
    {"t": "failed", "message": "it failed", "detail": "", "code": 3},
    {"t": "failed", "message": "it failed", "detail": "Traceback"},
    {"t": "replace", "why": "max_requests"},
    {"t": "leaving", "why": "TERM"},
    {"t": "settings", "settings": Settings(app="a:b", umask=0o22, unix_socket_mode=0o660).to_wire()},
    {"t": "settings", "settings": {}, "ignored": ["user"]},
    {"t": "forked", "wid": 1, "pid": 4711},
    {"t": "exited", "wid": 1, "status": -9},
    {"t": "beat", "requests": 2, "connections": 3, "active": 1, "oldest": [1.5, "GET /"]},
    {"t": "answer", "id": 3, "connections": []},
    {"t": "code", "facts": {"hash": "0123456789ab", "files": 3, "directory": "/srv", "commit": "abc"}},
    {"t": "watching", "how": "polling", "files": 12},
    {"t": "changed", "paths": ["/srv/app.py"], "count": 3},
    {"t": "note", "text": "files are polled"},
    {"t": "of a later version", "whatever": [1, 2]},
]
JUNK = [None, True, -1, 2**54, 1.5, float("nan"), float("inf"), -1e400, "text", [], [1], {}, {"a": 1}]


@pytest.mark.parametrize("message", HONEST, ids=lambda message: message["t"])
def test_what_honest_processes_say(message: Message) -> None:
    examine(message)


def test_every_kind_is_among_them() -> None:
    assert set(_NEEDED) <= {message["t"] for message in HONEST}


@pytest.mark.parametrize("message", HONEST[:-1], ids=lambda message: message["t"])
@pytest.mark.parametrize("junk", JUNK, ids=repr)
def test_one_thing_of_another_kind(message: Message, junk: Any) -> None:
    """Each key in turn is left out, or has a value of a type or size that the arbiter would trip over."""
    checks = {**_OPTIONAL, **_NEEDED[message["t"]]}
    for name in checks.keys() & message.keys():
        spoilt = {**message, name: junk}
        if checks[name](junk):
            examine(spoilt)
        else:
            with pytest.raises(ProtocolError, match=f"message '{message['t']}' with"):
                examine(spoilt)
    for name in _NEEDED[message["t"]]:
        with pytest.raises(ProtocolError, match=f"without a proper '{name}'"):
            examine({key: value for key, value in message.items() if key != name})


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_another_kind(name: str) -> None:
    """What a fork server reports becomes the settings of the arbiter."""
    wire = Settings(app="a:b").to_wire()
    examine({"t": "settings", "settings": wire})
    taken = [junk for junk in (*JUNK, 10**12, "nonesuch") if SETTINGS[name].fits(junk)]
    for junk in taken:
        Settings.from_wire({**wire, name: junk})
        assert junk is None or type(junk) in (type(SETTINGS[name].default), int, list)
    for junk in (True, -1, {}, [1], float("nan")):
        if junk not in taken:
            with pytest.raises(ProtocolError):
                examine({"t": "settings", "settings": {**wire, name: junk}})
    assert not SETTINGS[name].fits({})


@given(st.sampled_from([ExitCode.OK, 1, 3, 6, 7, 99, -1, None]))
def test_exit_codes_are_ours(code: int | None) -> None:
    """A failed process does not make the program end with success, nor with a code that is none."""
    message = {"t": "failed", "message": "m", "detail": "d", **({} if code is None else {"code": code})}
    assert Failure.told(message).code in set(ExitCode) - {ExitCode.OK}


def test_a_channel_with_nonsense_is_closed_and_nothing_of_it_is_done() -> None:
    """Neither before nor after it; descriptors that came along are closed."""
    ours, theirs = socket.socketpair()
    handled: list[Message] = []
    ended: list[bool] = []
    waiting = hub.Hub(Log("error", fd=os.open(os.devnull, os.O_WRONLY)))
    channel = Channel(ours)
    waiting.listen(channel, handled.append, lambda: ended.append(True))
    reader, writer = os.pipe()
    with theirs:
        socket.send_fds(theirs, [encode({"t": "leaving", "why": "x", "fds": 1}) + encode({"t": "beat"})], [writer])
        os.close(writer)
        for do in waiting.wait(5):
            do()
    assert (handled, ended) == ([], [True])
    assert os.read(reader, 1) == b"", "the writer's end that was sent is closed"
    os.close(reader)
    channel.close()


# Signals


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        yield process
        process.kill()


def worker(pid: int, parent: int) -> WorkerProcess:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        return WorkerProcess(1, 1, Channel(ours), -1, 0.0, pid=pid, parent=parent)


@linux
def test_no_stranger_is_signalled(sleeper: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """A fork server that names the pid of somebody else: it is not its child, and not a child of the arbiter."""
    sent: list[tuple[int, int]] = []
    monkeypatch.setattr(processes, "kill", lambda *args: sent.append(args))
    monkeypatch.setattr(os, "getpid", lambda: -1)  # the arbiter is another process than the sleeper's parent
    for pid in (sleeper.pid, 1, 2**30):
        worker(pid, 12345).signal(signal.SIGKILL)
    assert sent == []
    worker(sleeper.pid, os.getppid()).signal(0)
    assert sent == []


def test_a_worker_is_signalled(sleeper: subprocess.Popen[bytes]) -> None:
    """Also one whose fork server has died, so that it is ours."""
    worker(sleeper.pid, 12345).signal(signal.SIGKILL)
    assert wait_for(lambda: sleeper.poll() is not None)


# Peer credentials


@linux
def test_peer_of_a_socketpair() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert peer_of(ours) == peer_of(theirs) == Peer(os.getpid(), os.getuid())
        assert not is_of_parent(ours)
    with socket.socket() as other:
        peer = peer_of(other)
        assert peer is None or peer.pid == 0
        assert not is_of_parent(other)


MAKE = "import socket, sys; s = socket.socket(fileno=int(sys.argv[1])); socket.send_fds(s, [b'x'], [{}]); input()"


@linux
@pytest.mark.parametrize("what", ["socket.socketpair()[0].detach()", "0", "socket.socket().detach()"])
def test_a_channel_of_another_process_is_refused(what: str) -> None:
    """It comes over an open channel, made by somebody else; or it is a pipe, or a TCP socket. All are closed."""
    ours, theirs = socket.socketpair()
    mine = socket.socketpair()
    with ours, theirs, mine[0], mine[1]:
        command = [sys.executable, "-c", MAKE.format(what), str(theirs.fileno())]
        with subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=subprocess.PIPE) as stranger:
            _, fds, _, _ = socket.recv_fds(ours, 1, 1)
            good = os.dup(mine[0].fileno())
            assert take_channels([good, *fds], mine[1]) is None
            for fd in (good, *fds):
                with pytest.raises(OSError, match="Bad file descriptor"):
                    os.fstat(fd)
            stranger.communicate(b"\n")


def test_channels_of_the_same_process_are_taken() -> None:
    ours, theirs = socket.socketpair()
    other = socket.socketpair()
    with ours, theirs, other[0], other[1]:
        taken = take_channels([os.dup(each.fileno()) for each in other], ours)
        assert taken is not None
        assert len(taken) == 2
        for sock in taken:
            sock.close()
