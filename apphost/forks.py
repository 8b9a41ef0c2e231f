"""What a process that the application forks must not keep of ours.

`os.fork` and multiprocessing copy everything: listeners, which would hold the port when the server has gone;
connections, whose clients would never see the end; handlers of signals, which write into the wake-up descriptor that
both have, so that a child which is told to end has its parent end instead. subprocess executes another program, and is
none of this.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from threading import get_ident

from apphost.messages import DUMP_SIGNAL

_HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGTTIN,
            signal.SIGTTOU, signal.SIGCHLD, DUMP_SIGNAL)  # fmt: skip


class Forks:
    """Of one process, from now on to its end: nothing takes back what is to be done at a fork."""

    def __init__(self, descriptors: Callable[[], Iterable[int]]) -> None:
        """`descriptors`: ours, that a child of the application must not have; those below 0 are closed already."""
        self._descriptors = descriptors
        self._ours = False
        self._foreign = False  # this is a child of the application already, and its own children are not our business
        self._handlers = {number: signal.getsignal(number) for number in _HANDLED}
        self._masks: dict[int, set[int | signal.Signals]] = {}  # thread to its mask, while it forks
        os.register_at_fork(before=self._hold, after_in_parent=self._release, after_in_child=self._disown)

    @contextlib.contextmanager
    def ours(self) -> Iterator[None]:
        """What is forked within goes on as one of us."""
        self._ours = True
        try:
            yield
        finally:
            self._ours = False

    def _hold(self) -> None:
        """A signal that comes before the child is rid of our handlers would be heard of here."""
        if not self._ours and not self._foreign:
            self._masks[get_ident()] = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())

    def _release(self) -> None:
        mask = self._masks.pop(get_ident(), None)
        if mask is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def _disown(self) -> None:
        if self._ours or self._foreign:
            return
        self._foreign = True
        with contextlib.suppress(Exception):  # whatever fails, the child is the application's, and is to go on
            self._restore_signals()
        with contextlib.suppress(Exception):
            _replace([fd for fd in self._descriptors() if fd >= 0])
        self._release()

    def _restore_signals(self) -> None:
        """But for those that the application has handlers of its own for. That of TERM has become the loop's."""
        signal.set_wakeup_fd(-1)
        faulthandler.unregister(DUMP_SIGNAL)
        faulthandler.disable()
        for number, handler in self._handlers.items():
            if number == signal.SIGTERM or signal.getsignal(number) == handler:
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


def _replace(descriptors: Iterable[int]) -> None:
    """By the null device, not by nothing: the objects that have these numbers would close whatever gets them next."""
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for fd in descriptors:
        os.dup2(null, fd, inheritable=False)
    os.close(null)


def end_daemons() -> None:
    """End the daemonic children that multiprocessing has for the application, as it does at an ordinary exit."""
    if "multiprocessing.process" in sys.modules:
        from multiprocessing import active_children

        for child in active_children():
            if child.daemon:
                child.terminate()


def forget_children() -> None:
    """In a process that was forked without multiprocessing: those that it knows are no children of this one."""
    module = sys.modules.get("multiprocessing.process")
    if module is not None:
        getattr(module, "_children", set()).clear()
