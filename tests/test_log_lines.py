"""One line per fetch, load and save: who asked, and where the time went."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from modelcached.meter import Spent

from .clients import Client
from .daemon import Daemon
from .hub import Hub, Random
from .saves import fill


class JsonDaemon(Daemon):
    program = ("-c", "import sys; from modelcached.__main__ import main; sys.exit(main([*sys.argv[1:], '--log-format=json']))")


def lines(daemon: Daemon, event: str) -> list[dict[str, Any]]:
    said = [json.loads(line) for line in daemon.log.splitlines()]
    return [line for line in said if line["event"] == event]


def test_lines_for_the_journal_have_its_priorities(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`journalctl -p warning` shows warnings, and only where the lines go to the journal."""
    log = tmp_path / "root.log"
    log.touch()
    found = log.stat()
    monkeypatch.setenv("JOURNAL_STREAM", f"{found.st_dev}:{found.st_ino}")
    with Daemon.start(tmp_path / "root", max_connections=1) as daemon, Client.of(daemon) as one, Client.of(daemon) as two:
        one.begin("ask", method="status")
        one.good()
        two.refused("ask", method="status")
        said = daemon.log.splitlines()
    assert {line[:3] for line in said if "level=info" in line} == {"<6>"}
    assert {line[:3] for line in said if "level=warning" in line} == {"<4>"}
    with Daemon.start(tmp_path / "other") as daemon:
        assert not [line for line in daemon.log.splitlines() if line.startswith("<")]


def test_a_fetch_says_who_and_where_the_time_went(tmp_path: Path, hub: Hub) -> None:
    hub.commit("org/model", {"config.json": b"{}", "model.safetensors": Random(1, 4 << 20)})
    with JsonDaemon.start(tmp_path / "root", hub) as daemon, Client.of(daemon) as one, Client.of(daemon) as two:
        hub.misbehave("slow", rate=4 << 20)
        one.begin("fetch", repo_id="org/model")
        one.progress(lambda progress: progress["phase"] == "download")
        two.begin("fetch", repo_id="org/model")
        two.progress(lambda progress: progress["phase"] == "download")
        hub.calm()
        one.good()
        two.good()
        found = {line["pid"]: line for line in lines(daemon, "fetch")}
        mine, joined = found[one.pid], found[two.pid]
        assert mine["uid"] == joined["uid"] == os.getuid()
        assert mine["hub_bytes"] == (4 << 20) + 2
        for kind in ("lookup", "hub", "verify", "view"):
            assert 0 < mine[f"{kind}_seconds"] <= mine["seconds"], kind
        assert mine["others_seconds"] == mine["store_seconds"] == 0
        assert 0 < joined["others_seconds"] <= joined["seconds"] and joined["hub_seconds"] == 0


def test_a_save_and_a_load_say_so_too(tmp_path: Path) -> None:
    fill(tmp_path / "out", {"weights.bin": bytes(1 << 20)})
    store = f"file://{tmp_path}/store"
    with JsonDaemon.start(tmp_path / "one", store=store) as daemon, Client.of(daemon) as task:
        task.begin("save", path=str(tmp_path / "out"))
        reference = task.good().value
        task.begin("flush")
        task.good()
        (saved,) = lines(daemon, "saved")
        (uploaded,) = lines(daemon, "uploaded")
        assert (saved["uid"], saved["pid"]) == (os.getuid(), task.pid) and uploaded["uid"] == os.getuid()
        assert 0 < saved["keep_seconds"] <= saved["seconds"] and 0 < saved["capture_seconds"] <= saved["seconds"]
        assert uploaded["store_seconds"] > 0 and {"waited_seconds", "hash_seconds"} <= uploaded.keys()
    with JsonDaemon.start(tmp_path / "two", store=store) as daemon, Client.of(daemon) as task:
        task.begin("load", reference=reference)
        task.good()
        (loaded,) = lines(daemon, "load")
        assert loaded["store_bytes"] == 1 << 20
        for kind in ("lookup", "store", "view"):
            assert 0 < loaded[f"{kind}_seconds"] <= loaded["seconds"], kind


def test_parts_of_one_kind_count_once() -> None:
    spent = Spent()
    with spent.during("hub"), spent.during("hub"), spent.during("verify"):
        assert spent.seconds(["hub"]) == {"hub_seconds": 0.0}  # none is over
    both = spent.seconds(["hub", "verify", "view"])
    assert both["hub_seconds"] >= both["verify_seconds"] >= 0 == both["view_seconds"]
