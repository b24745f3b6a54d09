"""What lies in a watched folder now: one look at everything, from the folder's descriptor, that opens no file.

Invariants:
- Folders are opened one component at a time, relative to the one above, O_NOFOLLOW; never "..", never a link.
- What can't be looked at is named in `problems`, and costs nothing else: the other entries are there.
"""

from __future__ import annotations

import os
import stat
from typing import Dict, Iterator, List, NamedTuple, Tuple

FOLDER, FILE, LINK, OTHER = "folder", "file", "link", "other"
_OPEN = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_KINDS = {stat.S_IFDIR: FOLDER, stat.S_IFREG: FILE, stat.S_IFLNK: LINK}
MAX_DEPTH = 64
MAX_ENTRIES = 1_000_000  # a folder with more is none that a trainer writes checkpoints to


class Entry(NamedTuple):
    """Equal before and after: nothing happened to it that a stat can show."""

    kind: str
    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int
    links: int
    mode: int
    target: str = ""  # of a link

    @property
    def stamp_ns(self) -> int:
        return max(self.mtime_ns, self.ctime_ns)

    @property
    def identity(self) -> Tuple[int, int]:
        return self.device, self.inode

    @property
    def content(self) -> Tuple[int, int, int, int]:
        """What unlinking it, which changes the ctime, leaves as it was."""
        return self.device, self.inode, self.size, self.mtime_ns


class Scan(NamedTuple):
    entries: Dict[str, Entry]  # by path, "/" between components; "" is the folder itself
    names: Dict[str, List[str]]  # of every folder what is in it, in order
    problems: List[str]

    def below(self, path: str) -> Iterator[Tuple[str, Entry]]:
        """Everything in a unit, the unit itself included, in a fixed order."""
        pending = [path]
        while pending:
            here = pending.pop()
            entry = self.entries.get(here)
            if entry is None:
                continue
            yield here, entry
            pending.extend(joined(here, name) for name in reversed(self.names.get(here, ())))


def joined(folder: str, name: str) -> str:
    return folder + "/" + name if folder else name


def scan(folder: int, start: str = "") -> Scan:
    """Everything below `folder`/`start`, with paths relative to `folder`. OSError: `start` has gone, or is no folder."""
    made = Scan({}, {}, [])
    top = open_folder(folder, start)
    try:
        made.entries[start] = entry_of(os.fstat(top))
        _look(top, start, made, 0)
    finally:
        os.close(top)
    return made


def open_folder(folder: int, path: str) -> int:
    """A descriptor of a folder below `folder`, which need not be readable (O_PATH), or of itself."""
    first, *deeper = [part for part in path.split("/") if part] or ["."]
    descriptor = os.open(first, _OPEN, dir_fd=folder)
    for part in deeper:
        above = descriptor
        try:
            descriptor = os.open(part, _OPEN, dir_fd=above)
        finally:
            os.close(above)
    return descriptor


def open_file(folder: int, path: str) -> int:
    """A descriptor of a regular file below `folder`, whatever it has become meanwhile: OSError for anything else."""
    above, _, name = path.rpartition("/")
    descriptor = open_folder(folder, above)
    try:
        opened = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY, dir_fd=descriptor)
    finally:
        os.close(descriptor)
    if not stat.S_ISREG(os.fstat(opened).st_mode):
        os.close(opened)
        raise FileNotFoundError("%s is no regular file any more" % shown(path))
    return opened


def entry_of(found: os.stat_result, target: str = "") -> Entry:
    mode = found.st_mode
    kind = _KINDS.get(stat.S_IFMT(mode), OTHER)
    size = found.st_size if kind is FILE else 0
    return Entry(kind, found.st_dev, found.st_ino, size, found.st_mtime_ns, found.st_ctime_ns, found.st_nlink, mode, target)


def shown(path: str) -> str:
    """A name in quotes, whatever bytes it has."""
    return "'%s'" % os.fsencode(path).decode(errors="backslashreplace")


def _look(descriptor: int, here: str, made: Scan, depth: int) -> None:
    names = made.names[here] = []
    folders = []
    with os.scandir(descriptor) as scanned:
        for entry in scanned:
            path = joined(here, entry.name)
            try:
                found = entry.stat(follow_symlinks=False)
                target = os.readlink(entry.name, dir_fd=descriptor) if stat.S_ISLNK(found.st_mode) else ""
            except FileNotFoundError:
                continue
            made.entries[path] = seen = entry_of(found, target)
            names.append(entry.name)
            if seen.kind == FOLDER:
                folders.append((path, entry.name))
    names.sort()
    if len(made.entries) > MAX_ENTRIES or depth > MAX_DEPTH:
        raise OSError("there is too much below %s to watch it: watch the folder of the checkpoints" % shown(here))
    for path, name in folders:
        try:
            deeper = os.open(name, _OPEN, dir_fd=descriptor)
        except (FileNotFoundError, NotADirectoryError):  # gone; the folder above has another stamp now
            continue
        except PermissionError as error:
            made.problems.append("%s can't be looked into: %s" % (shown(path), error.strerror))
            continue
        try:
            made.entries[path] = entry_of(os.fstat(deeper))
            _look(deeper, path, made, depth + 1)
        finally:
            os.close(deeper)
