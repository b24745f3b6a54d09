"""Cheap looks at files: each format whole, cut off, and full-size before it is written."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
from pathlib import Path

import pytest

from modelcache import formats


def safetensors(size: int = 4096) -> bytes:
    header = json.dumps({"__metadata__": {"format": "pt"}, "w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    return struct.pack("<Q", len(header)) + header + b"w" * size


def archive() -> bytes:
    """As torch.save makes it: a zip whose members are stored."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as zipped:
        zipped.writestr("archive/data.pkl", pickle.dumps({"step": 1}))
        zipped.writestr("archive/data/0", b"w" * 4096)
    return made.getvalue()


def hdf5(version: int, size: int = 4096, flags: int = 0) -> bytes:
    """A superblock by the specification, and nothing in it."""
    signature = b"\x89HDF\r\n\x1a\n"
    addresses = struct.pack("<QQQQ", 0, 2**64 - 1, size, 2**64 - 1)
    if version < 2:
        made = signature + bytes([version, 0, 0, 0, 0, 8, 8, 0]) + struct.pack("<HHI", 4, 16, 0) + (b"\0" * 4 if version else b"")
    else:
        made = signature + bytes([version, 8, 8, flags])
    return (made + addresses).ljust(size, b"\0")


WHOLE = {
    "model.safetensors": safetensors(),
    "pytorch_model.bin": archive(),
    "epoch=1.ckpt": archive(),
    "old.pt": b"\x80\x02" + pickle.dumps([1, 2, 3]),
    "m.keras": archive(),
    "m.weights.h5": hdf5(0),
    "m1.h5": hdf5(1),
    "m2.h5": hdf5(2),
    "m3.hdf5": hdf5(3),
    "trainer_state.json": b'{"global_step": 1}',
    "unknown.dat": b"",
    "latest": b"global_step1",
}
BROKEN = {
    "empty.safetensors": b"",
    "cut.safetensors": safetensors()[:-1],
    "long.safetensors": safetensors() + b"\0",
    "zeros.safetensors": b"\0" * len(safetensors()),
    "header.safetensors": struct.pack("<Q", 50) + b"\0" * 5000,
    "list.safetensors": struct.pack("<Q", 4) + b"[1] " + b"\0" * 100,
    "odd.safetensors": struct.pack("<Q", 12) + b'{"w": [1,2]}' + b"\0" * 100,
    "empty.pt": b"",
    "zeros.pt": b"\0" * 4096,
    "cut.ckpt": archive()[:-30],
    "half.ckpt": archive()[:3000],
    "hole.ckpt": archive()[:64] + b"\0" * 4000 + archive()[4064:],
    "text.keras": b"no zip at all",
    "cut.h5": hdf5(0)[:-1],
    "cut2.h5": hdf5(2)[:-1],
    "open.h5": hdf5(3, flags=1),
    "swmr.h5": hdf5(3, flags=5),
    "cut.json": b'{"global_step": 1',
    "latin.json": b'"\xff"',
}


def problem(folder: Path, name: str, data: bytes) -> str:
    (folder / name).write_bytes(data)
    descriptor = os.open(folder / name, os.O_RDONLY)
    try:
        return formats.problem(descriptor, name)
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("name", WHOLE)
def test_nothing_speaks_against_a_whole_file(tmp_path: Path, name: str) -> None:
    assert problem(tmp_path, name, WHOLE[name]) == ""


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_not_whole_is_told(tmp_path: Path, name: str) -> None:
    assert problem(tmp_path, name, BROKEN[name])


@pytest.mark.parametrize("name", ["model.safetensors", "epoch=1.ckpt", "m.weights.h5", "m2.h5", "trainer_state.json"])
def test_no_beginning_of_a_file_is_whole(tmp_path: Path, name: str) -> None:
    data = WHOLE[name]
    for size in sorted({*range(0, len(data), 97), len(data) - 1}):
        assert problem(tmp_path, name, data[:size]), size


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, ...]:
            return (os.mkdir, (str(tmp_path / "sprung"),))

    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as zipped:
        zipped.writestr("archive/data.pkl", pickle.dumps(Trap()))
    assert problem(tmp_path, "trap.pt", made.getvalue()) == "" == problem(tmp_path, "old.pt", pickle.dumps(Trap()))
    assert not (tmp_path / "sprung").exists()
