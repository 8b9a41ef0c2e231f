"""The command line: which command is meant, what reaches the arbiter, what an operator reads on an error."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import click
import pytest
from click.testing import CliRunner

import apphost
from apphost import cli
from apphost.errors import AddressError, ApphostError, ApplicationError, ExitCode
from apphost.settings import SETTINGS
from apphost.sources import Loaded, Source


class Done(NamedTuple):
    code: int
    out: str


class Arbiter:
    """Stands where the arbiter begins, and records what it is asked to do."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Loaded, Source]] = []
        self.raises: BaseException | None = None
        self.code = 0

    def _called(self, command: str, loaded: Loaded, source: Source) -> int:
        self.calls.append((command, loaded, source))
        if self.raises is not None:
            raise self.raises
        return self.code

    def module(self) -> types.ModuleType:
        module = types.ModuleType("apphost.arbiter.main")
        for command in ("run", "check"):
            setattr(module, command, lambda loaded, source, command=command: self._called(command, loaded, source))
        return module


@pytest.fixture
def arbiter(monkeypatch: pytest.MonkeyPatch) -> Arbiter:
    arbiter = Arbiter()
    monkeypatch.setitem(sys.modules, "apphost.arbiter.main", arbiter.module())
    return arbiter


@pytest.fixture
def site(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """An empty current directory, and no variable that is a setting."""
    for name in list(os.environ):
        if name.startswith("APPHOST_") or name in ("PORT", "WEB_CONCURRENCY"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PWD", str(tmp_path))
    return tmp_path


def serve(loaded: Loaded, source: Source) -> None:
    """In place of the process that settings are handed over to."""
    from apphost.arbiter.main import run

    sys.exit(run(loaded, source))


@pytest.fixture
def apphost_(site: pathlib.Path) -> Callable[..., Done]:
    def run(*args: str, **environ: str) -> Done:
        result = CliRunner().invoke(cli.program, list(args), env=environ, obj=serve)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Done(result.exit_code, result.output)

    return run


Program = Callable[..., Done]


# Which command


@pytest.mark.parametrize(
    ("args", "command", "app", "workers"),
    [
        (["app:app"], "run", "app:app", 1),
        (["run", "app:app"], "run", "app:app", 1),
        (["-w", "2", "app:app"], "run", "app:app", 2),
        (["-w2", "app:app"], "run", "app:app", 2),
        (["--workers=2", "app:app"], "run", "app:app", 2),
        (["app:app", "-w", "2"], "run", "app:app", 2),
        (["run", "-w", "2", "app:app"], "run", "app:app", 2),
        (["run", "check"], "run", "check", 1),
        (["check", "app:app"], "check", "app:app", 1),
        (["check", "-w", "2", "app:app"], "check", "app:app", 2),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_run_is_meant_unless_another_command_is_named(
    apphost_: Program, arbiter: Arbiter, args: list[str], command: str, app: str, workers: int
) -> None:
    assert apphost_(*args) == Done(0, "")
    (called, loaded, _source), *more = arbiter.calls
    assert (called, loaded.settings.app, loaded.settings.workers, more) == (command, app, workers, [])


def test_the_app_may_come_from_elsewhere(apphost_: Program, arbiter: Arbiter, site: pathlib.Path) -> None:
    (site / "apphost.toml").write_text("app = 'shop:app'\n")
    assert apphost_().code == 0
    assert apphost_("-w", "2", APPHOST_APP="other:app").code == 0
    assert [loaded.settings.app for _, loaded, _ in arbiter.calls] == ["shop:app", "other:app"]


@pytest.mark.parametrize("args", [[], ["run"], ["check"], ["-w", "2"]], ids=str)
def test_no_app_anywhere(apphost_: Program, arbiter: Arbiter, args: list[str]) -> None:
    done = apphost_(*args)
    assert done.code == ExitCode.USAGE
    assert done.out.startswith(
        "apphost: error: no application to serve. Name it as in an import, for example: apphost "
    )
    assert done.out.count("\n") == 1
    assert arbiter.calls == []


def test_a_command_after_its_options(apphost_: Program, arbiter: Arbiter) -> None:
    done = apphost_("-w", "2", "check")
    assert done.code == ExitCode.USAGE
    assert "the command comes before its options: apphost check [OPTIONS]" in done.out
    assert arbiter.calls == []


def test_the_exit_code_of_the_arbiter_is_ours(apphost_: Program, arbiter: Arbiter) -> None:
    arbiter.code = 3
    assert apphost_("app:app") == Done(3, "")
    assert apphost_("check", "app:app") == Done(3, "")


# What reaches the arbiter


def test_only_what_was_given_is_handed_on_as_text(apphost_: Program, arbiter: Arbiter, site: pathlib.Path) -> None:
    (site / "x.toml").write_text("threads = 3\n")
    args = [
        "app:app",
        "-b",
        "127.0.0.1:1",
        "-b",
        "127.0.0.1:2",
        "-w",
        "auto",
        "--no-date-header",
        "--keep-alive",
        "90s",
    ]
    assert apphost_(*args, "--config", "x.toml", APPHOST_LOG_LEVEL="debug").code == 0
    _, loaded, source = arbiter.calls[0]
    assert source.cli == {
        "app": "app:app",
        "bind": ["127.0.0.1:1", "127.0.0.1:2"],
        "workers": "auto",
        "date_header": False,
        "keep_alive": "90s",
    }
    assert (source.config, source.cwd) == ("x.toml", str(site))
    assert (loaded.settings.keep_alive, loaded.settings.threads, loaded.settings.log_level) == (90.0, 3, "debug")
    again = Source.from_wire(json.loads(json.dumps(source.to_wire()))).load({"APPHOST_LOG_LEVEL": "debug"})
    assert again == loaded


def test_the_directory_keeps_the_name_that_the_user_gave_it(
    apphost_: Program, arbiter: Arbiter, site: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (site / "release1").mkdir()
    (site / "current").symlink_to("release1")
    monkeypatch.chdir(site / "current")
    apphost_("app:app", PWD=str(site / "current"))
    apphost_("app:app", PWD=str(site))
    apphost_("app:app", PWD="relative")
    apphost_("app:app", PWD="/absent")
    real = os.path.realpath(site / "release1")
    assert [source.cwd for *_, source in arbiter.calls] == [str(site / "current"), real, real, real]


def test_a_directory_that_is_gone(apphost_: Program, site: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = site / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    done = apphost_("app:app", PWD=str(gone))
    assert done.code == ExitCode.USAGE
    assert "apphost: error: the current directory cannot be used: No such file or directory\n" in done.out


@pytest.mark.parametrize("this", [each for each in SETTINGS.values() if not each.argument], ids=lambda this: this.name)
def test_every_setting_has_its_option(this: Any) -> None:
    names = {name for each in cli.program.commands["run"].params for name in (*each.opts, *each.secondary_opts)}
    assert set(this.spellings) <= names


def test_all_commands_take_the_settings_and_config() -> None:
    for command in cli.program.commands.values():
        assert {*SETTINGS, "config"} <= {parameter.name for parameter in command.params}


# Errors


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["-w", "0", "app:app"], "bad value '0' for workers, on the command line (-w, --workers): expected a whole"),
        (["--wrokers", "2", "app:app"], "No such option"),
        (["app:app", "other:app"], "Got unexpected extra argument (other:app)"),
        (["app:app", "--keep-alive"], "Option '--keep-alive' requires an argument"),
        (["app:app", "--config", "x.toml"], "the settings file "),
        (["my-app:app"], "bad value 'my-app:app' for app, on the command line (APP): expected module:attribute"),
        (["app:make()"], "app = 'app:make()' (command line) is a call, so add --factory"),
        (["config", "-w", "x"], "bad value 'x' for workers"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_usage_errors_are_one_line(apphost_: Program, arbiter: Arbiter, args: list[str], message: str) -> None:
    done = apphost_(*args)
    assert done.code == ExitCode.USAGE
    assert done.out.startswith(f"apphost: error: {message}")
    assert done.out.count("\n") == 1
    assert arbiter.calls == []


def test_an_error_of_the_settings_file(apphost_: Program, site: pathlib.Path) -> None:
    (site / "pyproject.toml").write_text("[tool.apphost]\nwokers = 2\n")
    path = site / "pyproject.toml"
    expected = f"apphost: error: unknown setting 'wokers' in {path}. Did you mean 'workers'?\n"
    assert apphost_("config") == Done(ExitCode.USAGE, expected)


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (AddressError("cannot listen on 127.0.0.1:80"), 4, "apphost: error: cannot listen on 127.0.0.1:80\n"),
        (ApplicationError("no", "Traceback\n  x"), 3, "apphost: error: no\n\nTraceback\n  x\n"),
        (ApphostError("broken"), 1, "apphost: error: broken\n"),
    ],
)
def test_errors_from_the_arbiter(
    apphost_: Program, arbiter: Arbiter, error: ApphostError, code: int, text: str
) -> None:
    arbiter.raises = error
    assert apphost_("app:app") == Done(code, text)


def test_an_interrupt_is_quiet(apphost_: Program, arbiter: Arbiter) -> None:
    arbiter.raises = KeyboardInterrupt()
    done = apphost_("app:app")
    assert (done.code, done.out.strip()) == (130, "")


def test_a_misspelt_variable_is_told(apphost_: Program, arbiter: Arbiter) -> None:
    done = apphost_("app:app", APPHOST_WORKER="4")
    warning = "environment variable APPHOST_WORKER is not a setting. Did you mean APPHOST_WORKERS?"
    assert done == Done(0, f"apphost: warning: {warning}\n")
    assert len(arbiter.calls) == 1


# config, help, version


def test_config_shows_values_and_origins(apphost_: Program, site: pathlib.Path) -> None:
    (site / "apphost.toml").write_text("keep_alive = '2m'\numask = '027'\n")
    done = apphost_("config", "app:app", "-b", "127.0.0.1:1", "--no-server-header", WEB_CONCURRENCY="3")
    assert done.code == 0
    lines = done.out.splitlines()
    shown = {line.split("  ", 1)[0]: line for line in lines}
    assert list(shown) == list(SETTINGS)
    cells = {name: [cell.strip() for cell in line.split("  ") if cell.strip()] for name, line in shown.items()}
    assert cells["app"] == ["app", "app:app", "command line"]
    assert cells["bind"] == ["bind", "127.0.0.1:1", "command line"]
    assert cells["workers"] == ["workers", "3", "environment WEB_CONCURRENCY"]
    assert cells["keep_alive"] == ["keep_alive", "120 s", f"file {site / 'apphost.toml'}"]
    assert cells["umask"][:2] == ["umask", "027"]
    assert cells["server_header"][:2] == ["server_header", "false"]
    assert cells["pidfile"] == ["pidfile", "default"]
    assert len({line.index(cells[name][-1]) for name, line in shown.items()}) == 1  # the columns are aligned


def test_config_as_json(apphost_: Program) -> None:
    done = apphost_("config", "--json", "-w", "2")
    shown = json.loads(done.out)
    assert list(shown) == list(SETTINGS)
    assert shown["workers"] == {"value": 2, "origin": "command line"}
    assert shown["bind"] == {"value": ["127.0.0.1:8000"], "origin": "default"}


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_of_the_program(apphost_: Program, flag: str) -> None:
    done = apphost_(flag)
    assert done.code == 0
    for word in ("Usage: apphost [COMMAND] [OPTIONS] [APP]", "check", "config", "--bind", "--workers", "--version"):
        assert word in done.out
    assert "--limit-trailers" not in done.out
    assert "apphost run --help" in done.out


@pytest.mark.parametrize("args", [["run", "-h"], ["-w", "2", "--help"], ["check", "--help"], ["config", "-h"]], ids=str)
def test_help_of_a_command_has_every_group_and_option(apphost_: Program, args: list[str]) -> None:
    done = apphost_(*args)
    assert done.code == 0
    for this in SETTINGS.values():
        assert f"\n{this.heading}:\n" in done.out
        assert all(spelling in done.out for spelling in this.spellings)
    assert "`" not in done.out.replace("`apphost", "")


def test_version(apphost_: Program) -> None:
    assert apphost_("--version") == Done(0, f"apphost {apphost.__version__}\n")


def test_completion_offers_commands(site: pathlib.Path) -> None:
    context = cli.program.make_context("apphost", [], resilient_parsing=True)
    assert isinstance(context.command, click.Group)
    assert {item.value for item in context.command.shell_complete(context, "")} >= {"run", "check", "config"}


# Real processes


def program(*args: str, cwd: pathlib.Path) -> subprocess.CompletedProcess[str]:
    root = str(pathlib.Path(apphost.__file__).parent.parent)
    environ = {"PATH": os.environ["PATH"], "PYTHONPATH": root, "PWD": str(cwd)}
    return subprocess.run(
        [sys.executable, "-m", "apphost", *args], capture_output=True, text=True, cwd=cwd, env=environ, timeout=30
    )


def test_results_on_stdout_and_errors_on_stderr(tmp_path: pathlib.Path) -> None:
    (tmp_path / "apphost.toml").write_text("workers = 2\n")
    done = program("config", "--json", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["workers"] == {"value": 2, "origin": f"file {tmp_path / 'apphost.toml'}"}
    done = program("--workers", "none", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("apphost: error: bad value 'none' for workers")


def test_the_command_line_imports_no_protocol_code(tmp_path: pathlib.Path) -> None:
    code = (
        "import sys, apphost.cli;"
        "print(sorted({'asyncio', 'h11', 'httptools', 'uvloop', 'wsproto', 'ssl', 'tomllib'} & set(sys.modules)))"
    )
    root = pathlib.Path(apphost.__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout == "[]\n"
