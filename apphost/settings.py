"""The settings: each one is a field of `Settings`, and everything else follows from the field.

From name, type, default and what `setting()` adds come the command line option, the `APPHOST_*` variable, the key in
`apphost.toml` or `[tool.apphost]` of pyproject.toml, the checks, the error texts and the table in the documents.

    command line > environment APPHOST_X > conventional variable (PORT, WEB_CONCURRENCY) > settings file > default

`load` reads the file and calls `resolve`, which is pure. Every failure is a `SettingsError` that names the setting, the
value, the place it came from, what is allowed, and the nearest known name. This module imports nothing that a process
without application code should not have; `python -m apphost.settings --write FILE...` renews the table in documents.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from apphost.checks import clean_app, clean_bind, clean_probe, clean_root_path, usable_cpus
from apphost.errors import SettingsError, nearest
from apphost.values import KINDS, Setting

T = TypeVar("T")

ENV_PREFIX = "APPHOST_"
CONFIG_VARIABLE = "APPHOST_CONFIG"
# Set by an arbiter for the program that it replaces itself with: the descriptor with its state, and behind it `?` when
# the program is only to be tried.
RESUME_VARIABLE = "APPHOST_RESUME"
_WEEK = 7 * 86400.0  # no deadline of a server is longer: such a number is milliseconds taken for seconds


def setting(default: T, heading: str, does: str, **about: Any) -> T:
    """A field of `Settings`; `about` fills the other attributes of `Setting`."""
    result: T = dataclasses.field(default=default, metadata={"heading": heading, "does": does, **about})
    return result


_MAIN, _APP, _PROCESS = "Main settings", "Application", "Process"
_TIME, _RECYCLE, _LIMITS, _HTTP, _LOGS = "Timeouts", "Recycling of workers", "Limits", "HTTP", "Logs"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """All settings of one run. Durations are seconds, sizes bytes. Immutable; made by `load` or `from_wire`."""

    # Unformatted, so that a field stays two or three short lines.
    # fmt: off
    app: str = setting("", _MAIN,
        "What to serve: `module:attribute`, `module:factory` with `factory`, or a module alone.",
        clean=clean_app, argument="APP")
    bind: tuple[str, ...] = setting(("127.0.0.1:8000",), _MAIN,
        "Where to listen: `HOST:PORT`, `[IPV6]:PORT`, `unix:PATH`; can be repeated.",
        short="-b", separator=",", clean=clean_bind, reloadable=False, metavar="ADDRESS",
        convention=("PORT", lambda port: [f"0.0.0.0:{port}"]))
    workers: int = setting(1, _MAIN,
        "Worker processes; `auto` is one for each CPU that the container may use.",
        short="-w", low=1, high=1024, words={"auto": usable_cpus}, convention=("WEB_CONCURRENCY", str))
    threads: int = setting(4, _MAIN, "Threads that run a WSGI application, in each worker.", low=1, high=1024)
    factory: bool = setting(False, _MAIN, "`app` names a function that makes the application.")
    chdir: str = setting("", _MAIN,
        "Directory to change to before loading; unless it is set in the settings file, that is looked up there too.",
        metavar="DIR")

    interface: str = setting("auto", _APP,
        "How the application is called; `auto` finds out.",
        choices=("auto", "asgi", "wsgi"), plugins="apphost.interfaces")
    lifespan: str = setting("auto", _APP,
        "ASGI lifespan; with `auto` an application without it is served too.", choices=("auto", "on", "off"))
    root_path: str = setting("", _APP,
        "Path below which the application is mounted (ASGI `root_path`, WSGI `SCRIPT_NAME`).",
        clean=clean_root_path, metavar="PATH")
    preload: bool = setting(False, _APP,
        "Import the application once for each generation and fork its workers from there: they share its memory.")
    ready_probe: str = setting("", _APP,
        "A worker is ready only when it has answered a GET of this path below 500; empty is off.",
        clean=clean_probe, metavar="PATH")
    pythonpath: tuple[str, ...] = setting((), _APP,
        f"Directories put in front of `sys.path`, separated by `{os.pathsep}`.", separator=os.pathsep, metavar="DIRS")

    pidfile: str = setting("", _PROCESS, "File for the pid of the arbiter.", reloadable=False, metavar="FILE")
    backlog: int = setting(2048, _PROCESS,
        "Connections that may wait to be accepted; the kernel caps it at `net.core.somaxconn`.",
        low=1, high=65535, reloadable=False)
    umask: int | None = setting(None, _PROCESS,
        "Permission bits taken from new files, in octal, such as `022`; in a settings file as text.",
        low=0, high=0o777, reloadable=False)
    user: str = setting("", _PROCESS, "User of the workers, a name or number.", reloadable=False, metavar="USER")
    group: str = setting("", _PROCESS, "Group of the workers, a name or number.", reloadable=False, metavar="GROUP")
    proc_name: str = setting("", _PROCESS,
        "Name in `ps` instead of `apphost`, with `apphost[proctitle]` installed.", reloadable=False, metavar="NAME")

    # A proxy in front commonly closes after 60 s; when it is not the first to close, it loses a request in the race.
    keep_alive: float = setting(75.0, _TIME,
        "An idle connection is closed after this; take more than the idle time of a proxy in front.",
        unit="s", low=0, high=_WEEK)
    request_header_timeout: float = setting(15.0, _TIME,
        "The head of a request must be complete within this, from its first byte.", unit="s", low=0.01, high=_WEEK)
    request_body_timeout: float = setting(30.0, _TIME,
        "A request body may stall, with no byte arriving, for this long.", unit="s", low=0.01, high=_WEEK)
    write_timeout: float = setting(60.0, _TIME,
        "A client may stop reading its response for this long.", unit="s", low=0.01, high=_WEEK)
    graceful_timeout: float = setting(30.0, _TIME,
        "A worker that is being replaced may finish its requests for this long.", unit="s", low=0, high=_WEEK)
    # `docker stop` kills after 10 s.
    stop_timeout: float = setting(8.0, _TIME,
        "The whole stop takes no longer; take less than the container runtime waits before it kills.",
        unit="s", low=0, high=_WEEK)
    boot_timeout: float = setting(60.0, _TIME,
        "A worker must be ready within this, with the application imported and started.",
        unit="s", low=0.01, high=_WEEK)
    timeout: float = setting(30.0, _TIME,
        "A worker whose event loop is blocked for this long is killed and replaced; 0 is never.",
        unit="s", low=0, high=_WEEK)

    shutdown_delay: float = setting(0.0, _TIME,
        "After the order to stop, serve on for this long first, for a balancer that needs time to notice.",
        unit="s", low=0, high=_WEEK)
    canary: float = setting(0.0, _TIME,
        "The first worker of new code serves alone of its kind for this long, and is judged by it; 0 is off.",
        unit="s", low=0, high=_WEEK)

    max_requests: int = setting(0, _RECYCLE, "Replace a worker after this many requests; 0 is never.", low=0)
    max_requests_jitter: int = setting(0, _RECYCLE,
        "A random number up to this is added to `max_requests`, so that workers do not retire together.", low=0)
    max_rss: int = setting(0, _RECYCLE,
        "Replace a worker whose memory (RSS) has grown beyond this; 0 is never.", unit="bytes", low=0)
    max_lifetime: float = setting(0.0, _RECYCLE,
        "Replace a worker of this age; 0 is never.", unit="s", low=0, high=_WEEK)
    max_lifetime_jitter: float = setting(0.0, _RECYCLE,
        "A random time up to this is added to `max_lifetime`.", unit="s", low=0, high=_WEEK)

    # 8190 is Apache's LimitRequestLine and LimitRequestFieldSize; RFC 9112 section 3 asks for a line of 8000 or more.
    # 100 fields are Apache's LimitRequestFields. A longer field or more of them is answered 431 (RFC 6585 section 5).
    limit_request_line: int = setting(8190, _LIMITS, "Longest request line.", unit="bytes", low=64, high=2**20)
    limit_request_fields: int = setting(100, _LIMITS, "Most header fields in a request.", low=1, high=32768)
    limit_request_field_size: int = setting(8190, _LIMITS,
        "Longest header field, name and value.", unit="bytes", low=64, high=2**20)
    limit_request_head: int = setting(65536, _LIMITS,
        "Largest head of a request, request line and all fields.", unit="bytes", low=64, high=2**24)
    limit_request_body: int = setting(0, _LIMITS, "Largest request body; 0 is no limit.", unit="bytes", low=0)
    limit_chunk_extension: int = setting(256, _LIMITS,
        "Longest extension of one chunk of a body.", unit="bytes", low=0, high=2**16)
    limit_trailers: int = setting(8192, _LIMITS,
        "Largest trailer section after a chunked body.", unit="bytes", low=0, high=2**20)
    limit_connections: int = setting(10000, _LIMITS,
        "Connections that one worker holds; more wait in the backlog.", low=1, high=2**20)

    http: str = setting("auto", _HTTP,
        "HTTP/1.1 parser; `auto` takes httptools when it is installed.",
        choices=("auto", "h11", "httptools"), plugins="apphost.parsers")
    loop: str = setting("auto", _HTTP,
        "Event loop; `auto` takes uvloop when it is installed.", choices=("auto", "asyncio", "uvloop"))
    underscore_headers: str = setting("drop", _HTTP,
        "What to do with `_` in a header name, which a WSGI application cannot tell from `-`.",
        choices=("drop", "refuse", "allow"))
    server_header: bool = setting(True, _HTTP, "Send the header `Server`.")
    date_header: bool = setting(True, _HTTP, "Send the header `Date`.")

    access_log: str = setting("", _LOGS, "One line for each request to this file; `-` is stdout.", metavar="FILE")
    log_level: str = setting("info", _LOGS,
        "Least level that is logged.", choices=("debug", "info", "warning", "error"))
    log_format: str = setting("text", _LOGS, "Lines for people or for machines.", choices=("text", "json"))
    # fmt: on

    def to_wire(self) -> dict[str, Any]:
        """A JSON-safe dict of all settings, for another process."""
        values = {name: getattr(self, name) for name in SETTINGS}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> Settings:
        """The reverse of `to_wire`. As versions may differ, unknown keys are ignored and missing ones default."""
        known = ((name, value) for name, value in wire.items() if name in SETTINGS)
        values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in known}
        return cls(**values)


SETTINGS: Mapping[str, Setting] = {
    field.name: Setting(
        name=field.name,
        default=field.default,
        kind=KINDS[str(field.type), field.metadata.get("unit", "")],
        **field.metadata,
    )
    for field in dataclasses.fields(Settings)
}


@dataclass(frozen=True, slots=True)
class Loaded:
    """Settings and their origins: `default`, `command line`, `environment PORT`, `file /srv/apphost.toml`."""

    settings: Settings
    origins: Mapping[str, str]
    warnings: tuple[str, ...] = ()  # what is probably a slip, and not worth refusing to start
    file: str = ""  # the settings file that was read


@dataclass(frozen=True, slots=True)
class Source:
    """How to load the settings once more, also in another process: what the command line said, and where.

    `cli` has the values that were really given, as text, lists of text or flags. `config` is the `--config` path.
    `cwd` is the directory as the user named it, with symlinks: when one is switched, the next load follows it.
    """

    cli: Mapping[str, object]
    config: str | None
    cwd: str

    def load(self, environ: Mapping[str, str]) -> Loaded:
        return load(self.cli, environ, self.config, self.cwd)

    def to_wire(self) -> dict[str, Any]:
        return {"cli": dict(self.cli), "config": self.config, "cwd": self.cwd}

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> Source:
        return cls(cli=wire["cli"], config=wire["config"], cwd=wire["cwd"])


class _Given(NamedTuple):
    """A value as it was given, and by whom."""

    raw: object
    origin: str  # for `apphost config`
    where: str  # for an error
    typed: bool  # from a settings file, which has types


class _Relation(NamedTuple):
    """Something that must hold between two settings."""

    first: str
    second: str
    holds: Callable[[Any, Any], bool]
    rule: str  # {0} and {1} become `name = value (origin)`


_RELATIONS = (
    _Relation("limit_request_line", "limit_request_head", lambda line, head: line <= head, "{0} is larger than {1}"),
    _Relation(
        "limit_request_field_size", "limit_request_head", lambda size, head: size <= head, "{0} is larger than {1}"
    ),
    _Relation(
        "app", "factory", lambda app, factory: factory or not app.endswith("()"),
        "{0} is a call, so add --factory, or name the application itself; now {1}",
    ),
)  # fmt: skip


def load(cli: Mapping[str, object], environ: Mapping[str, str], config: str | None, cwd: str) -> Loaded:
    """Find and read the settings file, then `resolve`.

    The file is `config`, else the one that APPHOST_CONFIG names, else `apphost.toml`, else a `pyproject.toml` that has
    `[tool.apphost]`. Relative paths start at `cwd`. SettingsError for anything that is wrong.
    """
    named_by = "--config" if config else CONFIG_VARIABLE
    named = config or environ.get(CONFIG_VARIABLE)
    if named:
        path = os.path.join(cwd, named)
        text = _read(path)
        if text is None:
            raise SettingsError(f"the settings file {path}, named by {named_by}, does not exist")
        table = parse_file(text, path)
        if table is None:
            raise SettingsError(f"{path}, named by {named_by}, has no [tool.apphost] table")
        return resolve(cli, environ, table, path)
    for path in candidates(cli, environ, cwd):
        text = _read(path)
        table = None if text is None else parse_file(text, path)
        if table is not None:
            return resolve(cli, environ, table, path)
    return resolve(cli, environ)


def candidates(cli: Mapping[str, object], environ: Mapping[str, str], cwd: str) -> tuple[str, ...]:
    """Where a settings file that nobody named may be, best first: in `chdir` when that is given outside of the file."""
    chdir = SETTINGS["chdir"]
    given = next(_givens(chdir, cli, environ), None)
    directory = os.path.join(cwd, _convert(chdir, given)) if given else cwd
    return os.path.join(directory, "apphost.toml"), os.path.join(directory, "pyproject.toml")


def _read(path: str) -> str | None:
    """The text of a file, None when it does not exist. SettingsError when it cannot be read."""
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except (FileNotFoundError, NotADirectoryError):
        if os.path.islink(path):  # a deploy in between, perhaps: the defaults would be a surprise
            raise SettingsError(f"the settings file {path} is a link to a file that does not exist") from None
        return None
    except OSError as exc:
        raise SettingsError(f"cannot read the settings file {path}: {exc.strerror}") from None
    except ValueError as exc:
        raise SettingsError(f"the settings file {path} is not UTF-8: {exc}") from None


def parse_file(text: str, path: str) -> Mapping[str, Any] | None:
    """The table of settings in a TOML text; None when it is a pyproject.toml that has nothing for us."""
    is_project = os.path.basename(path) == "pyproject.toml"
    if is_project and "apphost" not in text:  # most projects: do not spend time on the parser
        return None
    loads = _toml_parser()
    if loads is None:
        if is_project and "[tool.apphost" not in text:
            return None
        raise SettingsError(f"reading {path} needs the TOML parser tomli on this Python: pip install 'apphost[toml]'")
    try:
        document = loads(text)
    except ValueError as exc:
        raise SettingsError(f"{path} is not valid TOML: {exc}") from None
    if not is_project:
        return document
    tools = document.get("tool")
    table = tools.get("apphost") if isinstance(tools, dict) else None
    if table is not None and not isinstance(table, dict):
        raise SettingsError(f"tool.apphost in {path} must be a table")
    return table


def _toml_parser() -> Callable[[str], dict[str, Any]] | None:
    """`tomllib.loads`, or that of tomli before Python 3.11; None without either."""
    try:
        if sys.version_info >= (3, 11):
            import tomllib
        else:
            import tomli as tomllib
    except ImportError:
        return None
    loads: Callable[[str], dict[str, Any]] = tomllib.loads
    return loads


def resolve(
    cli: Mapping[str, object], environ: Mapping[str, str], table: Mapping[str, Any] | None = None, file: str = ""
) -> Loaded:
    """Settle every setting from the given sources; `table` is the content of the settings file `file`. Pure.

    A value of the file is checked also where another source wins: it would bite on the day that one goes away.
    """
    entries = _file_entries(table or {}, file)
    for name in cli:
        if name not in SETTINGS:
            raise SettingsError(f"unknown setting {name!r} on the command line.{nearest(name, SETTINGS)}")
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for name, this in SETTINGS.items():
        values[name], origins[name] = this.default, "default"
        for rank, given in enumerate(_givens(this, cli, environ, entries.get(name))):
            if rank == 0:
                values[name], origins[name] = _convert(this, given), given.origin
            elif given.typed:
                _convert(this, given)
    for first, second, holds, rule in _RELATIONS:
        if not holds(values[first], values[second]):
            told = (f"{name} = {values[name]!r} ({origins[name]})" for name in (first, second))
            raise SettingsError(rule.format(*told))
    values["app"] = values["app"].removesuffix("()")  # with `factory`, the call is said twice
    return Loaded(Settings(**values), origins, tuple(_slips(environ)), file)


def _file_entries(table: Mapping[str, Any], file: str) -> dict[str, _Given]:
    """The values of a settings file by the name of their setting; a key may have dashes."""
    entries: dict[str, _Given] = {}
    for key, value in table.items():
        name = key.replace("-", "_")
        if name not in SETTINGS:
            raise SettingsError(f"unknown setting {key!r} in {file}.{nearest(name, SETTINGS)}")
        if name in entries:
            raise SettingsError(f"{name} is set twice in {file}, with dashes and with underscores")
        entries[name] = _Given(value, f"file {file}", f"in {file} (key {key})", typed=True)
    return entries


def _givens(
    this: Setting, cli: Mapping[str, object], environ: Mapping[str, str], entry: _Given | None = None
) -> Iterator[_Given]:
    """What the sources say about one setting, best first: here is the precedence. An empty variable counts as unset."""
    if this.name in cli:
        raw = cli[this.name]
        if this.is_list and isinstance(raw, (list, tuple)):  # a repeated option is one text with separators
            raw = this.separator.join(map(str, raw))
        said = ", ".join(this.spellings)
        yield _Given(raw, "command line", f"on the command line ({said})", typed=False)
    variable = ENV_PREFIX + this.name.upper()
    if environ.get(variable):
        yield _Given(environ[variable], f"environment {variable}", f"in environment variable {variable}", typed=False)
    variable, meaning = this.convention
    if environ.get(variable):
        where = f"in environment variable {variable}"
        yield _Given(meaning(environ[variable]), f"environment {variable}", where, typed=this.is_list)
    if entry is not None:
        yield entry


def _convert(this: Setting, given: _Given) -> Any:
    try:
        return this.convert(given.raw, typed=given.typed)
    except ValueError as exc:
        shown = repr(given.raw)
        shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
        raise SettingsError(f"bad value {shown} for {this.name}, {given.where}: {exc}") from None


# Kubernetes gives every pod such variables for each service: one called `apphost` makes APPHOST_SERVICE_HOST and more.
_OF_KUBERNETES = re.compile(r"(.*_)?(SERVICE_HOST|SERVICE_PORT(_.*)?|PORT(_\d+_(TCP|UDP|SCTP)(_(ADDR|PORT|PROTO))?)?)")


def _slips(environ: Mapping[str, str]) -> Iterator[str]:
    """A line for each APPHOST_* variable that is no setting but nearly one. Others belong to somebody else."""
    known = {*SETTINGS, CONFIG_VARIABLE.removeprefix(ENV_PREFIX).lower()}
    for variable in sorted(environ):
        rest = variable.removeprefix(ENV_PREFIX)
        if rest == variable or rest.lower() in known or _OF_KUBERNETES.fullmatch(rest):
            continue
        name = difflib.get_close_matches(rest.lower(), known, n=1, cutoff=0.8)
        if name:
            yield f"environment variable {variable} is not a setting. Did you mean {ENV_PREFIX}{name[0].upper()}?"


def restart_needed(old: Settings, new: Settings) -> tuple[str, ...]:
    """Names of the settings that differ and that a reload cannot change."""
    return tuple(
        name for name, this in SETTINGS.items() if not this.reloadable and getattr(old, name) != getattr(new, name)
    )


BEGIN, END = "<!-- settings:begin -->", "<!-- settings:end -->"


def settings_table() -> str:
    """All settings as Markdown, a table for each group."""
    lines: list[str] = []
    for heading in dict.fromkeys(this.heading for this in SETTINGS.values()):
        lines += [f"**{heading}**", "", "| Setting | Command line | Variable | Default | What it does |"]
        lines += ["|---|---|---|---|---|"]
        lines += [_row(this) for this in SETTINGS.values() if this.heading == heading] + [""]
    return "\n".join(lines)


def _row(this: Setting) -> str:
    variables = [ENV_PREFIX + this.name.upper(), *filter(None, this.convention[:1])]
    default = this.show(this.default)
    cells = (
        f"`{this.name}`",
        ", ".join(f"`{text}`" for text in this.spellings),
        ", ".join(f"`{variable}`" for variable in variables),
        f"`{default}`" if default else "",
        this.describe(choices=True).replace("|", "\\|"),
    )
    return f"| {' | '.join(cells)} |"


def renew(document: str) -> str:
    """`document` with the current table between its markers. ValueError when it does not have them."""
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"no {BEGIN} ... {END}")
    return f"{before}{BEGIN}\n\n{settings_table()}\n{END}{after}"


def _write(paths: list[str]) -> None:
    for path in paths:
        with open(path, encoding="utf-8") as file:
            document = file.read()
        with open(path, "w", encoding="utf-8") as file:
            file.write(renew(document))


if __name__ == "__main__":
    if sys.argv[1:2] != ["--write"] or len(sys.argv) < 3:
        raise SystemExit("usage: python -m apphost.settings --write FILE...")
    _write(sys.argv[2:])
