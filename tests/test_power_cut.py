"""Power cuts, and disks that fail, while saves are kept: what was acknowledged with `durable` is there whole, and an error is no save (I3).

The power is cut by the filesystem's own shutdown, which writes nothing more. The same test with each of the syncs taken out loses
saves: so the syncs are needed, all of them, and the test can tell.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest

from modelcache.errors import ModelcacheError, NoSpaceError, StorageError

from .daemon import Daemon
from .kernel import Machine, small_tmpfs, straced
from .saves import MIB, contents, hashes, in_folder, key_of, wired

AWAY = "file:///sys/away"  # a store where nobody can put anything
SAVES = 12

# Nothing is hashed, so the only syncs are those of the saves themselves.
QUIET = """
import asyncio, os, runpy
from modelcached import durable, hashing
hashing.Hashing.work = lambda self, flight: asyncio.Event().wait()
{change}
runpy.run_module("modelcached", run_name="__main__", alter_sys=True)
"""
LEFT_OUT = {
    "all syncs": "os.fsync = os.fdatasync = lambda handle: None",
    "the files' syncs": "durable.sync_file = lambda path: None",
    "the folders' syncs": "durable.sync_folders = lambda folders: None",
    "the entry's sync": "durable.write = lambda path, data, temporary, mode=0o600: durable.record(path, data, temporary)",
}


def quiet(change: str = "") -> type[Daemon]:
    return type("Quiet", (Daemon,), {"program": ("-c", QUIET.format(change=change))})


def lost_by_a_power_cut(folder: Path, filesystem: str, kind: type[Daemon], saves: int) -> set[str]:
    """The acknowledged durable saves that are gone afterwards, or are not as they were."""
    machine, acknowledged = Machine(folder, filesystem), dict[str, bytes]()
    with machine.on() as place, contextlib.ExitStack() as stack:
        daemon = kind.start(place / "root", store=AWAY, min_free="0")
        stack.callback(daemon.close)
        wire = stack.enter_context(wired(daemon.socket))
        for number in range(saves):
            if random.random() < 0.3:
                wire.save(f"loose-{number}", {"large.bin": random.randbytes(300_000)})  # may be lost
            data = random.randbytes(300_000 + number)
            wire.save(f"cut-{number}", {"large.bin": data, "small": data[:100]}, durable=True)
            acknowledged[key_of(f"cut-{number}")] = data
        machine.cut()
        daemon.kill()
    lost = set(acknowledged)
    with machine.on() as place, contextlib.suppress(AssertionError):  # a root that can't be opened has lost everything
        daemon = Daemon(place / "root", None, None, {"store": AWAY, "min_free": "0"})
        with contextlib.closing(daemon):
            daemon.restart()
            with wired(daemon.socket) as wire:
                for key in lost.intersection(wire.flush(0)["pending"]):
                    data = acknowledged[key]
                    with contextlib.suppress(ModelcacheError):
                        view = Path(wire.request("load", key=key)["path"])
                        if ((view / "large.bin").read_bytes(), (view / "small").read_bytes()) == (data, data[:100]):
                            lost.remove(key)
    return lost


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("filesystem", ["ext4", "xfs"])
def test_nothing_that_was_acknowledged_is_lost(tmp_path: Path, filesystem: str) -> None:
    assert lost_by_a_power_cut(tmp_path, filesystem, quiet(), SAVES) == set()


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("left_out", LEFT_OUT)
def test_without_one_of_the_syncs_something_is(tmp_path: Path, left_out: str) -> None:
    """It shows that the test before can fail."""
    assert lost_by_a_power_cut(tmp_path, "ext4", quiet(LEFT_OUT[left_out]), SAVES)


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_many_power_cuts(tmp_path: Path) -> None:
    """In the middle of hashing too, with whatever syncs that makes; and on xfs the syncs are needed as well."""
    for number in range(12):
        folder = tmp_path / str(number)
        folder.mkdir()
        filesystem, saves, kind = random.choice(["ext4", "xfs"]), random.randrange(1, 40), quiet() if number % 2 else Daemon
        assert lost_by_a_power_cut(folder, filesystem, kind, saves) == set(), (filesystem, saves)
        shutil.rmtree(folder)
    for left_out, change in LEFT_OUT.items():
        if left_out != "the files' syncs":  # xfs writes a file that was truncated as soon as it is closed
            folder = tmp_path / left_out
            folder.mkdir()
            assert lost_by_a_power_cut(folder, "xfs", quiet(change), SAVES), left_out
            shutil.rmtree(folder)


# ---- errors of the disk


@pytest.mark.parametrize(
    ("calls", "error", "expected"),
    [
        ("copy_file_range", "EIO", StorageError),
        ("copy_file_range", "ENOSPC", NoSpaceError),
        ("fsync", "EIO", StorageError),
        ("fsync", "ENOSPC", NoSpaceError),
        ("rename", "EIO", StorageError),
    ],
)
def test_a_disk_that_fails_is_no_save(tmp_path: Path, calls: str, error: str, expected: type[ModelcacheError]) -> None:
    tree = {"a.bin": os.urandom(MIB), "small": b"small"}
    with Daemon.start(tmp_path / "root", store=AWAY, min_free="0"):
        pass  # the root is there: its own making should not fail
    Failing = straced(calls, f"error={error}", "--seccomp-bpf")
    with Failing.start(tmp_path / "root", store=AWAY, min_free="0") as daemon:
        with wired(daemon.socket) as wire:
            with pytest.raises(expected) as caught:
                wire.save("failing", tree, durable=True)
            assert caught.value.hint
            assert wire.flush(0)["pending"] == []
            assert os.listdir(daemon.root / "spool") == ["corrupt"]
            assert not [path for path in (daemon.root / "blobs").rglob("*") if path.is_file()]
        daemon.kill()
    with Daemon.start(tmp_path / "root", store=f"file://{tmp_path}/store", min_free="0") as daemon, wired(daemon.socket) as wire:
        daemon.check_no_temp_files()
        wire.save("again", tree, durable=True)
        assert wire.flush(30) == {"pending": [], "error": ""}
    assert contents(*in_folder(tmp_path / "store")) == {key_of("again"): hashes(tree)}


@pytest.mark.slow
@pytest.mark.timeout(60)
@pytest.mark.parametrize("durable", [True, False])
def test_a_sync_that_failed_is_not_tried_again(tmp_path: Path, durable: bool) -> None:
    """The kernel says it once, and may have thrown the bytes away: the next sync of that file would succeed and mean nothing.

    With `durable` the save fails; a save that was acknowledged before the hashing met the error is brought to the store from a copy.
    """
    store, log, tree = f"file://{tmp_path}/store", tmp_path / "calls", {"a.bin": os.urandom(MIB), "b.bin": os.urandom(MIB)}
    with Daemon.start(tmp_path / "root", store=store, min_free="0"):
        pass
    Failing = straced("fsync", "error=EIO:when=1", "-y", "-o", str(log))  # the first one of each thread
    with Failing.start(tmp_path / "root", store=store, min_free="0") as daemon, wired(daemon.socket) as wire:
        if durable:
            with pytest.raises(StorageError):
                wire.save("failing", tree, durable=True)
        else:
            wire.save("failing", tree)
            assert wire.flush(50)["pending"] == []
        daemon.kill()
    made = [line for line in log.read_text().splitlines() if "fsync(" in line and "/files/" in line]
    synced = Counter(line.split("<")[1].split(">")[0] for line in made)
    failed = {line.split("<")[1].split(">")[0] for line in made if "EIO" in line}
    assert failed and all(synced[path] == 1 for path in failed), made
    if not durable:
        assert contents(*in_folder(tmp_path / "store")) == {key_of("failing"): hashes(tree)}


def test_no_room_for_the_entry(tmp_path: Path) -> None:
    """Everything is captured, and then the disk is full: it is an error, and nothing is left that takes room."""
    with small_tmpfs(tmp_path / "small", "24m") as small:
        with Daemon.start(small / "root", store=AWAY, min_free="0") as daemon, wired(daemon.socket) as wire:
            with wire.open("full", MIB) as saving:
                saving.file("a.bin", bytes(MIB))
                with open(small / "filler", "wb", buffering=0) as filler, contextlib.suppress(OSError):
                    while filler.write(bytes(4096)):
                        pass
                with pytest.raises(NoSpaceError):
                    saving.close()
            assert wire.flush(0)["pending"] == [] and os.listdir(daemon.root / "tmp") == []
            (small / "filler").unlink()
            assert wire.save("full", {"a.bin": bytes(MIB)}, durable=True)["size"] == MIB


