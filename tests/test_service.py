"""When the hub is asked, when it is not, and what a caller gets who asks for the wrong thing: end to end."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from modelcache.errors import InvalidRequestError

from .clients import Client, Tree, blobs, hashes, partials, sha256, views
from .daemon import Daemon
from .hub import Hub, Random
from .saves import Wire, wired

pytestmark = pytest.mark.timeout(120)

MIB = 1 << 20
FIRST: Tree = {"config.json": b"first", "vocab.txt": b"a\nb\n", "model.safetensors": Random("service", 2 * MIB)}
SECOND: Tree = {**FIRST, "config.json": b"second"}
needs_root = pytest.mark.skipif(os.getuid() != 0, reason="takes root: mounts, and writing where only the daemon may")


@pytest.fixture
def daemon(the_hub: Hub, tmp_path: Path) -> Iterator[Daemon]:
    with Daemon.start(tmp_path / "root", the_hub, min_free="0", hub_backoff_seconds=0.02, hub_attempts=3) as daemon:
        yield daemon


@pytest.fixture
def task(daemon: Daemon) -> Iterator[Client]:
    with Client.of(daemon) as task:
        yield task


@pytest.fixture
def repo(hub: Hub, request: pytest.FixtureRequest) -> str:
    """A repo of the test's own, with one commit; its tag is v1."""
    name = "org/" + re.sub(r"[^a-z0-9]+", "-", request.node.name.lower())[:90].strip("-")
    hub.commit(name, FIRST)
    hub.tag(name, "v1")
    return name


def kinds(hub: Hub) -> list[str]:
    return [request.kind for request in hub.requests()]


def shown(task: Client, path: str | None) -> dict[str, str] | None:
    return task.call("hashes", folder=path).files


# ---- freshness


def test_a_fresh_answer_is_not_asked_for_again(hub: Hub, daemon: Daemon, task: Client, repo: str) -> None:
    path = task.download(repo)
    hub.commit(repo, SECOND)
    hub.reset_log()
    assert task.download(repo) == path
    with Client.of(daemon) as other:
        assert other.download(repo) == path
        assert os.listdir(other.download(repo, allow_patterns="*.json")) == ["config.json"]
    daemon.restart()
    assert task.download(repo) == path
    assert hub.requests() == [] and (Path(path) / "config.json").read_bytes() == b"first"


def test_without_freshness_every_call_asks_once(hub: Hub, daemon: Daemon, repo: str) -> None:
    daemon.restart(fresh_seconds=0)
    with Client.of(daemon) as task:
        path = task.download(repo)
        hub.reset_log()
        assert [task.download(repo) for _ in range(3)] == [path] * 3
        assert kinds(hub) == ["info"] * 3
        hub.commit(repo, SECOND)
        hub.reset_log()
        moved = task.download(repo)
        assert shown(task, moved) == hashes(SECOND) and shown(task, path) == hashes(FIRST)
        assert kinds(hub) == ["info", "tree", "resolve"] and hub.bytes_sent() == len(b"second")


@pytest.mark.parametrize("age", [61, -10], ids=["old", "from the future"])
def test_an_old_answer_is_asked_for_again(hub: Hub, daemon: Daemon, repo: str, age: int) -> None:
    with Client.of(daemon) as task:
        task.download(repo)
    hub.commit(repo, SECOND)
    daemon.terminate()
    (ref,) = (daemon.root / "repos").glob("*/*/refs/main")
    ref.write_text(json.dumps({**json.loads(ref.read_text()), "checked": time.time() - age}))
    daemon.restart()
    with Client.of(daemon) as task:
        assert shown(task, task.download(repo)) == hashes(SECOND)


def test_force_download_asks_the_hub_now(hub: Hub, daemon: Daemon, task: Client, repo: str) -> None:
    task.download(repo)
    hub.commit(repo, SECOND)
    hub.reset_log()
    assert shown(task, task.download(repo, force_download=True)) == hashes(SECOND)
    assert hub.bytes_sent() == len(b"second")  # everything else was hashed, and was right


def test_a_known_commit_is_never_looked_up(hub: Hub, daemon: Daemon, repo: str) -> None:
    daemon.restart(fresh_seconds=0)
    with Client.of(daemon) as task:
        commit = task.fetch(repo, revision="v1")["commit"]
        hub.commit(repo, SECOND)
        hub.reset_log()
        assert shown(task, task.download(repo, revision=commit)) == hashes(FIRST)
        daemon.restart()
        assert shown(task, task.download(repo, revision=commit)) == hashes(FIRST)
        assert shown(task, task.download(repo, revision=commit, allow_patterns="*.txt")) == hashes({"vocab.txt": FIRST["vocab.txt"]})
    assert hub.requests() == []


