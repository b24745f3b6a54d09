"""A task that dies, a repo that is not for everybody, and a code package without the SDK installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import requests

from .daemon import Daemon
from .hub.handle import Hub
from .metaflow_runs import FLOWS, Runs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

TOKEN = "hf_of_a_test"


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
        runs.python(str(FLOWS / "keeping.py"), "package", "save", str(tmp_path / "code.tgz"))
        there = tmp_path / "there"
        there.mkdir()
        subprocess.run(["tar", "-xzf", str(tmp_path / "code.tgz"), "-C", str(there)], check=True)
        assert not (there / ".mf_code/modelcached").exists()
        # What Metaflow itself needs lies in a folder that the interpreter takes for no place of installed packages.
        others = str(Path(str(requests.__file__)).parents[1])
        runs.environment |= {
            "PYTHONPATH": os.pathsep.join([str(there / ".mf_code"), str(there), others]),
            "METAFLOW_EXTRACTED_ROOT": str(there),
        }
        base = getattr(sys, "_base_executable", sys.executable)
        code = "import modelcache; from metaflow import Checkpoint; print(modelcache.__file__, Checkpoint.__module__)"
        module, home = runs.python("-c", code, interpreter=base).output.split()
        assert Path(module).is_relative_to(there) and home == "metaflow_extensions.modelcache.client"
        run = runs.python(str(there / "keeping.py"), "run", interpreter=base)
        assert run.the("end", "names") == ["first", "model_key", "tarred"]
