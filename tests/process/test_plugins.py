"""Plug-ins of another package, found by their entry points and serving for real (requirement 7)."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest

from apphost.sources import toml_parser
from tests.rawhttp import RawClient
from tests.support import OWN_CODE, Server, write_app

EXAMPLE = Path(__file__).resolve().parent.parent / "plugin_example"
GUIDE = Path(__file__).resolve().parent.parent.parent / "docs" / "plugins.md"
GROUPS = ("apphost.parsers", "apphost.interfaces")

APP = """
def app(path, body):
    if path == "/fail":
        raise LookupError("nothing here")
    return f"{path} {len(body)}\\n"
"""


def install(folder: Path) -> dict[str, str]:
    """Install the example into `folder`, as pip would, and return the environment in which it is found."""
    loads = toml_parser()
    if loads is None:
        pytest.skip("there is no TOML parser")
    project = loads((EXAMPLE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    shutil.copy(EXAMPLE / "example_plugin.py", folder)
    info = folder / f"example_plugin-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n", encoding="utf-8"
    )
    assert set(project["entry-points"]) == set(GROUPS)
    lines = [
        line
        for group, names in project["entry-points"].items()
        for line in (f"[{group}]", *(f"{name} = {target}" for name, target in names.items()))
    ]
    (info / "entry_points.txt").write_text("\n".join([*lines, ""]), encoding="utf-8")
    return {"PYTHONPATH": os.pathsep.join([str(folder), str(OWN_CODE.parent)])}


@pytest.fixture
def site(tmp_path: Path) -> Path:
    folder = tmp_path / "site"
    write_app(folder, "text_app", APP)
    return folder


def test_a_parser_and_an_interface(tmp_path: Path, site: Path, loop_name: str) -> None:
    """Bodies, errors, keep-alive, pipelining and a reload are apphost's work, and the plug-ins get them for nothing."""
    env = install(tmp_path)
    args = ("text_app:app", "--interface", "text", "--http", "lines", "--loop", loop_name)
    with Server(*args, cwd=site, env=env) as server, RawClient(server.port) as client:
        server.wait_line(r"ready in .* \(text, lines, ")
        assert client.request("GET", "/one?x=y").body == b"/one 0\n"
        response = client.request("POST", "/two", body=b"x" * 3000)
        assert (response.status, response.body) == (200, b"/two 3000\n")
        assert response.header(b"content-length") == b"10"
        client.send(b"POST /c HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n")
        client.send(b"GET /d HTTP/1.1\r\nHost:a\r\n\r\n")
        assert [client.read_response().body for _ in range(2)] == [b"/c 3\n", b"/d 0\n"]
        assert server.reload() == 2
        assert client.request("GET", "/three").body == b"/three 0\n", "the connection has moved"
        with RawClient(server.port) as other:
            assert other.request("GET", "/fail").status == 500
        server.wait_line("LookupError: nothing here")
        with RawClient(server.port) as other:
            other.send(b"POST /big HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\n\r\n" + b"x" * 70000)
            assert other.read_response().status == 413
        with RawClient(server.port) as other:
            other.send(b"GET / HTTP/1.1\r\nHost: a\r\nBad Name: x\r\n\r\n")
            assert other.read_response().status == 400, "the strict layer stands before every parser"
        assert server.stop() == 0
        assert "lifespan" not in server.log, "that is ASGI's, and nobody called the application for it"


@pytest.mark.parametrize(
    ("option", "broken", "message"),
    [
        ("--interface", "bad = no_such_module:Thing", "the plug-in 'bad' of apphost.interfaces cannot be imported"),
        ("--interface", "bad = example_plugin:Nothing", "the plug-in 'bad' of apphost.interfaces cannot be imported"),
        ("--http", "bad = example_plugin:Nothing", "the plug-in 'bad' of apphost.parsers cannot be imported"),
    ],
)
def test_a_plugin_that_is_broken(tmp_path: Path, site: Path, option: str, broken: str, message: str) -> None:
    group = {"--interface": "apphost.interfaces", "--http": "apphost.parsers"}[option]
    env = install(tmp_path)
    entry_points = next(tmp_path.glob("*.dist-info")) / "entry_points.txt"
    text = entry_points.read_text(encoding="utf-8")
    entry_points.write_text(text.replace(f"[{group}]\n", f"[{group}]\n{broken}\n"), encoding="utf-8")
    with Server("text_app:app", option, "bad", cwd=site, env=env, until=None) as server:
        assert server.wait_exit() == 2
        assert message in server.log


def test_a_name_that_nobody_has_registered(tmp_path: Path, site: Path) -> None:
    with Server("text_app:app", "--interface", "txt", cwd=site, env=install(tmp_path), until=None) as server:
        assert server.wait_exit() == 2
        assert "bad value 'txt' for interface" in server.log
        assert "Did you mean 'text'?" in server.log


def test_the_guide_shows_the_example() -> None:
    """Each piece of code in it is a piece of the example, word for word."""
    guide = GUIDE.read_text(encoding="utf-8")
    code = (EXAMPLE / "example_plugin.py").read_text(encoding="utf-8")
    shown = [text for text in re.findall(r"```python\n(.*?)```", guide, re.DOTALL) if text.startswith("class ")]
    assert len(shown) == 2
    for text in shown:
        assert text.strip("\n") in code
    (table,) = re.findall(r"```toml\n(\[project.*?)```", guide, re.DOTALL)
    assert table.strip("\n") in (EXAMPLE / "pyproject.toml").read_text(encoding="utf-8")