def test_a_commit_that_is_not_known_is_looked_up_once(hub: Hub, daemon: Daemon, repo: str) -> None:
    daemon.restart(fresh_seconds=0)
    commit = hub.commit(repo, SECOND)
    hub.reset_log()
    with Client.of(daemon) as task:
        task.download(repo, revision=commit, allow_patterns="*.json")
        assert kinds(hub) == ["info", "tree", "resolve"]
        task.download(repo, revision=commit, allow_patterns="*.txt")
        assert kinds(hub) == ["info", "tree", "resolve", "resolve"]


# ---- without the hub


def test_a_known_revision_is_served_without_the_hub(hub: Hub, daemon: Daemon, repo: str) -> None:
    daemon.restart(fresh_seconds=0)
    with Client.of(daemon) as task:
        path = task.download(repo)
        hub.misbehave("down")
        reply = task.fetch(repo)
        assert reply["path"] == path and len(reply["warnings"]) == 1
        assert "can't be reached" in reply["warnings"][0] and f"using {repo}@main as of" in reply["warnings"][0]
        assert task.download(repo) == path and "can't be reached" in task.stderr
        daemon.restart()
        assert task.download(repo) == path
        # What is not here, or was never asked for, is an error that says why.
        for arguments in ({"revision": "v1"}, {"revision": "1" * 40}, {"repo_type": "dataset"}, {"force_download": True, "revision": "v1"}):
            outcome = task.refused("snapshot_download", repo_id=repo, **arguments)
            assert outcome.is_error("HubUnavailableError") and outcome.is_error("FileNotFoundError"), outcome
            assert hub.endpoint in outcome.message and "hint: " in outcome.message


def test_missing_files_of_a_known_revision_need_the_hub(hub: Hub, daemon: Daemon, task: Client, repo: str) -> None:
    task.download(repo, allow_patterns="*.json")
    hub.misbehave("down")
    assert task.refused("snapshot_download", repo_id=repo).is_error("HubUnavailableError")
    assert len(views(daemon)) == 1


@pytest.mark.parametrize("how", ["HF_HUB_OFFLINE", "local_files_only", "the daemon's config"])
def test_offline(hub: Hub, daemon: Daemon, repo: str, how: str) -> None:
    with Client.of(daemon) as task:
        path = task.download(repo)
        task.download(f"{repo}", revision="v1", allow_patterns="*.json")
        commit = hub.commit(repo, {**SECOND, "new.txt": b"new"})
        task.download(repo, revision=commit, allow_patterns="*.json")
    if how == "the daemon's config":
        daemon.restart(offline=True)
    hub.reset_log()
    more = {"local_files_only": True} if how == "local_files_only" else {}
    with Client.of(daemon, {"HF_HUB_OFFLINE": "1"} if how == "HF_HUB_OFFLINE" else {}) as task:
        assert task.download(repo, **more) == path
        assert os.path.basename(task.call("hf_hub_download", repo_id=repo, filename="config.json", **more).path or "") == "config.json"
        missing = task.refused("snapshot_download", repo_id=repo, revision=commit, **more)
        assert missing.is_error("IncompleteSnapshotError") and missing.is_error("LocalEntryNotFoundError")
        assert "'new.txt'" in missing.message and missing.value["missing"] == 1
        unknowns: list[dict[str, Any]] = [
            {"repo_id": "org/never"},
            {"repo_id": repo, "revision": "never"},
            {"repo_id": repo, "repo_type": "space"},
        ]
        for arguments in unknowns:
            unknown = task.refused("snapshot_download", **arguments, **more)
            assert unknown.error is not None and unknown.error[0] == "LocalEntryNotFoundError" and unknown.is_error("FileNotFoundError")
    assert hub.requests() == []


# ---- damage


