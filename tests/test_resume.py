"""Resume: what is put back, what is left alone, and that a trainer finds it; against a real daemon."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import modelcache
from modelcache import errors, resume, saving, units
from modelcache.client import shared

from . import trainer
from .checkpoints import archive
from .conftest import ROOT
from .daemon import Daemon, clean_environment
from .saves import fill, until

RUN = units.Series.of_name("run")
WRITTEN = 1_700_000_000  # long ago, so that what a test writes is newer


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with Daemon.start(tmp_path_factory.mktemp("daemon") / "root") as daemon:
        yield daemon


@pytest.fixture
def world(daemon: Daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setenv("MODELCACHE_SOCKET", daemon.socket)
    world = World(tmp_path)
    yield world
    for reference in modelcache.list():
        modelcache.flush()
        modelcache.delete(reference)
    shared().close()
    shared().leases.close()


class World:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.source = folder / "source"  # where it was trained
        self.out = folder / "out"  # where it goes on
        self.said: list[str] = []

    def keep(self, made: Path, at: float = WRITTEN, **fields: Any) -> str:
        """As a watch keeps it."""
        path = str(made.relative_to(self.source))
        draft = {
            **saving.checkpoint_reference("run"),
            "unit": path,
            "unit_type": "folder" if made.is_dir() else "file",
            "layout": "hf-trainer",
            "complete": "whole",
            "written_ns": int(at * 1e9),
            "companions": {},
            "aliases": {},
            **fields,
        }
        return str(saving.keep(made, draft, {"step": 1})["key"])

    def trained(self, step: int, at: float = WRITTEN, **fields: Any) -> str:
        return self.keep(trainer.save(self.source, step, trainer.weights_after(step)), at, **fields)

    def restore(self, **more: Any) -> resume.Restored | None:
        return resume.restore(str(self.out), resume.listed_in(RUN), self.said.append, **more)

    @property
    def inside(self) -> list[str]:
        return sorted(str(path.relative_to(self.out)) for path in self.out.rglob("*") if not path.is_dir() or path.is_symlink())

    @property
    def beside(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir() if path not in (self.source, self.out))


def touch(path: Path, moment: float) -> None:
    for each in [*path.rglob("*"), path]:
        os.utime(each, (moment, moment))


def test_the_newest_is_put_back_as_its_trainer_wrote_it(world: World) -> None:
    for number, step in enumerate((10, 20, 30)):
        world.trained(step, WRITTEN + number)
    restored = world.restore()
    assert restored is not None and (restored.unit, restored.was_there) == ("checkpoint-30", False)
    made = world.out / "checkpoint-30"
    assert trainer.load(made) == (30, trainer.weights_after(30))
    assert world.inside == [f"checkpoint-30/{name}" for name in ("model.safetensors", "optimizer.pt", "trainer_state.json")]
    assert {path.stat().st_mtime for path in (made, *made.iterdir())} == {WRITTEN + 2}
    assert world.said == [] and world.beside == []
    (made / "optimizer.pt").write_text("the user's own")  # not the cache's
    assert all(path.stat().st_nlink == 1 for path in made.iterdir())


def test_a_trainer_goes_on_and_rotates(world: World) -> None:
    world.trained(20)
    world.restore()
    command = [sys.executable, "-m", "tests.trainer", str(world.out), "--steps", "50", "--limit", "2"]
    ran = subprocess.run(command, env=clean_environment(PYTHONPATH=str(ROOT)), capture_output=True, text=True)
    assert ran.stdout.split() == ["resumed", "20", "ended", "50", trainer.weights_after(50).hex()], ran.stderr
    assert [path.name for path in trainer.checkpoints(world.out)] == ["checkpoint-40", "checkpoint-50"]


def test_there_is_nothing_to_put_back(world: World) -> None:
    fill(world.source, {"a": b"a"})
    modelcache.save(world.source, kind="checkpoint", name="run")  # by hand: nobody knows where it belongs
    assert world.restore() is None
    assert world.inside == [] and world.said == []


def test_not_the_last_saved_but_the_last_written(world: World) -> None:
    world.trained(30, WRITTEN + 2)
    world.trained(10, WRITTEN)
    restored = world.restore()
    assert restored is not None and restored.unit == "checkpoint-30"


def test_a_guess_only_when_nothing_is_sure(world: World) -> None:
    world.trained(20, WRITTEN + 1, complete="guessed")
    restored = world.restore()
    assert restored is not None and restored.unit == "checkpoint-20"
    world.trained(10, WRITTEN)
    world.out = world.folder / "other"
    restored = world.restore()
    assert restored is not None and restored.unit == "checkpoint-10"


def test_files_trackers_and_links(world: World) -> None:
    unit = "logs/version_0/epoch=1-step=20.ckpt"
    fill(world.source, {unit: b"weights"})
    aliases = {"logs/version_0/last.ckpt": "epoch=1-step=20.ckpt", "newest.ckpt": "/node/of/before/epoch=1-step=20.ckpt"}
    world.keep(world.source / unit, companions={"logs/latest": "epoch=1-step=20.ckpt"}, aliases=aliases)
    for was_there in (False, True):
        restored = world.restore()
        assert restored is not None and (restored.unit, restored.was_there) == (unit, was_there)
        assert world.inside == ["logs/latest", unit, "logs/version_0/last.ckpt", "newest.ckpt"]
        assert (world.out / "logs/latest").read_text() == "epoch=1-step=20.ckpt"
        assert os.readlink(world.out / "logs/version_0/last.ckpt") == "epoch=1-step=20.ckpt"
        assert (world.out / "newest.ckpt").read_bytes() == b"weights"
        assert (world.out / unit).stat().st_mtime == WRITTEN
        (world.out / "logs/latest").unlink()  # a resume that was killed before it came to that


@pytest.mark.parametrize("is_folder", [False, True])
def test_the_copy_of_the_newest_is_there_as_well(world: World, is_folder: bool) -> None:
    """Lightning writes it last: without it, `ckpt_path="last"` starts from nothing on a node that has the numbered one only."""
    unit, extra = "logs/epoch=1-step=20.ckpt", "logs/last.ckpt"
    fill(world.source, {f"{unit}/rank-0" if is_folder else unit: b"weights"})
    world.keep(world.source / unit, layout="lightning", extra=extra)
    assert world.restore() is not None
    for path in (unit, extra):
        made = world.out / path
        assert (made / "rank-0" if is_folder else made).read_bytes() == b"weights"
        assert not made.is_symlink() and made.stat().st_mtime == WRITTEN
    restored = world.restore()  # and neither is news
    assert restored is not None and restored.was_there and world.said == []
    if not is_folder:
        (world.out / extra).write_bytes(b"one before")  # on the node where it was trained: the trainer's own business
        touch(world.out / extra, WRITTEN - 1)
        assert world.restore() is not None
        assert (world.out / extra).read_bytes() == b"one before"


@pytest.mark.parametrize("is_folder", [False, True])
def test_half_a_copy_of_the_newest_is_moved_away(world: World, is_folder: bool) -> None:
    """`ckpt_path="last"` takes the last.ckpt that was written last, and fails on half a one after every start."""
    unit, extra = "logs/epoch=1-step=20.ckpt", "logs/last.ckpt"
    files = {"meta.pt": b"m", ".metadata": b"m", "w": archive()}
    fill(world.source, {f"{unit}/{name}": data for name, data in files.items()} if is_folder else {unit: archive()})
    world.keep(world.source / unit, layout="lightning", extra=extra)
    fill(world.out, {f"{extra}/w": archive()} if is_folder else {extra: archive()[:-10]})
    touch(world.out, time.time() - 3600)
    restored = world.restore()
    assert restored is not None and restored.unit == unit
    made = world.out / extra
    assert (made / "w" if is_folder else made).read_bytes() == archive()
    (moved,) = (world.folder / "out.incomplete").iterdir()
    assert world.said == [f"{made} is not complete: moved to {moved}"]


@pytest.mark.parametrize(
    ("unit", "newer"),
    [
        ("epoch=1-step=20.ckpt", "last.ckpt"),
        ("epoch=1-step=20.ckpt", "epoch=1-step=30-v1.ckpt"),
        ("epoch=1-step=20-v1.ckpt", "epoch=1-step=30.ckpt"),
        ("last.ckpt", "last-v1.ckpt"),
    ],
)
def test_a_newer_one_of_lightning_by_another_name_stays(world: World, unit: str, newer: str) -> None:
    fill(world.source, {unit: archive()})
    world.keep(world.source / unit, layout="lightning", aliases={"newest.ckpt": unit})
    fill(world.out, {newer: archive(b"newer")})
    assert world.restore() is None
    assert world.inside == [newer]
    assert world.said == [f"{world.out}/{newer} is newer than what was kept: nothing is put back"]


def test_each_newer_one_is_judged_by_its_own_rule(world: World) -> None:
    """A best.ckpt that a framework's rule takes says nothing about the files beside it."""
    fill(world.source, {"model-20.pt": archive()})
    world.keep(world.source / "model-20.pt", layout="single-file")
    fill(world.out, {"model-20.pt": archive(), "model-30.pt": archive(b"newer"), "best.ckpt": archive()})
    touch(world.out / "model-20.pt", WRITTEN)
    assert world.restore() is None
    assert world.inside == ["best.ckpt", "model-20.pt", "model-30.pt"]
    assert world.said == [f"{world.out}/model-30.pt is newer than what was kept: nothing is put back"]


