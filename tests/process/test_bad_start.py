"""Every way to start the program wrong: one clear paragraph on stderr, the exit code of its class, no traceback of
apphost's own, and nothing left behind (the harness looks for both).
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import socket
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from apphost.errors import ExitCode
from tests.support import OWN_CODE, RawClient, Server, write_app

HELLO = """
def app(environ, start_response):
    start_response("200 OK", [])
    return [b"hello"]

number = 7

def make_broken():
    return missing_name

def make_number():
    return 7

def make_nothing():
    pass

def make_exit():
    raise SystemExit("no secret key")

def make_with_arguments(config):
    return app
"""

Fail = Callable[..., Server]


@pytest.fixture
def fail(tmp_path: Path) -> Iterator[Fail]:
    """`fail(code, *args)`: a server that ends with this code, its log complete; `hello.py` is where it starts."""
    write_app(tmp_path, "hello", HELLO)

    def fail(code: ExitCode, *args: str, **options: object) -> Server:
        options = {"cwd": tmp_path, "until": None, **options}
        with Server(*args, **options) as server:  # type: ignore[arg-type]
            assert server.wait_exit() == code, server.log
        assert "could be served" not in server.log
        return server

    yield fail
    assert not [path for path in tmp_path.iterdir() if stat.S_ISSOCK(path.lstat().st_mode)]


def told(server: Server) -> str:
    """The one paragraph: an `apphost: error:` before the log exists, or the one error in the log."""
    errors = [line for line in server.lines() if line.startswith("apphost: error: ") or "] error " in line]
    assert len(errors) == 1, server.log
    assert len(errors[0]) < 600
    return re.sub(r"^apphost: error: |^.*?\] error (worker 1 gen 1 could not boot: )?", "", errors[0])


# ----------------------------------------------------------------------------------------------------- the application


@pytest.mark.parametrize("workers", ["1", "3"])
@pytest.mark.parametrize(
    ("app", "expected"),
    [
        ("nowhere:app", r"there is no module 'nowhere' for the application 'nowhere:app'\. It was looked for in: .*"),
        ("helo:app", r"no module 'helo' .* Did you mean 'hello'\?"),
        ("hello.inner:app", r"there is no module 'hello\.inner'"),
        ("hello:ap", r"module 'hello' has no attribute 'ap' .*Did you mean 'app'\?"),
        ("hello:app.inner", r"has no attribute 'inner'"),
        ("hello:number", r"'hello:number' is no application: a int cannot be called"),
        ("json", r"module 'json' has neither 'application' nor 'app': .*json:my_application"),
        ("hello:make_broken", r"make_broken\(\) is no application: .* add --factory"),
        ("hello:make_with_arguments", r"make_with_arguments\(config\) is no application"),
    ],
)
def test_application_that_is_not_there(fail: Fail, tmp_path: Path, app: str, expected: str, workers: str) -> None:
    server = fail(ExitCode.APPLICATION, app, "--workers", workers)
    assert re.search(expected, re.sub(r"worker \d gen 1 could not boot: ", "", told(server))), server.log
    assert "Traceback" not in server.log
    if app == "nowhere:app":
        assert str(tmp_path) in told(server)
        assert ".zip" not in told(server)


FAILING = {
    "raises": ("import os\n\n\ndef deep():\n    raise LookupError('deep')\n\n\ndeep()\n", "LookupError"),
    "lacks a module": ("import not_installed_anywhere\n", "ModuleNotFoundError"),
    "syntax": ("def app(:\n    pass\n", "SyntaxError"),
    "indentation": ("def app():\npass\n", "IndentationError"),
    "null byte": ("app = 1\0\n", "(SyntaxError|ValueError)"),
    "exits": ("import sys\n\nsys.exit('no settings')\n", "SystemExit"),
    "exits well": ("raise SystemExit\n", "SystemExit"),
    "interrupts": ("raise KeyboardInterrupt\n", "KeyboardInterrupt"),
    "recursion": ("def f():\n    f()\n\n\nf()\n", "RecursionError"),
    "chain": (
        "try:\n    1 / 0\nexcept ZeroDivisionError as exc:\n    raise ValueError('outer') from exc\n",
        "ValueError",
    ),
}


@pytest.mark.parametrize("how", FAILING)
def test_module_that_fails(fail: Fail, tmp_path: Path, how: str) -> None:
    """The user's traceback and nothing of ours or of importlib in it."""
    source, name = FAILING[how]
    write_app(tmp_path, "broken", source)
    server = fail(ExitCode.APPLICATION, "broken:app")
    verb = "ended itself with" if name in ("SystemExit", "KeyboardInterrupt") else "raised"
    assert re.search(f"the application 'broken:app' {verb} {name} while it was imported", told(server))
    if how != "null byte":  # Python itself has no place to tell of, there
        assert re.search(r'File ".*broken\.py", line \d', server.log)
    assert str(OWN_CODE) not in server.log
    assert "importlib" not in server.log
    assert server.log.count("booting, pid") == 1


