"""Logs of real servers (requirement 6): files that are renamed, applications that meddle with logging, ids, syslog."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest

from tests.process.ws_probe import WsClient
from tests.support import DEADLINE, RawClient, Server, linux, raw, request_bytes, wait_for, write_app

WSGI = """
import os, time

def app(environ, start_response):
    path = environ["PATH_INFO"]
    fields = []
    if path == "/own":
        fields.append(("x-request-id", "mine"))
    elif path == "/fail":
        raise RuntimeError("on purpose")
    elif path == "/slow":
        os.write(1, b"slow has begun\\n")
        while not os.path.exists("go-on"):
            time.sleep(0.01)
    start_response("200 OK", fields)
    return [environ.get("HTTP_X_REQUEST_ID", "none").encode()]
"""

ASGI = """
async def app(scope, receive, send):
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.accept"})
    if scope["path"] == "/fail":
        raise RuntimeError("on purpose")
    found = b",".join(value for name, value in scope["headers"] if name == b"x-request-id")
    if scope["type"] == "websocket":
        await send({"type": "websocket.send", "text": found.decode()})
        while (await receive())["type"] != "websocket.disconnect":
            await send({"type": "websocket.send", "text": found.decode()})
        return
    fields = [(b"X-Request-Id", b"mine")] if scope["path"] == "/own" else []
    await send({"type": "http.response.start", "status": 200, "headers": fields})
    await send({"type": "http.response.body", "body": found})
"""


def text_of(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def lines_of(path: Path) -> list[str]:
    return path.read_text().splitlines()


# ------------------------------------------------------------------------------------------------------------ rotation


def test_renamed_files_lose_no_line(tmp_path: Path) -> None:
    """Under load, with USR1 after each rename: each request has its line once, in the file of its worker's generation;
    apphost's own log goes on in the new file, too."""
    write_app(tmp_path, "wsgi_app", WSGI)
    form = "%(generation)s %(target)s %(status)s"
    options = ("--workers", "2", "--access-log", "access.log", "--access-log-format", form, "--error-log", "error.log")
    address = str(tmp_path / "s")
    access, error = tmp_path / "access.log", tmp_path / "error.log"
    asked: list[str] = []
    ending = threading.Event()

    def load(name: int) -> None:
        number = 0
        while not ending.is_set():
            with RawClient(address) as client:
                for _ in range(50):
                    number += 1
                    assert client.request("GET", f"/{name}/{number}").status == 200
                    asked.append(f"/{name}/{number} 200")

    def serving(generation: int) -> bool:
        return f"generation {generation} is serving" in text_of(error)

    with Server("wsgi_app:app", *options, "--bind", f"unix:{address}", cwd=tmp_path, until=None) as server:
        wait_for(lambda: serving(1))
        threads = [threading.Thread(target=load, args=(name,)) for name in range(3)]
        for thread in threads:
            thread.start()
        for generation in (2, 3):
            before = len(asked)
            wait_for(lambda before=before: len(asked) > before + 50)  # type: ignore[misc]
            access.rename(f"{access}.{generation - 1}")
            error.rename(f"{error}.{generation - 1}")
            server.signal(signal.SIGUSR1)
            wait_for(lambda generation=generation: serving(generation))  # type: ignore[misc]
        before = len(asked)
        wait_for(lambda: len(asked) > before + 50)
        ending.set()
        for thread in threads:
            thread.join(DEADLINE)
        assert server.stop() == 0
        assert "generation" not in server.log
    files = [Path(f"{access}.1"), Path(f"{access}.2"), access]
    for generation, file in enumerate(files, 1):
        assert {line.partition(" ")[0] for line in lines_of(file)} == {str(generation)}
    found = Counter(line.partition(" ")[2] for file in files for line in lines_of(file))
    assert found == Counter(asked)
    assert "generation 1 is serving" in Path(f"{error}.1").read_text()
    assert "stopped, exit 0" in error.read_text()
    assert not access.stat().st_mode & 0o007