@pytest.mark.parametrize("path", ["../x", "/x", "a//b", "a/./b", "", "a/../../x", "x\0y"])
def test_no_name_leads_out(world: World, path: str) -> None:
    if path:
        world.trained(20, WRITTEN + 2, unit=path)
    world.trained(20, WRITTEN + 1, companions={path: "text"})
    world.trained(20, WRITTEN + 1, aliases={path: "checkpoint-20"})
    if path:
        world.trained(20, WRITTEN + 1, extra=path)
    world.trained(10)
    restored = world.restore()
    assert restored is not None and restored.unit == "checkpoint-10"
    assert any("not in its folder" in said for said in world.said)
    assert not (world.folder / "x").exists()


def test_what_is_there_is_left_alone(world: World) -> None:
    made = trainer.save(world.out, 20, trainer.weights_after(20))
    touch(made, WRITTEN - 1)
    world.trained(20)
    before = {path: (path.stat().st_ino, path.stat().st_ctime_ns) for path in (made, *made.iterdir())}
    restored = world.restore()
    assert restored is not None and restored.was_there
    assert before == {path: (path.stat().st_ino, path.stat().st_ctime_ns) for path in (made, *made.iterdir())}


@pytest.mark.parametrize("step", [20, 30])
def test_what_is_newer_and_whole_stays(world: World, step: int) -> None:
    """Of the same name, or another."""
    world.trained(20)
    trainer.save(world.out, step, b"other weights")
    before = {path: path.read_bytes() for path in world.out.rglob("*") if path.is_file()}
    assert world.restore() is None
    assert before == {path: path.read_bytes() for path in world.out.rglob("*") if path.is_file()}
    assert world.said == [f"{world.out}/checkpoint-{step} is newer than what was kept: nothing is put back"]


