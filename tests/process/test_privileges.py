"""Started as root: what root does, whom the workers become, and that nothing leads back. Needs root."""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from apphost.errors import ExitCode
from tests.process.test_upgrade import program, upgrade
from tests.support import OWN_CODE, RawClient, Server, wait_for, write_app

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc"),
]

Serve = Callable[..., Server]
USER = "nobody"
# It tells who runs it, at its import and for each request, and tries to become root again.
APP = """
import ctypes, json, os

def state():
    ways = {}
    for name in ("setuid", "seteuid", "setgid", "setegid"):
        try:
            getattr(os, name)(0)
        except PermissionError:
            continue
        ways[name] = "possible"
    return {
        "uids": os.getresuid(), "gids": os.getresgid(), "groups": sorted(os.getgroups()), "regained": ways,
        "umask": open("/proc/self/status").read().partition("Umask:")[2].split()[0],
        "dumpable": ctypes.CDLL(None).prctl(3, 0, 0, 0, 0),
        "capabilities": open("/proc/self/status").read().partition("CapEff:")[2].split()[0],
        "environ": {name: os.environ.get(name) for name in ("HOME", "USER", "LOGNAME", "KEPT", "PWD")},
    }

IMPORTED = state()

def app(environ, start_response):
    body = json.dumps({"imported": IMPORTED, "now": state(), "pid": os.getpid()}).encode()
    start_response("200 OK", [("Content-Length", str(len(body)))])
    return [body]
"""


@pytest.fixture(scope="module")
def prefix() -> Iterator[list[str]]:
    """The `prefix` of a `Server` with which other users can read what the tests run from.

    An interpreter or a checkout below the home of root, or below a temporary folder, is closed to them; in a name space
    of mounts of the server's own the closed folder has only that in it, and is open.
    """
    needed = [str(OWN_CODE.parent), sys.prefix, sys.base_prefix]
    closed = {path: folder for path in needed if (folder := first_closed(Path(path))) is not None}
    if not closed:
        yield []
        return
    stash = tempfile.mkdtemp(prefix="apphost-test-")
    lines = ["set -e"]
    for number, path in enumerate(closed):
        lines += [f"mkdir -p {stash}/{number}", f"mount --rbind '{path}' {stash}/{number}"]
    lines += [f"mount -t tmpfs -o mode=755 none '{folder}'" for folder in set(closed.values())]
    for number, path in enumerate(closed):
        lines += [f"mkdir -p '{path}'", f"mount --rbind {stash}/{number} '{path}'"]
    command = ["unshare", "--mount", "sh", "-c", "; ".join([*lines, 'exec "$@"']), "sh"]
    reads = [sys.executable, "-c", f"import os; os.setuid(65534); open({str(OWN_CODE / 'errors.py')!r}); import h11"]
    try:
        usable = subprocess.run([*command, *reads], capture_output=True, check=False, cwd="/").returncode == 0
    except OSError:  # there is no unshare
        usable = False
    if usable:
        yield command
    shutil.rmtree(stash)
    if not usable:
        pytest.skip(f"others cannot read {', '.join(closed)}, and there is no permission for a name space of mounts")


def first_closed(path: Path) -> Path | None:
    """The uppermost folder on the way to `path` that others may not pass."""
    return next((each for each in (*reversed(path.parents), path) if not each.stat().st_mode & stat.S_IXOTH), None)


@pytest.fixture
def serve(prefix: list[str], site: Path) -> Serve:
    """`serve(*args, **options)`: a `Server` in `site` that other users can run."""

    def serve(*args: str, bounds: Sequence[str] = (), **options: Any) -> Server:
        return Server(*args, cwd=site, prefix=[*prefix, *bounds], **options)

    return serve


@pytest.fixture
def site() -> Iterator[Path]:
    """A folder of root's that everybody may read, with the application; those of pytest are for one user alone."""
    folder = Path(tempfile.mkdtemp(prefix="apphost-test-"))
    folder.chmod(0o755)
    write_app(folder, "who", APP).chmod(0o644)
    yield folder
    shutil.rmtree(folder)


