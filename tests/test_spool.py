"""The spool: kept whole or not at all, across kill -9 (I3); what can't be read is set aside. Power cuts are in test_power_cut."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from modelcache.errors import SaveUnknownError, StorageError
from modelcached.errors import InvalidRequest, SaveUnknown, TooMany
from modelcached.layout import Layout
from modelcached.model import TreeId
from modelcached.root import open_root
from modelcached.save import taking
from modelcached.spool import MAX_OPEN, Entry, OpenSave, SavedFile, Spool

from .clients import Client
from .conftest import as_uid
from .daemon import Daemon, clean_environment
from .saves import MIB, key_of, wired

UID = 1500
AWAY = "file:///sys/away"  # a store where nobody can put anything


@pytest.fixture
def layout(tmp_path: Path) -> Iterator[Layout]:
    layout, lock = open_root(tmp_path / "root", private=True)
    yield layout
    os.close(lock)


def make(name: str, **more: Any) -> Entry:
    fields: dict[str, Any] = {
        "uid": 0,
        "created": 1.0,
        "storage_format": "files",
        "store": "file:///s",
        "durable": True,
        "supersede": False,
    }
    return Entry(id=name, reference={"key": key_of(name)}, files=[], links=[], folders=[], **{**fields, **more})


def begin(spool: Spool, size: int = 0, **more: Any) -> tuple[OpenSave, int]:
    return spool.begin(lambda name: make(name, **more), size)


def put(save: OpenSave, path: str, data: bytes) -> None:
    source = save.next_source("files")
    (save.folder / source).write_bytes(data)
    save.entry.files.append(SavedFile(path, len(data), False, source))


@pytest.mark.parametrize("durable", [False, True])
def test_what_is_kept_is_found_again(layout: Layout, durable: bool) -> None:
    spool, kept = Spool(layout), []
    for number in range(3):
        save, alive = begin(spool, durable=durable, created=10.0 - number)
        put(save, "a", b"%d" % number)
        save.entry.links, save.entry.folders = [("l", "a")], ["empty"]
        spool.keep(save)
        spool.forget(save)
        os.close(alive)
        kept.append(save.entry)
    assert os.listdir(layout.tmp) == []
    again = Spool(layout)
    again.recover()
    assert again.entries == kept[::-1]  # the oldest first
    entry = again.entries[0]
    assert again.source(entry, entry.files[0]).read_bytes() == b"2"
    assert again.tree(entry) is None
    again.set_tree(entry, TreeId("a" * 64))
    assert again.tree(entry) == "a" * 64
    again.remove(entry)
    again.forget_kept(entry)
    again.set_aside(again.entries[0])
    assert again.corrupt() == [kept[1].id] and sorted(os.listdir(layout.spool)) == sorted(["corrupt", kept[0].id])
    assert os.listdir(layout.tmp) == []


def test_an_open_save_belongs_to_its_uid(layout: Layout) -> None:
    spool = Spool(layout)
    save, alive = begin(spool, uid=UID)
    assert spool.opened(save.entry.id, UID) is save
    for name, uid in ((save.entry.id, UID + 1), (save.entry.id, 0), ("20990101T000000-0", UID), ("../..", UID)):
        with pytest.raises(SaveUnknown):
            spool.opened(name, uid)
    os.close(alive)


def test_who_opens_too_many(layout: Layout) -> None:
    spool, locks = Spool(layout), []
    for _ in range(MAX_OPEN):
        locks.append(begin(spool, uid=1)[1])
    with pytest.raises(TooMany):
        begin(spool, uid=1)
    locks.append(begin(spool, uid=2)[1])
    for alive in locks:
        os.close(alive)
    assert len(spool.abandoned()) == MAX_OPEN + 1
    spool.close()
    assert os.listdir(layout.tmp) == [] and spool.reserved_bytes == 0


def test_what_was_promised_is_used_once(layout: Layout) -> None:
    spool = Spool(layout)
    save, alive = begin(spool, 6)

    def capture(kind: str, *paths: str) -> int:
        source = save.next_source(kind)
        (save.folder / source).write_bytes(b"abc" * len(paths))
        save.add(source, [SavedFile(path, 3, False, source) for path in paths])
        return 3 * len(paths)

    for _ in range(3):
        with taking(save, [("a", 3, False), ("b", 3, False)]) as captured:
            captured.append(capture("packs", "a", "b"))
        assert save.room_left == spool.reserved_bytes == 0 and len(os.listdir(save.folder / "packs")) == 1
    with pytest.raises(InvalidRequest), taking(save, [("a", 3, False)]):
        pass
    with taking(save, [("a", 3, False), ("b", 3, False)]) as captured:
        captured.append(capture("files", "a"))
        with taking(save, [("a", 3, False)]):  # meanwhile, and it can't be captured
            pass
    assert save.room_left == spool.reserved_bytes == 6 and os.listdir(save.folder / "files") == []
    os.close(alive)
    spool.close()


def test_a_save_is_open_as_long_as_somebody_holds_its_lock(layout: Layout) -> None:
    spool = Spool(layout)
    save, alive = begin(spool, 100)
    holder = subprocess.Popen(["cat"], stdin=subprocess.PIPE, pass_fds=[alive])
    os.close(alive)
    assert spool.abandoned() == [] and spool.reserved_bytes == 100
    assert holder.stdin is not None
    holder.stdin.close()
    holder.wait()
    assert spool.abandoned() == [save]
    discard = spool.forget(save)
    assert spool.abandoned() == [] and spool.reserved_bytes == 0
    put(save, "late", b"a copy that was still going on")
    discard()
    discard()
    assert os.listdir(layout.tmp) == []


async def test_who_waits_for_a_change(layout: Layout) -> None:
    spool, entry = Spool(layout), make("one")
    waiting = [asyncio.create_task(spool.until(lambda: spool.has(entry))) for _ in range(3)]
    await asyncio.sleep(0)
    spool.add_kept(make("another"))
    await asyncio.sleep(0)
    assert not any(task.done() for task in waiting)
    spool.add_kept(entry)
    await asyncio.gather(*waiting)
    spool.forget_kept(entry)
    assert not spool.has(entry)


def edited(**more: Any) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        entry = json.loads((folder / "entry.json").read_text())
        (folder / "entry.json").write_text(json.dumps(entry | more))

    return edit


def file(**more: Any) -> dict[str, Any]:
    return {"files": [{"path": "a", "size": 3, "executable": False, "source": "files/1", "offset": 0} | more]}


def replace_by_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.touch()


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda folder: (folder / "entry.json").unlink(), id="no entry"),
        pytest.param(lambda folder: os.truncate(folder / "entry.json", 20), id="half an entry"),
        pytest.param(lambda folder: os.truncate(folder / "entry.json", 0), id="an empty entry"),
        pytest.param(lambda folder: (folder / "entry.json").write_bytes(b"\xff\x00"), id="no JSON"),
        pytest.param(lambda folder: (folder / "files/1").unlink(), id="no bytes"),
        pytest.param(lambda folder: os.truncate(folder / "files/1", 2), id="not all bytes"),
        pytest.param(edited(id="other"), id="another's entry"),
        pytest.param(edited(format=99), id="a newer format"),
        pytest.param(edited(reference={}), id="no key"),
        pytest.param(edited(**file(source="../../../etc/passwd")), id="bytes from elsewhere"),
        pytest.param(edited(**file(source="files/../../x/1")), id="bytes from another save"),
        pytest.param(edited(**file(size=-1)), id="a negative size"),
        pytest.param(edited(**file(path="../a")), id="a path that leads out"),
        pytest.param(edited(links=[["l", "../.."]]), id="a link that leads out"),
        pytest.param(replace_by_file, id="no folder"),
    ],
)
def test_what_cannot_be_read_is_set_aside(layout: Layout, spoil: Callable[[Path], object]) -> None:
    spool, entries = Spool(layout), []
    for _ in range(2):
        save, alive = begin(spool)
        put(save, "a", b"abc")
        spool.keep(save)
        os.close(alive)
        entries.append(save.entry)
    bad = layout.spool_entry(entries[0].id)
    (layout.corrupt / bad.name).mkdir()  # that name is taken
    spoil(bad)
    again = Spool(layout)
    again.recover()
    assert again.entries == entries[1:] and not bad.exists()
    (aside,) = [name for name in again.corrupt() if name != bad.name]
    assert aside.startswith(bad.name + "-")
    once_more = Spool(layout)
    once_more.recover()
    assert once_more.entries == entries[1:]


# ---- with the daemon


def test_another_uid_cannot_use_a_save(shared_tmp_path: Path) -> None:
    as_uid(UID)  # or skip
    with Daemon.start(shared_tmp_path / "root") as daemon, wired(daemon.socket) as wire, Client.of(daemon, uid=UID) as other:
        with wire.open("mine", 1) as saving:
            saving.pack({"a": b"a"})
            for method, params in (
                ("save_links", {"folders": ["x"]}),
                ("save_close", {}),
                ("save_close", {"drop": True}),
            ):
                refused = other.refused("wire", method=method, params={"save": saving.name, **params})
                assert refused.is_error("SaveUnknownError")
            assert saving.close()["files"] == 1
        with pytest.raises(SaveUnknownError):
            saving.close()


def test_what_is_corrupt_is_reported_and_the_rest_arrives(tmp_path: Path) -> None:
    with Daemon.start(tmp_path / "root", store=AWAY) as daemon:
        with wired(daemon.socket) as wire:
            for name in ("bad", "good"):
                wire.save(name, {"a.bin": os.urandom(MIB)})
        daemon.kill()
        bad = min((daemon.root / "spool").glob("2*"), key=lambda path: json.loads((path / "entry.json").read_text())["created"])
        (captured,) = (bad / "files").iterdir()
        os.truncate(captured, 5)
        daemon.restart()
        with wired(daemon.socket) as wire:
            assert wire.flush(0)["pending"] == [key_of("good")]
        status = daemon.status()["spool"]
        assert status["corrupt"] == [bad.name] and status["saves"] == 1
        assert os.path.getsize(daemon.root / "spool/corrupt" / bad.name / "files" / captured.name) == 5


def test_a_save_whose_bytes_were_changed_is_set_aside_and_not_sent(tmp_path: Path) -> None:
    """Root writes through a view, so into the spool's file too: nothing else than what was saved may arrive under its name."""
    (tmp_path / "store").touch()  # in the way: no folder can be made there
    with Daemon.start(tmp_path / "root", store=f"file://{tmp_path}/store") as daemon:
        with wired(daemon.socket) as wire:
            wire.save("changed", {"a.bin": b"x" * MIB, "b": b"small"})
            view = Path(wire.load("changed")["path"])
            with open(view / "a.bin", "r+b") as opened:
                opened.write(b"other")
        (tmp_path / "store").unlink()
        daemon.restart()
        with wired(daemon.socket) as wire, pytest.raises(StorageError, match="was damaged on this node"):
            wire.request("flush", keys=[key_of("changed")])
        status = daemon.status()["spool"]
        assert len(status["corrupt"]) == 1 and status["sent_saves"] == 0
        assert list((tmp_path / "store").glob("refs/**/*.json")) == []


