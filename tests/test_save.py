"""Save, end to end and by hand on the wire: what is acknowledged is here whole, and can be loaded on this node at once."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from modelcache.errors import (
    DaemonConnectionError,
    InvalidRequestError,
    ModelcacheError,
    NoSpaceError,
    SaveUnknownError,
    UnsafePathError,
)

from .clients import Client, clients
from .conftest import as_uid
from .daemon import Daemon
from .hub import Random
from .kernel import small_tmpfs
from .saves import MIB, Wire, fill, hashes, key_of, read_only_file, until, wired

DAEMON_UID, TASK_UID, OTHER_UID = 1500, 1501, 1502
AWAY = "file:///sys/away"  # a store where nobody can put anything


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """For tests that do not count what lies in the spool."""
    with Daemon.start(tmp_path_factory.mktemp("node") / "root", store=AWAY, min_free="0") as daemon:
        yield daemon


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    with Daemon.start(tmp_path / "root", store=AWAY, min_free="0") as daemon:
        yield daemon


@pytest.fixture
def to_node(node: Daemon) -> Iterator[Wire]:
    with wired(node.socket) as wire:
        yield wire
        assert leave_nothing_open(node)


@pytest.fixture
def wire(daemon: Daemon) -> Iterator[Wire]:
    with wired(daemon.socket) as wire:
        yield wire


def leave_nothing_open(daemon: Daemon) -> bool:
    """No open save, and none that is being dropped; the hashing may still be at work."""
    return not [name for name in os.listdir(daemon.root / "tmp") if name.startswith(("save-", "dropped-"))]


# ---- end to end


def everything(folder: Path, many: int) -> dict[str, bytes | Random]:
    """A folder with one of everything, and so many small files; what is in it."""
    tree: dict[str, bytes | Random] = {f"many/{number % 50}/{number}": b"%d" % number for number in range(many)}
    tree |= {"large.bin": Random("large", 3 * MIB + 1), "sub/same.bin": Random("large", 3 * MIB + 1), "zero": b"", "sub/zero": b""}
    tree |= {"small.sh": b"#!/bin/sh", "small": b"#!/bin/sh", "large.sh": Random("x", MIB), "just.sh": Random("large", 3 * MIB + 1)}
    tree |= {"ünï\nçode": b"name", "n" * 255: b"long", "256KiB": bytes(256 << 10), "256KiB-1": bytes((256 << 10) - 1)}
    fill(folder, tree)
    (folder / "empty/inner").mkdir(parents=True)
    (folder / "sub/link").symlink_to("../large.bin")
    (folder / "dangling").symlink_to("not/there")
    (folder / "folder").symlink_to("many/7")
    return tree


def shape(folder: Path) -> dict[str, Any]:
    """What of a folder is no bytes: links, empty folders, who may be run."""
    found: dict[str, Any] = {}
    for above, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            path = Path(above) / name
            inside = str(path.relative_to(folder))
            if path.is_symlink():
                found[inside] = os.readlink(path)
            elif path.is_dir():
                found[inside] = "folder"
            else:
                found[inside] = bool(path.stat().st_mode & stat.S_IXUSR)
    return found


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize(("storage_format", "many"), [("files", 500), ("tar", 500), pytest.param("files", 5000, marks=pytest.mark.soak)])
def test_everything_of_another_uid(shared_tmp_path: Path, storage_format: str, many: int) -> None:
    as_uid(DAEMON_UID)  # or skip
    source = shared_tmp_path / "out"
    tree = everything(source, many)
    for path in [source, *source.rglob("*")]:
        os.chown(path, TASK_UID, TASK_UID, follow_symlinks=False)
        if not path.is_symlink():
            path.chmod(0o700 if path.is_dir() or path.suffix == ".sh" else 0o600)
    store = f"file://{shared_tmp_path}/root/own-store"
    with Daemon.start(shared_tmp_path / "root", uid=DAEMON_UID, store=store, min_free="0") as daemon:
        with Client.of(daemon, uid=TASK_UID) as task, Client.of(daemon, uid=OTHER_UID) as other:
            task.begin("save", path=str(source), storage_format=storage_format, metadata={"step": 7})
            reference = task.good().value
            padding = reference["size"] - sum(map(len, tree.values()))  # of a tar: headers and whole blocks
            assert reference["files"] == len(tree) and (padding == 0 if storage_format == "files" else padding >= 512 * len(tree))
            task.begin("load", reference=reference, hashes=True)
            loaded = task.good()
            assert loaded.path is not None and loaded.files == hashes(tree) and shape(Path(loaded.path)) == shape(source)
            task.begin("flush", deadline=60)
            task.good()
            other.begin("load", reference=reference["key"], hashes=True)  # the store is one trust domain
            assert other.good().files == hashes(tree)
        daemon.kill()
        with Daemon.start(shared_tmp_path / "fresh", uid=DAEMON_UID, store=store, min_free="0") as fresh:
            with Client.of(fresh, uid=OTHER_UID) as task:
                task.begin("load", reference=reference, hashes=True)
                again = task.good()
                assert again.path is not None and again.files == hashes(tree) and shape(Path(again.path)) == shape(source)
        daemon.restart()


def test_a_save_that_waits_for_its_store_is_its_owners(shared_tmp_path: Path) -> None:
    """And root's, who sees everything. Others have to wait until the store has it (tests/test_rights.py)."""
    as_uid(DAEMON_UID)  # or skip
    with Daemon.start(shared_tmp_path / "root", uid=DAEMON_UID, store=AWAY) as daemon:
        with wired(daemon.socket) as wire, Client.of(daemon, uid=TASK_UID) as task, Client.of(daemon, uid=OTHER_UID) as other:
            task.begin("save", path=str(fill(shared_tmp_path / "secret", {"a": b"secret"})))
            reference = task.good().value
            task.begin("load", reference=reference, hashes=True)
            loaded = task.good()
            assert loaded.path is not None and loaded.files == hashes({"a": b"secret"})
            assert other.call("hashes", folder=loaded.path).files == {}  # os.walk sees nothing in what it may not enter
            assert other.call("load", reference=reference).error is not None
            assert wire.request("load", key=reference["key"])["path"] == loaded.path


