"""`@checkpoint(watch=...)` and `current.checkpoint.watch`: a trainer in a task that is killed goes on where it was, on whichever node."""

from __future__ import annotations

from pathlib import Path

import pytest

from . import trainer
from .conftest import ROOT
from .daemon import Daemon
from .metaflow_runs import Runs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


def ended(step: int) -> list[str]:
    return ["ended", str(step), trainer.weights_after(step).hex()]


def test_a_trainer_in_a_task(tmp_path: Path) -> None:
    with Daemon.start(tmp_path / "root", store=f"file://{tmp_path}/store") as daemon:
        runs = Runs(tmp_path, daemon.environment)
        runs.environment["PYTHONPATH"] += f":{ROOT}"
        run = runs.run("watched.py")
        assert run.shown("start", "found") == [[0, [], []], [1, ["checkpoint-20"], []]]
        assert run.the("start", "trained") == ["resumed", "20", *ended(30)]
        assert run.the("by_hand", "kept") == ["mine", [20], []]
        assert run.the("end", "of start") == [["out", 30, 1]]

        eager = runs.run("watched.py", "run", "--kill", "0", "--steps", "40")  # another run goes on with it
        assert eager.the("start", "found") == [0, ["checkpoint-30"], []]
        assert eager.the("start", "trained") == ["resumed", "30", *ended(40)]

        refused = runs.run("wrong_watch.py", expected=1)
        assert "@checkpoint: watch is the path of a folder, not 5" in refused.output