# ---- kill -9 between any two steps


# One process, one thread: what the daemon does for one durable save, from the first folder to the end of the upload.
STEPS = """
import asyncio, hashlib, os, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from modelcached import blobs, capture, durable, spool
from modelcached.model import Digest, TreeId
from modelcached.root import open_root

class Now(ThreadPoolExecutor):
    def map(self, work, items):
        return [work(item) for item in items]

def say(word):
    os.write(1, word + b"\\n")

layout, lock = open_root(Path(sys.argv[1]), True)
source = os.open(sys.argv[2], os.O_RDONLY)
os.kill(os.getpid(), 0)  # strace looks for it: here the counting begins
spool.ThreadPoolExecutor = Now
keeper = spool.Spool(layout)
entry = spool.Entry("it", 0, 1.0, {"key": "k"}, "files", "file:///s", True, False, [], [("l", "a")], ["e"])
save, alive = keeper.begin(lambda name: entry, 10)
entry.id = save.folder.name.removeprefix("save-")
for name in "ab":
    place = save.next_source("files")
    assert capture.capture(source, name, 3, save.folder / place, lambda: None)
    entry.files.append(spool.SavedFile(name, 3, False, place))
keeper.keep(save)
say(b"saved")
shared = blobs.Blobs(layout, None, None)
for file in entry.files:
    shared._share(keeper.source(entry, file), Digest(hashlib.sha256(b"abc").hexdigest()))
keeper.set_tree(entry, TreeId("a" * 64))
say(b"hashed")
keeper.remove(entry)
say(b"sent")
"""
CHANGES = (
    "mkdir",
    "openat",
    "write",
    "copy_file_range",
    "ftruncate",
    "fchmod",
    "utimensat",
    "fsync",
    "link",
    "rename",
    "unlink",
    "unlinkat",
    "rmdir",
)


