"""The documents say what the program does: tables, options, links, snippets. (Settings tables: test_settings.)"""

from __future__ import annotations

import configparser
import json
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from apphost.access import FIELDS
from apphost.arbiter import vocabulary as v
from apphost.arbiter.arbiter import _SIGNALS
from apphost.arbiter.control import _COMMANDS as REQUESTS
from apphost.cli import program
from apphost.errors import ExitCode
from apphost.operate.commands import COMMANDS
from apphost.settings import BEGIN, CONFIG_VARIABLE, DEVELOPMENT_DEFAULTS, ENV_PREFIX, SETTINGS
from apphost.sources import parse_file, resolve
from tests.corpus import load_all

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
GUIDES = {
    path.name: path
    for path in [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").glob("*.md"))]
}
ALL = [
    path
    for path in sorted(ROOT.rglob("*.md"))
    if not any(part.startswith(".") for part in path.relative_to(ROOT).parts) and "site-packages" not in path.parts
]
OPTIONS = {
    name
    for command in (program, *program.commands.values(), *COMMANDS.values())
    for parameter in command.params
    for name in (*parameter.opts, *parameter.secondary_opts)
} | {"--help", "-h"}
# Options of other programs, by document.
FOREIGN = {
    "README.md": {
        "--no-deps", "--no-cache-dir",
        "--host", "--port", "--uds", "--fd", "--timeout-worker-healthcheck", "--timeout-graceful-shutdown",
        "--timeout-keep-alive", "--access-logfile", "--certfile", "--keyfile", "--forwarded-allow-ips",
        "--ssl-certfile", "--ssl-keyfile", "--proxy-headers", "--ws-max-size", "--thorough",
    },
    "deploy.md": {"--no-deps", "--no-cache-dir", "--fdname"},
    "architecture.md": {"--cases", "--jobs", "--seed", "--case"},
    "settings.md": {"--write", "--name", "--no-name"},
    "tls.md": {"--webroot", "--deploy-hook"},
}  # fmt: skip
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9_-]*[a-z0-9]")
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


def between(text: str, name: str) -> str:
    match = re.search(f"<!-- {name}:begin -->\n(.*)<!-- {name}:end -->", text, re.DOTALL)
    assert match, f"no {name} markers"
    return match[1]


def rows(table: str) -> list[list[str]]:
    """The cells of a Markdown table, without its two head lines."""
    lines = [line for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


def snippets(path: Path, language: str) -> list[str]:
    return [match[3] for match in FENCE.finditer(path.read_text(encoding="utf-8")) if match[2] == language]


def each_snippet(language: str) -> list[object]:
    return [
        pytest.param(text, id=f"{name}-{number}")
        for name, path in GUIDES.items()
        for number, text in enumerate(snippets(path, language))
    ]


def prose(path: Path) -> str:
    """A document without what other servers call their options: the first column of the migration tables."""
    text = path.read_text(encoding="utf-8")
    if path.name == "migrating.md":
        text = re.sub(r"^\| [^|]+ \|", "|", text, flags=re.MULTILINE)
    return text


# Tables


def test_the_settings_are_in_the_readme() -> None:
    assert BEGIN in README


def test_exit_codes() -> None:
    table = rows(between(README, "exit-codes"))
    assert [(code, name) for code, name, _ in table] == [(str(int(code)), f"`{code.name}`") for code in ExitCode]
    assert all(len(when) > 10 for _, _, when in table)


def test_development_defaults() -> None:
    table = rows(between((ROOT / "docs" / "development.md").read_text(encoding="utf-8"), "development"))
    shown = {name: SETTINGS[name].show(value) for name, value in DEVELOPMENT_DEFAULTS.items()}
    assert {name.strip("`"): value.strip("`") for name, value, _ in table} == shown


def test_signals() -> None:
    """Each signal that the arbiter obeys has its row, with the word for what it does, and so has USR2."""
    words = {
        v.ReloadAsked(): "reload",
        v.StopAsked(): "graceful stop",
        v.StopAsked(now=True): "stop at once",
        v.ScaleAsked(+1): "one more worker",
        v.ScaleAsked(-1): "one worker fewer",
    }
    table = {signal.strip("`"): effect.lower() for signal, effect in rows(between(README, "signals"))}
    expected = {number.name.removeprefix("SIG"): words[event] for number, event in _SIGNALS.items()}
    assert table.pop("USR2").startswith("upgrade")
    assert table.keys() == expected.keys()
    for signal, effect in table.items():
        assert effect.startswith(expected[signal]), signal


def test_every_promise_is_tested() -> None:
    """In files that exist, have tests, and are not all the same."""
    table = rows(between((ROOT / "SECURITY.md").read_text(encoding="utf-8"), "promises"))
    assert len(table) > 10
    named = set()
    for promise, tests in table:
        files = re.findall(r"`(tests/[^`]+)`", tests)
        assert files, promise
        assert tests == ", ".join(f"`{file}`" for file in files)
        for file in files:
            assert re.search(r"^def test_", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE), file
        named |= set(files)
    assert len(named) > 10


def test_settings_named_in_the_security_policy() -> None:
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    names = set(re.findall(r"`([a-z]+(?:_[a-z]+)+)(?: = [^`]*)?`", text)) - {"no_new_privs"}
    assert names
    assert names <= set(SETTINGS)


def columns(name: str, document: str) -> list[list[str]]:
    """The cells of a table, also such as are empty."""
    table = between((ROOT / "docs" / document).read_text(encoding="utf-8"), name)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:] if line]


