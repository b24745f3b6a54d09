"""`Runs`: flows in processes of their own, as users start them, with a folder and a datastore that belong to one test.

    runs = Runs(tmp_path, daemon.environment)
    run = runs.run("keeping.py")              # tests/flows/keeping.py; AssertionError with its output unless it succeeds
    assert run.shown("start", "begin") == [[0, False, []], [1, True, ["epoch"]]]

A flow prints what a test wants to know as a word and its JSON, one line each.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

FLOWS = Path(__file__).parent / "flows"
SECONDS = 120.0
_LINE = re.compile(r"^\S+ \S+ \[([^/\]]+)/(\w+)/(\w+) \(pid \d+\)\] (.*)$", re.M)


class Line(NamedTuple):
    run: str
    step: str
    task: str
    text: str


class Run:
    """A run that has ended."""

    def __init__(self, code: int, output: str) -> None:
        self.code = code
        self.output = output
        self.lines = [Line(*found) for found in _LINE.findall(output)]

    @property
    def id(self) -> str:
        return self.lines[0].run

    def log(self, step: str) -> list[str]:
        return [line.text for line in self.lines if line.step == step]

    def shown(self, step: str, word: str) -> list[Any]:
        """What the step's tasks showed under that word, in order."""
        return [json.loads(text[len(word) + 1 :]) for text in self.log(step) if text.startswith(word + " ")]

    def the(self, step: str, word: str) -> Any:
        """What was shown once."""
        (found,) = self.shown(step, word)
        return found


class Runs:
    def __init__(self, folder: Path, environment: Mapping[str, str], **more: str) -> None:
        self.folder = folder / "work"
        self.folder.mkdir()
        self.environment = {
            "HF_HOME": "/nonexistent",
            "METAFLOW_USER": "tester",
            "METAFLOW_HOME": str(folder / "home"),
            "METAFLOW_DATASTORE_SYSROOT_LOCAL": str(folder),
            **environment,
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),  # a gang's nodes are a plain `python`
            **more,
        }

    def run(self, flow: str, *arguments: str, expected: int = 0) -> Run:
        """Runs a flow (without arguments: `run`). AssertionError unless it ends with that code."""
        return self.python(str(FLOWS / flow), *(arguments or ("run",)), expected=expected)

    def python(self, *command: str, expected: int = 0, interpreter: str = sys.executable) -> Run:
        ran = subprocess.run(
            [interpreter, *command],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=SECONDS,
        )
        assert ran.returncode == expected, ran.stdout[-6000:]
        return Run(ran.returncode, ran.stdout)
