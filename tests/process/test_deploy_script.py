"""docs/deploy.sh: a deploy that goes through, one that is rolled back, and what is left behind by each."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.load import Load, ask, site
from tests.operating import status
from tests.support import Server, linux, wait_for, write_app

pytestmark = linux
SCRIPT = Path(__file__).parents[2] / "docs" / "deploy.sh"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    if shutil.which("flock") is None:
        pytest.skip("there is no flock(1)")
    sources = {"1": site("asgi", "one"), "2": site("asgi", "two"), "3": "import gone\n"}
    sources["4"] = site("asgi", "four") + "\ntime.sleep(600)\n"
    for number, source in sources.items():
        write_app(tmp_path / "releases" / number, "app", source)
    (tmp_path / "current").symlink_to("releases/1")
    return tmp_path


@pytest.fixture
def server(folder: Path) -> Iterator[Server]:
    args = ("--chdir", f"{folder}/current", "--workers", "2", "--pidfile", f"{folder}/pid")
    with Server("app:app", *args, cwd=folder) as server:
        yield server


def environment(folder: Path, timeout: str) -> dict[str, str]:
    told = {"SITE": str(folder), "PIDFILE": f"{folder}/pid", "TIMEOUT": timeout}
    return {**Server._environment({}), **told, "APPHOST": f"{sys.executable} -m apphost"}


def deploy(folder: Path, release: str, timeout: str = "60") -> subprocess.CompletedProcess[str]:
    env = environment(folder, timeout)
    return subprocess.run(
        ["sh", str(SCRIPT), release], env=env, capture_output=True, text=True, timeout=90, check=False
    )


def begin(folder: Path, release: str) -> subprocess.Popen[str]:
    """In a process group of its own, as of a terminal."""
    return subprocess.Popen(
        ["sh", str(SCRIPT), release], env=environment(folder, "60"), text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def current(folder: Path) -> str:
    return os.readlink(folder / "current")


def test_good_code_is_deployed_and_bad_code_rolled_back(folder: Path, server: Server) -> None:
    with Load(server.port, pause=0.01) as load:
        load.wait(20)
        done = deploy(folder, "releases/2")
        assert done.returncode == 0, done.stderr
        assert done.stdout.endswith("deploy: releases/2 serves\n")
        assert current(folder) == "releases/2"
        assert ask(server.port).version == "two"

        done = deploy(folder, "releases/3")
        assert done.returncode == 8
        assert "ModuleNotFoundError: No module named 'gone'" in done.stderr
        assert done.stderr.endswith("deploy: releases/3 is not served (exit code 8), back to releases/2\n")
        assert current(folder) == "releases/2"
        # A worker that has to be started later finds good code.
        victim = server.worker_pids()[0]
        os.kill(victim, 9)
        wait_for(lambda: len(server.worker_pids()) == 2 and victim not in server.worker_pids())
        assert {ask(server.port).version for _ in range(10)} == {"two"}
        load.wait(20)
    assert not [path for path in folder.iterdir() if path.name == "current.new"]


def test_code_that_hangs_is_rolled_back(folder: Path, server: Server) -> None:
    """The reload is not over, so another one takes its place."""
    done = deploy(folder, "releases/4", timeout="8")
    assert done.returncode == 11
    assert "back to releases/1" in done.stderr
    assert "failed, too" not in done.stderr
    assert current(folder) == "releases/1"
    found = status(server)
    assert (found["complete"], found["ok"]) == (3, True)
    assert {ask(server.port).version for _ in range(10)} == {"one"}


def test_another_reload_in_the_middle_is_no_failure(folder: Path, server: Server) -> None:
    """Such as that of logrotate: it brings the release as well."""
    wait = "\nwhile not os.path.exists('../../boot'): time.sleep(0.01)\n"
    write_app(folder / "releases" / "2", "app", site("asgi", "two") + wait)
    with begin(folder, "releases/2") as script:
        server.wait_line("gen 2 booting")
        server.signal(signal.SIGUSR1)
        server.wait_line("SIGUSR1 received")
        (folder / "boot").touch()
        said, _ = script.communicate(timeout=60)
    assert script.returncode == 0, said
    assert "generation 2 was superseded" in said
    assert said.endswith("deploy: releases/2 serves\n")
    assert current(folder) == "releases/2"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_deploy_is_rolled_back(folder: Path, server: Server, number: signal.Signals) -> None:
    with begin(folder, "releases/4") as script:
        server.wait_line("gen 2 booting")
        if number is signal.SIGINT:  # from a terminal, to everybody in the foreground
            os.killpg(script.pid, number)
        else:
            script.send_signal(number)
        said, _ = script.communicate(timeout=60)
    assert script.returncode == 128 + number, said
    assert f"deploy: releases/4 is not served (exit code {128 + number}), back to releases/1" in said
    assert "failed, too" not in said
    assert current(folder) == "releases/1"
    assert status(server)["ok"]


def test_what_cannot_even_begin(folder: Path) -> None:
    done = deploy(folder, "releases/9")
    assert (done.returncode, done.stderr) == (1, f"deploy: there is no directory releases/9 in {folder}\n")
    done = deploy(folder, "releases/2")
    assert done.returncode == 7
    assert "cannot read the pidfile" in done.stderr
    assert current(folder) == "releases/1"
    (folder / "current").unlink()
    done = deploy(folder, "releases/2")
    assert (done.returncode, done.stderr) == (1, f"deploy: {folder}/current is no symbolic link\n")
    with subprocess.Popen(["flock", f"{folder}/deploy.lock", "cat"], stdin=subprocess.PIPE) as other:
        wait_for(lambda: deploy(folder, "releases/2").stderr == "deploy: another deploy is running\n")
        assert other.stdin is not None
        other.stdin.close()
