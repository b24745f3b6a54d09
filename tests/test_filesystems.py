"""What the kernel says a path lies on, whatever the mount points are called."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from modelcached.filesystems import filesystem_type, is_local

from .kernel import fuse, mounted, small_tmpfs


def test_what_the_kernel_says(tmp_path: Path) -> None:
    for path in (tmp_path, Path("/proc"), Path("/sys"), Path("/dev"), Path("/")):
        said = subprocess.check_output(["findmnt", "--noheadings", "--output", "FSTYPE", "--target", path], text=True)
        assert filesystem_type(path) == said.split()[-1]
    assert is_local(tmp_path)


NAMES = ["plain", "with space", "tab\tand\nnewline", "back\\slash", "\\040", "dätä", "数据", "a - b", "\u2028", "x\ry"]


@pytest.mark.parametrize("name", NAMES)
def test_mount_points_of_any_name(tmp_path: Path, name: str) -> None:
    with small_tmpfs(tmp_path / name) as mount:
        assert filesystem_type(mount) == "tmpfs"
        assert filesystem_type(mount / "not/yet/there") == "tmpfs"
        assert filesystem_type(mount / "..") == filesystem_type(tmp_path) != "tmpfs"


def test_a_mount_point_that_is_not_utf8(tmp_path: Path) -> None:
    """Somebody else's: the daemon has to start all the same."""
    mount = Path(os.fsdecode(bytes(tmp_path) + b"/d\xe4t\xe4"))
    with small_tmpfs(mount):
        assert filesystem_type(mount) == "tmpfs" and is_local(tmp_path)


def test_the_mount_on_top_counts(tmp_path: Path) -> None:
    with small_tmpfs(tmp_path / "outer") as outer, mounted(outer / "inner", "-t", "ramfs", "none") as inner:
        (tmp_path / "link").symlink_to(inner)
        assert filesystem_type(tmp_path / "link" / "file") == "ramfs"
        assert filesystem_type(outer) == "tmpfs"
        with small_tmpfs(inner):
            assert filesystem_type(inner) == "tmpfs"
        assert filesystem_type(inner) == "ramfs"


def test_fuse_is_not_local(tmp_path: Path) -> None:
    with fuse(tmp_path / "fuse") as mount:
        assert filesystem_type(mount).startswith("fuse") and not is_local(mount) and not is_local(mount / "root")
    with fuse(tmp_path / "fuseblk", block_device=True) as mount:  # a disk of this machine behind it, ntfs-3g for example
        assert filesystem_type(mount) == "fuseblk" and is_local(mount)
