"""`save` against a daemon that keeps what it is given: every byte arrives, nothing torn does, and a lost daemon costs nothing."""

from __future__ import annotations

import fcntl
import itertools
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import modelcache
from modelcache import handover, keys, patience, walk
from modelcache.client import shared
from modelcache.errors import FileChangedError, MetadataError, NoSpaceError, NotSaveableError, SavesPendingError, SaveUnknownError
from modelcache.packs import PACK_BYTES
from modelcache.protocol import Progress, SaveOpen

from .fake_daemon import WAIT_SECONDS, Request, is_locked
from .fake_keeper import FakeKeeper
from .saves import until
from .test_sdk_connection import open_descriptors, run, sdk_path
from .test_sdk_probe import Clock, holder

LARGE = handover.SMALL_BYTES


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


@pytest.fixture
def in_memory() -> Iterator[Path]:
    """For tens of thousands of names: a disk takes longer to remove them than the test."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as name:
        yield Path(name)


def fill(folder: Path, files: dict[str, bytes]) -> None:
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)


def files_open() -> set[str]:
    return {entry for entry in open_descriptors() if "socket:" not in entry}


def methods(keeper: FakeKeeper) -> list[str]:
    found = []
    while not keeper.requests.empty():
        found.append(keeper.requests.get().method)
    return found


# ---- what arrives


def test_everything_arrives(keeper: FakeKeeper, source: Path) -> None:
    files = {
        "small": b"1",
        "zero": b"",
        "sub/deep/ünï\nçode": b"x" * 1000,
        "just small": os.urandom(LARGE - 1),
        "just large": os.urandom(LARGE),
        "large.bin": os.urandom(3 * LARGE + 7),
        "run.sh": b"#!",
    }
    fill(source, files)
    (source / "run.sh").chmod(0o755)
    (source / "large.bin").chmod(0o600)
    (source / "link").symlink_to("sub/deep")
    (source / "empty/inner").mkdir(parents=True)
    before = files_open()
    reference = modelcache.save(source, metadata={"loss": 0.5})
    kept = keeper.only()
    assert kept.files == files and kept.executable == {"run.sh"}
    assert kept.links == {"link": "sub/deep"} and kept.folders == ["empty/inner"]
    assert sorted(kept.messages) == sorted([("save_files", 2, 4 * LARGE + 7), ("save_pack", 5, LARGE + 1002)])
    assert reference["key"] == kept.reference["key"] and reference["metadata"] == {"loss": 0.5}
    assert reference["size"] == sum(map(len, files.values())) and reference["files"] == 7
    assert files_open() == before and keeper.open == {}


def test_what_a_model_and_a_checkpoint_are_called(keeper: FakeKeeper, source: Path) -> None:
    model = modelcache.save(source, label="a.b", storage_format="tar", pathspec="F/1/start/2", attempt=3)
    uuid = model["uuid"]
    assert model == {
        "type": "model",
        "key": f"mf.models/models/artifacts/{uuid}",
        "uuid": uuid,
        "model_uuid": uuid,
        "label": "a.b",
        "pathspec": "F/1/start/2",
        "attempt": 3,
        "source": "task",
        "metadata": {},
        "storage_format": "tar",
        "serializer": "tar",
        "size": 0,
        "files": 0,
        "created_on": model["created_on"],
        "url": model["url"],
    }
    assert uuid.startswith("a.b_") and len(uuid) == 4 + 32
    assert modelcache.save(source)["label"] == "out"
    checkpoint = modelcache.save(source, kind="checkpoint", name="run.7", attempt=1)
    named = keys.checkpoint_name(checkpoint["key"])
    assert (named.name, named.attempt, checkpoint["name"], str(checkpoint["version_id"])) == ("run.7", "1", "run.7", named.version)
    assert modelcache.save(source, kind="checkpoint")["name"] == "mfchckpt"
    assert len(keeper.kept) == 4


@pytest.mark.parametrize(
    "arguments",
    [
        {"label": "a/b"},
        {"label": ""},
        {"label": "a\nb"},
        {"label": "a\x7f"},
        {"label": "\udcff"},
        {"label": "x" * 181},
        {"label": 7},
        {"name": "n"},
        {"kind": "checkpoint", "name": "a/b"},
        {"kind": "checkpoint", "name": ""},
        {"kind": "checkpoint", "label": "x"},
        {"kind": "repo"},
        {"storage_format": "zip"},
        {"metadata": [1]},
        {"metadata": {"a": {"b": object()}}},
    ],
)
def test_arguments_that_make_no_sense(keeper: FakeKeeper, source: Path, arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"."):
        modelcache.save(source, **arguments)
    assert methods(keeper) == []


def test_refused_before_any_byte_moves(keeper: FakeKeeper, source: Path) -> None:
    os.mkfifo(source / "fifo")
    with pytest.raises(NotSaveableError):
        modelcache.save(source)
    with pytest.raises(MetadataError, match=r"metadata\['a'\]\['b'\] is object"):
        modelcache.save(source, metadata={"a": {"b": object()}})
    with pytest.raises(FileNotFoundError, match="nowhere"):
        modelcache.save(source / "nowhere")
    assert methods(keeper) == []


def test_one_file_and_an_empty_folder(keeper: FakeKeeper, source: Path, caplog: pytest.LogCaptureFixture) -> None:
    fill(source, {"model.h5": b"content"})
    (source / "to").symlink_to("model.h5")
    for path, name in ((source / "model.h5", "model.h5"), (source / "to", "to")):
        keeper.kept.clear()
        assert modelcache.save(str(path))["label"] == name
        assert keeper.only().files == {name: b"content"}
    (source / "empty").mkdir()
    keeper.kept.clear()
    modelcache.save(os.fsencode(source / "empty"))  # type: ignore[arg-type]
    assert keeper.only().files == {} and "is empty" in caplog.text


def test_many_links_and_folders_fit(keeper: FakeKeeper, in_memory: Path) -> None:
    source = in_memory
    for number in range(3000):
        (source / f"{number}-{'l' * 150}").symlink_to(f"./{'t' * 150}")
        (source / f"{number}-{'f' * 150}").mkdir()
    modelcache.save(source)
    kept = keeper.only()
    assert len(kept.links) == 3000 and len(kept.folders) == 3000
    assert "save_links" in methods(keeper)


# ---- how it travels


def test_small_files_travel_in_packs_of_bounded_size(keeper: FakeKeeper, source: Path) -> None:
    files = {f"{number}": os.urandom(LARGE - number - 1) for number in range(80)}  # 20 MiB
    fill(source, files)
    modelcache.save(source)
    kept = keeper.only()
    assert kept.files == files
    assert all(method == "save_pack" and size <= PACK_BYTES for method, _, size in kept.messages)
    assert len(kept.messages) == 3


def test_messages_have_bounded_names(keeper: FakeKeeper, source: Path) -> None:
    files = {f"{'ü' * 100}/{number}-{'é' * 100}": b"" for number in range(1000)}
    fill(source, files)
    modelcache.save(source)
    assert keeper.only().files == files and len(keeper.only().messages) > 1


def test_a_few_messages_are_on_their_way_at_a_time(keeper: FakeKeeper, source: Path) -> None:
    """And no more files are open than that takes, whatever the process's limit is."""
    for number in range(400):
        with open(source / str(number), "wb") as file:
            file.truncate(LARGE)
    keep, arrived, second = keeper.answers["save_files"], itertools.count(), threading.Event()

    def keep_together(request: Request) -> None:
        if next(arrived) == 1:
            second.set()
        assert second.wait(WAIT_SECONDS), "the first is answered only when another one is here"
        keep(request)

    keeper.answers["save_files"] = keep_together
    code = f"""
import os, resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))
import modelcache
modelcache.save({str(source)!r})
print(len(os.listdir("/proc/self/fd")))
"""
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **sdk_path()}, timeout=WAIT_SECONDS
    )
    assert ran.returncode == 0, ran.stderr
    assert int(ran.stdout) < 8 and len(keeper.only().files) == 400
    assert max(count for _, count, _ in keeper.only().messages) == 64 and keeper.most_running <= 4


