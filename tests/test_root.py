"""A root is ours alone, of a format we know, on a disk that keeps its promises; else nothing in it is touched."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from modelcached.errors import InUse, RootError
from modelcached.layout import PRIVATE_FOLDERS
from modelcached.root import open_root

from .daemon import clean_environment
from .kernel import fuse, read_only, require_root, run_as


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "root"


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path.relative_to(folder)): (path.lstat().st_mode, path.lstat().st_size) for path in folder.rglob("*")}


def opened(path: Path, private: bool = True) -> None:
    _, lock = open_root(path, private)
    os.close(lock)


@pytest.mark.parametrize(("private", "mode"), [(True, 0o700), (False, 0o755)])
def test_a_new_root(path: Path, private: bool, mode: int) -> None:
    layout, lock = open_root(path, private)
    assert stat.S_IMODE(path.stat().st_mode) == mode
    for name in PRIVATE_FOLDERS:
        assert stat.S_IMODE((path / name).stat().st_mode) == 0o700
    assert stat.S_IMODE(layout.views.stat().st_mode) == 0o711
    assert all(shard.is_dir() for shard in layout.shards()) and len(os.listdir(layout.blobs)) == 256
    assert layout.version.read_text() == "1\n" and layout.lock.read_text() == f"{os.getpid()}\n"
    assert os.listdir(layout.tmp) == []
    os.close(lock)
    before = snapshot(path)
    opened(path, private)
    assert snapshot(path) == before


def test_tmp_is_emptied_and_the_rest_stays(shared_tmp_path: Path) -> None:
    """As a user to whom read-only folders are read-only."""
    shared_tmp_path.chmod(0o777)
    said = run_as(
        1500,
        """
top = Path(sys.argv[1])
layout, lock = root.open_root(top / "root", private=True)
os.close(lock)
(top / "elsewhere").mkdir(); (top / "elsewhere/file").touch()
(layout.tmp / "view/a/b").mkdir(parents=True)
(layout.tmp / "view/a/b/file").touch(0o444)
for folder in ("view/a/b", "view/a", "view"): (layout.tmp / folder).chmod(0o500)
(layout.tmp / "file").touch(0o000)
(layout.tmp / "link").symlink_to(top / "elsewhere")
for name in ("aa", "aa.map", "published", "published.map", "git-1-2", "git-1-2.map", "bb.map", "cc.new", "dd"):
    (layout.partials / name).write_text(name)
os.link(layout.partials / "published", layout.blobs / "00" / "published")
(layout.views / "shown").mkdir()
(layout.leases / "held").mkdir()
layout, lock = root.open_root(top / "root", private=True)
print(os.listdir(layout.tmp), os.listdir(top / "elsewhere"), os.listdir(layout.views), os.listdir(layout.leases))
print(*sorted(os.listdir(layout.partials)), (layout.blobs / "00/published").stat().st_nlink)
""",
        shared_tmp_path,
    )
    # A kill between the two names of a published download leaves a second one; "bb.map" has no data; "cc.new" was never complete.
    assert said.splitlines() == ["[] ['file'] ['shown'] ['held']", "aa aa.map dd git-1-2 git-1-2.map 1"]


def test_a_start_that_was_killed_is_taken_up(path: Path) -> None:
    opened(path)
    (path / "VERSION").unlink()
    for shard in ("00", "7f", "ff"):
        (path / "blobs/sha256" / shard).rmdir()
    opened(path)
    assert len(os.listdir(path / "blobs/sha256")) == 256 and (path / "VERSION").exists()


@pytest.mark.parametrize("found", ["2\n", "99", "", "1.0", "one", "-1", "x" * 1000])
def test_a_format_we_do_not_know(path: Path, found: str) -> None:
    opened(path)
    (path / "VERSION").write_text(found)
    (path / "tmp/theirs").touch()
    before = snapshot(path)
    with pytest.raises(RootError, match="this daemon knows formats up to 1") as caught:
        opened(path)
    assert caught.value.hint == "upgrade the daemon, or choose another root"
    assert snapshot(path) == before


def test_a_folder_with_something_else(path: Path) -> None:
    path.mkdir(parents=True)
    for name in ("thesis.tex", "photos", "x", "y"):
        (path / name).touch()
    before = snapshot(path)
    with pytest.raises(RootError, match=r"not empty and no root of modelcached: it holds photos, thesis\.tex, x") as caught:
        opened(path)
    assert caught.value.hint == "choose an empty folder"
    assert snapshot(path) == before


def test_a_new_filesystem_is_empty(path: Path) -> None:
    (path / "lost+found").mkdir(parents=True)
    opened(path)
    assert (path / "lost+found").exists()


def test_one_daemon_per_root(path: Path) -> None:
    _, lock = open_root(path, True)
    (path / "tmp/ours").touch()
    code = "import sys; from pathlib import Path; from modelcached.root import open_root; open_root(Path(sys.argv[1]), True)"
    second = subprocess.run([sys.executable, "-c", code, path], env=clean_environment(), capture_output=True, text=True, timeout=15)
    assert f"another daemon (pid {os.getpid()}) uses the root" in second.stderr and second.returncode == 1
    with pytest.raises(InUse, match="another daemon") as caught:
        opened(path)
    assert isinstance(caught.value, RootError)
    assert (path / "tmp/ours").exists()  # whoever is refused cleans nothing up
    os.close(lock)
    opened(path)


def test_a_dead_daemon_holds_nothing(path: Path) -> None:
    code = """