def test_the_security_history_names_its_tests() -> None:
    """S4: each row has a test that exists, and the corpus cases that it names; nothing that those cover is left out."""
    covered = {item for case in load_all() for item in case.covers}
    named: set[str] = set()
    for where, _, cases, tests in columns("security", "conformance.md"):
        tags = {tag.strip() for tag in cases.split(",") if tag.strip()}
        assert tags <= covered, where
        named |= tags
        found = re.findall(r"`([\w/]+\.py)::(\w+)`", tests)
        assert found or tests.startswith("none: "), where
        for file, test in found:
            assert re.search(rf"^def {test}\(", (ROOT / "tests" / file).read_text(encoding="utf-8"), re.MULTILINE), test
    assert {tag for tag in covered if not re.fullmatch(r"[A-Z]\d+", tag)} == named


def test_fields_of_the_access_log() -> None:
    """Each field has its row, with what else it is called, and none that is not there."""
    told = [set(re.findall(r"`(\w+)`", name + also)) for name, also, _ in columns("fields", "logs.md")]
    known = {name for name in FIELDS if " " not in name}
    assert sum(map(len, told)) == len(known)
    assert set().union(*told) == known


def test_limits_and_deadlines() -> None:
    """The documented defaults are those of the settings, and no limit of a client is left out."""
    told = [row for name in ("limits", "deadlines") for row in columns(name, "limits.md")]
    for setting, default, *_ in told:
        this = SETTINGS[setting.strip("`")]
        assert default == this.show(this.default), setting
    text = (ROOT / "docs" / "limits.md").read_text(encoding="utf-8")
    for name in SETTINGS:
        if name.startswith("limit_") or name in ("backlog", "threads"):
            assert f"`{name}`" in text, name


def test_commands_and_requests() -> None:
    """docs/control.md has every command and every request with its arguments."""
    text = GUIDES["control.md"].read_text(encoding="utf-8")
    commands = [cells[0].strip("`").split()[1] for cells in rows(text.partition("## Which server")[0])]
    assert sorted(commands) == sorted(COMMANDS)
    requests = [json.loads(match) for match in re.findall(r'^\| `(\{"do".+?\})` \|', text, re.MULTILINE)]
    documented: dict[str, set[str]] = {}
    for request in requests:
        documented.setdefault(request.pop("do"), set()).update(request)
    assert documented == {name: set(arguments) for name, (_, arguments) in REQUESTS.items()}
    codes = re.findall(r"^\| (\d+) \|", text.partition("## Reload and its outcome")[2], re.MULTILINE)
    assert [int(code) for code in codes] == [0, *(int(code) for code in ExitCode if code >= ExitCode.UNREACHABLE)]


# Options, variables, settings


@pytest.mark.parametrize("path", GUIDES.values(), ids=list(GUIDES))
def test_every_option_exists(path: Path) -> None:
    assert set(OPTION.findall(prose(path))) - OPTIONS == FOREIGN.get(path.name, set())


