"""Bytecode of older source is not run: the rule, and imports in processes of their own."""

from __future__ import annotations

import compileall
import importlib.util
import os
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apphost.bytecode import GRANULARITY, is_trustworthy

RULE = "from apphost.bytecode import distrust_stale_bytecode; distrust_stale_bytecode(); "
SHOW = "import release; print(release.VERSION)"
NOON = 1_600_000_000 * 10**9  # ns; some whole second long ago
MOMENTS = st.integers(0, 2**63 - 1)


@pytest.mark.parametrize(
    ("written", "trusted"),
    [
        (NOON - 1, False),
        (NOON, False),
        (NOON + GRANULARITY, False),  # the same tick of a coarse clock may have had both
        (NOON + GRANULARITY + 1, True),
        (NOON + 10**9, True),
    ],
    ids=["older", "same", "same tick", "after the tick", "a second later"],
)
def test_bytecode_counts_only_when_it_is_clearly_younger(written: int, trusted: bool) -> None:
    assert is_trustworthy(NOON, written) is trusted


@given(MOMENTS, MOMENTS, st.integers(0, 2**40))
def test_trust_grows_with_the_age_of_the_source(changed: int, written: int, later: int) -> None:
    assert not (is_trustworthy(changed, written) and is_trustworthy(written, changed))
    if is_trustworthy(changed, written):
        assert is_trustworthy(changed, written + later)
    else:
        assert not is_trustworthy(changed + later, written)


def test_the_granularity_covers_the_slowest_kernel_clock() -> None:
    """Linux stamps files with the clock of its tick: HZ is 100 at the least."""
    assert GRANULARITY >= 2 * 10**9 // 100


# ------------------------------------------------------------------------------------------------- real imports


def source(folder: Path, version: str) -> Path:
    """A module of a fixed length and a fixed modification time, as an archive with fixed dates would leave it."""
    path = folder / "release.py"
    path.write_text(f"VERSION = {version!r}\n", encoding="utf-8")
    os.utime(path, ns=(NOON, NOON))
    return path


def bytecode(path: Path) -> Path:
    return Path(importlib.util.cache_from_source(str(path)))


def compiled(path: Path, after: int = 2 * GRANULARITY) -> Path:
    """The bytecode of `path`, written at least `after` ns after its last change."""
    changed = os.stat(path).st_ctime_ns
    while time.time_ns() <= changed + after:  # a few ms, until the coarse clock has moved on
        time.sleep(0.001)
    assert compileall.compile_file(path, quiet=2, force=True)
    return bytecode(path)


def run(folder: Path, code: str, **env: str) -> str:
    """What a fresh interpreter prints that imports from `folder`."""
    own = str(Path(__file__).resolve().parents[1])
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environ |= {"PYTHONPATH": os.pathsep.join([str(folder), own]), **env}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.strip()


def test_the_rule_is_needed(tmp_path: Path) -> None:
    """Python alone runs the old code: should it ever stop to, the module can go."""
    compiled(source(tmp_path, "one"))
    source(tmp_path, "two")
    assert run(tmp_path, SHOW) == "one"


def test_a_change_that_python_cannot_see_is_seen(tmp_path: Path) -> None:
    pyc = compiled(source(tmp_path, "one"))
    path = source(tmp_path, "two")
    assert run(tmp_path, RULE + SHOW) == "two"
    # It was compiled again; later imports have the new bytecode.
    assert b"two" in pyc.read_bytes()
    assert os.stat(pyc).st_mtime_ns > os.stat(path).st_ctime_ns


def test_a_package_and_its_modules_are_seen_too(tmp_path: Path) -> None:
    package = tmp_path / "shop"
    package.mkdir()
    (package / "__init__.py").write_text("from shop.release import VERSION\n")
    compiled(source(package, "one"))
    source(package, "two")
    assert run(tmp_path, RULE + "import shop; print(shop.VERSION)") == "two"


def test_a_renamed_file_is_a_changed_one(tmp_path: Path) -> None:
    """Tools that write beside the file and rename: the content that is there now has an older mtime than the code."""
    new = tmp_path / "new"
    new.mkdir()
    source(new, "two")
    compiled(source(tmp_path, "one"))
    source(new, "two").rename(tmp_path / "release.py")
    assert run(tmp_path, RULE + SHOW) == "two"


def test_fresh_bytecode_is_used(tmp_path: Path) -> None:
    """Told by bytecode that says something else than its source: it is what runs."""
    path = source(tmp_path, "one")
    source(tmp_path, "fake")
    fake = compiled(path).read_bytes()
    size = len(path.read_bytes())
    source(tmp_path, "real")
    assert len(path.read_bytes()) == size
    changed = os.stat(path).st_ctime_ns
    pyc = bytecode(path)
    pyc.write_bytes(fake)
    later = changed + GRANULARITY + 1
    os.utime(pyc, ns=(later, later))
    assert run(tmp_path, RULE + SHOW) == "fake"
    # Old enough to be doubtful, to the nanosecond: then the source is what counts.
    pyc.write_bytes(fake)
    doubtful = changed + GRANULARITY
    os.utime(pyc, ns=(doubtful, doubtful))
    assert run(tmp_path, RULE + SHOW) == "real"


def test_without_bytecode_nothing_is_different(tmp_path: Path) -> None:
    path = source(tmp_path, "one")
    assert run(tmp_path, RULE + SHOW, PYTHONDONTWRITEBYTECODE="1") == "one"
    assert not bytecode(path).exists()
    assert run(tmp_path, RULE + SHOW) == "one"
    assert bytecode(path).exists()


def test_a_cache_elsewhere_is_judged_too(tmp_path: Path) -> None:
    prefix = tmp_path / "cache"
    app = tmp_path / "app"
    app.mkdir()
    source(app, "one")
    assert run(app, RULE + SHOW, PYTHONPYCACHEPREFIX=str(prefix)) == "one"
    assert list(prefix.rglob("release.*.pyc"))
    source(app, "two")
    assert run(app, RULE + SHOW, PYTHONPYCACHEPREFIX=str(prefix)) == "two"


def test_bytecode_without_source_is_left_alone(tmp_path: Path) -> None:
    """A distribution of compiled modules only."""
    path = source(tmp_path, "one")
    compiled(path).rename(tmp_path / "release.pyc")
    path.unlink()
    assert run(tmp_path, RULE + SHOW) == "one"


def test_installed_packages_are_left_to_python(tmp_path: Path) -> None:
    """Their bytecode, often older than the files in an image, is used: the standard library is not compiled again."""
    stdlib = sysconfig.get_paths()["stdlib"]
    code = (
        "import importlib.machinery as m; read = []; old = m.SourceFileLoader.get_data\n"
        "m.SourceFileLoader.get_data = lambda self, path: (read.append(path), old(self, path))[1]\n"
        "from apphost.bytecode import distrust_stale_bytecode; distrust_stale_bytecode()\n"
        "import os; os.stat = None; read.clear(); import colorsys\n"  # without stat it could not judge
        "print(*read)"
    )
    read = run(tmp_path, code).split()
    assert read, "colorsys was imported"
    assert all(path.startswith(stdlib) for path in read)
