"""What can go wrong with a deploy, and how a release can be put in place: the site goes on, or runs the new code."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import sys
import sysconfig
import venv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click
import h11
import pytest
import wsproto

from tests.load import INTERFACES, Load, ask, check, serving, site
from tests.support import RawClient, Server, wait_for, write_app

each_interface = pytest.mark.parametrize("interface", INTERFACES)
each_preload = pytest.mark.parametrize("preload", [False, True], ids=["lazy", "preload"])

NO_BYTECODE = "PYTHONDONTWRITEBYTECODE"


def options(preload: bool) -> tuple[str, ...]:
    return ("--preload",) if preload else ()


# ------------------------------------------------------------------------------------------------- disasters


@dataclass(frozen=True)
class Disaster:
    """A deploy that cannot work. `why`: the reason in the line that gives it up; `shown`: what else the log must have.

    do: puts it into the directory of the server. undo: what a good deploy does not do by itself.
    """

    do: Callable[[Path], object]
    why: str
    shown: tuple[str, ...] = ()
    undo: Callable[[Path], object] = lambda folder: None


def code(source: str) -> Callable[[Path], object]:
    return lambda folder: write_app(folder, "app", source)


def half(folder: Path) -> None:
    """The new module is there, the one that it imports is not yet."""
    write_app(folder, "app", "from shop.models import Basket\n" + site("asgi", "half"))
    (folder / "shop").mkdir(exist_ok=True)
    (folder / "shop" / "__init__.py").touch()


IN_APP = r'File ".*app\.py", line \d+'
HANGS = r"it was not ready within boot_timeout, 6 s: the application hangs"
LIFESPAN = "async def app(scope, receive, send):\n    assert scope['type'] == 'lifespan'\n    "

DISASTERS = {
    "SyntaxError": Disaster(code("def app(:\n"), "'app:app' raised SyntaxError", (IN_APP, r"def app\(:")),
    "ImportError": Disaster(
        code("from json import no_such_name\n"), "'app:app' raised ImportError", (IN_APP, "cannot import name")
    ),
    "missing attribute": Disaster(
        code("application_ = 1\napplicati0n = 2\n"), "module 'app' has no attribute 'app' for the application"
    ),
    "half deployed": Disaster(
        half,
        "'app:app' raised ModuleNotFoundError",
        (IN_APP, "No module named 'shop.models'"),
        lambda folder: shutil.rmtree(folder / "shop"),
    ),
    "deleted": Disaster(lambda folder: (folder / "app.py").unlink(), "there is no module 'app' for the application"),
    "settings": Disaster(
        lambda folder: (folder / "apphost.toml").write_text("workers = \n"),
        r"apphost\.toml is not valid TOML",
        undo=lambda folder: (folder / "apphost.toml").unlink(),
    ),
    "sys.exit": Disaster(code("import sys\nsys.exit(0)\n"), "'app:app' ended itself with SystemExit", (IN_APP,)),
    "os._exit": Disaster(code("import os\nos._exit(1)\n"), r"ended early \(exit 1\)"),
    "segfault": Disaster(
        code("import faulthandler\nfaulthandler._sigsegv()\n"),
        r"ended early \(died of SIGSEGV\)",
        ("Fatal Python error: Segmentation fault", IN_APP),
    ),
    "import hangs": Disaster(
        code("import time\ndef hang_here():\n    time.sleep(600)\nhang_here()\n"), HANGS, (IN_APP, "in hang_here")
    ),
    "lifespan.startup.failed": Disaster(
        code(LIFESPAN + "await send({'type': 'lifespan.startup.failed', 'message': 'no database'})\n"), "no database"
    ),
    "lifespan hangs": Disaster(code("import asyncio\n" + LIFESPAN + "await asyncio.sleep(600)\n"), HANGS),
}
GROUPS = {
    "wrong": ("SyntaxError", "ImportError", "missing attribute", "half deployed", "deleted", "settings"),
    "dead": ("sys.exit", "os._exit", "segfault"),
    "stuck": ("import hangs", "lifespan.startup.failed", "lifespan hangs"),
}


def suffer(server: Server, disaster: Disaster, serves: int) -> int:
    """Deploy it and see it given up for `serves`, the generation that goes on; the number of the one that did not."""
    before = ask(server.port)
    disaster.do(server.cwd)
    mark = server.mark()
    server.signal(signal.SIGUSR1)
    pattern = rf"error generation (\d+) given up: (.*)\. Generation {serves} keeps serving; mend .* reload again"
    match = server.wait_line(pattern, after=mark)
    assert re.search(disaster.why, match[2]), f"the reason is {match[2]!r}"
    for shown in disaster.shown:
        server.wait_line(shown, after=mark)
    assert ask(server.port) == before, "the same worker with the same code"
    server.wait_line(rf"worker \d+ gen {match[1]} (could not boot|gone)|settings file", after=mark)
    said = "\n".join(server.lines(mark))
    assert len(re.findall("given up", said)) == 1
    disaster.undo(server.cwd)
    return int(match[1])


def test_every_disaster_is_tried() -> None:
    assert sorted(DISASTERS) == sorted(kind for group in GROUPS.values() for kind in group)


@each_interface
@each_preload
@pytest.mark.parametrize("group", GROUPS)
def test_a_deploy_that_fails_is_given_up_and_nobody_notices(
    tmp_path: Path, interface: str, preload: bool, group: str
) -> None:
    """One failure after the other, then a good deploy: it needs a second to be imported, and is taken at once."""
    timeout = ("--boot-timeout", "6") if group == "stuck" else ()
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(serving(tmp_path, interface, *options(preload), *timeout))
        with Load(server.port, clients=2, pause=0.02) as load, RawClient(server.port) as idle:
            first = check(idle.request("GET", "/"))
            for number, kind in enumerate(GROUPS[group], 2):
                assert suffer(server, DISASTERS[kind], serves=1) == number
            slow = "\ntime.sleep(1)\n" if not timeout else ""
            mark = server.mark()
            write_app(tmp_path, "app", site(interface, "two", slow))
            assert server.reload() == number + 1
            assert len(re.findall(r"gen \d+ booting", "\n".join(server.lines(mark)))) == 1, "at the first attempt"
            load.wait(20)
            assert check(idle.request("GET", "/")).version == "two", "the connection is still there"
    assert load.report.lost == []
    assert load.report.versions == ["one", "two"]
    assert len(load.report.pids) == 2, "the first worker has served through it all"
    assert load.report.pids[0] == first.pid
    assert load.report.announced == 0


# ------------------------------------------------------------------------------------------------- releases


def releases(folder: Path, *versions: str) -> list[Path]:
    return [write_app(folder / "releases" / version, "app", site("asgi", version)).parent for version in versions]


def switch(link: Path, target: Path) -> None:
    """As deploy tools do: at no moment there is no link."""
    new = link.with_name("new")
    new.symlink_to(target)
    new.rename(link)


@each_preload
@pytest.mark.parametrize("how", ["--chdir", "cwd"])
def test_a_switched_link_leads_to_the_new_release(tmp_path: Path, how: str, preload: bool) -> None:
    """`current` points to a release that is deleted as soon as the next is there."""
    current = tmp_path / "current"
    one, two, three = releases(tmp_path, "one", "two", "three")
    switch(current, one)
    if how == "cwd":
        context = Server("app:app", *options(preload), cwd=current, env={"PWD": str(current)})
    else:
        context = Server("app:app", "--chdir", "current", *options(preload), cwd=tmp_path)
    with context as server, Load(server.port, clients=2, pause=0.02) as load:
        load.wait(10)
        for old, new in ((one, two), (two, three)):
            switch(current, new)
            shutil.rmtree(old)
            server.reload()
            load.wait(10)
        server.reload()  # nothing has changed: the same release once more
        load.wait(10)
        assert ask(server.port).version == "three"
    assert load.report.lost == []
    assert load.report.versions == ["one", "two", "three"]


def test_a_worker_that_dies_after_the_switch_is_replaced(tmp_path: Path) -> None:
    """Between the switch and the reload: the old release is gone, but the site must not be."""
    current = tmp_path / "current"
    one, two = releases(tmp_path, "one", "two")
    switch(current, one)
    with Server("app:app", "--preload", "--chdir", "current", cwd=tmp_path) as server:
        before = ask(server.port)
        switch(current, two)
        shutil.rmtree(one)
        os.kill(before.pid, signal.SIGKILL)
        server.wait_line("worker 2 gen 1 ready")
        assert ask(server.port).version == "one"
        server.reload()
        assert ask(server.port).version == "two"


def test_a_release_with_settings_of_its_own(tmp_path: Path) -> None:
    """The settings file of the new release counts, and a release whose file is broken is given up."""
    current = tmp_path / "current"
    one, two, three = releases(tmp_path, "one", "two", "three")
    (one / "apphost.toml").write_text("workers = 1\n")
    (two / "apphost.toml").write_text("workers = true\n")
    (three / "apphost.toml").write_text("workers = 2\n")
    switch(current, one)
    with Server("app:app", "--chdir", "current", cwd=tmp_path) as server:
        switch(current, two)
        server.signal(signal.SIGUSR1)
        server.wait_line(r"generation 2 given up: .*workers.*current/apphost\.toml.*Generation 1 keeps serving")
        assert ask(server.port).version == "one"
        switch(current, three)
        server.reload()
        server.wait_line("generation 3 is serving app:app with 2 workers")
        assert ask(server.port).version == "three"


# ------------------------------------------------------------------------------------- edits that are hard to see

FIXED = 1_577_880_000  # 2020, as an archive with one date for all files would have it


@each_preload
@pytest.mark.parametrize("times", ["same second", "fixed date"])
def test_an_edit_that_python_cannot_see_is_run(tmp_path: Path, times: str, preload: bool) -> None:
    """Of the same length, and with a modification time in the same second; the bytecode of the old code is there."""
    release = tmp_path / "shop" / "release.py"
    release.parent.mkdir()
    (release.parent / "__init__.py").touch()

    def deploy(version: str) -> None:
        before = release.stat() if release.exists() else None
        release.write_text(f"VERSION = {version!r}\n")
        if times == "fixed date":
            os.utime(release, (FIXED, FIXED))
        elif before is not None:
            later = before.st_mtime_ns // 10**9 * 10**9 + 998_000_000
            os.utime(release, ns=(later, later))
        if before is not None:
            after = release.stat()
            assert (before.st_size, before.st_mtime_ns // 10**9) == (after.st_size, after.st_mtime_ns // 10**9)

    write_app(tmp_path, "app", site("asgi") + "\nfrom shop.release import VERSION\n")
    deploy("aaa")
    with Server("app:app", *options(preload), cwd=tmp_path, env={NO_BYTECODE: None}) as server:
        for version in ("bbb", "ccc", "ddd"):
            assert list(release.parent.glob("__pycache__/release.*.pyc"))
            deploy(version)
            server.reload()
            assert ask(server.port).version == version
        assert server.stop() == 0


# ------------------------------------------------------------------------------------------- upgraded dependencies


def dependency(folder: Path, version: str) -> None:
    """Install the package `dep` as installers do: the old files go, new ones come."""
    shutil.rmtree(folder / "dep", ignore_errors=True)
    (folder / "dep").mkdir(parents=True)
    (folder / "dep" / "__init__.py").write_text(f"VERSION = {version!r}\n")


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """`environment(NAME) -> site-packages` of a new virtual environment; servers run in the one at `venv`."""

    def make(name: str) -> Path:
        folder = tmp_path / name
        venv.create(folder, symlinks=True, with_pip=False)
        packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
        packages = folder / packages.relative_to(folder)
        needed = {Path(module.__file__ or "").parents[1] for module in (click, h11, wsproto)}
        (packages / "ours.pth").write_text("".join(f"{place}\n" for place in needed))
        return packages

    monkeypatch.setattr(sys, "executable", str(tmp_path / "venv" / "bin" / "python"))
    return make


DEPENDS = site("asgi") + "\nfrom dep import VERSION\n"


@each_preload
def test_an_upgraded_dependency_is_used(tmp_path: Path, environment: Callable[[str], Path], preload: bool) -> None:
    packages = environment("venv")
    dependency(packages, "d1")
    write_app(tmp_path / "srv", "app", DEPENDS)
    with Server("app:app", *options(preload), cwd=tmp_path / "srv", env={NO_BYTECODE: None}) as server:
        assert ask(server.port).version == "d1"
        assert list(packages.glob("dep/__pycache__/*.pyc"))
        dependency(packages, "d2")
        server.reload()
        assert ask(server.port).version == "d2"
        shutil.rmtree(packages / "dep")
        server.signal(signal.SIGUSR1)
        server.wait_line("generation 3 given up: .*ModuleNotFoundError.*Generation 2 keeps serving")
        server.wait_line("No module named 'dep'")
        assert server.stop() == 0


def test_a_changed_pth_file_is_read(tmp_path: Path, environment: Callable[[str], Path]) -> None:
    """As `pip install -e` leaves it: a line that names where the code is."""
    packages = environment("venv")
    for version in ("d1", "d2"):
        dependency(tmp_path / version, version)
    write_app(tmp_path / "srv", "app", DEPENDS)
    pth = packages / "dep.pth"
    pth.write_text(f"{tmp_path / 'd1'}\n")
    with Server("app:app", cwd=tmp_path / "srv") as server:
        assert ask(server.port).version == "d1"
        pth.write_text(f"{tmp_path / 'd2'}\n")
        server.reload()
        assert ask(server.port).version == "d2"
        assert server.stop() == 0


def test_a_switched_virtual_environment_is_used(tmp_path: Path, environment: Callable[[str], Path]) -> None:
    for version in ("d1", "d2"):
        dependency(environment(version), version)
    link = tmp_path / "venv"
    switch(link, tmp_path / "d1")
    write_app(tmp_path / "srv", "app", DEPENDS)
    with Server("app:app", cwd=tmp_path / "srv") as server, Load(server.port, clients=2, pause=0.02) as load:
        load.wait(10)
        switch(link, tmp_path / "d2")
        shutil.rmtree(tmp_path / "d1")
        server.reload()
        load.wait(10)
        assert ask(server.port).version == "d2"
    assert load.report.lost == []


def test_a_dependency_in_a_directory_of_pythonpath(tmp_path: Path) -> None:
    """A vendored package, replaced while the server runs, under `--pythonpath` and under PYTHONPATH."""
    dependency(tmp_path / "vendor", "v1")
    write_app(tmp_path / "srv", "app", DEPENDS)
    with Server("app:app", "--pythonpath", "../vendor", cwd=tmp_path / "srv") as server:
        assert ask(server.port).version == "v1"
        dependency(tmp_path / "vendor", "v2")
        server.reload()
        assert ask(server.port).version == "v2"
        assert wait_for(lambda: len(server.worker_pids()) == 1)
        assert server.stop() == 0
