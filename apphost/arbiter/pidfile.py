"""The pidfile: who runs is told by a lock on it, not by guessing from a number that may be another process's by now.

It comes to its place complete and locked, under a name of its own until then: whoever reads it finds a whole number,
and a file that somebody else left there, stale or to be written through, is replaced and never written to.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat

from apphost.errors import AlreadyRunningError, PrivilegesError

_TRIES = 100  # to meet a path that others create and remove all the time; each try needs one of them to interfere


class PidFile:
    """A locked file with the pid of this process and a newline. The lock ends with the process, however it ends."""

    def __init__(self, path: str) -> None:
        """Take the lock and write the pid. Raises `AlreadyRunningError` or `PrivilegesError`."""
        self.path = path
        try:
            self._fd = self._create()
        except OSError as exc:
            why = "it is a symbolic link" if exc.errno in (errno.ELOOP, errno.EMLINK) else exc.strerror
            raise PrivilegesError(f"cannot write the pidfile {path}: {why}") from None

    @classmethod
    def adopt(cls, path: str, fd: int) -> PidFile:
        """The pidfile that the program before this one, in the same process, has locked."""
        pidfile = cls.__new__(cls)
        pidfile.path = path
        pidfile._fd = fd
        return pidfile

    def fileno(self) -> int:
        return self._fd

    def _create(self) -> int:
        folder, name = os.path.split(self.path)
        draft = os.path.join(folder, f".{name}.{os.urandom(8).hex()}")
        fd = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.write(fd, b"%d\n" % os.getpid())
            self._publish(draft)
        except BaseException:
            os.close(fd)
            raise
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(draft)
        return fd

    def _publish(self, draft: str) -> None:
        """Bring `draft` to the path: where nothing is, or in place of a file that nobody holds."""
        for _ in range(_TRIES):
            try:
                os.link(draft, self.path)
                return
            except FileExistsError:
                pass
            try:
                stale = self._lock_stale()
            except FileNotFoundError:
                continue  # its owner has removed it just now
            try:
                # Who wants to replace it, too, does not get this lock, or only when the file is not there any more.
                if is_at_path(stale, self.path):
                    os.rename(draft, self.path)
                    return
            finally:
                os.close(stale)
        raise OSError(errno.EBUSY, "others replace it all the time")

    def _lock_stale(self) -> int:
        """The descriptor of the file that is there, locked. Raises `AlreadyRunningError` when somebody holds it."""
        # Not blocking: it may be a pipe. Not through a link: in a folder that others may write to, it leads anywhere.
        fd = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            mode = os.fstat(fd).st_mode
            if stat.S_ISDIR(mode):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            if not stat.S_ISREG(mode):
                raise OSError(errno.EEXIST, "something that is no file is in its place")
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.pread(fd, 32, 0).decode("ascii", "replace").strip()
            os.close(fd)
            raise AlreadyRunningError(
                f"apphost is running already: process {pid if pid.isdigit() else 'unknown'} holds the pidfile "
                f"{self.path}"
            ) from None
        except BaseException:
            os.close(fd)
            raise
        return fd

    def remove(self) -> None:
        """Remove the file, if it is still ours, and give up the lock."""
        if is_at_path(self._fd, self.path):
            try:
                os.unlink(self.path)
            except OSError:
                pass  # a folder that is not ours to write to by now: an unlocked file hurts nobody
        os.close(self._fd)


def is_at_path(fd: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.lstat(path))
    except OSError:
        return False