def test_few_descriptors_are_no_error(keeper: FakeKeeper, source: Path) -> None:
    for number in range(150):
        with open(source / str(number), "wb") as file:
            file.truncate(LARGE)
    code = f"""
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
import modelcache
modelcache.save({str(source)!r})
"""
    ran = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, env={**os.environ, **sdk_path()})
    assert ran.returncode == 0, ran.stderr
    assert len(keeper.only().files) == 150


def test_many_threads_save_at_once(keeper: FakeKeeper, source: Path) -> None:
    """More messages than a connection carries: who has some on the way must not wait for others' to end."""
    files = {str(number): os.urandom(LARGE) for number in range(6)}
    fill(source, files)
    handover_bytes = len(files) * LARGE
    saves = [run(lambda: modelcache.save(source)) for _ in range(40)]
    assert len({save()["key"] for save in saves}) == 40
    assert all(kept.files == files and kept.reference["size"] == handover_bytes for kept in keeper.kept.values())


def test_twenty_thousand_files(keeper: FakeKeeper, in_memory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = in_memory
    for folder in range(100):
        (source / str(folder)).mkdir()
        for number in range(200):
            (source / str(folder) / str(number)).write_bytes(b"%d" % number)
    began = time.monotonic()
    reference = modelcache.save(source)
    seconds = time.monotonic() - began
    with capsys.disabled():
        print(f"\n20,000 files saved in {seconds:.2f} s", end=" ")
    assert reference["files"] == 20_000 == len(keeper.only().files)
    assert seconds < 15


# ---- files that change


def test_a_writer_is_waited_for(keeper: FakeKeeper, source: Path, caplog: pytest.LogCaptureFixture) -> None:
    fill(source, {"small": b"old", "large": b"o" * LARGE, "other": b"fine"})
    said = threading.Event()

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.set()

    handler = Handler()
    logging.getLogger("modelcache").addHandler(handler)
    try:
        with holder(source / "small", "append"), holder(source / "large", "mapping whose descriptor is closed"):
            save = run(lambda: modelcache.save(source))
            assert said.wait(WAIT_SECONDS)  # it has tried for half a second, and says whom it waits for
            assert keeper.kept == {}
            (source / "small").write_bytes(b"new")
        save()
    finally:
        logging.getLogger("modelcache").removeHandler(handler)
    assert keeper.only().files == {"small": b"new", "large": b"o" * LARGE, "other": b"fine"}
    assert "waiting for it to be complete" in caplog.text


def test_a_file_that_grows_while_it_is_waited_for(keeper: FakeKeeper, source: Path) -> None:
    """The listing is made again: what was said when the save was opened no longer holds."""
    fill(source, {"file": b"old", "large": b"x" * LARGE})
    hand_over = keeper.answers["save_files"]

    def grow(request: Request) -> None:
        keeper.answers["save_files"] = hand_over
        fill(source, {"file": b"much longer", "new": b"as well"})
        hand_over(request)

    keeper.answers["save_files"] = grow
    modelcache.save(source)
    assert keeper.only().files == {"file": b"much longer", "large": b"x" * LARGE, "new": b"as well"}
    assert len(keeper.dropped) == 1


@pytest.mark.parametrize("size", [10, LARGE])
def test_a_file_that_changed_is_handed_over_again(keeper: FakeKeeper, source: Path, size: int) -> None:
    fill(source, {"file": b"a" * size, "large": b"x" * LARGE, "zzz": b"last"})
    hand_over = keeper.answers["save_files"]

    def change(request: Request) -> None:
        keeper.answers["save_files"] = hand_over
        hand_over_after = {"file": b"b" * size}
        kept = keeper.open[request.params["save"]]
        for (path, _, executable), descriptor in zip(request.params["files"], request.descriptors, strict=True):
            keeper._keep(kept, path, os.pread(descriptor, LARGE, 0), executable)
        fill(source, hand_over_after)  # after the copy, before the second look
        request.reply({"changed": []})

    keeper.answers["save_files"] = change
    modelcache.save(source)
    assert keeper.only().files["file"] in ([b"b" * size] if size == LARGE else [b"a" * size, b"b" * size])


def test_what_the_daemon_says_has_changed_is_handed_over_again(keeper: FakeKeeper, source: Path) -> None:
    files = {str(number): os.urandom(LARGE) for number in range(5)}
    fill(source, files)
    tried: list[str] = []

    def changed(path: str, descriptor: int) -> bool:
        tried.append(path)
        return path in ("1", "3") and tried.count(path) < 3

    keeper.changed = changed
    modelcache.save(source)
    assert keeper.only().files == files
    assert sorted(tried) == ["0", "1", "1", "1", "2", "3", "3", "3", "4"]


def test_a_file_that_disappears_is_an_error(keeper: FakeKeeper, source: Path) -> None:
    """A folder that is being removed must not be saved in part."""
    fill(source, {"a": b"x" * LARGE, "b": b"y"})
    hand_over = keeper.answers["save_files"]

    def remove(request: Request) -> None:
        (source / "b").unlink()
        hand_over(request)

    keeper.answers["save_files"] = remove
    with pytest.raises(FileChangedError, match=r"out/b disappeared while it was saved: nothing was saved"):
        modelcache.save(source)
    assert keeper.kept == {} and keeper.open == {} and len(keeper.dropped) == 1


def test_a_file_that_changes_for_ever(keeper: FakeKeeper, source: Path) -> None:
    fill(source, {"file": b"x" * LARGE})
    keeper.changed = lambda path, descriptor: True
    clock = Clock()
    with walk.Source(str(source)) as opened:
        transfer = handover.Handover(shared()._connected()[0], opened, opened.listing(), clock.patience(opened), None)
        with pytest.raises(FileChangedError, match="was changed while it was saved: nothing was saved"):
            transfer.run(SaveOpen({"key": "k", "type": "model"}, 0, 0), lambda: None)
    assert sum(clock.pauses) == pytest.approx(14.6, abs=0.1)
    assert keeper.kept == {} and len(keeper.dropped) == 1


# Rewrites a file through a mapping, which changes no stat; then lets it rest for a while. Every version is one byte, repeated.
REWRITER = """
import mmap, os, sys, time
path, size = sys.argv[1], int(sys.argv[2])
os.set_blocking(0, False)
version, ready = 0, "ready"
while True:
    file = open(path, "r+b")
    mapping = mmap.mmap(file.fileno(), size)
    file.close()
    until = time.monotonic() + 0.03
    while time.monotonic() < until:
        version += 1
        mapping[:] = bytes([version % 256]) * size
    mapping.close()
    if ready:
        print(ready, flush=True)
        ready = ""
    until += 0.15
    while time.monotonic() < until:
        pass
    try:
        if os.read(0, 1) == b"":
            break
    except BlockingIOError:
        pass
"""


@pytest.mark.parametrize("size", [200_000, 4 << 20])
def test_nothing_torn_is_saved(keeper: FakeKeeper, source: Path, size: int) -> None:
    fill(source, {"file": bytes(size)})
    command = [sys.executable, "-c", REWRITER, str(source / "file"), str(size)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        assert writer.stdin is not None and writer.stdout is not None
        assert writer.stdout.readline() == b"ready\n"
        try:
            for _ in range(10):
                modelcache.save(source)
        finally:
            writer.stdin.close()
    assert [len(set(kept.files["file"])) for kept in keeper.kept.values()] == [1] * 10


# ---- a daemon that is lost


@pytest.mark.parametrize("method", ["save_open", "save_files", "save_pack", "save_close"])
def test_a_daemon_that_is_killed_in_the_middle(keeper: FakeKeeper, source: Path, method: str) -> None:
    files = {"small": b"s", "large": b"x" * LARGE}
    fill(source, files)
    answer = keeper.answers[method]
    stopped = threading.Event()

    def vanish(request: Request) -> None:
        keeper.answers[method] = answer
        keeper.open.clear()  # a new life knows of none
        request.peer.close()
        stopped.set()

    keeper.answers[method] = vanish
    modelcache.save(source)
    assert stopped.is_set() and keeper.only().files == files


def test_an_answer_that_is_lost_costs_no_second_save(keeper: FakeKeeper, source: Path) -> None:
    fill(source, {"small": b"s"})
    close = keeper.answers["save_close"]

    def keep_and_vanish(request: Request) -> None:
        keeper.answers["save_close"] = close
        keeper.complete(keeper.open.pop(request.params["save"]))
        request.peer.close()

    keeper.answers["save_close"] = keep_and_vanish
    reference = modelcache.save(source, metadata={"x": float("inf")})
    assert reference["size"] == 1 and reference["metadata"] == {"x": float("inf")}
    assert methods(keeper) == ["save_open", "save_pack", "save_close", "references"]


@pytest.mark.parametrize("method", ["save_open", "save_files", "save_pack", "save_close"])
def test_a_refusal_leaves_nothing_open(keeper: FakeKeeper, source: Path, method: str) -> None:
    fill(source, {str(number): os.urandom(LARGE) for number in range(200)} | {"small": b""})
    before = files_open()
    answer = keeper.answers[method]

    def refuse(request: Request) -> None:
        if not request.params.get("drop"):
            return request.error("no_space", "full")
        return answer(request)

    keeper.answers[method] = refuse
    with pytest.raises(NoSpaceError, match="full"):
        modelcache.save(source)
    assert keeper.kept == {} and keeper.open == {} and len(keeper.dropped) == (method != "save_open")
    until(lambda: files_open() == before)  # what the keeper still had to take, it closes behind its answer


def test_a_save_the_daemon_does_not_know(keeper: FakeKeeper, source: Path) -> None:
    fill(source, {"small": b""})
    pack = keeper.answers["save_pack"]

    def forget(request: Request) -> None:
        keeper.open.clear()
        pack(request)

    keeper.answers["save_pack"] = forget
    with pytest.raises(SaveUnknownError):
        modelcache.save(source)


def test_interrupted(keeper: FakeKeeper, source: Path) -> None:
    fill(source, {"large": b"x" * LARGE})
    arrived, go_on = threading.Event(), threading.Event()
    hand_over = keeper.answers["save_files"]

    def wait(request: Request) -> None:
        arrived.set()
        go_on.wait(WAIT_SECONDS)
        hand_over(request)

    keeper.answers["save_files"] = wait
    code = f"import modelcache\ntry:\n    modelcache.save({str(source)!r})\nexcept KeyboardInterrupt:\n    print('interrupted')"
    environment = {**os.environ, **sdk_path()}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment) as process:
        assert arrived.wait(WAIT_SECONDS)
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=WAIT_SECONDS)[0] == b"interrupted\n"
    go_on.set()
    assert keeper.kept == {} and len(keeper.dropped) == 1


