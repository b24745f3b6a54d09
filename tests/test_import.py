"""`modelcache import`: what the real huggingface_hub left in its cache comes over, checked, without a network."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from modelcached.holds import Holds, Lingering

from .clients import Client, hashes
from .daemon import Daemon, clean_environment
from .hub import Hub, Random
from .kernel import Machine, require_root
from .saves import MIB, Tree, read_only_file, until, wired
from .test_capture import HangingFiles
from .test_capture import hanging as hanging

FILES: Tree = {
    "config.json": b"{}",
    "sub dir/tokenizer ä.json": b"[1]",
    "model.safetensors": Random(1, 2 * MIB),
    "copy.safetensors": Random(1, 2 * MIB),
}
DOWNLOAD = "import sys, huggingface_hub; print(huggingface_hub.snapshot_download(sys.argv[1], allow_patterns=sys.argv[2:] or None))"


def downloaded(hub: Hub, cache: Path, repo: str, *patterns: str, token: str = "") -> Path:
    """By huggingface_hub itself."""
    environment = clean_environment(HF_HUB_CACHE=str(cache), HF_ENDPOINT=hub.endpoint, HF_HUB_DISABLE_XET="1", HF_TOKEN=token)
    done = subprocess.run([sys.executable, "-c", DOWNLOAD, repo, *patterns], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.strip())


def imported(daemon: Daemon, cache: Path, *words: str, code: int = 0) -> dict[str, Any]:
    command = [sys.executable, "-m", "modelcache", "import", "--json", *words]
    environment = {**daemon.environment, "HF_HUB_CACHE": str(cache)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd="/", timeout=60)
    assert done.returncode == code, done.stderr
    return {each["what"]: each for each in json.loads(done.stdout)["imported"]}


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "hf"


def test_a_cache_comes_over_without_the_network(tmp_path: Path, hub: Hub, cache: Path) -> None:
    commit = hub.commit("org/model", FILES)
    downloaded(hub, cache, "org/model")
    with Daemon.start(tmp_path / "root") as daemon, Client.of(daemon) as task:  # its hub is down
        assert task.refused("fetch", repo_id="org/model", local_files_only=True).error
        (said,) = imported(daemon, cache, "--public").values()
        assert (said["files"], said["taken"], said["damaged"], said["missing"]) == (4, 3, [], [])
        for asked in ({"revision": commit}, {}, {"allow_patterns": ["*.json"]}):
            outcome = task.call("snapshot_download", repo_id="org/model", local_files_only=True, hashes=True, **asked)
            right = hashes({path: content for path, content in FILES.items() if "allow_patterns" not in asked or path.endswith(".json")})
            assert outcome.error is None and outcome.files == right, (asked, outcome)
        again = imported(daemon, cache, "--public")
        assert [each["taken"] for each in again.values()] == [0], "what is here is not taken twice"
        (seen,) = daemon.root.glob("repos/*/*/visibility.json")
        assert json.loads(seen.read_text())["checked"] == 0, "the hub did not say that it is public"
    assert sorted(path.name for path in (cache / "models--org--model" / "blobs").iterdir()), "the other cache keeps what it has"


def test_what_came_over_is_not_asked_of_the_hub_again(tmp_path: Path, hub: Hub, cache: Path) -> None:
    hub.commit("org/again", FILES)
    downloaded(hub, cache, "org/again")
    with Daemon.start(tmp_path / "root", hub, fresh_seconds=0) as daemon, Client.of(daemon) as task:
        imported(daemon, cache)
        hub.reset_log()
        reply = task.fetch("org/again")
        assert reply["hub_bytes"] == hub.bytes_sent() == 0
        assert reply["files"] == 4 and not reply["private"]


def test_some_files_of_a_commit_are_not_taken_for_all(tmp_path: Path, hub: Hub, cache: Path) -> None:
    hub.commit("org/part", FILES)
    downloaded(hub, cache, "org/part", "*.json")
    for listing in cache.rglob("trees/*.json"):
        listing.unlink()  # as older versions of huggingface_hub leave it
    with Daemon.start(tmp_path / "root", hub, fresh_seconds=0) as daemon, Client.of(daemon) as task:
        (said,) = imported(daemon, cache, "--public").values()
        assert (said["files"], said["state"]) == (2, "as it was")
        outcome = task.call("snapshot_download", repo_id="org/part", local_files_only=True, hashes=True)
        assert outcome.files == hashes({path: content for path, content in FILES.items() if path.endswith(".json")})
        outcome = task.call("snapshot_download", repo_id="org/part", hashes=True)
        assert outcome.files == hashes(FILES), "the hub can be asked, and knows better"


def test_bytes_that_are_not_what_their_name_says_stay_away(tmp_path: Path, hub: Hub, cache: Path) -> None:
    hub.commit("org/bad", FILES)
    downloaded(hub, cache, "org/bad")
    sha256 = hashlib.sha256(bytes(Random(1, 2 * MIB))).hexdigest()
    blob = cache / "models--org--bad" / "blobs" / sha256
    blob.write_bytes(bytes(2 * MIB))
    with Daemon.start(tmp_path / "root", hub, fresh_seconds=0) as daemon, Client.of(daemon) as task:
        (said,) = imported(daemon, cache, code=8).values()
        assert said["damaged"] == [str(blob)] and sorted(said["missing"]) == ["copy.safetensors", "model.safetensors"]
        outcome = task.call("snapshot_download", repo_id="org/bad", hashes=True)
        assert outcome.files == hashes(FILES)


def test_what_nobody_called_public_needs_a_hub_that_says_so(tmp_path: Path, hub: Hub, cache: Path) -> None:
    commit = hub.commit("org/closed", FILES)
    downloaded(hub, cache, "org/closed")
    with Daemon.start(tmp_path / "root") as daemon, Client.of(daemon) as task:
        imported(daemon, cache)
        assert task.refused("fetch", repo_id="org/closed", revision=commit, local_files_only=True).error


def test_only_owners_import(shared_tmp_path: Path, hub: Hub) -> None:
    require_root()
    hub.commit("org/model", FILES)
    cache = shared_tmp_path / "hf"
    downloaded(hub, cache, "org/model")
    with Daemon.start(shared_tmp_path / "root", hub, uid=4242) as daemon:
        command = ["setpriv", "--reuid=4243", "--regid=4243", "--clear-groups", sys.executable, "-m", "modelcache", "import", str(cache)]
        done = subprocess.run(command, env=daemon.environment, capture_output=True, text=True, cwd="/", timeout=60)
        assert done.returncode == 4 and "uid 4243 may not import" in done.stderr, done.stderr


def large(cache: Path) -> Path:
    """The other cache's file of the one large file that was downloaded."""
    (found,) = (path for path in cache.rglob("blobs/*") if path.stat().st_size > MIB)
    return found


