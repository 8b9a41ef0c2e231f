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


def clean_owner(owner: str) -> str:
    from apphost.privileges import parse_owner

    parse_owner(owner)
    return owner


def clean_admin(address: str) -> str:
    """`PORT` alone is one of the loopback interface: what is told there is not for everybody."""
    from apphost.sockets import parse_bind

    if address.isascii() and address.isdigit():
        address = f"127.0.0.1:{address}"
    if address and parse_bind(address).scheme:
        raise ValueError("expected PORT, HOST:PORT, [IPV6]:PORT or unix:PATH, without a scheme")
    return address


def clean_control(value: str) -> str:
    from apphost.endpoint import AUTO, OFF
    from apphost.sockets import parse_bind

    if value not in (AUTO, OFF):
        if "/" not in value:
            raise ValueError(f"expected {AUTO}, {OFF}, or a path with a '/'")
        parse_bind(f"unix:{value}")
    return value


def clean_root_path(path: str) -> str:
    if path and not path.startswith("/"):
        raise ValueError("expected a path that starts with '/'")
    return path.rstrip("/")


def clean_probe(path: str) -> str:
    if path and not re.fullmatch(r"/[!-~]*", path):
        raise ValueError("expected a path that starts with '/', in ASCII")
    return path


def clean_trusted_proxies(entries: tuple[str, ...]) -> tuple[str, ...]:
    from apphost.values import parse_network

    for entry in entries:
        try:
            known = entry in ("unix", "*") or parse_network(entry)
        except ValueError as exc:
            raise ValueError(f"expected an address, a network such as 10.0.0.0/8, unix or *: {exc}") from None
        assert known
    return entries


def clean_forwarded_fields(entries: tuple[str, ...]) -> tuple[str, ...]:
    fields = ("for", "proto", "host", "port", "prefix")
    entries = tuple(entry.lower() for entry in entries)
    if not entries or not set(entries) <= set(fields):
        raise ValueError(f"expected some of {', '.join(fields)}")
    return entries


def clean_allowed_hosts(entries: tuple[str, ...]) -> tuple[str, ...]:
    """A name, `.name`, `*.name`, an IPv4 address, an IPv6 address in brackets, or `*`; without a port."""
    for entry in entries:
        if entry != "*" and not re.fullmatch(r"(\*?\.)?[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*|\[[0-9A-Fa-f:.]+\]", entry):
            raise ValueError("expected names such as example.org, .example.org or *.example.org, without a port, or *")
    if not entries:
        raise ValueError("expected at least one name; * is any")
    return entries


def clean_on_reload(entries: tuple[str, ...]) -> tuple[str, ...]:
    """`PATTERN=POLICY` or `POLICY`, the pattern one for paths."""
    from apphost.lifecycle import Policy

    words = [policy.value for policy in Policy]
    for entry in entries:
        pattern, equals, policy = entry.rpartition("=")
        if policy not in words or (equals and pattern[:1] not in ("/", "*")):
            raise ValueError(f"expected one of {', '.join(words)}, alone or behind a path, as in '/chat/*=rejoin'")
    return entries


def clean_access_log(target: str) -> str:
    if target.startswith("syslog:"):
        from apphost.logfiles import parse_syslog

        parse_syslog(target.removeprefix("syslog:"))
    return target


def clean_access_log_format(text: str) -> str:
    from apphost.access import check_format

    return check_format(text)


# Fields that mean something to the server, or to every recipient: an id in them would break the message.
_NO_ID = frozenset(
    ("authorization", "connection", "content-length", "content-type", "cookie", "date", "expect", "forwarded", "host",
     "keep-alive", "proxy", "server", "set-cookie", "te", "trailer", "transfer-encoding", "upgrade")
)  # fmt: skip


def clean_request_id_header(name: str) -> str:
    """The name of a field of its own; without `_`, since WSGI cannot tell that from `-`."""
    if name and (not re.fullmatch(r"[A-Za-z0-9-]{1,64}", name) or name.lower().startswith("sec-")):
        raise ValueError("expected the name of a header field, such as X-Request-ID")
    if name.lower() in _NO_ID:
        raise ValueError("expected a header field of its own, such as X-Request-ID")
    return name


def clean_patterns(entries: tuple[str, ...]) -> tuple[str, ...]:
    """Names with `*`, `?` and `[...]`, as a shell knows them."""
    for entry in entries:
        if not entry.strip() or "/" in entry:
            raise ValueError("expected names such as *.toml or migrations, without a directory")
    return entries