@pytest.mark.parametrize("path", GUIDES.values(), ids=list(GUIDES))
def test_every_variable_exists(path: Path) -> None:
    known = {ENV_PREFIX + name.upper() for name in SETTINGS} | {CONFIG_VARIABLE, ENV_PREFIX}
    assert set(re.findall(rf"(?<!_){ENV_PREFIX}[A-Z_]*", path.read_text(encoding="utf-8"))) <= known


@pytest.mark.parametrize("text", each_snippet("toml"))
def test_settings_files(text: str) -> None:
    """TOML in a document is a settings file that would be accepted, or the entry points of a plug-in."""
    if "[project.entry-points" in text:
        groups = re.findall(r'^\[project\.entry-points\."(.*)"\]$', text, re.MULTILINE)
        declared = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        assert groups
        assert all(f'[project.entry-points."{group}"]' in declared for group in groups)
        return
    table = parse_file(text, "apphost.toml")
    assert table
    assert resolve({}, {}, table, "apphost.toml").settings.app


def test_the_table_of_timeouts() -> None:
    table = rows((ROOT / "docs" / "deploy.md").read_text(encoding="utf-8").partition("## Which time-out is which")[2])
    defaults = {name.strip("`"): default for name, default, _ in table}
    assert {name: SETTINGS[name].show(SETTINGS[name].default) for name in defaults} == defaults
    assert {name for name, this in SETTINGS.items() if this.heading == "Timeouts"} == set(defaults)


# Links


def anchors(path: Path) -> set[str]:
    """The fragments that a Markdown renderer makes of the headings."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(path: Path) -> Iterator[tuple[str, str]]:
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+:", target):
            file, _, fragment = target.partition("#")
            yield file, fragment


@pytest.mark.parametrize("path", ALL, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_resolve(path: Path) -> None:
    for file, fragment in links(path):
        target = path.parent / file if file else path
        assert target.exists(), file
        if fragment:
            assert fragment in anchors(target), f"{file}#{fragment}"


def test_every_document_is_linked() -> None:
    assert set(GUIDES) - {"README.md"} <= {Path(file).name for file, _ in links(ROOT / "README.md")}


# Commands


def marked_command(name: str) -> str:
    match = re.search(rf"<!-- command:{name} -->\n```sh\n(.+)\n```\n", README)
    assert match, f"no single command line marked {name}"
    return match[1]


@pytest.mark.parametrize("name", ["run", "test"])
def test_the_command_lines_of_the_readme(name: str) -> None:
    """Valid shell, from nothing but `python3`, with extras and folders that exist."""
    command = marked_command(name)
    subprocess.run(["bash", "-n", "-c", command], check=True)
    venv, install, start = (shlex.split(part) for part in command.split(" && "))
    assert venv == ["python3", "-m", "venv", ".venv"]
    assert install[0] == ".venv/bin/pip"
    extra = re.fullmatch(r"\.\[(\w+)\]", install[-1])
    assert extra
    assert f"\n{extra[1]} = [" in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    if name == "run":
        assert start[0] == ".venv/bin/apphost"
        folder = ROOT / start[start.index("--chdir") + 1]
        assert (folder / start[1].partition(":")[0]).with_suffix(".py").is_file()
    else:
        assert start == [".venv/bin/pytest"]


def test_ci_installs_and_runs_what_the_readme_says() -> None:
    script = ROOT / ".ci" / "run"
    subprocess.run(["bash", "-n", str(script)], check=True)
    text = script.read_text(encoding="utf-8")
    assert "-e '.[dev]'" in text
    assert "-e '.[dev]'" in marked_command("test")
    steps = re.findall(r"^step (.+)$", text, re.MULTILINE)
    assert steps[-1] == "pytest"
    assert {"ruff check .", "ruff format --check .", "mypy"} <= set(steps)
    assert script.stat().st_mode & 0o111


def served_commands() -> Iterator[object]:
    """Every command line in the documents that runs apphost."""
    for path in [*GUIDES.values(), ROOT / "examples" / "README.md"]:
        text = path.read_text(encoding="utf-8")
        lines = [line[2:] for code in snippets(path, "console") for line in code.splitlines() if line.startswith("$ ")]
        lines += re.findall(r"`((?:\S+/)?apphost [^`]+)`", text)
        lines += re.findall(r"^ExecStart=(.+)$", text, re.MULTILINE)
        for line in lines:
            for part in line.partition("  #")[0].split(" && "):
                words = shlex.split(part)
                start = next((at for at, word in enumerate(words) if word.rpartition("/")[2] == "apphost"), None)
                if start is not None and not part.startswith("systemd-"):
                    yield pytest.param(words[start + 1 :], id=f"{path.name}: {part}")


@pytest.mark.parametrize("words", list(served_commands()))
def test_apphost_commands_would_be_accepted(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The options exist and their values are allowed, as far as that can be told without the application."""
    if words[0] in COMMANDS:
        COMMANDS[words[0]].make_context("apphost", words[1:])
        return
    monkeypatch.setattr("apphost.values.entry_point_names", lambda _group: ("lines", "text"))  # of plugins.md
    named = words[0] if words[0] in program.commands else ""
    arguments = words[1:] if named else words[:]
    only_mentioned = named and not arguments
    context = program.commands[named or "run"].make_context("apphost", arguments)
    given = {name: value for name, value in context.params.items() if value and name in SETTINGS}
    cli = {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}
    assert cli.get("app") or named == "config" or only_mentioned
    resolve(cli, {})