def test_module_that_ends_its_process(fail: Fail, tmp_path: Path) -> None:
    write_app(tmp_path, "broken", "import os\n\nos._exit(0)\n")
    assert "its process ended early (exit 0)" in told(fail(ExitCode.APPLICATION, "broken:app"))


@pytest.mark.parametrize(("number", "name"), [(signal.SIGKILL, "SIGKILL"), (signal.SIGSEGV, "SIGSEGV")])
def test_module_that_dies(fail: Fail, tmp_path: Path, number: int, name: str) -> None:
    """With the stack of a crash."""
    write_app(tmp_path, "broken", f"import os\n\nos.kill(os.getpid(), {int(number)})\n")
    server = fail(ExitCode.APPLICATION, "broken:app")
    assert f"its process ended early (died of {name})" in told(server)
    assert bool(re.search(r'File ".*broken\.py", line 3', server.log)) == (name == "SIGSEGV")


def test_module_that_hangs(fail: Fail, tmp_path: Path) -> None:
    """With the stack of where it hangs."""
    write_app(tmp_path, "broken", "import time\n\ntime.sleep(600)\n")
    server = fail(ExitCode.APPLICATION, "broken:app", "--boot-timeout", "6")
    assert "not ready within boot_timeout, 6 s" in server.log
    assert re.search(r'File ".*broken\.py", line 3', server.log)


@pytest.mark.parametrize(
    ("factory", "expected"),
    [
        ("make_broken", "the application factory 'hello:make_broken' raised NameError"),
        ("make_exit", "the application factory 'hello:make_exit' raised SystemExit"),
        ("make_with_arguments", "the application factory 'hello:make_with_arguments' raised TypeError"),
        ("make_number", "'hello:make_number' is no application: a int cannot be called"),
        ("make_nothing", "'hello:make_nothing' is no application: a NoneType cannot be called"),
        ("number", "'hello:number' is no factory: a int cannot be called"),
        ("make_brokn", "has no attribute 'make_brokn' .*Did you mean 'make_broken'"),
    ],
)
def test_factory_that_fails(fail: Fail, factory: str, expected: str) -> None:
    server = fail(ExitCode.APPLICATION, f"hello:{factory}", "--factory")
    assert re.search(expected, told(server))
    assert str(OWN_CODE) not in server.log


def test_factory_without_the_option(fail: Fail) -> None:
    assert "add --factory" in told(fail(ExitCode.USAGE, "hello:make_number()"))


# Gives up the right of root to read any file. Every new program of root has it again, so each does this at its start.
NO_OVERRIDE = """
import ctypes, os
if os.geteuid() == 0:
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    data = (ctypes.c_uint32 * 6)()
    libc.capget(header, data)
    for at in (0, 1):
        data[at] &= ~0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    assert libc.capset(header, data) == 0
"""


def test_unreadable_module(fail: Fail, tmp_path: Path) -> None:
    if os.geteuid() == 0 and not hasattr(ctypes.CDLL(None), "capset"):
        pytest.skip("root can read everything")
    write_app(tmp_path, "site/sitecustomize", NO_OVERRIDE)
    write_app(tmp_path, "secret", HELLO).chmod(0)
    server = fail(ExitCode.APPLICATION, "secret:app", env=python_path(tmp_path / "site"))
    assert re.search("raised PermissionError while it was imported", told(server))
    assert "secret.py" in server.log
    assert str(OWN_CODE) not in server.log


def python_path(*folders: Path) -> dict[str, str]:
    return {"PYTHONPATH": os.pathsep.join([*map(str, folders), str(OWN_CODE.parent)])}


# -------------------------------------------------------------------------------------------- parsers, loops, plug-ins


