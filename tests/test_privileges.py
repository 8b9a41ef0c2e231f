"""Users and groups: what settings mean, what is refused, which variables follow. Becoming: tests/process."""

from __future__ import annotations

import os
import pwd
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apphost import privileges
from apphost.errors import PrivilegesError
from apphost.logs import open_log
from apphost.privileges import Account, changed_environment, find_group, find_user, parse_owner, resolve

ROOT = Account(0, 0, (0,), "root", "/root")
SITE = Account(1000, 1000, (1000, 33), "site", "/srv/site")


def as_user(monkeypatch: pytest.MonkeyPatch, uid: int, gid: int) -> None:
    for name, number in (("getuid", uid), ("geteuid", uid), ("getgid", gid), ("getegid", gid)):
        monkeypatch.setattr(os, name, lambda number=number: number)


def test_nothing_set_is_nothing_to_do() -> None:
    assert resolve("", "") is None


def test_a_user_comes_with_its_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """The primary group of the account unless another is named, and all others that it is a member of."""
    as_user(monkeypatch, 0, 0)
    monkeypatch.setattr(os, "getgrouplist", lambda name, gid: [gid, 42] if name == "nobody" else [])
    nobody = pwd.getpwnam("nobody")
    expected = Account(nobody.pw_uid, nobody.pw_gid, (nobody.pw_gid, 42), "nobody", nobody.pw_dir)
    assert resolve("nobody", "") == resolve(str(nobody.pw_uid), "") == expected
    other = resolve("nobody", "7")
    assert other is not None
    assert (other.gid, other.groups) == (7, (7, 42))


def test_a_number_without_an_account_needs_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """As containers have them; then it is in that group alone."""
    as_user(monkeypatch, 0, 0)
    assert resolve("3999999", "3999998") == Account(3999999, 3999998, (3999998,))
    with pytest.raises(PrivilegesError, match="needs `group` as well"):
        resolve("3999999", "")


@pytest.mark.parametrize("number", ["4294967295", "99999999999", "\u0663", "\xb2", "1" * 5000])
def test_numbers_that_no_system_call_takes(number: str) -> None:
    """The one below 2**32 means "leave it" to them: somebody would stay root."""
    with pytest.raises(PrivilegesError, match="there is no user"):
        find_user(number)
    with pytest.raises(PrivilegesError, match="there is no group"):
        find_group(number)


def test_without_root_only_what_one_is(monkeypatch: pytest.MonkeyPatch) -> None:
    nobody = pwd.getpwnam("nobody")
    as_user(monkeypatch, nobody.pw_uid, nobody.pw_gid)
    assert resolve("nobody", "") == resolve("", str(nobody.pw_gid))
    for user, group in (("root", ""), ("", "7"), ("nobody", "7")):
        with pytest.raises(PrivilegesError, match=f"only root may change them, and .* of user {nobody.pw_uid}, group"):
            resolve(user, group)


def test_a_group_alone_leaves_root_root(monkeypatch: pytest.MonkeyPatch) -> None:
    as_user(monkeypatch, 0, 0)
    with pytest.raises(PrivilegesError, match="group '7' alone would leave the workers root"):
        resolve("", "7")


# What goes wrong after the system calls have said that all is well


def pretend(monkeypatch: pytest.MonkeyPatch, account: Account, **answers: object) -> None:
    """System calls that succeed in making this process `account`, and `answers` of those that are asked afterwards."""

    def refuse(_number: int) -> None:
        raise PermissionError

    known: dict[str, object] = {
        "getresuid": lambda: (account.uid,) * 3,
        "getresgid": lambda: (account.gid,) * 3,
        "getgroups": lambda: list(account.groups),
        **dict.fromkeys(("setuid", "seteuid", "setgid", "setegid"), refuse),
        **answers,
    }
    for name, function in known.items():
        monkeypatch.setattr(os, name, function, raising=False)


def test_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, SITE)
    privileges._verify(SITE)


@pytest.mark.parametrize("way", ["setuid", "seteuid", "setgid", "setegid"])
def test_root_that_could_be_regained_is_refused(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    pretend(monkeypatch, SITE, **{way: lambda _number: None})
    with pytest.raises(PrivilegesError, match="root could be regained"):
        privileges._verify(SITE)


@pytest.mark.skipif(not hasattr(os, "getresuid"), reason="the system cannot be asked")
@pytest.mark.parametrize(
    ("what", "answer"),
    [("getresuid", (1000, 1000, 0)), ("getresgid", (0, 1000, 1000)), ("getgroups", [1000, 33, 0]), ("getgroups", [])],
)
def test_what_the_system_says_counts(monkeypatch: pytest.MonkeyPatch, what: str, answer: object) -> None:
    """A saved user of root, a group too many or too few."""
    pretend(monkeypatch, SITE, **{what: lambda: answer})
    with pytest.raises(PrivilegesError, match="did not make this process user 1000, group 1000"):
        privileges._verify(SITE)


# Environment


@pytest.mark.parametrize(
    ("environ", "changes"),
    [
        (
            {"HOME": "/root", "USER": "root", "LOGNAME": "root"},
            {"HOME": "/srv/site", "USER": "site", "LOGNAME": "site"},
        ),
        ({"HOME": "/srv/elsewhere", "USER": "deploy"}, {}),
        ({"PATH": "/bin"}, {}),
    ],
)
def test_what_is_still_roots_follows(environ: dict[str, str], changes: dict[str, str]) -> None:
    assert changed_environment(environ, ROOT, SITE) == changes
    assert changed_environment(environ, ROOT, ROOT) == {}
    assert changed_environment(environ, ROOT, Account(1000, 1000, (1000,))) == {}


# Owners


@pytest.mark.parametrize(
    ("text", "parts"), [("", ("", "")), ("a", ("a", "")), ("a:b", ("a", "b")), (":b", ("", "b")), ("1:2", ("1", "2"))]
)
def test_owner(text: str, parts: tuple[str, str]) -> None:
    assert parse_owner(text) == parts


@pytest.mark.parametrize("text", [":", "a:", "a:b:c", "::", ":a:"])
def test_no_owner(text: str) -> None:
    with pytest.raises(ValueError, match="expected USER, USER:GROUP or :GROUP"):
        parse_owner(text)


@given(st.text(max_size=12))
def test_owners_never_fail_otherwise(text: str) -> None:
    try:
        user, group = parse_owner(text)
    except ValueError:
        return
    assert text == f"{user}:{group}" if group else text == user


# The access log, which root opens where the workers have another user


def test_access_log_is_not_for_everybody(tmp_path: Path) -> None:
    """Query strings can hold secrets."""
    before = os.umask(0)
    try:
        os.close(open_log("access.log", str(tmp_path)))
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "access.log").stat().st_mode) == 0o640


def test_access_log_is_not_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "access.log").symlink_to(tmp_path / "other")
    with pytest.raises(OSError, match="symbolic links"):
        open_log("access.log", str(tmp_path), follow=False)
    assert not (tmp_path / "other").exists()
    os.close(open_log("access.log", str(tmp_path)))
    assert (tmp_path / "other").exists()


@pytest.mark.parametrize(("target", "fd"), [("-", 1), ("/dev/stdout", 1), ("/dev/stderr", 2), ("/dev/fd/2", 2)])
def test_access_log_to_what_is_open_already(target: str, fd: int) -> None:
    """Opened anew by its name, a pipe of another user is refused, and a socket always."""
    opened = open_log(target, "/somewhere", follow=False)
    try:
        assert opened != fd, "an application may close or redirect that one"
        assert os.path.sameopenfile(opened, fd)
    finally:
        os.close(opened)
