"""Downloads on their way: a piece counts only if its bytes are there, whatever a kill or a power cut left (I1, I5)."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelcached.layout import Layout
from modelcached.model import Content
from modelcached.partials import FLUSH_BYTES, MAX_BUFFERS, Partial, Partials

from .kernel import file_size_limit, fuse, run_as

MIB = 1 << 20
PIECE = 64
DATA = random.Random(1).randbytes(PIECE * 20 + 17)
OFFSETS = range(0, len(DATA), PIECE)
LINE = len(b"0 64 01234567\n")


def sha256_of(data: bytes) -> Content:
    return Content("sha256", hashlib.sha256(data).hexdigest(), len(data))


def git_sha1_of(data: bytes) -> Content:
    return Content("git-sha1", hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest(), len(data), "a repo")


def write(partial: Partial, offset: int, data: bytes = DATA) -> None:
    piece = data[offset : offset + PIECE]
    partial.write(offset, [piece[:10], b"", piece[10:]])


def fill(partial: Partial, data: bytes = DATA) -> int:
    """Writes what is missing, as a download would; how many bytes that were."""
    count = 0
    for start, end in partial.missing():
        for offset in range(start, end, PIECE):
            piece = data[offset : min(offset + PIECE, end)]
            partial.write(offset, [piece])
            count += len(piece)
    assert partial.missing() == [] and partial.done_bytes == len(data)
    return count


def holes(partial: Partial) -> int:
    return sum(end - start for start, end in partial.missing())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "name"


@pytest.fixture
def map_path(path: Path) -> Path:
    return path.with_name("name.map")


@pytest.mark.parametrize("content", [sha256_of(DATA), git_sha1_of(DATA)], ids=["sha256", "git-sha1"])
@pytest.mark.parametrize("seed", range(4))
def test_pieces_in_any_order(path: Path, content: Content, seed: int) -> None:
    partial = Partial(path, content)
    assert partial.missing() == [(0, len(DATA))]
    order = random.Random(seed).sample(OFFSETS, len(OFFSETS)) if seed else [*OFFSETS]
    for offset in order[:-1]:
        write(partial, offset)
        assert partial.finish() is None
    assert partial.missing() == [(order[-1], min(order[-1] + PIECE, len(DATA)))]
    write(partial, order[-1])
    assert partial.finish() == hashlib.sha256(DATA).hexdigest()
    assert path.read_bytes() == DATA
    partial.close()
    again = Partial(path, content)
    assert again.missing() == [] and again.finish() == hashlib.sha256(DATA).hexdigest()
    again.close()


def test_pieces_from_many_threads(path: Path) -> None:
    data = random.Random(2).randbytes(8 << 20)
    size = 1 << 16
    partial = Partial(path, sha256_of(data))
    offsets = random.Random(3).sample(range(0, len(data), size), len(data) // size)
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda offset: partial.write(offset, [data[offset : offset + size]]), offsets))
    assert partial.done_bytes == len(data)
    assert partial.finish() == hashlib.sha256(data).hexdigest()
    partial.close()


@pytest.mark.parametrize("make", [sha256_of, git_sha1_of])
def test_wrong_bytes_start_over(path: Path, make: Callable[[bytes], Content]) -> None:
    """Every piece has the CRC it came with, and the whole is still not what its name says."""
    partial = Partial(path, make(DATA))
    fill(partial, bytes(len(DATA)))
    assert partial.finish() is None
    partial.reset()
    assert partial.missing() == [(0, len(DATA))] and partial.done_bytes == 0
    assert fill(partial) == len(DATA)
    assert partial.finish() == hashlib.sha256(DATA).hexdigest()
    partial.close()


def flip(path: Path, position: int) -> None:
    with open(path, "r+b") as file:
        file.seek(position)
        byte = file.read(1)
        file.seek(position)
        file.write(bytes([byte[0] ^ 4]))


def append(path: Path, data: bytes) -> None:
    with open(path, "ab") as file:
        file.write(data)


@pytest.mark.parametrize(
    ("damage", "lost"),
    [
        pytest.param(lambda data, lines: None, 0, id="nothing"),
        pytest.param(lambda data, lines: os.truncate(lines, lines.stat().st_size - 1), 17, id="last line without its end"),
        pytest.param(lambda data, lines: os.truncate(lines, LINE * 5 + 4), None, id="torn line"),
        pytest.param(lambda data, lines: os.truncate(lines, 0), len(DATA), id="empty map"),
        pytest.param(lambda data, lines: lines.unlink(), len(DATA), id="no map"),
        pytest.param(lambda data, lines: flip(data, 3), PIECE, id="flipped in the first piece"),
        pytest.param(lambda data, lines: flip(data, PIECE * 7), PIECE, id="flipped in the middle"),
        pytest.param(lambda data, lines: os.truncate(data, PIECE * 15 + 1), PIECE * 5 + 17, id="data cut off"),
        pytest.param(lambda data, lines: os.truncate(data, 0), len(DATA), id="no data"),
        pytest.param(lambda data, lines: data.unlink(), len(DATA), id="no data file"),
        pytest.param(lambda data, lines: lines.write_bytes(b"".join(reversed(lines.read_bytes().splitlines(True)))), 0, id="other order"),
        pytest.param(lambda data, lines: lines.write_bytes(lines.read_bytes() * 2), 0, id="everything twice"),
        pytest.param(lambda data, lines: append(lines, b"%d 64 00000000\n" % len(DATA)), 0, id="beyond the end"),
        pytest.param(lambda data, lines: append(lines, b"0 9999999 00000000\n-64 64 0\n0 0 0\n0 -1 0\n"), 0, id="odd numbers"),
        pytest.param(lambda data, lines: append(lines, b"\xff\0\nx y z\n1 2\n1 2 3 4\n\n" + b"9" * 5000 + b" 1 1\n"), 0, id="noise"),
    ],
)
def test_only_what_holds_is_believed(path: Path, map_path: Path, damage: Callable[[Path, Path], None], lost: int | None) -> None:
    partial = Partial(path, sha256_of(DATA))
    fill(partial)
    partial.close()
    damage(path, map_path)
    for _ in range(2):  # what the first one tidied up is still there for the second
        partial = Partial(path, sha256_of(DATA))
        assert lost is None or holes(partial) == lost
        assert partial.done_bytes == len(DATA) - holes(partial)
        assert partial.finish() == (sha256_of(DATA).hex if not holes(partial) else None)
        partial.close()
    partial = Partial(path, sha256_of(DATA))
    fill(partial)
    assert partial.finish() == sha256_of(DATA).hex and path.read_bytes() == DATA
    partial.close()
    assert sorted(os.listdir(path.parent)) == ["name", "name.map"]


@settings(max_examples=150)
@given(
    st.lists(
        st.tuples(
            st.randoms(use_true_random=False),
            st.integers(0, len(OFFSETS)),  # pieces written before the cut
            st.none() | st.integers(0, len(OFFSETS) * LINE + 80),  # the map cut there
            st.none() | st.integers(0, len(DATA)),  # the data cut there
            st.none() | st.integers(0, len(DATA) - 1),  # a byte flipped there
            st.binary(max_size=6) | st.sampled_from([b"64 64 ", b"1", b"0 1280 0000"]),  # what else got into the map
        ),
        min_size=1,
        max_size=4,
    )
)
def test_lives_that_end_anywhere(lives: list[tuple[random.Random, int, int | None, int | None, int | None, bytes]]) -> None:
    """However often it is cut: what is believed is right, what a cut cannot have touched is still there, and the end is whole."""
    with tempfile.TemporaryDirectory() as folder:
        path, map_path = Path(folder, "name"), Path(folder, "name.map")
        content = sha256_of(DATA)
        for chance, count, map_cut, data_cut, flipped, noise in lives:
            partial = Partial(path, content)
            gaps = [(start, min(start + PIECE, end)) for first, end in partial.missing() for start in range(first, end, PIECE)]
            for start, end in chance.sample(gaps, min(count, len(gaps))):
                partial.write(start, [DATA[start:end]])
            before = len(DATA) - holes(partial)
            partial.close()
            lines = map_path.stat().st_size
            cost = 0
            if map_cut is not None and map_cut < lines:
                os.truncate(map_path, map_cut)
                cost += ((lines - map_cut) // 8 + 1) * PIECE
            if data_cut is not None and data_cut < path.stat().st_size:
                cost += path.stat().st_size - data_cut + PIECE
                os.truncate(path, data_cut)
            if flipped is not None and flipped < path.stat().st_size:
                flip(path, flipped)
                cost += PIECE
            with open(map_path, "ab") as file:
                file.write(noise)
            partial = Partial(path, content)
            seen, position = path.read_bytes(), 0
            for start, end in [*partial.missing(), (len(DATA), len(DATA))]:
                assert seen[position:start] == DATA[position:start]
                position = end
            assert len(DATA) - holes(partial) >= before - cost
            partial.close()
        partial = Partial(path, content)
        fill(partial)
        assert partial.finish() == content.hex and path.read_bytes() == DATA
        partial.close()


def test_a_torn_line_does_not_cost_the_next_piece(path: Path, map_path: Path) -> None:
    """Two kills, one after the other: what was written between them counts."""
    partial = Partial(path, sha256_of(DATA))
    write(partial, 0)
    write(partial, PIECE)
    partial.close()
    os.truncate(map_path, map_path.stat().st_size - 3)
    partial = Partial(path, sha256_of(DATA))
    write(partial, PIECE * 5)
    partial.close()
    partial = Partial(path, sha256_of(DATA))
    assert partial.missing() == [(PIECE, PIECE * 5), (PIECE * 6, len(DATA))]
    partial.close()


def test_many_small_chunks(path: Path) -> None:
    """A slow line delivers less at a time than the kernel takes buffers for."""
    partial = Partial(path, sha256_of(DATA))
    assert len(DATA) > MAX_BUFFERS
    partial.write(0, [bytes([byte]) for byte in DATA])
    assert partial.finish() == sha256_of(DATA).hex
    partial.close()


def test_a_disk_that_takes_no_more(path: Path) -> None:
    """What did not fit does not count, and the rest does."""
    data = random.Random(4).randbytes(300_000)
    partial = Partial(path, sha256_of(data))
    partial.write(0, [data[:100_000]])
    with file_size_limit(150_000), pytest.raises(OSError, match="too large"):
        partial.write(100_000, [data[100_000:120_000], data[120_000:200_000]])
    assert partial.missing() == [(100_000, len(data))]
    partial.close()
    partial = Partial(path, sha256_of(data))
    assert partial.missing() == [(100_000, len(data))]
    partial.write(100_000, [data[100_000:]])
    assert partial.finish() == sha256_of(data).hex
    partial.close()


def test_killed_while_it_was_published(shared_tmp_path: Path) -> None:
    """Sealed already, its name not given yet: a daemon that is not root has to be able to go on."""
    shared_tmp_path.chmod(0o777)
    said = run_as(
        1500,
        """
