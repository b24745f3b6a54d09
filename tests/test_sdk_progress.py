"""What a caller sees while it waits: its own bar, one line of a terminal, or nothing."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
import threading
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.utils.tqdm import silent_tqdm
from huggingface_hub.utils.tqdm import tqdm as hf_tqdm

import modelcache
from modelcache.client import shared
from modelcache.progress import Bar, one_line, size
from modelcache.protocol import Progress

from .fake_daemon import WAIT_SECONDS, FakeDaemon, Request
from .test_sdk_connection import sdk_path

tqdm: Any = import_module("tqdm.auto").tqdm  # has no types of its own

NEWS = [
    Progress("look up"),
    Progress("download", 400, 1000, 100.0, "hub", 1, 4, 1),
    Progress("paused", 400, 1000, message="hub asks to wait 30 s (429)"),
    Progress("download", 300, 1000, 100.0, "hub", 1, 4, 3),  # a daemon that came back counts anew
    Progress("verify", 900, 1000),
]


def test_a_tqdm_ends_full() -> None:
    text = io.StringIO()
    bar = Bar("org/name", lambda **keywords: tqdm(file=text, mininterval=0, **keywords))
    seen = []
    for progress in NEWS:
        bar(progress)
        seen.append((bar._bar.n, bar._bar.total))
    bar.close(done=True)
    assert seen == [(0, 0), (400, 1000), (400, 1000), (300, 1000), (300, 1000)]
    assert (bar._bar.n, bar._bar.total) == (1000, 1000)
    assert "org/name" in text.getvalue()


def test_a_tqdm_that_failed_does_not_end_full() -> None:
    bar = Bar("org/name", lambda **keywords: tqdm(file=io.StringIO(), **keywords))
    bar(NEWS[1])
    bar.close(done=False)
    assert bar._bar.n == 400


@pytest.mark.parametrize("kind", [silent_tqdm, hf_tqdm])
def test_huggingface_hubs_own_bars(kind: type) -> None:
    bar = Bar("org/name", kind)
    for progress in NEWS:
        bar(progress)
    bar.close(done=True)


def test_the_line() -> None:
    assert one_line("org/name", NEWS[0]) == "org/name:  look up"
    assert one_line("org/name", NEWS[1]) == "org/name:  40 %  400 B of 1.0 kB  100 B/s  1 of 4 files  from hub"
    assert one_line("org/name", NEWS[2]) == "org/name:  40 %  400 B of 1.0 kB  paused  hub asks to wait 30 s (429)"
    assert one_line("org/name", NEWS[3]).endswith("from hub  3 wait for it")


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (85.3e6, "85.3 MB"), (2e9, "2.0 GB"), (3e15, "3000.0 TB")]
)
def test_sizes(count: float, text: str) -> None:
    assert size(count) == text


def test_a_callers_bar_is_driven(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    def mine(**keywords: Any) -> Any:
        made.append(tqdm(file=io.StringIO(), **keywords))
        return made[-1]

    with FakeDaemon(tmp_path) as daemon:
        daemon.repos = {"org/name": {"a": b"a"}}
        answer = daemon.answers["fetch"]

        def slowly(request: Request) -> None:
            for progress in NEWS:
                request.progress(**progress._asdict())
            answer(request)

        daemon.answers["fetch"] = slowly
        monkeypatch.setenv("MODELCACHE_SOCKET", str(daemon.socket_path))
        modelcache.snapshot_download("org/name", tqdm_class=mine)
        shared().close()
        shared().leases.close()
    assert [(bar.n, bar.total, bar.unit) for bar in made] == [(1000, 1000, "B")]


SHOWS = """
import os, sys
{before}
import modelcache
modelcache.snapshot_download("org/name", token=False)
"""


@pytest.mark.parametrize(
    ("before", "environment", "is_shown"),
    [
        ("", {}, True),
        ("", {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}, False),
        ("", {"HF_HUB_DISABLE_PROGRESS_BARS": "0"}, True),
        ("from huggingface_hub.utils import disable_progress_bars; disable_progress_bars()", {}, False),
    ],
)
def test_a_terminal_gets_one_line(tmp_path: Path, before: str, environment: dict[str, str], is_shown: bool) -> None:
    ours, theirs = pty.openpty()
    with FakeDaemon(tmp_path) as daemon:
        daemon.repos = {"org/name": {"a": b"a"}}
        answer = daemon.answers["fetch"]
        seen = b""
        enough = threading.Event()

        def slowly(request: Request) -> None:
            while not enough.wait(0.05) and not request.is_cancelled.is_set():  # as the daemon does: news until it is done
                request.progress(**NEWS[1]._asdict())
            answer(request)

        daemon.answers["fetch"] = slowly
        variables = {
            **os.environ,
            **sdk_path(),
            "MODELCACHE_SOCKET": str(daemon.socket_path),
            "MODELCACHE_LOADED": "private",
            **environment,
        }
        command = [sys.executable, "-c", SHOWS.format(before=before)]
        with subprocess.Popen(command, stdin=theirs, stderr=theirs, env=variables) as process:
            os.close(theirs)
            if not is_shown:
                assert daemon.next_request()
                enough.wait(0.5)
                enough.set()
            while True:
                try:
                    data = os.read(ours, 4096)
                except OSError:  # the other end has closed
                    break
                seen += data
                if b"files" in seen:
                    enough.set()
            process.wait(WAIT_SECONDS)
    os.close(ours)
    if is_shown:
        assert b"\r\x1b[Korg/name:  40 %  400 B of 1.0 kB" in seen
        assert re.search(rb"\x1b\[K$", seen)  # and leaves nothing
    else:
        assert seen == b""
