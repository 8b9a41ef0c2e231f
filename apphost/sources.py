"""Where settings come from: the command line, the environment, a settings file, and which of them wins.

    command line > environment APPHOST_X > conventional variable (PORT, WEB_CONCURRENCY) > settings file > default

`load` reads the file and calls `resolve`, which is pure. Every failure is a `SettingsError` that names the setting, the
value, the place it came from, what is allowed, and the nearest known name.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from apphost.errors import SettingsError, nearest
from apphost.settings import CONFIG_VARIABLE, DEVELOPMENT_DEFAULTS, ENV_PREFIX, SETTINGS, Settings
from apphost.values import Setting


@dataclass(frozen=True, slots=True)
class Loaded:
    """Settings and their origins: `default`, `command line`, `environment PORT`, `file /srv/apphost.toml`, and
    `default with reload` where development mode has a default of its own."""

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

    def files(self, environ: Mapping[str, str]) -> tuple[str, ...]:
        """Where the settings file is or, unless it is named, may be."""
        named = self.config or environ.get(CONFIG_VARIABLE)
        return (os.path.join(self.cwd, named),) if named else candidates(self.cli, environ, self.cwd)

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
    _Relation(
        "bind", "tls_certfile", lambda bind, files: bool(files) or not any(each.startswith("https:") for each in bind),
        "{0} asks for TLS, which needs a certificate; now {1}",
    ),
    _Relation(
        "tls_keyfile", "tls_certfile", lambda keys, files: not keys or len(keys) == len(files),
        "{0} must be one file for each of {1}",
    ),
    _Relation(
        "tls_client_certs", "tls_certfile", lambda asked, files: asked == "none" or bool(files),
        "{0} needs TLS, with a certificate of the server's own; now {1}",
    ),
    _Relation(
        "tls_client_certs", "tls_ca_certs", lambda asked, ca: asked == "none" or bool(ca),
        "{0} needs the certificates of the CA that has signed those of the clients; now {1}",
    ),
    _Relation(
        "tls_ca_certs", "tls_client_certs", lambda ca, asked: not ca or asked != "none",
        "{0} would check nobody, since no client is asked for a certificate; now {1}",
    ),
    _Relation(
        "proxy_protocol", "trusted_proxies", lambda on, trusted: trusted or not on,
        "{0} says that proxies announce their clients, but no proxy is trusted: {1}",
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
    loads = toml_parser()
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


def toml_parser() -> Callable[[str], dict[str, Any]] | None:
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
    if values["reload"]:
        for name, value in DEVELOPMENT_DEFAULTS.items():
            if origins[name] == "default":
                values[name], origins[name] = value, "default with reload"
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
