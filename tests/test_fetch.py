"""Many tasks, one download: the daemon, the SDK and the hub in processes of their own. What is claimed is read from the hub's log."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from .clients import Client, Tree, blobs, clients, hashes, partials, sha256, views
from .daemon import Daemon
from .hub import Hub, Random, Request
from .saves import until

pytestmark = pytest.mark.timeout(180)

MIB = 1 << 20
TRICKLE = 1 * MIB  # bytes a second: nothing large ends before the test says so

SMALL: Tree = {
    "config.json": b'{"hidden_size": 8}',
    "tokenizer/vocab.txt": b"a\nb\n",
    "tokenizer/empty.txt": b"",
    "notes.md": Random("notes", 200_000),
}
LARGE: Tree = {
    "one.safetensors": Random("one", 9 * MIB),
    "two.safetensors": Random("two", 5 * MIB + 17),
    "three.bin": Random("three", 3 * MIB),
}
MODEL: Tree = {**SMALL, **LARGE}
SIZE = sum(map(len, MODEL.values()))


@pytest.fixture
def daemon(the_hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with Daemon.start(tmp_path_factory.mktemp("node") / "root", the_hub, min_free="0", hub_backoff_seconds=0.02) as daemon:
        yield daemon


@pytest.fixture
def task(daemon: Daemon) -> Iterator[Client]:
    with Client.of(daemon) as task:
        yield task


def downloads(progress: dict[str, Any]) -> bool:
    return bool(progress["phase"] == "download" and progress["done_bytes"] > 0)


def waiters(count: int) -> Callable[[dict[str, Any]], bool]:
    return lambda progress: progress["waiters"] == count and downloads(progress)


def content(hub: Hub) -> list[Request]:
    """Requests that were answered with bytes of files."""
    return [request for request in hub.requests() if request.kind in ("resolve", "lfs") and request.status in (200, 206)]


def assert_each_byte_once(hub: Hub, *trees: Tree) -> None:
    sizes = {sha256(data): len(data) for tree in trees for data in tree.values() if len(data) >= MIB}
    assert {oid: hub.bytes_sent(oid) for oid in sizes} == sizes


def until_idle(daemon: Daemon) -> None:
    while daemon.status()["blob_flights"]["running"]:
        pass


# ---- sharing


def test_eight_processes_get_one_download(hub: Hub, daemon: Daemon) -> None:
    hub.commit("org/eight", MODEL)
    hub.misbehave("slow", rate=TRICKLE)
    with clients(daemon, 8) as tasks, Client.of(daemon) as late:
        for task in tasks:
            task.begin("fetch", repo_id="org/eight")
        tasks[0].progress(waiters(8))
        late.begin("fetch", repo_id="org/eight")
        first = late.progress(lambda _: True)
        assert downloads(first) and first["waiters"] == 9 and first["total_bytes"] == SIZE and first["source"] == "hub"
        tasks[0].progress(waiters(9))
        hub.calm()
        outcomes = [task.good() for task in [*tasks, late]]
        (path,) = {outcome.path for outcome in outcomes}
        assert path == str(views(daemon)[0])
        for task in [*tasks, late]:
            assert task.call("hashes", folder=path).files == hashes(MODEL)
    assert [len(hub.requests(kind)) for kind in ("info", "tree", "auth-check")] == [1, 1, 0]
    assert hub.bytes_sent() == SIZE
    assert_each_byte_once(hub, MODEL)


@pytest.mark.slow
def test_two_hundred_tasks(hub: Hub, daemon: Daemon) -> None:
    hub.commit("org/crowd", MODEL)
    hub.misbehave("slow", rate=TRICKLE)
    with clients(daemon, 200) as tasks:
        for task in tasks:
            task.begin("fetch", repo_id="org/crowd")
        tasks[0].progress(waiters(200))
        hub.calm()
        assert {task.good().path for task in tasks} == {str(views(daemon)[0])}
        assert {outcome.error for outcome in [task.call("ask", method="ls") for task in tasks]} == {None}
        assert daemon.status()["leases"] == 200
    assert len(hub.requests("info")) == 1 and hub.bytes_sent() == SIZE


@pytest.mark.parametrize("together", [True, False], ids=["at the same time", "one after the other"])
def test_shared_files_are_fetched_once(hub: Hub, daemon: Daemon, together: bool) -> None:
    """Patterns that overlap, a second revision and a second repo."""
    name = f"org/shared-{together}"
    second: Tree = {**MODEL, "config.json": b"{}", "three.bin": Random("a new three", 2 * MIB)}
    fork: Tree = {"config.json": b"{}", "renamed.safetensors": LARGE["one.safetensors"]}
    hub.commit(name, MODEL)
    hub.tag(name, "v1")
    hub.commit(name, second)
    hub.commit(f"{name}-fork", fork)
    asks: list[tuple[dict[str, Any], Tree]] = [
        ({"repo_id": name, "revision": "v1"}, MODEL),
        ({"repo_id": name}, second),
        (
            {"repo_id": name, "allow_patterns": ["*.safetensors", "*.json"]},
            {path: second[path] for path in ("config.json", "one.safetensors", "two.safetensors")},
        ),
        (
            {"repo_id": name, "ignore_patterns": ["one*", "notes*"]},
            {path: data for path, data in second.items() if path[:3] not in ("one", "not")},
        ),
        ({"repo_id": f"{name}-fork"}, fork),
    ]
    with clients(daemon, len(asks)) as tasks:
        if together:
            hub.misbehave("slow", rate=TRICKLE)
        for task, (arguments, _) in zip(tasks, asks, strict=True):
            task.begin("fetch", **arguments)
            if not together:
                task.good()
        if together:
            for task in tasks:
                task.progress(downloads)
            hub.calm()
        for task, (arguments, tree) in zip(tasks, asks, strict=True):
            path = task.good().path if together else task.fetch(**arguments)["path"]
            assert task.call("hashes", folder=path).files == hashes(tree)
    assert_each_byte_once(hub, MODEL, second, fork)
    # Small ones are known by their git ids, and those mean something in one repo only.
    assert hub.bytes_sent("notes.md") == len(SMALL["notes.md"])
    asked = sorted(request.repo for request in content(hub) if request.file == "config.json")
    assert asked == [f"model/{name}", f"model/{name}", f"model/{name}-fork"]


def test_selections_that_overlap_in_many_files(hub: Hub, daemon: Daemon) -> None:
    """Each has more files than it fetches at the same time, so one comes to many that another has fetched meanwhile."""
    hub.commit_many("org/overlap", 600)
    hub.commit_many("org/overlap-lfs", 600, lfs=True)
    for repo in ("org/overlap", "org/overlap-lfs"):
        hub.reset_log()
        with clients(daemon, 4) as tasks:
            for task, patterns in zip(tasks, (None, ["*"], ["*[02468].txt"], ["*[05].txt"]), strict=True):
                task.begin("fetch", repo_id=repo, allow_patterns=patterns)
            assert [task.good().value["files"] for task in tasks] == [600, 600, 300, 120]
        assert len(content(hub)) == 600


def test_small_files_are_there_first(hub: Hub, daemon: Daemon, task: Client) -> None:
    hub.commit("org/early", MODEL)
    hub.misbehave("slow", match="^lfs", rate=TRICKLE)
    task.begin("fetch", repo_id="org/early")
    seen = task.progress(lambda progress: progress["done_files"] == len(SMALL))
    assert seen["total_files"] == len(MODEL) and seen["done_bytes"] < SIZE
    assert blobs(daemon) == set(hashes(SMALL).values())  # published, not only received
    assert views(daemon) == []
    hub.calm()
    assert task.call("hashes", folder=task.good().path).files == hashes(MODEL)
    assert set(hashes(MODEL).values()) == blobs(daemon) and partials(daemon) == {}


def test_what_a_fetch_brought_belongs_to_it_until_it_shows_it(hub: Hub, tmp_path: Path) -> None:
    """I4: blobs known by a git id only, while another repo that shows the same bytes goes; with and without a store."""
    small: Tree = {".gitattributes": b"*.bin filter=lfs\n", "config.json": b"{}"}
    hub.commit("org/held-old", {**small, "old.bin": Random("held old", MIB)})
    new: Tree = {**small, "new.safetensors": Random("held new", 9 * MIB)}
    hub.commit("org/held-new", new)
    choices: list[dict[str, Any]] = [{}, {"store": f"file://{tmp_path}/store"}]
    for options in choices:
        hub.reset_log()
        with Daemon.start(tmp_path / f"root{len(options)}", hub, min_free="0", grace="0", **options) as daemon:
            with Client.of(daemon) as before:
                before.fetch("org/held-old")
            with Client.of(daemon) as task, Client.of(daemon) as owner:
                hub.misbehave("slow", match="^lfs", rate=TRICKLE)
                task.begin("fetch", repo_id="org/held-new")
                task.progress(lambda progress: progress["done_files"] == len(small))
                freed = owner.ask("evict", size_bytes=0)
                assert [each["what"].partition("@")[0] for each in freed["victims"]] == ["org/held-old"]
                owner.ask("evict", size_bytes=0)  # what nobody shows now: leftovers of nobody
                assert set(hashes(small).values()) <= blobs(daemon) and len(views(daemon)) == 0
                hub.calm()
                assert task.call("hashes", folder=task.good().path).files == hashes(new)
            assert sorted(request.file for request in content(hub) if request.repo == "model/org/held-new") == sorted(small)


def test_what_a_fetch_took_out_of_packs_belongs_to_it(hub: Hub, tmp_path: Path) -> None:
    """The same on another node, which has everything from the store."""
    small: Tree = {".gitattributes": b"*.bin filter=lfs\n", "config.json": b"{}"}
    tree: Tree = {**small, "model.safetensors": Random("packed", 9 * MIB)}
    hub.commit("org/packed", tree)
    store = f"file://{tmp_path}/store"
    with Daemon.start(tmp_path / "first", hub, min_free="0", store=store) as first, Client.of(first) as task:
        task.fetch("org/packed")
        until(lambda: first.status()["exchange"]["shared"] == 1)
    hub.reset_log()
    with (
        Daemon.start(tmp_path / "second", hub, min_free="0", grace="0", store=store, store_rate="3MiB") as second,
        Client.of(second) as task,
        Client.of(second) as owner,
    ):
        task.begin("fetch", repo_id="org/packed")
        task.progress(lambda progress: progress["done_files"] == len(small))
        owner.ask("evict", size_bytes=0)
        assert set(hashes(small).values()) <= blobs(second) and views(second) == []
        assert task.call("hashes", folder=task.good().path).files == hashes(tree)
        assert content(hub) == []


def test_what_goes_before_it_is_in_hand_is_fetched_again(hub: Hub, daemon: Daemon, task: Client) -> None:
    """Somebody takes a small file's blob away meanwhile, as an eviction may between its publication and the hold."""
    tree: Tree = {"config.json": b'{"gone": true}', "model.safetensors": Random("gone", 9 * MIB)}
    hub.commit("org/gone", tree)
    hub.misbehave("slow", match="^lfs", rate=TRICKLE)
    task.begin("fetch", repo_id="org/gone")
    task.progress(lambda progress: progress["done_files"] == 1)
    digest = hashes(tree)["config.json"]
    (daemon.root / "blobs" / "sha256" / digest[:2] / digest).unlink()
    hub.calm()
    assert task.call("hashes", folder=task.good().path).files == hashes(tree)
    assert [request.file for request in content(hub)].count("config.json") == 2
    assert_each_byte_once(hub, {"model.safetensors": tree["model.safetensors"]})


