"""Checkpoints of a task without Metaflow: a child process by its environment, and a next attempt on another node."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import IO, Any

import pytest

from modelcache import loading
from modelcache.client import Client
from modelcache.errors import ReferenceNotFoundError
from modelcache.protocol import Load, Progress
from modelcache.tasks import IDENTIFIER_VARIABLE, TASK_VARIABLE, UID_VARIABLE, Task, of_environment

from .daemon import Daemon
from .saves import fill
from .test_cli import run

TASK = Task("Flow", "1", "train", "2", "a92ae9615600", "bfa8ee162568", branch="0/3")
SAVE = """
import json, sys
import modelcache
from modelcache.checkpoints import Checkpoint
reference = Checkpoint().save(sys.argv[1], json.loads(sys.argv[2]), name="best.of", storage_format="tar")
modelcache.flush()
print(json.dumps(reference))
"""
BEGIN = """
import json, os, sys
from modelcache import checkpoints, tasks
current = checkpoints.CurrentCheckpoint(tasks.of_environment())
current.begin(sys.argv[1])
print(json.dumps([current.is_loaded and current.info.metadata, sorted(os.listdir(current.directory))]))
"""


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[tuple[Daemon, Daemon]]:
    store = f"file://{tmp_path}/store"
    with Daemon.start(tmp_path / "a", store=store) as here, Daemon.start(tmp_path / "b", store=store) as there:
        yield here, there


def start(daemon: Daemon, task: Task, code: str, *arguments: str, **more: str) -> subprocess.Popen[str]:
    environment = {**daemon.environment, **task.environment(), "TMPDIR": "/dev/shm", **more}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def said(process: subprocess.Popen[str]) -> tuple[Any, str]:
    out, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    return json.loads(out), errors


def save(daemon: Daemon, task: Task, folder: Path, number: int) -> dict[str, Any]:
    reference: dict[str, Any] = said(start(daemon, task, SAVE, str(folder), json.dumps({"number": number})))[0]
    return reference


def test_a_task_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    task = TASK._replace(node=3, attempt=2, datastore="s3://bucket/flows")
    variables = task.environment()
    assert variables[UID_VARIABLE] == "Flow/1/train/2/a92ae9615600/bfa8ee162568/2" and variables[IDENTIFIER_VARIABLE] == task.identifier
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert of_environment() == task
    monkeypatch.delenv(TASK_VARIABLE)  # as metaflow-checkpoint sets it
    assert of_environment() == TASK._replace(attempt=2, branch="")
    for odd in ("", "Flow/1/train", "Flow/1/train/2/a/b/c", "//////0"):
        monkeypatch.setenv(UID_VARIABLE, odd)
        with pytest.raises(Exception, match="task"):
            of_environment()


@pytest.mark.timeout(120)
def test_the_next_attempt_begins_on_another_node(tmp_path: Path, nodes: tuple[Daemon, Daemon]) -> None:
    here, there = nodes
    folder = fill(tmp_path / "out", {"weights": b"w" * 300_000, "config": b"{}"})
    first = save(here, TASK, folder, 1)
    assert first["key"].startswith("mf.checkpoints/checkpoints/artifacts/Flow/train/bfa8ee162568/a92ae9615600/")
    assert (first["name"], first["attempt"], first["foreach_index"]) == ("best.of", 0, "0/3")
    save(here, TASK._replace(branch="0/4"), folder, 99)  # an equal item
    retry = TASK._replace(attempt=1)
    files = ["config", "weights"]
    assert said(start(there, retry, BEGIN, "fresh"))[0] == [{"number": 1}, files]
    assert said(start(there, TASK, BEGIN, "fresh"))[0] == [False, []]
    assert said(start(there, retry, BEGIN, "none"))[0] == [False, []]
    other = TASK._replace(run="7", task="8")
    assert said(start(there, other._replace(attempt=1), BEGIN, "fresh"))[0] == [False, []]
    assert said(start(there, other, BEGIN, "eager"))[0] == [{"number": 1}, files]

    # A newer one is announced, and its reference is not there yet.
    second = save(here, TASK, folder, 2)
    reference = tmp_path / "store/refs" / f"{second['key']}.json"
    aside = tmp_path / "aside.json"
    os.replace(reference, aside)
    told = {name: second[name] for name in ("key", "type", "pathspec", "attempt", "created_on", "foreach_index")}
    announced = {**told, "format": 1, "node": "far"}
    reference.with_suffix(".pending").write_text(json.dumps(announced))

    waiting = start(there, retry, BEGIN, "fresh", MODELCACHE_PENDING_SECONDS="60")
    assert waiting.stderr is not None
    line = read_line(waiting.stderr)
    assert f"waiting for {second['key']}, which far is bringing to the store" in line
    os.replace(aside, reference)
    assert said(waiting)[0] == [{"number": 2}, files]

    os.replace(reference, aside)
    found, errors = said(start(there, retry, BEGIN, "fresh", MODELCACHE_PENDING_SECONDS="0"))
    assert found == [{"number": 1}, files] and f"skipping {second['key']}: far has not brought it" in errors

    # One that lost a part is skipped too.
    os.replace(aside, reference)
    kept = json.loads(reference.read_text())
    reference.write_text(json.dumps({**kept, "tree": "0" * 64}))
    found, errors = said(start(there, retry, BEGIN, "fresh"))
    assert found == [{"number": 1}, files] and f"skipping {second['key']}: " in errors


@pytest.mark.timeout(60)
def test_a_load_waits_for_what_another_node_is_bringing(tmp_path: Path, nodes: tuple[Daemon, Daemon]) -> None:
    here, there = nodes
    saved = save(here, TASK, fill(tmp_path / "out", {"weights": b"w"}), 1)
    reference = tmp_path / "store/refs" / f"{saved['key']}.json"
    aside = tmp_path / "aside.json"
    os.replace(reference, aside)
    client, request = Client(there.socket), Load(saved["key"])
    with closing(client), ThreadPoolExecutor() as threads:
        with pytest.raises(ReferenceNotFoundError, match="no save has the key") as found:
            loading.when_there(client, request, None)
        assert "pending" not in found.value.data

        announced = {"format": 1, "key": saved["key"], "node": "far", "created_on": saved["created_on"]}
        reference.with_suffix(".pending").write_text(json.dumps(announced))
        shown: queue.Queue[Progress] = queue.Queue()
        waiting = threads.submit(loading.when_there, client, request, shown.put)
        while (progress := shown.get(timeout=30)).phase != "paused":
            pass
        assert progress.message == f"{saved['key']} is not in the store yet: node far has been bringing it since {saved['created_on']}"
        os.replace(aside, reference)
        loaded = waiting.result(timeout=30)
        assert os.listdir(loaded.reply.path) == ["weights"] and loaded.reply.reference["metadata"] == {"number": 1}
        loaded.lease.close()

    os.replace(reference, aside)
    environment = {**there.environment, "MODELCACHE_PENDING_SECONDS": "0"}
    ran = run(environment, "load", saved["key"])
    assert ran.returncode == 3 and "node far has been bringing it since" in ran.stderr and "hint: " in ran.stderr
    code = "import sys; from modelcache.models import load_model; load_model(sys.argv[1], 'nowhere')"
    failed = start(there, TASK, code, saved["key"], MODELCACHE_PENDING_SECONDS="0.1").communicate(timeout=30)[1]
    assert "KeyNotFoundError" in failed and "node far has been bringing it since" in failed


def read_line(stream: IO[str]) -> str:
    found: list[str] = []
    reading = threading.Thread(target=lambda: found.append(stream.readline()), daemon=True)
    reading.start()
    reading.join(30)
    return found[0] if found else ""