def test_the_lock_goes_with_the_process(keeper: FakeKeeper, source: Path) -> None:
    fill(source, {"large": b"x" * LARGE})
    arrived, go_on = threading.Event(), threading.Event()

    def wait(request: Request) -> None:
        arrived.set()
        go_on.wait(WAIT_SECONDS)

    keeper.answers["save_files"] = wait
    code = f"import modelcache; modelcache.save({str(source)!r})"
    with subprocess.Popen([sys.executable, "-c", code], env={**os.environ, **sdk_path()}) as process:
        assert arrived.wait(WAIT_SECONDS)
        (kept,) = keeper.open.values()
        assert is_locked(kept.lock)
        process.kill()
    assert not is_locked(kept.lock)
    go_on.set()


# ---- flush


def test_flush_waits_for_what_this_process_saved(keeper: FakeKeeper, source: Path) -> None:
    modelcache.flush()
    reference = modelcache.save(source)
    methods(keeper)
    keeper.answers["flush"] = lambda request: request.reply({"pending": request.params["keys"], "error": "store is away"})
    with pytest.raises(SavesPendingError, match="1 saves are not in the store yet: store is away") as caught:
        modelcache.flush(deadline=5)
    assert caught.value.data["pending"] == [reference["key"]] and isinstance(caught.value, TimeoutError)
    asked = keeper.next_request()
    assert asked.params["keys"] == [reference["key"]] and 4 < asked.params["deadline_seconds"] <= 5
    keeper.answers["flush"] = lambda request: request.reply({"pending": []})
    modelcache.flush()
    assert keeper.next_request().params == {"keys": [reference["key"]]}
    modelcache.flush()
    assert methods(keeper) == []
    modelcache.flush(everything=True)
    assert keeper.next_request().params == {}


