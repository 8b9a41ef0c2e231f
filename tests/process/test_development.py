"""Development mode (`--reload`): saves are served, broken code shows its reason, Ctrl-C ends at once."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.operating import status
from tests.process.browser import browser
from tests.support import RawClient, Response, Server, alive, descendants, processes, wait_for, write_app

ENGINES = ("watchfiles", "polling")
HTML = [("Accept", "text/html,application/xhtml+xml;q=0.9,*/*;q=0.8")]

APP = """
import asyncio

async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        while (await receive())["type"] != "lifespan.shutdown":
            await send({{"type": "lifespan.startup.complete"}})
        return await send({{"type": "lifespan.shutdown.complete"}})
    await send({{"type": "http.response.start", "status": 200, "headers": []}})
    if scope["path"] == "/stream":
        while True:
            await send({{"type": "http.response.body", "body": b"tick", "more_body": True}})
            await asyncio.sleep(0.05)
    await send({{"type": "http.response.body", "body": b"{text}"}})
"""


def save(site: Path, text: str, name: str = "app") -> Path:
    return write_app(site, name, APP.format(text=text))


def development(site: Path, *args: str, engine: str = "auto", **about: object) -> Server:
    return Server("app:app", "--reload", "--reload-engine", engine, *args, cwd=site, **about)  # type: ignore[arg-type]


def watching(server: Server, after: int = 0) -> None:
    server.wait_line(r"info watching \d+ files in ", after=after)


def served(server: Server, headers: list[tuple[str, str]] | None = None) -> Response:
    with RawClient(server.port) as client:
        return client.request("GET", "/", headers or [])


def becomes(server: Server, text: str) -> None:
    wait_for(lambda: served(server).body == text.encode(), what=f"nobody answers {text!r}")


def number_of_files(told: list[str]) -> int:
    """How many files are in such lines, of which each names a few and counts the others."""
    return sum(each.count(", ") + 1 + int((re.findall(r" and (\d+) more", each) or [0])[0]) for each in told)


def changes(server: Server, after: int = 0) -> list[str]:
    return re.findall(r"info change of (.*) received", "\n".join(server.lines(after)))


# --------------------------------------------------------------------------------------------- what is saved is served


@pytest.mark.parametrize("engine", ENGINES)
def test_a_save_is_served_also_to_an_open_connection(tmp_path: Path, engine: str) -> None:
    save(tmp_path, "one")
    with development(tmp_path, engine=engine) as server, RawClient(server.port) as client:
        server.wait_line(rf"watching 1 files in {re.escape(str(tmp_path))} \({engine}\)")
        assert client.request("GET", "/").body == b"one"
        mark = server.mark()
        save(tmp_path, "two")
        server.wait_line("change of app.py received", after=mark)
        server.wait_line("generation 2 is serving", after=mark)
        assert client.request("GET", "/").body == b"two"
        assert '"GET / HTTP/1.1" 200' in server.log, "the access log is on"
        (tmp_path / "app.py").unlink()  # gone and there again, as some editors and git do it
        save(tmp_path, "three")
        becomes(server, "three")
        write_app(tmp_path, "new.deep.module", "x = 1\n")
        server.wait_line("change of new/deep/module.py received")
        server.wait_line("generation 4 is serving|generation 5 is serving")
        (tmp_path / "new" / "deep" / "module.py").write_text("x = 2\n")
        wait_for(lambda: changes(server).count("new/deep/module.py") == 2)
        assert server.stop() == 0


@pytest.mark.parametrize("engine", ENGINES)
def test_many_saves_at_once_are_one_reload_and_ignored_ones_none(tmp_path: Path, engine: str) -> None:
    site = tmp_path / "site"
    save(site, "one")
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    (tmp_path / ".gitignore").write_text("generated/\nscratch.py\n")
    for name in ("generated", "__pycache__", ".hidden", "node_modules", "migrations", "package"):
        (site / name).mkdir()
    with development(site, "--reload-exclude", "migrations", "--reload-include", "*.toml", engine=engine) as server:
        watching(server)
        for path in ("generated/a.py", "__pycache__/a.py", ".hidden/a.py", "node_modules/a.py", "migrations/a.py",
                     "scratch.py", "notes.txt", "package/data.json"):  # fmt: skip
            (site / path).write_text("1\n")
        for number in range(50):
            (site / "package" / f"m{number:02}.py").write_text("1\n")
        (site / "package" / "x.toml").write_text("")
        wait_for(lambda: number_of_files(changes(server)) == 51)
        bursts = len(changes(server))
        assert bursts < 10, "one, unless this test was held up between two files"
        assert all(each.startswith("package/m") or each == "package/x.toml" for each in changes(server))
        wait_for(lambda: re.search("generation [0-9]+ is serving", server.log.rpartition("received")[2]))
        (tmp_path / ".gitignore").write_text("package/\n")
        save(site, "two")
        becomes(server, "two")
        assert changes(server)[bursts:] in (["app.py"], ["app.py, package/m00.py, package/m01.py and 49 more"])
        assert server.stop() == 0


def test_settings_are_read_anew_and_the_watcher_obeys_them(tmp_path: Path) -> None:
    save(tmp_path, "one")
    (tmp_path / "apphost.toml").write_text('reload = true\napp = "app:app"\n')
    with Server(cwd=tmp_path) as server:
        watching(server)
        mark = server.mark()
        (tmp_path / "apphost.toml").write_text('reload = true\napp = "app:app"\nreload_include = ["*.txt"]\n')
        server.wait_line("change of apphost.toml received")
        watching(server, mark)
        (tmp_path / "words.txt").write_text("hello")
        server.wait_line("change of words.txt received")
        server.wait_line("generation 3 is serving")
        assert server.stop() == 0


# -------------------------------------------------------------------------------------------------------- broken code


def test_a_broken_save_shows_its_reason_until_it_is_mended(tmp_path: Path) -> None:
    save(tmp_path, "one")
    with development(tmp_path) as server, RawClient(server.port) as client:
        watching(server)
        assert client.request("GET", "/").body == b"one"
        write_app(tmp_path, "app", "def app(:  # <script>alert(1)</script>\n")
        server.wait_line("error generation 2 given up: .*SyntaxError.* An error page is served until it is mended")
        server.wait_line("generation 3 is serving an error page in place of app:app")
        told = status(server)
        assert (told["app"], told["ok"], told["what"]) == (
            "app:app", False, "the last reload was given up, an error page is served"
        )  # fmt: skip
        assert told["given_up"]["generation"] == 2
        assert not {"interface", "lifespan", "preload"} & told["settings"].keys(), "the page's own are not the user's"
        page = client.request("GET", "/anything?x=1", HTML)
        text = page.body.decode()
        assert page.status == 500
        assert page.header(b"content-type") == b"text/html; charset=utf-8"
        assert page.header(b"x-apphost-error") == b"2"
        assert page.header(b"cache-control") == b"no-store"
        assert f"Line 1 of <code>{tmp_path}/app.py</code>" in text
        assert "SyntaxError" in text
        assert "&lt;script&gt;alert(1)" in text
        assert "<script>alert" not in text
        assert "//" not in re.sub(r"<pre>.*</pre>", "", text, flags=re.DOTALL), "nothing comes from elsewhere"
        plain = client.request("POST", "/", [("Accept", "*/*")], b"body")
        assert (plain.status, plain.header(b"content-type")) == (500, b"text/plain; charset=utf-8")
        assert b"def app(:  # <script>" in plain.body
        write_app(tmp_path, "app", "import nothing_of_this_name\n")
        wait_for(lambda: b"nothing_of_this_name" in served(server).body)
        save(tmp_path, "mended")
        becomes(server, "mended")
        assert status(server)["ok"]
        head = client.request("HEAD", "/")
        assert (head.status, head.header(b"x-apphost-error")) == (200, None), "so an open page loads itself anew"
        assert server.stop() == 0


def test_an_open_page_follows_the_code(tmp_path: Path) -> None:
    """In a real browser, nobody touching it: from one failure to the next, and to the mended application."""
    write_app(tmp_path, "app", "raise ValueError('first <b>')\n")
    with development(tmp_path) as server, browser() as session:
        page = session.open(server.url)

        def shows(words: str) -> bool:
            try:
                return words in page.text("body")
            except AssertionError:  # it is being loaded
                return False

        wait_for(lambda: shows("ValueError: first <b>"))
        write_app(tmp_path, "app", "raise ValueError('second')\n")
        wait_for(lambda: shows("ValueError: second"))
        save(tmp_path, "all is well")
        wait_for(lambda: shows("all is well"))
        assert not shows("ValueError")
        assert server.stop() == 0


def test_good_code_can_be_kept(tmp_path: Path) -> None:
    save(tmp_path, "one")
    with development(tmp_path, "--reload-on-error", "keep") as server:
        watching(server)
        write_app(tmp_path, "app", "1 / 0\n")
        server.wait_line("error generation 2 given up: .*ZeroDivisionError.* Generation 1 keeps serving")
        assert "    ZeroDivisionError: division by zero" in server.log
        assert (served(server).status, served(server).body) == (200, b"one")
        save(tmp_path, "two")
        becomes(server, "two")
        assert server.stop() == 0


@pytest.mark.parametrize("policy", ["page", "keep"])
def test_a_first_start_that_fails_waits_to_be_mended(tmp_path: Path, policy: str) -> None:
    """Also where an interface, a lifespan, a probe or preloading would have been in the way of a page."""
    write_app(tmp_path, "app", "raise RuntimeError('first')\n")
    more = ("--reload-on-error", policy, "--interface", "wsgi", "--ready-probe", "/ready", "--preload")
    with development(tmp_path, *more) as server:
        first = served(server)
        assert (first.status, b"RuntimeError: first" in first.body) == (500, True)
        write_app(tmp_path, "app", "raise RuntimeError('second')\n")
        wait_for(lambda: b"RuntimeError: second" in served(server).body)
        write_app(tmp_path, "app", "def app(environ, start):\n    start('200 OK', [])\n    return [b'mended']\n")
        becomes(server, "mended")
        assert server.stop() == 0


def test_broken_settings_are_shown_too(tmp_path: Path) -> None:
    save(tmp_path, "one")
    (tmp_path / "apphost.toml").write_text("reload = true\n")
    with Server("app:app", cwd=tmp_path) as server:
        watching(server)
        (tmp_path / "apphost.toml").write_text("reload = true\nthreads = 'many'\n")
        wait_for(lambda: b"bad value 'many' for threads" in served(server).body)
        (tmp_path / "apphost.toml").write_text("reload = true\n")
        becomes(server, "one")
        assert server.stop() == 0


# ------------------------------------------------------------------------------------------------------------ the end


def test_ctrl_c_ends_at_once_whatever_is_open(tmp_path: Path) -> None:
    """To the whole group, as a terminal sends it."""
    save(tmp_path, "one")
    with development(tmp_path) as server, RawClient(server.port) as stream, RawClient(server.port) as idle:
        watching(server)
        idle.request("GET", "/")
        stream.send(b"GET /stream HTTP/1.1\r\nHost: x\r\n\r\n")
        assert stream.read_head().status == 200
        started = time.monotonic()
        os.killpg(server.pid, signal.SIGINT)
        assert server.wait_exit() == 0
        assert time.monotonic() - started < 8, "the default of a server in production, here it is 1.2 s"
        assert "cut 1 requests short at the end of its drain: " in server.log
        assert re.search(r"gone: exit 0 after ", server.log), "it was not killed"


def test_a_second_ctrl_c_kills(tmp_path: Path) -> None:
    write_app(
        tmp_path, "app", "import time\ndef app(environ, start):\n    print('begun', flush=True)\n    time.sleep(60)\n"
    )
    with development(tmp_path, "--stop-timeout", "60") as server, RawClient(server.port) as client:
        client.send(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        server.wait_line("begun")
        server.signal(signal.SIGINT)
        server.wait_line("draining: stop")
        server.signal(signal.SIGINT)
        assert server.wait_exit() == 0


# -------------------------------------------------------------------------------------------------------- the watcher


def watcher_of(server: Server) -> int:
    def find() -> int:
        for pid in descendants(server.pid):
            try:
                if b"apphost.watcher.main" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    return pid
            except OSError:
                continue
        return 0

    return wait_for(find, what="there is no watcher")


linux_proc = pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="finds processes through /proc")


@linux_proc
def test_a_watcher_that_is_killed_comes_back_and_has_missed_nothing(tmp_path: Path) -> None:
    save(tmp_path, "one")
    with development(tmp_path) as server:
        watching(server)
        pid = watcher_of(server)
        mark = server.mark()
        os.kill(pid, signal.SIGSTOP)  # what is saved now it does not tell
        save(tmp_path, "two")
        os.kill(pid, signal.SIGKILL)
        server.wait_line("warning the watcher of files is gone", after=mark)
        becomes(server, "two")
        watching(server, mark)
        assert server.stop() == 0


@linux_proc
def test_the_watcher_ends_with_the_arbiter(tmp_path: Path) -> None:
    save(tmp_path, "one")
    with development(tmp_path) as server:
        watching(server)
        pid = watcher_of(server)
        server.signal(signal.SIGKILL)
        wait_for(lambda: not alive(pid))
        wait_for(lambda: not [each for each in processes() if each.group == server.pid and each.state != "Z"])


@linux_proc
def test_an_upgrade_starts_a_new_watcher(tmp_path: Path) -> None:
    save(tmp_path, "one")
    with development(tmp_path) as server:
        watching(server)
        pid = watcher_of(server)
        mark = server.mark()
        server.signal(signal.SIGUSR2)
        server.wait_line("info upgraded: ", after=mark)
        server.wait_line("generation 2 is serving", after=mark)
        watching(server, mark)
        wait_for(lambda: not alive(pid))
        save(tmp_path, "two")
        becomes(server, "two")
        assert server.stop() == 0


def test_a_fork_server_in_advance_that_dies_is_not_missed(tmp_path: Path) -> None:
    save(tmp_path, "one")
    with development(tmp_path, "--log-level", "debug") as server:
        watching(server)
        spare = int(server.wait_line(r"a fork server is started in advance, pid (\d+)")[1])
        os.kill(spare, signal.SIGKILL)
        wait_for(lambda: not alive(spare))
        mark = server.mark()
        save(tmp_path, "two")
        becomes(server, "two")
        spare = int(server.wait_line(r"a fork server is started in advance, pid (\d+)", after=mark)[1])
        save(tmp_path, "three")
        server.wait_line(rf"fork server of generation 3 started, pid {spare}$")
        becomes(server, "three")
        assert server.stop() == 0


def test_a_check_of_broken_code_fails_in_development_too(tmp_path: Path) -> None:
    write_app(tmp_path, "app", "1 / 0\n")
    with Server("check", "app:app", "--reload", bind=None, cwd=tmp_path, until=None) as server:
        assert server.wait_exit() == 3
        assert server.log.count("ZeroDivisionError: division by zero") == 1


@linux_proc
def test_without_reload_nobody_watches(tmp_path: Path) -> None:
    save(tmp_path, "one")
    with Server("app:app", "--reload-on-error", "page", cwd=tmp_path) as server:
        write_app(tmp_path, "app", "1 / 0\n")
        assert not [pid for pid in server.children() if b"watcher" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        mark = server.mark()
        server.signal(signal.SIGUSR1)
        server.wait_line("given up: .* Generation 1 keeps serving", after=mark)
        assert served(server, HTML).body == b"one"
        assert server.stop() == 0