def test_the_other_cache_is_not_ours(tmp_path: Path, hub: Hub, cache: Path) -> None:
    """Its files stay as they were, and what is written into them later does not change what was verified (I1)."""
    hub.commit("org/two", {"model.safetensors": Random(5, 2 * MIB)})
    downloaded(hub, cache, "org/two")
    theirs = large(cache)
    before = theirs.stat()
    with Daemon.start(tmp_path / "root") as daemon, Client.of(daemon) as task:
        imported(daemon, cache, "--public")
        after = theirs.stat()
        assert (after.st_nlink, after.st_mode, after.st_mtime_ns) == (before.st_nlink, before.st_mode, before.st_mtime_ns)
        with theirs.open("r+b") as file:
            file.write(b"trained further")
        outcome = task.call("snapshot_download", repo_id="org/two", local_files_only=True, hashes=True)
        assert outcome.files == hashes({"model.safetensors": Random(5, 2 * MIB)})
        assert daemon.status()["quarantined"] == 0


def test_where_the_filesystem_can_nothing_is_copied(tmp_path: Path, hub: Hub) -> None:
    hub.commit("org/reflink", {"model.safetensors": Random(6, 16 * MIB)})
    with Machine(tmp_path, "xfs").on() as place:
        downloaded(hub, place / "hf", "org/reflink")
        with Daemon.start(place / "root", min_free="0") as daemon:
            os.sync()
            before = os.statvfs(place)
            imported(daemon, place / "hf", "--public")
            os.sync()
            assert (before.f_bfree - os.statvfs(place).f_bfree) * before.f_frsize < 8 * MIB


