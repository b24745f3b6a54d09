"""Upload: what was acknowledged arrives, whole and once, however often the daemon is killed and the store is away."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .daemon import Daemon
from .hub import Random
from .proxy import Proxy
from .saves import MIB, Tree, contents, hashes, in_bucket, in_folder, key_of, until, wired
from .seaweed import SeaweedFS

WAIT_SECONDS = 60.0


@pytest.fixture
def proxy(seaweed: SeaweedFS, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """Between the daemons of the test and the S3 server. One try of botocore's own: a store that is away is noticed at once."""
    with Proxy(seaweed.address) as proxy:
        for name, value in seaweed.environment(endpoint=proxy.endpoint).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        yield proxy


def store_of(tmp_path: Path) -> str:
    return f"file://{tmp_path}/store"


def arrived(tmp_path: Path) -> dict[str, dict[str, str]]:
    return contents(*in_folder(tmp_path / "store"))


TREE: Tree = {"config.json": b"{}", "a.bin": Random("a", MIB), "b.bin": Random("b", 2 * MIB), "sub/small": b"small", "zero": b""}


def test_a_store_that_failed_once_is_tried_until_it_has_all(tmp_path: Path) -> None:
    """Whatever has deadlines (here the rate, for the pack) goes on working after one of several uploads at once failed."""
    tree: Tree = {"large.bin": Random("large", MIB), **{f"small-{n}": Random(f"small-{n}", 200_000) for n in range(4)}}
    blobs = tmp_path / "store/blobs"
    blobs.parent.mkdir()
    blobs.write_bytes(b"a file where a folder belongs")
    with Daemon.start(tmp_path / "root", store=store_of(tmp_path), store_rate="4MB") as daemon, wired(daemon.socket) as wire:
        wire.save("x", tree)
        until(lambda: daemon.status()["spool"]["last_error"])
        blobs.unlink()
        assert wire.flush() == {"pending": [], "error": ""}
        assert arrived(tmp_path) == {key_of("x"): hashes(tree)}


# ---- what arrives, and in which order


@pytest.mark.parametrize("storage_format", ["files", "tar"])
def test_what_lies_in_the_store(tmp_path: Path, storage_format: str) -> None:
    with Daemon.start(tmp_path / "root", store=store_of(tmp_path)) as daemon, wired(daemon.socket) as wire:
        reference = wire.save("x", TREE, storage_format=storage_format)
        assert wire.flush() == {"pending": [], "error": ""}
        assert arrived(tmp_path) == {key_of("x"): hashes(TREE)}
        keys, read = in_folder(tmp_path / "store")
        ours = sorted(key for key in keys if not key.startswith(".modelcached/"))
        assert [key.split("/")[0] for key in ours] == ["blobs"] * (3 if storage_format == "files" else 1) + ["refs", "trees"]
        assert reference["url"] == f"{store_of(tmp_path)}/refs/{key_of('x')}.json" and Path(reference["url"][7:]).is_file()
        assert json.loads(read(f"refs/{key_of('x')}.json"))["reference"] == reference
        if storage_format == "files":
            digest = hashes(TREE)["a.bin"]
            assert read(f"blobs/sha256/{digest[:2]}/{digest}") == bytes(TREE["a.bin"])
            assert reference["size"] == sum(len(bytes(content)) for content in TREE.values())
        else:  # said before the tar was made
            assert reference["size"] == len(read(ours[0]))
        assert os.listdir(daemon.root / "spool") == ["corrupt"]
        daemon.check_no_temp_files()
        status = daemon.status()["spool"]
        assert (status["saves"], status["sent_saves"], status["last_error"]) == (0, 1, "")


def test_a_daemon_that_ends_when_idle_brings_everything_to_the_store_first(tmp_path: Path) -> None:
    (tmp_path / "store").write_bytes(b"a file where the store should be")
    with Daemon.start(tmp_path / "root", store=store_of(tmp_path), idle_exit=1) as daemon:
        with wired(daemon.socket) as wire:
            wire.save("x", TREE)
        until(lambda: "failures=3" in daemon.log)  # the pauses alone are longer than it may be idle
        assert daemon.is_running
        (tmp_path / "store").unlink()
        until(lambda: not daemon.is_running)
        assert arrived(tmp_path) == {key_of("x"): hashes(TREE)}


