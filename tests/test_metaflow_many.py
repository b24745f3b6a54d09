"""Tasks beside each other: in a foreach, in one inside another, in a gang, in a run that is resumed."""

from __future__ import annotations

from pathlib import Path

import pytest

from .daemon import Daemon
from .hub.handle import Hub
from .metaflow_runs import Runs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.mark.soak
def test_each_finds_its_own(tmp_path: Path) -> None:
    with Hub.start(tmp_path / "hub") as hub, Daemon.start(tmp_path / "root", hub) as daemon:
        weights = b"w" * (1 << 20)
        hub.commit("org/tiny", {"config.json": b"{}", "weights.safetensors": weights})
        runs = Runs(tmp_path, daemon.environment)
        first = runs.run("many.py", expected=1)
        worked = sorted(first.shown("work", "work"))
        assert [(index, loaded) for index, _, loaded in worked] == [(0, None), (1, None)]
        assert worked[0][1] == worked[1][1]  # equal items have one identifier
        assert [contents for _, contents in first.shown("work", "hub")] == [["config.json", "weights.safetensors"]] * 2
        assert hub.bytes_sent("weights.safetensors") == len(weights)
        assert sorted(first.shown("nested", "nested")) == [[[0, 0], None], [[0, 1], None], [[1, 0], None]]

        assert first.the("end", "end") == [False, [], ["many.py"]]

        (runs.folder / "mended").touch()
        again = runs.run("many.py", "resume", "work")
        assert sorted((index, loaded) for index, _, loaded in again.shown("work", "work")) == [(0, 0), (1, 1)]
        assert sorted(again.shown("nested", "nested")) == [[[0, 0], [0, 0]], [[0, 1], [0, 1]], [[1, 0], [1, 0]]]
        assert again.the("end", "end") == [True, ["state"], ["many.py"]]


def test_a_gang_on_two_nodes(tmp_path: Path) -> None:
    """Two roots, two daemons, one store; each node's next attempt runs on the other root."""
    store = f"file://{tmp_path}/store"
    with Daemon.start(tmp_path / "a", store=store) as one, Daemon.start(tmp_path / "b", store=store) as other:
        run = Runs(tmp_path, one.environment, SOCKETS=f"{one.socket}:{other.socket}").run("gang.py")
        gang = sorted(run.shown("gang", "gang"), key=lambda shown: (shown[1], shown[0]))
        assert [(rank, attempt, loaded) for rank, attempt, loaded, _ in gang] == [(0, 0, None), (1, 0, None), (0, 1, 0), (1, 1, 1)]
        assert {identifier for *_, identifier in gang} == {"c2df85824caf"}
        keys = run.shown("gang", "key")
        assert len({pathspec for pathspec, _ in keys}) == 1 and len({key for _, key in keys}) == len(keys) == 4
        assert one.status()["spool"]["sent_saves"] == other.status()["spool"]["sent_saves"] == 2


@pytest.mark.soak
def test_twenty_tasks_one_download(tmp_path: Path) -> None:
    with Hub.start(tmp_path / "hub") as hub, Daemon.start(tmp_path / "root", hub) as daemon:
        weights = b"w" * (64 << 20)
        hub.commit("org/tiny", {"config.json": b"{}", "weights.safetensors": weights})
        run = Runs(tmp_path, daemon.environment, TASKS="20").run("many.py", expected=1)
        assert len(run.shown("work", "hub")) == 20
        assert hub.bytes_sent("weights.safetensors") == len(weights)