def test_where_only_quiet_tells_everything_counts(world: World) -> None:
    fill(world.source, {"model-20/weights": b"old"})
    world.keep(world.source / "model-20", complete="guessed", layout="quiet")
    fill(world.out, {"model-30/weights": b"new"})
    assert world.restore() is None and world.inside == ["model-30/weights"]


@pytest.mark.parametrize("step", [20, 30])
def test_half_a_checkpoint_is_moved_away(world: World, step: int) -> None:
    """A killed trainer's last one, which the next would try to resume from."""
    world.trained(20)
    made = trainer.save(world.out, step, b"other weights")
    (made / "trainer_state.json").unlink()
    touch(made, time.time() - 3600)
    restored = world.restore()
    assert restored is not None and [path.name for path in trainer.checkpoints(world.out)] == ["checkpoint-20"]
    assert trainer.load(world.out / "checkpoint-20") == (20, trainer.weights_after(20))
    (moved,) = (world.folder / "out.incomplete").iterdir()
    assert sorted(path.name for path in moved.iterdir()) == ["model.safetensors", "optimizer.pt"]
    assert world.said == [f"{made} is not complete: moved to {moved}"]


def test_what_rotation_left_of_it_is_replaced(world: World) -> None:
    made = trainer.save(world.out, 20, trainer.weights_after(20))
    (made / "model.safetensors").unlink()
    touch(made, WRITTEN)
    world.trained(20)
    restored = world.restore()
    assert restored is not None and not restored.was_there
    assert trainer.load(made) == (20, trainer.weights_after(20))
    assert world.beside == [] and world.said == []


def test_what_lies_in_an_older_one_is_not_lost(world: World) -> None:
    made = trainer.save(world.out, 20, b"older weights")
    (made / "notes").write_text("the user's")
    touch(made, WRITTEN - 1)
    world.trained(20)
    world.restore()
    assert trainer.load(made) == (20, trainer.weights_after(20))
    (moved,) = (world.folder / "out.incomplete").iterdir()
    assert (moved / "notes").read_text() == "the user's"