import os, signal, sys
from pathlib import Path
from modelcached.root import open_root
open_root(Path(sys.argv[1]), True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", code, path], env=clean_environment(), timeout=15).returncode == -9
    opened(path)


def test_somebody_elses_root(shared_tmp_path: Path) -> None:
    require_root()
    opened(shared_tmp_path / "root", private=False)
    os.chown(shared_tmp_path / "root", 1500, 1500)
    before = snapshot(shared_tmp_path)
    with pytest.raises(RootError, match="belongs to uid 1500, and the daemon is uid 0") as caught:
        opened(shared_tmp_path / "root")
    assert "chown -R 0 " in caught.value.hint
    assert snapshot(shared_tmp_path) == before
    os.chown(shared_tmp_path / "root", 0, 0)
    code = """
try:
    root.open_root(Path(sys.argv[1]), True)
except errors.RootError as error:
    print(error.message)
"""
    assert "belongs to uid 0, and the daemon is uid 1500" in run_as(1500, code, shared_tmp_path / "root")
    said = run_as(1500, code, shared_tmp_path / "root/blobs/cannot/see")
    assert "can't be used: Permission denied" in said
    assert snapshot(shared_tmp_path) == before


@pytest.mark.parametrize("kind", ["file", "read-only", "file above"])
def test_what_cannot_be_a_root(path: Path, kind: str) -> None:
    path.parent.mkdir()
    if kind == "file":
        path.touch()
    with read_only(path.parent):
        target = path / "below" if kind == "file above" else path
        with pytest.raises(RootError, match="can't be used") as caught:
            opened(target)
    assert "mounted read-write" in caught.value.hint


def test_fuse_is_refused(tmp_path: Path) -> None:
    with fuse(tmp_path) as mount:
        (tmp_path / "calls").write_text("")
        with pytest.raises(RootError, match=r"lies on fuse[.\w]*, where locks and links can't be trusted") as caught:
            opened(mount)
        assert "ext4" in caught.value.hint
    assert (tmp_path / "calls").read_text() == ""  # nothing was tried


@pytest.mark.parametrize("answer", ["EPERM", "EOPNOTSUPP", "ENOSYS"])
def test_a_disk_without_hard_links_is_refused(tmp_path: Path, answer: str) -> None:
    with fuse(tmp_path, refuse=f"link:{answer}", block_device=True) as mount:
        with pytest.raises(RootError, match="lies on fuseblk, which has no hard links") as caught:
            opened(mount)
        assert caught.value.hint == "choose a root on ext4, xfs or btrfs"
        assert os.listdir(mount / "tmp") == [] and not (mount / "VERSION").exists()