def damage(path: Path) -> None:
    """Other bytes that look the same from outside; takes root."""
    before = path.stat()
    with open(path, "r+b") as file:
        byte = file.read(1)[0]
        file.seek(0)
        file.write(bytes([byte ^ 0xFF]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@needs_root
@pytest.mark.parametrize("name", ["model.safetensors", "vocab.txt"])
def test_force_download_finds_what_nothing_else_can(hub: Hub, daemon: Daemon, task: Client, repo: str, name: str) -> None:
    """Same size, same time, other bytes: only hashing shows it. Every view of that blob is mended, and only it is fetched."""
    hub.commit(f"{repo}-fork", FIRST)
    path, fork = task.download(repo), task.download(f"{repo}-fork", allow_patterns=["*.safetensors", "*.txt"])
    digest = sha256(FIRST[name])
    damage(daemon.root / "blobs" / "sha256" / digest[:2] / digest)
    hub.reset_log()
    assert task.download(repo, force_download=True) == path
    assert hub.bytes_sent() == len(FIRST[name])
    assert shown(task, path) == hashes(FIRST) and shown(task, fork) == hashes({key: FIRST[key] for key in FIRST if key != "config.json"})
    assert [entry.name for entry in (daemon.root / "quarantine").iterdir()] == [digest]
    assert daemon.status()["quarantined"] == 1 and blobs(daemon) == set(hashes(FIRST).values())


@needs_root
@pytest.mark.parametrize("restarted", [False, True], ids=["running", "restarted"])
def test_verify_finds_damage_and_the_next_caller_gets_right_bytes(
    hub: Hub, daemon: Daemon, task: Client, repo: str, restarted: bool
) -> None:
    path = task.download(repo)
    digest = sha256(FIRST["model.safetensors"])
    damage(daemon.root / "blobs" / "sha256" / digest[:2] / digest)
    reply = task.ask("verify")
    assert reply["damaged"] == [digest] and reply["missing"] == [] and reply["blobs"] == len(FIRST)
    if restarted:
        daemon.restart()
    hub.reset_log()
    assert shown(task, task.download(repo)) == hashes(FIRST) and task.download(repo) == path
    assert hub.bytes_sent() == len(FIRST["model.safetensors"])
    assert task.ask("verify")["damaged"] == []


# ---- bad input


def test_what_does_not_exist_has_a_name(hub: Hub, daemon: Daemon, task: Client, repo: str) -> None:
    asks: list[tuple[str, dict[str, Any], str]] = [
        ("snapshot_download", {"repo_id": "org/nothing"}, "RepositoryNotFoundError"),
        ("snapshot_download", {"repo_id": repo, "repo_type": "dataset"}, "RepositoryNotFoundError"),
        ("snapshot_download", {"repo_id": repo, "revision": "nothing"}, "RevisionNotFoundError"),
        ("snapshot_download", {"repo_id": repo, "revision": "0" * 40}, "RevisionNotFoundError"),
        ("hf_hub_download", {"repo_id": repo, "filename": "nothing.txt"}, "RemoteEntryNotFoundError"),
        ("snapshot_download", {"repo_id": repo, "token": "hf_unknown"}, "TokenRefusedError"),
        ("snapshot_download", {"repo_id": "org/a/b"}, "HFValidationError"),
        ("snapshot_download", {"repo_id": repo, "repo_type": "thing"}, "ValueError"),
        ("snapshot_download", {"repo_id": repo, "revision": "a\nb"}, "InvalidRequestError"),
        ("snapshot_download", {"repo_id": repo, "endpoint": "http://127.0.0.9:1"}, "InvalidRequestError"),
    ]
    for name, arguments, error in asks:
        outcome = task.refused(name, **arguments)
        assert outcome.error is not None and outcome.error[0] == error, (arguments, outcome)
        assert error in ("HFValidationError", "ValueError") or "hint: " in outcome.message
    assert views(daemon) == [] and blobs(daemon) == set()
    assert shown(task, task.download(repo)) == hashes(FIRST)


def test_only_hubs_of_the_config_are_asked(hub: Hub, daemon: Daemon, repo: str, tmp_path: Path) -> None:
    """The endpoint is part of every repo's name: the same id elsewhere is another repo."""
    with Hub.start(tmp_path / "second") as second:
        second.commit(repo, SECOND)
        with Client.of(daemon) as task:
            refused = task.refused("snapshot_download", repo_id=repo, endpoint=second.endpoint)
            assert "does not talk to" in refused.message and hub.endpoint in refused.message and second.requests() == []
            with wired(daemon.socket) as wire:
                refuses_foreign_folders(wire, tmp_path)
            daemon.restart(hub_endpoints=[second.endpoint])
            assert shown(task, task.download(repo, endpoint=second.endpoint)) == hashes(SECOND)
            assert shown(task, task.download(repo)) == hashes(FIRST)
        with Client.of(daemon, {"HF_ENDPOINT": second.endpoint + "/"}) as task:
            assert shown(task, task.download(repo)) == hashes(SECOND)
        assert hub.bytes_sent(sha256(FIRST["model.safetensors"])) + second.bytes_sent(sha256(FIRST["model.safetensors"])) == 2 * MIB


def refuses_foreign_folders(wire: Wire, tmp_path: Path) -> None:
    """Whoever asks: an endpoint names a folder of ours, and here one of the caller's, where opening a file never ends (I7)."""
    foreign = tmp_path / "x+y/model--a--b"
    foreign.mkdir(parents=True)
    os.mkfifo(foreign / "visibility.json")
    for endpoint in (f"{tmp_path}/x://y", "../../x://y", "http://127.0.0.9:1"):
        for method in ("pin", "explain"):
            with pytest.raises(InvalidRequestError, match="does not talk to"):
                wire.request(method, repo_id="a/b", endpoint=endpoint)


def test_rm_refuses_what_is_in_use(hub: Hub, daemon: Daemon, task: Client, repo: str) -> None:
    with Client.of(daemon) as holder:
        path = holder.download(repo)
        refused = task.refused("ask", method="rm", repo_id=repo)
        assert refused.is_error("InUseError") and str(holder.pid) in refused.message and refused.value["holders"] == 1
        assert shown(task, path) == hashes(FIRST)
    reply = task.ask("rm", repo_id=repo)
    assert reply["freed_bytes"] >= 2 * MIB and views(daemon) == [] and blobs(daemon) == set()
    hub.reset_log()
    assert shown(task, task.download(repo)) == hashes(FIRST) and hub.bytes_sent() == sum(map(len, FIRST.values()))


# ---- a full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m,mode=755", "none", str(disk)], check=True)
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def fill(path: Path) -> None:
    """Takes all the room that is left on a disk."""
    with open(path, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(MIB)):
            pass


@needs_root
def test_what_does_not_fit_is_refused_at_once(hub: Hub, small_disk: Path) -> None:
    hub.commit("org/too-large", {"config.json": b"{}", "model.safetensors": Random("too large", 70 * MIB)})
    hub.commit("org/fits", FIRST)
    hub.reset_log()
    with Daemon.start(small_disk, hub, min_free="16MiB") as daemon, Client.of(daemon) as task:
        refused = task.refused("snapshot_download", repo_id="org/too-large")
        assert refused.is_error("NoSpaceError") and refused.is_error("OSError")
        assert refused.value["needed_bytes"] == 70 * MIB + 2 and 48 * MIB < refused.value["free_bytes"] <= 64 * MIB
        assert "70.0 MiB" in refused.message and "modelcache rm" in refused.message
        assert hub.bytes_sent() == 0 and blobs(daemon) == set() and partials(daemon) == {}
        assert shown(task, task.download("org/too-large", allow_patterns="*.json")) == hashes({"config.json": b"{}"})
        assert shown(task, task.download("org/fits")) == hashes(FIRST)


@needs_root
def test_a_disk_that_fills_up_meanwhile(hub: Hub, small_disk: Path) -> None:
    """After room was made the download goes on where it stopped; what is there already needs no room again."""
    tree: Tree = {"config.json": b"{}", "model.safetensors": Random("fills up", 40 * MIB)}
    hub.commit("org/fills", tree)
    hub.reset_log()
    filler = small_disk / "filler"
    with Daemon.start(small_disk, hub, min_free="0") as daemon, Client.of(daemon) as task:
        hub.misbehave("slow", rate=40 * MIB)
        task.begin("fetch", repo_id="org/fills")
        task.progress(lambda progress: progress["done_bytes"] > 25 * MIB)
        fill(filler)
        outcome = task.end()
        assert outcome.is_error("NoSpaceError") and "the disk is full" in outcome.message and "hint: " in outcome.message
        assert daemon.status()["blob_flights"]["running"] == 0 and views(daemon) == []
        filler.unlink()
        hub.calm()
        kept, sent = sum(partials(daemon).values()), hub.bytes_sent(sha256(tree["model.safetensors"]))
        assert kept > 20 * MIB
        assert shown(task, task.download("org/fills")) == hashes(tree)
        assert hub.bytes_sent(sha256(tree["model.safetensors"])) == sent + 40 * MIB - kept
