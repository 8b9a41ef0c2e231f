"""Settings files: which one is read, where it is looked for, and what is said about a bad one. Real files."""

from __future__ import annotations

import pathlib
import sys

import pytest

from apphost import sources as module
from apphost.errors import SettingsError
from apphost.settings import Settings
from apphost.sources import Source, load


def write(path: pathlib.Path, text: str) -> pathlib.Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_apphost_toml_comes_before_pyproject(tmp_path: pathlib.Path) -> None:
    write(tmp_path / "pyproject.toml", "[tool.apphost]\nworkers = 3\n")
    loaded = load({}, {}, None, str(tmp_path))
    assert (loaded.settings.workers, loaded.file) == (3, str(tmp_path / "pyproject.toml"))
    path = write(tmp_path / "apphost.toml", "threads = 2\n")
    loaded = load({}, {}, None, str(tmp_path))
    assert (loaded.settings.workers, loaded.settings.threads, loaded.file) == (1, 2, str(path))
    assert loaded.origins["threads"] == f"file {path}"


def test_no_file_is_no_error(tmp_path: pathlib.Path) -> None:
    loaded = load({}, {}, None, str(tmp_path))
    assert (loaded.settings, loaded.file) == (Settings(), "")
    assert load({}, {}, None, str(tmp_path / "absent")).settings == Settings()


@pytest.mark.parametrize(
    "text", ["[project]\nname = 'x'\n", "[project]\ndependencies = ['apphost']\n", "[tool]\n", "is not TOML"]
)
def test_a_pyproject_without_our_table_is_not_ours(tmp_path: pathlib.Path, text: str) -> None:
    write(tmp_path / "pyproject.toml", text)
    assert load({}, {}, None, str(tmp_path)).file == ""


@pytest.mark.parametrize("text", ["[tool]\napphost.workers = 3\n", "[ tool . apphost ]\nworkers = 3\n"])
def test_other_spellings_of_our_table(tmp_path: pathlib.Path, text: str) -> None:
    write(tmp_path / "pyproject.toml", text)
    assert load({}, {}, None, str(tmp_path)).settings.workers == 3


def test_config_wins_over_the_variable_and_starts_at_cwd(tmp_path: pathlib.Path) -> None:
    write(tmp_path / "one.toml", "workers = 2\n")
    write(tmp_path / "two.toml", "workers = 3\n")
    write(tmp_path / "apphost.toml", "workers = 4\n")
    environ = {"APPHOST_CONFIG": "two.toml"}
    assert load({}, environ, "one.toml", str(tmp_path)).settings.workers == 2
    assert load({}, environ, None, str(tmp_path)).settings.workers == 3
    assert load({}, {"APPHOST_CONFIG": ""}, None, str(tmp_path)).settings.workers == 4


@pytest.mark.parametrize("source", ["cli", "env"])
def test_the_file_is_looked_up_in_chdir(tmp_path: pathlib.Path, source: str) -> None:
    site = tmp_path / "site"
    site.mkdir()
    write(site / "apphost.toml", "workers = 5\n")
    write(tmp_path / "apphost.toml", "workers = 4\n")
    cli = {"chdir": "site"} if source == "cli" else {}
    environ = {"APPHOST_CHDIR": "site"} if source == "env" else {}
    loaded = load(cli, environ, None, str(tmp_path))
    assert loaded.settings.workers == 5
    assert loaded.settings.chdir == "site"


def test_a_switched_link_is_followed(tmp_path: pathlib.Path) -> None:
    for number in (1, 2):
        (tmp_path / f"release{number}").mkdir()
        write(tmp_path / f"release{number}" / "apphost.toml", f"workers = {number}\n")
    current = tmp_path / "current"
    source = Source(cli={}, config=None, cwd=str(current))
    seen = []
    for number in (1, 2):
        current.unlink(missing_ok=True)
        current.symlink_to(f"release{number}")
        seen.append(source.load({}).settings.workers)
    assert seen == [1, 2]


def test_paths_in_the_file_stay_as_they_are(tmp_path: pathlib.Path) -> None:
    write(tmp_path / "apphost.toml", "chdir = 'site'\npythonpath = ['src', '../lib']\npidfile = 'run/pid'\n")
    loaded = load({}, {}, None, str(tmp_path)).settings
    assert (loaded.chdir, loaded.pythonpath, loaded.pidfile) == ("site", ("src", "../lib"), "run/pid")


@pytest.mark.parametrize(
    ("name", "content", "config", "message"),
    [
        ("x.toml", None, "x.toml", "the settings file {path}, named by --config, does not exist"),
        (
            "pyproject.toml",
            b"[tool.other]\n",
            "pyproject.toml",
            "{path}, named by --config, has no [tool.apphost] table",
        ),
        ("apphost.toml", b"workers = \n", None, "{path} is not valid TOML: "),
        ("pyproject.toml", b"[tool.apphost\n", None, "{path} is not valid TOML: "),
        ("pyproject.toml", b"[tool]\napphost = 3\n", None, "tool.apphost in {path} must be a table"),
        ("apphost.toml", b"app = '\xff'\n", None, "the settings file {path} is not UTF-8: "),
        ("apphost.toml", b"[server]\nworkers = 2\n", None, "unknown setting 'server' in {path}."),
    ],
    ids=["absent", "no table", "broken", "broken project", "no table type", "encoding", "nested"],
)
def test_bad_files(tmp_path: pathlib.Path, name: str, content: bytes | None, config: str | None, message: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SettingsError) as caught:
        load({}, {}, config, str(tmp_path))
    assert caught.value.message.startswith(message.format(path=path))


def test_the_variable_that_names_an_absent_file_is_told(tmp_path: pathlib.Path) -> None:
    with pytest.raises(SettingsError, match="named by APPHOST_CONFIG, does not exist"):
        load({}, {"APPHOST_CONFIG": "x.toml"}, None, str(tmp_path))


def test_files_that_cannot_be_read(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "apphost.toml"
    path.symlink_to("gone.toml")
    with pytest.raises(SettingsError, match="is a link to a file that does not exist"):
        load({}, {}, None, str(tmp_path))
    path.unlink()
    path.mkdir()
    with pytest.raises(SettingsError, match=r"cannot read the settings file .*apphost\.toml: Is a directory"):
        load({}, {}, None, str(tmp_path))


def test_without_a_toml_parser(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tomllib", "tomli"):
        monkeypatch.setitem(sys.modules, name, None)  # an import of it fails
    assert module.parse_file("[project]\ndependencies = ['apphost']\n", "/srv/pyproject.toml") is None
    for text, path in (("workers = 2", "/srv/apphost.toml"), ("[tool.apphost]\n", "/srv/pyproject.toml")):
        with pytest.raises(SettingsError, match=rf"reading {path} needs .*pip install 'apphost\[toml\]'"):
            module.parse_file(text, path)
