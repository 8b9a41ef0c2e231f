"""What can go wrong before and around serving, and the exit code that tools see for it.

The table below is the only place where an exit code is chosen. Codes 0 to 2 follow the shell and click; the others stay
below 64 so that they never meet a signal death (128 + n) or the sysexits of a supervised program.
"""

from __future__ import annotations

import difflib
import enum
import errno
import os
import resource
import traceback
from collections.abc import Iterable

# Characters of a traceback that is shown: a recursion error's, or that of a chain of a thousand causes, is longer than
# useful. Of such a one the ends are kept, where the first cause and the last exception stand.
TRACEBACK_MAX = 65536

_OWN_CODE = os.path.dirname(os.path.abspath(__file__)) + os.sep


class ExitCode(enum.IntEnum):
    """Exit status of the `apphost` program."""

    OK = 0
    INTERNAL = 1  # a defect of apphost itself
    USAGE = 2  # command line, environment or settings file
    APPLICATION = 3  # the application cannot be loaded or refuses to start
    ADDRESS = 4  # a listener cannot be opened
    RUNNING = 5  # the pidfile belongs to a running apphost
    PRIVILEGES = 6  # user, group or a file that may not be used
    # Of the commands that talk to a running arbiter:
    UNREACHABLE = 7  # there is none, there are several, or it does not obey
    GIVEN_UP = 8  # a reload or an upgrade was given up: the old code keeps serving
    SUPERSEDED = 9  # a newer reload has taken the place of this one
    GONE = 10  # the arbiter stops, or has ended
    TIMED_OUT = 11  # the command did not see the end of what it waited for


class ApphostError(Exception):
    """An error with a message for the operator: one readable paragraph, no traceback of ours.

    `detail` is shown below the paragraph as it is, usually the traceback of the user's own code.
    """

    exit_code = ExitCode.INTERNAL

    def __init__(self, message: str, detail: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.detail = detail


class SettingsError(ApphostError):
    exit_code = ExitCode.USAGE


class ApplicationError(ApphostError):
    exit_code = ExitCode.APPLICATION


class AddressError(ApphostError):
    exit_code = ExitCode.ADDRESS


class AlreadyRunningError(ApphostError):
    exit_code = ExitCode.RUNNING


class PrivilegesError(ApphostError):
    exit_code = ExitCode.PRIVILEGES


class UnreachableError(ApphostError):
    exit_code = ExitCode.UNREACHABLE


class GivenUpError(ApphostError):
    exit_code = ExitCode.GIVEN_UP


class SupersededError(ApphostError):
    exit_code = ExitCode.SUPERSEDED


class GoneError(ApphostError):
    exit_code = ExitCode.GONE


class TimedOutError(ApphostError):
    exit_code = ExitCode.TIMED_OUT


def limit_reached(exc: Exception) -> ApphostError | None:
    """What to tell when `exc` means that this process, or the system, can open no more files; else None."""
    number = exc.errno if isinstance(exc, OSError) else None
    if number not in (errno.EMFILE, errno.ENFILE):
        return None
    if number == errno.ENFILE:
        return PrivilegesError("the system has no descriptors left (fs.file-max)")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return PrivilegesError(
        f"this process may open only {soft} files, and needs more: raise the limit with `ulimit -n 1024`, or with "
        f"LimitNOFILE= in a unit of systemd (the hard limit is {'none' if hard == resource.RLIM_INFINITY else hard})"
    )


def nearest(name: str, known: Iterable[str]) -> str:
    """` Did you mean 'x'?` with the nearest known name, or an empty string when none is near."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean {close[0]!r}?" if close else ""


def user_traceback(exc: BaseException) -> str:
    """The traceback of `exc` without the leading frames of apphost and of importlib.

    Frames of ours *below* the first frame of the user stay: there the user called us, and that is part of the story.
    Never raises: an exception is user code, and whoever reports one has something more important to do afterwards.
    """
    try:
        report = traceback.TracebackException.from_exception(exc)
        _strip(report)
        text = "".join(report.format()).rstrip("\n")
    except Exception as defect:  # such as a SyntaxError whose text is no text
        frames = "".join(traceback.format_tb(exc.__traceback__))
        text = f"{frames}{type(exc).__qualname__}, which cannot be shown: {type(defect).__name__} was raised by that"
    if len(text) > TRACEBACK_MAX:
        half = TRACEBACK_MAX // 2
        text = f"{text[:half]}\n... {len(text) - 2 * half} characters are left out here ...\n{text[-half:]}"
    return text


def _strip(report: traceback.TracebackException) -> None:
    """Not by recursion: a chain of causes may be longer than the stack is deep."""
    waiting: list[traceback.TracebackException | None] = [report]
    seen: set[int] = set()
    while waiting:
        each = waiting.pop()
        if each is None or id(each) in seen:
            continue
        seen.add(id(each))
        frames = each.stack
        while frames and _is_plumbing(frames[0].filename):
            del frames[0]
        waiting += [each.__cause__, each.__context__, *(getattr(each, "exceptions", None) or ())]


def _is_plumbing(filename: str) -> bool:
    return filename.startswith((_OWN_CODE, "<frozen importlib")) or f"{os.sep}importlib{os.sep}" in filename
