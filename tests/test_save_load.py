"""Save and load, the SDK with a real daemon and a store in a folder: what comes back is what was there, on every node."""

from __future__ import annotations

import logging
import math
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import pytest

import modelcache
from modelcache import flushing
from modelcache.client import shared
from modelcache.errors import ReferenceNotFoundError, SavesPendingError, StoreNotAllowedError

from .daemon import Daemon
from .test_sdk_connection import run
from .test_sdk_probe import holder
from .test_sdk_references import entries
from .test_sdk_save import LARGE, REWRITER, fill

WAIT_SECONDS = 15.0
Start = Callable[..., Daemon]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Starts a node: a daemon of its own root, on the one store of the test. The process talks to the last one started."""
    nodes: list[Daemon] = []

    def start(name: str = "node", **config: Any) -> Daemon:
        node = Daemon.start(tmp_path / name, store=f"file://{tmp_path}/store", **config)
        nodes.append(node)
        monkeypatch.setenv("MODELCACHE_SOCKET", node.socket)
        return node

    yield start
    flushing._saved.clear()  # of daemons that are no more
    shared().close()
    shared().leases.close()
    for node in nodes:
        node.close(is_orderly=True)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder with one of everything."""
    files = {f"many/{number % 7}/{number}": os.urandom(number) for number in range(300)}
    files |= {"large": os.urandom(3 * LARGE + 1), "twice": b"x" * LARGE, "sub/twice": b"x" * LARGE, "zero": b"", "ünï\nçode": b"name"}
    fill(tmp_path / "out", files | {"run.sh": b"#!", "bin/large": b"y" * LARGE})
    for executable in ("run.sh", "bin/large"):
        (tmp_path / "out" / executable).chmod(0o700)
    (tmp_path / "out/large").chmod(0o600)
    (tmp_path / "out/empty/inner").mkdir(parents=True)
    (tmp_path / "out/sub/link").symlink_to("../many/1")
    (tmp_path / "out/dangling").symlink_to("not/there")
    return tmp_path / "out"


@pytest.mark.parametrize("storage_format", ["files", "tar"])
def test_what_was_saved_comes_back_on_every_node(start: Start, source: Path, tmp_path: Path, storage_format: str) -> None:
    start("one")
    reference = modelcache.save(source, metadata={"loss": math.nan, "step": 7}, storage_format=storage_format)
    here = modelcache.load(reference)
    assert entries(Path(here)) == entries(source)
    assert modelcache.load(reference["key"], tmp_path / "mine") == str(tmp_path / "mine")
    assert entries(tmp_path / "mine") == entries(source)
    modelcache.flush(WAIT_SECONDS)
    start("two")
    for given in (reference, reference["key"], reference["url"]):
        assert entries(Path(modelcache.load(given))) == entries(source)
    (listed,) = modelcache.list()
    assert repr(listed["metadata"]) == "{'loss': nan, 'step': 7}"
    assert {**listed, "metadata": 0} == {**reference, "metadata": 0}


LABELS = ["a.b", "50% #1?é&c", "%2F", ".", "refs", "x.json", "v 1"]


def test_any_label_is_loaded_by_its_url(start: Start, tmp_path: Path) -> None:
    (tmp_path / "a%20b c/refs").mkdir(parents=True)
    store = f"file://{quote(str(tmp_path))}/a%2520b%20c/refs"
    saved = {}
    start("one", stores=[store])
    for label in LABELS:
        fill(tmp_path / "out", {"which": label.encode()})
        model = modelcache.save(tmp_path / "out", label, store=store)
        saved[label] = [model, modelcache.save(tmp_path / "out", kind="checkpoint", name=label)]
    modelcache.flush(WAIT_SECONDS)
    start("two", stores=[store])
    for label, references in saved.items():
        for reference in references:
            assert Path(unquote(reference["store"][7:]) + reference["url"][len(reference["store"]) :]).is_file()
            assert (Path(modelcache.load(reference["url"])) / "which").read_text() == label
        assert modelcache.latest(label) == references[1]


def test_one_file_and_an_empty_folder(start: Start, tmp_path: Path) -> None:
    start()
    fill(tmp_path, {"model.h5": b"content"})
    (tmp_path / "empty").mkdir()
    assert entries(Path(modelcache.load(modelcache.save(tmp_path / "model.h5")))) == [("model.h5", (b"content", False))]
    assert entries(Path(modelcache.load(modelcache.save(tmp_path / "empty")))) == []


def test_many_links(start: Start, tmp_path: Path) -> None:
    start()
    for number in range(400):
        (tmp_path / "out" / f"{number}-{'l' * 200}").mkdir(parents=True)
        (tmp_path / "out" / f"{number}").symlink_to(f"{number}-{'l' * 200}")
    assert entries(Path(modelcache.load(modelcache.save(tmp_path / "out")))) == entries(tmp_path / "out")


