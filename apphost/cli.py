"""The command line. Its options follow from the fields of `Settings`; their values stay text until `sources.load`.

    apphost [run] APP      serve
    apphost check APP      load the application as a worker would, then exit
    apphost config [APP]   show each setting and where it came from
    apphost status ...     and the others of `OPERATE`: talk to a running server; see `apphost.operate`

Every error for the operator leaves as one paragraph on stderr, `apphost: error: ...`, with the exit code of its class.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import click
from click.core import ParameterSource

import apphost
from apphost.errors import ApphostError, ExitCode, SettingsError
from apphost.settings import CONFIG_VARIABLE, SETTINGS
from apphost.sources import Loaded, Source
from apphost.start import INTERRUPTED, OPERATE, complain
from apphost.values import Setting

_IMPLIED = f"{__name__}.run_is_implied"  # in ctx.meta: the word `run` was not typed
_FIRST_HEADING = SETTINGS["app"].heading
_HELP = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class _Program(click.Group):
    """A group whose first word may also be the application: `run` is meant then."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        own = {name for parameter in self.get_params(ctx) for name in parameter.opts}
        asks_for_us = args and (self.knows(args[0]) or args[0] in own)
        if not asks_for_us and (args or not ctx.resilient_parsing):  # shell completion of the first word: commands too
            args = ["run", *args]
            ctx.meta[_IMPLIED] = True
        return super().parse_args(ctx, args)

    def knows(self, name: str) -> bool:
        return name in self.commands or name in OPERATE

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*super().list_commands(ctx), *OPERATE]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in OPERATE:
            from apphost.operate.commands import COMMANDS

            return COMMANDS[cmd_name]
        return super().get_command(ctx, cmd_name)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        self.format_commands(ctx, formatter)
        _write_section(ctx, formatter, "Options", self.get_params(ctx))
        run = self.commands["run"]
        _write_section(ctx, formatter, f"{_FIRST_HEADING} of run", _under(_FIRST_HEADING, run.get_params(ctx)))
        with formatter.section("All settings"):
            formatter.write_text("apphost run --help")

    def main(self, *args: Any, **extra: Any) -> Any:
        """Run and exit the process; every foreseen error becomes a paragraph and an exit code."""
        code: object
        try:
            code = super().main(*args, **{"prog_name": "apphost", **extra, "standalone_mode": False})
        except ApphostError as exc:
            complain("error", exc.message, exc.detail)
            code = exc.exit_code
        except click.ClickException as exc:
            complain("error", exc.format_message())
            code = ExitCode.USAGE
        except (click.Abort, KeyboardInterrupt):
            code = INTERRUPTED
        sys.exit(int(code) if isinstance(code, int) else ExitCode.OK)


