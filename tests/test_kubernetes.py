"""kubernetes/: what it names exists, both sides see the same folders, and the probe does what Kubernetes makes of it."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from modelcache import runtime
from modelcached import arguments, config
from modelcached.command import OVERTIME_SECONDS

from .conftest import ROOT
from .daemon import Daemon

FOLDER = ROOT / "kubernetes"
MEMORY = {"Mi": 1 << 20, "Gi": 1 << 30}


@pytest.fixture(scope="module")
def documents() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / "daemonset.yaml").read_text()))


@pytest.fixture(scope="module")
def settings(documents: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> config.Config:
    """What the daemon makes of the ConfigMap, as it is mounted."""
    (found,) = [document for document in documents if document["kind"] == "ConfigMap"]
    file = tmp_path_factory.mktemp("config") / config.DEFAULT_FILE.name
    file.write_text(found["data"][config.DEFAULT_FILE.name])
    return config.load({}, {}, file=file)


@pytest.fixture(scope="module")
def daemon_pod(documents: list[dict[str, Any]]) -> dict[str, Any]:
    (found,) = [document for document in documents if document["kind"] == "DaemonSet"]
    assert found["spec"]["selector"]["matchLabels"].items() <= found["spec"]["template"]["metadata"]["labels"].items()
    pod: dict[str, Any] = found["spec"]["template"]["spec"]
    return pod


@pytest.fixture(scope="module")
def container(daemon_pod: dict[str, Any]) -> dict[str, Any]:
    (found,) = daemon_pod["containers"]
    return dict(found)


@pytest.fixture(scope="module")
def task_pod() -> dict[str, Any]:
    pod: dict[str, Any] = yaml.safe_load((FOLDER / "pod.yaml").read_text())["spec"]
    return pod


def mounts(pod: dict[str, Any], container: dict[str, Any]) -> dict[str, tuple[str, bool]]:
    """Where folders of the host are in the container, and whether it may only read them."""
    on_host = {volume["name"]: volume["hostPath"]["path"] for volume in pod["volumes"] if "hostPath" in volume}
    assert {mount["name"] for mount in container["volumeMounts"]} <= {volume["name"] for volume in pod["volumes"]}
    return {
        on_host[mount["name"]]: (mount["mountPath"], mount.get("readOnly", False))
        for mount in container["volumeMounts"]
        if mount["name"] in on_host
    }


def test_configuration_is_one(settings: config.Config) -> None:
    assert settings.store.startswith("s3://")


def test_daemon_is_called_as_it_can_be(container: dict[str, Any]) -> None:
    asked = arguments.parser().parse_args(container["args"])
    assert asked.command == "serve"
    for variable in container["env"]:
        if variable["name"].startswith(config.ENVIRONMENT_PREFIX):
            assert variable["name"].removeprefix(config.ENVIRONMENT_PREFIX).lower() in config.SETTINGS


def test_root_and_socket_are_folders_of_the_host(settings: config.Config, daemon_pod: dict[str, Any], container: dict[str, Any]) -> None:
    """At their own places: the daemon answers with paths."""
    expected = {str(settings.root): (str(settings.root), False)}
    assert settings.socket is not None
    expected[str(settings.socket.parent)] = (str(settings.socket.parent), False)
    assert mounts(daemon_pod, container) == expected
    (folders,) = daemon_pod["initContainers"]
    assert mounts(daemon_pod, folders) == expected and set(expected) <= set(folders["command"])


def test_credentials_lie_where_they_are_looked_for(container: dict[str, Any]) -> None:
    environment = {variable["name"]: variable["value"] for variable in container["env"]}
    (secrets,) = [mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] == "secrets"]
    assert environment["CREDENTIALS_DIRECTORY"] == secrets
    assert Path(environment["AWS_SHARED_CREDENTIALS_FILE"]).parent == Path(secrets)


def test_tasks_see_the_same_read_only(daemon_pod: dict[str, Any], container: dict[str, Any], task_pod: dict[str, Any]) -> None:
    (task,) = task_pod["containers"]
    assert mounts(task_pod, task) == {host: (path, True) for host, (path, _) in mounts(daemon_pod, container).items()}
    environment = {variable["name"]: variable.get("value") for variable in task["env"]}
    assert environment["MODELCACHE_SOCKET"] == runtime.NODE_SOCKET
    assert float(environment["MODELCACHE_CONNECT_SECONDS"] or 0) > daemon_pod["terminationGracePeriodSeconds"]
    assert task_pod["securityContext"]["runAsUser"] != daemon_pod["securityContext"]["runAsUser"]


def test_every_variable_is_documented(task_pod: dict[str, Any]) -> None:
    documented = (ROOT / "docs" / "api.md").read_text()
    for variable in task_pod["containers"][0]["env"]:
        assert f"`{variable['name']}`" in documented


def test_one_user_without_rights(daemon_pod: dict[str, Any], container: dict[str, Any]) -> None:
    user = daemon_pod["securityContext"]["runAsUser"]
    assert daemon_pod["initContainers"][0]["command"][1] == f"{user}:{user}"
    assert f"USER {user}:{user}" in (FOLDER / "Dockerfile").read_text()
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert daemon_pod["hostUsers"] is True  # or every caller would be "nobody"


def test_it_is_given_time_and_room(settings: config.Config, daemon_pod: dict[str, Any], container: dict[str, Any]) -> None:
    assert daemon_pod["terminationGracePeriodSeconds"] > settings.shutdown_seconds + OVERTIME_SECONDS
    limit = container["resources"]["limits"]["memory"]
    assert int(limit[:-2]) * MEMORY[limit[-2:]] >= 1 << 30
    assert "cpu" not in container["resources"]["limits"]


def test_probe_tells_whether_a_daemon_answers(container: dict[str, Any], shared_tmp_path: Path) -> None:
    assert container["readinessProbe"]["exec"] == container["livenessProbe"]["exec"]
    program, *words = container["readinessProbe"]["exec"]["command"]
    command = [sys.executable, "-m", program, *words]
    with Daemon.start(shared_tmp_path / "root") as daemon:
        assert subprocess.run(command, env=daemon.environment, capture_output=True, cwd="/").returncode == 0
        environment = daemon.environment
    assert subprocess.run(command, env=environment, capture_output=True, cwd="/").returncode != 0


def test_image_is_made_of_what_there_is() -> None:
    lines = (FOLDER / "Dockerfile").read_text().splitlines()
    for line in lines:
        if line.startswith("COPY "):
            *sources, _ = line.split()[1:]
            assert all((ROOT / source).exists() for source in sources)
    extras = re.search(r"/source\[([\w,]+)\]", "\n".join(lines))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert extras is not None and set(extras[1].split(",")) <= set(project["optional-dependencies"])
    entry = next(line for line in lines if line.startswith("ENTRYPOINT"))
    assert re.findall(r'"(\w+)"', entry)[0] in project["scripts"]