def test_an_error_log_that_cannot_be_opened(tmp_path: Path) -> None:
    """At the start that is an error; at a rotation it is told in the old file, and the server goes on."""
    write_app(tmp_path, "wsgi_app", WSGI)
    with Server("wsgi_app:app", "--error-log", "no/such/file", cwd=tmp_path, until=None) as server:
        assert server.wait_exit() == 6
        assert "cannot open the error log no/such/file: No such file or directory" in server.log
    (tmp_path / "logs").mkdir()
    with Server("wsgi_app:app", "--error-log", "logs/error.log", cwd=tmp_path, until=None) as server:
        wait_for(lambda: "is serving" in text_of(tmp_path / "logs/error.log"))
        (tmp_path / "logs").rename(tmp_path / "gone")
        server.signal(signal.SIGUSR1)
        wait_for(lambda: "generation 2 given up" in text_of(tmp_path / "gone/error.log"))
        assert "the log goes on where it is" in (tmp_path / "gone/error.log").read_text()
        assert server.stop() == 0


def test_an_upgrade_goes_on_with_its_log(tmp_path: Path) -> None:
    """USR2: in the file of that name, or on standard error when there can be none; rotation works afterwards."""
    write_app(tmp_path, "wsgi_app", WSGI)
    (tmp_path / "logs").mkdir()
    first, second = tmp_path / "logs" / "error.log", tmp_path / "gone" / "error.log"
    with Server("wsgi_app:app", "--error-log", "logs/error.log", cwd=tmp_path, until=None) as server:
        wait_for(lambda: "generation 1 is serving" in text_of(first))
        server.signal(signal.SIGUSR2)
        wait_for(lambda: "generation 2 is serving" in text_of(first))
        (tmp_path / "logs").rename(tmp_path / "gone")
        server.signal(signal.SIGUSR2)
        server.wait_line("cannot open the error log .*; the log goes to standard error until the next reload")
        server.wait_line("generation 3 given up: .*cannot open the error log")
        (tmp_path / "logs").mkdir()
        server.signal(signal.SIGUSR1)
        wait_for(lambda: "generation 4 is serving" in text_of(first))
        assert "upgraded: apphost" in second.read_text()
        mark = server.mark()
        assert server.stop() == 0
        assert server.lines(mark) == [], "the file has the rest"


# ----------------------------------------------------------------------------------------------------------- log_config

CONFIG = {
    "version": 1,
    "formatters": {"plain": {"format": "%(name)s %(levelname)s %(message)s"}},
    "handlers": {"file": {"class": "logging.FileHandler", "filename": "logging.log", "formatter": "plain"}},
    "loggers": {"apphost.access": {"level": "INFO"}, "apphost.error": {"level": "INFO"}},
    "root": {"level": "INFO", "handlers": ["file"]},
}
TOML = """
version = 1
[formatters.plain]
format = "%(name)s %(levelname)s %(message)s"
[handlers.file]
class = "logging.FileHandler"
filename = "logging.log"
formatter = "plain"
[loggers."apphost.access"]
level = "INFO"
[loggers."apphost.error"]
level = "INFO"
[root]
level = "INFO"
handlers = ["file"]
"""

# What it does to logging before it is served: as unkind as applications get by accident.
MEDDLER = """
import io, logging, logging.config, os, sys

log = logging.getLogger("site")
log.info("imported")
{deed}

def app(environ, start_response):
    if environ["PATH_INFO"] == "/fail":
        raise RuntimeError("on purpose")
    start_response("200 OK", [])
    return [b"body"]
"""


@pytest.mark.parametrize("kind", ["json", "toml", "preload"])
def test_log_config(tmp_path: Path, kind: str) -> None:
    """Applied before the import; the lines of apphost go to the loggers that the file names, and where they went."""
    deed = "logging.config.dictConfig({'version': 1})  # disables all loggers that exist, and closes their handlers"
    write_app(tmp_path, "wsgi_app", MEDDLER.format(deed=deed))
    name = "logging.toml" if kind == "toml" else "logging.json"
    (tmp_path / name).write_text(TOML if kind == "toml" else json.dumps(CONFIG))
    options = ["--log-config", name, "--access-log", "access.log", *(["--preload"] if kind == "preload" else [])]
    with Server("wsgi_app:app", *options, "--access-log-format", "%(r)s", cwd=tmp_path) as server:
        with RawClient(server.port) as client:
            assert client.request("GET", "/one").status == 200
            assert client.request("GET", "/fail").status == 500
        assert server.stop() == 0
    found = lines_of(tmp_path / "logging.log")
    assert found[0] == "site INFO imported"
    assert "apphost.access INFO GET /one HTTP/1.1" in found
    assert "apphost.access INFO GET /fail HTTP/1.1" in found
    assert any(re.match(r"apphost\.error ERROR worker 1 gen 1: the application raised", line) for line in found)
    assert lines_of(tmp_path / "access.log") == ["GET /one HTTP/1.1", "GET /fail HTTP/1.1"]
    assert "the application raised RuntimeError" in server.log


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "the logging configuration l.json is not valid JSON"),
        ("[]", "the logging configuration l.json must be an object"),
        ("{}", "the logging configuration l.json was not accepted: dictionary doesn't specify a version"),
        (json.dumps({"version": 1, "handlers": {"h": {"class": "no.such.Class"}}}), "Unable to configure handler 'h'"),
        (json.dumps({"version": 1, "handlers": {"h": {"class": "logging.FileHandler", "filename": "no/such"}}}),
         r"Unable to configure handler 'h': .*No such file or directory"),
        (None, "cannot read the logging configuration l.json: No such file or directory"),
    ],
)  # fmt: skip
def test_a_bad_log_config(tmp_path: Path, text: str | None, why: str) -> None:
    """Ends a start with the code for settings."""
    write_app(tmp_path, "wsgi_app", WSGI)
    if text is not None:
        (tmp_path / "l.json").write_text(text)
    with Server("wsgi_app:app", "--log-config", "l.json", cwd=tmp_path, until=None) as server:
        assert server.wait_exit() == 2
        assert re.search(why, server.log)


