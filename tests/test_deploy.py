"""The files under deploy/ are well-formed, agree with each other and with what apphost does (requirement 4)."""

from __future__ import annotations

import configparser
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from apphost.arbiter.fleet import KILL_GRACE
from apphost.cli import program
from apphost.errors import ExitCode
from apphost.settings import SETTINGS, Settings
from apphost.sources import resolve
from tests.support import DEADLINE, wait_for

yaml = pytest.importorskip("yaml")

DEPLOY = Path(__file__).resolve().parent.parent / "deploy"
EXPOSITION = DEPLOY.parent / "apphost" / "admin" / "exposition.py"
# s that a stop takes beyond stop_timeout until the last worker is killed, and some for a busy machine.
STOP_EXTRA = KILL_GRACE + 1.0


def settings_of(words: list[str]) -> Settings:
    """What apphost makes of a command line; a test failure for one that it would refuse."""
    context = program.commands["run"].make_context("apphost", list(words))  # it takes the words out of its list
    given = {name: value for name, value in context.params.items() if value and name in SETTINGS}
    cli = {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}
    settings = resolve(cli, {}).settings
    assert settings.app
    return settings


def port(address: str) -> int:
    return int(address.rpartition(":")[2])


def option(words: list[str], name: str) -> str:
    """The value of an option, given as one word or as two."""
    for at, word in enumerate(words):
        if word == name:
            return words[at + 1]
        if word.startswith(f"{name}="):
            return word.partition("=")[2]
    raise AssertionError(f"no {name} in {words}")


# ----------------------------------------------------------------------------------------------------------- systemd


def unit(name: str) -> configparser.RawConfigParser:
    parser = configparser.RawConfigParser(delimiters="=", comment_prefixes="#", strict=False)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string((DEPLOY / "systemd" / name).read_text(encoding="utf-8"))
    return parser


def test_the_service() -> None:
    parser = unit("site.service")
    assert set(parser.sections()) == {"Unit", "Service", "Install"}
    service = parser["Service"]
    assert (service["Type"], service["ReloadSignal"]) == ("notify-reload", "SIGUSR1")
    command = shlex.split(service["ExecStart"])
    assert command[0].startswith("/")
    assert command[1:3] == ["-m", "apphost"]
    settings = settings_of(command[3:])
    assert "--bind" not in command, "it takes what the socket unit has opened"
    assert float(service["TimeoutStopSec"]) > settings.stop_timeout + STOP_EXTRA
    assert service["KillMode"] == "mixed", "TERM is for the arbiter"
    known = {int(code) for code in service["RestartPreventExitStatus"].split()}
    assert known <= {int(code) for code in ExitCode} - {ExitCode.OK, ExitCode.INTERNAL, ExitCode.APPLICATION}
    assert parser["Unit"]["Requires"] == "site.socket"
    assert "site.socket" in parser["Unit"]["After"].split()
    assert int(service["LimitNOFILE"]) > settings.limit_connections
    assert service["User"] != "root"
    assert service["NoNewPrivileges"] == "yes"


def test_the_socket() -> None:
    text = (DEPLOY / "systemd" / "site.socket").read_text(encoding="utf-8")
    socket = unit("site.socket")["Socket"]
    assert "Accept" not in socket, "listeners are passed, not connections"
    assert f"--bind systemd:{socket['FileDescriptorName']}" in text
    assert int(socket["Backlog"]) == SETTINGS["backlog"].default
    settings_of(["shop:app", "--bind", f"systemd:{socket['FileDescriptorName']}"])


def test_before_253() -> None:
    service = unit("before-253.conf")["Service"]
    assert service["Type"] == "notify"
    assert service["ExecReload"] == "/bin/kill -USR1 $MAINPID"


# What an older systemd says of it, and nothing else.
NEW_IN_253 = re.compile(r"notify-reload|Unknown key(?: name)? 'ReloadSignal'")


