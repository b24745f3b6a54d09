"""Private copies of what lies in a view: the caller's own, writable, in place all at once or not at all.

Invariants:
- A file appears under its name only when it is complete: it is made beside it and renamed. What was there is replaced.
- What the view does not have stays, and is named.
- Bytes are shared with the cache where the filesystem can do so without sharing writes (FICLONE); else the kernel copies.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from typing import Iterator, List, Set, Tuple

from .errors import StorageError

_FICLONE = 0x40049409  # linux/fs.h: both files have the same blocks until one of them is written to
_COPY_BYTES = 64 << 20  # a step that Ctrl-C has to wait for
_READ_BYTES = 1 << 20
_FOREIGN_NAMED = 10  # how many foreign files a warning names

# "not here", in the words of various filesystems and sandboxes
_NOT_SUPPORTED = {errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EPERM, errno.EACCES, errno.ETXTBSY}


def copy_tree(view: str, target: str) -> List[str]:
    """Puts private copies of everything in `view` into the folder `target`, which is made if need be.

    Folders are made with mode 0755, files with 0644 (0755 when executable), less the umask. Links stay links.
    Returns what was there already and is not in the view: at most 11 relative paths.
    """
    os.makedirs(target, 0o755, exist_ok=True)
    ours = set()
    for name, entry in walk(view):
        ours.add(name)
        destination = os.path.join(target, name)
        if entry.is_dir(follow_symlinks=False):
            os.makedirs(destination, 0o755, exist_ok=True)
        elif entry.is_symlink():
            put_link(os.readlink(entry.path), destination)
        else:
            copy_file(entry.path, destination)
    return _foreign(target, ours)


def copy_file(source: str, destination: str) -> None:
    """One private copy of a file; its folder exists."""
    temporary = _beside(destination)
    try:
        original = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
        try:
            found = os.fstat(original)
            mode = 0o755 if found.st_mode & stat.S_IXUSR else 0o644
            copy = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
            try:
                _copy_bytes(original, copy, found.st_size)
            finally:
                os.close(copy)
        finally:
            os.close(original)
        os.replace(temporary, destination)
    except BaseException:
        _discard(temporary)
        raise


def put_link(points_to: str, destination: str) -> None:
    """A symbolic link, in place of what was there. One that points there already is left alone."""
    try:
        if os.readlink(destination) == points_to:
            return
    except OSError:
        pass
    temporary = _beside(destination)
    try:
        os.symlink(points_to, temporary)
        os.replace(temporary, destination)
    except BaseException:
        _discard(temporary)
        raise


def put_text(text: str, destination: str) -> None:
    """A small file, in place of what was there."""
    temporary = _beside(destination)
    try:
        with open(temporary, "x", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, destination)
    except BaseException:
        _discard(temporary)
        raise


def walk(folder: str) -> Iterator[Tuple[str, os.DirEntry[str]]]:
    """Everything below a folder with its relative path, a folder before what is in it. Links are not followed."""
    pending = [("", folder)]
    while pending:
        prefix, path = pending.pop()
        with os.scandir(path) as entries:
            for entry in entries:
                yield prefix + entry.name, entry
                if entry.is_dir(follow_symlinks=False):
                    pending.append((prefix + entry.name + "/", entry.path))


def can_clone(source: str, folder: str) -> bool:
    """Whether a file can be put into `folder` that shares its blocks with `source`."""
    original = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
    try:
        temporary = _beside(os.path.join(folder, ""))
        probe = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.unlink(temporary)
            return _clone(original, probe)
        finally:
            os.close(probe)
    finally:
        os.close(original)


def _copy_bytes(source: int, copy: int, size_bytes: int) -> None:
    if size_bytes and _clone(source, copy):
        return
    done = _copy_in_kernel(source, copy, size_bytes)
    while done < size_bytes:
        part = os.pread(source, _READ_BYTES, done)
        if not part:
            raise StorageError("a file of the cache ended after %d of %d bytes" % (done, size_bytes))
        done += os.pwrite(copy, part, done)


def _clone(source: int, copy: int) -> bool:
    try:
        fcntl.ioctl(copy, _FICLONE, source)
        return True
    except OSError as error:
        if error.errno in _NOT_SUPPORTED:
            return False
        raise


def _copy_in_kernel(source: int, copy: int, size_bytes: int) -> int:
    """How many bytes it copied: all, or as many as it could before something turned out not to be supported."""
    done = 0
    while done < size_bytes and hasattr(os, "copy_file_range"):  # a Python built for old C libraries lacks it
        try:
            step = os.copy_file_range(source, copy, min(_COPY_BYTES, size_bytes - done), done, done)
        except OSError as error:
            if error.errno in _NOT_SUPPORTED:
                break
            raise
        if not step:  # some filesystems say so for what they can't do
            break
        done += step
    return done


def _foreign(target: str, ours: Set[str]) -> List[str]:
    found = []
    for name, entry in walk(target):
        if name not in ours and not entry.is_dir(follow_symlinks=False) and not name.startswith(".cache/huggingface/"):
            found.append(name)
            if len(found) > _FOREIGN_NAMED:
                break
    return found


def foreign_warning(target: str, names: List[str]) -> str:
    more = ", ..." if len(names) > _FOREIGN_NAMED else ""
    return "%s also holds files that were there before; they stay: %s%s" % (target, ", ".join(names[:_FOREIGN_NAMED]), more)


def _beside(destination: str) -> str:
    return os.path.join(os.path.dirname(destination), ".modelcache-%d-%s.tmp" % (os.getpid(), os.urandom(6).hex()))


def _discard(path: str) -> None:
    try:
        os.unlink(path)
    except OSError:
        pass
