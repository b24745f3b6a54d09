"""ACLs as the kernel keeps them: read back by its own tools, and where there are none (I8)."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from modelcached import acl

from .kernel import mounted

UIDS = [0, 1001, 65_534, 4_000_000_000]


def test_exactly_these(tmp_path: Path) -> None:
    assert acl.granted(tmp_path) == set()
    assert acl.grant(tmp_path, [1002, 1001, 1002])
    assert acl.granted(tmp_path) == {1001, 1002}
    assert acl.grant(tmp_path, UIDS)
    assert acl.granted(tmp_path) == set(UIDS)
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o550  # the group's bits show the mask: nobody else got in
    assert acl.grant(tmp_path, [])
    assert acl.granted(tmp_path) == set() and not stat.S_IMODE(tmp_path.stat().st_mode) & 0o007


def test_as_others_read_it(tmp_path: Path) -> None:
    if not shutil.which("getfacl"):
        pytest.skip("needs getfacl (Debian package acl)")
    assert acl.grant(tmp_path, [1002, 1001])
    said = subprocess.check_output(["getfacl", "--omit-header", "--numeric", "--absolute-names", tmp_path], text=True)
    assert said.split() == ["user::r-x", "user:1001:r-x", "user:1002:r-x", "group::---", "mask::r-x", "other::---"]


def test_hundreds_of_uids(tmp_path: Path) -> None:
    """A node does not have them; ext4 would take 500 in one block."""
    uids = set(range(100_000, 100_400))
    assert acl.grant(tmp_path, uids) and acl.granted(tmp_path) == uids


def test_where_there_are_none(tmp_path: Path) -> None:
    with mounted(tmp_path / "ramfs", "-t", "ramfs", "none") as folder:
        mode = folder.stat().st_mode
        assert not acl.grant(folder, [1001])
        assert acl.granted(folder) == set() and folder.stat().st_mode == mode


def test_other_errors_are_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        acl.grant(tmp_path / "missing", [1001])
    assert acl.granted(tmp_path / "missing") == set()
    assert os.listdir(tmp_path) == []
