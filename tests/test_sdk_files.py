"""Private copies: writable, all at once or not at all, and nobody else's files touched."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from modelcache import files

from .fake_daemon import WAIT_SECONDS
from .test_sdk_connection import sdk_path


@pytest.fixture
def view(tmp_path: Path) -> Path:
    view = tmp_path / "view"
    (view / "sub" / "empty").mkdir(parents=True)
    (view / "config.json").write_bytes(b"{}")
    (view / "sub" / "weights ä").write_bytes(os.urandom(3 << 20))
    (view / "sub" / "nothing").touch()
    (view / "run.sh").write_text("#!/bin/sh\n")
    (view / "sub" / "link").symlink_to("../config.json")
    for path in view.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(0o555 if path.suffix == ".sh" else 0o444)
    return view


def shape(folder: Path) -> dict[str, object]:
    found: dict[str, object] = {}
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        found[name] = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
    return found


def modes(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.lstat().st_mode & 0o777 for path in folder.rglob("*") if not path.is_symlink()}


def test_copy_tree(view: Path, tmp_path: Path) -> None:
    target = tmp_path / "some" / "where"
    assert files.copy_tree(str(view), str(target)) == []
    assert shape(target) == shape(view)
    assert modes(target) == {
        "config.json": 0o644, "run.sh": 0o755, "sub": 0o755, "sub/empty": 0o755, "sub/nothing": 0o644, "sub/weights ä": 0o644,
    }  # fmt: skip
    (target / "config.json").write_bytes(b"mine")  # a copy, not a link
    assert (view / "config.json").read_bytes() == b"{}"


def test_running_twice_replaces_ours_and_names_the_rest(view: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    files.copy_tree(str(view), str(target))
    (target / "config.json").write_bytes(b"changed by the task")
    (target / "sub" / "notes.txt").write_bytes(b"mine")
    (target / ".cache" / "huggingface").mkdir(parents=True)
    (target / ".cache" / "huggingface" / "x.metadata").touch()  # huggingface_hub's own notes in such folders
    opened = (target / "run.sh").open()
    foreign = files.copy_tree(str(view), str(target))
    assert foreign == ["sub/notes.txt"]
    assert (target / "sub" / "notes.txt").read_bytes() == b"mine"
    assert (target / "config.json").read_bytes() == b"{}"
    assert opened.read() == "#!/bin/sh\n"  # who had the old file open still reads it: replaced, not written over
    assert os.fstat(opened.fileno()).st_nlink == 0
    opened.close()


def test_many_foreign_files_are_not_all_named(view: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    for number in range(50):
        (target / f"n{number}").touch()
    foreign = files.copy_tree(str(view), str(target))
    assert len(foreign) == 11
    assert files.foreign_warning("t", foreign).endswith(", ...")
    assert files.foreign_warning("t", ["a", "b"]) == "t also holds files that were there before; they stay: a, b"


def test_the_umask_counts(view: Path, tmp_path: Path) -> None:
    old = os.umask(0o077)
    try:
        files.copy_tree(str(view), str(tmp_path / "target"))
    finally:
        os.umask(old)
    assert set(modes(tmp_path / "target").values()) == {0o600, 0o700}


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"old")
    with pytest.raises(FileNotFoundError):
        files.copy_file(str(tmp_path / "none"), str(target))
    (tmp_path / "folder").mkdir()
    source = tmp_path / "source"
    source.write_bytes(b"new")
    with pytest.raises(OSError, match="folder"):  # a folder is in the way: nothing is thrown away
        files.copy_file(str(source), str(tmp_path / "folder"))
    assert target.read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "source", "target"]


def test_readers_never_see_half_a_file(tmp_path: Path) -> None:
    contents = [bytes([letter]) * (1 << 20) for letter in b"ab"]
    for number, content in enumerate(contents):
        (tmp_path / f"source{number}").write_bytes(content)
    target = tmp_path / "target"
    files.copy_file(str(tmp_path / "source0"), str(target))
    started, done = threading.Event(), threading.Event()
    wrong: list[int] = []

    def read() -> None:
        while not done.is_set():
            started.set()
            if target.read_bytes() not in contents:
                wrong.append(1)

    reader = threading.Thread(target=read)
    reader.start()
    started.wait(WAIT_SECONDS)
    for number in range(20):
        files.copy_file(str(tmp_path / f"source{number % 2}"), str(target))
    done.set()
    reader.join()
    assert wrong == []


def test_across_filesystems(view: Path) -> None:
    """To memory: no shared blocks, and the kernel copies between unlike filesystems no more (5.19): plain reading and writing."""
    target = Path("/dev/shm") / f"modelcache-test-{os.getpid()}"
    try:
        files.copy_tree(str(view), str(target))
        assert shape(target) == shape(view)
        assert files.can_clone(str(view / "config.json"), "/dev/shm") is False
        assert list(target.parent.glob(".modelcache-*")) == []
    finally:
        subprocess.run(["rm", "-rf", target], check=True)


def test_put_link_and_put_text(tmp_path: Path) -> None:
    files.put_link("a", str(tmp_path / "link"))
    files.put_link("b", str(tmp_path / "link"))
    files.put_text("ä", str(tmp_path / "text"))
    files.put_text("ö", str(tmp_path / "text"))
    assert (os.readlink(tmp_path / "link"), (tmp_path / "text").read_text()) == ("b", "ö")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "text"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a filesystem")
def test_reflinks_share_blocks_and_no_writes(tmp_path: Path) -> None:
    """On a filesystem that can: XFS or btrfs on a loop device."""
    place = mounted_with_reflinks(tmp_path)
    try:
        source = place / "source"
        source.write_bytes(os.urandom(8 << 20))
        before = os.statvfs(place).f_bfree
        assert files.can_clone(str(source), str(place))
        files.copy_file(str(source), str(place / "copy"))
        os.sync()
        assert before - os.statvfs(place).f_bfree < 512  # blocks of 4 KiB: not the 2048 of a second copy
        with (place / "copy").open("r+b") as file:
            file.write(b"mine")
        assert source.read_bytes()[:4] != b"mine"
    finally:
        subprocess.run(["umount", place], check=True)


def mounted_with_reflinks(tmp_path: Path) -> Path:
    image, place = tmp_path / "image", tmp_path / "mnt"
    place.mkdir()
    with image.open("wb") as file:
        file.truncate(400 << 20)
    for make in (["mkfs.xfs", "-q", "-m", "reflink=1"], ["mkfs.btrfs", "-q"]):
        try:
            made = subprocess.run([*make, image], capture_output=True)
        except FileNotFoundError:
            continue
        if made.returncode == 0 and subprocess.run(["mount", "-o", "loop", image, place], capture_output=True).returncode == 0:
            return place
    pytest.skip("needs mkfs.xfs or mkfs.btrfs and loop devices")


def test_an_interrupted_copy_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "view").mkdir()
    with (tmp_path / "view" / "big").open("wb") as file:
        file.truncate(1 << 40)  # nothing to read, and no end to it
    code = "import sys; from modelcache import files; print('go', flush=True); files.copy_tree(sys.argv[1], sys.argv[2])"
    with subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / "view", tmp_path / "target"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | sdk_path(),
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.send_signal(2)
        assert b"KeyboardInterrupt" in process.stderr.read()
    assert not (tmp_path / "target").exists() or list((tmp_path / "target").iterdir()) == []