BLOCKER = """
import sys
from importlib.machinery import PathFinder

class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in {blocked!r} else super().find_spec(name, path, target)

sys.meta_path = [Finder if finder is PathFinder else finder for finder in sys.meta_path]
"""


def without(tmp_path: Path, *modules: str) -> dict[str, str]:
    """An environment in which these modules are not installed."""
    write_app(tmp_path, "site/sitecustomize", BLOCKER.format(blocked=modules))
    return python_path(tmp_path / "site")


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        (("--http", "httptools"), r"the parser 'httptools' needs httptools: pip install 'apphost\[fast\]'"),
        (("--loop", "uvloop"), r"the loop 'uvloop' is not installed: pip install 'apphost\[fast\]'"),
    ],
)
def test_extra_that_is_not_installed(fail: Fail, tmp_path: Path, option: tuple[str, str], expected: str) -> None:
    server = fail(ExitCode.USAGE, "hello:app", *option, env=without(tmp_path, "httptools", "uvloop"))
    assert re.search(expected, told(server))


def test_nothing_optional_is_installed(fail: Fail, tmp_path: Path) -> None:
    """What `auto` means then."""
    with Server("hello:app", cwd=tmp_path, env=without(tmp_path, "httptools", "uvloop", "setproctitle")) as server:
        with RawClient(server.port) as client:
            assert client.request("GET", "/").body == b"hello"
        server.wait_line(r"ready in .*\(wsgi, h11, asyncio\)")
        assert server.stop() == 0


@pytest.mark.parametrize("option", ["--http", "--interface"])
def test_plug_in_that_nobody_registered(fail: Fail, option: str) -> None:
    assert "nonesuch" in told(fail(ExitCode.USAGE, "hello:app", option, "nonesuch"))


# ----------------------------------------------------------------------------------------------------------- addresses


def test_port_that_is_taken(fail: Fail, tmp_path: Path) -> None:
    """Also as the second address: the first one is given back, a Unix socket's file removed (see the fixture)."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        expected = f"cannot listen at {address}: another process is listening there already"
        assert told(fail(ExitCode.ADDRESS, "hello:app", "--bind", address)) == expected
        both = ("--bind", f"unix:{tmp_path}/app.sock", "--bind", address)
        assert told(fail(ExitCode.ADDRESS, "hello:app", *both)) == expected


def test_port_of_another_apphost(fail: Fail, tmp_path: Path) -> None:
    with Server("hello:app", cwd=tmp_path) as server:
        told(fail(ExitCode.ADDRESS, "hello:app", "--bind", f"127.0.0.1:{server.port}"))
        with RawClient(server.port) as client:
            assert client.request("GET", "/").body == b"hello"


def test_address_of_another_machine(fail: Fail) -> None:
    """192.0.2.0/24 is nobody's (RFC 5737)."""
    text = told(fail(ExitCode.ADDRESS, "hello:app", "--bind", "192.0.2.1:8000"))
    assert text == "cannot listen at 192.0.2.1:8000: this machine has no address 192.0.2.1"


def test_host_that_is_unknown(fail: Fail) -> None:
    """`.invalid` never resolves (RFC 2606)."""
    text = told(fail(ExitCode.ADDRESS, "hello:app", "--bind", "nowhere.invalid:8000"))
    assert "cannot listen at nowhere.invalid:8000: 'nowhere.invalid' is unknown" in text


@pytest.mark.parametrize("address", ["8000x", "localhost", "127.0.0.1:99999", "unix:", "::1:80", "fd://x", "h:1:2"])
def test_address_that_is_none(fail: Fail, address: str) -> None:
    text = told(fail(ExitCode.USAGE, "hello:app", "--bind", address))
    assert address in text
    assert "--bind" in text


def test_unix_path_of_a_live_server(fail: Fail, tmp_path: Path) -> None:
    """It stays in service."""
    path = tmp_path / "live.sock"
    with Server("hello:app", cwd=tmp_path, bind=f"unix:{path}") as server:
        text = told(fail(ExitCode.ADDRESS, "hello:app", "--bind", f"unix:{path}"))
        assert text == f"cannot listen at unix:{path}: another process is listening there already"
        with RawClient(str(path)) as client:
            assert client.request("GET", "/").body == b"hello"
        assert server.stop() == 0
    assert not path.exists()


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_unix_path_of_something_else(fail: Fail, tmp_path: Path, kind: str) -> None:
    """It is left alone."""
    path = tmp_path / "data"
    {"file": lambda: path.write_text("precious"), "folder": path.mkdir, "link": lambda: path.symlink_to("x")}[kind]()
    text = told(fail(ExitCode.ADDRESS, "hello:app", "--bind", f"unix:{path}"))
    assert text == f"cannot listen at unix:{path}: there is a file of that name that is no socket"
    assert path.is_symlink() or path.is_dir() or path.read_text() == "precious"


