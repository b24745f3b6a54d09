"""Trees and the views that show them.

A tree is a file `trees/<tree>.json` whose mtime is its last use. A view is derived from it: hard links to blobs, read-only,
built aside and renamed into place, so it is there whole or not at all (I2). Who may enter a private view is an ACL (I8).
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from . import acl, durable
from .errors import NotPermitted
from .layout import Layout
from .model import Caller, Digest, Tree, TreeFile, TreeId, decode_tree, is_digest

BlobPath = Callable[[Digest, bool], Path]
TOUCH_SECONDS = 60.0  # a tree's last use is written down at most so often
SKEW_SECONDS = 60.0  # so far ahead may be what was written right before the clock was put right


class Trees:
    def __init__(self, layout: Layout, blob_path: BlobPath, clock: Callable[[], float] = time.time) -> None:
        self._layout = layout
        self._blob_path = blob_path
        self._clock = clock
        self._touched: dict[TreeId, float] = {}
        self._mending = [threading.Lock() for _ in range(64)]  # by the first byte of a tree's name: one at a time mends a view

    def save(self, tree: Tree) -> TreeId:
        """Writes the tree down (blocks), durably."""
        raw, name = tree.encode(), tree.tree_id()
        path = self._layout.tree(name)
        if not path.exists():
            durable.write(path, raw, self._layout.fresh("tree"))
        return name

    def load(self, name: TreeId) -> Tree | None:
        """The tree of that name; None when it is not here. A damaged one is dropped: it can be made again (I11)."""
        path = self._layout.tree(name)
        try:
            return decode_tree(path.read_bytes(), name)
        except FileNotFoundError:
            return None
        except ValueError:
            path.unlink(missing_ok=True)
            return None

    def names(self) -> list[TreeId]:
        with os.scandir(self._layout.trees) as files:
            return [TreeId(file.name[:-5]) for file in files if file.name.endswith(".json") and is_digest(file.name[:-5])]

    def touch(self, name: TreeId) -> None:
        """Remembers that the tree is in use now."""
        now = self._clock()
        if abs(now - self._touched.get(name, 0.0)) >= TOUCH_SECONDS:
            os.utime(self._layout.tree(name), (now, now))
            self._touched[name] = now

    def last_used(self, name: TreeId) -> float:
        return self._layout.tree(name).stat().st_mtime

    def view(self, name: TreeId) -> Path:
        return self._layout.view(name)

    def mend(self, name: TreeId, tree: Tree) -> None:
        """Makes the view show exactly this tree, whatever it shows now (blocks). Every blob has been published before (I2)."""
        view = self._layout.view(name)
        wanted = {file.path for file in tree.files} | {_link(*link) for link in tree.links} | {f"{path}/" for path in tree.folders}
        with self._mending[int(name[:2], 16) % len(self._mending)]:
            if not view.exists() or set(_walk(view)) != wanted:
                self.build(name, tree)
            for file in self.suspects(name, tree.files):
                self._renew(view / file.path, file)

    def suspects(self, name: TreeId, files: Iterable[TreeFile]) -> Iterator[TreeFile]:
        """Files of the view that don't look as published: root can write through a hard link (I1)."""
        view = f"{self._layout.view(name)}/"
        for file in files:
            try:
                found = os.lstat(view + file.path)
            except OSError:
                yield file
                continue
            if found.st_mtime_ns != durable.MTIME_NS or found.st_size != file.size or not stat.S_ISREG(found.st_mode):
                yield file

    def build(self, name: TreeId, tree: Tree) -> None:
        """Makes the view, or makes it anew (blocks)."""
        building = self._layout.fresh("view")
        try:
            building.mkdir(mode=0o700)
            self._fill(building, tree)
            view = self._layout.view(name)
            is_open, admitted = _is_open(view), acl.granted(view)  # those who use it now keep it
            discarded = self._set_aside(name)
            durable.rename(building, view)
            view.chmod(0o555 if is_open else 0o500)  # closed until `admit` opens it
            if admitted and not is_open:
                acl.grant(view, admitted)
            if discarded is not None:
                durable.remove_tree(discarded)
        except BaseException:
            if building.exists():
                durable.remove_tree(building)
            raise

    def relink(self, digest: Digest) -> int:
        """Puts the good blob into every view that shows it, by rename (blocks); how many files were renewed (I10)."""
        renewed = 0
        for name in self.names():
            tree = self.load(name)
            view = self._layout.view(name)
            if tree is None or not view.exists():
                continue
            for file in tree.files:
                if file.sha256 == digest:
                    with contextlib.suppress(FileNotFoundError):  # the view was taken away meanwhile
                        self._renew(view / file.path, file)
                        renewed += 1
        return renewed

    def admit(self, name: TreeId, caller: Caller, is_private: bool) -> None:
        """Opens the view's folder to everybody, or to this caller alone beside those admitted before (I8)."""
        view = self._layout.view(name)
        is_open = _is_open(view)
        if not is_private:
            if not is_open:
                view.chmod(0o555)
        elif not is_open and caller.uid not in (0, os.geteuid()):
            admitted = acl.granted(view)
            if caller.uid not in admitted and not acl.grant(view, admitted | {caller.uid}):
                raise NotPermitted(
                    "this node's cache can't protect private repos: its filesystem keeps no ACLs",
                    "mount it with ACL support (ext4, xfs, btrfs and tmpfs have it), or run a private daemon",
                )

    def is_admitted(self, name: TreeId, caller: Caller) -> bool:
        """Whether a private view was opened to this caller."""
        return caller.uid in acl.granted(self._layout.view(name))

    def may_enter(self, name: TreeId, caller: Caller) -> bool:
        """Whether the view is there and this caller can read it (I8)."""
        view = self._layout.view(name)
        return view.exists() and (_is_open(view) or caller.uid in (0, os.geteuid()) or self.is_admitted(name, caller))

    def drop(self, name: TreeId, forget: Callable[[Digest], int]) -> Callable[[], int]:
        """Takes the tree and its view out of sight at once; returns the rest of the work (blocks), which tells the bytes freed.

        `forget` removes a blob that nothing shows any more.
        """
        tree = self.load(name)
        self._layout.tree(name).unlink(missing_ok=True)
        self._touched.pop(name, None)
        discarded = self._set_aside(name)

        def discard() -> int:
            if discarded is not None:
                durable.remove_tree(discarded)
            return sum(forget(digest) for digest in {file.sha256 for file in tree.files}) if tree else 0

        return discard

    def _set_aside(self, name: TreeId) -> Path | None:
        """Moves a view out of sight; where it is now."""
        view = self._layout.view(name)
        if not view.exists():
            return None
        view.chmod(0o700)  # moving a folder changes its "..", which takes the right to write into it
        discarded = self._layout.fresh("old")
        durable.rename(view, discarded)
        return discarded

    def _fill(self, building: Path, tree: Tree) -> None:
        folders = {str(building)}
        sources: dict[tuple[Digest, bool], Path] = {}
        for file in tree.files:
            target = building / file.path
            _make_folders(target.parent, folders)
            key = (file.sha256, file.executable)
            source = sources.setdefault(key, self._blob_path(*key))
            if not durable.link(source, target):
                _copy_blob(source, target)
                sources[key] = target  # the next names are links to this copy
        for path, destination in tree.links:
            target = building / path
            _make_folders(target.parent, folders)
            target.symlink_to(destination)
        for path in tree.folders:
            _make_folders(building / path, folders)
        for folder in folders - {str(building)}:
            os.chmod(folder, 0o555)

    def _renew(self, shown: Path, file: TreeFile) -> None:
        fresh = self._layout.fresh("link")
        source = self._blob_path(file.sha256, file.executable)
        folder = shown.parent
        mode = stat.S_IMODE(folder.stat().st_mode)
        try:
            if not durable.link(source, fresh):
                _copy_blob(source, fresh)
            folder.chmod(mode | 0o200)
            durable.rename(fresh, shown)
        finally:
            fresh.unlink(missing_ok=True)
            folder.chmod(mode)