class Traced(Daemon):
    """Writes down what it renames and links."""

    def _launch(self) -> None:
        if shutil.which("strace") is None:
            pytest.skip("needs strace")
        calls = "rename,link,linkat,renameat,renameat2"
        log = self.root.with_name("strace")
        self.wrapper = ("strace", "-D", "-f", "--seccomp-bpf", "-qq", "-s", "4096", "-o", str(log), "-e", f"trace={calls}")
        super()._launch()


def test_blobs_then_tree_then_reference(tmp_path: Path) -> None:
    with Traced.start(tmp_path / "root", store=store_of(tmp_path)) as daemon, wired(daemon.socket) as wire:
        wire.save("x", TREE)
        wire.flush()
    # A call that another thread's interrupts is written as two lines; where it begins it names its paths.
    targets = re.findall(r', "([^"]+)"(?:, \w+)?(?:\) += 0| <unfinished)', (tmp_path / "strace").read_text())
    steps = [path.removeprefix(f"{tmp_path}/").split("/")[:2] for path in targets]
    order = [
        step[1] if step[0] == "store" else "taken out of the spool"
        for path, step in zip(targets, steps, strict=True)
        if (step[0] == "store" and step[1] != ".modelcached" and not path.endswith(".pending")) or "/root/tmp/sent-" in path
    ]
    assert order == ["blobs"] * 3 + ["trees", "refs", "taken out of the spool"]


def test_only_what_the_store_lacks_is_sent(tmp_path: Path, seaweed: SeaweedFS, proxy: Proxy) -> None:
    url = seaweed.bucket()
    large: Tree = {"large.bin": Random("large", 8 * MIB), "step": b"1"}
    with Daemon.start(tmp_path / "root", store=url) as daemon, wired(daemon.socket) as wire:
        wire.save("one", large)
        assert wire.flush()["pending"] == []
        before = proxy.sent
        wire.save("two", {**large, "step": b"2"})
        wire.save("three", {**large, "renamed.bin": large["large.bin"]})
        assert wire.flush()["pending"] == [] and proxy.sent - before < MIB
        assert daemon.status()["spool"]["sent_bytes"] < 9 * MIB
    found = contents(*in_bucket(seaweed, url))
    assert found[key_of("two")] == hashes({**large, "step": b"2"}) and len(found) == 3


def test_what_a_collection_could_take_is_put_again(tmp_path: Path) -> None:
    """Blobs that are older than half the grace, by the store's own clock."""
    old: Tree = {"old.bin": Random("old", MIB), "old": b"small"}
    with Daemon.start(tmp_path / "root", store=store_of(tmp_path), store_grace="1h") as daemon, wired(daemon.socket) as wire:
        wire.save("one", old)
        wire.flush()
        blobs = {path: path.stat().st_mtime for path in (tmp_path / "store/blobs").rglob("*") if path.is_file()}
        young, aged = sorted(blobs)
        os.utime(aged, (0, time.time() - 1900))
        os.utime(young, (0, time.time() - 1700))
        untouched = young.stat().st_mtime
        wire.save("two", old)
        assert wire.flush()["pending"] == []
        assert aged.stat().st_mtime > time.time() - 600 and young.stat().st_mtime == untouched
    assert arrived(tmp_path) == {key_of("one"): hashes(old), key_of("two"): hashes(old)}


def uploaded(daemon: Daemon) -> list[str]:
    """The keys, in the order in which they arrived."""
    return re.findall(r"event=uploaded .*?key=(\S+)", daemon.log)


def checkpoint(name: str, number: int) -> dict[str, Any]:
    return {"reference": {"type": "checkpoint", "name": name, "key": f"mf.checkpoints/{name}.{number}", "pathspec": "f/1/s/1"}}


