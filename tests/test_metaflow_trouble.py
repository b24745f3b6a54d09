"""A task that dies, a repo that is not for everybody, and a code package without the SDK installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import requests

from .conftest import ROOT
from .daemon import Daemon
from .hub.handle import Hub
from .metaflow_runs import FLOWS, Runs
from .test_wheel import wheel
from .wheels import Install

__all__ = ["wheel"]  # a fixture

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

TOKEN = "hf_of_a_test"
BASE = str(getattr(sys, "_base_executable", sys.executable))  # has nothing installed
# What Metaflow itself needs lies in a folder that the interpreter takes for no place of installed packages.
OTHERS = str(Path(str(requests.__file__)).parents[1])


def test_a_killed_task_and_a_private_repo(tmp_path: Path) -> None:
    with Hub.start(tmp_path / "hub") as hub, Daemon.start(tmp_path / "root", hub, store=f"file://{tmp_path}/store") as daemon:
        hub.commit("org/secret", {"config.json": b"{}"}, private=True, tokens=[TOKEN])
        runs = Runs(tmp_path, daemon.environment)
        run = runs.run("killed.py", "run", "--token", TOKEN)
        assert run.shown("start", "found") == [[[], None], [["part0", "part1", "part2"], {"number": 2}]]
        assert run.the("end", "loaded") == []
        assert any("`nothing` is not loaded: " in text for text in run.log("end"))
        assert run.the("end", "secret") == [True, 0]
        assert all(TOKEN not in path.read_text() for path in (tmp_path / "store/refs").rglob("*.json"))

        assert runs.run("killed.py", "run", "--token", TOKEN).the("end", "secret") == [True, 0]
        other = runs.run("killed.py", "run")  # a hit in the scope, but not for whoever has no token
        assert other.the("end", "refused") == "RepositoryNotFoundError"


def test_the_sdk_travels_in_the_code_package(tmp_path: Path) -> None:
    """As on a remote node: the package is unpacked beside a Python that has neither Metaflow nor us."""
    with Daemon.start(tmp_path / "root") as daemon:
        runs = Runs(tmp_path, daemon.environment)
        there = travel(runs, FLOWS / "keeping.py")
        assert not (there / ".mf_code/modelcached").exists()
        code = "import modelcache; from metaflow import Checkpoint; print(modelcache.__file__, Checkpoint.__module__)"
        module, home = runs.python("-c", code, interpreter=BASE).output.split()
        assert Path(module).is_relative_to(there) and home == "metaflow_extensions.modelcache.client"
        run = runs.python(str(there / "keeping.py"), "run", interpreter=BASE)
        assert run.the("end", "names") == ["first", "model_key", "tarred"]


def test_it_travels_with_a_flow_that_uses_no_decorator(wheel: Path, tmp_path: Path) -> None:
    """Metaflow takes every installed extension along, so without the SDK `import metaflow` would fail in any flow's tasks."""
    installed = Install.of(wheel, tmp_path / "installed")
    (installed.site / "others.pth").write_text(OTHERS + "\n")  # behind what is installed
    with Daemon.start(tmp_path / "root") as daemon:
        runs = Runs(tmp_path, daemon.environment)
        (runs.folder / "weights").write_text("w")
        key = runs.python("-c", "import modelcache; print(modelcache.save('weights', label='x')['key'])").output.strip()
        (runs.folder / "key").write_text(key)
        del runs.environment["PYTHONPATH"]
        there = travel(runs, FLOWS / "plain.py", interpreter=str(installed.bin / "python"))
        runs.python(str(there / "plain.py"), "run", interpreter=BASE)
        assert (runs.folder / "loaded/weights").read_text() == "w"
        shutil.rmtree(there / ".mf_code/modelcache")  # an editable installation is not taken along
        names = "import metaflow; print([hasattr(metaflow, name) for name in ('FlowSpec', 'load_model', 'checkpoint')])"
        assert runs.python("-c", names, interpreter=BASE).output.strip() == "[True, False, False]"


@pytest.mark.soak
@pytest.mark.timeout(300)
def test_the_code_package_beside_another_huggingface_hub(tmp_path: Path) -> None:
    """The documented flow, for which Metaflow makes an environment with an old one: that, and what Metaflow itself puts there."""
    python = str(tmp_path / "venv/bin/python")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet"]
    subprocess.run([*install, "huggingface-hub==0.16.4", "boto3", "requests"], check=True)
    with Hub.start(tmp_path / "hub") as hub, Daemon.start(tmp_path / "root", hub) as daemon:
        hub.commit("bert-base-uncased", {"config.json": b"{}", "tokenizer.txt": b"a b", "model.safetensors": b"w"})
        runs = Runs(tmp_path, daemon.environment)
        there = travel(runs, ROOT / "examples/flows/hub_deco_flow.py", others="")
        run = runs.python(str(there / "hub_deco_flow.py"), "run", interpreter=python)
        assert [text.startswith("Contents: ['") for text in run.log("end") if "Contents" in text] == [True]
        code = """
import huggingface_hub, modelcache
from huggingface_hub.utils import RepositoryNotFoundError
print(modelcache.__file__, huggingface_hub.__version__)
try:
    modelcache.snapshot_download("org/missing")
except RepositoryNotFoundError as error:
    print(type(error).__module__)
"""
        module, version, home = runs.python("-c", code, interpreter=python).output.split()
        assert Path(module).is_relative_to(there) and version == "0.16.4" and home == "modelcache.errors"


def travel(runs: Runs, flow: Path, others: str = OTHERS, interpreter: str = sys.executable) -> Path:
    """Unpacks a flow's code package in a new folder, and from now on a Python finds there what it imports. The folder."""
    archive, there = runs.folder / "code.tgz", runs.folder.parent / "there"
    runs.python(str(flow), "package", "save", str(archive), interpreter=interpreter)
    there.mkdir()
    subprocess.run(["tar", "-xzf", str(archive), "-C", str(there)], check=True)
    path = os.pathsep.join(filter(None, [str(there / ".mf_code"), str(there), others]))
    runs.environment |= {"PYTHONPATH": path, "METAFLOW_EXTRACTED_ROOT": str(there)}
    return there
