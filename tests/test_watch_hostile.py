"""Hostile trainers under watch: on every filesystem, with a daemon of another uid that is stopped now and then, nothing torn or partial
is captured; and without the probe for writers the same test finds something.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .conftest import ROOT, as_uid
from .daemon import Daemon
from .kernel import Machine, mounted

DAEMON_UID, TRAINER_UID = 1500, 1501
AWAY = "file:///sys/away"  # a store where nobody can put anything
UNITS = 334  # on each filesystem: a thousand on three
STOPPED_SECONDS = (1.0, 0.4)  # runs, stands still
NO_PROBE = "from modelcache import gates, probe, unit_capture as u; probe.Writers.has = lambda *_: False\n"
NO_PROBE += "probe.Writers.late = lambda *_: set(); gates.has_writer = u.has_writer = lambda _: False\n"


@contextlib.contextmanager
def filesystem(kind: str, folder: Path) -> Iterator[Path]:
    if kind == "tmpfs":
        with mounted(folder / "tmpfs", "-t", "tmpfs", "-o", "size=320m", "none") as place:
            yield place
    else:
        with Machine(folder, kind, 320 << 20).on() as place:
            yield place


@contextlib.contextmanager
def stopping(pid: int) -> Iterator[None]:
    """The process stands still again and again, for as long as the block runs."""
    is_over = threading.Event()

    def stop_and_go() -> None:
        while not is_over.wait(STOPPED_SECONDS[0]):
            os.kill(pid, signal.SIGSTOP)
            is_over.wait(STOPPED_SECONDS[1])
            os.kill(pid, signal.SIGCONT)

    thread = threading.Thread(target=stop_and_go)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def captured(folder: Path, kind: str, units: int, broken: str = "") -> dict[str, Any]:
    """What was captured of so many units at least, and what is wrong with it."""
    as_uid(DAEMON_UID)  # or skip
    with filesystem(kind, folder) as place, Daemon.start(folder / "root", uid=DAEMON_UID, store=AWAY, min_free="0") as daemon:
        place.chmod(0o777)
        code = broken + "from tests.hostile_process import main; main()"
        command = [*as_uid(TRAINER_UID), sys.executable, "-c", code, str(place / "out"), "hostile", str(units)]
        with stopping(daemon.pid):
            ran = subprocess.run(command, cwd=ROOT, env=daemon.environment, stdout=subprocess.PIPE)
    shutil.rmtree(folder / "root")
    assert ran.returncode == 0
    found: dict[str, Any] = json.loads(ran.stdout)
    print(kind, found)
    return found


@pytest.mark.soak
@pytest.mark.timeout(700)
@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs", "tmpfs"])
def test_nothing_torn_or_partial_is_captured(shared_tmp_path: Path, kind: str) -> None:
    found = captured(shared_tmp_path, kind, UNITS)
    assert found["flaws"] == []
    assert found["captured"] >= UNITS
    assert found["kinds"]["folder"] > 50


@pytest.mark.soak
@pytest.mark.timeout(700)
def test_without_the_probe_something_is(shared_tmp_path: Path) -> None:
    assert captured(shared_tmp_path, "ext4", 100, NO_PROBE)["flaws"]