# Snippets for other programs

UNIT = {
    "Unit": {"Description", "After"},
    "Service": {
        "Type", "User", "Group", "RuntimeDirectory", "UMask", "Environment", "ExecStart", "ExecReload", "KillMode",
        "WatchdogSec", "TimeoutStopSec", "Restart", "RestartSec", "RestartPreventExitStatus", "LimitNOFILE",
    },
    "Install": {"WantedBy"},
}  # fmt: skip


@pytest.mark.parametrize("text", each_snippet("ini"))
def test_systemd_units(text: str) -> None:
    unit = configparser.RawConfigParser(delimiters="=", strict=True)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read_string(text)
    for section in unit.sections():
        assert set(unit[section]) <= UNIT[section]
    service = unit["Service"]
    assert shlex.split(service["ExecStart"])[0].startswith("/")
    assert service["Type"] == "notify"
    assert service["ExecReload"] == "/bin/kill -USR1 $MAINPID"
    assert float(service["TimeoutStopSec"]) > SETTINGS["stop_timeout"].default
    codes = {int(code) for code in service.get("RestartPreventExitStatus", "2").split()}
    assert codes <= {int(code) for code in ExitCode} - {ExitCode.APPLICATION}


INSTRUCTIONS = {"FROM", "COPY", "RUN", "WORKDIR", "USER", "EXPOSE", "ENTRYPOINT", "CMD"}


@pytest.mark.parametrize("text", each_snippet("dockerfile"))
def test_dockerfiles(text: str) -> None:
    """Known instructions; apphost itself is PID 1, and its arguments would be accepted."""
    lines = [line.split(" ", 1) for line in text.splitlines() if line]
    assert {instruction for instruction, _ in lines} <= INSTRUCTIONS
    assert lines[0][0] == "FROM"
    last = dict(lines)
    start = json.loads(last["ENTRYPOINT"]) + json.loads(last["CMD"])
    assert start[0] == "apphost"
    bind, workers, app = start[2], start[4], start[5]
    assert start[1:5:2] == ["--bind", "--workers"]
    assert resolve({"bind": [bind], "workers": workers, "app": app}, {}).settings.bind == (f"0.0.0.0:{last['EXPOSE']}",)


@pytest.mark.parametrize("text", each_snippet("nginx"))
def test_nginx(text: str) -> None:
    """Statements and blocks are closed, and nginx lets idle connections go before apphost does, also in a reload."""
    assert text.count("{") == text.count("}")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    assert all(line.endswith(("{", "}", ";")) for line in lines)
    idle = re.search(r"keepalive_timeout (\d+)s;", text)
    assert idle
    assert int(idle[1]) < min(SETTINGS["keep_alive"].default, SETTINGS["graceful_timeout"].default)
