"""The `apphost` program: what its process becomes.

To serve is to become the arbiter, which lives for months and needs nothing of what reads the command line. So a child
process reads it and hands the settings over, while this process imports the arbiter: on Linux that saves 2 MiB for as
long as it runs, and the time of the shorter of the two at each start.
"""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from typing import NoReturn

from apphost.errors import ApphostError, ExitCode
from apphost.settings import RESUME_VARIABLE, Settings
from apphost.sources import Loaded, Source

# Commands that talk to a running server; they are imported when one is used.
OPERATE = ("status", "connections", "reload", "stop", "scale", "stacks", "upgrade")
_IN_PLACE = frozenset((*OPERATE, "check", "config"))  # whoever signals these shall reach them: they get no child
INTERRUPTED = 130  # 128 + SIGINT, as a shell reports it


def main() -> NoReturn:
    """The program. Ends the process with a code of `ExitCode`, or 130 after an interrupt."""
    word = os.environ.pop(RESUME_VARIABLE, None)
    if word is not None:
        from apphost.arbiter.main import resume

        sys.exit(resume(word))
    if sys.argv[1:2] and sys.argv[1] in _IN_PLACE:
        from apphost.cli import program

        program()
    try:
        sys.exit(_serve())
    except ApphostError as exc:
        complain("error", exc.message, exc.detail)
        sys.exit(exc.exit_code)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


def _serve() -> int:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        from apphost.cli import program

        program(obj=partial(_hand_over, writer))
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
    wire = json.loads(data)
    settings = Settings.from_wire(wire["settings"])
    return Loaded(settings, wire["origins"], tuple(wire["warnings"]), wire["file"]), Source.from_wire(wire["source"])


def complain(level: str, message: str, detail: str = "") -> None:
    """Tell the operator, in one paragraph."""
    print(f"apphost: {level}: {message}" + (f"\n\n{detail}" if detail else ""), file=sys.stderr)