def test_checkpoints_by_name(start: Start, tmp_path: Path) -> None:
    start("one")
    fill(tmp_path, {"out/step": b"1"})
    first = modelcache.save(tmp_path / "out", kind="checkpoint", name="run.7", supersede=True)
    fill(tmp_path, {"out/step": b"2"})
    second = modelcache.save(tmp_path / "out", kind="checkpoint", name="run.7", durable=True)
    assert modelcache.latest("run.7") == second and modelcache.latest("run") is None
    modelcache.flush(WAIT_SECONDS)
    start("two")
    assert [each["key"] for each in modelcache.list("checkpoint", "run.7")] == [second["key"], first["key"]]
    latest = modelcache.latest("run.7")
    assert latest is not None and (Path(modelcache.load(latest)) / "step").read_bytes() == b"2"
    modelcache.delete(second)
    with pytest.raises(ReferenceNotFoundError):
        modelcache.delete(second)
    assert modelcache.latest("run.7") == first


def test_a_store_that_is_not_allowed(start: Start, source: Path) -> None:
    node = start()
    with pytest.raises(StoreNotAllowedError) as caught:
        modelcache.save(source, store="s3://other/place")
    assert "s3://other/place" in caught.value.message and str(node.root) in caught.value.message
    assert modelcache.list() == []


def test_a_daemon_that_is_killed_while_it_takes_a_save(start: Start, source: Path) -> None:
    """The save waits for a writer of one file, so everything else is handed over; its next life gets all of it."""
    node = start()
    said = threading.Event()

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.set()

    handler = Handler()
    logging.getLogger("modelcache").addHandler(handler)
    try:
        with holder(source / "zero", "append"):
            save = run(lambda: modelcache.save(source))
            assert said.wait(WAIT_SECONDS)
            node.kill()
            node.restart()
        reference = save()
    finally:
        logging.getLogger("modelcache").removeHandler(handler)
    assert entries(Path(modelcache.load(reference))) == entries(source)


def test_a_saver_that_is_killed_leaves_nothing(start: Start, source: Path) -> None:
    node = start()
    code = f"""
import os, signal
from modelcache import handover, saving
handover.Handover._close = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
saving.save({str(source)!r})
"""
    subprocess.run([sys.executable, "-c", code], env=node.environment)
    assert modelcache.list() == []
    modelcache.save(source)
    modelcache.flush(WAIT_SECONDS)
    shared().close()
    node.terminate()  # and there are no temp files
    node.restart()


@pytest.mark.parametrize("size", [100_000, 4 << 20])
def test_nothing_torn_is_kept(start: Start, tmp_path: Path, size: int) -> None:
    start()
    fill(tmp_path / "out", {"file": bytes(size), "other": b"o" * LARGE})
    command = [sys.executable, "-c", REWRITER, str(tmp_path / "out/file"), str(size)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        assert writer.stdin is not None and writer.stdout is not None and writer.stdout.readline() == b"ready\n"
        try:
            saved = [modelcache.save(tmp_path / "out") for _ in range(8)]
        finally:
            writer.stdin.close()
    for reference in saved:
        view = Path(modelcache.load(reference))
        assert len(set((view / "file").read_bytes())) == 1 and (view / "other").read_bytes() == b"o" * LARGE


def test_flush_has_a_deadline(start: Start, source: Path, tmp_path: Path) -> None:
    (tmp_path / "store").touch()  # no folder can be made there
    start()
    reference = modelcache.save(source)
    with pytest.raises(SavesPendingError) as caught:
        modelcache.flush(0.5)
    assert caught.value.data["pending"] == [reference["key"]]
    (tmp_path / "store").unlink()
    modelcache.flush(WAIT_SECONDS)


def test_a_daemon_of_another_uid_keeps_what_only_its_owner_can_read(shared_tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(shared_tmp_path / "out", {"small": b"secret", "large": b"s" * LARGE})
    for name in ("small", "large"):
        (shared_tmp_path / "out" / name).chmod(0o600)
    (shared_tmp_path / "out").chmod(0o700)
    (shared_tmp_path / "store").mkdir()
    os.chown(shared_tmp_path / "store", 12345, 12345)
    with Daemon.start(shared_tmp_path / "root", uid=12345, store=f"file://{shared_tmp_path}/store") as daemon:
        monkeypatch.setenv("MODELCACHE_SOCKET", daemon.socket)
        try:
            reference = modelcache.save(shared_tmp_path / "out")
            assert entries(Path(modelcache.load(reference))) == entries(shared_tmp_path / "out")
            modelcache.flush(WAIT_SECONDS)
        finally:
            shared().close()
            shared().leases.close()