@pytest.mark.parametrize("drop_in", [False, True])
def test_systemd_accepts_the_units(tmp_path: Path, drop_in: bool) -> None:
    tool = shutil.which("systemd-analyze")
    if tool is None:
        pytest.skip("systemd is not installed")
    for path in (DEPLOY / "systemd").iterdir():
        text = path.read_text(encoding="utf-8").replace("/srv/site/current/.venv/bin/python", sys.executable)
        (tmp_path / path.name).write_text(text)
    if drop_in:
        (tmp_path / "site.service.d").mkdir()
        shutil.copy(tmp_path / "before-253.conf", tmp_path / "site.service.d")
    units = [str(tmp_path / name) for name in ("site.service", "site.socket")]
    result = subprocess.run([tool, "verify", "--man=no", *units], capture_output=True, text=True, timeout=60)
    ours = [line for line in result.stderr.splitlines() if "site." in line and not NEW_IN_253.search(line)]
    assert ours == []


# --------------------------------------------------------------------------------------------------------- Dockerfile

INSTRUCTIONS = {
    "ARG", "FROM", "ENV", "RUN", "COPY", "WORKDIR", "USER", "EXPOSE", "STOPSIGNAL", "HEALTHCHECK", "ENTRYPOINT", "CMD"
}  # fmt: skip


def dockerfile() -> list[tuple[str, str]]:
    """(instruction, arguments), continued lines joined, without comments."""
    text = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    text = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    found = [line.partition(" ") for line in text.splitlines() if line.strip()]
    assert {instruction for instruction, _, _ in found} <= INSTRUCTIONS
    return [(instruction, arguments.strip()) for instruction, _, arguments in found]


def last_stage() -> dict[str, str]:
    lines = dockerfile()
    start = max(at for at, (instruction, _) in enumerate(lines) if instruction == "FROM")
    return dict(lines[start:])


def test_the_stages() -> None:
    lines = dockerfile()
    bases = [arguments for instruction, arguments in lines if instruction == "FROM"]
    assert len(bases) == 2
    assert all(base.split()[0].endswith("-slim") for base in bases)
    (default,) = [arguments for instruction, arguments in lines if instruction == "ARG"]
    name, _, version = default.partition("=")
    assert all(f"${{{name}}}" in base for base in bases), "the interpreters must be the same"
    assert tuple(map(int, version.split("."))) >= (3, 10)
    stage = last_stage()
    assert "RUN" not in stage, "nothing is built in what is shipped"
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", stage["USER"]), "a number, and not root"


def test_the_process_of_the_image() -> None:
    """apphost is process 1, its ports are the exposed ones, and it stops before Docker kills."""
    stage = last_stage()
    command = json.loads(stage["ENTRYPOINT"]) + json.loads(stage["CMD"])
    assert command[0] == "apphost"
    settings = settings_of(command[1:])
    bind, admin = settings.bind[0], option(command, "--admin")
    assert stage["EXPOSE"].split() == [str(port(bind)), str(port(admin))]
    assert settings.pidfile == ""
    assert stage["STOPSIGNAL"] == "SIGTERM"
    assert settings.shutdown_delay + settings.stop_timeout + KILL_GRACE < 10.0


def test_the_health_check_runs(tmp_path: Path) -> None:
    """With nothing but Python: 0 for a server that answers 200, else another code."""
    stage = last_stage()
    options, _, command = stage["HEALTHCHECK"].partition("CMD ")
    words = json.loads(command)
    assert words[:2] == ["python", "-c"]
    admin = option(json.loads(stage["ENTRYPOINT"]), "--admin")
    assert f"http://127.0.0.1:{port(admin)}/healthz" in words[2]
    timeouts = re.search(r"--timeout=(\d+)s", options), re.search(r"timeout=(\d+)", words[2])
    outer, inner = (int(match[1]) for match in timeouts if match)
    assert inner < outer
    start = re.search(r"--start-period=(\d+)s", options)
    assert start
    assert int(start[1]) >= SETTINGS["boot_timeout"].default
    for status, code in (("200 OK", 0), ("503 Service Unavailable", 1)):
        server = subprocess.Popen([sys.executable, "-c", ANSWER, status], stdout=subprocess.PIPE, text=True)
        try:
            assert server.stdout is not None
            number = server.stdout.readline().strip()
            check = words[2].replace(str(port(admin)), number)
            result = subprocess.run([sys.executable, "-c", check], capture_output=True, timeout=DEADLINE, check=False)
            assert result.returncode == code
        finally:
            server.kill()
            server.communicate()
    closed = words[2].replace(str(port(admin)), number)
    wait_for(lambda: subprocess.run([sys.executable, "-c", closed], capture_output=True, check=False).returncode == 1)


