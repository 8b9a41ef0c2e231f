"""The control socket: its protocol under bad, slow and many clients, who may use it, and where it is."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from apphost.arbiter.control import CLIENTS_MAX, WAITING_MAX
from apphost.endpoint import LINE_MAX, find_abstract
from tests.load import serving
from tests.operating import Control, address, as_nobody, command, is_root, operate, status
from tests.support import DEADLINE, Server, linux, pid_namespace, write_app

pytestmark = linux
only_root = pytest.mark.skipif(not is_root(), reason="only root can become another user")
APP = "async def app(scope, receive, send):\n    pass\n"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("control")
    write_app(folder, "app", APP)
    with Server("app:app", "--lifespan", "off", cwd=folder) as server:
        yield server


@pytest.mark.parametrize(
    ("line", "error"),
    [
        (b"garbage", 'not JSON: expected one object in a line, such as {"do": "status"}'),
        (b"\xff\xfe\x00", "not JSON"),
        (b"[" * 5000, "not JSON"),
        (b"[1]", 'expected an object with the command as "do"'),
        (b"{}", 'expected an object with the command as "do"'),
        (b'{"do": 1}', 'expected an object with the command as "do"'),
        (b'{"do": "statsu"}', "unknown command 'statsu'. Did you mean 'status'?"),
        (b'{"do": "reload", "wiat": true}', "reload has no argument 'wiat'. Did you mean 'wait'?"),
        (b'{"do": "reload", "wait": 1}', "wait of reload: expected true or false"),
        (b'{"do": "scale", "size": true}', "size of scale: expected a whole number"),
        (b'{"do": "scale", "size": 0}', "size of scale: expected a whole number from 1 to 1024"),
        (b'{"do": "scale", "size": 2, "by": 1}', "scale takes size or by, not both"),
        (b'{"do": "scale", "by": -1}', "size of scale: expected a whole number from 1 to 1024, not 0"),
        (b'{"do": "scale"}', "size of scale: expected a whole number from 1 to 1024"),
        (b'{"do": "stacks", "worker": 99}', "there is no worker 99; there is 1"),
        (b'{"do": "wait", "generation": 9}', "generation 9 was never asked for, the newest is 1"),
        (b'{"do": "wait", "generation": -1}', "generation -1 was never asked for, the newest is 1"),
        (b'{"do": "wait", "generation": NaN}', "generation of wait: expected a whole number"),
    ],
)
def test_a_bad_request_is_answered_and_the_connection_goes_on(server: Server, line: bytes, error: str) -> None:
    with Control(server) as control:
        answer = control.ask(line + b"\n")
        assert answer["error"].startswith(error)
        assert answer["done"] is True
        assert control.ask({"do": "status"})["status"]["pid"] == server.pid


def test_requests_come_in_any_pieces(server: Server) -> None:
    with Control(server) as control:
        for byte in b'\n {"do": "status"}\r\n':
            control.send(bytes([byte]))
        assert control.lines()[-1]["status"]["good"] == 1
        control.send(b'{"do": "status"}\n\n{"do": "scale"}\n{"do": "connections"}\n{"do": "status"}\n')
        answers = [control.lines()[-1] for _ in range(4)]
        assert [sorted(answer) for answer in answers] == [
            ["done", "status"],
            ["done", "error"],
            ["done"],
            ["done", "status"],
        ]


def test_a_client_that_has_said_all_is_still_answered(server: Server) -> None:
    """`echo '{"do": "status"}' | nc -U`."""
    with Control(server) as control:
        control.send(b'{"do": "connections"}\n{"do": "status"}\n{"do": "sta')
        control.sock.shutdown(socket.SHUT_WR)
        assert control.lines()[-1] == {"done": True}
        assert "status" in control.lines()[-1]
        assert control.ended


def test_too_long_and_too_many_requests_end_the_connection(server: Server) -> None:
    with Control(server) as control:
        control.send(b"x" * (LINE_MAX + 1))
        assert control.line()["error"] == f"a request has at most {LINE_MAX} bytes"
        assert control.ended
    with Control(server) as control:
        control.send(b'{"do": "connections"}\n' * (WAITING_MAX + 5))
        assert control.line()["error"] == "too many requests at once"
        assert control.ended


def test_many_clients(server: Server) -> None:
    """A new one takes the place of the one that has been idle for longest; nobody is shut out."""
    clients = [Control(server) for _ in range(CLIENTS_MAX)]
    try:
        for client in clients:
            client.ask({"do": "status"})
        clients += [Control(server) for _ in range(10)]
        for client in clients[-10:]:
            assert client.ask({"do": "status"})["status"]["ok"]
        assert all(client.ended for client in clients[:10])
        assert clients[10].ask({"do": "status"})["status"]["ok"]
    finally:
        for client in clients:
            client.close()


def test_a_client_that_does_not_read_is_dropped_and_holds_up_nobody(server: Server) -> None:
    with Control(server) as deaf:
        begun = time.monotonic()
        deaf.sock.settimeout(0.5)
        with contextlib.suppress(OSError):  # reset, or a full pipe that nobody empties
            while time.monotonic() < begun + DEADLINE:
                deaf.send(b'{"do": "status"}\n')
        assert time.monotonic() < begun + DEADLINE
        assert status(server)["ok"]
    assert "internal error" not in server.log


def test_clients_that_leave_in_the_middle(server: Server) -> None:
    for request in (b'{"do": "sta', b'{"do": "connections"}\n', b'{"do": "stacks"}\n{"do": "status"}\n'):
        for _ in range(20):
            control = Control(server)
            control.send(request)
            control.close()
    assert status(server)["ok"]


# ------------------------------------------------------------------------------------------------- who and where


CONNECT = """
sock = socket.socket(socket.AF_UNIX)
sock.connect(bytes.fromhex(sys.argv[1]))
try:
    sock.sendall(b'{"do": "stop"}\\n')
