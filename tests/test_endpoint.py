"""Where control sockets are and who may use them: the pure parts."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from apphost import endpoint
from apphost.endpoint import Found, listed, may_command, open_abstract
from apphost.operate.client import Discovered, Target, choose
from apphost.peers import Peer, peer_of
from tests.support import linux

TABLE = """Num       RefCount Protocol Flags    Type St Inode Path
ffff8881: 00000002 00000000 00010000 0001 01 20001 @apphost/4711/4026531836
ffff8882: 00000003 00000000 00000000 0001 03 20002 @apphost/4711/4026531836
ffff8883: 00000002 00000000 00010000 0001 01 20003 /run/apphost/1/x
ffff8884: 00000002 00000000 00010000 0001 01 20004
ffff8885: 00000002 00000000 00010000 0001 01 20005 @apphost/1/ab cd
ffff8886: 00000002 00000000 00010000 0001 01 20006 @apphost/x/y
ffff8887: 00000002 00000000 garbage! 0001 01 20007 @apphost/7/y
ffff8888: 00000002 00000000 00010000 0001 01 20008 @apphost/
"""


def test_only_listening_sockets_with_our_name_count() -> None:
    assert list(listed(TABLE)) == [
        Found(b"\0apphost/4711/4026531836", 4711),
        Found(b"\0apphost/1/ab cd", 1),
    ]
    assert list(listed("")) == []


@pytest.mark.parametrize(
    ("own", "peer", "allowed"),
    [
        (1000, Peer(5, 1000), True),
        (1000, Peer(0, 1000), True),  # the same user in another pid namespace
        (1000, Peer(5, 0), True),
        (1000, Peer(5, 1001), False),
        (0, Peer(5, 1000), False),
        (65534, Peer(5, 65534), True),
        (65534, Peer(0, 65534), False),  # may be anybody of another user namespace
    ],
)
def test_who_may_command(monkeypatch: pytest.MonkeyPatch, own: int, peer: Peer, allowed: bool) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: own)
    assert may_command(peer) is allowed


@pytest.mark.parametrize(("abstract", "allowed"), [(True, False), (False, True)])
def test_where_nobody_tells_who_it_is_the_mode_of_the_file_has_decided(
    monkeypatch: pytest.MonkeyPatch, abstract: bool, allowed: bool
) -> None:
    monkeypatch.setattr(endpoint, "abstract_sockets", lambda: abstract)
    assert may_command(None) is allowed


@linux
def test_a_name_that_is_taken_is_no_error() -> None:
    """As with two process 1 that cannot tell their pid namespaces apart, or somebody who took it on purpose."""
    with open_abstract() as first, open_abstract() as second:
        names = {first.getsockname(), second.getsockname()}
        assert len(names) == 2
        assert names <= {each.address for each in endpoint.find_abstract()}
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(second.getsockname())
            assert peer_of(client) == Peer(os.getpid(), os.geteuid())
        assert not first.getblocking()
        assert not first.get_inheritable()


def test_the_peer_of_no_unix_socket() -> None:
    with socket.socket(socket.AF_INET) as sock:
        peer = peer_of(sock)
    assert peer is None or peer.pid == 0


# ------------------------------------------------------------------------------------------------- which is meant


def found(pid: int, named: int, uid: int) -> Discovered:
    session = Discovered.__new__(Discovered)
    session.peer, session.named = Peer(pid, uid), named
    return session


@pytest.mark.parametrize(
    ("there", "pid", "expected"),
    [
        ([], 0, []),
        ([(10, 10, 7)], 0, [0]),
        ([(10, 10, 7), (11, 11, 7)], 0, [0, 1]),
        ([(10, 10, 7), (11, 11, 7)], 11, [1]),
        ([(10, 10, 7)], 12, []),
        ([(10, 10, 7), (11, 11, 8)], 0, [0]),  # root sees others', and prefers its own
        ([(11, 11, 8)], 0, [0]),
        ([(1, 1, 7), (0, 1, 7)], 1, [0]),  # the neighbour's process 1 is not ours
        ([(1, 1, 7), (0, 1, 7)], 0, [0]),
        ([(30, 1, 7), (0, 1, 7)], 30, [0]),  # in a namespace below ours it has a pid for us
        ([(0, 1, 7), (0, 2, 7)], 2, [1]),
        ([(0, 1, 7), (0, 1, 7)], 1, [0, 1]),
    ],
)
def test_choose(
    monkeypatch: pytest.MonkeyPatch, there: list[tuple[int, int, int]], pid: int, expected: list[int]
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 7)
    sessions = [found(*each) for each in there]
    assert choose(sessions, pid, [each.named for each in sessions]) == [sessions[n] for n in expected]


@pytest.mark.parametrize(
    ("given", "environ", "expected"),
    [
        ((0, "", ""), {}, Target()),
        ((5, "", ""), {"APPHOST_PIDFILE": "p", "APPHOST_CONTROL": "/c"}, Target(pid=5)),
        ((0, "mine", ""), {"APPHOST_PIDFILE": "p", "APPHOST_CONTROL": "/c"}, Target(pidfile="mine")),
        ((0, "", ""), {"APPHOST_PIDFILE": "p", "APPHOST_CONTROL": "/c"}, Target(control="/c")),
        ((0, "", ""), {"APPHOST_PIDFILE": "p", "APPHOST_CONTROL": "auto"}, Target(pidfile="p")),
        ((5, "mine", ""), {}, Target(pid=5)),
    ],
)
def test_options_count_before_variables(given: tuple[int, str, str], environ: dict[str, str], expected: Target) -> None:
    assert Target.chosen(*given, environ) == expected


def test_the_prefix_is_in_the_documents() -> None:
    text = (Path(__file__).parent.parent / "docs" / "control.md").read_text()
    assert f"\\0{endpoint.PREFIX}PID/TOKEN" in text
