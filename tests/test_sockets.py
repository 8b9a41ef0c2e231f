"""Addresses and listeners."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apphost import sockets
from apphost.errors import AddressError, PrivilegesError
from apphost.sockets import Access, Address, describe, identify, open_listeners, parse_bind, unlink_own
from tests.rawhttp import DEADLINE


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("127.0.0.1:8000", {"host": "127.0.0.1", "port": 8000}),
        ("localhost:0", {"host": "localhost"}),
        (":80", {"host": "0.0.0.0", "port": 80}),
        ("*:65535", {"host": "0.0.0.0", "port": 65535}),
        ("[::1]:8000", {"host": "::1", "port": 8000}),
        ("[fe80::1%eth0]:1", {"host": "fe80::1%eth0", "port": 1}),
        ("http://localhost:80", {"host": "localhost", "port": 80, "scheme": "http"}),
        ("https://[::1]:443", {"host": "::1", "port": 443, "scheme": "https"}),
        ("https://:443", {"host": "0.0.0.0", "port": 443, "scheme": "https"}),
        ("unix:/run/app.sock", {"path": "/run/app.sock"}),
        ("unix:///run/app.sock", {"path": "/run/app.sock"}),
        ("unix:app.sock", {"path": "app.sock"}),
        ("unix:a:80", {"path": "a:80"}),
        ("unix:./@app", {"path": "./@app"}),
        ("unix:" + "p" * 107, {"path": "p" * 107}),
        ("fd://3", {"fd": 3}),
        ("systemd:site.socket", {"name": "site.socket"}),
        ("systemd:80", {"name": "80"}),
    ],
)
def test_parse(text: str, expected: dict[str, str | int]) -> None:
    assert parse_bind(text) == Address(text, **expected)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected HOST:PORT"),
        ("8000", "expected HOST:PORT"),
        ("localhost", "expected HOST:PORT"),
        ("localhost:", "expected HOST:PORT"),
        ("localhost:x", "expected HOST:PORT"),
        ("localhost:+8", "expected HOST:PORT"),
        ("localhost:\u0668", "expected HOST:PORT"),
        ("localhost:80 ", "expected HOST:PORT"),
        ("localhost:80\n", "expected HOST:PORT"),
        ("localhost:65536", "at most 65535"),
        ("localhost:123456", "expected HOST:PORT"),
        ("::1:80", "expected HOST:PORT"),
        ("[]:80", "expected HOST:PORT"),
        ("[::1]", "expected HOST:PORT"),
        ("ftp://x:80", "expected HOST:PORT"),
        ("http://x", "expected HOST:PORT"),
        ("https://unix:a", "expected HOST:PORT"),
        ("http://https://x:80", "expected HOST:PORT"),
        ("unix:", "expected unix:PATH"),
        ("unix://", "expected unix:PATH"),
        ("unix:a\0b", "expected unix:PATH"),
        ("unix:@app", "an abstract socket .* has no permissions"),
        ("unix://@app", "an abstract socket"),
        ("unix:" + "p" * 108, "at most 107 bytes"),
        ("unix:" + "\u20ac" * 36, "at most 107 bytes"),
        ("systemd:", "expected systemd:NAME"),
        ("systemd:a:b", "expected systemd:NAME"),
        ("systemd:a\n", "expected systemd:NAME"),
        ("fd://", "expected fd://N"),
        ("fd://-1", "expected fd://N"),
        ("fd://\u0663", "expected fd://N"),
    ],
)
def test_parse_refuses(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_bind(text)


@given(st.text(max_size=40))
def test_parse_never_fails_otherwise(text: str) -> None:
    try:
        address = parse_bind(text)
    except ValueError:
        return
    assert address.text == text
    assert sum([bool(address.host), bool(address.path), address.fd >= 0]) == 1


def test_tcp() -> None:
    """Ready for the loops of the workers: listening, non-blocking, not inherited by accident, small writes at once."""
    (sock,) = open_listeners(parse_bind("127.0.0.1:0"), 17)
    with sock:
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR)
        assert not sock.getblocking()
        assert not sock.get_inheritable()
        assert describe(sock) == f"http://127.0.0.1:{sock.getsockname()[1]}"
        assert describe(sock, tls=True) == f"https://127.0.0.1:{sock.getsockname()[1]}"
        with socket.create_connection(sock.getsockname()), wait_accept(sock) as accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_plain_in_spite_of_certificates() -> None:
    (sock,) = open_listeners(parse_bind("http://127.0.0.1:0"), 17)
    with sock:
        assert sock.plain
        assert describe(sock, tls=True) == f"http://127.0.0.1:{sock.getsockname()[1]}"


def wait_accept(sock: socket.socket) -> socket.socket:
    sock.settimeout(DEADLINE)
    return sock.accept()[0]


def test_ipv6() -> None:
    try:
        (sock,) = open_listeners(parse_bind("[::1]:0"), 5)
    except AddressError:
        pytest.skip("no IPv6 here")
    with sock:
        assert describe(sock) == f"http://[::1]:{sock.getsockname()[1]}"


def test_tcp_port_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        text = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(AddressError, match=f"cannot listen at {text}: another process is listening there already"):
            open_listeners(parse_bind(text), 5)


def test_all_or_none_of_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that stands for several addresses: when one fails, the others are closed (or pytest sees the leak)."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port)) for port in (0, taken)]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
        with pytest.raises(AddressError):
            open_listeners(parse_bind(f"name:{taken}"), 5)


def test_a_name_with_several_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each once, also when the resolver says it twice."""
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, 0)) for host in ("127.0.0.1", "127.0.0.2", "127.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    try:
        listeners = open_listeners(parse_bind("name:0"), 5)
    except AddressError:
        pytest.skip("127.0.0.2 is no address here")
    assert [sock.getsockname()[0] for sock in listeners] == ["127.0.0.1", "127.0.0.2"]
    for sock in listeners:
        sock.close()


def test_unknown_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(AddressError, match="'nowhere' is unknown"):
        open_listeners(parse_bind("nowhere:1"), 5)


def test_unix_and_unlink_own(tmp_path: Path) -> None:
    path = tmp_path / "app.sock"
    (sock,) = open_listeners(parse_bind(f"unix:{path}"), 5)
    with sock:
        assert describe(sock) == describe(sock, tls=True) == f"unix:{path}"
        assert not sock.may_tls
        assert stat.S_ISSOCK(path.stat().st_mode)
        own = identify(str(path))
        for other in ((own[0], own[1] + 1, own[2]), (own[0], own[1], own[2] - 1)):
            unlink_own(str(path), other)
            assert path.exists()  # somebody else's by now
        unlink_own(str(path), own)
        assert not path.exists()
        unlink_own(str(path), own)


def test_unlink_own_leaves_the_successors_with_the_same_inode_number(tmp_path: Path) -> None:
    """Some file systems give out at once again the number of a file that is gone."""
    path = tmp_path / "app.sock"
    (first,) = open_listeners(parse_bind(f"unix:{path}"), 5)
    own = identify(str(path))
    first.close()
    (second,) = open_listeners(parse_bind(f"unix:{path}"), 5)  # finds the first one dead
    with second:
        unlink_own(str(path), own)
        assert path.exists()


@pytest.mark.parametrize("mode", [0o600, 0o660, 0o666, 0o777, 0o000])
@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_unix_mode(tmp_path: Path, mode: int, umask: int) -> None:
    """The one that was asked for, whatever the umask; that of the process is left as it was."""
    path = tmp_path / "app.sock"
    before = os.umask(umask)
    try:
        (sock,) = open_listeners(parse_bind(f"unix:{path}"), 5, Access(mode))
        sock.close()
    finally:
        assert os.umask(before) == umask
    assert stat.S_IMODE(path.stat().st_mode) == mode


def test_unix_mode_by_umask(tmp_path: Path) -> None:
    path = tmp_path / "app.sock"
    before = os.umask(0o027)
    try:
        open_listeners(parse_bind(f"unix:{path}"), 5)[0].close()
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o750


def test_unix_mode_and_owner_are_there_before_anybody_can_connect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No moment in which a client gets in that may not: a socket that does not listen refuses everybody."""
    path = tmp_path / "app.sock"
    seen: list[object] = []
    real_bind, real_chown = sockets._bind_unix, os.chown

    def look(step: str) -> None:
        with socket.socket(socket.AF_UNIX) as client:
            seen.append((step, stat.S_IMODE(path.stat().st_mode), client.connect_ex(str(path))))

    def bind(*args: Any) -> None:
        real_bind(*args)
        look("bound")

    def chown(*args: Any, **options: Any) -> None:
        real_chown(*args, **options)
        look("given")

    monkeypatch.setattr(sockets, "_bind_unix", bind)
    monkeypatch.setattr(os, "chown", chown)
    access = Access(0o660, os.getuid(), os.getgid())
    with open_listeners(parse_bind(f"unix:{path}"), 5, access)[0], socket.socket(socket.AF_UNIX) as client:
        assert client.connect_ex(str(path)) == 0
    assert seen == [(step, 0o660, errno.ECONNREFUSED) for step in ("bound", "given")]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may give files away")
def test_unix_owner_that_cannot_be(tmp_path: Path) -> None:
    path = tmp_path / "app.sock"
    with pytest.raises(PrivilegesError, match=r"cannot give the socket .* to user 0, group -1"):
        open_listeners(parse_bind(f"unix:{path}"), 5, Access(uid=0))
    assert not path.exists()


def test_of_many_starters_one_listens(tmp_path: Path) -> None:
    """All find the same dead socket: one takes its place, the others find that one, and nobody removes it."""
    path = tmp_path / "app.sock"
    for _ in range(20):
        address = parse_bind(f"unix:{path}")
        open_listeners(address, 5)[0].close()
        with ThreadPoolExecutor(4) as pool:
            outcomes = list(pool.map(lambda _, address=address: attempt(address), range(4)))
        listeners = [each for each in outcomes if isinstance(each, socket.socket)]
        assert len(listeners) == 1, outcomes
        assert all(
            "another process is listening there already" in str(each) for each in outcomes if each != listeners[0]
        )
        with listeners[0], socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))


def attempt(address: Address) -> socket.socket | AddressError:
    try:
        return open_listeners(address, 5)[0]
    except AddressError as exc:
        return exc


def test_a_folder_that_somebody_keeps_locked_stops_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever may read a folder can lock it: another starter is waited for, a nuisance is not."""
    monkeypatch.setattr(sockets, "_LOCK_TIMEOUT", 0.05)
    fd = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    try:
        open_listeners(parse_bind(f"unix:{tmp_path}/app.sock"), 5)[0].close()
    finally:
        os.close(fd)


def test_unix_stale(tmp_path: Path) -> None:
    """The socket of a server that is gone is replaced."""
    path = tmp_path / "app.sock"
    open_listeners(parse_bind(f"unix:{path}"), 5)[0].close()
    (sock,) = open_listeners(parse_bind(f"unix:{path}"), 5)
    with sock, socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))