# ---- leaving


def test_a_caller_who_leaves_does_not_stop_the_others(hub: Hub, daemon: Daemon) -> None:
    hub.commit("org/leave", MODEL)
    hub.misbehave("slow", rate=TRICKLE)
    with clients(daemon, 3) as (first, second, third):
        for task in (first, second, third):
            task.begin("fetch", repo_id="org/leave")
        third.progress(waiters(3))
        first.kill()  # who started it
        third.progress(waiters(2))
        second.kill()
        third.progress(waiters(1))
        hub.calm()
        assert third.call("hashes", folder=third.good().path).files == hashes(MODEL)
    assert hub.bytes_sent() == SIZE and daemon.status()["leases"] == 0


def test_the_last_one_to_leave_stops_the_download(hub: Hub, daemon: Daemon) -> None:
    hub.commit("org/last", LARGE)
    hub.misbehave("slow", rate=8 * MIB)
    with clients(daemon, 2) as (first, second):
        for task in (first, second):
            task.begin("fetch", repo_id="org/last")
        second.progress(lambda progress: progress["waiters"] == 2 and progress["done_bytes"] > 6 * MIB)
        first.kill()
        second.kill()
    until_idle(daemon)
    asked = hub.requests("lfs")
    hub.wait(kind="lfs", requests=len(asked), over=True)  # their connections are closed
    kept, sent = partials(daemon), hub.bytes_sent()
    assert sum(kept.values()) > 3 * MIB and sent < SIZE - MIB
    hub.calm()
    hub.reset_log()
    with Client.of(daemon) as task:
        daemon.status()
        assert hub.requests() == []  # nobody asks for anything while nobody waits
        assert task.call("hashes", folder=task.download("org/last")).files == hashes(LARGE)
    size = sum(map(len, LARGE.values()))
    published = sum(len(data) for data in LARGE.values() if sha256(data) not in kept and not hub.bytes_sent(sha256(data)))
    assert hub.bytes_sent() == size - published - sum(kept.values())
    assert hub.requests("info") == [] and hub.requests("tree") == []


