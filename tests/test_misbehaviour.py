"""A hub that misbehaves in the midst of a fetch: patience when it asks for it, what came is kept, and wrong bytes are never served."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .clients import Client, Tree, blobs, clients, hashes, partials, views
from .daemon import Daemon
from .hub import Hub, Random, Request

pytestmark = pytest.mark.timeout(120)

MIB = 1 << 20
SMALL: Tree = {"config.json": b"{}", "tokenizer/vocab.txt": b"a\nb\n", "notes.md": Random("notes", 200_000)}
LARGE: Tree = {"one.safetensors": Random("first", 9 * MIB), "two.safetensors": Random("second", 5 * MIB + 17)}
CONFIG: dict[str, Any] = {"min_free": "0", "hub_backoff_seconds": 0.02, "stall_seconds": 2}


@pytest.fixture(scope="module")
def node(the_hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """For tests whose repos nobody else asks for."""
    with Daemon.start(tmp_path_factory.mktemp("node") / "root", the_hub, **CONFIG) as daemon:
        yield daemon


@pytest.fixture
def daemon(the_hub: Hub, tmp_path: Path) -> Iterator[Daemon]:
    with Daemon.start(tmp_path / "root", the_hub, **CONFIG) as daemon:
        yield daemon


@pytest.fixture
def task(daemon: Daemon) -> Iterator[Client]:
    with Client.of(daemon) as task:
        yield task


def downloads(progress: dict[str, Any]) -> bool:
    return bool(progress["phase"] == "download" and progress["done_bytes"] > 0)


def content(hub: Hub) -> list[Request]:
    """Requests that were answered with bytes of files."""
    return [request for request in hub.requests() if request.kind in ("resolve", "lfs") and request.status in (200, 206)]


def lfs_bytes(hub: Hub) -> int:
    return sum(request.bytes_sent for request in content(hub) if request.kind == "lfs")


@pytest.mark.parametrize(("kind", "where"), [("429", "info"), ("ratelimit", "tree"), ("429", "resolve"), ("ratelimit", "lfs")])
def test_a_hub_that_asks_for_patience_gets_it(hub: Hub, node: Daemon, kind: str, where: str) -> None:
    hub.commit(f"org/patience-{where}", {"model.safetensors": Random(f"patience {where}", 2 * MIB)})
    hub.commit(f"org/other-{where}", SMALL)
    hub.misbehave(kind, match=f"^{where}", times=1, retry_after=2)
    with clients(node, 2) as (task, other):
        task.begin("fetch", repo_id=f"org/patience-{where}")
        paused = task.progress(lambda progress: progress["phase"] == "paused")
        assert "asks to wait" in paused["message"]
        other.begin("fetch", repo_id=f"org/other-{where}")
        assert "asks to wait" in other.progress(lambda progress: progress["phase"] == "paused")["message"]
        assert task.good().error is None and other.good().error is None
    (limited,) = [request for request in hub.requests() if request.status == 429]
    later = [request.started - limited.started for request in hub.requests() if request.started > limited.started]
    assert min(later) >= 1.9, later  # everybody waited, the other repo too


@pytest.mark.parametrize(
    ("fault", "lost"),
    [
        ({"kind": "5xx", "times": 3}, 0),
        ({"kind": "5xx", "times": 2, "status": 500}, 0),
        ({"kind": "short", "times": 3, "after": MIB}, 0),
        ({"kind": "short", "times": 2, "after": 0}, 0),
        ({"kind": "stall", "times": 2, "after": MIB}, 0),
        ({"kind": "reset", "times": 3, "after": MIB}, 3 * MIB),  # what the kernel has not handed over goes with the connection
    ],
    ids=str,
)
def test_a_broken_download_is_resumed(hub: Hub, node: Daemon, fault: dict[str, Any], lost: int) -> None:
    name = "org/broken-" + "-".join(map(str, fault.values()))
    tree: Tree = {"model.safetensors": Random(name, 11 * MIB + 5)}
    hub.commit(name, tree)
    hub.misbehave(match="^lfs", **fault)
    with Client.of(node) as task:
        assert task.call("hashes", folder=task.download(name)).files == hashes(tree)
    assert [request.fault for request in hub.requests("lfs") if request.fault] == [fault["kind"]] * fault["times"]
    size = len(tree["model.safetensors"])
    assert size <= lfs_bytes(hub) <= size + lost


def test_signed_addresses_that_expire_are_asked_for_again(hub: Hub, daemon: Daemon) -> None:
    tree: Tree = {"model.safetensors": Random("expires", 17 * MIB)}
    hub.commit("org/expires", tree)
    daemon.restart(hub_connections=1)  # one range after the other, all with the address that the first one got
    hub.misbehave("slow", rate=10 * MIB)
    with Client.of(daemon) as task:
        task.begin("fetch", repo_id="org/expires")
        task.progress(downloads)
        hub.misbehave("expired", times=1)
        assert task.call("hashes", folder=task.good().path).files == hashes(tree)
    assert [request.status for request in hub.requests("lfs")].count(403) == 1
    assert len(hub.requests("resolve")) == 2 and lfs_bytes(hub) == 17 * MIB


@pytest.mark.parametrize("kind", ["5xx", "reset", "short", "stall", "wrong"])
def test_small_files_are_asked_for_again(hub: Hub, node: Daemon, kind: str) -> None:
    hub.commit(f"org/small-{kind}", SMALL)
    hub.misbehave(kind, match=r"notes\.md$", times=2)
    with Client.of(node) as task:
        assert task.call("hashes", folder=task.download(f"org/small-{kind}")).files == hashes(SMALL)
    assert [request.fault for request in hub.requests("resolve") if request.file == "notes.md"] == [kind, kind, None]


@pytest.mark.parametrize("kind", ["5xx", "hang", "reset"])
def test_listings_are_asked_for_again(hub: Hub, node: Daemon, kind: str) -> None:
    name = f"org/listing-{kind}"
    hub.commit(name, SMALL)
    hub.misbehave(kind, match="^(info|tree)", times=2)
    with Client.of(node) as task:
        task.begin("snapshot_download", repo_id=name)
        if kind == "hang":
            hub.wait(kind="info", requests=1)
            hub.calm()
        assert task.call("hashes", folder=task.good().path).files == hashes(SMALL)
    assert len(hub.requests("info")) > 1


def test_wrong_bytes_are_never_served(hub: Hub, daemon: Daemon, task: Client) -> None:
    tree: Tree = {"model.safetensors": Random("wrong once", 9 * MIB)}
    hub.commit("org/wrong", tree)
    hub.misbehave("wrong", match="^lfs", times=1)
    assert task.call("hashes", folder=task.download("org/wrong")).files == hashes(tree)
    assert blobs(daemon) == set(hashes(tree).values()) and daemon.status()["hub"]["mismatches"] == 1
    assert lfs_bytes(hub) == 2 * 9 * MIB  # nobody knows which of them were wrong


@pytest.mark.parametrize("path", ["model.safetensors", "notes.md"])
def test_bytes_that_stay_wrong_are_an_error(hub: Hub, daemon: Daemon, task: Client, path: str) -> None:
    hub.commit("org/always-wrong", {path: Random(f"always wrong {path}", 300_000)}, replace=True)
    hub.misbehave("wrong", match=path.replace(".", "[.]"))
    assert task.refused("snapshot_download", repo_id="org/always-wrong").is_error("ContentMismatchError")
    assert blobs(daemon) == set() and views(daemon) == [] and sum(partials(daemon).values()) == 0


def test_a_server_without_ranges(hub: Hub, daemon: Daemon) -> None:
    tree: Tree = {"model.safetensors": Random("no ranges", 14 * MIB + 3)}
    hub.commit("org/no-ranges", tree)
    hub.misbehave("no_range")
    hub.misbehave("short", match="^lfs", times=2, after=5 * MIB)
    hub.misbehave("slow", rate=20 * MIB)
    with clients(daemon, 2) as (first, second):
        first.begin("fetch", repo_id="org/no-ranges")
        first.progress(lambda progress: progress["done_bytes"] > 6 * MIB)
        first.kill()
        while daemon.status()["blob_flights"]["running"]:
            pass
        assert sum(partials(daemon).values()) > 3 * MIB
        assert second.call("hashes", folder=second.download("org/no-ranges")).files == hashes(tree)


def test_a_hub_that_goes_away_in_the_middle(hub: Hub, daemon: Daemon, task: Client) -> None:
    hub.commit("org/away", LARGE)
    hub.misbehave("slow", rate=8 * MIB)
    task.begin("fetch", repo_id="org/away")
    task.progress(lambda progress: progress["done_bytes"] > 4 * MIB)
    hub.misbehave("down")
    outcome = task.end()
    assert outcome.is_error("HubUnavailableError") and outcome.is_error("ConnectionError")
    kept = sum(partials(daemon).values())
    assert kept > 0 and views(daemon) == []
    hub.calm()
    hub.reset_log()
    task.begin("fetch", repo_id="org/away")
    assert task.call("hashes", folder=task.good().path).files == hashes(LARGE)
    assert hub.bytes_sent() <= sum(map(len, LARGE.values())) - kept
