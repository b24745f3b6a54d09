"""Watching a folder: in the daemon and by a helper, with everything that is known to go wrong with events, trainers and daemons."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import modelcache
from modelcache import layouts, watch_client
from modelcache.client import shared
from modelcache.watch_client import Ask, Status, Watch

from .checkpoints import WHOLE, archive, hf_trainer, write
from .conftest import ROOT, as_uid
from .daemon import IMPORT_PATH, Daemon, clean_environment
from .kernel import fuse, require_root, small_tmpfs
from .saves import until

DAEMON_UID = 1500
FOUND_SECONDS = 10.0  # what every complete unit has to be found within, whatever the events do
SETTLE = 0.3
WRITTEN = 1_700_000_000
RULES = [
    {
        "name": "quick",
        "pattern": r"checkpoint-(\d+)",
        "needs": ["trainer_state.json"],
        "step_in": "trainer_state.json:global_step",
        "settle": SETTLE,
    },
    {"name": "guess", "pattern": r"guess-(\d+)", "settle": SETTLE, "guessed": True},
    {"name": "file", "pattern": r"epoch=\d+-step=(\d+)\.ckpt", "kind": "file", "settle": SETTLE},
]
LIGHTNING = next(rule for rule in layouts.RULES if rule.name == "lightning")
Start = Callable[..., Watch]


class Where:
    """A daemon, and what a watch that it serves lies in."""

    def __init__(self, daemon: Daemon, folder: Path, kind: str) -> None:
        self.daemon = daemon
        self.kind = kind
        self.out = folder / "out"
        self.rules = folder / "rules.json"
        self.name = os.urandom(4).hex()
        self.out.mkdir()
        self.rules.write_text(json.dumps(RULES))
        self._watches: list[Watch] = []

    def start(self, **more: Any) -> Watch:
        linger = more.pop("linger", 0.2)
        more.setdefault("layout", str(self.rules))
        watch = watch_client.start(Ask(str(self.out), self.name, **more), linger)
        self._watches.append(watch)
        assert watch.where.split()[0] == self.kind
        return watch

    def references(self) -> list[dict[str, Any]]:
        """Oldest first."""
        return list(reversed(modelcache.list(name=self.name)))

    def units(self) -> list[str]:
        return [reference["unit"] for reference in self.references()]

    def shown(self) -> list[dict[str, Any]]:
        return [each for each in self.daemon.status()["watches"] if each["name"] == self.name]

    def end(self) -> None:
        for watch in self._watches:
            watch.close()
        shutil.rmtree(self.out, ignore_errors=True)  # nothing is left that could become complete
        until(lambda: not self.shown())


@pytest.fixture(scope="module")
def own_daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with Daemon.start(tmp_path_factory.mktemp("own") / "root", min_free="0") as daemon:
        yield daemon


@pytest.fixture(scope="module")
def node_daemon() -> Iterator[Daemon]:
    as_uid(DAEMON_UID)  # or skip
    with tempfile.TemporaryDirectory(prefix="modelcached-test-") as name:
        os.chmod(name, 0o755)
        with Daemon.start(Path(name) / "root", uid=DAEMON_UID, min_free="0") as daemon:
            yield daemon


@contextmanager
def placed(kind: str, daemon: Daemon, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Where]:
    monkeypatch.setenv("MODELCACHE_SOCKET", daemon.socket)
    where = Where(daemon, folder, kind)
    try:
        yield where
        where.end()
    finally:
        shared().close()
        shared().leases.close()


@pytest.fixture(params=["daemon", "helper"])
def where(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Where]:
    daemon = request.getfixturevalue("own_daemon" if request.param == "daemon" else "node_daemon")
    with placed(request.param, daemon, tmp_path, monkeypatch) as made:
        yield made


@pytest.fixture
def here(own_daemon: Daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Where]:
    """Where it runs makes no difference."""
    with placed("daemon", own_daemon, tmp_path, monkeypatch) as made:
        yield made


@pytest.fixture
def helped(node_daemon: Daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Where]:
    with placed("helper", node_daemon, tmp_path, monkeypatch) as made:
        yield made


def captured(watch: Watch, *units: str, seconds: float = FOUND_SECONDS) -> Status:
    """Waits until all of them are."""
    seen: list[Status] = []

    def are_there() -> bool:
        seen[:] = [watch.status()]
        return set(units) <= {each.unit for each in seen[0].captured}

    until(are_there, seconds)
    return seen[0]


def told(watch: Watch, *words: str) -> str:
    """Waits until a sentence about something that was skipped has all these words."""
    found: list[str] = []

    def is_there() -> bool:
        found[:] = [each for each in watch.status().skipped if all(word in each for word in words)]
        return bool(found)

    until(is_there)
    return found[0]


def snapshot(folder: Path) -> dict[str, tuple[int, ...]]:
    """Everything that a change to the tree would change; a read changes none of it."""
    places = [folder, *sorted(folder.rglob("*"))]
    stats = {str(place.relative_to(folder)): place.lstat() for place in places}
    return {name: (s.st_ino, s.st_mode, s.st_nlink, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for name, s in stats.items()}


def test_checkpoints_are_captured_as_they_come(where: Where) -> None:
    watch = where.start()
    write(where.out, hf_trainer(10))
    captured(watch, "checkpoint-10")
    write(where.out, hf_trainer(20))
    status = watch.stop(30.0)
    found = [(each.unit, each.step, each.complete) for each in status.captured]
    assert found == [("checkpoint-10", 10, "whole"), ("checkpoint-20", 20, "whole")]
    assert (status.pending, status.last_error, status.captured_count) == ([], "", 2)
    first, second = where.references()
    assert (first["unit"], first["unit_type"], first["layout"], first["supersedes"]) == ("checkpoint-10", "folder", "quick", "")
    assert second["metadata"]["step"] == 20 and second["metadata"]["loss"] == 0.05
    loaded = modelcache.load(second)
    assert {path.name: path.read_bytes() for path in Path(loaded).iterdir()} == {
        name.rpartition("/")[2]: data for name, data in hf_trainer(20).items()
    }


def test_status_shows_watches(where: Where) -> None:
    watch = where.start()
    write(where.out, hf_trainer(1))
    captured(watch, "checkpoint-1")
    until(lambda: any(each["captured"] == 1 for each in where.shown()))
    (shown,) = where.shown()
    assert shown == {
        "directory": str(where.out),
        "name": where.name,
        "where": watch.where,
        "uid": os.getuid(),
        "captured": 1,
        "last_error": "",
    }


def test_the_folder_is_not_touched(where: Where) -> None:
    write(where.out, hf_trainer(1) | hf_trainer(2))
    before = snapshot(where.out)
    watch = where.start()
    captured(watch, "checkpoint-1", "checkpoint-2")
    watch.stop(30.0)
    assert snapshot(where.out) == before


def test_what_stands_beside_a_unit_is_recorded(here: Where) -> None:
    write(here.out, {**WHOLE["deepspeed"][2], "epoch=1-step=20.ckpt": archive()})
    (here.out / "last.ckpt").symlink_to("epoch=1-step=20.ckpt")
    rules = [*RULES, {"name": "ds", "pattern": r"global_step(\d+)", "tracker": "latest", "tracker_text": "{name}", "settle": SETTLE}]
    here.rules.write_text(json.dumps(rules))
    watch = here.start()
    captured(watch, "global_step40", "epoch=1-step=20.ckpt")
    found = {each["unit"]: each for each in here.references()}
    assert found["global_step40"]["companions"] == {"latest": "global_step40"}
    file = found["epoch=1-step=20.ckpt"]
    assert (file["unit_type"], file["aliases"]) == ("file", {"last.ckpt": "epoch=1-step=20.ckpt"})
    assert os.listdir(modelcache.load(file)) == ["epoch=1-step=20.ckpt"]


def test_what_is_open_for_writing_waits(here: Where) -> None:
    write(here.out, hf_trainer(1))
    with open(here.out / "checkpoint-1/optimizer.pt", "r+b"):
        watch = here.start()
        told(watch, "checkpoint-1", "optimizer.pt", "open for writing")
        assert not here.units()
    captured(watch, "checkpoint-1")


def test_a_unit_that_is_not_whole_is_never_captured(here: Where) -> None:
    write(here.out, hf_trainer(1) | {"checkpoint-1/optimizer.pt": archive()[:-20]})
    watch = here.start()
    told(watch, "optimizer.pt", "zip")
    write(here.out, hf_trainer(2))
    captured(watch, "checkpoint-2")
    assert [each.unit for each in watch.stop(10.0).captured] == ["checkpoint-2"]


def test_a_guess_is_superseded(here: Where) -> None:
    write(here.out, {"guess-1/w": b"first"})
    watch = here.start()
    captured(watch, "guess-1")
    write(here.out, {"guess-1/w": b"second"})
    until(lambda: watch.status().captured_count == 2)
    first, second = here.references()
    assert first["complete"] == second["complete"] == "guessed"
    assert second["supersedes"] == first["key"]


def test_the_newest_is_taken_at_the_end_whatever_the_pace(here: Where) -> None:
    watch = here.start(every=3600.0)
    write(here.out, hf_trainer(1))
    captured(watch, "checkpoint-1")
    write(here.out, hf_trainer(2))
    write(here.out, hf_trainer(3))
    status = watch.stop(30.0)
    assert [each.unit for each in status.captured] == ["checkpoint-1", "checkpoint-3"]


def test_who_comes_late_takes_the_newest_first(here: Where) -> None:
    for step in (1, 2, 3):
        write(here.out, hf_trainer(step))
        os.utime(here.out / f"checkpoint-{step}/optimizer.pt")  # one after the other, by the clock of stamps
    newest = max(path.stat().st_ctime for path in here.out.rglob("*"))
    until(lambda: time.time() > newest + SETTLE)  # all of them may be captured when it begins
    watch = here.start(keep=2)
    captured(watch, "checkpoint-3", "checkpoint-2")
    told(watch, "checkpoint-1", "newer ones are kept")
    assert [each.unit for each in watch.stop(30.0).captured] == ["checkpoint-3", "checkpoint-2"]


def test_what_was_put_back_is_no_news(here: Where) -> None:
    write(here.out, hf_trainer(1))
    watch = here.start(restored=("checkpoint-1",))
    write(here.out, hf_trainer(2))
    captured(watch, "checkpoint-2")
    assert [each.unit for each in watch.stop(30.0).captured] == ["checkpoint-2"]


def test_a_second_watch_takes_nothing_twice(here: Where) -> None:
    write(here.out, hf_trainer(1))
    watch = here.start()
    captured(watch, "checkpoint-1")
    watch.stop(30.0)
    again = here.start()
    write(here.out, hf_trainer(2))
    captured(again, "checkpoint-2")
    again.stop(30.0)
    assert here.units() == ["checkpoint-1", "checkpoint-2"]


def remove_some(unit: Path) -> None:
    """As far as a rotation comes that is killed on its way, or whoever saves room."""
    for name in ("optimizer.pt", "rng_state.pth"):
        (unit / name).unlink()


def test_what_is_left_of_a_captured_one_is_no_news(here: Where) -> None:
    watch = here.start()
    for step in (1, 2):
        write(here.out, hf_trainer(step))
        captured(watch, f"checkpoint-{step}")
    remove_some(here.out / "checkpoint-1")  # an older one
    write(here.out, hf_trainer(3))
    captured(watch, "checkpoint-3")
    remove_some(here.out / "checkpoint-3")  # and the newest
    assert [each.step for each in watch.stop(30.0).captured] == [1, 2, 3]
    remove_some(here.out / "checkpoint-2")  # while nobody looks
    again = here.start()
    write(here.out, hf_trainer(4))
    captured(again, "checkpoint-4")
    assert [each.step for each in again.stop(30.0).captured] == [4]


def test_what_is_left_of_one_that_was_not_captured_is_none(here: Where) -> None:
    write(here.out, hf_trainer(1))
    with open(here.out / "checkpoint-1/trainer_state.json", "r+b"):
        watch = here.start()
        told(watch, "checkpoint-1", "open for writing")
        write(here.out, hf_trainer(2))
        captured(watch, "checkpoint-2")
        remove_some(here.out / "checkpoint-1")
    told(watch, "checkpoint-1", "files of it were removed")
    assert [each.unit for each in watch.stop(30.0).captured] == ["checkpoint-2"]


def test_what_is_left_of_an_old_one_is_not_the_newest(here: Where) -> None:
    """Nobody looked when the job was killed in its rotation."""
    for step in (400, 500):
        write(here.out, hf_trainer(step))
        for path in (here.out / f"checkpoint-{step}").iterdir():
            os.utime(path, (step, step))
    os.utime(here.out / "checkpoint-500", (500, 500))
    remove_some(here.out / "checkpoint-400")
    newest = max(path.stat().st_ctime for path in here.out.rglob("*"))
    until(lambda: time.time() > newest + SETTLE)  # both may be captured when it begins
    watch = here.start(keep=1)
    captured(watch, "checkpoint-500")
    told(watch, "checkpoint-400", "newer ones are kept")
    assert [each.unit for each in watch.stop(30.0).captured] == ["checkpoint-500"]


def test_one_that_is_written_again_with_fewer_files_is_news(here: Where) -> None:
    watch = here.start()
    write(here.out, hf_trainer(1))
    captured(watch, "checkpoint-1")
    remove_some(here.out / "checkpoint-1")
    write(here.out, {"checkpoint-1/model.safetensors": hf_trainer(2)["checkpoint-2/model.safetensors"]})
    until(lambda: watch.status().captured_count == 2)
    shutil.rmtree(here.out / "checkpoint-1")
    write(here.out, {name: data for name, data in hf_trainer(1).items() if "optimizer" not in name})
    until(lambda: watch.status().captured_count == 3)
    shown = [sorted(path.name for path in Path(modelcache.load(each)).iterdir()) for each in here.references()]
    assert shown[1:] == [["model.safetensors", "trainer_state.json"], ["model.safetensors", "rng_state.pth", "trainer_state.json"]]


def of_lightning(here: Where, files: dict[str, bytes]) -> None:
    """Written in this order, and quiet for so long that all of them may be captured when a watch begins."""
    here.rules.write_text(json.dumps([{"name": "lightning", "pattern": LIGHTNING.pattern, "kind": "file", "settle": SETTLE}]))
    for number, (name, data) in enumerate(files.items(), WRITTEN):
        write(here.out, {name: data})
        os.utime(here.out / name, (number, number))
    newest = max(path.stat().st_ctime for path in here.out.iterdir())
    until(lambda: time.time() > newest + SETTLE)


def test_a_last_one_is_kept_beside_newer_ones_that_can_not_replace_it(here: Where) -> None:
    """A second ModelCheckpoint with `save_weights_only=True`: of its files no last.ckpt can be made."""
    state = archive(b"state" * 50)
    of_lightning(here, {"epoch=0-step=10.ckpt": state, "last.ckpt": state, "best.ckpt": archive(b"weights")})
    watch = here.start(keep=1)
    captured(watch, "best.ckpt", "last.ckpt")
    told(watch, "epoch=0-step=10.ckpt", "newer ones are kept")
    watch.stop(30.0)
    assert {each["unit"]: each["extra"] for each in here.references()} == {"best.ckpt": "", "last.ckpt": ""}


def test_a_last_one_is_kept_beside_the_numbered_one(here: Where) -> None:
    """Lightning's `save_last=True`: a file, written right after the other, and over again when the other is not written."""
    names = ("epoch=0-step=10.ckpt", "epoch=1-step=20.ckpt", "last.ckpt")
    of_lightning(here, {name: archive(name.encode()) for name in names})
    watch = here.start(keep=1)
    captured(watch, *names[1:])
    told(watch, names[0], "newer ones are kept")
    write(here.out, {"last.ckpt": archive(b"30")})
    until(lambda: watch.status().captured_count == 3)
    watch.stop(30.0)
    versions = [each for each in here.references() if each["unit"] == "last.ckpt"]
    assert len(versions) == 2 and versions[1]["supersedes"] == versions[0]["key"]
    (path,) = Path(modelcache.load(versions[1])).iterdir()
    assert path.read_bytes() == archive(b"30")


