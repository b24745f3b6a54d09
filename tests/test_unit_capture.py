"""A unit between the moment it was found complete and the moment the daemon has it: what may happen to it, and what may not (G5)."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from modelcache import candidates, keys, layouts, saving, scanning, unit_capture
from modelcache.candidates import Unit
from modelcache.errors import FileChangedError, NotSaveableError
from modelcache.unit_capture import UnitSource

from .checkpoints import hf_trainer, write
from .fake_keeper import FakeKeeper


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[int]:
    write(tmp_path / "out", hf_trainer(1))
    (tmp_path / "out/checkpoint-1/empty").mkdir()
    (tmp_path / "out/checkpoint-1/best").symlink_to("model.safetensors")
    descriptor = os.open(tmp_path / "out", os.O_RDONLY | os.O_DIRECTORY)
    yield descriptor
    os.close(descriptor)


def only(folder: int) -> Unit:
    (unit,) = candidates.find(scanning.scan(folder), layouts.RULES)
    return unit


def contents(source: UnitSource) -> dict[str, bytes]:
    found = {}
    for file in source.listing().files:
        with os.fdopen(source.open(file.path), "rb") as opened:
            opened.seek(0)
            found[file.path] = opened.read()
    return found


def test_it_is_listed_as_it_is(folder: int) -> None:
    with UnitSource(folder, only(folder), "/out") as source:
        source.hold()
        listing = source.listing()
    assert [file.path for file in listing.files] == ["model.safetensors", "optimizer.pt", "rng_state.pth", "trainer_state.json"]
    assert (listing.links, listing.folders) == ([("best", "model.safetensors")], ["empty"])
    assert source.root == "/out/checkpoint-1"


def rmtree(unit: Path) -> None:
    shutil.rmtree(unit)


def marker_last(unit: Path) -> None:
    for name in ("model.safetensors", "optimizer.pt"):
        (unit / name).unlink()


def away(unit: Path) -> None:
    unit.rename(unit.with_name("old"))


@pytest.mark.parametrize("rotate", [rmtree, marker_last, away])
def test_rotation_costs_nothing_once_it_is_held(folder: int, tmp_path: Path, rotate: Callable[[Path], None]) -> None:
    with UnitSource(folder, only(folder), "/out") as source:
        source.hold()
        listing = source.listing()
        rotate(tmp_path / "out/checkpoint-1")
        assert contents(source) == {name.rpartition("/")[2]: data for name, data in hf_trainer(1).items()}
        assert source.difference(listing) == ("", "")


@pytest.mark.parametrize("rotate", [rmtree, marker_last, away])
def test_rotation_before_that_is_a_change(folder: int, tmp_path: Path, rotate: Callable[[Path], None]) -> None:
    unit = only(folder)
    rotate(tmp_path / "out/checkpoint-1")
    with UnitSource(folder, unit, "/out") as source, pytest.raises(FileChangedError):
        source.hold()


def rewritten(unit: Path) -> None:
    with open(unit / "optimizer.pt", "r+b") as file:
        file.write(b"!")


def replaced(unit: Path) -> None:
    (unit / ".tmp1").write_bytes((unit / "optimizer.pt").read_bytes())
    (unit / ".tmp1").rename(unit / "optimizer.pt")


def added(unit: Path) -> None:
    (unit / "rng_state_1.pth").write_bytes(b"late")


def grown_and_removed(unit: Path) -> None:
    with open(unit / "optimizer.pt", "ab") as file:
        file.write(b"!")
    shutil.rmtree(unit)


def another_one(unit: Path) -> None:
    shutil.rmtree(unit)
    write(unit.parent, hf_trainer(1))


@pytest.mark.parametrize("change", [rewritten, replaced, added, grown_and_removed, another_one])
def test_every_other_change_is_found(folder: int, tmp_path: Path, change: Callable[[Path], None]) -> None:
    with UnitSource(folder, only(folder), "/out") as source:
        source.hold()
        listing = source.listing()
        change(tmp_path / "out/checkpoint-1")
        with pytest.raises(FileChangedError):
            source.difference(listing)


def test_a_writer_is_found(folder: int, tmp_path: Path) -> None:
    """It has written nothing yet: no stat tells."""
    with UnitSource(folder, only(folder), "/out") as source:
        source.hold()
        with open(tmp_path / "out/checkpoint-1/optimizer.pt", "r+b"), pytest.raises(FileChangedError, match="open for writing"):
            source.difference(source.listing())


def test_units_of_very_many_files_are_opened_one_by_one(folder: int, tmp_path: Path) -> None:
    unit = tmp_path / "out/checkpoint-1"
    for number in range(unit_capture.HELD_FILES + 1):
        (unit / f"{number}.txt").write_bytes(b"%d" % number)
    with UnitSource(folder, only(folder), "/out") as source:
        before = len(os.listdir("/proc/self/fd"))
        source.hold()
        assert len(os.listdir("/proc/self/fd")) == before
        assert contents(source)["7.txt"] == b"7"
        assert source.difference(source.listing()) == ("", "")
        (unit / "7.txt").unlink()
        with pytest.raises(FileChangedError):
            source.difference(source.listing())


def test_no_link_leads_out(folder: int, tmp_path: Path) -> None:
    (tmp_path / "out/checkpoint-1/out").symlink_to("../../secret")
    with UnitSource(folder, only(folder), "/out") as source, pytest.raises(NotSaveableError, match="leads out"):
        source.listing()


def test_no_link_is_followed(folder: int, tmp_path: Path) -> None:
    """The unit, or a folder in it, becomes a link after it was found."""
    unit = only(folder)
    (tmp_path / "out/checkpoint-1").rename(tmp_path / "elsewhere")
    (tmp_path / "out/checkpoint-1").symlink_to(tmp_path / "elsewhere")
    with UnitSource(folder, unit, "/out") as source, pytest.raises(FileChangedError):
        source.hold()


def test_it_is_kept_while_it_is_rotated_away(folder: int, tmp_path: Path, keeper: FakeKeeper) -> None:
    """The name goes after the first byte was handed over."""
    reference = saving.checkpoint_reference("run")
    unit = only(folder)
    kept = unit_capture.capture(folder, unit, str(tmp_path / "out"), reference, None)
    assert keys.checkpoint_name(kept["key"]).name == "run"
    assert (kept["unit"], kept["layout"], kept["complete"], kept["written_ns"]) == ("checkpoint-1", "hf-trainer", "whole", unit.written_ns)
    assert kept["metadata"]["step"] == 1


def test_a_unit_that_changed_leaves_nothing(folder: int, tmp_path: Path, keeper: FakeKeeper) -> None:
    unit = only(folder)
    rewritten(tmp_path / "out/checkpoint-1")
    with pytest.raises(FileChangedError):
        unit_capture.capture(folder, unit, str(tmp_path / "out"), saving.checkpoint_reference("run"), None)
