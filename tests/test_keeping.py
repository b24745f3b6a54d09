"""The verbs of what tasks keep: list, delete, flush, and whose saves and stores they are about."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from modelcache.errors import InUseError, InvalidRequestError, ModelcacheError, ReferenceNotFoundError, StoreNotAllowedError

from .clients import Client
from .conftest import as_uid
from .daemon import Daemon
from .saves import Wire, key_of, until, wired

UID = 1500
WAIT_SECONDS = 30.0


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    with Daemon.start(tmp_path / "root", store=f"file://{tmp_path}/store") as daemon:
        yield daemon


@pytest.fixture
def wire(daemon: Daemon) -> Iterator[Wire]:
    with wired(daemon.socket) as wire:
        yield wire


def names(wire: Wire, **more: object) -> list[str]:
    return [reference["key"].rpartition("/")[2] for reference in wire.references(**more)]


def checkpoint(wire: Wire, name: str, number: int) -> None:
    wire.save("x", {"n": b"%d" % number}, reference={"type": "checkpoint", "name": name, "key": f"mf.checkpoints/{name}/{number}"})


def test_references_newest_first(daemon: Daemon, wire: Wire) -> None:
    for number in range(3):
        checkpoint(wire, "run", number)
        checkpoint(wire, "other", number + 10)
    wire.save("model", {"a": b"a"}, reference={"label": "mine"})
    assert wire.flush(WAIT_SECONDS)["pending"] == []
    daemon.restart()
    with wired(daemon.socket) as again:
        model = key_of("model").rpartition("/")[2]
        assert names(again) == [model, "12", "2", "11", "1", "10", "0"]
        assert names(again, type="checkpoint", name="run") == ["2", "1", "0"]
        assert names(again, name="mine") == names(again, type="model") == [model]
        assert names(again, prefix="mf.checkpoints/other/") == ["12", "11", "10"]
        assert names(again, prefix="mf.checkpoints/run/", limit=1) == ["2"]
        assert names(again, limit=0) == names(again, prefix="nothing") == names(again, name="nobody") == []
        for more in ({"limit": -1}, {"prefix": "../"}, {"prefix": "/"}):
            with pytest.raises(InvalidRequestError):
                again.references(**more)


def test_what_is_shown_is_saved_without_a_copy(daemon: Daemon, wire: Wire, tmp_path: Path) -> None:
    tree = {"large": bytes(1 << 20), "small": b"small", "sub/again": b"small"}
    wire.save("first", tree)
    assert wire.flush(WAIT_SECONDS)["pending"] == []
    shown = wire.load("first")["tree"]
    before = sum(path.stat().st_size for path in (tmp_path / "store/blobs").rglob("*") if path.is_file())
    kept = wire.request("save_tree", reference={"key": key_of("second"), "type": "model"}, tree=shown)["reference"]
    assert (kept["size"], kept["files"], kept["storage_format"]) == (sum(map(len, tree.values())), len(tree), "files")
    assert wire.flush(WAIT_SECONDS)["pending"] == []
    assert wire.load("second")["tree"] == shown
    assert sum(path.stat().st_size for path in (tmp_path / "store/blobs").rglob("*") if path.is_file()) == before
    assert names(wire, last=key_of("second").rpartition("_")[2]) == [key_of("second").rpartition("/")[2]]
    for odd in ("0" * 64, "../views", ""):
        with pytest.raises(ModelcacheError):
            wire.request("save_tree", reference={"key": key_of("third"), "type": "model"}, tree=odd)
    assert daemon.status()["spool"]["saves"] == 0


def test_who_was_not_shown_a_tree_can_not_save_it(shared_tmp_path: Path) -> None:
    with Daemon.start(shared_tmp_path / "root", store=f"file://{shared_tmp_path}/store", uid=UID) as daemon:
        with wired(daemon.socket) as wire:
            wire.save("mine", {"a": b"a"})
            shown = wire.load("mine")["tree"]
        code = (
            "import sys; from modelcache.client import Client\n"
            "from modelcache.protocol import SaveTree\n"
            f"Client(sys.argv[1]).call('save_tree', SaveTree({{'key': {key_of('x')!r}, 'type': 'model'}}, sys.argv[2]))"
        )
        command = [*as_uid(UID + 1), sys.executable, "-c", code, daemon.socket, shown]
        ran = subprocess.run(command, env=daemon.environment, capture_output=True, text=True, timeout=WAIT_SECONDS)
        assert "NotPermittedError" in ran.stderr, ran.stderr


def test_times_without_an_offset_are_local(daemon: Daemon, wire: Wire, tmp_path: Path) -> None:
    """As metaflow-checkpoint writes them. Text would sort them by their digits."""
    for name in ("first", "second", "third", "odd"):
        wire.save(name, {"a": b"a"})
    assert wire.flush(WAIT_SECONDS)["pending"] == []
    noon = datetime(2025, 6, 1, 12, tzinfo=timezone(timedelta(hours=-11)))  # the local day is another one
    times = {"first": noon.isoformat(), "third": (noon + timedelta(minutes=2)).isoformat(), "odd": None}
    times["second"] = (noon + timedelta(minutes=1)).astimezone().replace(tzinfo=None).isoformat()
    for name, created_on in times.items():
        path = tmp_path / "store/refs" / f"{key_of(name)}.json"
        kept = json.loads(path.read_text())
        path.write_text(json.dumps({**kept, "reference": {**kept["reference"], "created_on": created_on}}))
    assert names(wire) == [key_of(name).rpartition("/")[2] for name in ("third", "second", "first", "odd")]


def test_what_is_pending_is_its_owners(shared_tmp_path: Path) -> None:
    as_uid(UID)  # or skip
    (shared_tmp_path / "store").touch()  # in the way
    with Daemon.start(shared_tmp_path / "root", store=f"file://{shared_tmp_path}/store") as daemon:
        with wired(daemon.socket) as wire, Client.of(daemon, uid=UID) as other:
            wire.save("root", {"a": b"a"})
            (shared_tmp_path / "out").mkdir(mode=0o755)
            other.begin("save", path=str(shared_tmp_path / "out"))
            key = other.good().value["key"]
            assert wire.flush(0)["pending"] == [key_of("root")]
            other.begin("wire", method="flush", params={"deadline_seconds": 0, "keys": [key_of("root"), key, "nothing"]})
            assert other.good().value["pending"] == [key]
            assert key_of("root") not in other.refused("flush", deadline=0).message

            def last_error() -> tuple[str, str]:
                """As root sees it, and as the other one does."""
                other.begin("wire", method="status", params={})
                return daemon.status()["spool"]["last_error"], other.good().value["spool"]["last_error"]

            until(lambda: key_of("root") in last_error()[0])  # the oldest save is tried again and again, and its store is away
            assert key_of("root") not in last_error()[1]
            with pytest.raises(InUseError, match="on its way"):
                wire.request("delete", key=key)
            (shared_tmp_path / "store").unlink()
            other.begin("flush", deadline=WAIT_SECONDS)
            other.good(WAIT_SECONDS)
            assert wire.flush(WAIT_SECONDS)["pending"] == []
            assert {reference["key"] for reference in wire.references()} == {key, key_of("root")}


def test_pending_ones_are_listed_as_such(daemon: Daemon, wire: Wire, tmp_path: Path) -> None:
    refs = tmp_path / "store/refs"
    blocked = refs / f"{key_of('pending')}.json"
    blocked.mkdir(parents=True)  # its place is taken: the store can be listed, and this one save can't go
    wire.save("pending", {"a": b"a"})
    wire.save("done", {"a": b"a"})
    assert wire.request("flush", keys=[key_of("done")], deadline_seconds=WAIT_SECONDS)["pending"] == []
    listed = wire.request("references")
    assert [reference["key"] for reference in listed["references"]] == [key_of("done"), key_of("pending")]
    assert listed["pending"] == [key_of("pending")]
    assert wire.request("references", limit=1)["pending"] == []
    blocked.rmdir()
    assert wire.flush(WAIT_SECONDS)["pending"] == []
    assert wire.request("references")["pending"] == []


def test_delete(daemon: Daemon, wire: Wire, tmp_path: Path) -> None:
    for name in ("one", "two"):
        wire.save(name, {"same": b"bytes"})
    wire.flush(WAIT_SECONDS)
    blobs = sorted(os.listdir(tmp_path / "store/blobs/sha256"))
    wire.request("delete", key=key_of("one"))
    assert [reference["key"] for reference in wire.references()] == [key_of("two")]
    assert sorted(os.listdir(tmp_path / "store/blobs/sha256")) == blobs and wire.load("two")["files"] == 1
    with pytest.raises(ReferenceNotFoundError):
        wire.request("delete", key=key_of("one"))
    with pytest.raises(InvalidRequestError):
        wire.request("delete", key="../../etc/passwd")


def test_flush_tells_how_it_gets_on(daemon: Daemon, wire: Wire, tmp_path: Path) -> None:
    assert wire.flush() == {"pending": [], "error": ""}
    assert wire.request("flush", keys=["nothing"]) == {"pending": [], "error": ""}
    blocked = tmp_path / "store/refs" / f"{key_of('stuck')}.json"
    blocked.mkdir(parents=True)
    wire.save("stuck", {"a": b"123"})
    wire.save("fine", {"a": b"12345"})
    seen = []
    call = wire.start("flush")
    wire.forget(call)

    def on_progress(progress: object) -> None:
        seen.append(progress)
        if getattr(progress, "done_files", 0) == 1 and getattr(progress, "message", "") and blocked.is_dir():
            blocked.rmdir()

    assert call.wait(on_progress).result == {"pending": [], "error": ""}
    stuck = next(progress for progress in seen if progress.message)  # type: ignore[attr-defined]
    assert (stuck.phase, stuck.source, stuck.total_files, stuck.total_bytes) == ("upload", "store", 2, 8)  # type: ignore[attr-defined]
    assert key_of("stuck") in stuck.message  # type: ignore[attr-defined]


def test_who_leaves_a_flush(daemon: Daemon, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store/refs").touch()
    with wired(daemon.socket) as wire:
        wire.save("stuck", {"a": b"a"})
        wire.start("flush")
    with wired(daemon.socket) as wire:
        assert wire.flush(0.01)["pending"] == [key_of("stuck")]
        assert wire.flush(-1)["pending"] == [key_of("stuck")]
        (tmp_path / "store/refs").unlink()
        assert wire.flush(WAIT_SECONDS)["pending"] == []


def test_stores_of_a_daemon(tmp_path: Path) -> None:
    first, second = f"file://{tmp_path}/first", f"file://{tmp_path}/se%20cond"
    with Daemon.start(tmp_path / "root", store=first, stores=second) as daemon, wired(daemon.socket) as wire:
        reference = wire.save("x", {"a": b"a"}, store=f"file://{tmp_path}/se cond/")
        assert reference["store"] == second and wire.flush(WAIT_SECONDS)["pending"] == []
        assert (tmp_path / "se cond/refs").is_dir() and not (tmp_path / "first/refs").exists()
        assert wire.load("x", store=second)["reference"] == reference
        with pytest.raises(ReferenceNotFoundError):
            wire.load("x")
        assert [each["key"] for each in wire.references(store=second)] == [key_of("x")] and wire.references() == []
        for method in ("references", "load", "delete"):
            more: dict[str, Any] = {} if method == "references" else {"key": "k"}
            with pytest.raises(StoreNotAllowedError) as caught:
                wire.request(method, store=f"file://{tmp_path}/third", **more)
            assert f"{tmp_path}/third" in str(caught.value) and first in str(caught.value) and second in str(caught.value)
        with pytest.raises(ReferenceNotFoundError):
            wire.request("delete", key=key_of("x"))
        wire.request("delete", key=key_of("x"), store=second)


class Private(Daemon):
    program = ("-c", "import sys; from modelcached.command import main; sys.exit(main([*sys.argv[1:], '--private']))")


def test_a_private_daemon_serves_any_store_of_its_user(tmp_path: Path) -> None:
    with Private.start(tmp_path / "my root") as daemon, wired(daemon.socket) as wire:
        assert wire.save("own", {"a": b"a"})["store"] == f"file://{tmp_path}/my%20root/store"
        wire.save("other", {"a": b"a"}, store=f"file://{tmp_path}/elsewhere")
        assert wire.flush(WAIT_SECONDS)["pending"] == []
        assert wire.load("other", store=f"file://{tmp_path}/elsewhere")["files"] == 1
        for name in ("own", "other"):
            with pytest.raises(ModelcacheError):
                wire.load(name, store="gs://bucket/x")
