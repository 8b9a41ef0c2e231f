"""The watcher's pure parts, and its looks at a tree of files and at git; no process of apphost, no sleep."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Collection
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apphost.errors import SettingsError
from apphost.watcher import engines, git
from apphost.watcher.engines import POLL_LONGEST, POLL_SHORTEST, Polling, choose
from apphost.watcher.rules import LONGEST, QUIET, TOOLS, Burst, Names, Rules, Stamp, changed_since, differences
from apphost.watcher.tree import Tree

needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="needs git")

# ------------------------------------------------------------------------------------------------------------- bursts


def test_a_burst_is_over_when_it_is_quiet() -> None:
    burst = Burst(10.0, ["a"])
    assert burst.left(10.0) == pytest.approx(QUIET)
    burst.add(10.04, ["b"])
    assert burst.left(10.04) == pytest.approx(QUIET)
    burst.add(10.09, [])
    assert burst.left(10.09) == 0.0
    assert burst.paths == {"a", "b"}


@given(st.lists(st.floats(0.001, QUIET * 0.9), min_size=1, max_size=100))
def test_a_burst_without_an_end_is_told_of_in_time(pauses: list[float]) -> None:
    now = 0.0
    burst = Burst(now, ["0"])
    for number, pause in enumerate(pauses):
        now += pause
        burst.add(now, [str(number)])
        left = burst.left(now)
        assert 0.0 <= left <= QUIET + 1e-9
        assert left == 0.0 or now + left <= LONGEST + 1e-9


# -------------------------------------------------------------------------------------------------------------- rules


def stamp(inode: int = 1, size: int = 1, modified: int = 1, changed: int = 1) -> Stamp:
    return Stamp(inode, size, modified, changed)


def test_what_is_a_difference() -> None:
    before = {"same": stamp(), "gone": stamp(), "bigger": stamp(), "replaced": stamp(), "set back": stamp()}
    after = {"same": stamp(), "new": stamp(), "bigger": stamp(size=2), "replaced": stamp(inode=2),
             "set back": stamp(changed=2)}  # fmt: skip
    assert differences(before, after) == {"gone", "new", "bigger", "replaced", "set back"}
    assert differences(after, after) == set()
    assert changed_since({"a": stamp(changed=5), "b": stamp(modified=9, changed=4)}, 4) == {"a"}


def test_which_files_count() -> None:
    rules = Rules(["*.toml", "words.txt"], ["secret.*", "conftest.py"])
    names = ["a.py", "a.pyc", "a.toml", "words.txt", "other.txt", "secret.py", "conftest.py", "py"]
    assert [name for name in names if rules.counts(name)] == ["a.py", "a.toml", "words.txt"]


@pytest.mark.parametrize("name", [*TOOLS[:-2], "x.egg-info", ".git", ".venv", ".mypy_cache", "migrations"])
def test_which_directories_are_not_entered(name: str) -> None:
    assert not Rules([], ["migrations"]).enters(name)
    assert Rules().enters("package")


def test_git_knows_better_what_is_built() -> None:
    rules = Rules(by_git=True)
    assert rules.enters("build")
    assert rules.enters("env")
    assert not rules.enters("__pycache__")
    assert not rules.enters("node_modules")


def test_what_the_tree_is_looked_at_for() -> None:
    rules = Rules(["*.txt"], ["out"], named=["apphost.toml"])
    assert all(map(rules.may_matter, ["a.py", "a.txt", ".gitignore", "apphost.toml", "package"]))
    assert not any(map(rules.may_matter, ["a.log", "__pycache__", ".a.py.swp", "a.pyc", "node_modules", "out"]))


def test_no_pattern_matches_nothing() -> None:
    assert "" not in Names([])
    assert "a" not in Names([])


# --------------------------------------------------------------------------------------------------------------- tree


def tree_of(root: Path, **about: object) -> Tree:
    tree = Tree([str(root)], [], Rules(), **about)  # type: ignore[arg-type]
    tree.first_look(0)
    return tree


def found(tree: Tree, root: Path) -> set[str]:
    return {os.path.relpath(path, root) for path in tree.look()}


def test_looks_at_a_tree(tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "a.py").write_text("1")
    tree = tree_of(tmp_path)
    assert tree.look() == set()
    (tmp_path / "package" / "b.py").write_text("1")
    (tmp_path / "package" / "b.txt").write_text("1")
    assert found(tree, tmp_path) == {"package/b.py"}
    (tmp_path / "new.py").write_text("1")
    os.replace(tmp_path / "new.py", tmp_path / "a.py")
    assert found(tree, tmp_path) == {"a.py"}, "the same content, size and perhaps time, but another file"
    (tmp_path / "package").rename(tmp_path / "other")
    assert found(tree, tmp_path) == {"package/b.py", "other/b.py"}
    shutil.rmtree(tmp_path / "other")
    assert found(tree, tmp_path) == {"other/b.py"}
    shutil.rmtree(tmp_path)
    assert found(tree, tmp_path) == {"a.py"}
    tmp_path.mkdir()
    (tmp_path / "a.py").write_text("2")
    assert found(tree, tmp_path) == {"a.py"}


def test_the_first_look_finds_what_is_newer_than_the_code_that_is_served(tmp_path: Path) -> None:
    (tmp_path / "old.py").write_text("1")
    (tmp_path / "new.py").write_text("1")
    times = {name: os.stat(tmp_path / name).st_ctime_ns for name in ("old.py", "new.py")}
    tree = Tree([str(tmp_path)], [], Rules())
    assert tree.first_look(max(times.values())) == set()
    assert tree.first_look(0) == {str(tmp_path / name) for name in times}
    os.utime(tmp_path / "old.py", (0, 0))
    assert str(tmp_path / "old.py") in tree.first_look(times["old.py"] - 1), "no tool can set the time of a change"


def test_single_files_are_seen_when_they_come_and_go(tmp_path: Path) -> None:
    config = tmp_path / "etc" / "site.toml"
    tree = Tree([str(tmp_path / "site")], [str(config)], Rules())
    tree.first_look(0)
    assert tree.places == {}
    config.parent.mkdir()
    config.write_text("1")
    assert tree.look() == {str(config)}
    assert list(tree.places) == [str(config.parent)]
    config.unlink()
    assert tree.look() == {str(config)}


def test_links(tmp_path: Path) -> None:
    """A file behind a link counts, a directory behind one does not, and a root that is a link is followed anew."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.py").write_text(name)
    (tmp_path / "one" / "round").symlink_to(tmp_path / "one")
    (tmp_path / "one" / "b.py").symlink_to(tmp_path / "two" / "a.py")
    current = tmp_path / "current"
    current.symlink_to("one")
    tree = tree_of(current)
    assert {os.path.relpath(path, current) for path in tree.files} == {"a.py", "b.py"}
    (tmp_path / "two" / "a.py").write_text("another")
    assert found(tree, current) == {"b.py"}
    before = tree.places
    current.unlink()
    current.symlink_to("two")
    assert found(tree, current) == {"a.py", "b.py"}
    assert tree.places != before, "so the system is asked to watch the other directory"


