"""The arbiter's processes: the parts that need none."""

from __future__ import annotations

import errno
import os

import pytest

from apphost.arbiter import admin, processes


@pytest.mark.parametrize(
    "start", [lambda: processes.start_process("", "/", []), lambda: admin.start_process("/", [])], ids=["any", "admin"]
)
def test_a_process_that_cannot_be_started_leaves_no_descriptor(start: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is tried again for as long as the system has no processes left."""

    def fork() -> int:
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(os, "fork", fork)
    before = sorted(os.listdir("/dev/fd"))
    assert callable(start)
    with pytest.raises(OSError, match="temporarily unavailable"):
        start()
    assert sorted(os.listdir("/dev/fd")) == before