ANSWER = """
import socket, sys
with socket.create_server(("127.0.0.1", 0)) as listener:
    print(listener.getsockname()[1], flush=True)
    connection, _ = listener.accept()
    with connection:
        connection.recv(4096)
        connection.sendall(f"HTTP/1.1 {sys.argv[1]}\\r\\nContent-Length: 0\\r\\n\\r\\n".encode())
"""


# --------------------------------------------------------------------------------------------------------- Kubernetes

MANIFESTS = {path.name: yaml.safe_load(path.read_text(encoding="utf-8")) for path in DEPLOY.glob("kubernetes/*.yaml")}
API = {
    "Deployment": "apps/v1", "Service": "v1", "PodDisruptionBudget": "policy/v1",
    "HorizontalPodAutoscaler": "autoscaling/v2",
}  # fmt: skip


def manifest(kind: str) -> Any:
    (found,) = [each for each in MANIFESTS.values() if each["kind"] == kind]
    return found


def pod() -> Any:
    return manifest("Deployment")["spec"]["template"]["spec"]


def container() -> Any:
    (found,) = pod()["containers"]
    return found


def seconds_of(probe: dict[str, Any]) -> float:
    return float(probe["periodSeconds"] * probe["failureThreshold"])


def keys(value: Any) -> Iterator[str]:
    """Every key in a manifest, however deep."""
    if isinstance(value, dict):
        yield from value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from keys(inner)


def test_the_kinds() -> None:
    assert {each["kind"]: each["apiVersion"] for each in MANIFESTS.values()} == API
    assert {each["metadata"]["name"] for each in MANIFESTS.values()} == {"site"}


def test_no_key_is_written_twice() -> None:
    """The second one would win, in silence."""

    class Strict(yaml.SafeLoader):  # type: ignore[misc,name-defined]
        pass

    def construct(loader: Any, node: Any) -> dict[Any, Any]:
        names = [loader.construct_object(key) for key, _ in node.value]
        assert len(set(names)) == len(names), names
        return dict(yaml.SafeLoader.construct_mapping(loader, node, deep=True))

    Strict.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, construct)
    for path in DEPLOY.glob("kubernetes/*.yaml"):
        yaml.load(path.read_text(encoding="utf-8"), Loader=Strict)


def test_the_command_of_the_pod() -> None:
    words = container()["args"]
    settings = settings_of(words)
    ports = {each["name"]: each["containerPort"] for each in container()["ports"]}
    assert ports == {"http": port(settings.bind[0]), "admin": port(option(words, "--admin"))}
    annotations = manifest("Deployment")["spec"]["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == str(ports["admin"])
    assert "command" not in container(), "process 1 is apphost, as in the image"


def test_the_pod_has_time_to_stop() -> None:
    settings = settings_of(container()["args"])
    assert settings.shutdown_delay >= 5, "kube-proxy and the like hear of the end after TERM has come"
    grace = pod()["terminationGracePeriodSeconds"]
    assert grace > settings.shutdown_delay + settings.stop_timeout + STOP_EXTRA


def test_the_probes() -> None:
    settings = settings_of(container()["args"])
    probes = {name: container()[f"{name}Probe"] for name in ("startup", "readiness", "liveness")}
    paths = {name: probe["httpGet"]["path"] for name, probe in probes.items()}
    assert paths == {"startup": "/readyz", "readiness": "/readyz", "liveness": "/healthz"}
    assert {probe["httpGet"]["port"] for probe in probes.values()} == {"admin"}
    assert all(probe["timeoutSeconds"] <= probe["periodSeconds"] for probe in probes.values())
    assert seconds_of(probes["startup"]) > settings.boot_timeout
    assert seconds_of(probes["readiness"]) < settings.shutdown_delay
    assert seconds_of(probes["liveness"]) >= 30, "a slow moment is no reason to start anew"


def test_an_update_keeps_the_capacity() -> None:
    strategy = manifest("Deployment")["spec"]["strategy"]
    assert strategy == {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}}
    assert manifest("PodDisruptionBudget")["spec"]["maxUnavailable"] == 1
    assert manifest("HorizontalPodAutoscaler")["spec"]["minReplicas"] > 1
    assert "replicas" not in manifest("Deployment")["spec"]


