"""Tars read from afar: what Python's own tarfile reads, each byte asked for once; what is damaged or leads out is refused."""

from __future__ import annotations

import asyncio
import io
import itertools
import os
import random
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelcached.errors import StoreMismatch, UnsafePath
from modelcached.spans import Span
from modelcached.tars import WINDOW_BYTES, Member, TarReader

KINDS = {tarfile.DIRTYPE: "folder", tarfile.SYMTYPE: "link", tarfile.LNKTYPE: "second name"}
LARGE = 1 << 20  # bytes: what is larger a caller fetches by itself
FORMATS = {"pax": tarfile.PAX_FORMAT, "gnu": tarfile.GNU_FORMAT}


class Remote:
    """Bytes somewhere else, and which of them were asked for."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.asked: list[Span] = []

    async def fetch(self, span: Span) -> bytes:
        assert 0 <= span[0] < span[1] <= len(self.data) and span[1] - span[0] <= WINDOW_BYTES
        self.asked.append(span)
        return self.data[span[0] : span[1]]


async def read(data: bytes) -> tuple[list[tuple[Member, bytes]], list[Span]]:
    """Every member with its bytes; of large files, those that were there already."""
    remote = Remote(data)
    reader = TarReader(len(data), remote.fetch)
    found = []
    while (member := await reader.next()) is not None:
        found.append((member, reader.known(member) if member.size > LARGE else await reader.data(member)))
    return found, remote.asked


def make(form: int, *infos: tuple[tarfile.TarInfo, bytes]) -> bytes:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", format=form) as tar:
        for info, data in infos:
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return raw.getvalue()


def info(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type, made.linkname = kind, target
    return made


@pytest.fixture(params=FORMATS)
def data(request: pytest.FixtureRequest, tmp_path: Path) -> bytes:
    """As metaflow-checkpoint writes it: a folder's contents at the top."""
    source = tmp_path / "source"
    for number, size in enumerate([0, 1, 511, 512, 513, 1 << 20, (1 << 20) + 1, 3 << 20, 9 << 20, 700, 1 << 20, 2, 5 << 20, 0]):
        path = source / f"{number % 3}" / ("ünïcode " * (number % 4) * 6) / f"{'n' * 120}-{number}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(random.Random(number).randbytes(size))
        path.chmod(0o755 if number % 2 else 0o644)
    (source / "link").symlink_to("0/" + "to" * 80)
    (source / "empty").mkdir()
    os.link(path, source / "zz")
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w", format=FORMATS[request.param]) as tar:
        tar.add(source, arcname="")
    return raw.getvalue()


def test_what_tarfile_reads(data: bytes) -> None:
    found, asked = asyncio.run(read(data))  # a loop of its own: these are many bytes for one thread
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        expected = tar.getmembers()
        for (member, known), theirs in zip(found, expected, strict=True):
            kind = KINDS.get(theirs.type, "file")
            assert member == (theirs.name, kind, theirs.linkname, theirs.size, theirs.offset_data, bool(theirs.mode & 0o100))
            if kind == "file":
                whole = data[member.offset : member.offset + member.size]
                assert whole.startswith(known) and (known == whole or member.size > LARGE)
                asked += [(member.offset + len(known), member.offset + member.size)] if known != whole else []
    asked.sort()
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(asked)), "a byte was asked for twice"


@pytest.mark.parametrize(
    "bad",
    [
        info("../x"),
        info("a/../../x"),
        info("/etc/passwd"),
        info("./x"),
        info("a//b"),
        info(""),
        info("nul\udc80"),
        info("device", tarfile.CHRTYPE),
        info("disk", tarfile.BLKTYPE),
        info("pipe", tarfile.FIFOTYPE),
        info("what", b"Z"),
        info("../folder", tarfile.DIRTYPE),
        info("../link", tarfile.SYMTYPE, "x"),
    ],
    ids=lambda bad: f"{bad.name!a} {bad.type!a}",
)
async def test_what_must_not_be_in_one(bad: tarfile.TarInfo) -> None:
    with pytest.raises(UnsafePath):
        await read(make(tarfile.GNU_FORMAT, (info("good"), b"data"), (bad, b"")))


async def test_a_sparse_file_is_refused() -> None:
    sparse = info("sparse")
    sparse.pax_headers = {"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.map": "0,4", "GNU.sparse.size": "10"}
    with pytest.raises(UnsafePath):
        await read(make(tarfile.PAX_FORMAT, (sparse, b"data")))


SMALL = make(tarfile.PAX_FORMAT, (info("ü" * 60), b"data" * 300), (info("link", tarfile.SYMTYPE, "x"), b""), (info("b"), b"1"))


@pytest.mark.parametrize("length", [0, 1, 511, 512, 700, 1024, 1536, 2000, 3000, 4096, 4500])
async def test_a_tar_that_breaks_off(length: int) -> None:
    with pytest.raises(StoreMismatch):
        await read(SMALL[:length])


@given(st.lists(st.tuples(st.integers(0, len(SMALL) - 1), st.integers(0, 255)), min_size=1, max_size=8))
async def test_damage_has_a_name(changes: list[tuple[int, int]]) -> None:
    damaged = bytearray(SMALL)
    for place, value in changes:
        damaged[place] = value
    try:
        found, _ = await read(bytes(damaged))
    except (StoreMismatch, UnsafePath):
        return
    assert all(member.offset + member.size <= len(SMALL) for member, _ in found)


async def test_a_name_without_end() -> None:
    endless = info("././@LongLink", tarfile.GNUTYPE_LONGNAME)
    with pytest.raises(StoreMismatch):
        await read(make(tarfile.GNU_FORMAT, (endless, b"n" * (2 << 20)), (info("x"), b"")))
