"""Where this user's own daemon has its socket, its log and its lock, and where any daemon's socket is looked for.

The folder is the user's alone: a token travels over a socket in it, so a folder that somebody else owns or may enter is
refused, not used.
"""

from __future__ import annotations

import os
import stat
from typing import Callable, Optional, TypeVar

from .errors import NotPermittedError

NODE_SOCKET = "/run/modelcached/modelcached.sock"
_MAX_NAME_BYTES = 107  # what the kernel takes as a socket's name

_Result = TypeVar("_Result")


def folder() -> str:
    """`$XDG_RUNTIME_DIR/modelcached`, else `/tmp/modelcached-<uid>`. It may not exist yet."""
    base = os.environ.get("XDG_RUNTIME_DIR", "")
    if base and os.path.isdir(base):
        return os.path.join(base, "modelcached")
    return "/tmp/modelcached-%d" % os.geteuid()


def user_socket() -> str:
    return os.path.join(folder(), "modelcached.sock")


def named_socket() -> Optional[str]:
    """The socket the environment names: nothing else is tried then, and no daemon is started."""
    return os.environ.get("MODELCACHE_SOCKET") or None


def check_folder(path: str) -> None:
    """NotPermittedError unless `path` is missing or a folder that only this user may enter."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise NotPermittedError(
            "%s is not a folder that only uid %d may enter" % (path, os.geteuid()),
            "remove it, or set XDG_RUNTIME_DIR to a folder of your own",
        )


def make_folder() -> str:
    path = folder()
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        pass
    check_folder(path)
    return path


def last_words() -> str:
    """The end of the private daemon's log, for the error message when it did not live."""
    try:
        with open(os.path.join(folder(), "daemon.log"), "rb") as log:
            log.seek(max(0, os.fstat(log.fileno()).st_size - 2000))
            return "\n".join(log.read().decode(errors="replace").strip().splitlines()[-5:])
    except OSError:
        return ""


def with_short_name(path: str, use: Callable[[str], _Result]) -> _Result:
    """Calls `use` with a name for the socket at `path` that the kernel takes, however deep its folder lies."""
    if len(os.fsencode(path)) <= _MAX_NAME_BYTES:
        return use(path)
    folder_path, name = os.path.split(path)
    directory = os.open(folder_path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return use("/proc/self/fd/%d/%s" % (directory, name))
    finally:
        os.close(directory)