def trace(folder: Path, *inject: str) -> tuple[str, int, str]:
    """Runs the steps under strace: what they said, their exit code, and the calls that they made."""
    if shutil.which("strace") is None:
        pytest.skip("needs strace")
    root, source, log = folder / "root", folder / "source", folder / "strace"
    source.write_bytes(b"abc")
    command = [
        "strace",
        "-qq",
        "-o",
        str(log),
        "-e",
        f"trace=kill,{','.join(CHANGES)}",
        *inject,
        sys.executable,
        "-c",
        STEPS,
        str(root),
        str(source),
    ]
    ran = subprocess.run(command, stdout=subprocess.PIPE, env=clean_environment(PYTHONDONTWRITEBYTECODE="1"), timeout=60)
    return ran.stdout.decode(), ran.returncode, log.read_text()


def calls(log: str) -> list[str]:
    return re.findall(r"^(\w+)\(", log, re.MULTILINE)


def check_after_kill(folder: Path, said: str) -> None:
    layout, lock = open_root(folder / "root", private=True)
    try:
        assert os.listdir(layout.tmp) == []
        spool = Spool(layout)
        spool.recover()
        assert spool.corrupt() == []
        names = [*spool.entries]
        if "saved" in said and "sent" not in said and "hashed" not in said:
            assert len(names) == 1
        assert len(names) <= 1 and not ("sent" in said and names)
        for entry in names:
            assert [file.path for file in entry.files] == ["a", "b"] and entry.links == [("l", "a")] and entry.folders == ["e"]
            assert all(spool.source(entry, file).read_bytes() == b"abc" for file in entry.files)
            assert spool.tree(entry) in (None, "a" * 64) and ("hashed" not in said or spool.tree(entry))
        for digest in layout.blobs.glob("*/*"):
            assert hashlib.sha256(digest.read_bytes()).hexdigest() == digest.name and digest.stat().st_mode & 0o777 == 0o444
    finally:
        os.close(lock)