def test_what_came_over_can_go_again(tmp_path: Path, hub: Hub, cache: Path) -> None:
    """The other cache keeps its files, and yet they leave room for what comes next."""
    hub.commit("org/old", {"model.safetensors": Random(7, 8 * MIB)})
    hub.commit("org/new", {"model.safetensors": Random(8, 8 * MIB)})
    downloaded(hub, cache, "org/old")
    with Daemon.start(tmp_path / "root", hub, max_size="10MiB", min_free="0", grace="0") as daemon:
        imported(daemon, cache, "--public")
        with Client.of(daemon) as task:
            assert task.fetch("org/new")["hub_bytes"] == 8 * MIB, "the other one was evicted for it"
        imported(daemon, cache, "--public")
        with wired(daemon.socket) as wire:
            assert wire.request("rm", repo_id="org/old")["freed_bytes"] >= 8 * MIB
            assert wire.request("status")["room"]["used_bytes"] < MIB
    assert large(cache).stat().st_size == 8 * MIB


def test_what_an_import_has_handed_over_is_nobodys_leftover(tmp_path: Path) -> None:
    """Until its commit shows it, which may be hours later; and afterwards it goes with that."""
    data, oid = b"weights" * 1000, "a" * 40
    sha256 = hashlib.sha256(data).hexdigest()
    listing = json.dumps({"commit": "c" * 40, "files": [["model.bin", len(data), oid, sha256, None]]}).encode()
    with Daemon.start(tmp_path / "root", min_free="0", grace="0") as daemon, wired(daemon.socket) as wire:
        blob = daemon.root / "blobs/sha256" / sha256[:2] / sha256
        for taken in ([0], []):  # what is here already is held, too
            reply = wire.request("import_files", [read_only_file(data)], repo_id="org/slow", files=[(sha256, len(data))])
            assert reply["taken"] == taken and wire.request("evict", size_bytes=0)["leftovers"] == 0 and blob.exists()
        said = wire.request("import_commit", [read_only_file(listing)], repo_id="org/slow", refs=[], is_whole=True, public=True)
        assert said["missing"] == [] and blob.exists()
        assert wire.request("rm", repo_id="org/slow")["freed_bytes"] > 0 and not blob.exists()


async def test_what_nobody_goes_on_with_is_let_go() -> None:
    holds, gone = Holds(), asyncio.Event()
    handed = Lingering(holds, 0)
    with handed.hand("repo") as first:
        first.add(["a"])
        with handed.hand("repo") as second:
            second.add(["a", "b"])
        handed.let_go("repo")
        assert "a" in holds and "b" in holds, "a call is under way"
    assert len(holds) == 2, "and may be followed by another"
    asyncio.get_running_loop().call_later(0, gone.set)
    await gone.wait()
    assert len(holds) == 0
    with handed.hand("repo") as third:
        third.add(["a"])
    handed.let_go("repo")
    assert len(holds) == 0


def test_a_file_that_hangs_keeps_its_descriptor(tmp_path: Path, hanging: HangingFiles) -> None:
    """The thread that was left behind still reads by its number, which must not become somebody else's file."""
    with Daemon.start(tmp_path / "root") as daemon:
        with wired(daemon.socket) as wire:
            wire.start("import_files", [hanging.open("a")], repo_id="org/hangs", files=[("0" * 64, MIB)])
            assert hanging.next_line() == b"read\n"
        until(lambda: daemon.status()["captures"]["hanging"] == 1)
        assert str(hanging.mount / "a") in opened(daemon.pid)


def opened(pid: int) -> list[str]:
    """What a process has open."""
    found = []
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            found.append(os.readlink(descriptor))
    return found


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    with Daemon.start(tmp_path / "root") as daemon:
        command = [sys.executable, "-m", "modelcache", "import", str(tmp_path / "none")]
        done = subprocess.run(command, env=daemon.environment, capture_output=True, text=True, cwd="/")
        assert done.returncode == 2 and "hint:" in done.stderr
        (tmp_path / "empty").mkdir()
        done = subprocess.run([*command[:-1], str(tmp_path / "empty")], env=daemon.environment, capture_output=True, text=True, cwd="/")
        assert done.returncode == 3