def test_what_was_captured_is_shared_not_copied(daemon: Daemon, wire: Wire) -> None:
    """The file that lies in the spool is the blob, and the file of the view."""
    tree = {"a.bin": os.urandom(MIB), "same.bin": b"", "run.sh": b"x", "small": b"small"}
    tree["same.bin"] = tree["a.bin"]
    wire.save("shared", tree)
    view = Path(wire.load("shared")["path"])
    (entry,) = (daemon.root / "spool").glob("2*")
    captured = {path.stat().st_ino for path in (entry / "files").iterdir()}
    blob = daemon.root / "blobs/sha256" / hashes(tree)["a.bin"][:2] / hashes(tree)["a.bin"]
    assert captured == {blob.stat().st_ino} == {(view / name).stat().st_ino for name in ("a.bin", "same.bin")}
    assert blob.stat().st_nlink == 5 and stat.S_IMODE(blob.stat().st_mode) == 0o444
    assert {path: (view / path).read_bytes() for path in tree} == tree


def test_a_load_waits_for_the_hashing_and_is_told(daemon: Daemon, wire: Wire) -> None:
    phases = []
    with wire.open("hashed", 40 * MIB) as saving:
        saving.file("a.bin", bytes(40 * MIB))
        saving.close()
    call = wire.start("load", key=key_of("hashed"))
    loaded = call.wait(lambda progress: phases.append((progress.phase, progress.source, progress.total_bytes)))
    for lease in loaded.descriptors:
        os.close(lease)
    wire.forget(call)
    assert loaded.result["store_bytes"] == 0
    assert set(phases) <= {("hash", "disk", 40 * MIB)}
    assert wire.load("hashed")["path"] == loaded.result["path"]


@pytest.mark.timeout(60)
def test_many_load_at_once_what_was_just_saved(daemon: Daemon, wire: Wire) -> None:
    """One view for all of them: it never goes away below those who have it."""
    tree: dict[str, bytes | Random] = {f"{number}": b"%d" % number for number in range(500)}
    tree["large.bin"] = Random("at once", 8 * MIB)
    with clients(daemon, 6) as tasks:
        reference = wire.save("at-once", tree)
        for task in tasks:
            task.begin("load", reference=reference, hashes=True)
        outcomes = [task.good() for task in tasks]
    assert len({outcome.path for outcome in outcomes}) == 1
    assert all(outcome.files == hashes(tree) for outcome in outcomes)
    assert leave_nothing_open(daemon)