def age(moment: float, now: float) -> float:
    """Seconds since then; infinite if that lies well in the future, for then some clock was wrong."""
    return now - moment if now - moment >= -SKEW_SECONDS else math.inf


def _is_open(view: Path) -> bool:
    """Whether everybody may enter."""
    with contextlib.suppress(FileNotFoundError):
        return stat.S_IMODE(view.stat().st_mode) == 0o555
    return False


def _make_folders(folder: Path, made: set[str]) -> None:
    missing = []
    while str(folder) not in made:
        missing.append(folder)
        folder = folder.parent
    for each in reversed(missing):
        each.mkdir(mode=0o755)
        made.add(str(each))


def _copy_blob(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)
    durable.seal(target, executable=bool(source.stat().st_mode & 0o100))


def _walk(view: Path) -> Iterator[str]:
    """Relative paths of all files, links (`_link`) and empty folders (with a slash) below a view."""
    pending = [""]
    while pending:
        folder = pending.pop()
        is_empty = True
        with os.scandir(view / folder) as entries:
            for entry in entries:
                is_empty = False
                path = f"{folder}{entry.name}"
                if entry.is_symlink():
                    yield _link(path, os.readlink(entry.path))
                elif entry.is_dir(follow_symlinks=False):
                    pending.append(f"{path}/")
                else:
                    yield path
        if is_empty and folder:
            yield folder


def _link(path: str, destination: str) -> str:
    return f"{path}\0{destination}"
