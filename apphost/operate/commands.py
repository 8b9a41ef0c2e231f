"""The command line of `status`, `connections`, `reload`, `stop`, `scale`, `stacks` and `upgrade`."""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import click
from click.shell_completion import CompletionItem

from apphost.errors import ApphostError, GivenUpError, GoneError, SupersededError, TimedOutError
from apphost.logs import escape
from apphost.operate import render
from apphost.operate.client import Ended, Line, Session, Target, follow, open_session, sessions
from apphost.peers import peer_of
from apphost.settings import SETTINGS

_HELP = {"help_option_names": ["-h", "--help"], "max_content_width": 100}
WAIT = 900.0  # s: more than a reload takes that is going well, with 50 workers of which each boots for 15 s
STOP_GRACE = 10.0  # s beyond what the settings say that a stop takes
INTERVAL = 2.0  # s between two samples of --watch
SAMPLE_TIMEOUT = 10.0  # s for one of them, and for the first answer to any command
_CLEAR = "\x1b[H\x1b[J"
_COMPLETION_TIMEOUT = 1.0  # s that a shell may be kept waiting


def _complete_pid(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    with contextlib.suppress(ApphostError):
        pids: list[str] = []
        for session in sessions():
            pids.append(str(session.peer.pid or session.named))
            session.close()
        return [CompletionItem(pid) for pid in pids if pid.startswith(incomplete)]
    return []


def _complete_worker(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    given: dict[str, Any] = {name: ctx.params.get(name) for name in ("pid", "pidfile", "control")}
    with contextlib.suppress(ApphostError, Ended, LookupError), _session(**given) as session:
        workers = session.ask({"do": "status"}, _COMPLETION_TIMEOUT)["status"]["workers"]
        named = [(str(each["worker"]), f"{each['state']}, pid {each['pid']}") for each in workers]
        return [CompletionItem(wid, help=what) for wid, what in named if wid.startswith(incomplete)]
    return []


_WHICH = (
    click.Option(["--pid"], type=click.IntRange(1), metavar="PID", shell_complete=_complete_pid,
                 help="The server with this pid."),
    click.Option(["--pidfile"], type=click.Path(), metavar="FILE", help="The server with this pidfile."),
    click.Option(["--control"], type=click.Path(), metavar="PATH",
                 help="The server with this control socket. Without any of the three: the only one of this user."),
)  # fmt: skip


def _command(name: str, summary: str, **context: Any) -> Callable[[Callable[..., Any]], click.Command]:
    def decorate(function: Callable[..., Any]) -> click.Command:
        command = click.command(name, short_help=summary, context_settings={**_HELP, **context})(function)
        command.params = [*command.params, *_WHICH]
        return command

    return decorate


_timeout = click.option(
    "--timeout", type=click.FloatRange(0.01), metavar="SECONDS", help="Give up waiting after this; the server goes on."
)
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
_worker = click.argument("worker", type=click.IntRange(1), required=False, shell_complete=_complete_worker)


@contextlib.contextmanager
def _session(pid: int | None, pidfile: str | None, control: str | None) -> Iterator[Session]:
    session = open_session(Target.chosen(pid or 0, pidfile or "", control or "", os.environ))
    try:
        yield session
    except Ended:
        raise GoneError(f"the arbiter{session.process} has closed the connection") from None
    finally:
        session.close()


@_command("status", "Show how a server is.")
@_json
@click.option("--watch", is_flag=True, help=f"Again every {INTERVAL:g} s, with rates in between, until interrupted.")
def status(as_json: bool, watch: bool, **which: Any) -> None:
    """Show generation, workers, code, restarts, and settings that differ from their defaults."""
    before: dict[int, render.Sample] = {}
    with _session(**which) as session:
        while True:
            at = time.monotonic()
            found = _sample(session)
            shares = _shares(session, found)
            if as_json:
                for worker in found["workers"]:
                    worker["pss"] = shares.get(worker["pid"])
                click.echo(json.dumps(found) if watch else json.dumps(found, indent=2))
            else:
                if watch:
                    click.echo(_CLEAR, nl=False)  # nothing where it is no terminal
                click.secho(render.headline(found), bold=True, fg=None if found["ok"] else "red")
                click.echo(render.status_text(found, shares, at, before) + ("\n" if watch else ""))
            if not watch:
                return
            before = {worker["worker"]: render.sample(worker, at) for worker in found["workers"]}
            time.sleep(max(0.0, at + INTERVAL - time.monotonic()))


def _sample(session: Session, timeout: float | None = None) -> Line:
    """Its status. Asked before an order as well: one that does not answer must not obey when we have given up."""
    seconds = min(timeout or SAMPLE_TIMEOUT, SAMPLE_TIMEOUT)
    try:
        return dict(session.ask({"do": "status"}, seconds)["status"])
    except Ended:  # an upgrade
        session.again(time.monotonic() + seconds)
        return dict(session.ask({"do": "status"}, seconds)["status"])


def _shares(session: Session, found: Line) -> dict[int, int]:
    """PSS in bytes of the workers, by pid, as far as we may know: it needs the rights of a debugger (ptrace(2)), and
    pids that mean the same to us and to the arbiter."""
    shares: dict[int, int] = {}
    peer = peer_of(session.sock)
    if peer is None or peer.pid != found["pid"]:
        return shares
    for worker in found["workers"]:
        try:
            with open(f"/proc/{worker['pid']}/smaps_rollup", encoding="ascii", errors="replace") as file:
                kib = next(line.split()[1] for line in file if line.startswith("Pss:"))
            shares[worker["pid"]] = int(kib) * 1024
        except (OSError, ValueError, StopIteration, IndexError):
            continue
    return shares


@_command("connections", "Show the connections of a server.")
@_json
@_timeout
@_worker
def connections(worker: int | None, timeout: float | None, as_json: bool, **which: Any) -> None:
    """Show peer, state, age and bytes of every connection, of all workers or of WORKER (its number or pid)."""
    with _session(**which) as session:
        answers = _answers(session, {"do": "connections", "worker": worker or 0}, timeout)
    click.echo(json.dumps(answers, indent=2) if as_json else render.connections_text(answers))


@_command("stacks", "Show what the workers of a server are doing.")
@_timeout
@_worker
def stacks(worker: int | None, timeout: float | None, **which: Any) -> None:
    """Show the stacks of threads and asyncio tasks, of all workers or of WORKER (its number or pid)."""
    with _session(**which) as session:
        answers = _answers(session, {"do": "stacks", "worker": worker or 0}, timeout)
    click.echo("\n\n".join(map(render.stacks_text, answers)) or "there is no worker")


def _answers(session: Session, request: Line, timeout: float | None) -> list[Line]:
    # A blocked worker takes 1.3 s of it, and so does each of 1024; between two lines there is no more than that.
    seconds = timeout or WAIT
    deadline = time.monotonic() + seconds
    _sample(session, timeout)
    try:
        return [line for line in session.talk(request, deadline, SAMPLE_TIMEOUT) if "worker" in line]
    except TimedOutError:
        raise TimedOutError(session.silence(min(seconds, SAMPLE_TIMEOUT))) from None


@_command("reload", "Reload a server.")
@click.option("--wait", is_flag=True, help="Show how it goes, and exit with 0 only when all workers run the new code.")
@_timeout
def reload_(wait: bool, timeout: float | None, **which: Any) -> None:
    """Have a new generation of workers replace the present one."""
    if timeout is not None and not wait:
        raise click.UsageError("--timeout is for how long to wait: add --wait")
    with _session(**which) as session:
        if not wait:
            _sample(session)
            asked = session.ask({"do": "reload"}, SAMPLE_TIMEOUT)
            click.echo(f"generation {asked['generation']} is asked for")
            return
        _conclude(_follow(session, {"do": "reload", "wait": True}, timeout))


@_command("upgrade", "Replace the program of a running server.")
@_timeout
def upgrade(timeout: float | None, **which: Any) -> None:
    """Have the arbiter replace its own program, same pid, after a trial; then wait for the reload that follows."""
    with _session(**which) as session:
        _conclude(_follow(session, {"do": "upgrade"}, timeout))


def _follow(session: Session, request: Line, timeout: float | None) -> Line:
    seconds = timeout or WAIT
    heard = False
    awaited = 0
    trouble: list[str] = []

    def show(line: Line) -> None:
        nonlocal heard, awaited
        heard = True
        if line.get("event") == "waiting":
            awaited = line.get("generation", 0)
        if line.get("version"):
            click.echo(f"{render.clock(time.time())} the arbiter is apphost {escape(str(line['version']))}")
        if line.get("event") == "gone" and line.get("detail") and line.get("generation") == awaited:
            trouble[:] = [str(line.get("text")), str(line["detail"])]
            line = {**line, "detail": ""}  # it comes with the error, at the end
        text = render.progress_text(line)
        if text:
            click.echo(text)

    deadline = time.monotonic() + seconds
    _sample(session, timeout)
    try:
        return follow(session, request, deadline, show)
    except TimedOutError:
        if not heard or session.process.stopped():
            raise TimedOutError(session.silence(seconds)) from None
        last = f" The last trouble: {escape(trouble[0])}" if trouble else ""
        detail = "\n".join(map(escape, trouble[1].splitlines())) if trouble else ""
        raise TimedOutError(
            f"not complete within {seconds:g} s; it goes on, and `apphost status` tells how it ended.{last}", detail
        ) from None


def _conclude(last: Line) -> None:
    """Print a success; raise anything else."""
    outcome, text = last.get("outcome"), escape(str(last.get("text", "")))
    detail = "\n".join(map(escape, str(last.get("detail", "")).splitlines()))
    if outcome == "complete":
        click.echo(f"{render.clock(last.get('at'))} {text}")
    elif outcome == "given up":
        raise GivenUpError(text, detail)
    elif outcome == "superseded":
        raise SupersededError(text)
    else:
        raise GoneError(text or "the arbiter stops")


@_command("stop", "Stop a server.")
@click.option("--now", is_flag=True, help="At once: requests in progress are cut off.")
@_timeout
def stop(now: bool, timeout: float | None, **which: Any) -> None:
    """Stop a server, and return when it has gone."""
    with _session(**which) as session:
        began = time.monotonic()
        settings = _sample(session, timeout)["settings"]
        needs = [settings.get(name, SETTINGS[name].default) for name in ("stop_timeout", "shutdown_delay")]
        seconds = timeout or sum(map(float, needs)) + STOP_GRACE
        deadline = began + seconds
        try:
            for line in session.talk({"do": "stop", "now": now}, deadline):
                text = render.progress_text(line)
                if text:
                    click.echo(text)
        except Ended:
            pass
        except TimedOutError:
            raise TimedOutError(f"it still runs after {seconds:g} s; `apphost stop --now` does not wait") from None
        if not session.process.wait(deadline):
            raise TimedOutError(f"it has stopped serving, but process {session.process.pid} is still there")
        click.echo("stopped")


def _size(text: str) -> dict[str, int]:
    """A number of workers or, with a sign, by how many more or fewer: as the request has it."""
    high = int(SETTINGS["workers"].high or 1)
    if not re.fullmatch("[+-]?[0-9]{1,9}", text, re.ASCII) or not 1 <= abs(int(text)) <= high:
        raise click.BadParameter(f"expected a number from 1 to {high}, or one with a sign for so many more or fewer")
    return {"by" if text[0] in "+-" else "size": int(text)}


@_command("scale", "Change the number of workers of a server.", ignore_unknown_options=True)  # -1 is none
@click.argument("size", type=_size, metavar="SIZE")
def scale(size: dict[str, int], **which: Any) -> None:
    """Have SIZE workers from now on: until the next start, or a reload with another `workers` in the settings.

    With a sign, +1 or -2, so many more or fewer than now.
    """
    with _session(**which) as session:
        _sample(session)
        answer = session.ask({"do": "scale", **size}, SAMPLE_TIMEOUT)
    click.echo(f"{answer['size']} workers, before {answer['was']}")


COMMANDS = {each.name: each for each in (status, connections, reload_, stop, scale, stacks, upgrade)}