def kill_points(folder: Path) -> list[tuple[str, int]]:
    """Every call that changes something, as (its name, its number among those of that name)."""
    said, code, log = trace(folder)
    assert (said.split(), code) == (["saved", "hashed", "sent"], 0), log
    made = calls(log)
    start = made.index("kill")
    return [(name, made[: position + 1].count(name)) for position, name in enumerate(made) if position > start]


def kill_at(folder: Path, points: list[tuple[str, int]]) -> None:
    for name, number in points:
        here = folder / f"{name}-{number}"
        here.mkdir()
        said, code, log = trace(here, "-e", f"inject={name}:signal=SIGKILL:when={number}")
        assert code in (-signal.SIGKILL, 128 + signal.SIGKILL), (name, number, code, log[-500:])
        check_after_kill(here, said)
        shutil.rmtree(here)


@pytest.mark.timeout(120)
def test_killed_at_some_steps(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    points = kill_points(tmp_path / "whole")
    assert {name for name, _ in points} >= {"fsync", "link", "rename", "unlink", "copy_file_range"}
    renames = [point for point in points if point[0] in ("rename", "link")]
    kill_at(tmp_path, renames + random.sample([point for point in points if point not in renames], 5))


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_killed_at_every_step(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    points = kill_points(tmp_path / "whole")
    print(f"{len(points)} kill points: {points}")
    assert len(points) > 40
    kill_at(tmp_path, points)