def test_unix_live(tmp_path: Path) -> None:
    path = tmp_path / "app.sock"
    (sock,) = open_listeners(parse_bind(f"unix:{path}"), 5)
    with sock:
        with pytest.raises(AddressError, match="another process is listening there already"):
            open_listeners(parse_bind(f"unix:{path}"), 5)
        assert path.exists()


@pytest.mark.parametrize("kind", ["file", "folder", "link to a file"])
def test_unix_path_of_something_else(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "data"
    if kind == "folder":
        path.mkdir()
    else:
        (tmp_path / "precious").write_text("data")
        if kind == "file":
            (tmp_path / "precious").rename(path)
        else:
            path.symlink_to(tmp_path / "precious")
    before = path.lstat()
    with pytest.raises(AddressError, match="there is a file of that name that is no socket"):
        open_listeners(parse_bind(f"unix:{path}"), 5)
    assert path.lstat().st_ino == before.st_ino


def test_inherited_descriptor() -> None:
    """As from a supervisor that opened it; made like one of ours."""
    with socket.create_server(("127.0.0.1", 0)) as given:
        fd = os.dup(given.fileno())
        os.set_inheritable(fd, True)
        (sock,) = open_listeners(parse_bind(f"fd://{fd}"), 5)
        with sock:
            assert sock.fileno() == fd
            assert not sock.getblocking()
            assert not sock.get_inheritable()
            assert describe(sock) == f"http://127.0.0.1:{given.getsockname()[1]}"


def test_descriptor_that_is_no_listener(tmp_path: Path) -> None:
    """It stays open: it is not ours."""
    with socket.socket() as unbound, open(tmp_path / "file", "w") as file:
        with pytest.raises(AddressError, match="not a listening stream socket"):
            open_listeners(parse_bind(f"fd://{unbound.fileno()}"), 5)
        unbound.getsockname()
        with pytest.raises(AddressError, match=f"descriptor {file.fileno()} is no socket"):
            open_listeners(parse_bind(f"fd://{file.fileno()}"), 5)
        file.write("still open")
    with pytest.raises(AddressError, match="is no socket"):
        open_listeners(parse_bind("fd://99999"), 5)