def test_a_name_that_no_task_may_have(here: Where) -> None:
    write(here.out, {"guess-1/w": b"x"})
    os.mkfifo(here.out / "guess-1/pipe")
    watch = here.start()
    told(watch, "guess-1", "no file")


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs pidfd")
def test_the_last_one_is_kept_when_the_trainer_is_killed(where: Where) -> None:
    """kill -9 of the process that watches, a moment after its checkpoint was complete; then the watch ends by itself."""
    program = """
import sys, time
from pathlib import Path
from modelcache import watch_client
from tests.checkpoints import hf_trainer, write
watch = watch_client.start(watch_client.Ask(sys.argv[1], sys.argv[2], layout=sys.argv[3]), 0.2)
write(Path(sys.argv[1]), hf_trainer(7))
print("written", flush=True)
sys.stdin.read()
"""
    command = [sys.executable, "-c", program, str(where.out), where.name, str(where.rules)]
    with subprocess.Popen(command, cwd=ROOT, env=where.daemon.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"written\n"
        process.kill()
    until(lambda: where.units() == ["checkpoint-7"])
    modelcache.flush(30.0, everything=True)
    until(lambda: not where.shown())


def test_a_helper_that_is_killed_is_replaced(helped: Where) -> None:
    watch = helped.start()
    pid = int(watch.where.split()[1])
    os.kill(pid, signal.SIGKILL)
    write(helped.out, hf_trainer(1))
    captured(watch, "checkpoint-1")
    assert watch.where != f"helper {pid}"


def test_a_daemon_that_comes_back_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Daemon.start(tmp_path / "root", min_free="0") as daemon, placed("daemon", daemon, tmp_path, monkeypatch) as where:
        watch = where.start()
        write(where.out, hf_trainer(1))
        captured(watch, "checkpoint-1")
        daemon.kill()
        write(where.out, hf_trainer(2))
        daemon.restart()
        captured(watch, "checkpoint-2", seconds=30.0)
        watch.stop(30.0)
        assert where.units() == ["checkpoint-1", "checkpoint-2"]


def test_without_room_it_goes_on_to_the_next(shared_tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with small_tmpfs(shared_tmp_path / "small", "16m") as small, Daemon.start(small / "root", min_free="0") as daemon:
        with placed("daemon", daemon, shared_tmp_path, monkeypatch) as where:
            write(where.out, hf_trainer(1, b"x" * (32 << 20)))
            watch = where.start()
            told(watch, "checkpoint-1", "needs")
            assert "needs" in watch.status().last_error
            shutil.rmtree(where.out / "checkpoint-1")
            write(where.out, hf_trainer(2))
            status = watch.stop(30.0)
            assert [each.unit for each in status.captured] == ["checkpoint-2"]
            assert any("checkpoint-1" in each and "it is gone" in each for each in status.skipped)


def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        watch_client.start(Ask(str(tmp_path / "missing/out"), "x"))


# ---- what events don't tell


def test_folders_that_are_renamed_into_it(here: Where) -> None:
    watch = here.start()
    for step in range(1, 6):
        write(here.out.parent / "staging", hf_trainer(step))
        os.rename(here.out.parent / f"staging/checkpoint-{step}", here.out / f"checkpoint-{step}")
    captured(watch, *(f"checkpoint-{step}" for step in range(1, 6)))


def test_the_folder_is_replaced(here: Where) -> None:
    watch = here.start()
    write(here.out, hf_trainer(1))
    captured(watch, "checkpoint-1")
    here.out.rename(here.out.with_name("old"))
    here.out.mkdir()
    write(here.out, hf_trainer(2))
    captured(watch, "checkpoint-2")
    shutil.rmtree(here.out)
    here.out.mkdir()
    write(here.out, hf_trainer(3))
    captured(watch, "checkpoint-3")


def test_a_link_in_its_place_is_not_followed(here: Where) -> None:
    watch = here.start()
    write(here.out, hf_trainer(1))
    captured(watch, "checkpoint-1")
    other = here.out.with_name("other")
    write(other, hf_trainer(2))
    here.out.rename(here.out.with_name("old"))
    here.out.symlink_to(other)
    write(here.out.with_name("old"), hf_trainer(3))
    captured(watch, "checkpoint-3")
    assert [each.unit for each in watch.stop(10.0).captured] == ["checkpoint-1", "checkpoint-3"]
    here.out.unlink()


def test_names_that_are_not_utf8(here: Where) -> None:
    watch = here.start()
    os.mkdir(os.fsencode(here.out) + b"/logs\xff")
    with open(os.fsencode(here.out) + b"/logs\xff/\xfe.log", "wb"):
        pass
    write(here.out, hf_trainer(1) | {"guess-2/w": b"x"})
    with open(os.fsencode(here.out) + b"/guess-2/\xfe", "wb"):
        pass
    captured(watch, "checkpoint-1")
    told(watch, "guess-2", "UTF-8")
    write(here.out, hf_trainer(3))
    captured(watch, "checkpoint-3")


@pytest.mark.parametrize(("kind", "mode"), [("daemon", 0o711), ("helper", 0o711), ("helper", 0o1733)])
def test_a_folder_that_can_only_be_passed_through(node_daemon: Daemon, shared_tmp_path: Path, kind: str, mode: int) -> None:
    """What the watched one lies in may be entered and not listed, as a cluster's `/scratch`; the watched one is the user's own."""
    uid = DAEMON_UID + (kind == "helper")
    name, out, rules = os.urandom(4).hex(), shared_tmp_path / "out", shared_tmp_path / "rules.json"
    rules.write_text(json.dumps(RULES))
    out.mkdir()
    os.chown(out, uid, uid)
    shared_tmp_path.chmod(mode)
    path = os.pathsep.join([IMPORT_PATH, str(ROOT)])
    environment = clean_environment(HOME="/nowhere", MODELCACHE_SOCKET=node_daemon.socket, PYTHONPATH=path)
    trains = [sys.executable, "-m", "tests.trainer", str(out), "--steps", "10"]
    watched = [*as_uid(uid), sys.executable, "-m", "modelcache", "watch", str(out), "--name", name, "--layout", str(rules), "--resume"]
    for said, kept in (("", ["checkpoint-10"]), ("resumed 10", [])):
        ran = subprocess.run([*watched, "--json", "--", *trains], cwd="/", env=environment, capture_output=True, text=True)
        assert ran.returncode == 0 and ran.stdout.startswith(said), ran.stderr
        status = json.loads(next(line for line in ran.stderr.splitlines() if line.startswith("{")))
        assert status["where"].split()[0] == kind
        assert [each["unit"] for each in status["captured"]] == kept
        shutil.rmtree(out / "checkpoint-10")  # the next one puts it back


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_more_events_than_the_kernel_keeps(helped: Where) -> None:
    """They are dropped without a word while the watcher does not run, and folders that are made meanwhile are not watched."""
    watch = helped.start()
    pid = int(watch.where.split()[1])
    until(lambda: not watch.status().scan_only)
    os.kill(pid, signal.SIGSTOP)
    try:
        (helped.out / "logs").mkdir()
        for number in range(int(Path("/proc/sys/fs/inotify/max_queued_events").read_text()) // 2 + 100):
            os.close(os.open(helped.out / f"logs/{number}", os.O_CREAT | os.O_WRONLY))
        write(helped.out, hf_trainer(1))
    finally:
        os.kill(pid, signal.SIGCONT)
    captured(watch, "checkpoint-1")
    write(helped.out, hf_trainer(2))
    captured(watch, "checkpoint-2")


@pytest.mark.slow
@pytest.mark.timeout(60)
def test_no_room_for_watches(helped: Where) -> None:
    """The limit is reached while it watches: no error comes, and no event of new folders."""
    require_root()
    program = """
import sys
from pathlib import Path
from modelcache import watch_client
from tests.checkpoints import hf_trainer, write
from tests.test_watcher import captured
Path("/proc/sys/user/max_inotify_watches").write_text("4")
out = Path(sys.argv[1])
watch = watch_client.start(watch_client.Ask(str(out), sys.argv[2], layout=sys.argv[3]), 0.2)
for step in range(1, 9):
    write(out / "deep" / str(step), hf_trainer(step))
captured(watch, *("deep/%d/checkpoint-%d" % (step, step) for step in range(1, 9)))
status = watch.stop(30.0)
print(len(status.captured))
"""
    command = ["unshare", "--user", "--map-root-user", sys.executable, "-c", program, str(helped.out), helped.name, str(helped.rules)]
    ran = subprocess.run(command, cwd=ROOT, env=helped.daemon.environment, capture_output=True, text=True)
    if "Operation not permitted" in ran.stderr and "unshare" in ran.stderr:
        pytest.skip("this kernel lets nobody have a user namespace")
    assert ran.stdout == "8\n", ran.stderr


def test_where_no_events_come(here: Where) -> None:
    """A FUSE filesystem may be a server's."""
    with fuse(here.out.parent / "fuse") as mount:
        (mount / "out").mkdir()
        here.out.rmdir()
        here.out = mount / "out"
        watch = here.start()
        write(here.out, hf_trainer(1))
        status = captured(watch, "checkpoint-1", seconds=30.0)
        assert status.scan_only
        watch.stop(30.0)
        shutil.rmtree(here.out)
        until(lambda: not here.shown())