def low_port() -> int:
    """A free port below 1024."""
    for port in range(1023, 900, -1):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    pytest.skip("no port below 1024 can be had")


def ask(address: int | str, path: str = "/") -> dict[str, Any]:
    with RawClient(address) as client:
        found: dict[str, Any] = json.loads(client.request("GET", path).body)
    return found


def check_dropped(found: dict[str, Any]) -> None:
    account = pwd.getpwnam(USER)
    for state in (found["imported"], found["now"]):
        assert state["uids"] == [account.pw_uid] * 3
        assert state["gids"] == [account.pw_gid] * 3
        assert state["groups"] == sorted(os.getgrouplist(USER, account.pw_gid))
        assert state["regained"] == {}
        assert int(state["capabilities"], 16) == 0
        assert state["dumpable"] != 1, "no core file that the user may read, nobody of the same user attaches"
        assert state["environ"]["HOME"] == account.pw_dir
        assert state["environ"]["USER"] == state["environ"]["LOGNAME"] == USER
        assert state["environ"]["KEPT"] == "as it was"


def status(pid: int, name: str) -> list[str]:
    return Path(f"/proc/{pid}/status").read_text().partition(f"\n{name}:")[2].partition("\n")[0].split()


ROOTS = {"HOME": pwd.getpwuid(0).pw_dir, "USER": "root", "LOGNAME": "root", "KEPT": "as it was"}


@pytest.mark.parametrize("preload", ["--preload", "--no-preload"])
def test_a_port_below_1024_through_reload_upgrade_and_crash(serve: Serve, site: Path, preload: str) -> None:
    """Bound as root once; whoever imports or serves the application is not root, in every generation.

    With `preload` that is the fork server as well. Secrets in a settings file that only root may read stay readable.
    """
    port = low_port()
    (site / "apphost.toml").write_text(f'user = "{USER}"\numask = "027"\naccess_log = "access.log"\n')
    (site / "apphost.toml").chmod(0o600)
    pidfile = site / "pid"
    args = ("who:app", "--pidfile", str(pidfile), preload)
    with serve(*args, bind=f"127.0.0.1:{port}", env=ROOTS) as server:
        first = ask(port)
        check_dropped(first)
        assert first["now"]["umask"] == "0027"
        assert first["now"]["environ"]["PWD"] == str(site)
        assert status(server.pid, "Uid") == ["0"] * 4, "the arbiter stays root, to open what later generations need"
        for pid in server.children():
            assert "0" not in status(pid, "Uid") + status(pid, "Gid")
        assert server.reload() == 2
        check_dropped(ask(port))
        assert upgrade(server) == 3
        found = ask(port)
        check_dropped(found)
        os.kill(found["pid"], signal.SIGKILL)
        server.wait_line(r"worker \d+ gen 3 gone: died of SIGKILL")
        check_dropped(ask(port))
        server.wait_line(r"worker \d+ gen 3 ready", after=0)
        assert pidfile.read_text() == f"{server.pid}\n"
        assert server.stop() == 0
        assert not pidfile.exists()
    log = site / "access.log"
    # Root's file, written to by workers of all generations; the killed one may not have come to it.
    assert log.read_text().count('"GET / HTTP/1.1" 200') in (3, 4)
    assert (log.stat().st_uid, stat.S_IMODE(log.stat().st_mode)) == (0, 0o640)


def test_a_reload_makes_nobody_root(serve: Serve, site: Path) -> None:
    """A settings file that has lost its `user` is read for what a reload can change; that is told, and nothing else."""
    file = site / "apphost.toml"
    file.write_text(f'user = "{USER}"\nthreads = 2\n')
    with serve("who:app", env=ROOTS) as server:
        file.write_text('umask = "000"\nthreads = 3\n')
        for _ in range(2):
            mark = server.mark()
            server.reload()
            server.wait_line(
                "settings that need a restart have changed and stay as they were: umask, user$", after=mark
            )
            check_dropped(ask(server.port))


