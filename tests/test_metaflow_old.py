"""Beside the real metaflow-checkpoint: a flow that ran with it goes on with ours, unchanged; and what happens where both are installed."""

from __future__ import annotations

import shutil
import sysconfig
from pathlib import Path

import pytest

from benchmarks.peers import checkpoint_python

from .daemon import Daemon
from .hub.handle import Hub
from .metaflow_runs import FLOWS, Runs
from .test_metaflow_stores import private
from .test_wheel import wheel
from .wheels import Install

__all__ = ["wheel"]  # a fixture

pytestmark = [pytest.mark.soak, pytest.mark.timeout(400)]  # the first run makes a virtualenv

FLOW = "eager.py"
LISTED = [["best", 2], ["epoch", 1], ["epoch", 0]]  # name and version, newest first
AFTERWARDS = """
import json, sys
from metaflow import Checkpoint, Task, namespace
from modelcache import checkpoints
namespace(None)
def show(word, value): print("0 1 [r/after/t (pid 1)] %s %s" % (word, json.dumps(value)))
task = sys.argv[1]
show("recorded", [[each["name"], each["version_id"]] for each in Checkpoint().list(task=Task(task))])
found = checkpoints.Checkpoint().list(task=task)  # as where no artifact of the task can be read
show("by key", [[each["name"], each["version_id"]] for each in found])
for number, each in enumerate(found):
    Checkpoint().load(each["key"], str(number))
show("states", [open("%d/state" % number).read() for number in (1, 2)])
"""


def test_a_flow_goes_on_from_what_the_old_package_saved(tmp_path: Path) -> None:
    with Hub.start(tmp_path / "hub") as hub:
        hub.commit("org/old", {"config.json": b"{}"})
        runs = Runs(tmp_path, private(tmp_path, hub.endpoint), HF_ENDPOINT=hub.endpoint)
        ours = runs.environment
        theirs = {"HUB_PACKAGES": sysconfig.get_path("purelib"), "HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1"}
        runs.environment = {**ours, **theirs}
        del runs.environment["PYTHONPATH"]
        old = runs.python(str(FLOWS / FLOW), "run", interpreter=str(checkpoint_python()))
        assert sorted(old.shown("work", "begin")) == [["one", {}, None], ["other", {}, None]]

        tasks = dict(old.shown("work", "task"))
        asked = len(hub.requests())
        runs.environment = {**ours, "OLD_TASK": tasks["other"]}
        new = runs.run(FLOW)
        assert new.the("start", "repo") == ["config.json"] and len(hub.requests()) == asked, "a hit in the scope"
        begun = [[item, {"state": item}, ["epoch", 0, 1, task]] for item, task in tasks.items()]
        assert sorted(new.shown("work", "begin")) == sorted(begun), "the last one with latest=True, of the same item"
        assert sorted(new.shown("work", "listed")) == [LISTED] * 2
        assert new.shown("work", "everybody's") == [6, 6], "of each package three"

        after = runs.python("-c", AFTERWARDS, tasks["one"])
        assert after.the("after", "recorded") == after.the("after", "by key") == LISTED
        assert after.the("after", "states") == ["one", "one"]

        again = runs.run(FLOW)
        mine = dict(new.shown("work", "task"))
        assert sorted(each[2] for each in again.shown("work", "begin")) == sorted(["epoch", 0, 1, task] for task in mine.values())


def test_with_both_installed_one_is_in_charge_and_says_so(wheel: Path, tmp_path: Path) -> None:
    """In one virtualenv, each with its own record of what it installed: Metaflow takes the names from the last one that it finds."""
    both = Install.of(wheel, tmp_path / "both")
    (theirs,) = checkpoint_python().parents[1].glob("lib/python*/site-packages")
    shutil.copytree(theirs, both.site, dirs_exist_ok=True)
    python = str(both.bin / "python")
    with Daemon.start(tmp_path / "root") as daemon:
        runs = Runs(tmp_path, daemon.environment)
        del runs.environment["PYTHONPATH"]
        run = runs.python(str(FLOWS / "keeping.py"), "run", interpreter=python)
        said = [line for line in run.output.splitlines() if "metaflow-checkpoint" in line]
        assert len(said) == 1 and "modelcached is in charge" in said[0] and "pip uninstall" in said[0]
        assert run.the("middle", "reference")["store"] == f"file://{daemon.root}/store"
        assert run.shown("start", "begin") == [[0, False, []], [1, True, ["epoch"]]]

        names = "Checkpoint, artifact_store_from, checkpoint, delete_model, huggingface_hub, load_model, model, with_artifact_store"
        code = f"from metaflow import {names}; print(*[getattr(each, 'args', (each,))[0].__module__ for each in ({names})])"
        homes = runs.python("-c", code, interpreter=python).output.split()
        assert len(homes) == 8 and all("modelcache." in home for home in homes)
        without = runs.python("-c", "from metaflow import with_artifact_store; with_artifact_store(7)", interpreter=python, expected=1)
        assert "setting `store`" in without.output