def test_a_log_config_that_gets_bad(tmp_path: Path) -> None:
    """The generation is given up; the old one goes on."""
    write_app(tmp_path, "wsgi_app", WSGI)
    config = tmp_path / "l.json"
    config.write_text('{"version": 1}')
    with Server("wsgi_app:app", "--log-config", "l.json", cwd=tmp_path) as server:
        config.write_text('{"version": 2}')
        server.reload(wait=False)
        server.wait_line("generation 2 given up.*logging configuration l.json was not accepted.*version")
        with RawClient(server.port) as client:
            assert client.request("GET", "/").status == 200
        assert server.stop() == 0


# --------------------------------------------------------------------------------------------------- hostile to logging

DEEDS = {
    "dictConfig": "logging.config.dictConfig({'version': 1, 'disable_existing_loggers': True})",
    "basicConfig": "logging.basicConfig(force=True, filename='its.log', level=99)",
    "disable": "logging.disable(logging.CRITICAL); logging.shutdown()",
    "streams": "sys.stdout = sys.stderr = io.StringIO()",
    "closed streams": "sys.stdout.close(); sys.stderr.close()",
    "none": "sys.stdout = sys.stderr = sys.__stdout__ = sys.__stderr__ = None",
    "descriptors": "os.close(1); os.close(2); its = [open('its.log', 'a'), open('its.log', 'a')]; "
    "assert sorted(each.fileno() for each in its) == [1, 2]",
    "redirected": "its = os.open('its.log', os.O_WRONLY | os.O_CREAT); os.dup2(its, 1); os.dup2(its, 2)",
}


@pytest.mark.parametrize("deed", DEEDS)
def test_logs_survive_an_application_that(tmp_path: Path, deed: str) -> None:
    """One line for each request, and the server's own lines, where they belong; nothing of them in its files."""
    write_app(tmp_path, "wsgi_app", MEDDLER.format(deed=DEEDS[deed]))
    options = ("--access-log", "-", "--access-log-format", "access: %(r)s %(s)s")
    with Server("wsgi_app:app", *options, cwd=tmp_path) as server:
        with RawClient(server.port) as client:
            for number in range(3):
                assert client.request("GET", f"/{number}").status == 200
            assert client.request("GET", "/fail").status == 500
        server.wait_line("worker 1 gen 1: the application raised RuntimeError")
        server.wait_line("access: GET /fail HTTP/1.1 500")
        assert server.stop() == 0
        assert [line for line in server.lines() if line.startswith("access: ")] == [
            *(f"access: GET /{number} HTTP/1.1 200" for number in range(3)),
            "access: GET /fail HTTP/1.1 500",
        ]
    if (tmp_path / "its.log").exists():
        assert not re.search("access: |worker 1", (tmp_path / "its.log").read_text())


# ---------------------------------------------------------------------------------------------------------- request ids

HEX = re.compile(r"[0-9a-f]{32}")
IDS = ("--request-id-header", "X-Request-ID", "--access-log", "access.log", "--lifespan", "off")
IDS += ("--access-log-format", "%(request_id)s %(target)s")


