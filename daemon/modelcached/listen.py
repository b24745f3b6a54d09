"""The socket the daemon listens on: passed in by whoever started it, or bound here.

A live daemon's socket is never taken over, and nothing but a dead socket is ever replaced. Who binds a path holds a lock
beside it (`<path>.lock`) for life, so two daemons that start together can't both find the socket dead.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import stat
from collections.abc import MutableMapping
from pathlib import Path

FIRST_PASSED_DESCRIPTOR = 3  # SD_LISTEN_FDS_START
BACKLOG = 1024
_LISTEN_VARIABLES = ("LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES")


class ListenError(Exception):
    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class Listener:
    """A listening socket. One that was passed in belongs to whoever passed it: its path is never removed here."""

    def __init__(self, listening: socket.socket, path: Path | None = None, lock: int | None = None) -> None:
        self.socket = listening
        self.path = path  # None: passed in
        self._lock = lock
        self._identity = _identity(path) if path else None

    def close(self) -> None:
        """Nobody is accepted from here on. Idempotent."""
        if self.path is not None and self._identity is not None:
            with contextlib.suppress(OSError):
                if _identity(self.path) == self._identity:
                    self.path.unlink()
        self._identity = None
        self.socket.close()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def adopt(environment: MutableMapping[str, str]) -> Listener | None:
    """The socket passed as descriptor 3, if one was passed to this process; its variables leave the environment.

    LISTEN_PID "auto" means whoever reads it: a starter that can't know the pid beforehand.
    """
    count, pid, _ = (environment.pop(name, "") for name in _LISTEN_VARIABLES)
    if not count or pid not in ("auto", str(os.getpid())):
        return None
    if count != "1":
        raise ListenError(f"{count} sockets were passed in, one is expected", "one ListenStream= in the socket unit")
    try:
        listening = socket.socket(fileno=FIRST_PASSED_DESCRIPTOR)
    except OSError as error:
        hint = "LISTEN_FDS is set, but nothing was passed"
        raise ListenError(f"descriptor {FIRST_PASSED_DESCRIPTOR} is no socket: {error.strerror}", hint) from None
    is_unix_stream = listening.family == socket.AF_UNIX and listening.type == socket.SOCK_STREAM
    if not is_unix_stream or not listening.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        listening.detach()
        message = f"descriptor {FIRST_PASSED_DESCRIPTOR} is not a listening Unix stream socket"
        raise ListenError(message, "ListenStream=/path in the socket unit")
    listening.set_inheritable(False)
    listening.setblocking(False)
    return Listener(listening)


def bind(path: Path, private: bool = False) -> Listener:
    """A new socket at `path`: 0666 (callers are told apart by their credentials), or 0600 in a folder of the user's own."""
    try:
        _make_folder(path.parent, private)
        lock = _lock(path)
    except OSError as error:
        hint = "choose another place with --socket, or start the daemon as its own user"
        raise ListenError(f"can't listen on {path}: {error.strerror}", hint) from None
    try:
        _remove_dead(path)
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        mask = os.umask(0o177 if private else 0o111)
        try:
            listening.bind(str(path))
        finally:
            os.umask(mask)
        listening.listen(BACKLOG)
        return Listener(listening, path, lock)
    except BaseException as error:
        os.close(lock)
        if isinstance(error, OSError):
            raise ListenError(f"can't listen on {path}: {error.strerror or error}", "choose another place with --socket") from None
        raise


def _make_folder(folder: Path, private: bool) -> None:
    folder.mkdir(mode=0o700 if private else 0o755, parents=True, exist_ok=True)
    found = folder.lstat()
    if private and (not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid()):
        raise ListenError(f"{folder} does not belong to this user", "set XDG_RUNTIME_DIR to a folder of your own")


def _lock(path: Path) -> int:
    lock = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise _served(path) from None
    return lock


def _remove_dead(path: Path) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise ListenError(f"{path} exists and is no socket", "it was left as it is: move it away, or choose another place with --socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        refusal = probe.connect_ex(str(path))
    if refusal == errno.ECONNREFUSED:
        path.unlink(missing_ok=True)
    elif refusal != errno.ENOENT:  # connected, or a full queue, or not ours to try: somebody is there
        raise _served(path)


def _served(path: Path) -> ListenError:
    return ListenError(f"another daemon serves {path}", "stop it first, or choose another place with --socket")


def _identity(path: Path) -> tuple[int, int]:
    found = path.lstat()
    return found.st_dev, found.st_ino
