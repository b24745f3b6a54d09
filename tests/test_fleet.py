"""Several nodes, one store, one hub: the hub is asked once for every byte, and whoever holds things up is replaced (I5).

Every node is a daemon of its own on a root of its own. What the hub gave is read from its log, what the nodes have from their disks.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .clients import Client, Tree, blobs, hashes
from .daemon import Daemon
from .hub import Hub, Random
from .proxy import Proxy
from .saves import until
from .seaweed import SeaweedFS

pytestmark = pytest.mark.timeout(120)

MIB = 1 << 20
SMALL: Tree = {"config.json": b"{}", "tokenizer/vocab.txt": b"a\nb\n", "empty": b"", "notes.md": Random("notes", 200_000)}
LARGE: Tree = {f"model-{number}.safetensors": Random(f"part {number}", 3 * MIB + number) for number in range(6)}
MODEL: Tree = {**SMALL, **LARGE, "README.md": Random("not in LFS", 600_000)}
QUICK: dict[str, Any] = {"min_free": "0", "hub_backoff_seconds": 0.02}


@pytest.fixture
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    kind = getattr(request, "param", "file")
    return f"file://{tmp_path}/store" if kind == "file" else in_s3(request.getfixturevalue("seaweed"), monkeypatch)


on_both = pytest.mark.parametrize("store", ["file", "s3"], indirect=True)


def in_s3(seaweed: SeaweedFS, monkeypatch: pytest.MonkeyPatch, endpoint: str | None = None) -> str:
    for name, value in seaweed.environment(endpoint=endpoint).items():
        monkeypatch.setenv(name, value)
    return seaweed.bucket()


@contextlib.contextmanager
def fleet(folder: Path, hub: Hub | None, count: int, store: str, **config: Any) -> Iterator[list[Daemon]]:
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(Daemon.start(folder / f"node-{number}" / "root", hub, store=store, **{**QUICK, **config}))
            for number in range(count)
        ]


@contextlib.contextmanager
def tasks(daemons: list[Daemon]) -> Iterator[list[Client]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(Client.of(daemon)) for daemon in daemons]


def size(tree: Tree) -> int:
    return sum(map(len, tree.values()))


def until_shared(*daemons: Daemon, trees: int = 1) -> None:
    """Everything that came from the hub is in the store."""
    until(lambda: sum(exchanged(daemon)["shared"] for daemon in daemons) >= trees)


def exchanged(daemon: Daemon) -> dict[str, int]:
    statistics: dict[str, int] = daemon.status()["exchange"]
    return statistics


def check(daemon: Daemon, tree: Tree) -> None:
    assert set(hashes(tree).values()) <= blobs(daemon)


# ---- each byte once


@on_both
def test_four_nodes_at_once(hub: Hub, tmp_path: Path, store: str) -> None:
    hub.commit("org/model", MODEL)
    with fleet(tmp_path, hub, 4, store) as daemons, tasks(daemons) as all_tasks:
        hub.misbehave("slow", rate=1 * MIB)
        for task in all_tasks:
            task.begin("snapshot_download", repo_id="org/model")
        until(lambda: len([daemon for daemon in daemons if exchanged(daemon)["claims"]]) > 1)  # they share the work
        hub.calm()
        for task, daemon in zip(all_tasks, daemons, strict=True):
            view = Path(str(task.good().path))
            assert {path: (view / path).read_bytes() for path in MODEL} == {path: bytes(data) for path, data in MODEL.items()}
            check(daemon, MODEL)
        given = {path: hub.bytes_sent(path) for path in SMALL} | {path: hub.bytes_sent(sha) for path, sha in hashes(LARGE).items()}
        assert given == {path: len(data) for path, data in {**SMALL, **LARGE}.items()}
        assert hub.bytes_sent() == size(MODEL)


def test_one_after_the_other(hub: Hub, tmp_path: Path, store: str) -> None:
    """The second node finds all of it in the store: also the listing, and what a git id means."""
    hub.commit("org/model", MODEL)
    with fleet(tmp_path, hub, 2, store) as daemons, tasks(daemons) as (first, second):
        first.download("org/model")
        until_shared(daemons[0])
        hub.reset_log()
        second.download("org/model")
        check(daemons[1], MODEL)
        assert {request.kind for request in hub.requests()} == {"info"}
        assert daemons[1].status()["hub"]["bytes"] == 0 and daemons[1].status()["store_bytes"] >= size(MODEL)
        (told,) = re.findall(r"hub_bytes=0 store_bytes=(\d+)", daemons[1].log)
        assert int(told) >= size(MODEL)


def test_other_patterns(hub: Hub, tmp_path: Path, store: str) -> None:
    hub.commit("org/model", MODEL)
    with fleet(tmp_path, hub, 3, store) as daemons, tasks(daemons) as all_tasks:
        asked: list[dict[str, Any]] = [{"allow_patterns": ["*.json", "model-1*"]}, {"ignore_patterns": ["model-[345]*"]}, {}]
        for task, patterns in zip(all_tasks, asked, strict=True):
            task.begin("snapshot_download", repo_id="org/model", **patterns)
        for task in all_tasks:
            task.good()
        assert hub.bytes_sent() == size(MODEL)
        check(daemons[2], MODEL)


def test_a_file_at_a_time(hub: Hub, tmp_path: Path, store: str) -> None:
    """Single files of a commit, on two nodes in turn: nobody waits for a claim of his own node."""
    hub.commit("org/model", MODEL)
    with fleet(tmp_path, hub, 2, store) as daemons, tasks(daemons) as all_tasks:
        for path in SMALL:
            for task in all_tasks:
                outcome = task.call("hf_hub_download", repo_id="org/model", filename=path)
                assert outcome.error is None, outcome.message
        assert hub.bytes_sent() == size(SMALL)


def test_repos_that_share_files_in_opposite_order(hub: Hub, tmp_path: Path, store: str) -> None:
    one, two = {**LARGE, "only": b"one"}, {**LARGE, "only": b"two"}
    hub.commit("org/one", one)
    hub.commit("org/two", two)
    hub.misbehave("slow", match="^lfs", rate=20 * MIB)
    with fleet(tmp_path, hub, 4, store) as daemons, tasks(daemons + daemons) as all_tasks:
        for number, task in enumerate(all_tasks):
            task.begin("snapshot_download", repo_id=("org/one", "org/two")[(number + number // 4) % 2])
        for task in all_tasks:
            task.good()
        assert hub.bytes_sent() == size(LARGE) + 6


@pytest.mark.soak
def test_nobody_is_far_behind(hub: Hub, tmp_path: Path, seaweed: SeaweedFS, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a hub at 20 MB/s, the last node has nearly everything when the first one is done."""
    model: Tree = {f"model-{number:02}.safetensors": Random(f"far {number}", 4 * MIB) for number in range(60)}
    hub.commit("org/large", model)
    hub.misbehave("slow", match="^lfs", rate=20_000_000, per_connection=False)
    with fleet(tmp_path, hub, 4, in_s3(seaweed, monkeypatch)) as daemons, tasks(daemons) as all_tasks:
        for task in all_tasks:
            task.begin("snapshot_download", repo_id="org/large")
        until(lambda: any(task.has_answered for task in all_tasks))
        have = [len(blobs(daemon)) / len(model) for daemon in daemons]
        for task in all_tasks:
            task.good()
        print(f"of the blobs, when the first was done: {have}")
        assert min(have) > 0.8
        assert hub.bytes_sent() == size(model)


