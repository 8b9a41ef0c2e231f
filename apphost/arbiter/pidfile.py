"""The pidfile: who runs is told by a lock on it, not by guessing from a number that may be another process's by now."""

from __future__ import annotations

import fcntl
import os

from apphost.errors import AlreadyRunningError, PrivilegesError


class PidFile:
    """A locked file with the pid of this process and a newline. The lock ends with the process, however it ends."""

    def __init__(self, path: str) -> None:
        """Take the lock and write the pid. Raises `AlreadyRunningError` or `PrivilegesError`."""
        self.path = path
        self._fd = self._open_locked()
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, b"%d\n" % os.getpid(), 0)

    @classmethod
    def adopt(cls, path: str, fd: int) -> PidFile:
        """The pidfile that the program before this one, in the same process, has locked."""
        pidfile = cls.__new__(cls)
        pidfile.path = path
        pidfile._fd = fd
        return pidfile

    def fileno(self) -> int:
        return self._fd

    def _open_locked(self) -> int:
        while True:
            try:
                fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            except OSError as exc:
                raise PrivilegesError(f"cannot write the pidfile {self.path}: {exc.strerror}") from None
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                pid = os.pread(fd, 32, 0).decode("ascii", "replace").strip()
                os.close(fd)
                raise AlreadyRunningError(
                    f"apphost is running already: process {pid or 'unknown'} holds the pidfile {self.path}"
                ) from None
            if self._is_at_path(fd):
                return fd
            os.close(fd)  # its owner removed it between our open and our lock: try the new one

    def _is_at_path(self, fd: int) -> bool:
        try:
            return os.path.samestat(os.fstat(fd), os.stat(self.path))
        except OSError:
            return False

    def remove(self) -> None:
        """Remove the file, if it is still ours, and give up the lock."""
        if self._is_at_path(self._fd):
            try:
                os.unlink(self.path)
            except OSError:
                pass  # a directory that privileges were dropped from: an unlocked file hurts nobody
        os.close(self._fd)