def test_what_a_worker_holds_of_roots(serve: Serve, site: Path) -> None:
    """Its listener, its channel, a file for its last words, the access log, the standard streams; no more."""
    args = ("who:app", "--user", USER, "--access-log", str(site / "log"), "--pidfile", str(site / "pid"))
    with serve(*args, "--loop", "asyncio") as server:
        (pid,) = server.worker_pids()
        names = [os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir()]
        files = {re.sub(r":\[\d+\]|^/dev/pts/\d+$", "", name) for name in names}
        assert files <= {"/dev/null", "pipe", "socket", "anon_inode", "/memfd:apphost-last-words (deleted)",
                         "anon_inode:[eventpoll]", str(site / "log")}  # fmt: skip
        assert server.stop() == 0


def test_the_access_log_is_not_written_through_a_link_of_the_users(serve: Serve, site: Path) -> None:
    """In a folder of its own that user could let root append to any file, with lines that clients choose."""
    logs = site / "logs"
    logs.mkdir()
    shutil.chown(logs, USER)
    (site / "precious").write_text("data\n")
    (logs / "access.log").symlink_to(site / "precious")
    args = ("who:app", "--user", USER, "--access-log", str(logs / "access.log"))
    with serve(*args, until=None) as server:
        assert server.wait_exit() == ExitCode.PRIVILEGES
        assert "it is a symbolic link, and root follows none where the workers have another user" in server.log
    assert (site / "precious").read_text() == "data\n"


def test_the_access_log_to_a_pipe_of_roots(serve: Serve, site: Path) -> None:
    """`/dev/stdout` is not opened by its name, which another user may not."""
    with serve("who:app", "--user", USER, "--access-log", "/dev/stdout") as server:
        ask(server.port)
        server.wait_line(r'"GET / HTTP/1\.1" 200')


def test_a_number_without_an_account(serve: Serve, site: Path) -> None:
    """As in containers; a group must be named, and is the only one."""
    with serve("who:app", "--user", "3999999", "--group", "3999998", env=ROOTS) as server:
        found = ask(server.port)["now"]
    assert (found["uids"], found["gids"], found["groups"]) == ([3999999] * 3, [3999998] * 3, [3999998])
    assert found["regained"] == {}
    assert found["environ"]["HOME"] == ROOTS["HOME"], "nothing is known of another one"


@pytest.mark.parametrize("command", [(), ("check",)], ids=["run", "check"])
def test_a_folder_that_the_user_may_not_enter(serve: Serve, site: Path, command: tuple[str, ...]) -> None:
    closed = site / "closed"
    closed.mkdir(mode=0o700)
    args = (*command, "who:app", "--user", USER, "--chdir", str(closed))
    with serve(*args, until=None) as server:
        assert server.wait_exit() == ExitCode.USAGE
    assert f"cannot change to the directory {closed}: Permission denied" in server.log


def test_an_apphost_that_the_user_cannot_read(serve: Serve, site: Path) -> None:
    """Installed below the home of root, say: told in a sentence, and not by an import that fails somewhere."""
    closed = site / "closed"
    closed.mkdir(mode=0o700)
    program(closed, "1.0")
    with serve("who:app", "--user", USER, until=None, env={"PYTHONPATH": str(closed)}) as server:
        assert server.wait_exit() == ExitCode.PRIVILEGES
    assert f"user {USER} cannot read {closed}/apphost/worker/main.py: install apphost and the application" in server.log


def test_root_without_the_capability_to_change(serve: Serve, site: Path) -> None:
    """As in containers that drop all capabilities."""
    bounded = ("setpriv", "--bounding-set=-setuid,-setgid", "--inh-caps=-setuid,-setgid")
    if shutil.which("setpriv") is None:
        pytest.skip("there is no setpriv")
    with serve("who:app", "--user", USER, until=None, bounds=bounded) as server:
        assert server.wait_exit() == ExitCode.PRIVILEGES
    assert "this process is root, but without the capabilities CAP_SETUID and CAP_SETGID" in server.log


