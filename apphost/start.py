"""The `apphost` program: what its process becomes.

To serve is to become the arbiter, which lives for months and needs nothing of what reads the command line. So a child
process reads it and hands the settings over, while this process imports the arbiter: on Linux that saves 2 MiB for as
long as it runs, and the time of the shorter of the two at each start.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import TYPE_CHECKING, NoReturn

from apphost import footing

if TYPE_CHECKING:  # what takes time to import is imported when the signals are in our hands
    from apphost.sources import Loaded, Source

# Commands that talk to a running server; they are imported when one is used.
OPERATE = ("status", "connections", "reload", "stop", "scale", "stacks", "upgrade")
_IN_PLACE = frozenset((*OPERATE, "check", "config"))  # whoever signals these shall reach them: they get no child
INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it


def main() -> NoReturn:
    """The program. Ends the process with a code of `ExitCode`, or 130 after an interrupt."""
    footing.repair()
    try:
        sys.exit(_run())
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except footing.Ended as end:
        if end.number == signal.SIGINT:
            sys.exit(INTERRUPTED)
        footing.die_of(end.number)
    except Exception as exc:
        sys.exit(_tell(exc))


def _run() -> int:
    word = os.environ.pop(footing.RESUME_VARIABLE, None)
    if word is not None:
        if word.endswith("?"):
            footing.hold_signals()  # else the program before this one has: all of them wait
            footing.heed_ends()
        from apphost.arbiter.main import resume

        return resume(word)
    if sys.argv[1:2] and sys.argv[1] in _IN_PLACE:
        footing.obey_signals()
        from apphost.cli import program

        program()
    return _serve()


def _tell(exc: Exception) -> int:
    """The exit code, for an error that is not ours. Raises it if it is."""
    from apphost.errors import ApphostError, limit_reached

    known = exc if isinstance(exc, ApphostError) else limit_reached(exc)
    if known is None:
        raise exc
    complain("error", known.message, known.detail)
    return known.exit_code


def _serve() -> int:
    footing.hold_signals()
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        footing.end_by_default()
        os.close(reader)
        from functools import partial

        from apphost.cli import program

        program(obj=partial(_hand_over, writer))
    footing.heed_ends()
    os.close(writer)
    from apphost.arbiter.main import run  # while the child reads

    with open(reader, "rb") as pipe:
        data = pipe.read()
    _, status = os.waitpid(pid, 0)
    if not data:  # it has said why, or has shown what it was asked for
        code = os.waitstatus_to_exitcode(status)
        return code if code >= 0 else 128 - code
    return run(*_from_wire(data))


def _hand_over(pipe: int, loaded: Loaded, source: Source) -> None:
    """In the child: these are the settings to serve with. Ends it at once, since the arbiter waits for its end."""
    import json

    from apphost.errors import ExitCode

    wire = {
        "settings": loaded.settings.to_wire(),
        "origins": dict(loaded.origins),
        "warnings": loaded.warnings,
        "file": loaded.file,
        "source": source.to_wire(),
    }
    try:
        with open(pipe, "w", encoding="ascii") as file:
            json.dump(wire, file)
        sys.stderr.flush()
    except BrokenPipeError:
        os._exit(ExitCode.INTERNAL)  # the process that was to serve has been ended meanwhile
    os._exit(ExitCode.OK)


def _from_wire(data: bytes) -> tuple[Loaded, Source]:
    import json

    from apphost.settings import Settings
    from apphost.sources import Loaded, Source

    wire = json.loads(data)
    settings = Settings.from_wire(wire["settings"])
    return Loaded(settings, wire["origins"], tuple(wire["warnings"]), wire["file"]), Source.from_wire(wire["source"])


def complain(level: str, message: str, detail: str = "") -> None:
    """Tell the operator, in one paragraph."""
    print(f"apphost: {level}: {message}" + (f"\n\n{detail}" if detail else ""), file=sys.stderr)