def test_the_newest_of_a_series_goes_first(tmp_path: Path) -> None:
    (tmp_path / "store").touch()  # in the way
    with Daemon.start(tmp_path / "root", store=store_of(tmp_path)) as daemon:
        with wired(daemon.socket) as wire:
            wire.save("first", {"a": b"1"})
            for number in range(3):
                wire.save("x", {"a": b"%d" % number}, supersede=True, **checkpoint("run", number))
                wire.save("x", {"a": b"%d" % number}, supersede=True, **checkpoint("other", number))
            wire.save("x", {"a": b"9"}, **checkpoint("run", 9))  # newer, and not asked for
            wire.save("last", {"a": b"1"})
        (tmp_path / "store").unlink()
        daemon.restart()
        with wired(daemon.socket) as wire:
            assert wire.flush()["pending"] == []
        order = [key.removeprefix("mf.checkpoints/") for key in uploaded(daemon)]
    runs = ["run.2", "run.1", "run.0"]
    assert [name for name in order if name in runs] == runs
    assert [name for name in order if name.startswith("other")] == ["other.2", "other.1", "other.0"]
    assert order[0] == key_of("first") and order[1] == "run.2" and order[-2:] == ["run.9", key_of("last")]
    assert len(arrived(tmp_path)) == 9  # the order alone changes: nothing is left out


# ---- a store that is away


def test_the_store_is_away_for_a_while(tmp_path: Path, seaweed: SeaweedFS, proxy: Proxy) -> None:
    url, saved = seaweed.bucket(), dict[str, Tree]()
    with Daemon.start(tmp_path / "root", store=url) as daemon, wired(daemon.socket) as wire:
        proxy.refuse()
        for number in range(4):
            tree: Tree = {"a.bin": Random(f"away {number}", MIB + number), "n": b"%d" % number}
            wire.save(f"away-{number}", tree)
            saved[key_of(f"away-{number}")] = tree
            assert wire.load(f"away-{number}")["store_bytes"] == 0
        until(lambda: daemon.status()["spool"]["last_error"] != "")
        flushed = wire.flush(0.05)
        assert flushed["pending"] == list(saved) and "be reached" in flushed["error"] and key_of("away-0") in flushed["error"]
        status = daemon.status()["spool"]
        assert status["saves"] == 4 and status["size_bytes"] == 4 * MIB + 6 + 4 and status["sent_saves"] == 0
        assert 0 < status["oldest_seconds"] < 300 and proxy.endpoint in status["last_error"]
        proxy.listen()
        assert wire.flush(WAIT_SECONDS) == {"pending": [], "error": ""}
        assert uploaded(daemon) == list(saved)  # in their order: it was not their fault
        assert daemon.status()["spool"]["last_error"] == ""
    assert contents(*in_bucket(seaweed, url)) == {key: hashes(tree) for key, tree in saved.items()}


@pytest.mark.slow
@pytest.mark.timeout(90)
def test_connections_that_break_off(tmp_path: Path, seaweed: SeaweedFS, proxy: Proxy) -> None:
    url = seaweed.bucket()
    tree: Tree = {"large.bin": Random("cut", 20 * MIB), "small": b"x"}
    proxy.cut(3 * MIB, "server", times=2)
    proxy.cut(700, "client", times=2)
    with Daemon.start(tmp_path / "root", store=url) as daemon, wired(daemon.socket) as wire:
        wire.save("x", tree)
        assert wire.flush(WAIT_SECONDS)["pending"] == []
    assert contents(*in_bucket(seaweed, url)) == {key_of("x"): hashes(tree)}