@pytest.mark.parametrize("is_private", [True, False])
def test_a_private_daemon_is_flushed_at_exit(keeper: FakeKeeper, source: Path, is_private: bool) -> None:
    hello = keeper.answers["hello"]

    class Private:
        """Changes one field of the reply."""

        def __init__(self, request: Request) -> None:
            self._request = request

        def reply(self, result: dict[str, Any]) -> None:
            self._request.reply({**result, "private": is_private})

    keeper.answers["hello"] = lambda request: hello(Private(request))  # type: ignore[arg-type]
    keeper.root.mkdir()
    code = f"""
import os, modelcache
print(modelcache.save({str(source)!r})["key"], flush=True)
if os.fork() == 0:
    raise SystemExit  # its parent's saves are not its own
os.wait()
"""
    ran = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env={**os.environ, **sdk_path()})
    asked = [keeper.next_request() for _ in range(keeper.requests.qsize())]
    flushes = [request.params["keys"] for request in asked if request.method == "flush"]
    assert flushes == ([[ran.stdout.strip()]] if is_private else [])


def test_progress_is_reported(keeper: FakeKeeper, source: Path) -> None:
    fill(source, {"a": b"x" * LARGE, "b": b"y"})
    seen: list[Progress] = []
    with walk.Source(str(source)) as opened:
        transfer = handover.Handover(
            shared()._connected()[0], opened, opened.listing(), patience.Patience(opened, lambda _: None), seen.append
        )
        transfer.run(SaveOpen({"key": "k", "type": "model"}, 0, 0), lambda: None)
    assert seen[-1].phase == "save" and (seen[-1].done_bytes, seen[-1].total_bytes) == (LARGE + 1, LARGE + 1)
    assert (seen[-1].done_files, seen[-1].total_files) == (2, 2)


