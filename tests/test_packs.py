"""Packs: ordinary tars with an index; the same files give the same pack."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from modelcached.errors import LocalMismatch, NoSpace
from modelcached.model import Digest, TreeFile
from modelcached.packs import GAP_BYTES, SPAN_BYTES, Pack, Packed, group, size_of, spans, write

from .kernel import small_tmpfs
from .saves import MIB, unpacked


def pack(folder: Path, tree: Mapping[str, bytes], target: str = "pack") -> Pack:
    files = []
    for number, (path, data) in enumerate(tree.items()):
        source = folder / f"blob-{number}"
        source.write_bytes(data)
        files.append((TreeFile(path, len(data), Digest(hashlib.sha256(data).hexdigest()), path.endswith(".sh")), source))
    return write(files, folder / target)


TREE = {
    "config.json": b"{}",
    "empty": b"",
    "a block": bytes(512),
    "sub/run.sh": b"#!/bin/sh\n" * 100,
    "ünï\nçode": b"name",
    "deep/" + "/".join("folder" * 5 for _ in range(20)) + "/" + "n" * 240: b"too long for a plain header",
    "-rf": b"an option?",
    "odd": os.urandom(1537),
}


def test_an_ordinary_tar(tmp_path: Path) -> None:
    made = pack(tmp_path, TREE)
    data = (tmp_path / "pack").read_bytes()
    assert (made.size, made.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert unpacked(data, made.files) == {path: hashlib.sha256(body).hexdigest() for path, body in TREE.items()}
    for file in made.files:
        assert data[file.offset : file.offset + file.size] == TREE[file.path]
    (tmp_path / "out").mkdir()
    subprocess.run(["tar", "-x", "-f", tmp_path / "pack", "-C", tmp_path / "out"], check=True)
    for path, body in TREE.items():
        found = tmp_path / "out" / path
        assert found.read_bytes() == body and bool(found.stat().st_mode & 0o100) == path.endswith(".sh")
    listed = subprocess.check_output(["tar", "-t", "--quoting-style=literal", "-f", tmp_path / "pack"]).decode()
    assert listed == "".join(f"{path}\n" for path in TREE)


def test_size_is_known_before(tmp_path: Path) -> None:
    listed = [(path, len(data), path.endswith(".sh")) for path, data in TREE.items()]
    assert size_of(listed) == pack(tmp_path, TREE).size
    for length in (99, 100, 101):
        long = {"n" * length: b"x"}
        assert size_of([("n" * length, 1, False)]) == pack(tmp_path, long, f"pack-{length}").size
    for size, header in (((8 << 30) - 512, 512), (8 << 30, 3 * 512)):  # from there on it does not fit into a plain header
        assert size_of([("huge", size, False)]) == header + size + 1024


def test_the_same_files_give_the_same_pack(tmp_path: Path) -> None:
    first = pack(tmp_path, TREE)
    os.utime(tmp_path / "blob-0", (1, 1))
    assert pack(tmp_path, TREE, "again") == first
    assert (tmp_path / "pack").read_bytes() == (tmp_path / "again").read_bytes()
    assert pack(tmp_path, {**TREE, "odd": b"x"}, "other").sha256 != first.sha256


def test_an_empty_pack(tmp_path: Path) -> None:
    assert pack(tmp_path, {}).files == ()
    assert unpacked((tmp_path / "pack").read_bytes(), []) == {}


def test_nothing_wrong_is_packed(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"xyz")
    named = TreeFile("weights.bin", 3, Digest(hashlib.sha256(b"abc").hexdigest()), False)
    with pytest.raises(LocalMismatch, match=r"weights\.bin"):
        write([(named, tmp_path / "blob")], tmp_path / "pack")


def test_a_full_disk(tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(bytes(2 * MIB))
    named = TreeFile("weights.bin", 2 * MIB, Digest(hashlib.sha256(bytes(2 * MIB)).hexdigest()), False)
    with small_tmpfs(tmp_path / "small") as small, pytest.raises(NoSpace):
        write([(named, tmp_path / "blob")], small / "pack")


def files_of(sizes: list[int]) -> list[TreeFile]:
    return [TreeFile(f"{number}", size, Digest("0" * 64), False) for number, size in enumerate(sizes)]


@given(st.lists(st.integers(0, 300)))
def test_groups_keep_order_and_size(sizes: list[int]) -> None:
    groups = group(files_of(sizes), 1000)
    assert [file for files in groups for file in files] == files_of(sizes)
    assert all(files and sum(file.size for file in files) <= 1000 for files in groups)
    for before, after in pairwise(groups):
        assert sum(file.size for file in before) + after[0].size > 1000


@given(st.lists(st.tuples(st.integers(0, 2 * GAP_BYTES), st.integers(0, SPAN_BYTES + 10))), st.randoms())
@example([(0, 0), (0, 7), (0, 0), (0, 0)], random.Random(1))  # empty files lie where others begin and end
def test_runs_are_bounded_and_lose_nothing(steps: list[tuple[int, int]], chance: random.Random) -> None:
    position, files = 0, []
    for number, (gap, size) in enumerate(steps):
        files.append(Packed(f"{number}", position + gap, size))
        position += gap + size
    runs = spans(chance.sample(files, len(files)))
    assert sorted(file for run in runs for file in run) == sorted(files)
    places = [(file.offset, file.size) for run in runs for file in run]
    assert places == sorted(places)  # files of the same place, empty ones, may come in any order
    for run in runs:
        start, end = run[0].offset, run[-1].offset + run[-1].size
        assert all(start <= file.offset and file.offset + file.size <= end for file in run)
        assert len(run) == 1 or end - start <= SPAN_BYTES
        for before, after in pairwise(run):
            assert after.offset - (before.offset + before.size) <= GAP_BYTES
