"""What is to be saved: a folder or one file, listed first and opened file by file afterwards, never out of the path.

Invariants:
- Everything below the path is opened relative to a folder's descriptor, one component at a time, O_NOFOLLOW: what is moved or
  turned into a link meanwhile can't lead elsewhere. Only links that `follow_links` is about are followed.
- Links stay links if their target is sure to stay inside: relative, with ".." only at its start. Others are refused.
- Whatever can't be saved is found, and named, by the listing: before anything is sent.
- Two descriptors are open, however deep the folders lie.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import Dict, List, NamedTuple, Protocol, Sequence, Set, Tuple

from .errors import NotPermittedError, NotSaveableError

MAX_PATH_BYTES = 3072  # what the daemon can show again, below its root
_NAMED = 5  # how many of the things that can't be saved an error names

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NONBLOCK
_FILE = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY  # NONBLOCK: what has become a FIFO must not hang us
_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


_EMPTY = "an empty folder"


class File(NamedTuple):
    path: str  # relative, "/" between components
    size: int  # bytes
    executable: bool
    inode: int


class Listing(NamedTuple):
    files: List[File]
    links: List[Tuple[str, str]]  # path, target
    folders: List[str]  # empty ones
    stamps: Dict[str, Tuple[int, ...]]  # of every folder: changes when something comes, goes, or is renamed


class Readable(Protocol):
    """What can be handed over: listed, opened file by file, and compared with what was listed. As `Source` does it."""

    @property
    def root(self) -> str: ...

    def listing(self) -> Listing: ...

    def open(self, path: str) -> int: ...

    def difference(self, before: Listing) -> Tuple[str, str]: ...

    def name(self, path: str) -> str: ...


class Source:
    """An open path. `root` is what the caller gave; errors name what is below it."""

    def __init__(self, root: str, follow_links: bool = False) -> None:
        self.root = root
        self._follow_links = follow_links
        self._followed: Set[str] = set()  # links that stand for what they point to
        self.is_folder = stat.S_ISDIR(os.stat(root).st_mode)  # the path itself may be a link: its owner named it
        self._root = os.open(root, _FOLDER) if self.is_folder else -1
        self._path, self._descriptor = "", os.dup(self._root) if self.is_folder else -1  # the folder we are in

    def listing(self) -> Listing:
        """Everything that will be saved, in order of paths. NotSaveableError and NotPermittedError name what is in the way."""
        problems = _Problems(self.root)
        made = self._list_folders(problems) if self.is_folder else self._list_file(problems)
        problems.raise_any()
        return made

    def open(self, path: str) -> int:
        """A descriptor of a listed file, which may be something else by now. OSError if it can't be opened."""
        if not self.is_folder:
            return os.open(self.root, _FILE)
        folder, _, name = path.rpartition("/")
        return os.open(name, _FILE | self._nofollow(path), dir_fd=self._enter(folder))

    def difference(self, before: Listing) -> Tuple[str, str]:
        """A path that has gone since, and one that has come or become another file; "" where there is none."""
        if all(self._stamp_now(folder) == stamp for folder, stamp in before.stamps.items()):
            return "", ""
        then, now = _entries(before), _entries(self.listing())
        gone = min((path for path, what in then.items() if path not in now and what != _EMPTY), default="")
        return gone, min((path for path, what in now.items() if then.get(path) != what), default="")

    def name(self, path: str) -> str:
        """`path` as the caller would spell it."""
        return os.path.join(self.root, path) if self.is_folder else self.root

    def close(self) -> None:
        for descriptor in (self._root, self._descriptor):
            if descriptor >= 0:
                os.close(descriptor)
        self._root = self._descriptor = -1

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- listing

    def _list_file(self, problems: _Problems) -> Listing:
        found = os.stat(self.root)
        name = os.path.basename(os.path.abspath(self.root))
        if not stat.S_ISREG(found.st_mode):
            problems.add(name, "is %s" % _KINDS.get(stat.S_IFMT(found.st_mode), "no file"))
        elif _name_problem(name):
            problems.add(name, _name_problem(name))
        elif not os.access(self.root, os.R_OK, effective_ids=os.access in os.supports_effective_ids):
            problems.unreadable.append(name)
        return Listing([_file(name, found)], [], [], {})

    def _list_folders(self, problems: _Problems) -> Listing:
        made = Listing([], [], [], {})
        pending = [("", "")]  # a folder, and the one that links in it must not leave
        if not os.fstat(self._root).st_nlink:  # an emptied folder that nobody can see is no empty folder
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), ".")
        self._followed.clear()
        while pending:
            folder, inside = pending.pop()
            try:
                descriptor = self._enter(folder)
                made.stamps[folder] = _stamp(descriptor)
                with os.scandir(descriptor) as scanned:
                    entries = sorted(scanned, key=lambda entry: entry.name)
            except PermissionError:
                problems.unreadable.append(folder or ".")
                continue
            if self._followed and _is_in_itself(folder, made.stamps):
                problems.add(folder, "contains itself")
                continue
            if folder and not entries:
                made.folders.append(folder)
            prefix = folder + "/" if folder else ""
            folders = [prefix + entry.name for entry in entries if self._list_entry(prefix + entry.name, entry, inside, made, problems)]
            pending.extend((path, path if path in self._followed else inside) for path in reversed(folders))
        return made

    def _list_entry(self, path: str, entry: os.DirEntry[str], inside: str, made: Listing, problems: _Problems) -> bool:
        """Whether it is a folder, to be listed in its turn."""
        found = entry.stat(follow_symlinks=False)
        problem = _name_problem(path)
        if not problem and stat.S_ISLNK(found.st_mode):
            target = os.readlink(entry.name, dir_fd=self._descriptor)
            if not _is_utf8(target):
                problem = "is a link to a name that is not UTF-8"
            elif stays_inside(path[len(inside) :].lstrip("/"), target):
                made.links.append((path, target))
                return False
            elif not self._follow_links:
                problem = "is a link that leads out of it, to %s" % _shown(target)
                problems.has_links = True
            else:
                self._followed.add(path)
                try:
                    found = os.stat(entry.name, dir_fd=self._descriptor)
                except OSError as error:
                    problem = "is a link to %s: %s" % (_shown(target), error.strerror)
        if not problem and stat.S_ISDIR(found.st_mode):
            return True
        if not problem and not stat.S_ISREG(found.st_mode):
            problem = "is %s" % _KINDS.get(stat.S_IFMT(found.st_mode), "no file")
        if problem:
            problems.add(path, problem)
        elif self._may_read(entry.name):
            made.files.append(_file(path, found))
        else:
            problems.unreadable.append(path)
        return False

    def _may_read(self, name: str) -> bool:
        if os.geteuid() == 0:
            return True
        return os.access(name, os.R_OK, dir_fd=self._descriptor, effective_ids=os.access in os.supports_effective_ids)

    # ---- moving about

    def _enter(self, folder: str) -> int:
        """The descriptor of a folder; the source's, good until it enters another one."""
        if folder != self._path:
            if self._path and not folder.startswith(self._path + "/"):
                self._move("", os.dup(self._root))
            for part in filter(None, folder[len(self._path) :].split("/")):
                path = self._path + "/" + part if self._path else part
                self._move(path, os.open(part, _FOLDER | self._nofollow(path), dir_fd=self._descriptor))
        return self._descriptor

    def _move(self, path: str, descriptor: int) -> None:
        os.close(self._descriptor)
        self._path, self._descriptor = path, descriptor

    def _nofollow(self, path: str) -> int:
        return 0 if path in self._followed else os.O_NOFOLLOW

    def _stamp_now(self, folder: str) -> Tuple[int, ...]:
        try:
            return _stamp(self._enter(folder))
        except (FileNotFoundError, NotADirectoryError):  # which it also is when it has become a link
            return ()

    def __repr__(self) -> str:
        return "<Source %r in %r>" % (self.root, self._path)


