"""What the program stands on: standard descriptors and signals, whatever the process that started it has left of them.

It is the first thing that is imported and called, so it imports nothing that takes time: until then a signal has the
effect that the starter, or the kernel, has chosen for it.
"""

from __future__ import annotations

import os
import signal
import sys
from _thread import get_ident
from types import FrameType
from typing import NoReturn

# Set by an arbiter for the program that it replaces itself with: the descriptor with its state, and behind it `?` when
# the program is only to be tried.
RESUME_VARIABLE = "APPHOST_RESUME"

# What the arbiter is asked to do once it serves: until it can, these wait.
_WAITING = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTTIN, signal.SIGTTOU)
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT)


class Ended(BaseException):
    """A signal has come that ends the program, which has not come to serve yet."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def repair() -> None:
    """Have descriptors 0 to 2, and the ends of children and alarms told.

    A descriptor that the starter has closed would be given to a listener, or to a channel that then gets what an
    application prints. Who has its children's ends ignored leaves that to us, and then nobody can wait for ours.
    """
    _open_standard()
    for number in (signal.SIGCHLD, signal.SIGALRM):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


def _open_standard() -> None:
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            try:
                os.open(os.devnull, os.O_RDWR)  # gets the lowest that is free: this one
                os.set_inheritable(fd, True)
            except OSError:
                return  # no /dev, or no descriptors: without these there is nobody to tell
    # Python has made none for those that were closed.
    if sys.stdin is None:
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    if sys.stdout is None:
        sys.stdout = open(1, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115


def hold_signals() -> None:
    """Until the arbiter takes signals up, what is asked of it waits; what ends it raises `Ended`, from `heed_ends` on.

    As PID 1 as well, whom the kernel spares what it does not handle. What the starter has ignored or blocked counts no
    more here than when the arbiter serves.
    """
    signal.pthread_sigmask(signal.SIG_SETMASK, (*_WAITING, *_ENDING))
    for number in _ENDING:
        signal.signal(number, _end)


def heed_ends() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _WAITING)


def end_by_default() -> None:
    """In place of `heed_ends`, in a child: these end it as they end any program. In a new child Python forgets what has
    come for a handler, so they are to be blocked before."""
    for number in _ENDING:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    heed_ends()


def _end(number: int, _frame: FrameType | None) -> None:
    # It waits as well: what is raised in a finalizer goes nowhere, and then the arbiter stops when it begins.
    signal.pthread_sigmask(signal.SIG_BLOCK, [number])
    signal.pthread_kill(get_ident(), number)
    raise Ended(number)


def obey_signals() -> None:
    """For a command: none that the starter has blocked waits."""
    signal.pthread_sigmask(signal.SIG_SETMASK, [])


def die_of(number: int) -> NoReturn:
    """Of one that has raised `Ended`, as its sender expects. PID 1 cannot: it exits with the code that a shell makes of
    such a death."""
    signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [number])
    os._exit(128 + number)