def test_one_store_away_holds_up_no_other(tmp_path: Path) -> None:
    (tmp_path / "away").touch()
    away = f"file://{tmp_path}/away"
    with Daemon.start(tmp_path / "root", store=store_of(tmp_path), stores=away) as daemon, wired(daemon.socket) as wire:
        wire.save("away", {"a": b"1"}, store=away)
        until(lambda: daemon.status()["spool"]["last_error"] != "")
        for number in range(5):
            wire.save(f"here-{number}", {"a": b"1"})
        assert wire.request("flush", keys=[key_of(f"here-{number}") for number in range(5)], deadline_seconds=WAIT_SECONDS)["pending"] == []
        assert wire.flush(0)["pending"] == [key_of("away")]
        assert len(uploaded(daemon)) == 5
        (tmp_path / "away").unlink()
        assert wire.flush(WAIT_SECONDS)["pending"] == []
    assert contents(*in_folder(tmp_path / "away")) == {key_of("away"): hashes({"a": b"1"})}


def test_one_save_that_cannot_go_holds_up_no_other(tmp_path: Path) -> None:
    """Its reference's place is taken by a folder: a trouble of its own."""
    blocked = tmp_path / "store" / "refs" / f"{key_of('blocked')}.json"
    blocked.mkdir(parents=True)
    with Daemon.start(tmp_path / "root", store=store_of(tmp_path)) as daemon, wired(daemon.socket) as wire:
        for name in ("blocked", "one", "two"):
            wire.save(name, {"a": name.encode()})
        until(lambda: len(uploaded(daemon)) == 2)
        assert wire.flush(0)["pending"] == [key_of("blocked")]
        assert "folder" in wire.flush(0)["error"]
        blocked.rmdir()
        assert wire.flush(WAIT_SECONDS) == {"pending": [], "error": ""}
    assert len(arrived(tmp_path)) == 3


def test_others_are_told_what_is_on_its_way(tmp_path: Path, seaweed: SeaweedFS, proxy: Proxy) -> None:
    url = seaweed.bucket()
    with Daemon.start(tmp_path / "root", store=url) as daemon, wired(daemon.socket) as wire:
        proxy.delay(0.02)  # a piece: 64 KiB
        wire.save("first", {"large.bin": Random("slow", 12 * MIB)})
        wire.save("second", {"a": b"22"})
        at = f"refs/{key_of('second')}"
        until(lambda: f"{at}.pending" in in_bucket(seaweed, url)[0])
        keys, read = in_bucket(seaweed, url)
        told = json.loads(read(f"{at}.pending"))
        assert told["key"] == key_of("second") and told["size"] == 2 and told["node"] == os.uname().nodename
        assert f"{at}.json" not in keys
        proxy.heal()
        assert wire.flush(WAIT_SECONDS)["pending"] == []
    assert not any(key.endswith(".pending") for key in in_bucket(seaweed, url)[0])


def test_what_is_set_aside_is_no_longer_said_to_be_on_its_way(tmp_path: Path) -> None:
    in_the_way, pending = tmp_path / "store" / "trees", tmp_path / "store" / "refs" / f"{key_of('x')}.pending"
    in_the_way.parent.mkdir()
    in_the_way.touch()
    # The scrub would mend what is damaged here, from what of it is in the store already.
    with Daemon.start(tmp_path / "root", store=store_of(tmp_path), scrub_rate="0") as daemon, wired(daemon.socket) as wire:
        wire.save("x", {"a.bin": b"x" * MIB})
        until(lambda: pending.exists() and bool(daemon.status()["spool"]["last_error"]))
        (captured,) = (daemon.root / "spool").glob("*/files/*")
        captured.chmod(0o644)
        with open(captured, "r+b") as opened:
            opened.write(b"other")
        until(lambda: len(daemon.status()["spool"]["corrupt"]) == 1)
        assert not pending.exists()


# ---- what the saves share with others on this node


