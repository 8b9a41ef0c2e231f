"""What the commands show to people. Pure: JSON objects in, text out.

Whatever came from a server's processes is escaped: nothing in it can steer the terminal.
"""

from __future__ import annotations

import textwrap
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from apphost.logs import escape
from apphost.settings import SETTINGS

WIDTH = 100  # columns
MOMENT = 0.5  # s: beats are that far apart, so a rate over less means nothing
SLOW = 1.0  # s in progress, from which on a request is named

Line = Mapping[str, Any]
_NONE = "-"
_WORKER = (
    "worker", "gen", "state", "pid", "age", "requests", "5xx", "req/s", "busy", "oldest", "conns", "RSS", "PSS", "CPU",
    "code",
)  # fmt: skip


def duration(seconds: float | None) -> str:
    """`0.3s`, `59s`, `12m`, `3h`, `2d`."""
    if seconds is None:
        return _NONE
    if seconds < 10:
        return f"{seconds:.1f}s"
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * size or (unit == "m" and seconds >= 100):
            return f"{seconds / size:.0f}{unit}"
    return f"{seconds:.0f}s"


def size(count: float | None) -> str:
    """`812`, `12K`, `81M`, `1.2G`; powers of 1024."""
    if count is None:
        return _NONE
    for unit in ("", "K", "M", "G"):
        if count < 1000:
            return f"{count:.0f}{unit}" if unit != "G" else f"{count:.1f}G"
        count /= 1024
    return f"{count:.1f}T"


def number(count: float) -> str:
    """`123456`, `1234k`, `12M`."""
    if count < 1_000_000:
        return f"{count:.0f}"
    return f"{count / 1e3:.0f}k" if count < 10_000_000 else f"{count / 1e6:.0f}M"


def clock(at: Any) -> str:
    """Local time of day of a Unix time, with the date if it was another day."""
    try:
        then = time.localtime(float(at))
    except (TypeError, ValueError, OverflowError, OSError):
        return _NONE
    today = time.localtime()
    return time.strftime("%H:%M:%S" if then[:3] == today[:3] else "%Y-%m-%d %H:%M:%S", then)


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], left: Iterable[str] = ()) -> list[str]:
    """Columns as wide as they must be; numbers to the right, those of `left` to the left. A column in which no row has
    anything is left out."""
    cells = [[escape(cell) for cell in row] for row in rows]
    shown = [n for n in range(len(heads)) if any(row[n] not in ("", _NONE) for row in cells)]
    widths = {n: max(len(heads[n]), *(len(row[n]) for row in cells)) for n in shown}
    flush_left = set(left)

    def line(row: Sequence[str]) -> str:
        parts = [row[n].ljust(widths[n]) if heads[n] in flush_left else row[n].rjust(widths[n]) for n in shown]
        gap = " " if sum(widths.values()) + 2 * len(shown) > WIDTH else "  "
        return gap.join(parts).rstrip()

    return [line(heads), *map(line, cells)] if cells else []


Sample = tuple[float, int, float]  # time, requests, CPU seconds


def sample(worker: Line, at: float) -> Sample:
    return at, int(worker["requests"]), float(worker["cpu"] or 0.0)


def _rates(worker: Line, at: float, before: Mapping[int, Sample]) -> tuple[str, str]:
    """Requests a second and CPU per cent: since the sample before, or on the average of its life."""
    then = before.get(int(worker["worker"]))
    if then is not None and at > then[0]:
        seconds = serving = at - then[0]
        requests, cpu = then[1], then[2]
    else:
        seconds, serving, requests, cpu = float(worker["age"]), float(worker["serving"] or 0.0), 0, 0.0
    rate = (int(worker["requests"]) - requests) / max(serving, MOMENT)
    busy = _NONE if worker["cpu"] is None else f"{number(100 * (float(worker['cpu']) - cpu) / max(seconds, MOMENT))}%"
    return f"{rate:.1f}" if rate < 100 else number(rate), busy


def headline(status: Line) -> str:
    """What it is, and whether all is well."""
    return escape(f"{status['app']}: {status['what']}")


def _about(status: Line) -> str:
    generation = f"generation {status['good']}, " if status["good"] else ""
    places = f", listening at {', '.join(status['listening'])}" if status["listening"] else ""
    return (
        f"{generation}pid {status['pid']}, up {duration(status['uptime'])}, apphost {status['version']} on Python "
        f"{status['python']}{places}"
    )


def status_text(status: Line, pss: Mapping[int, int], at: float, before: Mapping[int, Sample]) -> str:
    """All of it but the first line. `pss`: by pid. `before`: the samples of workers to take rates from, by worker."""
    rows = []
    for each in status["workers"]:
        rate, cpu = _rates(each, at, before)
        rows.append([
            str(each["worker"]), str(each["generation"]), str(each["state"]), str(each["pid"]), duration(each["age"]),
            number(each["requests"]), number(each["errors"]) if each["errors"] else _NONE, rate,
            str(each["in_progress"]), duration(each["oldest"]["seconds"]) if each["oldest"] else _NONE,
            number(each["connections"]), size(each["rss"]), size(pss.get(each["pid"])), cpu,
            str(each["code"].get("hash", _NONE))[:8],
        ])  # fmt: skip
    lines = textwrap.wrap(escape(_about(status)), WIDTH, break_on_hyphens=False)
    lines += ["", *table(_WORKER, rows, ("state", "code")), ""]
    for paragraph in _notes(status):
        lines += textwrap.wrap(escape(paragraph), WIDTH, subsequent_indent="  ", break_on_hyphens=False)
    return "\n".join(lines).strip("\n")


