"""Users and groups: whom the workers become, and who owns a Unix socket.

`resolve` decides, from the account database; `become` does, and makes sure that there is no way back.
"""

from __future__ import annotations

import grp
import os
import pwd
from collections.abc import Mapping
from dataclasses import dataclass

from apphost.errors import PrivilegesError

_ID_MAX = 2**32 - 2  # of a user or group; the one above means "leave it" to the system calls


@dataclass(frozen=True, slots=True)
class Account:
    """Whom a process becomes. groups: the supplementary ones. name, home: empty for a number without an account."""

    uid: int
    gid: int
    groups: tuple[int, ...]
    name: str = ""
    home: str = ""


def resolve(user: str, group: str) -> Account | None:
    """What the settings `user` and `group` (names or numbers, empty: not set) mean; None when nothing is to change.

    Raises `PrivilegesError` for names that do not exist, and for what this process could not become.
    """
    if not user and not group:
        return None
    gid = find_group(group) if group else None
    if not user:
        if os.geteuid() == 0:
            raise PrivilegesError(f"group {group!r} alone would leave the workers root: set `user` as well")
        account = _account_of(os.geteuid(), gid)
    else:
        account = _find_account(user, gid)
    if os.geteuid() != 0 and not _is_this_process(account):
        raise PrivilegesError(
            f"cannot become user {user or 'unchanged'}, group {group or 'unchanged'}: only root may change them, "
            f"and this process is of user {os.geteuid()}, group {os.getegid()}"
        )
    return account


def find_group(group: str) -> int:
    """The number of a group; any number is one, with a name or without. Raises `PrivilegesError`."""
    try:
        return _number(group) if group.isdigit() else grp.getgrnam(group).gr_gid
    except (KeyError, ValueError):
        raise PrivilegesError(f"there is no group {group!r}") from None


def find_user(user: str) -> int:
    """The number of a user; any number is one. Raises `PrivilegesError`."""
    try:
        return _number(user) if user.isdigit() else pwd.getpwnam(user).pw_uid
    except (KeyError, ValueError):
        raise PrivilegesError(f"there is no user {user!r}") from None


def _number(text: str) -> int:
    number = int(text) if text.isascii() and len(text) <= 10 else -1
    if not 0 <= number <= _ID_MAX:
        raise ValueError(text)
    return number


def _find_account(user: str, gid: int | None) -> Account:
    uid = find_user(user)
    try:
        return _account_of(uid, gid)
    except KeyError:
        pass
    if gid is None:  # in a container the number need not stand in its database, but then nothing tells its group
        raise PrivilegesError(f"there is no user {user!r}; a number without an account needs `group` as well")
    return Account(uid, gid, (gid,))


def _account_of(uid: int, gid: int | None) -> Account:
    """Raises `KeyError` for a user without an account, unless it is the one that this process is of."""
    try:
        entry = pwd.getpwuid(uid)
    except KeyError:
        if uid != os.geteuid():
            raise
        return Account(uid, os.getegid() if gid is None else gid, tuple(os.getgroups()))
    gid = entry.pw_gid if gid is None else gid
    return Account(uid, gid, tuple(os.getgrouplist(entry.pw_name, gid)), entry.pw_name, entry.pw_dir)


def _is_this_process(account: Account) -> bool:
    return {os.getuid(), os.geteuid()} == {account.uid} and {os.getgid(), os.getegid()} == {account.gid}


def become(account: Account) -> None:
    """Give up root for `account`, with its groups and for good. Raises `PrivilegesError`; then this process must end.

    The environment follows where it still is root's. A process that is not root must be `account` already.
    """
    if os.geteuid() != 0:
        return
    before = _account_of(0, None)
    try:
        os.setgroups(account.groups)
        os.setgid(account.gid)
        os.setuid(account.uid)
    except PermissionError:
        raise PrivilegesError(
            f"cannot become user {account.name or account.uid}, group {account.gid}: this process is root, but without "
            "the capabilities CAP_SETUID and CAP_SETGID"
        ) from None
    if account.uid != 0:
        _verify(account)
    os.environ.update(changed_environment(os.environ, before, account))


def _verify(account: Account) -> None:
    """Ask the system who we are, and whether root could come back: what it says counts, not what was asked of it."""
    ways = [(os.setuid, 0), (os.seteuid, 0)]
    if account.gid != 0:
        ways += [(os.setgid, 0), (os.setegid, 0)]
    for way, number in ways:
        try:
            way(number)
        except PermissionError:
            continue
        raise PrivilegesError(f"after becoming user {account.uid}, group {account.gid}, root could be regained")
    if hasattr(os, "getresuid"):  # elsewhere the list of groups has others as well
        kept = os.getresuid() != (account.uid,) * 3 or os.getresgid() != (account.gid,) * 3
        if kept or set(os.getgroups()) - {account.gid} != set(account.groups) - {account.gid}:
            raise PrivilegesError(f"the system did not make this process user {account.uid}, group {account.gid}")


def changed_environment(environ: Mapping[str, str], before: Account, after: Account) -> dict[str, str]:
    """HOME, USER and LOGNAME where they are still those of `before`: libraries look for their files there. Pure.

    What somebody has set to something else was meant, and what is not set stays so.
    """
    if after.uid == before.uid or not after.name:
        return {}
    names = {"HOME": (before.home, after.home), **dict.fromkeys(("USER", "LOGNAME"), (before.name, after.name))}
    return {name: new for name, (old, new) in names.items() if environ.get(name) == old}


def check_readable(path: str, account: Account) -> None:
    """Raises `PrivilegesError` when this process, after `become`, cannot read what it still has to import."""
    if not os.access(path, os.R_OK):
        raise PrivilegesError(
            f"user {account.name or account.uid} cannot read {path}: install apphost and the application where that "
            "user may read, not below the home directory of root"
        )


def parse_owner(text: str) -> tuple[str, str]:
    """`USER`, `USER:GROUP` or `:GROUP` to (user, group), empty for what is not named. Pure. Raises `ValueError`."""
    user, colon, group = text.partition(":")
    if text and (":" in group or (colon and not group) or not (user or group)):
        raise ValueError("expected USER, USER:GROUP or :GROUP")
    return user, group
