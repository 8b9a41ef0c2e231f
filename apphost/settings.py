"""The settings: each one is a field of `Settings`, and everything else follows from the field.

From name, type, default and what `setting()` adds come the command line option, the `APPHOST_*` variable, the key in
`apphost.toml` or `[tool.apphost]` of pyproject.toml, the checks, the error texts and the table in the documents;
`sources` says which of them wins. This module imports nothing that a process without application code should not have;
`python -m apphost.settings --write FILE...` renews the table in documents.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from apphost.checks import (
    clean_access_log,
    clean_access_log_format,
    clean_admin,
    clean_allowed_hosts,
    clean_app,
    clean_bind,
    clean_control,
    clean_forwarded_fields,
    clean_hook,
    clean_on_reload,
    clean_owner,
    clean_patterns,
    clean_probe,
    clean_request_id_header,
    clean_root_path,
    clean_trusted_proxies,
    usable_cpus,
)
from apphost.values import KINDS, Setting

T = TypeVar("T")

ENV_PREFIX = "APPHOST_"
CONFIG_VARIABLE = "APPHOST_CONFIG"
_WEEK = 7 * 86400.0  # no deadline of a server is longer: such a number is milliseconds taken for seconds


def setting(default: T, heading: str, does: str, **about: Any) -> T:
    """A field of `Settings`; `about` fills the other attributes of `Setting`."""
    result: T = dataclasses.field(default=default, metadata={"heading": heading, "does": does, **about})
    return result


_MAIN, _APP, _DEVELOPMENT, _PROCESS = "Main settings", "Application", "Development", "Process"
_TIME, _RECYCLE, _LIMITS, _HTTP, _TLS, _PROXIES, _WS, _LOGS, _HOOKS = (
    "Timeouts", "Recycling of workers", "Limits", "HTTP", "TLS", "Proxies", "WebSockets", "Logs", "Hooks"
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """All settings of one run. Durations are seconds, sizes bytes. Immutable; made by `load` or `from_wire`."""

    # Unformatted, so that a field stays two or three short lines.
    # fmt: off
    app: str = setting("", _MAIN,
        "What to serve: `module:attribute`, `module:factory` with `factory`, or a module alone.",
        clean=clean_app, argument="APP")
    bind: tuple[str, ...] = setting(("127.0.0.1:8000",), _MAIN,
        "Where to listen: `HOST:PORT`, `[IPV6]:PORT`, `unix:PATH`, `fd://N`, `systemd:NAME`, `http://HOST:PORT` for no "
        "TLS; can be repeated.",
        short="-b", separator=",", clean=clean_bind, reloadable=False, metavar="ADDRESS",
        convention=("PORT", lambda port: [f"0.0.0.0:{port}"]))
    workers: int = setting(1, _MAIN,
        "Worker processes; `auto` is one for each CPU that the container may use.",
        short="-w", low=1, high=1024, words={"auto": usable_cpus}, convention=("WEB_CONCURRENCY", str))
    threads: int = setting(4, _MAIN, "Threads that run a WSGI application, in each worker.", low=1, high=1024)
    factory: bool = setting(False, _MAIN, "`app` names a function that makes the application.")
    chdir: str = setting("", _MAIN,
        "Directory to change to before loading; unless it is set in the settings file, that is looked up there too.",
        metavar="DIR")

    interface: str = setting("auto", _APP,
        "How the application is called; `auto` finds out.",
        choices=("auto", "asgi", "wsgi"), plugins="apphost.interfaces")
    lifespan: str = setting("auto", _APP,
        "ASGI lifespan; with `auto` an application without it is served too.", choices=("auto", "on", "off"))
    root_path: str = setting("", _APP,
        "Path below which the application is mounted (ASGI `root_path`, WSGI `SCRIPT_NAME`).",
        clean=clean_root_path, metavar="PATH")
    preload: bool = setting(False, _APP,
        "Import the application once for each generation and fork its workers from there: they share its memory.")
    ready_probe: str = setting("", _APP,
        "A worker is ready only when it has answered a GET of this path below 500; empty is off.",
        clean=clean_probe, metavar="PATH")
    pythonpath: tuple[str, ...] = setting((), _APP,
        f"Directories put in front of `sys.path`, separated by `{os.pathsep}`.", separator=os.pathsep, metavar="DIRS")

    reload: bool = setting(False, _DEVELOPMENT,
        "For development: reload when a file of the application is saved. Changes some defaults, see the guide.",
        reloadable=False)
    reload_on_error: str = setting("page", _DEVELOPMENT,
        "What is served while new code cannot be started: a `page` that says why, or what the last good code answers "
        "(`keep`).", choices=("page", "keep"))
    reload_dir: tuple[str, ...] = setting((), _DEVELOPMENT,
        "Directories to watch instead of the application's and those of `pythonpath`; can be repeated.",
        separator=os.pathsep, metavar="DIR")
    reload_include: tuple[str, ...] = setting((), _DEVELOPMENT,
        "Names of files to watch besides `*.py` and the settings file, as in `*.toml`; can be repeated.",
        separator=",", clean=clean_patterns, metavar="PATTERN")
    reload_exclude: tuple[str, ...] = setting((), _DEVELOPMENT,
        "Names of files and directories not to watch, besides what git ignores, as in `migrations`; can be repeated.",
        separator=",", clean=clean_patterns, metavar="PATTERN")
    reload_engine: str = setting("auto", _DEVELOPMENT,
        "How to watch; `auto` takes watchfiles when it is installed, else it polls. Poll where the system tells of no "
        "changes, as on some network and container mounts.", choices=("auto", "watchfiles", "polling"))

    pidfile: str = setting("", _PROCESS, "File for the pid of the arbiter.", reloadable=False, metavar="FILE")
    control: str = setting("auto", _PROCESS,
        "Socket for `apphost status` and the other commands: `auto` needs no file (Linux), `off`, or a path.",
        reloadable=False, clean=clean_control, metavar="auto|off|PATH")
    admin: str = setting("", _PROCESS,
        "Where to serve `/metrics`, `/healthz`, `/readyz` and a dashboard: `PORT` (of loopback), `HOST:PORT` or "
        "`unix:PATH`; empty is off.",
        reloadable=False, clean=clean_admin, metavar="ADDRESS")
    backlog: int = setting(2048, _PROCESS,
        "Connections that may wait to be accepted; the kernel caps it at `net.core.somaxconn`.",
        low=1, high=65535, reloadable=False)
    umask: int | None = setting(None, _PROCESS,
        "Permission bits taken from new files, in octal, such as `022`; in a settings file as text.",
        low=0, high=0o777, reloadable=False)
    user: str = setting("", _PROCESS, "User of the workers, a name or number.", reloadable=False, metavar="USER")
    group: str = setting("", _PROCESS, "Group of the workers, a name or number.", reloadable=False, metavar="GROUP")
    unix_socket_mode: int | None = setting(None, _PROCESS,
        "Permissions of Unix sockets, in octal, such as `660`; connecting needs `w`. Unset: what `umask` leaves.",
        low=0, high=0o777, reloadable=False)
    unix_socket_owner: str = setting("", _PROCESS,
        "Owner of Unix sockets: `USER`, `USER:GROUP` or `:GROUP`. Unset: `user` and `group`, when started as root.",
        clean=clean_owner, reloadable=False, metavar="OWNER")
    proc_name: str = setting("", _PROCESS,
        "Name in `ps` instead of `apphost`, with `apphost[proctitle]` installed.", reloadable=False, metavar="NAME")

    # A proxy in front commonly closes after 60 s; when it is not the first to close, it loses a request in the race.
    keep_alive: float = setting(75.0, _TIME,
        "An idle connection is closed after this; take more than the idle time of a proxy in front.",
        unit="s", low=0, high=_WEEK)
    request_header_timeout: float = setting(15.0, _TIME,
        "The head of a request must be complete within this, from its first byte.", unit="s", low=0.01, high=_WEEK)
    request_body_timeout: float = setting(30.0, _TIME,
        "A request body may stall, with no byte arriving, for this long.", unit="s", low=0.01, high=_WEEK)
    write_timeout: float = setting(60.0, _TIME,
        "A client may stop reading its response for this long.", unit="s", low=0.01, high=_WEEK)
    graceful_timeout: float = setting(30.0, _TIME,
        "A worker that is being replaced may finish its requests for this long.", unit="s", low=0, high=_WEEK)
    # `docker stop` kills after 10 s.
    stop_timeout: float = setting(8.0, _TIME,
        "The whole stop takes no longer; take less than the container runtime waits before it kills.",
        unit="s", low=0, high=_WEEK)
    boot_timeout: float = setting(60.0, _TIME,
        "A worker must be ready within this, with the application imported and started.",
        unit="s", low=0.01, high=_WEEK)
    timeout: float = setting(30.0, _TIME,
        "A worker whose event loop is blocked for this long is killed and replaced; 0 is never.",
        unit="s", low=0, high=_WEEK)

    shutdown_delay: float = setting(0.0, _TIME,
        "After the order to stop, serve on for this long first, for a balancer that needs time to notice.",
        unit="s", low=0, high=_WEEK)
    canary: float = setting(0.0, _TIME,
        "The first worker of new code serves alone of its kind for this long, and is judged by it; 0 is off.",
        unit="s", low=0, high=_WEEK)

    max_requests: int = setting(0, _RECYCLE, "Replace a worker after this many requests; 0 is never.", low=0)
    max_requests_jitter: int = setting(0, _RECYCLE,
        "A random number up to this is added to `max_requests`, so that workers do not retire together.", low=0)
    max_rss: int = setting(0, _RECYCLE,
        "Replace a worker whose memory (RSS) has grown beyond this; 0 is never.", unit="bytes", low=0)
    max_lifetime: float = setting(0.0, _RECYCLE,
        "Replace a worker that has served for this long; 0 is never.", unit="s", low=0, high=_WEEK)
    max_lifetime_jitter: float = setting(0.0, _RECYCLE,
        "A random time up to this is added to `max_lifetime`.", unit="s", low=0, high=_WEEK)

    # 8190 is Apache's LimitRequestLine and LimitRequestFieldSize; RFC 9112 section 3 asks for a line of 8000 or more.
    # 100 fields are Apache's LimitRequestFields. A longer field or more of them is answered 431 (RFC 6585 section 5).
    limit_request_line: int = setting(8190, _LIMITS, "Longest request line.", unit="bytes", low=64, high=2**20)
    limit_request_fields: int = setting(100, _LIMITS, "Most header fields in a request.", low=1, high=32768)
    limit_request_field_size: int = setting(8190, _LIMITS,
        "Longest header field, name and value.", unit="bytes", low=64, high=2**20)
    limit_request_head: int = setting(65536, _LIMITS,
        "Largest head of a request, request line and all fields.", unit="bytes", low=64, high=2**24)
    limit_request_body: int = setting(0, _LIMITS, "Largest request body; 0 is no limit.", unit="bytes", low=0)
    limit_chunk_extension: int = setting(256, _LIMITS,
        "Longest extension of one chunk of a body.", unit="bytes", low=0, high=2**16)
    limit_trailers: int = setting(8192, _LIMITS,
        "Largest trailer section after a chunked body.", unit="bytes", low=0, high=2**20)
    # About one read of a socket (uvloop 64 KiB, asyncio up to 256). Bytes and not requests, as bytes are what a waiting
    # request costs: 64 KiB are some hundred requests of a browser, and no browser has more than one.
    limit_pipelined: int = setting(65536, _LIMITS,
        "Pipelined requests that may wait behind the one in progress, on one connection; more are not read.",
        unit="bytes", low=0, high=2**20)
    limit_connections: int = setting(10000, _LIMITS,
        "Connections that one worker holds; more wait in the backlog.", low=1, high=2**20)
    # Off, as uvicorn's `limit_concurrency`: what an application can bear at once only its operator knows.
    limit_requests: int = setting(0, _LIMITS,
        "Requests and open WebSockets that one worker has in progress; more are answered 503 with `Retry-After`. "
        "0 is no limit.", low=0, high=2**20)

    http: str = setting("auto", _HTTP,
        "HTTP/1.1 parser; `auto` takes httptools when it is installed.",
        choices=("auto", "h11", "httptools"), plugins="apphost.parsers")
    loop: str = setting("auto", _HTTP,
        "Event loop; `auto` takes uvloop when it is installed.", choices=("auto", "asyncio", "uvloop"))
    underscore_headers: str = setting("drop", _HTTP,
        "What to do with `_` in a header name, which a WSGI application cannot tell from `-`.",
        choices=("drop", "refuse", "allow"))
    server_header: bool = setting(True, _HTTP, "Send the header `Server`.")
    date_header: bool = setting(True, _HTTP, "Send the header `Date`.")

    tls_certfile: tuple[str, ...] = setting((), _TLS,
        "Certificate in PEM, with the chain behind it. With it all TCP listeners speak TLS, except those bound as "
        "`http://HOST:PORT`. Repeated, the host name that a client asks for chooses; the first is for all others.",
        separator=os.pathsep, metavar="FILE")
    tls_keyfile: tuple[str, ...] = setting((), _TLS,
        "Private key in PEM, one for each `tls_certfile` and in their order; without any the keys are in those files.",
        separator=os.pathsep, metavar="FILE")
    tls_ca_certs: str = setting("", _TLS, "CA certificates in PEM that client certificates are checked with.",
        metavar="FILE")
    tls_client_certs: str = setting("none", _TLS,
        "Ask clients for a certificate; one that is not valid ends the handshake in any case.",
        choices=("none", "optional", "required"))
    tls_minimum: str = setting("1.2", _TLS, "Oldest version of TLS.", choices=("1.2", "1.3"))
    tls_ciphers: str = setting("", _TLS,
        "Cipher suites of TLS 1.2, as OpenSSL writes them; empty is Python's choice. Those of TLS 1.3 are fixed.",
        metavar="LIST")
    # What Go's http.DefaultTransport gives it; asyncio and nginx take 60 s, which is long for two round trips.
    tls_handshake_timeout: float = setting(10.0, _TLS,
        "The handshake must be complete within this.", unit="s", low=0.01, high=_WEEK)
    # The rhythm in which Kubernetes renews mounted secrets, and some stat calls a minute cost nothing.
    tls_watch_interval: float = setting(60.0, _TLS,
        "Look for renewed certificates after this; 0 is never, then a reload takes them.", unit="s", low=0, high=_WEEK)
    trusted_proxies: tuple[str, ...] = setting((), _PROXIES,
        "Peers that are believed when they say for whom they ask: addresses, networks such as `10.0.0.0/8`, `unix` for "
        "Unix sockets, `*` for everybody; can be repeated.",
        separator=",", clean=clean_trusted_proxies, metavar="ADDRESS")
    # Not both: of the one that the proxy does not write, all would be the client's.
    forwarded_headers: str = setting("x-forwarded", _PROXIES,
        "What trusted proxies write, `X-Forwarded-*` or `Forwarded` (RFC 7239); the other is not read.",
        choices=("x-forwarded", "forwarded", "none"))
    # A proxy that writes any of them writes these two; the others it may hand through as a client has sent them.
    forwarded_fields: tuple[str, ...] = setting(("for", "proto"), _PROXIES,
        "What is believed of it, of `for`, `proto`, `host`, `port`, `prefix`; only what your proxy always sets.",
        separator=",", clean=clean_forwarded_fields, metavar="FIELD")
    proxy_protocol: bool = setting(False, _PROXIES,
        "Connections of trusted proxies begin with a PROXY protocol header, version 1 or 2; others never do.")
    allowed_hosts: tuple[str, ...] = setting(("*",), _PROXIES,
        "Names that the Host header may have; other requests are answered 421. `.example.org` is that name and all "
        "below it, `*.example.org` all below it, `*` any; can be repeated.",
        separator=",", clean=clean_allowed_hosts, metavar="HOST")

    ws: str = setting("auto", _WS,
        "Serve WebSockets; with `none` their handshakes are requests like any other.", choices=("auto", "none"))
    ws_compression: bool = setting(True, _WS, "Agree to permessage-deflate (RFC 7692) where a client offers it.")
    ws_ping_interval: float = setting(20.0, _WS,
        "Send a ping after this, and again after each answer; 0 is never.", unit="s", low=0, high=_WEEK)
    ws_ping_timeout: float = setting(20.0, _WS,
        "A client must answer a ping within this, or its socket is closed with 1011.", unit="s", low=0.01, high=_WEEK)
    ws_close_timeout: float = setting(10.0, _WS,
        "A client must answer our close within this.", unit="s", low=0.01, high=_WEEK)
    ws_on_reload: tuple[str, ...] = setting(("close",), _WS,
        "What becomes of open sockets when their worker is replaced: `close` (with 1012), `rejoin` or `resume`, for "
        "all or for a path, as in `/chat/*=rejoin`. The first that matches counts; can be repeated.",
        separator=",", clean=clean_on_reload, metavar="RULE")
    # What uvicorn and hypercorn allow, too; the websockets library takes 1 MiB.
    limit_ws_message: int = setting(2**24, _WS,
        "Largest message of a WebSocket, after inflation.", unit="bytes", low=1, high=2**31)

    access_log: str = setting("", _LOGS,
        "One line for each request to this file; `-` is stdout, `syslog:`, `syslog:/PATH` and `syslog:udp://HOST:PORT` "
        "are syslog.", clean=clean_access_log, metavar="FILE")
    access_log_format: str = setting("auto", _LOGS,
        "`common`, `combined`, `json`, or a template such as `%(h)s %(r)s %(s)s`; `auto` is `json` where `log_format` "
        "is, else `common` with the duration.", clean=clean_access_log_format, metavar="FORMAT")
    error_log: str = setting("", _LOGS,
        "apphost's own log to this file; empty is stderr.", reloadable=False, metavar="FILE")
    log_level: str = setting("info", _LOGS,
        "Least level that is logged.", choices=("debug", "info", "warning", "error"))
    log_format: str = setting("text", _LOGS, "Lines for people or for machines.", choices=("text", "json"))
    log_query: bool = setting(True, _LOGS,
        "Write query strings of requests into the logs; without, `?...` stands in their place.")
    log_config: str = setting("", _LOGS,
        "JSON or TOML file for `logging.config.dictConfig`, applied before the application is imported.",
        metavar="FILE")
    request_id_header: str = setting("", _LOGS,
        "Header field for an id of each request, such as `X-Request-ID`: taken from trusted proxies, else made; it "
        "goes to the application, the client and the access log. Empty is off.",
        clean=clean_request_id_header, metavar="NAME")

    on_arbiter_start: str = setting("", _HOOKS,
        "Function to call at the start, in a process of its own, as `module:function`.",
        clean=clean_hook, metavar="HOOK", reloadable=False)
    on_reload: str = setting("", _HOOKS,
        "Function to call when a reload is complete or given up, in a process of its own.",
        clean=clean_hook, metavar="HOOK")
    on_worker_start: str = setting("", _HOOKS,
        "Function to call in a worker before it imports the application.", clean=clean_hook, metavar="HOOK")
    on_worker_ready: str = setting("", _HOOKS,
        "Function to call in a worker once it serves.", clean=clean_hook, metavar="HOOK")
    on_worker_drain: str = setting("", _HOOKS,
        "Function to call in a worker when it begins to drain.", clean=clean_hook, metavar="HOOK")
    on_worker_exit: str = setting("", _HOOKS,
        "Function to call in a worker when it has drained, before it ends.", clean=clean_hook, metavar="HOOK")
    hook_timeout: float = setting(10.0, _HOOKS,
        "A hook that takes longer is left behind, or killed when it has a process of its own.",
        unit="s", low=0.01, high=_WEEK)
    # fmt: on

    def to_wire(self) -> dict[str, Any]:
        """A JSON-safe dict of all settings, for another process."""
        values = {name: getattr(self, name) for name in SETTINGS}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> Settings:
        """The reverse of `to_wire`. As versions may differ, unknown keys are ignored and missing ones default."""
        known = ((name, value) for name, value in wire.items() if name in SETTINGS)
        values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in known}
        return cls(**values)


# Other defaults with `reload`, for the terminal of one who saves, looks and presses Ctrl-C. What is set counts as ever.
DEVELOPMENT_DEFAULTS: Mapping[str, Any] = {
    "timeout": 0.0,  # a breakpoint blocks the loop for as long as somebody thinks
    "graceful_timeout": 1.0,  # an open stream of old code is not what is wanted after a save
    "stop_timeout": 1.2,  # requests get 0.2 s, and 1 s is left to the lifespan (`fleet.KILL_GRACE`)
    "access_log": "-",
}

SETTINGS: Mapping[str, Setting] = {
    field.name: Setting(
        name=field.name,
        default=field.default,
        kind=KINDS[str(field.type), field.metadata.get("unit", "")],
        **field.metadata,
    )
    for field in dataclasses.fields(Settings)
}


def restart_needed(old: Settings, new: Settings) -> tuple[str, ...]:
    """Names of the settings that differ and that a reload cannot change."""
    return tuple(
        name for name, this in SETTINGS.items() if not this.reloadable and getattr(old, name) != getattr(new, name)
    )


def keep_fixed(running: Settings, new: Settings) -> Settings:
    """`new`, with what a reload cannot change as it is in `running`."""
    return dataclasses.replace(new, **{name: getattr(running, name) for name in restart_needed(running, new)})


BEGIN, END = "<!-- settings:begin -->", "<!-- settings:end -->"


def settings_table() -> str:
    """All settings as Markdown, a table for each group."""
    lines: list[str] = []
    for heading in dict.fromkeys(this.heading for this in SETTINGS.values()):
        lines += [f"**{heading}**", "", "| Setting | Command line | Variable | Default | What it does |"]
        lines += ["|---|---|---|---|---|"]
        lines += [_row(this) for this in SETTINGS.values() if this.heading == heading] + [""]
    return "\n".join(lines)


def _row(this: Setting) -> str:
    variables = [ENV_PREFIX + this.name.upper(), *filter(None, this.convention[:1])]
    default = this.show(this.default)
    cells = (
        f"`{this.name}`",
        ", ".join(f"`{text}`" for text in this.spellings),
        ", ".join(f"`{variable}`" for variable in variables),
        f"`{default}`" if default else "",
        this.describe(choices=True).replace("|", "\\|"),
    )
    return f"| {' | '.join(cells)} |"


def renew(document: str) -> str:
    """`document` with the current table between its markers. ValueError when it does not have them."""
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"no {BEGIN} ... {END}")
    return f"{before}{BEGIN}\n\n{settings_table()}\n{END}{after}"


def _write(paths: list[str]) -> None:
    for path in paths:
        with open(path, encoding="utf-8") as file:
            document = file.read()
        with open(path, "w", encoding="utf-8") as file:
            file.write(renew(document))


if __name__ == "__main__":
    if sys.argv[1:2] != ["--write"] or len(sys.argv) < 3:
        raise SystemExit("usage: python -m apphost.settings --write FILE...")
    _write(sys.argv[2:])
