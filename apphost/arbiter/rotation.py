"""The service that opens the arbiter's own log anew when a reload is asked for: the file may have been renamed."""

from __future__ import annotations

import os
from collections.abc import Callable

from apphost.arbiter.services import Happening, What
from apphost.errors import ApphostError
from apphost.logs import Log


class Rotation:
    """`reopen` gives a log on a new descriptor, or raises `ApphostError`; that takes the number of the old one, so
    whoever has `log` writes to the new file from then on."""

    deadline: float | None = None

    def __init__(self, log: Log, reopen: Callable[[], Log]) -> None:
        self._log = log
        self._reopen = reopen

    def expire(self, now: float) -> None:
        pass

    def notice(self, happening: Happening) -> None:
        if happening.what is not What.RELOAD_ASKED:
            return
        try:
            fd = self._reopen().fd
        except ApphostError as exc:
            self._log.error(f"{exc.message}; the log goes on where it is")
            return
        os.dup2(fd, self._log.fd, inheritable=False)
        os.close(fd)

    def close(self) -> None:
        pass