# ---- who holds things up is replaced


@on_both
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_holder_that_does_not_move_is_replaced(hub: Hub, tmp_path: Path, store: str, how: signal.Signals) -> None:
    hub.commit("org/model", MODEL)
    hub.misbehave("slow", match="^lfs", rate=MIB)
    with fleet(tmp_path, hub, 2, store, store_claim_seconds=2) as daemons, tasks(daemons) as (first, second):
        first.begin("snapshot_download", repo_id="org/model", allow_patterns=["model-1*"])
        until(lambda: exchanged(daemons[0])["claims"] > 0)
        os.kill(daemons[0].pid, how)
        try:
            hub.calm()
            second.download("org/model")
            check(daemons[1], MODEL)
            assert exchanged(daemons[1])["taken_over"] == 1
        finally:
            if how == signal.SIGSTOP:
                os.kill(daemons[0].pid, signal.SIGCONT)
        if how == signal.SIGKILL:
            daemons[0].restart()
        else:
            first.good()  # it comes back, and its caller gets right bytes
            check(daemons[0], {"x": MODEL["model-1.safetensors"]})


def test_a_restarted_node_takes_its_own_claim_at_once(hub: Hub, tmp_path: Path, store: str) -> None:
    hub.commit("org/model", MODEL)
    hub.misbehave("slow", match="^lfs", rate=MIB)
    with fleet(tmp_path, hub, 1, store, store_claim_seconds=3000) as (daemon,), tasks([daemon]) as (task,):
        task.begin("fetch", repo_id="org/model")
        until(lambda: exchanged(daemon)["claims"] >= 4)
        daemon.kill()
        hub.calm()
        daemon.restart()
        task.good()
        check(daemon, MODEL)
        assert exchanged(daemon)["taken_over"] >= 4


