"""@checkpoint and @model in real runs: what a retry, the next step, and whoever comes later find."""

from __future__ import annotations

from pathlib import Path

import pytest

from .daemon import Daemon
from .metaflow_runs import Runs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

AFTERWARDS = """
import json, os, sys
from metaflow import Checkpoint, Run, Task, delete_model, load_model, namespace
from modelcache import errors
namespace(None)
run = Run(sys.argv[1])
def show(word, value): print("0 1 [r/after/t (pid 1)] %s %s" % (word, json.dumps(value)))
task = run["start"].task
show("recorded", [each["name"] for each in task["_task_checkpoints"].data])
show("latest", task["_task_latest_checkpoint"].data["attempt"])
show("stored", [each["label"] for each in run["middle"].task["_task_stored_models"].data])
metadata = run["middle"].task.metadata_dict
show("saved-models", json.loads(metadata["saved-models"]))
show("loaded-models", json.loads(run["end"].task.metadata_dict["loaded-models"]))
show("lineage", {name: value for name, value in task.metadata_dict.items() if name.startswith("checkpoint-load-")})
show("by task", [each["name"] for each in Checkpoint().list(task=task)])
show("by pathspec", [[each.name, each.attempt] for each in Checkpoint().list(task=task.pathspec, attempt="0", as_dict=False)])
load_model(run.data.tarred, "./after")
show("model", os.listdir("./after"))
Checkpoint().load(run.data.first["key"], "./first")
show("checkpoint", os.listdir("./first"))
show("deleted", delete_model(run.data.files))
kinds = []
for call in (
    lambda: load_model(run.data.files, "./gone"),
    lambda: load_model("nothing", "./gone"),
    lambda: load_model(None, "./gone"),
    lambda: load_model(7, "./gone"),
    lambda: Checkpoint().list(),
    lambda: Checkpoint().list(task=task, full_namespace=True),
    lambda: Checkpoint().save("./after"),
):
    try:
        call()
        kinds.append("nothing")
    except Exception as error:
        kinds.append([type(error).__name__, isinstance(error, ValueError), isinstance(error, KeyError)])
show("errors", kinds)
"""


def test_retries_models_and_what_is_found_later(tmp_path: Path) -> None:
    with Daemon.start(tmp_path / "root") as daemon:
        runs = Runs(tmp_path, daemon.environment)
        run = runs.run("keeping.py")
        assert run.shown("start", "begin") == [[0, False, []], [1, True, ["epoch"]]]
        assert run.the("start", "info") == [0, "mfchckpt", {"attempt": 0}, True]
        assert run.the("start", "listed") == [["child", 0], ["best", 0], ["mfchckpt", 0]]
        assert run.the("start", "by attempt") == ["child", "best", "mfchckpt"]
        assert run.the("start", "by name") == ["best"]
        assert run.the("start", "everybody's") == 3
        assert run.the("middle", "none") == [False, []]
        assert run.the("middle", "loaded") == ["epoch"]
        reference = run.the("middle", "reference")
        assert reference["label"] == "basic.model" and reference["uuid"] == reference["model_uuid"]
        assert reference["key"] == f"mf.models/models/artifacts/{reference['uuid']}" and reference["type"] == "model"
        assert reference["pathspec"] == f"KeepingFlow/{run.id}/middle/2" and reference["attempt"] == 0
        assert run.the("middle", "label") == "KeepingFlow_middle"
        assert run.the("end", "names") == ["first", "model_key", "tarred"]
        assert run.the("end", "contents") == {"first": ["epoch"], "model_key": ["weights"], "tarred": ["model.h5"]}
        assert run.the("end", "path") == "./models/mine"
        assert run.the("end", "is it") == [True, False, {"loss": 0.25}, "checkpoint"]
        assert run.the("end", "explicit") == ["./explicit", ["model.h5"], "basic.model"]
        assert run.the("end", "by key") == ["weights"]
        log = run.log("end")
        assert f"[@model] Loading Artifact with name `tarred` [type:model] with key: {reference['key']}" in log
        assert any(text.startswith("[@model] Loaded artifact `tarred[type:model]` in 0.") and text.endswith(" seconds") for text in log)
        assert daemon.status()["spool"]["saves"] == 0  # a step ends when the store has what it saved

        after = runs.python("-c", AFTERWARDS, f"KeepingFlow/{run.id}")
        assert after.the("after", "recorded") == ["mfchckpt"]
        assert after.the("after", "latest") == 1
        assert after.the("after", "stored") == ["KeepingFlow_middle", "basic.model"]
        assert reference["key"] in after.the("after", "saved-models")["keys"]
        assert reference["key"] in after.the("after", "loaded-models")["keys"]
        lineage = after.the("after", "lineage")
        assert lineage["checkpoint-load-attempt"] == "0" and lineage["checkpoint-load-name"] == "mfchckpt"
        assert lineage["checkpoint-load-pathspec"] == f"KeepingFlow/{run.id}/start/1"
        assert after.the("after", "by task") == ["mfchckpt"]
        assert after.the("after", "by pathspec") == [["child", 0], ["best", 0], ["mfchckpt", 0]]
        assert after.the("after", "model") == ["model.h5"]
        assert after.the("after", "checkpoint") == ["epoch"]
        assert after.the("after", "deleted") is True
        assert after.the("after", "errors") == [
            ["KeyNotFoundError", False, True],
            ["KeyNotCompatibleException", True, False],
            ["ValueError", True, False],
            ["ValueError", True, False],
            ["ValueError", True, False],
            ["ValueError", True, False],
            ["CheckpointException", False, False],
        ]