def test_unix_path_in_no_folder(fail: Fail, tmp_path: Path) -> None:
    text = told(fail(ExitCode.ADDRESS, "hello:app", "--bind", f"unix:{tmp_path}/missing/app.sock"))
    assert "No such file or directory" in text


def test_stale_unix_socket_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "stale.sock"
    write_app(tmp_path, "hello", HELLO)
    with socket.socket(socket.AF_UNIX) as gone:
        gone.bind(str(path))
        gone.listen()
    assert path.exists()
    with Server("hello:app", cwd=tmp_path, bind=f"unix:{path}") as server:
        with RawClient(str(path)) as client:
            assert client.request("GET", "/").body == b"hello"
        assert server.stop() == 0
    assert not path.exists()


# ------------------------------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((), "no application to serve"),
        (("hello:app", "--workers", "many"), "workers"),
        (("hello:app", "--workers", "0"), "workers"),
        (("hello:app", "--threads", "-1"), "threads"),
        (("hello:app", "--loop", "uvlop"), "uvloop"),
        (("hello:app", "--wrokers", "2"), "--workers"),
        (("hello:app", "extra"), "extra"),
        (("hello:", ), "hello:"),
        (("hello:app", "--limit-request-line", "100000"), "limit_request_line"),
        (("hello:app", "--config", "missing.toml"), "missing.toml"),
        (("hello:app", "--chdir", "missing"), "cannot change to the directory .*missing: No such file or directory"),
    ],
)  # fmt: skip
def test_setting_that_is_bad(fail: Fail, options: tuple[str, ...], expected: str) -> None:
    server = fail(ExitCode.USAGE, *options)
    assert re.search(expected, told(server))
    assert "booting" not in server.log


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("wrokers = 2", r"unknown setting 'wrokers' in .*apphost\.toml.* Did you mean 'workers'\?"),
        ("workers = 'x'", r"workers.*apphost\.toml"),
        ("workers = ", r"apphost\.toml is not valid TOML"),
        ("bind = ['nowhere']", r"bind.*apphost\.toml|nowhere.*apphost\.toml"),
    ],
)
def test_settings_file_that_is_bad(fail: Fail, tmp_path: Path, text: str, expected: str) -> None:
    if sys.version_info < (3, 11):
        pytest.importorskip("tomli")
    (tmp_path / "apphost.toml").write_text(text)
    assert re.search(expected, told(fail(ExitCode.USAGE, "hello:app")))


def test_variable_that_is_bad(fail: Fail) -> None:
    assert "APPHOST_WORKERS" in told(fail(ExitCode.USAGE, "hello:app", env={"APPHOST_WORKERS": "x"}))


# ------------------------------------------------------------------------------------------------- users, pidfile, logs


@pytest.mark.parametrize(
    ("option", "what", "name"),
    [
        ("--user", "there is no user", "nobody-of-this-name"),
        ("--user", "there is no user", "99999999999"),
        ("--group", "there is no group", "nobody-of-this-name"),  # any number is a group, whether it has a name or not
    ],
)
def test_user_that_is_unknown(fail: Fail, option: str, what: str, name: str) -> None:
    assert told(fail(ExitCode.PRIVILEGES, "hello:app", option, name)) == f"{what} {name!r}"