def test_what_went_with_something_else_is_made_again(tmp_path: Path) -> None:
    """A small blob, or the tree, can be taken away with a repo that had it too: what lies in the spool is the save."""
    (tmp_path / "store").touch()
    with Daemon.start(tmp_path / "root", store=store_of(tmp_path)) as daemon:
        with wired(daemon.socket) as wire:
            for name in ("small", "large", "tree"):
                wire.save(name, {"n": name.encode(), "large.bin": Random(name, MIB)})
                view = Path(wire.load(name)["path"])
                shutil.rmtree(view)
                gone = {"small": "n", "large": "large.bin"}.get(name)
                if gone is None:
                    (daemon.root / "trees" / f"{view.name}.json").unlink()
                else:
                    digest = hashes({"n": name.encode(), "large.bin": Random(name, MIB)})[gone]
                    (daemon.root / "blobs/sha256" / digest[:2] / digest).unlink()
        (tmp_path / "store").unlink()
        daemon.restart()
        with wired(daemon.socket) as wire:
            assert wire.flush(WAIT_SECONDS)["pending"] == []
        assert daemon.status()["spool"]["corrupt"] == []
    assert arrived(tmp_path) == {
        key_of(name): hashes({"n": name.encode(), "large.bin": Random(name, MIB)}) for name in ("small", "large", "tree")
    }


def test_a_disk_that_changes_small_files(tmp_path: Path) -> None:
    """Nothing tells but their digest: they are made again from what the client sent."""
    (tmp_path / "store").touch()
    tree: Tree = {"a": b"small", "b": b"other"}
    with Daemon.start(tmp_path / "root", store=store_of(tmp_path)) as daemon:
        with wired(daemon.socket) as wire:
            wire.save("x", tree)
            wire.load("x")
        digest = hashes(tree)["a"]
        blob = daemon.root / "blobs/sha256" / digest[:2] / digest
        found = blob.stat()
        blob.write_bytes(b"SMALL")
        os.utime(blob, ns=(found.st_atime_ns, found.st_mtime_ns))
        (tmp_path / "store").unlink()
        daemon.restart()
        with wired(daemon.socket) as wire:
            assert wire.flush(WAIT_SECONDS)["pending"] == []
        assert os.listdir(daemon.root / "quarantine") == [digest]
    assert arrived(tmp_path) == {key_of("x"): hashes(tree)}


# ---- the end of a daemon


@pytest.mark.timeout(60)
def test_told_to_end_in_the_middle(tmp_path: Path) -> None:
    """It waits neither for the hashing nor for the upload, leaves nothing half-made, and the next one goes on."""
    saved = dict[str, Tree]()
    with Daemon.start(tmp_path / "root", store=store_of(tmp_path)) as daemon:
        for number in range(4):
            with wired(daemon.socket) as wire:
                tree: Tree = {"a.bin": Random(f"end {number}", 30 * MIB), **{f"{n}": b"%d" % n for n in range(200)}}
                wire.save(f"end-{number}", tree, storage_format="tar" if number % 2 else "files")
                saved[key_of(f"end-{number}")] = tree
                open_save = wire.open("open", 10)
                daemon.terminate()
                open_save.let_go()
            daemon.restart()
        with wired(daemon.socket) as wire:
            assert wire.flush(WAIT_SECONDS)["pending"] == []
    assert arrived(tmp_path) == {key: hashes(tree) for key, tree in saved.items()}


# ---- kills


@pytest.mark.timeout(60)
def test_a_large_upload_goes_on_where_it_was(tmp_path: Path, seaweed: SeaweedFS, proxy: Proxy) -> None:
    """The same multipart upload is gone on with after a kill: none is left in the bucket that nobody will complete."""
    url, tree = seaweed.bucket(), {"large.bin": Random("resumed", 40 * MIB)}

    def uploads() -> list[str]:
        found = seaweed.client().list_multipart_uploads(Bucket=url.removeprefix("s3://")).get("Uploads", ())
        return [upload["UploadId"] for upload in found]

    with Daemon.start(tmp_path / "root", store=url) as daemon:
        with wired(daemon.socket) as wire:
            proxy.delay(0.004)
            wire.save("x", tree)
            proxy.wait(lambda proxy: proxy.sent > 16 * MIB, WAIT_SECONDS)
        daemon.kill()
        assert len(uploads()) == 1
        proxy.heal()
        daemon.restart()
        with wired(daemon.socket) as wire:
            assert wire.flush(WAIT_SECONDS)["pending"] == []
        assert uploads() == []
    assert contents(*in_bucket(seaweed, url)) == {key_of("x"): hashes(tree)}