def test_one_who_is_refused_leaves_it_to_others(hub: Hub, tmp_path: Path, store: str) -> None:
    """A claim whose holder the hub turns away is free at once."""
    hub.commit("org/model", MODEL)
    hub.misbehave("wrong", match="^lfs", after=MIB)
    with fleet(tmp_path, hub, 2, store, store_claim_seconds=3000) as daemons, tasks(daemons) as (first, second):
        assert first.refused("snapshot_download", repo_id="org/model").is_error("ContentMismatchError")
        hub.calm()
        second.download("org/model")
        check(daemons[1], MODEL)


# ---- the hub, or the store, is away


@on_both
def test_the_hub_is_away(hub: Hub, tmp_path: Path, store: str) -> None:
    commit = hub.commit("org/model", MODEL)
    hub.commit("org/secret", MODEL, private=True, tokens=["hf_mine"])
    with fleet(tmp_path, hub, 3, store, hub_attempts=1) as daemons, tasks(daemons) as (first, second, third):
        first.download("org/model")
        first.download("org/secret", token="hf_mine")
        until_shared(daemons[0], trees=2)
        hub.misbehave("down")
        second.download("org/model")
        check(daemons[1], MODEL)
        third.download("org/model", revision=commit)
        check(daemons[2], MODEL)
        for token in ("hf_mine", None):
            assert third.refused("snapshot_download", repo_id="org/secret", token=token or False).error
        assert third.refused("snapshot_download", repo_id="org/never").error
        (path,) = daemons[0].root.glob("repos/*/model--org--model/visibility.json")
        said = [json.loads((daemon.root / path.relative_to(daemons[0].root)).read_text())["checked"] for daemon in daemons]
        assert said == said[:1] * 3, "nobody heard it from the hub later than the first"


def test_the_store_is_away(hub: Hub, tmp_path: Path, seaweed: SeaweedFS, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fetch does without; what can't be shared now is shared by the next assembly."""
    hub.commit("org/model", MODEL)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with Proxy(seaweed.address) as proxy:
        store = in_s3(seaweed, monkeypatch, proxy.endpoint)
        proxy.refuse()
        with fleet(tmp_path, hub, 1, store) as (daemon,), tasks([daemon]) as (task,):
            task.download("org/model")
            check(daemon, MODEL)
            assert hub.bytes_sent() == size(MODEL)
            assert daemon.log.count("the store is of no help") == 1
            proxy.listen()
            daemon.restart()
        with fleet(tmp_path, hub, 1, store) as (daemon,), tasks([daemon]) as (task,):
            task.download("org/model")
            until_shared(daemon)
        assert hub.bytes_sent() == size(MODEL)
        with Daemon.start(tmp_path / "other" / "root", hub, store=store, **QUICK) as other, Client.of(other) as task:
            task.download("org/model")
            check(other, MODEL)
        assert hub.bytes_sent() == size(MODEL)


def test_the_store_lies(hub: Hub, tmp_path: Path) -> None:
    """Bytes from the store are verified like any others: what lies there is fetched from the hub, and put right (I10)."""
    hub.commit("org/model", MODEL)
    store, folder = f"file://{tmp_path}/store", tmp_path / "store"
    with fleet(tmp_path, hub, 3, store) as daemons, tasks(daemons) as (first, second, third):
        first.download("org/model")
        until_shared(daemons[0])
        liar = hashes(LARGE)["model-1.safetensors"]
        for blob in (folder / "blobs" / "sha256").glob("*/*"):
            if blob.name == liar or blob.name not in hashes(MODEL).values():  # a large file, and the pack
                data = bytearray(blob.read_bytes())
                data[1000 : 1000 + len(data) // 2] = bytes(len(data) // 2)
                blob.write_bytes(data)
        second.download("org/model")
        check(daemons[1], MODEL)
        until(lambda: all(hashlib.sha256(blob.read_bytes()).hexdigest() == blob.name for blob in (folder / "blobs" / "sha256").glob("*/*")))
        third.download("org/model")
        check(daemons[2], MODEL)
        assert daemons[2].status()["hub"]["mismatches"] == 0


def test_nothing_is_shared_unless_asked(hub: Hub, tmp_path: Path) -> None:
    """The store below a node's own root has no other readers; and `store_repos` says no."""
    hub.commit("org/model", MODEL)
    configs: list[dict[str, Any]] = [{}, {"store": f"file://{tmp_path}/store", "store_repos": "false"}]
    for number, config in enumerate(configs):
        with Daemon.start(tmp_path / f"{number}" / "root", hub, **QUICK, **config) as daemon, Client.of(daemon) as task:
            task.download("org/model")
            assert daemon.status()["exchange"] is None
        assert not (tmp_path / "store").exists() and not any((daemon.root / "store").iterdir())
