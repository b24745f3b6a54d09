"""What the demo needs beside its story: claims that are checked before they are printed, and tasks in processes of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

TASK = Path(__file__).with_name("task.py")
TASK_SECONDS = 90.0


class Claims:
    """Prints what is claimed, and remembers whether it was true."""

    def __init__(self) -> None:
        self.checked = 0
        self.false: list[str] = []

    def claim(self, text: str, is_true: bool) -> None:
        self.checked += 1
        print(f"   {text}" if is_true else f"   FALSE: {text}")
        if not is_true:
            self.false.append(text)


class Done(NamedTuple):
    pid: int
    path: Path
    seconds: list[float]  # of each call


class Task:
    """`examples/task.py` in a process; it has started when this returns, and asks after `go`."""

    def __init__(self, repo: str, environment: Mapping[str, str], calls: int = 1) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(TASK), repo, str(calls)],
            env=dict(environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        self._process.stdout.readline()

    def go(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def wait(self) -> Done:
        output, errors = self._process.communicate(timeout=TASK_SECONDS)
        if self._process.returncode:
            raise RuntimeError(f"a task failed:\n{errors}")
        said = json.loads(output)
        return Done(self._process.pid, Path(said["path"]), said["seconds"])
