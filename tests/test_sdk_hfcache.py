"""Cache folders that huggingface_hub takes for its own: the real library, offline, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import modelcache
from modelcache import hfcache
from modelcache.client import shared
from modelcache.protocol import Fetch

from .fake_daemon import COMMIT, FakeDaemon, listing
from .hub import Hub, Random

FILES = {
    "config.json": b"{}",
    "README.md": b"# hello\n",
    "sub dir/tokenizer ä.json": b"[1]",
    "model-1.safetensors": b"1" * 100_000,
    "sub dir/model-2.safetensors": b"2" * 1000,
    "empty": b"",
}


@pytest.fixture
def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDaemon]:
    with FakeDaemon(tmp_path) as daemon:
        daemon.repos = {"org/name": FILES, "solo": {"a": b"a"}}
        monkeypatch.setenv("MODELCACHE_SOCKET", str(daemon.socket_path))
        yield daemon


THEIRS = """
import json, os, sys
import huggingface_hub as hub
results = []
for name, arguments, keywords in json.loads(sys.argv[1]):
    try:
        result = getattr(hub, name)(*arguments, **keywords)
        results.append(sorted([f.path, f.size, f.blob_id] for f in result) if isinstance(result, list) else result)
    except Exception as error:
        results.append(type(error).__name__)
print(json.dumps(results))
"""


def huggingface_hub_offline(cache: Path, *calls: tuple[str, list[str], dict[str, Any]]) -> Any:
    environment = {**os.environ, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run([sys.executable, "-c", THEIRS, json.dumps(calls)], capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


def contents(folder: str) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


@pytest.mark.parametrize("how", ["link", "copies"])
def test_huggingface_hub_takes_it_for_its_own(daemon: FakeDaemon, tmp_path: Path, how: str) -> None:
    cache = tmp_path / "cache"
    if how == "copies":
        snapshot = modelcache.snapshot_download("org/name", cache_dir=cache, revision="refs/pr/1")
    else:
        view = str(daemon.show(FILES)[1])
        revisions = ["main", "refs/pr/1", COMMIT]
        snapshot = hfcache.link_snapshot(str(cache), "org/name", "model", revisions, view, listing(FILES))
        assert hfcache.link_snapshot(str(cache), "org/name", "model", ["v1"], view, listing(FILES)) == snapshot  # once more is no error
    found = huggingface_hub_offline(
        cache,
        ("snapshot_download", ["org/name"], {"revision": "refs/pr/1"}),
        ("snapshot_download", ["org/name"], {"revision": COMMIT, "allow_patterns": ["*.json"]}),
        ("hf_hub_download", ["org/name", "sub dir/tokenizer ä.json"], {"revision": "refs/pr/1"}),
        ("hf_hub_download", ["org/name", "none"], {"revision": COMMIT}),
        ("get_cached_repo_tree", ["org/name"], {"revision": "refs/pr/1"}),
        ("try_to_load_from_cache", ["org/name", "config.json"], {"revision": COMMIT}),
    )
    rows = sorted([path, size, oid] for path, size, oid, _, _ in listing(FILES)["files"])
    assert found == [
        snapshot,
        snapshot,
        f"{snapshot}/sub dir/tokenizer ä.json",
        "LocalEntryNotFoundError",
        rows,
        f"{snapshot}/config.json",
    ]
    assert snapshot == str(cache / "models--org--name" / "snapshots" / COMMIT)
    assert contents(snapshot) == FILES or how == "link"
    assert contents(os.path.realpath(snapshot)) == FILES or how == "copies"


@pytest.mark.parametrize("how", ["link", "copies"])
def test_a_part_is_not_taken_for_the_whole(daemon: FakeDaemon, tmp_path: Path, how: str) -> None:
    cache = tmp_path / "cache"
    part = {path: content for path, content in FILES.items() if path.endswith(".json")}
    if how == "copies":
        modelcache.snapshot_download("org/name", cache_dir=cache, allow_patterns="*.json")
    else:
        hfcache.link_snapshot(str(cache), "org/name", "model", ["main"], str(daemon.show(part)[1]), listing(FILES))
    assert huggingface_hub_offline(
        cache, ("snapshot_download", ["org/name"], {}), ("snapshot_download", ["org/name"], {"allow_patterns": "*.json"})
    ) == ["IncompleteSnapshotError", str(cache / "models--org--name" / "snapshots" / COMMIT)]


def test_copies_are_private_and_relative(daemon: FakeDaemon, tmp_path: Path) -> None:
    snapshot = Path(modelcache.snapshot_download("org/name", cache_dir=tmp_path / "cache"))
    folder = snapshot.parent.parent
    names = {row[0]: row[3] or row[2] for row in listing(FILES)["files"]}
    assert {path.name for path in (folder / "blobs").iterdir()} == set(names.values())
    for path, name in names.items():
        pointer = snapshot / path
        assert os.readlink(pointer) == os.path.join(*[".."] * (path.count("/") + 2), "blobs", name)
        assert pointer.stat().st_nlink == 1
        assert pointer.stat().st_mode & 0o777 == 0o644
    moved = tmp_path / "moved"
    (tmp_path / "cache").rename(moved)
    assert contents(str(moved / "models--org--name" / "snapshots" / COMMIT)) == FILES
    assert (moved / "CACHEDIR.TAG").read_text().startswith("Signature: 8a477f597d28d172789f06886806bc55")
    assert not (tmp_path / "cache" / "models--solo").exists()


def test_copies_are_made_once(daemon: FakeDaemon, tmp_path: Path) -> None:
    snapshot = Path(modelcache.snapshot_download("org/name", cache_dir=tmp_path))
    before = {path: path.stat().st_ino for path in (tmp_path / "models--org--name").rglob("*")}
    assert modelcache.snapshot_download("org/name", cache_dir=tmp_path) == str(snapshot)
    assert {path: path.stat().st_ino for path in (tmp_path / "models--org--name").rglob("*")} == before
    (snapshot / "config.json").write_bytes(b"!!")  # same size: the caller's own business, as with huggingface_hub
    assert modelcache.snapshot_download("org/name", cache_dir=tmp_path, force_download=True) == str(snapshot)
    assert contents(str(snapshot)) == FILES


def test_a_single_file(daemon: FakeDaemon, tmp_path: Path) -> None:
    """Without the commit's listing, as huggingface_hub keeps single files."""
    file = modelcache.hf_hub_download("org/name", "config.json", cache_dir=tmp_path)
    folder = tmp_path / "models--org--name"
    assert file == str(folder / "snapshots" / COMMIT / "config.json")
    assert not (folder / "trees").exists()
    assert (folder / "refs" / "main").read_text() == COMMIT
    assert huggingface_hub_offline(tmp_path, ("hf_hub_download", ["org/name", "config.json"], {})) == [file]