def test_a_download_that_was_left_is_taken_up_at_once(hub: Hub, daemon: Daemon) -> None:
    """The next caller comes while the flight that was left is still tidying up."""
    hub.commit("org/again", LARGE)
    hub.misbehave("slow", rate=8 * MIB)
    for _ in range(5):
        with clients(daemon, 1) as (task,):
            task.begin("fetch", repo_id="org/again")
            task.progress(downloads)
    hub.calm()
    with Client.of(daemon) as task:
        assert task.call("hashes", folder=task.download("org/again")).files == hashes(LARGE)


# ---- failing


def test_a_failure_reaches_everybody_and_nobody_stampedes(hub: Hub, daemon: Daemon) -> None:
    hub.commit("org/lies", {**SMALL, "model.safetensors": Random("lies", 3 * MIB)})
    hub.misbehave("wrong", match="^lfs", after=MIB)
    hub.misbehave("slow", match="^lfs", rate=2 * MIB)
    with clients(daemon, 8) as tasks:
        for task in tasks:
            task.begin("fetch", repo_id="org/lies")
        tasks[0].progress(waiters(8))
        outcomes = [task.end() for task in tasks]
        assert all(outcome.is_error("ContentMismatchError") for outcome in outcomes)
        assert len({outcome.message for outcome in outcomes}) == 1 and "'model.safetensors' in org/lies" in outcomes[0].message
        assert "hint: " in outcomes[0].message and outcomes[0].value["path"] == "model.safetensors"
        assert len(hub.requests("lfs")) == 3  # wrong bytes are asked for again, twice
        assert blobs(daemon) == set(hashes(SMALL).values()) and views(daemon) == []
        hub.calm()
        assert {outcome.error for outcome in [task.call("snapshot_download", repo_id="org/lies") for task in tasks]} == {None}
    assert len(hub.requests("lfs")) == 4


