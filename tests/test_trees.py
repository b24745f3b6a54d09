"""Views: exactly their tree, whole or not there, and a private one opens to accepted uids only (I2, I8, I10)."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from modelcached import durable
from modelcached.durable import MTIME_NS
from modelcached.model import Caller, Digest, Tree, TreeFile, TreeId
from modelcached.root import open_root
from modelcached.trees import Trees

from .kernel import mounted, on_ext4, require_root, run_as

FILES = {"config.json": b"{}", "a/b/weights.bin": b"weights", "a/empty": b"", "a b/ä\n.txt": b"weights", "run.sh": b"#!/bin/sh\necho run\n"}


class Node:
    """A root, and blobs put there without a daemon."""

    def __init__(self, root: Path) -> None:
        self.layout, self.lock = open_root(root, private=True)
        self.trees = Trees(self.layout, self.layout.blob)

    def put(self, data: bytes, executable: bool = False) -> Digest:
        digest = Digest(hashlib.sha256(data).hexdigest())
        source = self.layout.fresh("blob")
        source.write_bytes(data)
        durable.publish([durable.Staged(source, self.layout.blob(digest, executable), executable)], map)
        return digest

    def tree(self, files: dict[str, bytes]) -> Tree:
        return Tree(tuple(TreeFile(path, len(data), self.put(data, path == "run.sh"), path == "run.sh") for path, data in files.items()))

    def show(self, tree: Tree) -> tuple[TreeId, Path]:
        name = self.trees.save(tree)
        self.trees.mend(name, tree)
        return name, self.trees.view(name)


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    node = Node(tmp_path / "root")
    yield node
    os.close(node.lock)
    assert os.listdir(node.layout.tmp) == []


@pytest.fixture
def tree(node: Node) -> Tree:
    return node.tree(FILES)


def contents(view: Path) -> dict[str, bytes]:
    return {str(path.relative_to(view)): path.read_bytes() for path in view.rglob("*") if path.is_file()}


def test_a_view_shows_exactly_its_tree(node: Node, tree: Tree) -> None:
    links = (("last", "a/b/weights.bin"), ("a/up", "../config.json"))
    name, view = node.show(Tree(tree.files, links, ("nothing", "a/b/nothing")))
    assert contents(view) == {**FILES, "last": b"weights", "a/up": b"{}"}
    assert {str(path.relative_to(view)) for path in view.rglob("*") if path.is_dir()} == {"a", "a/b", "a b", "nothing", "a/b/nothing"}
    for path in view.rglob("*"):
        found = path.lstat()
        if stat.S_ISREG(found.st_mode):
            assert found.st_mtime_ns == MTIME_NS and stat.S_IMODE(found.st_mode) == (0o555 if path.name == "run.sh" else 0o444)
        elif stat.S_ISDIR(found.st_mode):
            assert stat.S_IMODE(found.st_mode) == 0o555
    assert os.path.samefile(view / "a/b/weights.bin", node.layout.blob(tree.files[1].sha256))  # no second copy of the bytes
    assert stat.S_IMODE(view.stat().st_mode) == 0o500  # nobody was admitted yet
    inode = view.stat().st_ino
    node.show(Tree(tree.files, links, ("nothing", "a/b/nothing")))
    assert view.stat().st_ino == inode  # nothing to mend
    assert node.trees.names() == [name]


def test_an_empty_tree(node: Node) -> None:
    name, view = node.show(Tree(()))
    assert os.listdir(view) == [] and node.trees.load(name) == Tree(())


def replaced(view: Path) -> None:
    (view / "config.json").unlink()
    (view / "config.json").write_bytes(b"{}")


def swapped_for_a_link(view: Path) -> None:
    (view / "config.json").unlink()
    (view / "config.json").symlink_to("/etc/passwd")


def folder_swapped_for_a_link(view: Path) -> None:
    shutil.rmtree(view / "a")
    (view / "a").symlink_to("/etc")


def file_swapped_for_a_folder(view: Path) -> None:
    (view / "config.json").unlink()
    (view / "config.json").mkdir()


def emptied(view: Path) -> None:
    shutil.rmtree(view)
    view.mkdir()


# What root can do to a view, but for writing through it: the blob itself is bad then, and test_blobs has that.
DAMAGE: dict[str, Callable[[Path], object]] = {
    "nothing": lambda view: None,
    "replaced": replaced,
    "added": lambda view: (view / "a/new").touch(),
    "added at the top": lambda view: (view / "new").touch(),
    "added folder": lambda view: (view / "new/er").mkdir(parents=True),
    "deleted": lambda view: (view / "a/b/weights.bin").unlink(),
    "renamed": lambda view: (view / "config.json").rename(view / "config.jsn"),
    "a link instead": swapped_for_a_link,
    "a link instead of a folder": folder_swapped_for_a_link,
    "a folder instead": file_swapped_for_a_folder,
    "a folder of another name instead": lambda view: (view / "a").rename(view / "c"),
    "gone": shutil.rmtree,
    "emptied": emptied,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_mend(node: Node, tree: Tree, damage: str) -> None:
    name, view = node.show(tree)
    DAMAGE[damage](view)
    node.trees.mend(name, tree)
    assert contents(view) == FILES and not [path for path in view.rglob("*") if path.is_symlink()]
    assert [*node.trees.suspects(name, tree.files)] == []


@pytest.mark.parametrize("data", [b"WEIGHTS", b"", b"longer than before"])
def test_a_write_through_a_view_is_seen(node: Node, tree: Tree, data: bytes) -> None:
    name, view = node.show(tree)
    other = node.tree({"other.bin": b"weights"})
    other_name, other_view = node.show(other)
    assert [*node.trees.suspects(name, tree.files)] == []
    with open(view / "a/b/weights.bin", "r+b") as file:
        file.truncate(len(data))
        file.write(data)
    suspects = [*node.trees.suspects(name, tree.files)]
    assert [file.path for file in suspects] == ["a/b/weights.bin", "a b/ä\n.txt"]  # one blob under two names
    assert [file.path for file in node.trees.suspects(other_name, other.files)] == ["other.bin"]
    # The blob goes to quarantine and comes again: every view gets the good one, and who has the bad one open keeps that.
    digest = suspects[0].sha256
    with open(view / "a/b/weights.bin", "rb") as opened:
        node.layout.blob(digest).unlink()
        node.put(b"weights")
        assert node.trees.relink(digest) == 3
        assert opened.read() == data
    assert contents(view) == FILES and contents(other_view) == {"other.bin": b"weights"}
    assert [*node.trees.suspects(name, tree.files)] == []
    assert stat.S_IMODE((view / "a/b").stat().st_mode) == 0o555


def test_relink_leaves_alone_what_has_no_view(node: Node, tree: Tree) -> None:
    node.trees.save(tree)
    assert node.trees.relink(tree.files[0].sha256) == 0


def test_trees_are_kept_and_damaged_ones_are_not_believed(node: Node, tree: Tree) -> None:
    name = node.trees.save(tree)
    assert Trees(node.layout, node.layout.blob).load(name) == Tree(tuple(sorted(tree.files, key=lambda file: file.path)))
    assert node.trees.load(TreeId("0" * 64)) is None
    node.layout.tree(name).write_bytes(tree.encode()[:-1])
    assert node.trees.load(name) is None and node.trees.names() == []
    with pytest.raises(FileNotFoundError):
        node.trees.touch(name)
    node.trees.save(tree)
    os.utime(node.layout.tree(name), (1, 1))
    node.trees.touch(name)
    used = node.trees.last_used(name)
    assert used > 1e9
    os.utime(node.layout.tree(name), (1, 1))
    node.trees.touch(name)  # written down a moment ago
    assert node.trees.last_used(name) == 1
    wrong, right = time.time() + 1e8, time.time()
    clock = iter((wrong, right))
    trees = Trees(node.layout, node.layout.blob, lambda: next(clock))
    for now in (wrong, right):  # put right meanwhile
        trees.touch(name)
        assert abs(trees.last_used(name) - now) < 1


def test_drop_takes_it_out_of_sight_at_once(node: Node, tree: Tree) -> None:
    name, view = node.show(tree)
    freed: list[Digest] = []

    def forget(digest: Digest) -> int:
        assert not view.exists()
        freed.append(digest)
        return 10

    discard = node.trees.drop(name, forget)
    assert not view.exists() and node.trees.load(name) is None and freed == []
    assert discard() == 10 * len({file.sha256 for file in tree.files})
    assert sorted(freed) == sorted({file.sha256 for file in tree.files})
    assert node.trees.drop(name, forget)() == 0  # twice is once


def test_a_public_view_is_open(node: Node, tree: Tree) -> None:
    name, view = node.show(tree)
    node.trees.admit(name, Caller(1001, 1001, 1), is_private=True)
    node.trees.admit(name, Caller(1002, 1002, 1), is_private=False)
    assert stat.S_IMODE(view.stat().st_mode) == 0o555
    node.trees.admit(name, Caller(1003, 1003, 1), is_private=True)  # somebody has it by right of the public repo: it stays open
    assert stat.S_IMODE(view.stat().st_mode) == 0o555


@pytest.mark.parametrize("uid", [0, os.geteuid()])
def test_the_owner_and_root_need_no_entry(node: Node, tree: Tree, uid: int) -> None:
    name, view = node.show(tree)
    node.trees.admit(name, Caller(uid, uid, 1), is_private=True)
    assert stat.S_IMODE(view.stat().st_mode) == 0o500


_AS_THE_DAEMON = """
import hashlib
layout, lock = root.open_root(Path(sys.argv[1]), private=False)
shown = trees.Trees(layout, layout.blob)
data = b"private"
digest = hashlib.sha256(data).hexdigest()
source = layout.fresh("blob")
source.write_bytes(data)
durable.publish([durable.Staged(source, layout.blob(digest))], map)
for number, steps in enumerate(json.loads(sys.argv[2])):
    tree = model.Tree(tuple(model.TreeFile(path, len(data), digest) for path in ("top.txt", "sub/deep.txt", f"number {number}")))
    name = shown.save(tree)
    shown.mend(name, tree)
    view = shown.view(name)
    for step in steps:
        if step == "rebuild":
            mode = view.stat().st_mode
            view.chmod(0o700); (view / "added").touch(); view.chmod(mode)
            shown.mend(name, tree)
            assert sorted(os.listdir(view)) == [f"number {number}", "sub", "top.txt"]
        elif step == "relink":
            shown.relink(digest)
        else:
            try:
                shown.admit(name, model.Caller(abs(step), 0, 1), is_private=step > 0)
            except errors.NotPermitted as error:
                sys.exit(error.message)
    print(view)