# ---- by hand


def test_what_is_handed_over_again_replaces_what_was(daemon: Daemon, wire: Wire) -> None:
    with wire.open("again", 2 * MIB, 2) as saving:
        saving.file("a.bin", b"1" * MIB)
        saving.pack({"b": b"first"})
        saving.file("a.bin", b"2" * MIB)
        saving.pack({"b": b"second"})
        saving.file("b", b"3" * (MIB - 1))
        saving.pack({"a.bin": b"4"})
        saving.file("a.bin", b"5" * (MIB + 1))
        assert saving.close()["size"] == 2 * MIB
    view = Path(wire.load("again")["path"])
    assert {path.name: set(path.read_bytes()) for path in view.iterdir()} == {"a.bin": {ord("5")}, "b": {ord("3")}}
    (entry,) = (daemon.root / "spool").glob("2*")
    assert len(os.listdir(entry / "files")) == 2 and os.listdir(entry / "packs") == []  # what was replaced takes no room
    with wire.open("packs", 6, 2) as saving:
        for _ in range(3):
            saving.pack({"a": b"abc", "b": b"def"})
        with pytest.raises(InvalidRequestError, match="larger than was said"):
            saving.pack({"a": b"ABC"})  # the pack stays, because of the other one
        assert saving.close()["size"] == 6
    assert {path.name: path.read_bytes() for path in Path(wire.load("packs")["path"]).iterdir()} == {"a": b"abc", "b": b"def"}


def test_the_client_goes_while_its_save_is_being_kept(daemon: Daemon) -> None:
    """It may have been told, or not: when it comes back it finds its save."""
    for number in range(5):
        with wired(daemon.socket) as wire:
            saving = wire.open(f"gone-{number}", 3)
            saving.pack({"a": b"abc"})
            wire.start("save_close", save=saving.name)
            saving.let_go()
    with wired(daemon.socket) as wire:
        wire.save("last", {"a": b"a"})
        until(lambda: leave_nothing_open(daemon))  # each is kept whole, or was dropped
        until(lambda: len(wire.flush(0)["pending"]) == len([*(daemon.root / "spool").glob("2*")]))
        kept = wire.flush(0)["pending"]
        assert key_of("last") in kept
        for key in kept:
            assert wire.request("load", key=key)["files"] == 1


def test_a_save_that_is_dropped_leaves_nothing(daemon: Daemon, wire: Wire) -> None:
    with wire.open("dropped", 10) as saving:
        saving.pack({"a": b"a"})
        assert not leave_nothing_open(daemon)
        assert wire.request("save_close", save=saving.name, drop=True) == {}
        assert leave_nothing_open(daemon)
        with pytest.raises(SaveUnknownError):
            saving.pack({"a": b"a"})
    assert wire.flush(0)["pending"] == []


def test_a_daemon_that_restarts_meanwhile(daemon: Daemon) -> None:
    with wired(daemon.socket) as wire:
        saving = wire.open("restart", 1)
        daemon.restart()
        with pytest.raises(DaemonConnectionError):
            saving.pack({"a": b"a"})
    with wired(daemon.socket) as wire:
        saving.wire = wire
        with saving, pytest.raises(SaveUnknownError, match="no save"):
            saving.pack({"a": b"a"})
    assert leave_nothing_open(daemon)


def test_closing_while_files_are_copied(daemon: Daemon, wire: Wire) -> None:
    with wire.open("early", 64 * MIB) as saving:
        copying = wire.start("save_files", [read_only_file(bytes(64 * MIB))], save=saving.name, files=[("a.bin", 64 * MIB, False)])
        with pytest.raises(InvalidRequestError, match="still being copied"):
            saving.close()
        wire.wait(copying)
        assert saving.close()["size"] == 64 * MIB