def test_a_look_up_that_fails_is_one_look_up(hub: Hub, daemon: Daemon) -> None:
    hub.misbehave("hang", match="^info")
    with clients(daemon, 8) as tasks:
        for task in tasks:
            task.begin("snapshot_download", repo_id="org/nowhere")
        hub.wait(kind="info", requests=1)
        while daemon.status()["requests"] < len(tasks) + 1:
            pass
        hub.calm()
        assert all(outcome.is_error("RepositoryNotFoundError") for outcome in [task.end() for task in tasks])
    assert len(hub.requests("info")) == 2  # the one that hung, and another try


# ---- large repos


def memory(daemon: Daemon) -> dict[str, int]:
    """MiB, as the kernel counts them."""
    with open(f"/proc/{daemon.pid}/status") as file:
        lines = dict(line.split(":", 1) for line in file)
    return {name: int(lines[name].split()[0]) >> 10 for name in ("VmHWM", "VmRSS", "RssAnon")}


@pytest.mark.soak
def test_ten_thousand_files(hub: Hub, daemon: Daemon, task: Client) -> None:
    hub.commit_many("org/many", 10_000)
    reply = task.fetch("org/many", timeout=150)
    print(f"10,000 files in {reply['seconds']:.1f} s, {memory(daemon)} MiB")
    assert reply["files"] == 10_000 and reply["hub_bytes"] == hub.bytes_sent() == 640_000
    assert len(content(hub)) == 10_000 and len(blobs(daemon)) == 10_000
    found = task.call("hashes", folder=reply["path"]).files
    assert found is not None and len(found) == 10_000 and set(found.values()) == blobs(daemon)
    assert memory(daemon)["VmHWM"] < 150
    warm = task.fetch("org/many")
    print(f"again in {warm['seconds'] * 1000:.1f} ms, {memory(daemon)} MiB")
    assert warm["hub_bytes"] == 0 and warm["path"] == reply["path"]


@pytest.mark.slow
def test_a_few_of_a_hundred_thousand_files(hub: Hub, daemon: Daemon, task: Client) -> None:
    hub.commit_many("org/huge", 100_000, 40)
    reply = task.fetch("org/huge", allow_patterns=["00042/*7.txt"])
    print(f"100 of 100,000 files in {reply['seconds']:.1f} s, {memory(daemon)} MiB")
    assert reply["files"] == 100 and hub.bytes_sent() == 4_000
    again = task.fetch("org/huge", allow_patterns=["00043/*7.txt"])
    print(f"100 others in {again['seconds']:.1f} s, {memory(daemon)} MiB")
    assert again["files"] == 100 and len(hub.requests("tree")) == 101  # pages of 1,000 rows: folders are rows, too


@pytest.mark.soak
def test_more_equal_files_than_links(hub: Hub, daemon: Daemon, task: Client) -> None:
    """ext4 allows 65,000 names for a file; the blob has one, and the views the rest."""
    hub.commit_many("org/equal", 65_001, equal=True, lfs=True)
    reply = task.fetch("org/equal", timeout=300)
    print(f"65,001 equal files in {reply['seconds']:.1f} s, {memory(daemon)} MiB")
    assert reply["files"] == 65_001 and hub.bytes_sent() == 64 and len(blobs(daemon)) == 1
    found = task.call("hashes", 300, folder=reply["path"]).files
    assert found is not None and len(found) == 65_001 and set(found.values()) == blobs(daemon)
