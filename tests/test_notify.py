from __future__ import annotations

import os
import socket
import time
from pathlib import Path

import pytest

from modelcached.notify import Notifier


@pytest.mark.parametrize("is_abstract", [False, True])
def test_what_the_service_manager_hears(tmp_path: Path, is_abstract: bool) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        name = f"@modelcached-test-{os.getpid()}" if is_abstract else str(tmp_path / "notify")
        manager.bind("\0" + name[1:] if is_abstract else name)
        manager.settimeout(5)
        environment = {"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "3000000", "WATCHDOG_PID": str(os.getpid()), "OTHER": "x"}
        notifier = Notifier.take_from(environment)
        assert environment == {"OTHER": "x"}  # children do not speak for the daemon
        assert notifier.watchdog_seconds == 3.0
        notifier.ready()
        notifier.status("two\nlines")
        notifier.alive()
        notifier.stopping(40)
        told = [b"READY=1", b"STATUS=two lines", b"WATCHDOG=1", b"STOPPING=1", b"EXTEND_TIMEOUT_USEC=40000000"]
        assert [manager.recv(100) for _ in told] == told
        before = time.monotonic_ns() // 1000
        notifier.reloading()
        state, _, when = manager.recv(100).partition(b"\nMONOTONIC_USEC=")
        assert state == b"RELOADING=1" and before <= int(when) <= time.monotonic_ns() // 1000


@pytest.mark.parametrize(
    ("environment", "seconds"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "500000"}, 0.5),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({"WATCHDOG_USEC": "500000", "WATCHDOG_PID": "1"}, None),
    ],
)
def test_watchdog_is_only_ours_if_it_says_so(environment: dict[str, str], seconds: float | None) -> None:
    assert Notifier.take_from(environment).watchdog_seconds == seconds


def test_nobody_listens(tmp_path: Path) -> None:
    Notifier().ready()
    Notifier(str(tmp_path / "nothing")).ready()


def test_a_full_queue_does_not_block(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        notifier = Notifier(str(tmp_path / "notify"))
        for _ in range(1000):
            notifier.alive()