def test_a_tree_without_end_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("apphost.watcher.tree.MOST", 5)
    for number in range(9):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "a.py").write_text("")
    tree = tree_of(tmp_path)
    assert tree.full
    assert len(tree.files) + len(tree.directories) == 5


def test_each_path_is_asked_about_once_and_a_level_at_once(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    for path in ("a/1.py", "a/b/2.py", "3.py"):
        (tmp_path / path).write_text("")
    asked: list[set[str]] = []

    def ignored(root: str, paths: Collection[str]) -> set[str]:
        asked.append({os.path.relpath(path, root) for path in paths})
        return {path for path in paths if path.endswith("/b")}

    tree = tree_of(tmp_path, ignored=ignored)
    assert asked == [{"a", "3.py"}, {"a/b", "a/1.py"}]
    assert str(tmp_path / "a" / "b") not in tree.directories
    (tmp_path / "3.py").write_text("changed")
    (tmp_path / "4.py").write_text("")
    assert found(tree, tmp_path) == {"3.py", "4.py"}
    assert asked[2:] == [{"4.py"}]
    (tmp_path / ".gitignore").write_text("")
    assert found(tree, tmp_path) == set(), "what counts may be other files, of which none has changed"
    assert asked[3:] == [{"a", "3.py", "4.py"}, {"a/b", "a/1.py"}]


# ---------------------------------------------------------------------------------------------------------------- git


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    (tmp_path / ".gitignore").write_text("*.tmp.py\nbuild/\n!kept.tmp.py\n")
    return tmp_path


@needs_git
def test_what_git_ignores(repository: Path) -> None:
    (repository / "build").mkdir()
    names = ["a.py", "b.tmp.py", "kept.tmp.py", "build", "sub/c.tmp.py", "ä b.tmp.py", "-x.tmp.py", "tracked.tmp.py"]
    (repository / "sub").mkdir()
    (repository / "tracked.tmp.py").write_text("")
    subprocess.run(["git", "-C", str(repository), "add", "-f", "tracked.tmp.py"], check=True)
    paths = {str(repository / name): name for name in names}
    answer = git.ignored(str(repository), list(paths))
    assert {paths[path] for path in answer} == {"b.tmp.py", "build", "sub/c.tmp.py", "ä b.tmp.py", "-x.tmp.py"}
    assert git.is_in_repository(str(repository / "sub"))


@needs_git
def test_a_path_that_git_refuses_does_not_spoil_the_others(repository: Path, tmp_path: Path) -> None:
    (repository / "real").mkdir()
    (repository / "link").symlink_to(repository / "real")
    paths = [str(repository / "link" / "a.tmp.py"), str(repository / "b.tmp.py"), str(repository / "c.py")]
    assert str(repository / "b.tmp.py") in git.ignored(str(repository), paths)
    assert str(repository / "c.py") not in git.ignored(str(repository), paths)


def test_without_git_or_a_repository_nothing_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert not git.is_in_repository(str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not git.is_in_repository(str(tmp_path))
    assert git.ignored(str(tmp_path), [str(tmp_path / "a.py")]) == set()


# ------------------------------------------------------------------------------------------------------------- engines


def test_polling_takes_a_small_share_of_a_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(engines.time, "sleep", slept.append)
    for cost in (0.0, 0.001, 0.1, 9.0):
        Polling().wait(cost)
    assert slept == [POLL_SHORTEST, POLL_SHORTEST, pytest.approx(2.0), POLL_LONGEST]


def test_an_engine_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "watchfiles._rust_notify", None)
    assert choose("auto", Rules()).name == "polling"
    with pytest.raises(SettingsError, match=r"apphost\[reload\]"):
        choose("watchfiles", Rules())