class _Problems:
    """What can't be saved, to be named in one error."""

    def __init__(self, root: str) -> None:
        self._root = root
        self._found: List[Tuple[str, str]] = []
        self.has_links = False  # among them links that could be followed
        self.unreadable: List[str] = []

    def add(self, path: str, what: str) -> None:
        self._found.append((path, what))

    def raise_any(self) -> None:
        if self._found:
            named = ["%s %s" % (_shown(path), what) for path, what in self._found[:_NAMED]]
            hint = "move them away, or save a folder without them: what can be saved are files, folders, and links among them"
            if all(_name_problem(path) for path, _ in self._found):
                hint = "rename them, or move them away"
            elif self.has_links:
                hint = "follow_links=True (--follow-links) saves what such links point to"
            paths = [os.fsencode(path).decode(errors="backslashreplace") for path, _ in self._found[:_NAMED]]
            raise NotSaveableError("%s can't be saved: %s%s" % (self._root, "; ".join(named), _more(self._found)), hint, {"paths": paths})
        if self.unreadable:
            named = [_shown(path) for path in self.unreadable[:_NAMED]]
            raise NotPermittedError(
                "%s can't be saved: uid %d may not read %s%s" % (self._root, os.geteuid(), ", ".join(named), _more(self.unreadable)),
                "save as the files' owner, or make them readable",
                {"paths": self.unreadable[:_NAMED]},
            )


def _more(found: Sequence[object]) -> str:
    return "; and %d more" % (len(found) - _NAMED) if len(found) > _NAMED else ""


def _shown(path: str) -> str:
    """A name in quotes, whatever bytes it has."""
    return "'%s'" % os.fsencode(path).decode(errors="backslashreplace")


def _file(path: str, found: os.stat_result) -> File:
    return File(path, found.st_size, bool(found.st_mode & stat.S_IXUSR), found.st_ino)


def _entries(listing: Listing) -> Dict[str, object]:
    """Everything listed, by path; of files what tells whether they are the same."""
    files = {file.path: (file.inode, file.executable) for file in listing.files}
    return {**files, **dict(listing.links), **dict.fromkeys(listing.folders, _EMPTY)}


def _stamp(descriptor: int) -> Tuple[int, ...]:
    found = os.fstat(descriptor)
    return (found.st_dev, found.st_ino, found.st_mtime_ns, found.st_ctime_ns)


def _is_in_itself(folder: str, stamps: Dict[str, Tuple[int, ...]]) -> bool:
    parts = folder.split("/") if folder else []
    return any(stamps["/".join(parts[:depth])][:2] == stamps[folder][:2] for depth in range(len(parts)))


def _name_problem(path: str) -> str:
    if not path.isascii() and not _is_utf8(path):
        return "has a name that is not UTF-8"
    if len(path) > MAX_PATH_BYTES // 4 and len(path.encode()) > MAX_PATH_BYTES:
        return "has a path of more than %d bytes" % MAX_PATH_BYTES
    return ""


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def stays_inside(path: str, target: str) -> bool:
    """Whether a link can't lead out, whatever else is a link: ".." is counted where it goes up real folders only."""
    parts = [part for part in target.split("/") if part not in ("", ".")]
    ups = 0
    while ups < len(parts) and parts[ups] == "..":
        ups += 1
    return bool(target) and not target.startswith("/") and ups <= path.count("/") and ".." not in parts[ups:]