def test_another_runs_checkpoint_of_that_name_is_not_lost(world: World) -> None:
    """Older, with the same names in it, and another size."""
    made = trainer.save(world.out, 20, b"of another run", loss=0.123456)
    touch(made, WRITTEN - 1)
    world.trained(20)
    restored = world.restore()
    assert restored is not None and not restored.was_there
    assert trainer.load(made) == (20, trainer.weights_after(20))
    (moved,) = (world.folder / "out.incomplete").iterdir()
    assert b"of another run" in (moved / "model.safetensors").read_bytes()
    assert world.said == [f"{made} differs from what was kept: moved to {moved}"]


@pytest.mark.parametrize("unit", ["model-20.pt", "checkpoint-20/model.pt"])
def test_equal_sizes_are_not_equal_bytes(world: World, unit: str) -> None:
    """As two runs of one model have them."""
    fill(world.source, {unit: b"ours"})
    fill(world.out, {unit: b"else"})
    top = unit.partition("/")[0]
    touch(world.out / top, WRITTEN - 1)
    world.keep(world.source / top, layout="quiet")
    restored = world.restore()
    assert restored is not None and not restored.was_there
    assert (world.out / unit).read_bytes() == b"ours"
    (moved,) = (world.folder / "out.incomplete").iterdir()
    assert (moved / "model.pt" if moved.is_dir() else moved).read_bytes() == b"else"
    assert world.said == [f"{world.out / top} differs from what was kept: moved to {moved}"]


def test_what_can_not_be_moved_away_is_not_replaced(world: World) -> None:
    fill(world.source, {"model-20.pt": b"ours"})
    fill(world.out, {"model-20.pt": b"of another run"})
    touch(world.out, WRITTEN - 1)
    world.keep(world.source / "model-20.pt", layout="quiet")
    (world.folder / "out.incomplete").write_text("no folder: nothing can be put into it")
    with pytest.raises(errors.StorageError, match="is in the way"):
        world.restore()
    assert (world.out / "model-20.pt").read_bytes() == b"of another run"
    assert world.beside == ["out.incomplete"]


def test_a_file_where_a_link_belongs_is_not_lost(world: World) -> None:
    """A trainer that copies, where others link: of the same checkpoint it may go, an older one of its own may not."""
    unit = "epoch=1-step=20.ckpt"
    fill(world.source, {unit: b"weights"})
    fill(world.out, {"last.ckpt": b"older weights", "newest.ckpt": b"weights"})
    touch(world.out, WRITTEN - 1)
    world.keep(world.source / unit, layout="quiet", aliases={"last.ckpt": unit, "newest.ckpt": unit})
    assert world.restore() is not None
    assert {name: os.readlink(world.out / name) for name in ("last.ckpt", "newest.ckpt")} == {"last.ckpt": unit, "newest.ckpt": unit}
    (moved,) = (world.folder / "out.incomplete").iterdir()
    assert moved.read_bytes() == b"older weights"
    assert world.said == [f"{world.out}/last.ckpt differs from what was kept: moved to {moved}"]


def test_what_another_process_is_writing_stays(world: World) -> None:
    """It looks like half a checkpoint, and is not quiet."""
    world.trained(20)
    made = trainer.save(world.out, 30, b"other weights")
    (made / "trainer_state.json").unlink()
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(made / "model.safetensors")], stdout=subprocess.PIPE)
    try:
        assert writer.stdout is not None and writer.stdout.readline()
        assert world.restore() is None
    finally:
        writer.kill()
        writer.wait()
        assert writer.stdout is not None
        writer.stdout.close()
    assert [path.name for path in trainer.checkpoints(world.out)] == ["checkpoint-30"]
    assert world.said == [f"{made} is being written by somebody else: nothing is put back"]


WRITER = """
import sys, time
with open(sys.argv[1], "ab") as file:
    while True:
        file.write(b"more")
        file.flush()
        print("wrote", flush=True)
        time.sleep(0.05)  # its pace
"""


def test_a_lost_one_is_skipped(world: World, daemon: Daemon) -> None:
    world.trained(10)
    lost = world.trained(20, WRITTEN + 1)
    modelcache.flush()
    record = daemon.root / f"store/refs/{lost}.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "tree": "f" * 64}))  # one that is nowhere
    restored = world.restore()
    assert restored is not None and restored.unit == "checkpoint-10"
    assert [said.startswith(f"skipping {lost}: ") for said in world.said] == [True]
    record.unlink()


