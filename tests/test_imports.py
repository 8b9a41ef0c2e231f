"""The structure of the package: who may import whom, what the arbiter's process loads, how long things may get."""

from __future__ import annotations

import ast
import itertools
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

import apphost
from tests.conftest import THINNED, have_their_turn
from tests.support import Server, write_app

PACKAGE = Path(apphost.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
LINES_MAX = 500  # of a file
FUNCTION_MAX = 60  # lines of a function, decorators aside
FOREIGN = ("asyncio", "h11", "httptools", "uvloop", "wsproto", "concurrent", "ssl")


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(source: str, package: str) -> Iterator[str]:
    """The full names that a module imports, wherever in it; those for type checkers alone do not count.

    `from a import b` gives both `a` and `a.b`, as `b` may be a module.
    """
    tree = ast.parse(source)
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            origin = ".".join([*base, *filter(None, [node.module])])
            yield origin
            yield from (f"{origin}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from (each.value for each in node.args if isinstance(each, ast.Constant))


def own_imports(path: Path) -> set[str]:
    """The modules of apphost that a file imports, without the package itself (its version)."""
    name = module_name(path)
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    known = {module_name(each) for each in FILES}
    return {each for each in imports(path.read_text(encoding="utf-8"), package) if each in known} - {"apphost"}


def part(name: str) -> str:
    """`arbiter` of `apphost.arbiter.fleet`, `logs` of `apphost.logs`."""
    return name.split(".")[1]


# What the files of a part may import of the other parts; a part that is not named here may import anything.
_SHARED = {
    "checks", "messages", "lifecycle", "settings", "sources", "values", "cpu", "errors", "logs", "sockets", "bytecode",
    "privileges", "peers", "endpoint", "hooks", "access", "logfiles", "measures", "footing",
    "forks", "prctl",
}  # fmt: skip
ALLOWED = {
    "arbiter": _SHARED | {"forkserver", "hookrunner"},
    "admin": {"errors", "logs", "measures", "messages", "peers", "privileges", "protocols", "sockets", "worker"},
    "worker": _SHARED | {"protocols", "interfaces"},
    "watcher": {"errors", "messages", "peers", "privileges"},
    "interfaces": {"errors", "logs", "protocols", "values", "lifecycle"},
    "protocols": {"errors", "logs", "values", "lifecycle"},
    "forkserver": _SHARED | {"worker"},
    "operate": {"endpoint", "errors", "logs", "peers", "settings", "values"},
    "hookrunner": _SHARED | {"forkserver"},
    "hooks": {"errors", "settings"},
    "messages": set(),
    "measures": set(),
    "footing": set(),
    "forks": {"messages"},
    "prctl": set(),
    "lifecycle": set(),
    "errors": set(),
    "logs": set(),
    "access": {"errors", "logs"},
    "logfiles": {"access", "errors", "logs", "privileges", "settings"},
    "values": {"errors"},
    "sockets": {"errors"},
    "privileges": {"errors"},
    "peers": set(),
    "endpoint": {"peers"},
    "settings": {"checks", "errors", "values", "cpu", "sockets", "privileges", "endpoint"},
    "sources": {"settings", "errors", "values"},
}


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_go_one_way(path: Path) -> None:
    name = module_name(path)
    if name == "apphost" or part(name) not in ALLOWED:
        return
    foreign = {each for each in own_imports(path) if part(each) not in ALLOWED[part(name)] | {part(name)}}
    assert not foreign, f"{name} must not import {', '.join(sorted(foreign))}"


def test_every_part_with_a_rule_exists() -> None:
    assert set(ALLOWED) <= {part(module_name(path)) for path in FILES if module_name(path) != "apphost"}


def test_the_reader_of_imports_sees_all_forms() -> None:
    source = """
import os.path, sys
from apphost import logs
from . import sibling
from ..worker.main import run
if TYPE_CHECKING:
    from apphost.hidden import Hidden
def later():
    from apphost.late import thing
    importlib.import_module("apphost.dynamic")
"""
    assert set(imports(source, "apphost.arbiter")) == {
        "os.path", "sys", "apphost", "apphost.logs", "apphost.arbiter", "apphost.arbiter.sibling",
        "apphost.worker.main", "apphost.worker.main.run", "apphost.late", "apphost.late.thing", "apphost.dynamic",
    }  # fmt: skip


@pytest.mark.parametrize("path", [p for p in FILES if module_name(p).startswith("apphost.arbiter")], ids=module_name)
def test_the_arbiters_own_code_names_nothing_foreign(path: Path) -> None:
    named = {each.partition(".")[0] for each in imports(path.read_text(encoding="utf-8"), "apphost.arbiter")}
    assert not named & set(FOREIGN)


def test_the_fleet_is_pure() -> None:
    for name in ("fleet", "vocabulary"):
        source = (PACKAGE / "arbiter" / f"{name}.py").read_text(encoding="utf-8")
        named = {each.partition(".")[0] for each in imports(source, "apphost.arbiter")}
        assert named <= {"__future__", "apphost", "collections", "dataclasses", "enum", "typing"}


# ------------------------------------------------------------------------------------------- what really is loaded


def loaded_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sys.modules)"
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return set(result.stdout.split())


def test_importing_the_arbiter_loads_nothing_foreign() -> None:
    modules = loaded_by("import apphost.arbiter.main, apphost.cli")
    assert "apphost.arbiter.arbiter" in modules
    assert not {name.partition(".")[0] for name in modules} & set(FOREIGN)
    assert not {name for name in modules if name.startswith(("apphost.worker", "apphost.protocols"))}
    assert not {name for name in modules if name.startswith(("apphost.interfaces", "apphost.operate", "apphost.admin"))}
    # The same look at a worker's modules finds them: it is able to.
    assert {"asyncio", "h11"} <= loaded_by("import apphost.worker.main, apphost.protocols.h11_parser")


def test_one_compiled_function_is_had_without_the_package_around_it() -> None:
    modules = loaded_by("from apphost.protocols.masking import fastest, unmask; assert fastest() is not unmask")
    assert not {"websockets", "websockets.version", "importlib.metadata"} & modules


REPORTER = '''
"""Started with every interpreter of the test: leaves the names of its modules behind at its end."""
import atexit, os, sys

def leave():
    with open(os.path.join(os.environ["MODULES"], str(os.getpid())), "w") as file:
        file.write("\\n".join(sys.modules))

atexit.register(leave)
'''

APP = """
import decimal

async def app(scope, receive, send):
    raise NotImplementedError
"""


def test_a_running_arbiter_has_loaded_nothing_foreign(tmp_path: Path) -> None:
    """After a start, a reload and a stop, with each process telling at its end what it had loaded."""
    write_app(tmp_path / "hook", "sitecustomize", REPORTER)
    write_app(tmp_path / "site", "site_app", APP)
    (tmp_path / "modules").mkdir()
    path = os.pathsep.join([str(tmp_path / "hook"), str(PACKAGE.parent)])
    env = {"PYTHONPATH": path, "MODULES": str(tmp_path / "modules")}
    with Server("site_app:app", "--lifespan", "off", cwd=tmp_path / "site", env=env) as server:
        if os.path.exists("/proc/self/maps"):
            maps = Path(f"/proc/{server.pid}/maps").read_text()
            assert not re.search(r"/(_asyncio|_ssl|uvloop|httptools|_decimal)\b[^/]*$", maps, re.MULTILINE)
        server.reload()
        workers = server.worker_pids()
        assert server.stop() == 0
        pid = server.pid
    arbiter = set((tmp_path / "modules" / str(pid)).read_text().split())
    worker = set((tmp_path / "modules" / str(workers[-1])).read_text().split())
    assert {"apphost.arbiter.arbiter", "selectors"} <= arbiter
    assert not {name.partition(".")[0] for name in arbiter} & {*FOREIGN, "site_app", "decimal"}
    assert not {name for name in arbiter if name.startswith("apphost.operate")}, "commands are for other processes"
    assert not {name.partition(".")[0] for name in arbiter} & {"click", "secrets", "tempfile"}, "2 MiB, for good"
    assert {"asyncio", "site_app", "decimal"} <= worker
    assert "apphost.arbiter.arbiter" not in worker


# ------------------------------------------------------------------------------------------------- how long things are


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_no_file_and_no_function_is_too_long(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    lines = source.count("\n")
    assert lines <= LINES_MAX, f"{path.name} has {lines} lines, {LINES_MAX} are allowed"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno is not None
            length = node.end_lineno - node.lineno + 1
            assert length <= FUNCTION_MAX, f"{node.name} in {path.name} has {length} lines, {FUNCTION_MAX} are allowed"


@pytest.mark.parametrize("name", sorted(THINNED))
def test_what_is_thinned_is_there(name: str) -> None:
    file, _, test = name.partition("::")
    folder = Path(__file__).parent / "process"
    text, fixtures = ((folder / each).read_text(encoding="utf-8") for each in (file, "conftest.py"))
    function = re.search(rf"^def ({test or 'test_.*?'})\(", text, re.MULTILINE)
    assert function
    rule = THINNED[name]
    for parameter in rule if isinstance(rule, tuple) else ():
        assert re.search(rf"\b{parameter}\b", text + fixtures), f"nothing there has a parameter {parameter}"


def some(count: int, **values: list[object]) -> list[pytest.Item]:
    """Items with all combinations of these values, or `count` without parameters."""
    combinations = [dict(zip(values, each, strict=True)) for each in itertools.product(*values.values())]
    made = [SimpleNamespace(callspec=SimpleNamespace(params=params)) for params in combinations]
    return cast("list[pytest.Item]", made if values else [SimpleNamespace() for _ in range(count)])


def test_of_what_is_thinned_each_value_has_its_turn() -> None:
    items = some(0, a=[1, 2], b=["x", "y", "z"], c=[None, [0]])
    chosen = [item.callspec.params for item in have_their_turn(items, ("a", "b"))]  # type: ignore[attr-defined]
    assert [(each["a"], each["b"], each["c"]) for each in chosen] == [
        (1, "x", None), (1, "x", [0]), (1, "z", None), (1, "z", [0]), (2, "y", None), (2, "y", [0]),
    ]  # fmt: skip
    assert have_their_turn(items, 5) == [items[0], items[5], items[10]]
    plain = some(2)
    assert have_their_turn(plain, ("a", "b")) == plain, "tests of a file that have none of the parameters"