def test_one_commit_shows_one_set_of_files(daemon: FakeDaemon, tmp_path: Path) -> None:
    all_of_it, part = daemon.show(FILES)[1], daemon.show({"config.json": b"{}"})[1]
    hfcache.link_snapshot(str(tmp_path), "org/name", "dataset", ["main"], str(all_of_it), listing(FILES))
    with pytest.raises(FileExistsError):
        hfcache.link_snapshot(str(tmp_path), "org/name", "dataset", ["main"], str(part), listing(FILES))
    assert (tmp_path / "datasets--org--name" / "snapshots" / COMMIT).is_dir()


def test_the_listing_is_asked_for_only_when_it_is_needed(daemon: FakeDaemon, tmp_path: Path) -> None:
    modelcache.snapshot_download("org/name")
    modelcache.snapshot_download("org/name", local_dir=tmp_path / "d", cache_dir=tmp_path / "c")
    modelcache.snapshot_download("org/name", cache_dir=tmp_path / "c")
    asked = [Fetch(**daemon.next_request().params).listing for _ in range(3)]
    assert asked == [False, False, True]
    assert not (tmp_path / "c" / "datasets--org--name").exists()


def test_exactly_what_huggingface_hub_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same calls, by the real library from a hub and by ours through the real daemon, leave the same files and links."""
    with Hub.start(tmp_path / "hub") as hub:
        hub.commit("org/name", {**FILES, "big.bin": Random(1, 200_000)})
        hub.tag("org/name", "v1")
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        monkeypatch.setenv("MODELCACHE_SOCKET", str(tmp_path / "socket"))
        monkeypatch.setenv("MODELCACHE_CONNECT_SECONDS", "15")
        monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        flags = ["--root", str(tmp_path / "root"), "--socket", str(tmp_path / "socket"), "--hub-endpoint", hub.endpoint]
        with subprocess.Popen([sys.executable, "-m", "modelcached", "serve", *flags], stderr=subprocess.DEVNULL) as process:
            try:
                for number, keywords in enumerate(({}, {"allow_patterns": "*.json", "revision": "v1"})):
                    made = [str(tmp_path / f"{who}-{number}") for who in ("theirs", "ours")]
                    calls = json.dumps([["snapshot_download", ["org/name"], {**keywords, "cache_dir": made[0]}]])
                    subprocess.run([sys.executable, "-c", THEIRS, calls], check=True)
                    modelcache.snapshot_download("org/name", cache_dir=made[1], **keywords)  # type: ignore[arg-type]
                    theirs, ours = (shape(Path(folder) / "models--org--name") for folder in made)
                    assert ours == theirs
            finally:
                shared().close()
                process.terminate()


def shape(folder: Path) -> dict[str, str | bytes]:
    return {
        str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else "folder"
        for path in folder.rglob("*")
    }


def test_hashes_of_xet_are_kept(tmp_path: Path) -> None:
    rows = [["b", 1, "oid", "sha", "x" * 64], ["a", 2, "oid2", None, None]]
    assert json.loads(hfcache.tree_json({"commit": COMMIT, "files": rows})) == {
        "format_version": 1,
        "files": {
            "a": {"size": 2, "blob_id": "oid2"},
            "b": {"size": 1, "blob_id": "oid", "lfs_sha256": "sha", "lfs_size": 1, "xet_hash": "x" * 64},
        },
    }
