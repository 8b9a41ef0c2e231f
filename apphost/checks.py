"""What single settings may be: clean-up and checks of values. Pure; each raises `ValueError` with what is expected.

Imports of other modules are delayed, so that whoever only reads settings does not pay for them.
"""

from __future__ import annotations

import re


def usable_cpus() -> int:
    from apphost.cpu import usable_cpus

    return min(usable_cpus(), 1024)


def clean_app(app: str) -> str:
    """`module`, `module:attribute` or `module:factory()`; attribute may be dotted. Syntax only, nothing is imported."""
    module, colon, attribute = app.removesuffix("()").partition(":")
    names = module.split(".") + (attribute.split(".") if colon else [])
    if all(name.isidentifier() for name in names) or not app:
        return app
    hint = ": name the module instead of its file, as in an import" if "/" in app or app.endswith(".py") else ""
    raise ValueError(f"expected module:attribute, such as myproject.wsgi:application{hint}")


def clean_hook(hook: str) -> str:
    """`module:function`, both may be dotted. Syntax only, nothing is imported."""
    module, colon, attribute = hook.partition(":")
    if hook and not (colon and all(name.isidentifier() for name in (*module.split("."), *attribute.split(".")))):
        raise ValueError("expected module:function, such as mysite.hooks:worker_ready")
    return hook


def clean_bind(addresses: tuple[str, ...]) -> tuple[str, ...]:
    from apphost.sockets import parse_bind

    if not addresses:
        raise ValueError("expected at least one address")
    for number, address in enumerate(addresses):
        parse_bind(address)
        if address in addresses[:number]:
            raise ValueError(f"{address!r} is given twice")
    return addresses


def clean_root_path(path: str) -> str:
    if path and not path.startswith("/"):
        raise ValueError("expected a path that starts with '/'")
    return path.rstrip("/")


def clean_probe(path: str) -> str:
    if path and not re.fullmatch(r"/[!-~]*", path):
        raise ValueError("expected a path that starts with '/', in ASCII")
    return path


def clean_on_reload(entries: tuple[str, ...]) -> tuple[str, ...]:
    """`PATTERN=POLICY` or `POLICY`, the pattern one for paths."""
    from apphost.lifecycle import Policy

    words = [policy.value for policy in Policy]
    for entry in entries:
        pattern, equals, policy = entry.rpartition("=")
        if policy not in words or (equals and pattern[:1] not in ("/", "*")):
            raise ValueError(f"expected one of {', '.join(words)}, alone or behind a path, as in '/chat/*=rejoin'")
    return entries
