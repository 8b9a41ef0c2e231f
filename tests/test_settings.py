"""Settings: precedence, error texts, wire format and documents, made from the fields. No file is read but documents."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from apphost import settings as module
from apphost.errors import ExitCode, SettingsError
from apphost.settings import SETTINGS, Settings
from apphost.sources import Loaded, Source, resolve
from apphost.values import Setting

ROOT = pathlib.Path(__file__).parent.parent
ALL = list(SETTINGS.values())
FILE = "/srv/shop/apphost.toml"

# Settings whose values have a syntax of their own.
SAMPLES = {
    "app": ("pkg.one:app", "pkg.two:app"),
    "bind": ("127.0.0.1:8001", "127.0.0.1:8002"),
    "root_path": ("/one", "/two"),
    "ready_probe": ("/one", "/two?x=1"),
    "umask": ("022", "027"),
    "access_log_format": ("combined", "%(h)s %(status)s"),
    "unix_socket_mode": ("600", "660"),
    "tls_keyfile": ("one.key", "two.key"),
    "control": ("off", "/run/site/control"),
    "admin": ("127.0.0.1:9090", "unix:/run/site/admin"),
    "ws_on_reload": ("rejoin", "/chat/*=resume"),
    "trusted_proxies": ("10.0.0.0/8", "unix"),
    "forwarded_fields": ("for", "proto"),
    **{
        f"on_{name}": ("site_hooks:one", "site.hooks:two")
        for name in ("arbiter_start", "reload", "worker_start", "worker_ready", "worker_drain", "worker_exit")
    },
}


def samples(this: Setting) -> tuple[Any, Any]:
    """Two different values as a settings file writes them; the first is not the default."""
    if this.name in SAMPLES:
        first, second = SAMPLES[this.name]
        return ([first], [second]) if this.is_list else (first, second)
    if isinstance(this.default, bool):
        return not this.default, this.default
    if this.choices:
        return this.choices[-1], this.choices[0]
    if isinstance(this.default, (int, float)):
        base = 9000 if this.unit == "bytes" else 65
        return (base, base + 1) if (this.high or base) >= base else (64, 65)
    return (["one"], ["two", "three"]) if this.is_list else ("one", "two")


def as_text(this: Setting, toml: Any) -> str:
    if isinstance(toml, bool):
        return "yes" if toml else "no"
    return this.separator.join(toml) if isinstance(toml, list) else str(toml)


def as_cli(toml: Any) -> object:
    return toml if isinstance(toml, (bool, list)) else str(toml)


def value_of(this: Setting, toml: Any) -> Any:
    return this.convert(toml, typed=True)


def sources(this: Setting) -> list[str]:
    return ["cli", "env", *(["convention"] if this.convention[0] else []), "file"]


# What some settings cannot do without.
COMPANIONS: dict[str, dict[str, Any]] = {
    "tls_keyfile": {"tls_certfile": ["one.pem"]},
    "tls_ca_certs": {"tls_certfile": ["one.pem"], "tls_client_certs": "optional"},
    "tls_client_certs": {"tls_certfile": ["one.pem"], "tls_ca_certs": "ca.pem"},
    "proxy_protocol": {"trusted_proxies": ["10.0.0.1"]},
}


def given_by(this: Setting, chosen: Mapping[str, Any]) -> Loaded:
    """Resolve with a value of `this` from each source in `chosen`."""
    cli: dict[str, object] = {}
    environ: dict[str, str] = {}
    table: dict[str, Any] = dict(COMPANIONS.get(this.name, {}))
    for source, toml in chosen.items():
        if source == "cli":
            cli[this.name] = as_cli(toml)
        elif source == "env":
            environ[f"APPHOST_{this.name.upper()}"] = as_text(this, toml)
        elif source == "convention":
            environ[this.convention[0]] = as_text(this, toml).rpartition(":")[2]
        else:
            table[this.name] = toml
    return resolve(cli, environ, table, FILE)


def expected(this: Setting, source: str, toml: Any) -> tuple[Any, str]:
    value = value_of(this, toml)
    if source == "convention" and this.name == "bind":
        value = tuple(address.replace("127.0.0.1", "0.0.0.0") for address in value)
    origin = {
        "cli": "command line",
        "env": f"environment APPHOST_{this.name.upper()}",
        "convention": f"environment {this.convention[0]}",
        "file": f"file {FILE}",
    }[source]
    return value, origin


EACH = [(this, source) for this in ALL for source in sources(this)]
PAIRS = [
    (this, high, low) for this in ALL for rank, high in enumerate(sources(this)) for low in sources(this)[rank + 1 :]
]


@pytest.mark.parametrize(("this", "source"), EACH, ids=[f"{this.name}-{source}" for this, source in EACH])
def test_each_source_sets_each_setting(this: Setting, source: str) -> None:
    toml = samples(this)[0]
    loaded = given_by(this, {source: toml})
    value, origin = expected(this, source, toml)
    assert getattr(loaded.settings, this.name) == value
    assert value != this.default
    assert loaded.origins[this.name] == origin
    others = {name for name, text in loaded.origins.items() if text not in ("default", "default with reload")}
    assert others - set(COMPANIONS.get(this.name, ())) == {this.name}


@pytest.mark.parametrize(("this", "high", "low"), PAIRS, ids=[f"{this.name}-{high}-{low}" for this, high, low in PAIRS])
def test_precedence(this: Setting, high: str, low: str) -> None:
    first, second = samples(this)
    loaded = given_by(this, {low: second, high: first})
    assert (getattr(loaded.settings, this.name), loaded.origins[this.name]) == expected(this, high, first)


@pytest.mark.parametrize("this", ALL, ids=SETTINGS)
def test_an_empty_variable_counts_as_unset(this: Setting) -> None:
    environ = {f"APPHOST_{this.name.upper()}": "", this.convention[0] or "UNUSED": ""}
    loaded = resolve({}, environ)
    assert getattr(loaded.settings, this.name) == this.default
    assert loaded.origins[this.name] == "default"


@pytest.mark.parametrize("this", ALL, ids=SETTINGS)
def test_each_default_is_a_value_that_could_be_given(this: Setting) -> None:
    if this.default in (None, "", ()):
        return
    toml = list(this.default) if this.is_list else this.default
    assert this.convert(toml, typed=True) == this.default
    text = this.show(this.default).removesuffix(f" {this.unit}") if this.unit else this.show(this.default)
    assert this.convert(text, typed=False) == this.default


@pytest.mark.parametrize("this", ALL, ids=SETTINGS)
def test_each_setting_says_what_it_is(this: Setting) -> None:
    assert this.does.endswith(".")
    if isinstance(this.default, float):  # nan and inf are refused by the bounds
        assert this.low is not None
        assert this.high is not None


def test_defaults_without_any_source() -> None:
    loaded = resolve({}, {})
    assert loaded.settings == Settings()
    assert set(loaded.origins.values()) == {"default"}
    assert set(loaded.origins) == {field.name for field in dataclasses.fields(Settings)}
    assert loaded.warnings == ()


def test_a_port_alone_is_one_of_loopback() -> None:
    """What the admin listener tells is not for everybody, unless somebody says so."""
    this = SETTINGS["admin"]
    assert value_of(this, "9090") == "127.0.0.1:9090"
    assert value_of(this, "0.0.0.0:9090") == "0.0.0.0:9090"
    assert value_of(this, "") == ""


def test_what_a_reload_cannot_change() -> None:
    fixed = {this.name for this in ALL if not this.reloadable}
    assert fixed == {"bind", "backlog", "pidfile", "control", "admin", "user", "group", "umask", "proc_name", "reload",
                     "unix_socket_mode", "unix_socket_owner", "on_arbiter_start", "error_log"}  # fmt: skip
    old = Settings()
    new = dataclasses.replace(old, backlog=100, workers=3, user="www")
    assert module.restart_needed(old, new) == ("backlog", "user")
    assert module.restart_needed(old, old) == ()
    assert module.keep_fixed(old, new) == dataclasses.replace(old, workers=3)
    assert module.keep_fixed(new, old) == dataclasses.replace(new, workers=1)


def test_development_has_other_defaults_and_what_is_set_counts_as_ever() -> None:
    loaded = resolve({"reload": True}, {"APPHOST_STOP_TIMEOUT": "5"}, {"timeout": 7}, FILE)
    changed = {name: value for name, value in loaded.origins.items() if value == "default with reload"}
    assert set(changed) == {"graceful_timeout", "access_log"}
    assert (loaded.settings.timeout, loaded.settings.stop_timeout) == (7.0, 5.0)
    assert (loaded.settings.graceful_timeout, loaded.settings.access_log) == (1.0, "-")
    plain = resolve({}, {"APPHOST_RELOAD": "no"}).settings
    assert all(getattr(plain, name) == SETTINGS[name].default for name in module.DEVELOPMENT_DEFAULTS)
    for name, value in module.DEVELOPMENT_DEFAULTS.items():
        assert SETTINGS[name].fits(value), name


@pytest.mark.parametrize("bad", ["src/*.toml", " ", "/tmp"])
def test_patterns_are_names(bad: str) -> None:
    with pytest.raises(SettingsError, match="without a directory"):
        resolve({"reload_include": [bad]}, {})


# Meanings


def test_workers_auto() -> None:
    from apphost.cpu import usable_cpus

    for loaded in (
        resolve({"workers": "auto"}, {}),
        resolve({}, {"WEB_CONCURRENCY": "auto"}),
        resolve({}, {}, {"workers": "auto"}, FILE),
    ):
        assert loaded.settings.workers == usable_cpus()


def test_lists_as_text() -> None:
    loaded = resolve({"bind": ["127.0.0.1:1", "127.0.0.1:2,127.0.0.1:3"]}, {"APPHOST_PYTHONPATH": "src:lib"}).settings
    assert loaded.bind == ("127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:3")
    assert loaded.pythonpath == ("src", "lib")


def test_port_is_one_number_on_all_interfaces() -> None:
    assert resolve({}, {"PORT": "5000"}).settings.bind == ("0.0.0.0:5000",)
    with pytest.raises(SettingsError, match=r"for bind, in environment variable PORT"):
        resolve({}, {"PORT": "5000,6000"})


@pytest.mark.parametrize(("text", "path"), [("/", ""), ("/shop/", "/shop"), ("/a/b//", "/a/b"), ("", "")])
def test_root_path_has_no_trailing_slash(text: str, path: str) -> None:
    assert resolve({"root_path": text}, {}).settings.root_path == path


@pytest.mark.parametrize("app", ["pkg", "pkg.mod", "pkg.mod:app", "pkg:app.wsgi", "täglich:app"])
def test_app_syntax(app: str) -> None:
    assert resolve({"app": app}, {}).settings.app == app


@pytest.mark.parametrize(
    "app", ["pkg:", ":app", "a:b:c", "my-shop:app", "shop/wsgi.py", "pkg..mod:app", "pkg:f(1)", " "]
)
def test_not_an_app(app: str) -> None:
    with pytest.raises(SettingsError, match=r"for app, on the command line \(APP\): expected module:attribute"):
        resolve({"app": app}, {})


def test_a_factory_may_be_written_as_a_call() -> None:
    assert resolve({"app": "pkg:make()", "factory": True}, {}).settings.app == "pkg:make"
    with pytest.raises(SettingsError, match=r"app = 'pkg:make\(\)' \(command line\) is a call, so add --factory"):
        resolve({"app": "pkg:make()"}, {})


# Errors


@pytest.mark.parametrize(
    ("cli", "environ", "table", "message"),
    [
        (
            {"workers": "0"},
            {},
            {},
            (
                "bad value '0' for workers, on the command line (-w, --workers): "
                "expected a whole number from 1 to 1024, or auto"
            ),
        ),
        (
            {},
            {"APPHOST_LOG_LEVEL": "warn"},
            {},
            (
                "bad value 'warn' for log_level, in environment variable APPHOST_LOG_LEVEL: "
                "expected one of debug, info, warning, error. Did you mean 'warning'?"
            ),
        ),
        (
            {},
            {"WEB_CONCURRENCY": "many"},
            {},
            (
                "bad value 'many' for workers, in environment variable WEB_CONCURRENCY: "
                "expected a whole number from 1 to 1024, or auto"
            ),
        ),
        (
            {},
            {},
            {"keep-alive": "soon"},
            (
                f"bad value 'soon' for keep_alive, in {FILE} (key keep-alive): "
                "expected a duration in seconds, or such as 500ms or 2m, from 0 to 604800"
            ),
        ),
        (
            {},
            {},
            {"workers": True},
            (
                f"bad value True for workers, in {FILE} (key workers): "
                "expected a whole number from 1 to 1024, or auto, not a boolean"
            ),
        ),
        ({}, {}, {"wokers": 4}, f"unknown setting 'wokers' in {FILE}. Did you mean 'workers'?"),
        ({}, {}, {"zzz": 4}, f"unknown setting 'zzz' in {FILE}."),
        ({"wokers": "4"}, {}, {}, "unknown setting 'wokers' on the command line. Did you mean 'workers'?"),
        (
            {},
            {},
            {"keep_alive": 1, "keep-alive": 2},
            f"keep_alive is set twice in {FILE}, with dashes and with underscores",
        ),
        (
            {"admin": "http://127.0.0.1:9090"},
            {},
            {},
            (
                "bad value 'http://127.0.0.1:9090' for admin, on the command line (--admin): "
                "expected PORT, HOST:PORT, [IPV6]:PORT or unix:PATH, without a scheme"
            ),
        ),
        (
            {"control": "on"},
            {},
            {},
            "bad value 'on' for control, on the command line (--control): expected auto, off, or a path with a '/'",
        ),
        (
            {"root_path": "shop"},
            {},
            {},
            "bad value 'shop' for root_path, on the command line (--root-path): expected a path that starts with '/'",
        ),
        (
            {"app": "shop/wsgi.py"},
            {},
            {},
            (
                "bad value 'shop/wsgi.py' for app, on the command line (APP): expected module:attribute, such as "
                "myproject.wsgi:application: name the module instead of its file, as in an import"
            ),
        ),
        ({}, {}, {"bind": []}, f"bad value [] for bind, in {FILE} (key bind): expected at least one address"),
        (
            {"bind": ["127.0.0.1:80", "127.0.0.1:80"]},
            {},
            {},
            (
                "bad value '127.0.0.1:80,127.0.0.1:80' for bind, on the command line (-b, --bind): "
                "'127.0.0.1:80' is given twice"
            ),
        ),
        (
            {},
            {"APPHOST_LIMIT_REQUEST_HEAD": "4k"},
            {},
            (
                "limit_request_line = 8190 (default) is larger than "
                "limit_request_head = 4096 (environment APPHOST_LIMIT_REQUEST_HEAD)"
            ),
        ),
        (
            {"limit_request_field_size": "1m"},
            {},
            {},
            "limit_request_field_size = 1048576 (command line) is larger than limit_request_head = 65536 (default)",
        ),
    ],
)
def test_error_texts(cli: dict[str, object], environ: dict[str, str], table: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        resolve(cli, environ, table, FILE)
    assert caught.value.message == message
    assert caught.value.exit_code is ExitCode.USAGE


@pytest.mark.parametrize("address", ["127.0.0.1:99999", "127.0.0.1:http"])
def test_an_address_is_checked_and_named(address: str) -> None:
    with pytest.raises(SettingsError, match=r"for bind, in environment variable APPHOST_BIND: ."):
        resolve({}, {"APPHOST_BIND": address})


def test_a_long_value_is_cut_in_the_error() -> None:
    with pytest.raises(SettingsError) as caught:
        resolve({"threads": "9" * 10000}, {})
    assert len(caught.value.message) < 250


def test_a_bad_value_in_the_file_is_an_error_even_when_another_source_wins() -> None:
    with pytest.raises(SettingsError, match="key workers"):
        resolve({"workers": "2"}, {}, {"workers": 0}, FILE)


def test_a_bad_conventional_variable_does_not_matter_when_another_source_wins() -> None:
    assert resolve({"workers": "2"}, {"WEB_CONCURRENCY": "lots"}).settings.workers == 2


@pytest.mark.parametrize(
    ("variable", "meant"),
    [
        ("APPHOST_WORKER", "APPHOST_WORKERS"),
        ("APPHOST_KEEPALIVE", "APPHOST_KEEP_ALIVE"),
        ("APPHOST_CONFG", "APPHOST_CONFIG"),
        ("APPHOST_GRACEFULL_TIMEOUT", "APPHOST_GRACEFUL_TIMEOUT"),
    ],
)
def test_a_misspelt_variable_is_a_warning(variable: str, meant: str) -> None:
    assert resolve({}, {variable: "x"}).warnings == (
        f"environment variable {variable} is not a setting. Did you mean {meant}?",
    )


@pytest.mark.parametrize(
    "variable",
    [
        "APPHOST_PORT",
        "APPHOST_PORT_80_TCP",
        "APPHOST_PORT_80_TCP_ADDR",
        "APPHOST_PORT_80_TCP_PROTO",
        "APPHOST_SERVICE_HOST",
        "APPHOST_SERVICE_PORT",
        "APPHOST_SERVICE_PORT_HTTP",
        "APPHOST_WORKERS_SERVICE_HOST",
        "APPHOST_WORKERS_PORT",
        "APPHOST_DATABASE_URL",
        "APPHOST_CONFIG",
        "APPHOST_WORKERS",
        "MYAPPHOST_WORKER",
        "APPHOST_",
    ],
)
def test_variables_of_kubernetes_and_of_others_are_left_alone(variable: str) -> None:
    assert resolve({}, {variable: "2"}).warnings == ()


# Wire


def strategy(this: Setting) -> st.SearchStrategy[Any]:
    if isinstance(this.default, bool):
        return st.booleans()
    if this.choices:
        return st.sampled_from(this.choices)
    if isinstance(this.default, float):
        return st.floats(this.low, this.high)
    if this.is_list:
        return st.lists(st.text()).map(tuple)
    if isinstance(this.default, str):
        return st.text()
    numbers = st.integers(int(this.low or 0), int(this.high or 2**60))
    return numbers if this.default is not None else st.none() | numbers


any_settings = st.fixed_dictionaries({this.name: strategy(this) for this in ALL}).map(lambda values: Settings(**values))


@given(any_settings)
def test_settings_survive_json(settings: Settings) -> None:
    assert Settings.from_wire(json.loads(json.dumps(settings.to_wire()))) == settings


@given(any_settings, st.sets(st.sampled_from(sorted(SETTINGS))))
def test_two_versions_can_talk(settings: Settings, unknown_to_sender: set[str]) -> None:
    wire = {**settings.to_wire(), "of_a_later_version": [1]}
    for name in unknown_to_sender:
        del wire[name]
    received = Settings.from_wire(wire)
    for name, this in SETTINGS.items():
        assert getattr(received, name) == (this.default if name in unknown_to_sender else getattr(settings, name))


@given(
    st.dictionaries(st.sampled_from(sorted(SETTINGS)), st.text() | st.booleans() | st.lists(st.text())),
    st.none() | st.text(),
    st.text(),
)
def test_a_source_survives_json(cli: dict[str, object], config: str | None, cwd: str) -> None:
    source = Source(cli=cli, config=config, cwd=cwd)
    assert Source.from_wire(json.loads(json.dumps(source.to_wire()))) == source


@given(
    st.dictionaries(st.sampled_from(sorted(set(SETTINGS) - {"bind"})), st.text()),
    st.dictionaries(
        st.sampled_from(sorted(SETTINGS)) | st.text(),
        st.recursive(
            st.text() | st.booleans() | st.integers() | st.floats(),
            lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
            max_leaves=3,
        ),
    ),
)
def test_any_input_is_settings_or_a_settings_error(cli: dict[str, object], table: dict[str, Any]) -> None:
    try:
        settings = resolve(cli, {}, table, FILE).settings
    except SettingsError:
        return
    assert Settings.from_wire(json.loads(json.dumps(settings.to_wire()))) == settings


# Documents and the module itself

DOCUMENTS = [
    path
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
    if module.BEGIN in path.read_text(encoding="utf-8")
]


def test_the_settings_are_documented() -> None:
    assert ROOT / "docs" / "settings.md" in DOCUMENTS


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_documents_are_up_to_date(path: pathlib.Path) -> None:
    document = path.read_text(encoding="utf-8")
    stale = f"stale: run `python -m apphost.settings --write {path.relative_to(ROOT)}`"
    assert module.renew(document) == document, stale


def test_the_table_has_every_setting() -> None:
    rows = {line.split("`")[1]: line for line in module.settings_table().splitlines() if line.startswith("| `")}
    assert list(rows) == list(SETTINGS)
    assert "`-w`, `--workers`" in rows["workers"]
    assert "`APPHOST_WORKERS`, `WEB_CONCURRENCY`" in rows["workers"]
    assert "`75 s`" in rows["keep_alive"]
    assert "`8190 bytes`" in rows["limit_request_line"]
    assert {line.count(" | ") for line in rows.values()} == {4}


def test_renewing_a_document(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "x.md"
    path.write_text(f"before\n{module.BEGIN}\nold\n{module.END}\nafter\n", encoding="utf-8")
    run = [sys.executable, "-m", "apphost.settings"]
    subprocess.run([*run, "--write", str(path)], check=True, cwd=ROOT)
    text = path.read_text(encoding="utf-8")
    assert text == f"before\n{module.BEGIN}\n\n{module.settings_table()}\n{module.END}\nafter\n"
    assert module.renew(text) == text
    with pytest.raises(ValueError, match="no <!-- settings:begin -->"):
        module.renew(f"{module.END} {module.BEGIN}")
    assert subprocess.run(run, cwd=ROOT, capture_output=True).returncode == 1


def test_the_module_drags_nothing_into_a_process() -> None:
    code = (
        "import sys, apphost.sources as s; s.resolve({'workers': 'auto'}, {});"
        "unwanted = {'click', 'asyncio', 'h11', 'httptools', 'ssl', 'socket', 'tomllib', 'importlib.metadata'};"
        "print(sorted(unwanted & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    "entry", ["10.0.0.1/8", "localhost", "10.0.0", "010.0.0.1", "::1%lo", "unix:/run/s", "**", "1.2.3.4:80"]
)
def test_a_trusted_proxy_is_an_address_or_a_network(entry: str) -> None:
    """A name would be looked up once and believed for ever; `10.0.0.1/8` is more than who wrote it may mean."""
    with pytest.raises(
        SettingsError, match=r"bad value .* for trusted_proxies.*expected an address, a network such as"
    ):
        resolve({"trusted_proxies": ["192.0.2.1", entry]}, {})


@pytest.mark.parametrize(
    "entry", ["example.org:80", "http://example.org", "example..org", "*example.org", "a b", "::1"]
)
def test_an_allowed_host_is_a_name_without_a_port(entry: str) -> None:
    with pytest.raises(SettingsError, match=r"bad value .* for allowed_hosts.*expected names such as"):
        resolve({"allowed_hosts": [entry]}, {})


@pytest.mark.parametrize("entries", [["for", "ssl"], [""]])
def test_fields_that_nobody_knows(entries: list[str]) -> None:
    with pytest.raises(SettingsError, match=r"for forwarded_fields.*expected some of for, proto, host, port, prefix"):
        resolve({"forwarded_fields": entries}, {})


def test_the_proxy_protocol_needs_somebody_who_speaks_it() -> None:
    with pytest.raises(SettingsError, match=r"proxy_protocol = True \(command line\) .* no proxy is trusted"):
        resolve({"proxy_protocol": True}, {})
