"""The helpers in a real job: four processes on two nodes load what a fifth one saved, and each node brings it once."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import modelcache
from modelcache.accelerate import get_accelerate_project_last_checkpoint_id
from modelcache.client import shared

from .conftest import ROOT
from .daemon import Daemon

pytestmark = [pytest.mark.soak, pytest.mark.timeout(600)]

SCRIPTS = ROOT / "tests" / "trainers"
QUIET = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
NODES, EACH = 2, 2


def test_a_job_on_two_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, project = tmp_path / "store", tmp_path / "project"
    trainer = [sys.executable, str(SCRIPTS / "accelerate_loop.py"), str(project)]
    trained = subprocess.run(trainer, env={**os.environ, **QUIET}, stdout=subprocess.PIPE, text=True, check=True)
    end = trained.stdout.splitlines()[-1]
    state = project / "checkpoints" / f"checkpoint_{get_accelerate_project_last_checkpoint_id(project)}"
    with contextlib.ExitStack() as stack:
        daemons = [stack.enter_context(Daemon.start(tmp_path / f"node{number}", store=f"file://{store}")) for number in range(NODES)]
        monkeypatch.setenv("MODELCACHE_SOCKET", daemons[0].socket)
        reference = modelcache.save(state, kind="checkpoint", name="accelerate")
        modelcache.flush()
        shared().close()
        shutil.copytree(state, store / "plain" / "state")
        assert job(daemons, reference["key"], f"file://{store}/plain/state") == {rank: [end, end] for rank in range(NODES * EACH)}
        first, second = (daemon.status()["store_bytes"] for daemon in daemons)
        assert first == reference["size"], "it brought the plain folder, once; what it saved it has"
        assert 2 * reference["size"] <= second < 3 * reference["size"], "it brought both, once"


def job(daemons: list[Daemon], *sources: str) -> dict[int, list[str]]:
    """What every rank had after each of its loads."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ranks, ends = [], {}
    with contextlib.ExitStack() as stack:
        for rank in range(NODES * EACH):
            node, local = divmod(rank, EACH)
            torchrun = {"RANK": rank, "LOCAL_RANK": local, "WORLD_SIZE": NODES * EACH, "LOCAL_WORLD_SIZE": EACH, "MASTER_PORT": port}
            environment = {**daemons[node].environment, **QUIET, **{name: str(value) for name, value in torchrun.items()}}
            environment |= {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
            command = [sys.executable, str(SCRIPTS / "accelerate_remote.py"), *sources]
            process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            ranks.append(stack.enter_context(process))
            stack.callback(process.kill)
        for number, process in enumerate(ranks):
            said, errors = process.communicate()
            assert process.returncode == 0, errors[-3000:]
            assert said.count(f"rank {number} of {NODES * EACH} local {number % EACH == 0}\n") == len(sources)
            ends[number] = [line for line in said.splitlines() if line.startswith("end ")]
    return ends
