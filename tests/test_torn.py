"""Torn captures: a trainer of another uid than the daemon's rewrites its files while it saves them, and no save has bytes of two versions.

Each file is of one version in every save, or the save fails and names it (I7). Without the probe for writers, or without the
comparison of stats, the same test finds torn ones.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from .conftest import ROOT, as_uid
from .daemon import Daemon
from .kernel import mounted

DAEMON_UID, TASK_UID = 1500, 1501
AWAY = "file:///sys/away"  # a store where nobody can put anything

NO_PROBE = "from modelcache import probe; probe.Writers.has = lambda *_: False; probe.Writers.late = lambda *_: set()\n"
NO_STAT = "from modelcache import handover; handover._Look.__eq__ = lambda *_: True\n"
NO_TICK = "from modelcache import handover; handover._TICK_NS = 0\n"
NO_STAT_IN_DAEMON = """
import runpy
from modelcached import capture
capture.Seen.__eq__ = lambda *_: True
runpy.run_module("modelcached", run_name="__main__", alter_sys=True)
"""


class NoStat(Daemon):
    program = ("-c", NO_STAT_IN_DAEMON)


def captured(folder: Path, captures: int, *more: str, broken: str = "", kind: type[Daemon] = Daemon) -> dict[str, Any]:
    """What a hostile trainer says of so many saves."""
    as_uid(DAEMON_UID)  # or skip
    place = folder / "trainer"
    place.mkdir(exist_ok=True)
    place.chmod(0o777)
    with kind.start(folder / "root", uid=DAEMON_UID, store=AWAY, min_free="0") as daemon:
        code = broken + "from tests.torn_process import main; main()"
        command = [*as_uid(TASK_UID), sys.executable, "-c", code, str(place / "out"), str(captures), *more]
        ran = subprocess.run(command, cwd=ROOT, env=daemon.environment, stdout=subprocess.PIPE)
    assert ran.returncode == 0
    found: dict[str, Any] = json.loads(ran.stdout)
    print(found)
    assert "refused without a name" not in found
    return found


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_nothing_torn_is_saved(shared_tmp_path: Path) -> None:
    found = captured(shared_tmp_path, 60)
    assert "torn" not in found, found
    assert found["whole"] > 30


@pytest.mark.soak
@pytest.mark.timeout(120)
def test_without_the_probe_something_is(shared_tmp_path: Path) -> None:
    assert captured(shared_tmp_path, 500, broken=NO_PROBE)["torn"]


@pytest.mark.soak
@pytest.mark.timeout(120)
def test_without_the_stats_something_is(shared_tmp_path: Path) -> None:
    assert captured(shared_tmp_path, 500, broken=NO_STAT, kind=NoStat)["torn"]


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("broken", ["", pytest.param(NO_TICK, marks=pytest.mark.soak)])
def test_stamps_by_the_tick(shared_tmp_path: Path, broken: str) -> None:
    """Two changes may have the same stamp, on this filesystem as on every one before Linux 6.13."""
    with mounted(shared_tmp_path / "trainer", "-t", "ramfs", "none"):
        found = captured(shared_tmp_path, 500 if broken else 100, "quick", broken=broken)
    assert ("torn" in found) is bool(broken), found


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_a_thousand_captures(shared_tmp_path: Path) -> None:
    found = captured(shared_tmp_path, 1000)
    assert "torn" not in found, found
    assert found["whole"] > 900


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_two_gigabytes_in_one_write(shared_tmp_path: Path) -> None:
    """For seconds its mtime stands still, and its size."""
    found = captured(shared_tmp_path, 3, "enormous")
    assert "torn" not in found, found
    assert found["whole"]