def test_packs_without_memory_files_lie_in_the_temp_folder(keeper: FakeKeeper, source: Path, tmp_path: Path) -> None:
    """As on a Python that was built for old C libraries."""
    fill(source, {"small": b"content"})
    (tmp_path / "temp").mkdir()
    code = f"import os; del os.memfd_create\nimport modelcache; modelcache.save({str(source)!r})"
    environment = {**os.environ, **sdk_path(), "TMPDIR": str(tmp_path / "temp")}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0
    assert keeper.only().files == {"small": b"content"} and os.listdir(tmp_path / "temp") == []


def test_nothing_is_loaded_before_it_is_used_and_no_module_hides_a_function() -> None:
    code = """
import sys, importlib, pkgutil, json
import modelcache
print(json.dumps([name for name in sys.modules if name.startswith("modelcache.")]))
for module in pkgutil.iter_modules(modelcache.__path__):
    if module.name != "__main__":
        importlib.import_module("modelcache." + module.name)
print(json.dumps([callable(getattr(modelcache, name)) for name in ("save", "load", "list", "latest", "delete", "flush")]))
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=sdk_path())
    assert [json.loads(line) for line in ran.stdout.splitlines()] == [[], [True] * 6], ran.stderr


def test_leases_do_not_outlive_a_save(keeper: FakeKeeper, source: Path) -> None:
    """While the daemon copies, nobody who wants to write has to wait."""
    fill(source, {"large": b"x" * LARGE})
    hand_over = keeper.answers["save_files"]
    opened = []

    def write(request: Request) -> None:
        keeper.answers["save_files"] = hand_over
        descriptor = os.open(source / "large", os.O_WRONLY | os.O_NONBLOCK)  # would be refused
        opened.append(fcntl.fcntl(descriptor, fcntl.F_GETFD))
        os.close(descriptor)
        hand_over(request)

    keeper.answers["save_files"] = write
    modelcache.save(source)
    assert len(opened) == 1