@pytest.fixture(params=["wsgi", "asgi"])
def kind(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    write_app(tmp_path, "wsgi_app", WSGI)
    write_app(tmp_path, "asgi_app", ASGI)
    return str(request.param)


def ids_in(path: Path) -> list[str]:
    return [line.partition(" ")[0] for line in lines_of(path)]


def test_ids_are_made(tmp_path: Path, kind: str) -> None:
    """The application, the client and the log have the same one; what a client sends is not believed."""
    with Server(f"{kind}_app:app", *IDS, cwd=tmp_path) as server:
        with RawClient(server.port) as client:
            plain = client.request("GET", "/")
            forged = client.request("GET", "/", [("X-Request-ID", "forged"), ("x-request-id", "again")])
            own = client.request("GET", "/own")
        failed = raw(server.port, request_bytes("GET", "/fail", [("Connection", "close")]))
        server.stop()
    assert plain.header(b"x-request-id") == plain.body
    assert forged.all(b"x-request-id") == [forged.body]
    assert own.all(b"x-request-id") == [b"mine"], "an application that gives the field has its way"
    match = re.search(rb"\r\nX-Request-ID: ([0-9a-f]{32})\r\n", failed)
    assert failed.startswith(b"HTTP/1.1 500 ")
    assert match
    ids = [plain.body.decode(), forged.body.decode(), own.body.decode(), match[1].decode()]
    assert all(map(HEX.fullmatch, ids))
    assert len(set(ids)) == 4
    assert ids_in(tmp_path / "access.log") == ids


def test_ids_of_a_proxy_are_taken(tmp_path: Path, kind: str) -> None:
    """When they are single ones of harmless characters; else one is made."""
    bad = ["a b", "a\xfc", '"', "x" * 145, ""]
    with Server(f"{kind}_app:app", *IDS, "--trusted-proxies", "127.0.0.1", cwd=tmp_path) as server:
        with RawClient(server.port) as client:
            good = client.request("GET", "/", [("X-Request-Id", "1-67891233-abcdef012345678912345678;".strip(";"))])
            others = [client.request("GET", "/", [("X-Request-ID", value)]) for value in bad]
            others.append(client.request("GET", "/", [("X-Request-ID", "a"), ("X-Request-ID", "b")]))
        server.stop()
    assert good.body == good.header(b"x-request-id") == b"1-67891233-abcdef012345678912345678"
    for other in others:
        assert HEX.fullmatch(other.body.decode())
        assert other.all(b"x-request-id") == [other.body]
    assert ids_in(tmp_path / "access.log") == [good.body.decode(), *(each.body.decode() for each in others)]


def test_underscores_bring_no_second_id(tmp_path: Path) -> None:
    """Where names with `_` come through, WSGI would join both."""
    write_app(tmp_path, "wsgi_app", WSGI)
    with Server("wsgi_app:app", *IDS, "--underscore-headers", "allow", cwd=tmp_path) as server:
        with RawClient(server.port) as client:
            answer = client.request("GET", "/", [("X_Request-ID", "forged")])
        server.stop()
    assert HEX.fullmatch(answer.body.decode())


def test_without_the_setting_there_are_no_ids(tmp_path: Path, kind: str) -> None:
    options = ("--access-log", "access.log", "--access-log-format", "%(request_id)s %({x-request-id}i)s")
    with Server(f"{kind}_app:app", *options, "--lifespan", "off", cwd=tmp_path) as server:
        with RawClient(server.port) as client:
            answer = client.request("GET", "/", [("X-Request-ID", "given")])
        server.stop()
    assert answer.body == b"given"
    assert answer.header(b"x-request-id") is None
    assert lines_of(tmp_path / "access.log") == ["- given"]


def test_ids_of_websockets(tmp_path: Path) -> None:
    """In the handshake and its line of the log; the same when the socket goes on in another worker."""
    write_app(tmp_path, "asgi_app", ASGI)
    with Server("asgi_app:app", *IDS, "--ws-on-reload", "rejoin", cwd=tmp_path) as server:
        with WsClient(server.port, "/chat", [("X-Request-ID", "forged")]) as client:
            client.opened()
            told = client.response.header(b"x-request-id")
            assert told is not None
            made = client.hear()
            server.reload()
            assert client.hear() == made, "said by the next worker when the application is called again"
        server.stop()
    assert isinstance(made, str)
    assert HEX.fullmatch(made)
    assert told.decode() == made
    assert f"{made} /chat" in lines_of(tmp_path / "access.log")


# ------------------------------------------------------------------------------------------------- queue time, syslog


def test_queue_time(tmp_path: Path) -> None:
    """A request that waits for a thread has waited in the log; one that is not called has no such time."""
    write_app(tmp_path, "wsgi_app", WSGI)
    options = ("--threads", "1", "--access-log", "access.log", "--access-log-format", "json")
    with Server("wsgi_app:app", *options, cwd=tmp_path) as server:
        with RawClient(server.port) as slow, RawClient(server.port) as waiting:
            slow.send(request_bytes("GET", "/slow"))
            server.wait_line("slow has begun")
            waiting.send(request_bytes("GET", "/waiting"))
            threading.Event().wait(1)  # the time that is to be measured, and some for the request to be read
            (tmp_path / "go-on").touch()
            assert slow.read_response().status == waiting.read_response().status == 200
        raw(server.port, b"nonsense\r\n\r\n")
        server.stop()
    records = {record["target"]: record for record in map(json.loads, lines_of(tmp_path / "access.log"))}
    assert records["/slow"]["queue"] < records["/slow"]["duration"]
    assert 0.2 < records["/waiting"]["queue"] <= records["/waiting"]["duration"]
    assert records["-"]["queue"] is None
    assert records["-"]["status"] == 400
    assert records["/slow"]["worker"] == records["/slow"]["generation"] == 1


@linux
def test_syslog(tmp_path: Path) -> None:
    """Each request a datagram; without a daemon the requests are served all the same, and that is told once."""
    write_app(tmp_path, "wsgi_app", WSGI)
    path = str(tmp_path / "log")
    options = ("--access-log", f"syslog:{path}", "--access-log-format", "%(m)s %(target)s %(s)s")
    with Server("wsgi_app:app", *options, cwd=tmp_path) as server, RawClient(server.port) as client:
        assert client.request("GET", "/lost").status == 200
        server.wait_line(r"syslog at \S+ does not take the access log \(No such file or directory\); .* dropped: 1")
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as daemon:
            daemon.bind(path)
            daemon.settimeout(DEADLINE)
            assert client.request("GET", "/taken").status == 200
            assert re.fullmatch(rb"<14>.{15} apphost\[\d+\]: GET /taken 200", daemon.recv(65536))
            os.chmod(path, 0o777)
            for number in range(500):  # nobody reads, and the queue gets full: no request waits for that
                assert client.request("GET", f"/{number}").status == 200
        assert server.stop() == 0


@pytest.mark.parametrize(
    ("option", "value", "why"),
    [
        ("--access-log-format", "%(stat)s", "no field %(stat)s"),
        ("--access-log", "syslog:nowhere", "expected syslog:"),
        ("--request-id-header", "X Id", "expected the name of a header field"),
        ("--request-id-header", "Host", "expected a header field of its own"),
        ("--request-id-header", "X_Id", "expected the name of a header field"),
    ],
)
def test_bad_values(tmp_path: Path, option: str, value: str, why: str) -> None:
    write_app(tmp_path, "wsgi_app", WSGI)
    with Server("wsgi_app:app", option, value, cwd=tmp_path, until=None) as server:
        assert server.wait_exit() == 2
        assert why in server.log


# ------------------------------------------------------------------------------------------- a reader that has stopped


@pytest.mark.parametrize("interface", ["wsgi", "asgi"])
def test_a_full_pipe_for_a_log_stops_nothing(tmp_path: Path, interface: str) -> None:
    """A parent that never reads, a pager, a collector that hangs: requests are answered, and TERM is obeyed."""
    write_app(tmp_path, "app", WSGI if interface == "wsgi" else ASGI)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, bytes(65536))
    os.set_blocking(writer, True)
    port = free_port()
    command = [sys.executable, "-m", "apphost", "app:app", "--bind", f"127.0.0.1:{port}", "--access-log", "-"]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdin=subprocess.DEVNULL, stdout=writer, stderr=writer, start_new_session=True
    )
    try:
        wait_for(lambda: answers(port), timeout=60)
        for _ in range(20):
            assert raw(port, request_bytes("GET", "/"), half_close=True).startswith(b"HTTP/1.1 200")
        process.send_signal(signal.SIGUSR1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(60)
        os.close(reader)
        os.close(writer)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def answers(port: int) -> bool:
    try:
        return raw(port, request_bytes("GET", "/"), half_close=True).startswith(b"HTTP/1.1 200")
    except OSError:
        return False