class _Command(click.Command):
    """A command that takes all settings, shown by group in its help."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        parameters = self.get_params(ctx)
        for heading in dict.fromkeys(this.heading for this in SETTINGS.values()):
            _write_section(ctx, formatter, heading, _under(heading, parameters))
        _write_section(ctx, formatter, "Options", [each for each in parameters if each.name not in SETTINGS])


def _under(heading: str, parameters: Iterable[click.Parameter]) -> list[click.Parameter]:
    return [each for each in parameters if each.name in SETTINGS and SETTINGS[each.name].heading == heading]


def _write_section(
    ctx: click.Context, formatter: click.HelpFormatter, heading: str, parameters: Iterable[click.Parameter]
) -> None:
    records = [record for each in parameters if (record := _help_record(ctx, each)) is not None]
    if records:
        with formatter.section(heading):
            formatter.write_dl(records)


def _help_record(ctx: click.Context, parameter: click.Parameter) -> tuple[str, str] | None:
    if isinstance(parameter, click.Argument):  # click expects it to be explained in the text of the command
        this = SETTINGS[str(parameter.name)]
        return this.argument, this.does.replace("`", "")
    return parameter.get_help_record(ctx)


def _parameter(this: Setting) -> click.Parameter:
    """The click parameter of a setting. It passes text on: there is one parser and one wording of errors."""
    if this.argument:
        return click.Argument([this.name], required=False, metavar=f"[{this.argument}]", type=click.STRING)
    default = this.show(this.default)
    help_text = this.describe(choices=False).replace("`", "") + (f"  [default: {default}]" if default else "")
    if isinstance(this.default, bool):
        return click.Option(["/".join(this.spellings), this.name], default=None, help=help_text)
    metavar = "|".join(this.choices) if this.choices else this.metavar or this.kind.metavar
    return click.Option(
        [*this.spellings, this.name], type=click.STRING, multiple=this.is_list, metavar=metavar, help=help_text,
        shell_complete=lambda _ctx, _param, begun: [word for word in this.choices if word.startswith(begun)],
    )  # fmt: skip


_PARAMETERS = [_parameter(this) for this in SETTINGS.values()]
_CONFIG = click.Option(
    ["--config"],
    type=click.STRING,
    metavar="FILE",
    help=f"Settings file [variable: {CONFIG_VARIABLE}; default: apphost.toml, or pyproject.toml with [tool.apphost]].",
)


def _command(name: str, summary: str) -> Callable[[Callable[..., Any]], click.Command]:
    def decorate(function: Callable[..., Any]) -> click.Command:
        command = click.command(name, cls=_Command, short_help=summary, context_settings=_HELP)(function)
        command.params = [*_PARAMETERS, _CONFIG, *command.params]
        return command

    return decorate


@click.group(
    "apphost", cls=_Program, context_settings=_HELP, options_metavar="[COMMAND] [OPTIONS]", subcommand_metavar="[APP]"
)
@click.version_option(apphost.__version__, message="apphost %(version)s")
def program() -> None:
    """Serve a WSGI or ASGI application, and reload it without dropping a request.

    `apphost APP` is short for `apphost run APP`; APP is module:attribute, such as myproject.wsgi:application.
    """


@_command("run", "Serve APP.")
@click.pass_context
def _run(ctx: click.Context, /, **_: object) -> None:
    """Serve APP, an import path such as myproject.wsgi:application."""
    loaded, source = _load(ctx)
    _require_app(loaded, ctx)
    ctx.obj(loaded, source)  # see `start`


@_command("check", "Load the settings and APP as a worker would, and exit.")
@click.pass_context
def _check(ctx: click.Context, /, **_: object) -> None:
    """Load the settings and APP as a worker would, say whether it could serve, and exit."""
    loaded, source = _load(ctx)
    _require_app(loaded, ctx)
    from apphost.arbiter.main import check

    sys.exit(check(loaded, source))


@_command("config", "Show each setting and where it came from.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_context
def _config(ctx: click.Context, /, as_json: bool, **_: object) -> None:
    """Show the value of each setting and where it came from."""
    loaded, _source = _load(ctx)
    click.echo(_as_json(loaded) if as_json else _as_columns(loaded))


for _each in (_run, _check, _config):
    program.add_command(_each)


def _load(ctx: click.Context) -> tuple[Loaded, Source]:
    """The settings for this invocation; slips in the environment are told on stderr."""
    given = {name: value for name, value in ctx.params.items() if _is_given(ctx, name)}
    config = given.pop("config", None)
    cli = {
        name: list(value) if isinstance(value, tuple) else value for name, value in given.items() if name in SETTINGS
    }
    source = Source(cli=cli, config=config, cwd=logical_cwd(os.environ))
    loaded = source.load(os.environ)
    for warning in loaded.warnings:
        complain("warning", warning)
    return loaded, source


def _is_given(ctx: click.Context, name: str) -> bool:
    return ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE


def _require_app(loaded: Loaded, ctx: click.Context) -> None:
    app = loaded.settings.app
    if not app:
        raise SettingsError(
            "no application to serve. Name it as in an import, for example: apphost myproject.wsgi:application. "
            "It can also be set as `app` in apphost.toml or pyproject.toml, or in APPHOST_APP. "
            "`apphost --help` tells more."
        )
    if program.knows(app) and ctx.meta.get(_IMPLIED) and _is_given(ctx, "app"):
        raise SettingsError(
            f"the command comes before its options: apphost {app} [OPTIONS]; "
            f"to serve a module that is called {app}: apphost run {app}"
        )


def logical_cwd(environ: Mapping[str, str]) -> str:
    """The current directory as the user named it: $PWD when it is that directory, else what the system says.

    The system's name has no symlinks left, so a deploy that switches `current` to a new release would never be noticed.
    """
    named = environ.get("PWD", "")
    try:
        if os.path.isabs(named) and os.path.samefile(named, "."):
            return named
    except OSError:
        pass
    try:
        return os.getcwd()
    except OSError as exc:
        raise SettingsError(f"the current directory cannot be used: {exc.strerror}") from None


def _as_columns(loaded: Loaded) -> str:
    rows = [(name, this.show(getattr(loaded.settings, name)), loaded.origins[name]) for name, this in SETTINGS.items()]
    name_width, value_width = (max(len(row[column]) for row in rows) for column in (0, 1))
    return "\n".join(f"{name:{name_width}}  {value:{value_width}}  {origin}" for name, value, origin in rows)


def _as_json(loaded: Loaded) -> str:
    values = loaded.settings.to_wire()
    return json.dumps(
        {name: {"value": value, "origin": loaded.origins[name]} for name, value in values.items()}, indent=2
    )