@pytest.mark.parametrize("command", [(), ("check",)], ids=["run", "check"])
def test_user_and_group_that_go_not_together(fail: Fail, command: tuple[str, ...]) -> None:
    """Before anything is opened or started, and in `check` as well."""
    text = told(fail(ExitCode.PRIVILEGES, *command, "hello:app", "--user", "3999999999"))
    assert text == "there is no user '3999999999'; a number without an account needs `group` as well"
    if os.geteuid() == 0:
        text = told(fail(ExitCode.PRIVILEGES, *command, "hello:app", "--group", "daemon"))
        assert text == "group 'daemon' alone would leave the workers root: set `user` as well"
    else:
        text = told(fail(ExitCode.PRIVILEGES, *command, "hello:app", "--user", "root"))
        assert text.startswith("cannot become user root, group unchanged: only root may change them")
    text = told(fail(ExitCode.PRIVILEGES, *command, "hello:app", "--unix-socket-owner", "nobody-of-this-name"))
    assert text == "there is no user 'nobody-of-this-name'"
    text = told(fail(ExitCode.USAGE, *command, "hello:app", "--unix-socket-owner", "a:b:c"))
    assert "expected USER, USER:GROUP or :GROUP" in text


def test_pidfile_of_a_live_apphost(fail: Fail, tmp_path: Path) -> None:
    """The other one is named and left alone, and so is its file."""
    pidfile = tmp_path / "apphost.pid"
    with Server("hello:app", "--pidfile", str(pidfile), cwd=tmp_path) as server:
        assert pidfile.read_text() == f"{server.pid}\n"
        text = told(fail(ExitCode.RUNNING, "hello:app", "--pidfile", str(pidfile)))
        assert text == f"apphost is running already: process {server.pid} holds the pidfile {pidfile}"
        assert pidfile.read_text() == f"{server.pid}\n"
        with RawClient(server.port) as client:
            assert client.request("GET", "/").body == b"hello"
        assert server.stop() == 0
    assert not pidfile.exists()


@pytest.mark.parametrize("kind", ["in no folder", "a folder"])
def test_pidfile_that_cannot_be_written(fail: Fail, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "missing" / "pid" if kind == "in no folder" else tmp_path
    text = told(fail(ExitCode.PRIVILEGES, "hello:app", "--pidfile", str(path)))
    assert text.startswith(f"cannot write the pidfile {path}: ")


def test_pidfile_is_gone_after_a_bad_start(fail: Fail, tmp_path: Path) -> None:
    fail(ExitCode.APPLICATION, "hello:nothing", "--pidfile", str(tmp_path / "pid"))
    fail(ExitCode.ADDRESS, "hello:app", "--pidfile", str(tmp_path / "pid"), "--bind", f"unix:{tmp_path}")
    assert not (tmp_path / "pid").exists()


def test_access_log_that_cannot_be_opened(fail: Fail, tmp_path: Path) -> None:
    text = told(fail(ExitCode.PRIVILEGES, "hello:app", "--access-log", str(tmp_path)))
    assert text == f"cannot open the access log {tmp_path}: Is a directory"


# --------------------------------------------------------------------------------------------------------------- check


def test_check_of_a_good_application(tmp_path: Path) -> None:
    write_app(tmp_path, "hello", HELLO)
    with Server("check", "hello:app", "--http", "h11", "--loop", "asyncio", cwd=tmp_path, until=None) as server:
        assert server.wait_exit() == ExitCode.OK
    assert "hello:app can be served: interface wsgi, parser h11, loop asyncio; ready in " in server.log
    assert "error" not in server.log


def test_check_opens_no_port(tmp_path: Path) -> None:
    """So it can run beside the server that it is meant for."""
    write_app(tmp_path, "hello", HELLO)
    pidfile = ("--pidfile", str(tmp_path / "pid"))
    with Server("hello:app", *pidfile, cwd=tmp_path) as server:
        address = f"127.0.0.1:{server.port}"
        with Server("check", "hello:app", "--bind", address, *pidfile, cwd=tmp_path, until=None) as check:
            assert check.wait_exit() == ExitCode.OK
        assert (tmp_path / "pid").read_text() == f"{server.pid}\n"


@pytest.mark.parametrize(
    ("app", "options", "code"),
    [
        ("hello:nothing", (), ExitCode.APPLICATION),
        ("nowhere:app", (), ExitCode.APPLICATION),
        ("hello:make_broken", ("--factory",), ExitCode.APPLICATION),
        ("hello:app", ("--workers", "x"), ExitCode.USAGE),
        ("hello:app", ("--http", "nonesuch"), ExitCode.USAGE),
        ("hello:app", ("--user", "nobody-of-this-name"), ExitCode.PRIVILEGES),
    ],
)
def test_check_of_a_bad_one(fail: Fail, app: str, options: tuple[str, ...], code: ExitCode) -> None:
    told(fail(code, "check", app, *options))
