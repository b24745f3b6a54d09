"""Publication: sealed, synced, then named, each name once; what fails leaves nothing. The failures are the kernel's own."""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from modelcached import durable
from modelcached.durable import MTIME_NS, Staged

from .kernel import file_size_limit, fuse, read_only, run_as, small_tmpfs


def stage(folder: Path, name: str, data: bytes = b"data", executable: bool = False, target: Path | None = None) -> Staged:
    source = folder / f"tmp-{name}-{os.urandom(4).hex()}"
    source.write_bytes(data)
    return Staged(source, target or folder / name, executable)


def test_a_batch_is_published(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    batch = [stage(tmp_path, f"{number}", b"%d" % number, number % 2 == 1, tmp_path / "sub" / f"{number}") for number in range(20)]
    with ThreadPoolExecutor(4) as threads:
        durable.publish(batch, threads.map)
    for number, staged in enumerate(batch):
        found = staged.target.stat()
        assert stat.S_IMODE(found.st_mode) == (0o555 if number % 2 else 0o444)
        assert (found.st_mtime_ns, found.st_nlink) == (MTIME_NS, 1)
        assert staged.target.read_bytes() == b"%d" % number
    assert os.listdir(tmp_path) == ["sub"]


def test_a_name_is_given_once(tmp_path: Path) -> None:
    durable.publish([stage(tmp_path, "a", b"first")], map)
    durable.publish([stage(tmp_path, "a", b"second"), stage(tmp_path, "b", b"other")], map)
    assert (tmp_path / "a").read_bytes() == b"first"
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]
    everybody = threading.Barrier(8)

    def publish(number: int) -> None:
        staged = stage(tmp_path, "c", b"%d" % number * 100_000)
        everybody.wait(10)
        durable.publish([staged], map)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(publish, range(8)))
    data = (tmp_path / "c").read_bytes()
    assert len(data) == 100_000 and len(set(data)) == 1
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "c"]


def test_a_name_comes_after_its_bytes_are_safe(tmp_path: Path) -> None:
    """As the kernel was told: every file sealed and synced, then the links, then each folder once (I1)."""
    with fuse(tmp_path) as mount:
        (mount / "blobs").mkdir()
        batch = [stage(mount, name, target=mount / "blobs" / name) for name in "ab"]
        (tmp_path / "calls").write_text("")
        durable.publish(batch, map)
    one, two = (f"/{staged.source.name}" for staged in batch)
    assert (tmp_path / "calls").read_text().splitlines() == [
        *(f"{call} {one}" for call in ("chmod", "utimens", "fsync")),
        *(f"{call} {two}" for call in ("chmod", "utimens", "fsync")),
        "link /blobs/a",
        "link /blobs/b",
        "fsyncdir /blobs",
        f"unlink {one}",
        f"unlink {two}",
    ]


@pytest.mark.parametrize("call", ["fsync", "utimens", "chmod", "link"])
def test_an_error_drops_the_files(tmp_path: Path, call: str) -> None:
    """A failed fsync is never tried again: the kernel may have thrown the bytes away."""
    with fuse(tmp_path, refuse=call) as mount:
        batch = [stage(mount, name) for name in "ab"]
        (tmp_path / "calls").write_text("")
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            durable.publish(batch, map)
        assert os.listdir(mount) == []
    assert [line.split()[0] for line in (tmp_path / "calls").read_text().splitlines()].count(call) == 1


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    with read_only(target), pytest.raises(OSError) as caught:  # noqa: PT011 - the errno is the claim
        durable.publish([stage(tmp_path, "a", target=target / "a")], map)
    assert caught.value.errno in (errno.EXDEV, errno.EROFS)
    assert [*tmp_path.iterdir()] == [target] and os.listdir(target) == []


def full(folder: Path) -> AbstractContextManager[Path]:
    return small_tmpfs(folder, "64k")


def limited(folder: Path) -> AbstractContextManager[None]:
    return file_size_limit(1 << 16)


@pytest.mark.parametrize("place", [full, limited])
@pytest.mark.parametrize("writer", [durable.write, durable.record])
def test_no_room_keeps_what_was_there(
    tmp_path: Path, writer: Callable[[Path, bytes, Path], None], place: Callable[[Path], AbstractContextManager[object]]
) -> None:
    with place(tmp_path):
        writer(tmp_path / "file", b"old", tmp_path / "tmp")
        with pytest.raises(OSError) as caught:  # noqa: PT011 - the errno is the claim
            writer(tmp_path / "file", b"x" * (1 << 20), tmp_path / "tmp")
        assert caught.value.errno in (errno.ENOSPC, errno.EFBIG)
        assert (tmp_path / "file").read_bytes() == b"old"
        assert os.listdir(tmp_path) == ["file"]


def test_a_write_that_cannot_be_synced(tmp_path: Path) -> None:
    with fuse(tmp_path, refuse="fsync") as mount:
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            durable.write(mount / "file", b"new", mount / "tmp")
        assert os.listdir(mount) == []


@pytest.mark.parametrize("writer", [durable.write, durable.record])
def test_readers_see_the_old_bytes_or_the_new_ones(tmp_path: Path, writer: Callable[[Path, bytes, Path], None]) -> None:
    path = tmp_path / "file"
    writer(path, b"0" * 50_000, tmp_path / "tmp")
    torn: list[bytes] = []
    ended = threading.Event()

    def read() -> None:
        while not ended.is_set():
            data = path.read_bytes()
            if len(data) != 50_000 or len(set(data)) != 1:
                torn.append(data)

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(50):
        writer(path, b"%d" % (number % 10) * 50_000, tmp_path / "tmp")
    ended.set()
    reader.join()
    assert torn == []


def test_read_only_folders_can_be_removed(shared_tmp_path: Path) -> None:
    """By somebody to whom permissions mean something; what links lead to stays."""
    shared_tmp_path.chmod(0o777)
    made = run_as(
        1500,
        """
top = Path(sys.argv[1])
(top / "kept").mkdir(); (top / "kept/file").touch()
(top / "old/a/b").mkdir(parents=True)
(top / "old/a/b/file").touch(0o444); (top / "old/a/link").symlink_to(top / "kept")
for folder in ("old/a/b", "old/a", "old"): (top / folder).chmod(0o555)
durable.remove_tree(top / "old")
print(sorted(str(path.relative_to(top)) for path in top.rglob("*")), oct((top / "kept").stat().st_mode))
""",
        shared_tmp_path,
    )
    assert made.split(" 0o")[0] == "['kept', 'kept/file']"
