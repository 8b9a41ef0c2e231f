"""What a container does to a server, without a container (requirement 4).

Process 1 of a pid namespace, a user that is not root and has no capability, and not one file system that it may write
to: as `docker run --read-only --cap-drop ALL` of deploy/Dockerfile, and the security context of deploy/kubernetes.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.load import Load, ask, serving, site
from tests.process.test_arbiter import reaps_orphans
from tests.rawhttp import RawClient
from tests.support import descendants, linux, moment, pid_namespace, wait_for, write_app

pytestmark = linux

DOCKER_KILLS_AFTER = 10.0  # s after `docker stop`

# Not a second user of the machine, as that one need not be able to read the interpreter: a namespace in which we are
# user 10001, which takes away root's powers just as well.
READ_ONLY = """
for place in / /tmp /dev/shm; do
    if mountpoint -q $place; then mount -o remount,bind,ro $place || exit 1; fi
done
exec unshare --user --map-user=10001 --map-group=10001 "$@"
"""

CONFINED = """
def confined():
    found = [str(os.getuid()), str(os.getpid())]
    found += [line.split()[1] for line in open("/proc/self/status") if line.startswith("CapEff")]
    for folder in (".", "/tmp", "/dev/shm"):
        try:
            open(os.path.join(folder, "written"), "w")
            found.append("writable")
        except OSError as exc:
            found.append(exc.strerror)
    return found

say("confined: " + " | ".join(confined()))
"""


def container() -> list[str]:
    """The prefix for a `Server` in such a place; skips the test where that is not permitted."""
    root = () if os.geteuid() == 0 else ("--user", "--map-root-user")
    prefix = [*pid_namespace("--mount", "--mount-proc", *root), "sh", "-c", READ_ONLY, "sh"]
    probe = [*prefix, sys.executable, "-c", "import apphost"]
    if subprocess.run(probe, capture_output=True, check=False).returncode != 0:
        pytest.skip("no permission for a read-only root")
    return prefix


def test_read_only_not_root_and_process_1(tmp_path: Path) -> None:
    """Start, reload under load, an orphan, and a stop that Docker need not hurry."""
    with serving(tmp_path, "asgi", "--workers", "2", "--access-log", "-", prefix=container(), extra=CONFINED) as server:
        arbiter = descendants(server.pid)[0]
        assert "starts app:app with 2 workers, pid 1" in server.log
        confined = server.wait_line(r"^confined: 10001 \| \d+ \| (\S+) \| (.*)$")
        assert int(confined[1], 16) == 0, "no capability"
        assert confined[2].split(" | ") == ["Read-only file system"] * 3

        with Load(server.port, clients=2, pause=0.02) as load:
            load.wait(10)
            write_app(tmp_path, "app", site("asgi", "two", CONFINED))
            os.kill(arbiter, signal.SIGUSR1)
            server.wait_line("generation 2 is serving")
            load.wait(10)
        assert load.report.lost == []
        assert ask(server.port).version == "two"
        reaps_orphans(server, arbiter, tmp_path)

        with RawClient(server.port) as stuck:
            stuck.send(b"GET /wait/forever HTTP/1.1\r\nHost: x\r\n\r\n")
            server.wait_line("/wait/forever in progress")
            os.kill(arbiter, signal.SIGTERM)
            assert server.wait_exit() == 0
        asked = server.wait_line(".* SIGTERM received")
        cut = server.wait_line(".* cut 1 requests short at the end of its drain")
        assert moment(cut[0]) - moment(asked[0]) < DOCKER_KILLS_AFTER - 1, "and the rest takes no time"
        server.wait_line("stopped, exit 0")
        wait_for(lambda: not descendants(server.pid), what="the namespace to be empty")
