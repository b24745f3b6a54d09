"""What the configuration wants kept, and what a user's daemon takes of a disk."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from modelcached import first_start
from modelcached.filesystems import free_bytes
from modelcached.kinds import Space
from modelcached.layout import Layout

from .clients import Client
from .daemon import Daemon, clean_environment
from .hub import Hub, Random
from .proxy import Proxy
from .saves import until

MIB = 1 << 20
GIB = 1 << 30


def pins(task: Client) -> dict[str, Any]:
    task.begin("wire", method="pins", params={})
    return {pin["name"]: pin for pin in task.good().value["pins"]}


def test_kept_repos_are_fetched_at_the_start_and_pinned(tmp_path: Path, hub: Hub) -> None:
    first = hub.commit("org/model", {"a": b"1"})
    hub.tag("org/model", "v1")
    hub.commit("org/model", {"a": b"2"})
    hub.commit("org/data", {"rows": b"3"}, repo_type="dataset")
    with Daemon.start(tmp_path / "root", hub, keep="org/model@v1,datasets/org/data") as daemon, Client.of(daemon) as task:
        until(lambda: daemon.log.count("event=kept") == 2)
        hub.reset_log()
        assert task.fetch("org/model", revision=first, local_files_only=True)["hub_bytes"] == 0
        assert pins(task).keys() == {"keep org/model@v1", "keep datasets/org/data"}
        daemon.restart(keep="datasets/org/data")
        until(lambda: daemon.log.count("event=kept") == 3)
        assert pins(task).keys() == {"keep datasets/org/data"}, "what is no longer wanted is no longer pinned"


def test_a_hub_that_is_away_keeps_no_daemon_from_starting(tmp_path: Path, hub: Hub) -> None:
    hub.commit("org/late", {"a": b"1"})
    with Proxy(("127.0.0.1", int(hub.endpoint.rpartition(":")[2]))) as proxy:
        proxy.refuse()
        with Daemon.start(tmp_path / "root", proxy.endpoint, keep="org/late,org/none", hub_attempts=1) as daemon:
            until(lambda: "event=\"what is to be kept can't be fetched now\"" in daemon.log)
            proxy.listen()
            until(lambda: "event=kept repo=org/late" in daemon.log, seconds=15)
            assert daemon.status()["room"]["pins"] == 1


def test_who_ends_the_daemon_does_not_wait_for_what_is_to_be_kept(tmp_path: Path, hub: Hub) -> None:
    hub.commit("org/large", {"model.safetensors": Random("large", 2 * MIB)})
    hub.misbehave("stall", match="^lfs", after=MIB)
    with Daemon.start(tmp_path / "root", hub, keep="org/large", shutdown_seconds="1s") as daemon:
        hub.wait(kind="lfs", requests=1)
        daemon.terminate()
        hub.calm()
        daemon.restart()
        until(lambda: "event=kept repo=org/large" in daemon.log)


def shown(*words: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "modelcached", "check-config", "--json", "--private", *words]
    found: dict[str, Any] = json.loads(subprocess.run(command, env=clean_environment(), capture_output=True, check=True).stdout)
    return found


def test_a_users_daemon_takes_a_share_of_what_is_free_at_first(tmp_path: Path) -> None:
    root = tmp_path / "root"
    free = free_bytes(tmp_path)
    said = shown(f"--root={root}")
    assert said["max_size"]["origin"] == "60 % of what was free at the first start"
    assert abs(said["max_size"]["value"] - 0.6 * free) < 4 * GIB, "others write to this disk meanwhile"
    assert said["min_free"] == {"value": "10%", "origin": "default"}
    assert not root.exists(), "looking decides nothing"
    root.mkdir()
    first_start.remember(Layout(root), Space(5 * GIB))
    first_start.remember(Layout(root), Space(7 * GIB))
    assert shown(f"--root={root}")["max_size"]["value"] == 5 * GIB, "decided once"
    (root / "max_size").write_text("nonsense")
    assert shown(f"--root={root}")["max_size"]["value"] > 5 * GIB or free < 9 * GIB
    assert shown(f"--root={root}", "--max-size=3GiB")["max_size"] == {"value": 3 * GIB, "origin": "flag --max-size"}


class Private(Daemon):
    program = ("-c", "import sys; from modelcached.__main__ import main; sys.exit(main([*sys.argv[1:], '--private']))")


def test_a_users_daemon_remembers(tmp_path: Path, hub: Hub) -> None:
    hub.commit("org/small", {"a": b"1"})
    with Private.start(tmp_path / "root", hub, idle_exit="never", min_free="1MiB") as daemon, Client.of(daemon) as task:
        decided = int((tmp_path / "root" / "max_size").read_text())
        assert decided > 0 and daemon.status()["room"]["max_size_bytes"] == decided
        task.fetch("org/small")


def test_repos_that_are_none_are_refused(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "modelcached", "check-config", "--keep", "org/model@main, a/b/c"]
    done = subprocess.run(command, env=clean_environment(), capture_output=True, text=True)
    assert done.returncode == 2 and re.search(r"keep .*'a/b/c' is no repo id", done.stderr), done.stderr
