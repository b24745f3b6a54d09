"""What processes take: wall, CPU, memory. Read from the kernel (/proc), never from the process itself, but for what a task prints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SAMPLE_SECONDS = 0.01
TASK_SECONDS = 600.0
_TICKS = os.sysconf("SC_CLK_TCK")


class Ran(NamedTuple):
    """Some tasks that started together."""

    seconds: float  # from the first call's begin to the last one's end
    cpu_seconds: float  # of the calls, all tasks together
    calls: list[float]  # seconds of each
    paths: list[str]


class TaskFailed(Exception):
    """What it said on stderr."""


class Memory:
    """The most memory a process had while the block ran, in MB (10^6): all of it, and what is its own (no file behind it)."""

    def __init__(self, pid: int) -> None:
        self._status = Path(f"/proc/{pid}/status")
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self.rss = self.anonymous = 0.0

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(SAMPLE_SECONDS):
            rss, anonymous = memory(self._status)
            self.rss, self.anonymous = max(self.rss, rss), max(self.anonymous, anonymous)


def memory(status: Path) -> tuple[float, float]:
    """(RSS, RssAnon) in MB; zeros for a process that has ended."""
    try:
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return tuple(int(fields[name].split()[0]) * 1024 / 1e6 for name in ("VmRSS", "RssAnon"))  # type: ignore[return-value]
    except (OSError, KeyError):
        return 0.0, 0.0


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


class Tasks:
    """Tasks that have imported what they need and wait for `go`."""

    def __init__(self, side: str, repo: str, environments: list[Mapping[str, str]], *flags: str) -> None:
        command = [sys.executable, "-m", "benchmarks.task", side, repo, *flags]
        self.processes = [_start(command, environment) for environment in environments]
        for process in self.processes:
            assert process.stdout is not None
            if process.stdout.readline() != "ready\n":
                raise TaskFailed(process.communicate()[1])

    def go(self) -> Ran:
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        said: list[dict[str, Any]] = []
        for process in self.processes:
            output, errors = process.communicate(timeout=TASK_SECONDS)
            if process.returncode:
                raise TaskFailed(errors)
            said.append(json.loads(output.splitlines()[-1]))
        return Ran(
            max(each["ended"] for each in said) - min(each["began"] for each in said),
            sum(each["cpu_seconds"] for each in said),
            [seconds for each in said for seconds in each["calls"]],
            [each["path"] for each in said],
        )


def _start(command: list[str], environment: Mapping[str, str]) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=dict(environment), stdin=pipe, stdout=pipe, stderr=pipe, text=True, cwd=ROOT)


def seconds_of(code: str, environment: Mapping[str, str]) -> float:
    """Wall seconds of an interpreter that runs `code`."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], env=dict(environment), check=True, cwd="/", stderr=subprocess.PIPE)
    return time.perf_counter() - start
