"""The example of a watched trainer: its three commands do what it says."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from .conftest import ROOT
from .daemon import Daemon

TRAIN = ROOT / "examples" / "watch" / "train.py"


def test_the_commands_of_the_example(tmp_path: Path) -> None:
    out, store = tmp_path / "out", f"file://{tmp_path}/store"

    def watched(daemon: Daemon, *more: str) -> subprocess.CompletedProcess[str]:
        watch = [sys.executable, "-m", "modelcache", "watch", str(out), "--name", "line", "--resume", "--"]
        command = [*watch, sys.executable, str(TRAIN), str(out), *more]
        return subprocess.run(command, env=daemon.environment, capture_output=True, text=True)

    whole = subprocess.run([sys.executable, str(TRAIN), str(tmp_path / "whole")], capture_output=True, text=True, check=True)
    with Daemon.start(tmp_path / "one", store=store) as one, Daemon.start(tmp_path / "two", store=store) as two:
        killed = watched(one, "--die-at", "47")
        assert killed.returncode == 128 + 9, killed.stderr
        shutil.rmtree(out)
        ended = watched(two)
        assert ended.returncode == 0, ended.stderr
    assert [line for line in ended.stdout.splitlines() if "step" in line][:2] == ["goes on after step 40", whole.stdout.strip()]