def test_what_does_not_fit_is_refused_at_once(tmp_path: Path) -> None:
    with small_tmpfs(tmp_path / "small", "40m") as small:
        with Daemon.start(small / "root", store=AWAY) as daemon, wired(daemon.socket) as wire:
            with pytest.raises(NoSpaceError) as caught:
                wire.open("large", 60 * MIB)
            assert caught.value.data["needed_bytes"] == 60 * MIB and 20 * MIB < caught.value.data["free_bytes"] < 40 * MIB
            assert "needs 60.0 MiB" in str(caught.value) and "modelcache flush" in str(caught.value)
            with pytest.raises(NoSpaceError):
                wire.open("tar", 25 * MIB, storage_format="tar")  # it is put together beside its files
            with wire.open("first", 25 * MIB) as first:
                with pytest.raises(NoSpaceError):
                    wire.open("second", 25 * MIB)  # that room is promised
                first.file("a.bin", bytes(20 * MIB))
                with pytest.raises(NoSpaceError):
                    wire.open("second", 16 * MIB)
                assert first.close()["size"] == 20 * MIB
            wire.open("second", 12 * MIB).let_go()  # what was promised and not used is free again
            (small / "filler").write_bytes(bytes(8 * MIB))  # and what others take is not the daemon's to promise
            with wire.open("third", 9 * MIB) as third:
                (small / "more").write_bytes(bytes(6 * MIB))
                with pytest.raises(NoSpaceError):
                    third.file("a.bin", bytes(9 * MIB))
            assert wire.load("first")["size_bytes"] == 20 * MIB


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"reference": {"key": "../x", "type": "model"}}, "is no key"),
        ({"reference": {"key": "", "type": "model"}}, "is no key"),
        ({"reference": {"key": "k" * 300, "type": "model"}}, "is no key"),
        ({"reference": {"type": "dataset"}}, "type"),
        ({"reference": {"metadata": "x" * (600 << 10)}}, "too large"),
        ({"storage_format": "zip"}, "storage_format"),
        ({"size": -1}, "negative"),
        ({"files": -1}, "negative"),
        ({"files": 10**7}, "too many"),
        ({"store": "s3://other/bucket"}, "does not serve"),
        ({"store": "gs://other/bucket"}, "not supported"),
        ({"store": "s3://key:secret@bucket/x"}, "a bucket and a path only"),
    ],
)
def test_arguments_that_make_no_sense(to_node: Wire, more: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelcacheError, match=named) as caught:
        to_node.open("x", **{"size": 1, **more})
    assert caught.value.hint and "secret" not in str(caught.value)


@pytest.mark.parametrize("path", ["", "/a", "../a", "a/../b", "a//b", "a/", ".", "a" * 256, "d/" * 2000 + "a"])
def test_names_that_are_refused(to_node: Wire, path: str) -> None:
    with to_node.open("names", 10) as saving:
        with pytest.raises(UnsafePathError) as caught:
            saving.file(path, b"a")
        assert repr(path)[:50].rstrip("'") in str(caught.value)
        saving.pack({"good": b"1234567890"})
        assert saving.close()["files"] == 1


@pytest.mark.parametrize(
    "more",
    [
        {"links": [("l", "../out")]},
        {"links": [("l", "/etc")]},
        {"links": [("l", "")]},
        {"links": [("d/up", ".."), ("out", "d/up/..")]},
        {"links": [("../l", "a")]},
        {"links": [("a", "b")]},
        {"folders": ["a"]},
        {"folders": ["a/inside"]},
        {"folders": ["d", "d"]},
        {"folders": ["../d"]},
    ],
)
def test_links_and_folders_that_are_refused(to_node: Wire, more: dict[str, Any]) -> None:
    with to_node.open("refused", 1) as saving:
        saving.pack({"a": b"a"})
        with pytest.raises(UnsafePathError):
            saving.close(**more)
        with pytest.raises(SaveUnknownError):
            saving.close()
    assert key_of("refused") not in to_node.flush(0)["pending"]


def test_links_that_stay_inside(to_node: Wire) -> None:
    links = [("d/up", ".."), ("d/e/far", "../../d/up/d"), ("loop", "loop"), ("a", "b"), ("b", "a"), ("dots", "./d/../d/./up")]
    with to_node.open("links", 0, 0) as saving:
        saving.close(links=links, folders=["empty"])
    view = Path(to_node.load("links")["path"])
    assert {str(path.relative_to(view)): os.readlink(path) for path in view.rglob("*") if path.is_symlink()} == dict(links)


def test_a_save_of_nothing(to_node: Wire) -> None:
    with to_node.open("nothing", 0, 0) as saving:
        assert saving.close()["size"] == 0
    assert os.listdir(to_node.load("nothing")["path"]) == []