assert os.listdir(layout.tmp) == []
"""
_AS_A_TASK = """
def can(what):
    try:
        what()
    except PermissionError:
        return False
    return True
def powers(view):
    yield can(lambda: os.listdir(view))
    yield can(lambda: (view / "top.txt").read_bytes())
    yield can(lambda: (view / "sub/deep.txt").read_bytes())
    yield can(lambda: (view / "new").touch())
    yield can(lambda: open(view / "top.txt", "ab"))
    yield can(lambda: (view / "top.txt").chmod(0o777))
    yield can(lambda: os.listdir(view.parent))
    for name in ("blobs", "leases", "trees", "repos", "partial", "tmp", "quarantine"):
        yield can(lambda: os.listdir(view.parent.parent / name))
print(json.dumps([[*powers(Path(view))] for view in sys.argv[1:]]))
"""
LOOKS, SHUT_OUT = [True] * 3 + [False] * 11, [False] * 14
# What happens to a view (an uid is admitted; a negative one, as a caller of a public repo), and who may enter it then.
STORIES: list[tuple[list[int | str], set[int]]] = [
    ([], set()),
    ([1001], {1001}),
    ([1001, 1002, 1001], {1001, 1002}),
    ([1001, "relink"], {1001}),
    ([1001, "rebuild"], {1001}),
    ([1001, "rebuild", 1002, "rebuild"], {1001, 1002}),
    ([1001, -1003], {1001, 1002, 1003}),
    ([1001, -1003, "rebuild", 1001], {1001, 1002, 1003}),
    (["rebuild"], set()),
]


def test_who_may_enter_a_private_view(shared_tmp_path: Path) -> None:
    """The daemon is one uid, the tasks are others, and none of them is root (I8)."""
    require_root()
    os.chown(shared_tmp_path, 1500, 1500)
    views = run_as(1500, _AS_THE_DAEMON, shared_tmp_path / "root", json.dumps([steps for steps, _ in STORIES])).splitlines()
    for uid in (1001, 1002, 1003):
        seen = json.loads(run_as(uid, _AS_A_TASK, *views))
        assert seen == [LOOKS if uid in admitted else SHUT_OUT for _, admitted in STORIES], uid


def test_without_acls_others_are_refused(shared_tmp_path: Path) -> None:
    """ramfs keeps none."""
    with mounted(shared_tmp_path / "root", "-t", "ramfs", "none") as root:
        os.chown(root, 1500, 1500)
        with pytest.raises(AssertionError, match="can't protect private repos: its filesystem keeps no ACLs"):
            run_as(1500, _AS_THE_DAEMON, root, "[[1001]]")


@pytest.mark.timeout(60)
def test_more_equal_files_than_links(node: Node) -> None:
    """ext4 takes 65,000 links; the rest are links to a copy."""
    if not on_ext4(node.layout.root):
        pytest.skip("needs a filesystem with ext4's limit on links")
    digest = node.put(b"same")
    elsewhere = node.layout.quarantine / "other-views"
    elsewhere.mkdir()
    blob = str(node.layout.blob(digest))
    for number in range(64_990):
        os.link(blob, f"{elsewhere}/{number}")
    tree = Tree(tuple(TreeFile(f"{number % 3}/{number}", 4, digest) for number in range(30)))
    name, view = node.show(tree)
    assert contents(view) == {file.path: b"same" for file in tree.files}
    inodes = {path.stat().st_ino: path.stat().st_nlink for path in view.rglob("*") if path.is_file()}
    assert sorted(inodes.values()) == [21, 65_000]
    assert [*node.trees.suspects(name, tree.files)] == []
    assert node.trees.relink(digest) == 30 and contents(view) == {file.path: b"same" for file in tree.files}
    shutil.rmtree(elsewhere)


def test_a_view_that_cannot_be_built_leaves_nothing(node: Node, tree: Tree) -> None:
    name = node.trees.save(tree)
    node.layout.blob(tree.files[-1].sha256, True).unlink()
    with pytest.raises(FileNotFoundError):
        node.trees.mend(name, tree)
    assert not node.trees.view(name).exists() and os.listdir(node.layout.tmp) == []