def test_check_loads_as_the_user(serve: Serve, site: Path) -> None:
    """What only root may read is not found out on the day of the deploy."""
    write_app(site, "secret", "app = open('key').read()").chmod(0o644)
    (site / "key").write_text("key")
    (site / "key").chmod(0o600)
    with serve("check", "secret:app", "--user", USER, until=None) as server:
        assert server.wait_exit() == ExitCode.APPLICATION
    assert "PermissionError" in server.log


# Unix sockets


def connects(path: Path, uid: int) -> bool:
    """Whether a process of that user, in no group of use, can connect."""
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups([])
            os.setgid(3999999)
            os.setuid(uid)
            socket.socket(socket.AF_UNIX).connect(str(path))
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitpid(pid, 0)[1] == 0


@pytest.mark.parametrize(
    ("args", "mode", "owner", "stranger"),
    [
        (("--user", USER), 0o755, USER, False),
        (("--user", USER, "--umask", "007"), 0o770, USER, False),
        (("--user", USER, "--unix-socket-mode", "666"), 0o666, USER, True),
        (("--unix-socket-mode", "660", "--unix-socket-owner", "daemon:daemon"), 0o660, "daemon", False),
        (("--user", USER, "--unix-socket-mode", "600", "--unix-socket-owner", "daemon"), 0o600, "daemon", False),
    ],
)
def test_who_may_connect(
    serve: Serve, site: Path, args: tuple[str, ...], mode: int, owner: str, stranger: bool
) -> None:
    """The owner of the socket may, whoever serves; others as its mode says."""
    path = site / "app.sock"
    with serve("who:app", *args, bind=f"unix:{path}") as server:
        info, uid = path.stat(), pwd.getpwnam(owner).pw_uid
        assert (info.st_uid, stat.S_IMODE(info.st_mode)) == (uid, mode)
        assert connects(path, uid)
        assert connects(path, 3999999) == stranger
        assert ask(str(path))["pid"] in server.worker_pids()
        assert server.stop() == 0
    assert not path.exists()


def test_a_socket_is_removed_by_its_owner_alone(serve: Serve, site: Path) -> None:
    """After kill -9 the next one replaces it, and what the first leaves behind ends without touching it (USR2, too)."""
    path = site / "app.sock"
    with serve("who:app", "--user", USER, bind=f"unix:{path}") as killed:
        killed.signal(signal.SIGKILL)
        killed.wait_exit()
        wait_for(lambda: not any(map(os.path.exists, (f"/proc/{pid}" for pid in killed.worker_pids()))))
        assert path.exists()
    with serve("who:app", "--user", USER, bind=f"unix:{path}") as replaced:
        path.unlink()
        with serve("who:app", "--user", USER, bind=f"unix:{path}") as server:
            upgrade(server)
            assert replaced.stop() == 0
            assert path.exists(), "the one whose socket was replaced leaves that of the other alone"
            check_dropped_uid(ask(str(path)))
            assert server.stop() == 0
        assert not path.exists()


def check_dropped_uid(found: dict[str, Any]) -> None:
    assert found["now"]["uids"] == [pwd.getpwnam(USER).pw_uid] * 3


def test_the_admin_process_is_not_root(serve: Serve, site: Path) -> None:
    """It becomes `user` before it imports what it serves with; a port below 1024 is no obstacle."""
    port = low_port()
    with serve("who:app", "--user", USER, "--admin", f"127.0.0.1:{port}", env=ROOTS) as server:
        server.wait_line(f"admin listener at http://127.0.0.1:{port}$")
        account = pwd.getpwnam(USER)

        def pids() -> list[int]:
            children = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in server.children()}
            return [pid for pid, command in children.items() if b"apphost.admin" in command]

        with RawClient(port) as client:
            assert client.request("GET", "/healthz").status == 200, "it answers only after it has changed its user"
        (pid,) = pids()
        assert status(pid, "Uid") == [str(account.pw_uid)] * 4
        assert status(pid, "Gid") == [str(account.pw_gid)] * 4
        assert int(status(pid, "CapEff")[0], 16) == 0
        assert server.stop() == 0