path, data = Path(sys.argv[1]) / "name", b"x" * 1000
import hashlib
content = model.Content("sha256", hashlib.sha256(data).hexdigest(), len(data))
partial = partials.Partial(path, content)
partial.write(0, [data])
partial.close()
durable.seal(path)
partial = partials.Partial(path, content)
print(partial.missing(), partial.finish() == content.hex)
""",
        shared_tmp_path,
    )
    assert said == "[] True\n"


def test_readers_of_the_progress_see_it_grow(path: Path) -> None:
    """`missing` and `done_bytes` may be asked while threads write."""
    partial = Partial(path, sha256_of(DATA))
    ended = threading.Event()
    seen: list[int] = []

    def look() -> None:
        while not ended.is_set():
            seen.append(partial.done_bytes)
            partial.missing()

    with ThreadPoolExecutor(5) as threads:
        looking = threads.submit(look)
        list(threads.map(lambda offset: write(partial, offset), OFFSETS))
        ended.set()
        looking.result()
    assert seen == sorted(seen) and partial.done_bytes == len(DATA)
    partial.close()


class _Disk(Executor):
    """Flushes at once, and says how that went."""

    def __init__(self, error: OSError | None = None) -> None:
        self.error = error
        self.flushes = 0

    def submit(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        self.flushes += 1
        done: Future[Any] = Future()
        if self.error is None:
            done.set_result(function(*args, **kwargs))
        else:
            done.set_exception(self.error)
        return done


def test_what_is_there_goes_to_the_disk_while_more_is_coming(path: Path) -> None:
    data, disk = bytes(2 * FLUSH_BYTES + 1), _Disk()
    partial = Partial(path, sha256_of(data), disk)
    for offset in range(0, len(data), FLUSH_BYTES // 4):
        partial.write(offset, [data[offset : offset + FLUSH_BYTES // 4]])
    assert disk.flushes == 2
    assert partial.finish() == sha256_of(data).hex
    partial.close()


def test_what_the_disk_could_not_take_is_not_believed(path: Path) -> None:
    """The kernel tells an error once: afterwards the bytes look as if they were on the disk (I1)."""
    data = bytes(FLUSH_BYTES)
    partial = Partial(path, sha256_of(data), _Disk(OSError(errno.EIO, "a broken disk")))
    partial.write(0, [data])
    with pytest.raises(OSError, match="a broken disk"):
        partial.finish()
    partial.close()
    again = Partial(path, sha256_of(data))
    assert again.missing() == [(0, len(data))]
    again.close()


def fill_flushed(partial: Partial, data: bytes) -> None:
    for offset in range(0, len(data), MIB):
        partial.write(offset, [data[offset : offset + MIB]])


def test_large_ones_go_to_the_disk_on_the_way(tmp_path: Path) -> None:
    """Not all at once at the end; and nobody waits for it who only leaves."""
    data = bytes(FLUSH_BYTES + 2 * MIB)
    with fuse(tmp_path) as mount, ThreadPoolExecutor(1) as flusher:
        partial = Partial(mount / "name", sha256_of(data), flusher)
        fill_flushed(partial, data)
        assert partial.finish() == sha256_of(data).hex
        assert (tmp_path / "calls").read_text().splitlines().count("fsync /name") == 1
        partial.close()
        may_go_on = threading.Event()
        flusher.submit(may_go_on.wait, 10)
        before = len(os.listdir("/proc/self/fd"))
        partial = Partial(mount / "other", sha256_of(data), flusher)
        fill_flushed(partial, data)
        partial.close()
        may_go_on.set()
        flusher.submit(int).result()  # behind the flush
        assert len(os.listdir("/proc/self/fd")) == before
        partial = Partial(mount / "other", sha256_of(data), flusher)
        assert partial.missing() == []
        partial.close()


def test_what_could_not_reach_the_disk_is_not_believed(tmp_path: Path) -> None:
    """The kernel tells it once; from then on the pages look as if they had been written."""
    data = bytes(FLUSH_BYTES + 2 * MIB)
    with fuse(tmp_path, refuse="fsync") as mount, ThreadPoolExecutor(1) as flusher:
        partial = Partial(mount / "name", sha256_of(data), flusher)
        fill_flushed(partial, data)
        with pytest.raises(OSError, match="Input/output error"):
            partial.finish()
        partial.close()
        partial = Partial(mount / "name", sha256_of(data), flusher)
        assert partial.missing() == [(0, len(data))]
        partial.close()


def test_downloads_that_end_while_they_are_counted(tmp_path: Path) -> None:
    """Every admission counts them, and a file that went is no error."""
    layout, is_over = Layout(tmp_path), threading.Event()
    layout.partials.mkdir()
    files = [layout.partials / f"{number}" for number in range(200)]

    def come_and_go() -> None:
        while not is_over.is_set():
            for file in files:
                file.write_bytes(b"x" * 5000)
            for file in files:
                file.unlink()

    partials, sizes = Partials(layout), list[int]()
    with ThreadPoolExecutor(1) as other:
        ends = other.submit(come_and_go)
        try:
            while sum(size > 0 for size in sizes[-2000:]) < 1000:
                sizes.append(partials.size_bytes())
        finally:
            is_over.set()
        ends.result()
    assert max(sizes) <= sum(8192 for _ in files) and partials.size_bytes() == 0
    partials.close()
