"""Repos as a task has them, without Metaflow: whose files a `with` block shows, and when they go."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from modelcache.tasks import Task

from .daemon import Daemon
from .hub.handle import Hub

FILES = {"config.json": b"{}", "weights.bin": b"w" * 300_000}
BLOCKS = """
import json, os, modelcache
from modelcache import shared_repos, tasks
hub = shared_repos.CurrentHuggingfaceHub(tasks.of_environment())
def folders(): return sorted(name for name in os.listdir(os.environ["TMPDIR"]) if not name.startswith("."))
reference = hub.snapshot_download("org/tiny")
whole = modelcache.load(reference)  # until the process ends
before, inside = folders(), []
for _ in range(2):
    with hub.load("org/tiny") as path:
        inside.append([path, sorted(os.listdir(path)), os.access(path, os.W_OK), path == whole, len(folders()) - len(before)])
        if os.environ["MODELCACHE_LOADED"] == "private":
            open(os.path.join(path, "config.json"), "w").write("changed")
with hub.load("org/tiny", path="kept") as path:
    pass
try:
    with hub.load("org/tiny"):
        raise KeyError
except KeyError:
    pass
print(json.dumps({"inside": inside, "after": folders() == before, "whole": sorted(os.listdir(whole)), "kept": sorted(os.listdir("kept"))}))
"""


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ["private", "shared"])
def test_what_a_block_was_given_goes_at_its_end(tmp_path: Path, hub: Hub, kind: str) -> None:
    hub.commit("org/tiny", FILES)
    (tmp_path / "temporary").mkdir()
    with Daemon.start(tmp_path / "root", hub) as daemon:
        task = Task("Flow", "1", "train", "2", "a92ae9615600", "bfa8ee162568")
        more = {"TMPDIR": str(tmp_path / "temporary"), "MODELCACHE_LOADED": kind}
        ran = subprocess.run(
            [sys.executable, "-c", BLOCKS],
            env={**daemon.environment, **task.environment(), **more},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=50,
        )
        assert ran.returncode == 0, ran.stderr
        said = json.loads(ran.stdout)
        names = sorted(FILES)
        for path, files, is_writable, is_whole, more_folders in said["inside"]:
            assert files == names and Path(path).exists() is is_whole
            if kind == "private":
                assert is_writable and not is_whole and more_folders == 1
        assert said["after"] is True and said["whole"] == said["kept"] == names
        assert list((tmp_path / "temporary").iterdir()) == []
        assert (tmp_path / "kept/config.json").read_bytes() == b"{}"
