"""@huggingface_hub in real runs: every form of `load`, what a scope finds again, and that a hit asks nobody."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from .daemon import Daemon
from .hub.handle import Hub
from .metaflow_runs import Runs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    with Hub.start(tmp_path / "hub") as hub:
        for name in ("org/tiny", "org/data", "org/third"):
            hub.commit(name, {"config.json": b"{}", "weights.safetensors": name.encode(), "sub/vocab.txt": b"a b"})
        yield hub


def test_forms_scopes_and_a_branch_that_moves(tmp_path: Path, hub: Hub) -> None:
    first = hub.commit("org/moving", {"which": b"first"})
    with Daemon.start(tmp_path / "root", hub, fresh_seconds=0) as daemon:
        runs = Runs(tmp_path, daemon.environment)
        cold = runs.run("repos.py")
        everything = ["config.json", "sub", "weights.safetensors"]
        assert cold.the("start", "contents") == {"org/tiny": everything, "org/data": everything, "org/third": ["config.json"]}
        assert cold.the("start", "path") == "./mine"
        assert cold.the("start", "hits") == {"org/tiny": False, "org/data": False, "org/third": False}
        metadata = cold.the("start", "metadata")
        assert metadata["repo_id"] == "org/third" and metadata["registry"] == "huggingface" and metadata["repo_type"] == "model"
        assert metadata["allow_patterns"] == ["*.json"] and len(metadata["commit"]) == 40
        reference = cold.the("start", "reference")
        assert reference["type"] == "checkpoint" and reference["key"].startswith(
            "mf.huggingface_hub/checkpoints/artifacts/ReposFlow/start/ca855c711c66/a92ae9615600/"
        )
        key = reference["key"]
        assert cold.the("everybody", "selected") == ["config.json"]
        assert f"[@model] Loading Artifact with name `reference` [type:checkpoint] with key: {key}" in cold.log("everybody")
        assert cold.the("everybody", "here") == everything
        everybodys = cold.the("everybody", "global")
        assert everybodys.startswith("mf.huggingface_hub/checkpoints/artifacts/mf:internal/huggingface-hub/registry:global/fully-global/")
        said = f"[@huggingface_hub] Loading model from datastore to ./put/here. Model being loaded: {everybodys}"
        assert said in cold.log("everybody")
        assert cold.the("everybody", "moved")[0] == first
        assert cold.the("everybody", "block") == "first"
        assert cold.the("everybody", "kept") == ["./kept", ["which"]]
        assert cold.the("everybody", "loaded") == ["which"]
        assert cold.the("end", "temporary") == ["./temporary", True]
        assert cold.the("end", "gone") is False
        assert cold.the("end", "exists") == ["./kept", "./put/here"]

        asked = len(hub.requests())
        second = hub.commit("org/moving", {"which": b"second"})
        warm = runs.run("repos.py")
        assert warm.the("start", "hits") == {"org/tiny": True, "org/data": True, "org/third": True}
        assert warm.the("everybody", "block") == "first"
        assert len(hub.requests()) == asked

        forced = runs.run("repos.py", "run", "--force", "True")
        assert forced.the("everybody", "moved")[0] == second
        assert forced.the("everybody", "block") == "second"
        assert runs.run("repos.py").the("everybody", "block") == "second"  # for good
