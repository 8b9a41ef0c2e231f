"""What the process of the program becomes, and how a child reads the command line for it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest

import apphost
from apphost import start
from apphost.cli import program
from apphost.errors import AddressError, ApplicationError
from apphost.settings import Settings
from apphost.sources import Loaded, Source
from tests.support import wait_for, write_app

ROOT = str(Path(apphost.__file__).parent.parent)


def test_settings_arrive_as_they_were_read(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(app="shop:app", workers=3, bind=("127.0.0.1:1", "unix:/é"), umask=0o22, keep_alive=1.5)
    origins = {"app": "command line", "workers": "file /srv/apphost.toml"}
    loaded = Loaded(settings, origins, ("one \udcff slip",), "/srv/apphost.toml")
    source = Source(cli={"app": "shop:app", "bind": ["unix:/é"], "reload": True}, config=None, cwd="/srv/\udcff")
    reader, writer = os.pipe()
    ends: list[int] = []
    monkeypatch.setattr(os, "_exit", ends.append)
    start._hand_over(writer, loaded, source)
    assert ends == [0]
    with open(reader, "rb") as pipe:
        assert start._from_wire(pipe.read()) == (loaded, source)


def test_only_to_serve_needs_another_process() -> None:
    commands = program.list_commands(click.Context(program))
    assert {*commands} - {"run"} == start._IN_PLACE


@pytest.mark.parametrize(
    ("error", "code", "output"),
    [
        (AddressError("cannot listen on 127.0.0.1:80"), 4, "apphost: error: cannot listen on 127.0.0.1:80\n"),
        (ApplicationError("no", "Traceback\n  x"), 3, "apphost: error: no\n\nTraceback\n  x\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_what_is_in_the_way_of_serving_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, code: int, output: str
) -> None:
    def serve() -> int:
        raise error

    monkeypatch.setattr(start, "_serve", serve)
    monkeypatch.setattr(sys, "argv", ["apphost", "shop:app"])
    with pytest.raises(SystemExit) as end:
        start.main()
    assert (end.value.code, capsys.readouterr()) == (code, ("", output))


def starting(tmp_path: Path, fake: str) -> subprocess.Popen[str]:
    """The program, with this in place of the library that reads the command line."""
    write_app(tmp_path, "click", fake)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), ROOT])}
    command = [sys.executable, "-m", "apphost", "app:app"]
    return subprocess.Popen(
        command, env=env, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("end", "code"), [("os.kill(os.getpid(), 9)", 137), ("os._exit(7)", 7), ("raise SystemExit(5)", 5)]
)
def test_when_the_child_ends_so_does_the_program(tmp_path: Path, end: str, code: int) -> None:
    process = starting(tmp_path, f"import os\n{end}\n")
    output, _ = process.communicate(timeout=20)
    assert (process.returncode, output) == (code, "")


def test_an_interrupt_while_the_command_line_is_read(tmp_path: Path) -> None:
    process = starting(tmp_path, "import time\nopen('reached', 'w').close()\ntime.sleep(600)\n")
    wait_for((tmp_path / "reached").exists, what="the child to read the command line")
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=20)  # the end of the output: the child has ended, too
    assert (process.returncode, output) == (130, "")