def test_several_processes_resume_at_once(world: World) -> None:
    world.trained(20)
    processes = [subprocess.Popen([sys.executable, "-c", RESUME, str(world.out)], stdout=subprocess.PIPE, text=True) for _ in range(4)]
    said = sorted(process.communicate(timeout=60)[0].strip() for process in processes)
    assert said == ["checkpoint-20 False", *["checkpoint-20 True"] * 3]
    assert trainer.load(world.out / "checkpoint-20") == (20, trainer.weights_after(20)) and world.beside == []


RESUME = """
import sys
from modelcache import resume, units
restored = resume.restore(sys.argv[1], resume.listed_in(units.Series.of_name("run")), print)
print(restored.unit, restored.was_there)
"""


def test_a_killed_one_leaves_nothing_under_the_name(world: World) -> None:
    """Killed in each of its steps: the unit is there whole or not at all, and the next one puts everything right."""
    world.trained(20)
    phases = set()
    for number in range(1, 40):
        world.out = world.folder / f"out{number}"
        killed = subprocess.run([sys.executable, "-c", KILLED, str(world.out), str(number)], stdout=subprocess.PIPE, text=True)
        if killed.returncode == 0:
            break
        phases.add(killed.stdout.split()[-1])
        found = trainer.checkpoints(world.out)
        assert all(trainer.load(each) == (20, trainer.weights_after(20)) for each in found)
        restored = world.restore()
        assert restored is not None and trainer.load(world.out / "checkpoint-20") == (20, trainer.weights_after(20))
        assert not [name for name in world.beside if name.startswith(f".out{number}.")]
    assert {"mkdir", "rename", "utime"} <= phases and number > 10, phases


KILLED = """
import os, signal, sys
from modelcache import resume, units
left = [int(sys.argv[2])]
def counted(name):
    call = getattr(os, name)
    def instead(*arguments, **more):
        left[0] -= 1
        if not left[0]:
            print(name, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*arguments, **more)
    setattr(os, name, instead)
for name in ("mkdir", "rename", "replace", "utime", "unlink", "rmdir"):
    counted(name)
assert resume.restore(sys.argv[1], resume.listed_in(units.Series.of_name("run")), print)
"""


@pytest.mark.skipif(os.getuid() != 0, reason="takes root: mounts a filesystem")
def test_a_folder_that_is_a_mount(world: World) -> None:
    """Nothing can be renamed into it from beside it, nor out of it."""
    world.out.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(world.out)], check=True)
    try:
        world.trained(20)
        assert world.restore() is not None
        assert os.listdir(world.out) == ["checkpoint-20"] and world.beside == []
        made = trainer.save(world.out, 30, b"other weights")
        (made / "trainer_state.json").unlink()
        touch(made, time.time() - 3600)
        restored = world.restore()
        assert restored is not None and restored.was_there
        assert sorted(os.listdir(world.out)) == [".modelcache.incomplete", "checkpoint-20"] and world.beside == []
    finally:
        subprocess.run(["umount", str(world.out)], check=True)


def test_a_link_to_a_folder(world: World) -> None:
    (world.folder / "scratch/run").mkdir(parents=True)
    world.out.symlink_to(world.folder / "scratch/run")
    world.trained(20)
    assert world.restore() is not None
    assert trainer.load(world.folder / "scratch/run/checkpoint-20") == (20, trainer.weights_after(20))
    assert os.listdir(world.folder / "scratch") == ["run"]


def test_one_that_another_node_is_bringing_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pending record is there, its blobs are not; it arrives while the resume waits."""
    store, blobs, world = f"file://{tmp_path}/store", tmp_path / "store/blobs", World(tmp_path)
    with Daemon.start(tmp_path / "here", store=store) as here, Daemon.start(tmp_path / "there", store=store) as there:
        monkeypatch.setenv("MODELCACHE_SOCKET", here.socket)
        world.trained(10, WRITTEN)
        modelcache.flush()
        blobs.rename(tmp_path / "away")
        blobs.write_text("no folder: nothing can be put into it")
        monkeypatch.setenv("MODELCACHE_SOCKET", there.socket)
        world.trained(20, WRITTEN + 1)
        monkeypatch.setenv("MODELCACHE_SOCKET", here.socket)
        until(lambda: bool(resume.listed_in(RUN)()[1]))  # announced, best effort, behind the save
        waiting = subprocess.Popen([sys.executable, "-u", "-c", RESUME, str(world.out)], stdout=subprocess.PIPE, text=True)
        assert waiting.stdout is not None and waiting.stdout.readline().startswith("waiting for ")
        blobs.unlink()
        (tmp_path / "away").rename(blobs)
        assert waiting.communicate(timeout=60)[0].strip() == "checkpoint-20 False"
        shared().close()
        shared().leases.close()
