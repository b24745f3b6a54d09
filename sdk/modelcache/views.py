"""What a caller gets to see of a view: the shared folder itself where the kernel protects it, else private files.

A view is read-only because its files are 0444 and belong to the daemon. That protects nothing from uid 0 unless the mount
is read-only, so root gets files that share their blocks with the cache (reflink) where the temp folder can hold such
files, and otherwise the shared view with one warning. MODELCACHE_LOADED=private gives private files to everybody.

Private copies made here live in the temp folder until `discard`, or until this process ends; a forked child makes its own.
"""

from __future__ import annotations

import os
import threading
from typing import Dict, List, Tuple, Union

from .errors import NotPermittedError, ViewNotVisibleError
from .protocol import FetchReply, LoadReply

Shown = Union[FetchReply, LoadReply]  # both say where a view is

_lock = threading.Lock()
_copies: Dict[Tuple[int, str, str], str] = {}  # (pid, root, tree) to the copy that stays until this process ends
_owned: List[Tuple[int, str]] = []  # (pid, folder): what is removed at exit
_can_clone: Dict[Tuple[int, str], bool] = {}  # (device of the view, temp folder)
_has_warned = False


def check_visible(reply: Shown, root: str) -> None:
    """That the path in a reply is, here, the folder the daemon means, and may be read."""
    try:
        found = os.stat(reply.path)
    except PermissionError as error:
        raise _not_permitted(reply.path) from error
    except OSError as error:
        raise _not_visible(reply.path, root, "is not here") from error
    if (found.st_dev, found.st_ino) != (reply.device, reply.inode):
        raise _not_visible(reply.path, root, "is another folder here than for the daemon")
    if not os.access(reply.path, os.R_OK | os.X_OK):
        raise _not_permitted(reply.path)


def wants_private() -> bool:
    """Whether this process asked for private writable files everywhere."""
    mode = os.environ.get("MODELCACHE_LOADED") or "shared"
    if mode not in ("private", "shared"):
        raise ValueError("MODELCACHE_LOADED is 'private' or 'shared', not %r" % mode)
    return mode == "private"


def is_protected(reply: Shown) -> bool:
    """Whether the kernel keeps this process from writing through the view. False for root without a read-only mount."""
    return os.geteuid() != 0 or bool(os.statvfs(reply.path).f_flag & os.ST_RDONLY)


def gets_copy(reply: Shown) -> bool:
    """Whether this caller gets private files although it did not name a place for them. May warn, once a process."""
    if wants_private():
        return True
    if is_protected(reply):
        return False
    if _temp_can_clone(reply.path):
        return True
    _warn_root(reply.path)
    return False


def kept_copy(reply: Shown, root: str) -> str:
    """A private copy of the view that stays until the process ends; the same one each time."""
    key = (os.getpid(), root, reply.tree)
    with _lock:
        copy = _copies.get(key)
        if copy is None or not os.path.isdir(copy):
            copy = _copies[key] = new_copy(reply.path)
        return copy


def new_copy(view: str) -> str:
    """A private copy of the view in the temp folder, until `discard` or the end of the process."""
    from . import files

    folder = os.path.join(_temp_folder(), "modelcache-%d-%s" % (os.getpid(), os.urandom(6).hex()))
    os.mkdir(folder, 0o700)
    if not _owned:
        import atexit

        atexit.register(_discard_all)
    _owned.append((os.getpid(), folder))
    try:
        files.copy_tree(view, folder)
    except BaseException:
        discard(folder)
        raise
    return folder


def discard(folder: str) -> None:
    from shutil import rmtree

    rmtree(folder, ignore_errors=True)
    _owned.remove((os.getpid(), folder))


def _discard_all() -> None:
    for pid, folder in list(_owned):
        if pid == os.getpid():  # a child that was forked and ends in order must not take its parent's
            discard(folder)


def _temp_folder() -> str:
    return os.environ.get("TMPDIR") or "/tmp"  # what tempfile would say; it takes milliseconds to import


def _temp_can_clone(view: str) -> bool:
    key = (os.stat(view).st_dev, _temp_folder())
    if key not in _can_clone:
        from . import files

        for _, entry in files.walk(view):
            if entry.is_file(follow_symlinks=False) and entry.stat().st_size:
                try:
                    _can_clone[key] = files.can_clone(entry.path, _temp_folder())
                except OSError:  # no temp folder, or a full one
                    _can_clone[key] = False
                break
        else:
            return False  # nothing in it that could be written through
    return _can_clone[key]


def _warn_root(path: str) -> None:
    global _has_warned
    if not _has_warned:
        _has_warned = True
        warn(
            "root can write through the shared files of %s, and must not: name a folder to put them into, or set MODELCACHE_LOADED=private"
            % path
        )


def warn(message: str) -> None:
    import logging  # takes milliseconds, and most processes have nothing to say

    logging.getLogger("modelcache").warning(message)


def _not_visible(path: str, root: str, what: str) -> ViewNotVisibleError:
    return ViewNotVisibleError(
        "the daemon's %s %s: the mount of %s is missing" % (path, what, root),
        "mount it at the same place, read-only: `docker run -v %s:%s:ro ...`, or in Kubernetes a hostPath volume with "
        "mountPath %s and readOnly: true" % (root, root, root),
        {"path": path, "root": root},
    )


def _not_permitted(path: str) -> NotPermittedError:
    return NotPermittedError(
        "uid %d may not read %s" % (os.geteuid(), path),
        "the daemon gives access to the uid that asked; ask as that user, or mount the cache so that uids stay what they are",
        {"path": path},
    )