def test_the_pod_may_do_little() -> None:
    user, _, group = last_stage()["USER"].partition(":")
    context = pod()["securityContext"]
    assert (context["runAsNonRoot"], context["runAsUser"], context["runAsGroup"]) == (True, int(user), int(group))
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container()["securityContext"] == {
        "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}
    }  # fmt: skip
    assert pod()["automountServiceAccountToken"] is False
    mounts = {each["name"]: each["mountPath"] for each in container()["volumeMounts"]}
    assert mounts == {"tmp": "/tmp"}
    assert [volume["name"] for volume in pod()["volumes"]] == ["tmp"]
    assert container()["resources"]["limits"]["memory"] == container()["resources"]["requests"]["memory"]


def test_the_selectors_meet() -> None:
    labels = manifest("Deployment")["spec"]["template"]["metadata"]["labels"]
    assert manifest("Deployment")["spec"]["selector"]["matchLabels"] == labels
    assert manifest("PodDisruptionBudget")["spec"]["selector"]["matchLabels"] == labels
    assert pod()["topologySpreadConstraints"][0]["labelSelector"]["matchLabels"] == labels
    service = manifest("Service")["spec"]
    assert service["selector"] == labels
    assert [each["targetPort"] for each in service["ports"]] == ["http"], "the admin port is nobody else's business"
    target = manifest("HorizontalPodAutoscaler")["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == ("Deployment", manifest("Deployment")["metadata"]["name"])


def test_the_autoscaler_follows_a_metric_of_apphost() -> None:
    metrics = manifest("HorizontalPodAutoscaler")["spec"]["metrics"]
    (own,) = [each["pods"] for each in metrics if each["type"] == "Pods"]
    assert f'Family("{own["metric"]["name"]}", "gauge"' in EXPOSITION.read_text(encoding="utf-8")
    text = (DEPLOY / "kubernetes" / "hpa.yaml").read_text(encoding="utf-8")
    assert f"seriesQuery: {own['metric']['name']}" in text
    workers = int(container()["resources"]["limits"]["cpu"])
    assert float(own["target"]["averageValue"]) < workers * SETTINGS["threads"].default


def test_no_key_is_misspelt() -> None:
    """All keys are known here, so a slip is one that is not; Kubernetes would drop it with a warning at best."""
    names = {key for each in MANIFESTS.values() for key in keys(each)}
    assert names - set(KEYS.split()) == set()


KEYS = """
apiVersion kind metadata name labels annotations spec selector matchLabels template app.kubernetes.io/name
prometheus.io/scrape prometheus.io/port prometheus.io/path
strategy type rollingUpdate maxSurge maxUnavailable minReadySeconds progressDeadlineSeconds
terminationGracePeriodSeconds automountServiceAccountToken enableServiceLinks securityContext runAsNonRoot runAsUser
runAsGroup fsGroup seccompProfile topologySpreadConstraints maxSkew topologyKey whenUnsatisfiable labelSelector
containers image args ports containerPort startupProbe readinessProbe livenessProbe httpGet path port periodSeconds
timeoutSeconds failureThreshold resources requests limits cpu memory allowPrivilegeEscalation readOnlyRootFilesystem
capabilities drop volumeMounts mountPath volumes emptyDir sizeLimit targetPort
scaleTargetRef minReplicas maxReplicas metrics pods metric target averageValue resource averageUtilization behavior
scaleDown stabilizationWindowSeconds
"""