def _notes(status: Line) -> Iterable[str]:
    """What is remarkable, a paragraph each."""
    for each in status["workers"]:
        yield from _remarks(each)
    given_up = status["given_up"]
    if given_up:
        yield f"{clock(given_up['at'])} {given_up['text']}"
    if status["canary_left"] is not None:
        yield f"generation {status['target']} is on probation for another {duration(status['canary_left'])}"
    if status["pause_left"] is not None:
        yield f"the next worker is started in {duration(status['pause_left'])}, since those before it ended early"
    if status["stop_in"] is not None:
        yield f"the stop begins in {duration(status['stop_in'])}"
    if status["reload_waits"]:
        yield "another reload is asked for and waits for its turn"
    yield from _code(status["workers"])
    replaced = status["replaced"]
    if replaced:
        yield "ended workers: " + ", ".join(f"{count} {why}" for why, count in sorted(replaced.items()))
    for end in [end for end in status["ends"] if end["why"] not in ("reload", "stop", "scale-down", "recycle")][-3:]:
        yield f"{clock(end['at'])} {end['text']}"
    if status["settings"]:
        named = {name: value for name, value in status["settings"].items() if name != "app"}
        yield "settings: " + ", ".join(f"{name} = {_value(name, value)}" for name, value in named.items())


def _remarks(worker: Line) -> Iterable[str]:
    name = f"worker {worker['worker']}"
    if worker.get("silent") is not None:
        yield f"{name} has not answered for {duration(worker['silent'])}: `apphost stacks {worker['worker']}` shows why"
    if worker.get("drain_left") is not None:
        yield f"{name} drains ({worker.get('reason')}), {duration(worker['drain_left'])} are left"
    if worker.get("boot_left") is not None:
        yield f"{name} boots, {duration(worker['boot_left'])} are left of boot_timeout"
    oldest = worker["oldest"]
    if oldest and oldest["seconds"] >= SLOW:
        yield f"{name} has been at {oldest['request']} for {duration(oldest['seconds'])}"


def _code(workers: Iterable[Line]) -> Iterable[str]:
    """What is served, and that workers of a generation do not agree, if so."""
    codes: dict[str, Line] = {}
    generations: dict[str, set[int]] = {}
    for worker in workers:
        code = worker["code"]
        if code.get("hash"):
            key = " ".join(str(code.get(name, "")) for name in ("hash", "directory", "commit"))
            codes[key] = code
            generations.setdefault(key, set()).add(int(worker["generation"]))
    for key, code in codes.items():
        numbers = sorted(generations[key])
        commit = f", commit {str(code['commit'])[:12]}" if code.get("commit") else ""
        plural = "s" if len(numbers) > 1 else ""
        yield (
            f"code {str(code['hash'])[:8]} (generation{plural} {', '.join(map(str, numbers))}): "
            f"{code.get('directory', '?')}{commit}, own modules: {code.get('files')}"
        )
    for number in sorted(set().union(*generations.values())):
        if sum(number in having for having in generations.values()) > 1:
            yield f"the workers of generation {number} run different code: files were changed without a reload"


def _value(name: str, value: Any) -> str:
    this = SETTINGS.get(name)
    if this is None:
        return str(value)
    return this.show(tuple(value) if isinstance(value, list) else value)


def connections_text(answers: Sequence[Line]) -> str:
    """Of all workers."""
    heads = ("worker", "peer", "protocol", "state", "age", "requests", "received", "sent", "moves", "request")
    rows: list[list[str]] = []
    notes: list[str] = []
    for answer in answers:
        wid = str(answer["worker"])
        if answer.get("error"):
            notes.append(f"worker {wid}: {answer['error']}")
        rows += [
            [
                wid, str(row["peer"]), str(row["protocol"]), str(row["state"]), duration(row["age"]),
                number(row["requests"]), size(row["received"]), size(row["sent"]),
                "yes" if row["movable"] else str(row.get("why", "no")), str(row.get("request", "")),
            ]
            for row in answer.get("connections", ())
        ]  # fmt: skip
        if answer.get("left_out"):
            notes.append(f"worker {wid}: {answer['left_out']} more connections were left out")
    left = ("peer", "protocol", "state", "moves", "request")
    lines = [line[:WIDTH] for line in table(heads, rows, left)] or ["no connections"]
    return "\n".join([*lines, *map(escape, notes)])


def stacks_text(answer: Line) -> str:
    """Of one worker."""
    lines = [f"worker {answer['worker']} gen {answer['generation']}, pid {answer['pid']}"]
    for key in ("error", "silent"):
        if answer.get(key):
            lines[0] += f": {escape(str(answer[key]))}"
    stacks = list(map(str, answer.get("stacks", ())))
    if "stacks" in answer and not stacks:
        stacks = ["it has written nothing: it may hang in the system, where no signal reaches it"]
    return "\n".join([*lines, *(f"    {escape(line)}" for line in stacks)])


def progress_text(line: Line) -> str:
    """A happening while a command waits, empty for what is said elsewhere."""
    event, text = str(line.get("event", "")), str(line.get("text", ""))
    if not event or line.get("done"):
        return ""
    who = f"worker {line.get('worker')} gen {line.get('generation')}"
    said = {
        "waiting": f"waiting for generation {line.get('generation')}",
        "booting": f"{who} booting, pid {line.get('pid')}",
        "ready": f"{who} ready",
        "draining": f"{who} draining: {text}",
        "gone": text,
        "probation": f"{who} serves on probation",
        "reload asked": "",
        "trying": "the new program is tried",
        "complete": "",  # the last line says so
        "given up": "",
    }.get(event, f"{event}: {text}" if text else event)
    if not said:
        return ""
    detail = "".join(f"\n    {escape(each)}" for each in str(line.get("detail", "")).splitlines())
    return f"{clock(line.get('at'))} {escape(said)}{detail}"