except BrokenPipeError:
    pass  # it need not ask anything to be refused
try:
    while data := sock.recv(4096):
        os.write(1, data)
except ConnectionResetError:
    pass  # what it has asked was not read
"""


@only_root
def test_another_user_is_refused(server: Server) -> None:
    done = as_nobody(CONNECT, address(server).hex())
    answer = json.loads(done.stdout)
    assert answer["error"] == f"only the user of this server (uid {os.geteuid()}) and root may command it"
    assert answer["done"] is True
    server.wait_line("warning the control socket refused uid 65534, pid")
    assert status(server)["state"] == "serving"


IMPOSTOR = """
import os, socket, sys
os.setgid(65534); os.setuid(65534)
sock = socket.socket(socket.AF_UNIX)
sock.bind(b"\\0apphost/%s/x" % sys.argv[1].encode())
sock.listen()
print("listening", flush=True)
sys.stdin.read()
"""


@only_root
def test_the_socket_of_an_impostor_is_not_taken_for_the_servers(server: Server, tmp_path: Path) -> None:
    """Anybody may bind a name with the pid of a server; the kernel says whose it is."""
    with subprocess.Popen(
        [sys.executable, "-c", IMPOSTOR, str(server.pid)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as impostor:
        assert impostor.stdin is not None
        assert impostor.stdout is not None
        assert impostor.stdout.readline() == b"listening\n"
        assert len([each for each in find_abstract() if each.pid == server.pid]) == 2
        done = operate(server, "scale", "1")
        assert (done.returncode, done.stdout) == (0, "1 workers, before 1\n")
        impostor.stdin.close()


def test_a_path(tmp_path: Path) -> None:
    """Only its user may open it, a stale one is replaced, and it goes with its server."""
    path = tmp_path / "control"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    with serving(tmp_path, "asgi", "--control", str(path)) as server:
        info = path.stat()
        assert stat.S_ISSOCK(info.st_mode)
        assert stat.S_IMODE(info.st_mode) == 0o600
        assert not [each for each in find_abstract() if each.pid == server.pid]
        done = command("status", "--control", str(path))
        assert done.stdout.startswith("app:app: serving, all is well\n")
        assert command("scale", "1", env={"APPHOST_CONTROL": str(path)}).returncode == 0
        if is_root():
            done = as_nobody(CONNECT, os.fsencode(str(path)).hex())
            assert "PermissionError" in done.stderr
        with Server("app:app", "--control", str(path), cwd=tmp_path, until=None) as second:
            assert second.wait_exit() == 4
            assert f"cannot listen at the control socket {path}: another process is listening there" in second.log
        assert command("upgrade", "--control", str(path)).returncode == 0
        assert path.stat().st_ino == info.st_ino
        assert server.stop() == 0
    assert not path.exists()
    done = command("status", "--control", str(path))
    assert done.returncode == 7
    assert f"cannot connect to the control socket {path}: No such file" in done.stderr


def test_off(tmp_path: Path) -> None:
    with serving(tmp_path, "asgi", "--control", "off", "--pidfile", "pid") as server:
        assert not [each for each in find_abstract() if each.pid == server.pid]
        done = command("status", "--pidfile", str(tmp_path / "pid"))
        assert done.returncode == 7
        assert done.stderr.startswith(
            f"apphost: error: process {server.pid}, which {tmp_path / 'pid'} names, is no server that this user may"
        )


def test_two_process_1_in_one_network_namespace(tmp_path: Path) -> None:
    """Each with its own socket; a command inside finds its own, one outside each by the pid that it has there."""
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    prefix = pid_namespace("--mount-proc")
    with (
        serving(tmp_path / "first", "asgi", "--workers", "2", prefix=prefix) as first,
        serving(tmp_path / "second", "asgi", "--workers", "3", prefix=prefix) as second,
    ):
        names = [each.address for each in find_abstract() if each.pid == 1]
        assert len(names) == len(set(names)) == 2
        for server, size in ((first, 2), (second, 3)):
            outer = int(Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()[0])
            inside = ("nsenter", "--pid", "--mount", "--target", str(outer))
            for done in (
                command("status", "--json", prefix=inside),
                command("status", "--json", "--pid", "1", prefix=inside),
                command("status", "--json", "--pid", str(outer)),
            ):
                assert done.returncode == 0, done.stderr
                found = json.loads(done.stdout)
                assert (found["pid"], found["size"]) == (1, size)
            # Its pids are not ours, so what they would say of memory is not asked.
            assert all(worker["pss"] is None for worker in found["workers"])
            os.kill(outer, signal.SIGTERM)
            assert server.wait_exit() == 0


def test_process_1_on_a_read_only_file_system(tmp_path: Path) -> None:
    """No file is needed, and no warning is given."""
    write_app(tmp_path, "app", APP)
    read_only = 'mount --bind "$PWD" "$PWD" && mount -o remount,bind,ro "$PWD" && cd "$PWD" && exec "$@"'
    prefix = [*pid_namespace("--mount-proc", "--mount"), "sh", "-c", read_only, "sh"]
    with Server("app:app", "--lifespan", "off", cwd=tmp_path, prefix=prefix) as server:
        outer = int(Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()[0])
        assert not os.access(f"/proc/{outer}/cwd", os.W_OK)
        assert command("reload", "--wait", "--pid", str(outer)).returncode == 0
        assert command("stop", "--pid", str(outer)).returncode == 0
        assert server.wait_exit() == 0
        assert "warning" not in server.log
