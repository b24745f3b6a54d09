"""Starts a private daemon for this user where the daemon package is installed and nobody listens.

Invariants:
- One at a time: whoever starts one holds `launch.lock` and has seen, under it, that nobody listens.
- The socket listens before the daemon runs: it is bound here, under another name, renamed, and passed on as descriptor 3.
  So nobody has to wait until the daemon is ready; the kernel queues their connections.
- The daemon is nobody's child (no zombie in a process that lives longer), has its own session, and inherits its listener,
  /dev/null and its log, nothing else.
"""

from __future__ import annotations

import fcntl
import os
import socket
import sys
from typing import Dict

from . import runtime
from .errors import unavailable

_NEEDED = ("modelcached", "aiohttp", "huggingface_hub", "msgspec")  # the package comes with the SDK, what it needs does not
_OLDEST_PYTHON = (3, 11)
_BACKLOG = 1024
_MAX_LOG_BYTES = 1 << 20
_MAX_START_SECONDS = 30

# Runs between us and the daemon: puts the listener where systemd puts it, and leaves the daemon without a parent.
_DETACH = """
import os, signal, sys
signal.pthread_sigmask(signal.SIG_SETMASK, ())
listener, python = int(sys.argv[1]), sys.argv[2]
if listener == 3:
    os.set_inheritable(3, True)
else:
    os.dup2(listener, 3)
    os.close(listener)
if os.fork() == 0:
    os.execv(python, [python, "-m", "modelcached", "serve", "--private"])
"""

# A task's own wishes, which it sends with each request; a daemon for everybody must not take them for its own.
_NOT_THE_DAEMONS = (
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "HF_HUB_OFFLINE",
    "TRANSFORMERS_OFFLINE",
    "MODELCACHE_SOCKET",
    "LISTEN_FDNAMES",
    "NOTIFY_SOCKET",
    "WATCHDOG_PID",
    "WATCHDOG_USEC",
)


def refuse_if_impossible() -> None:
    """DaemonNotAvailableError when no daemon can be started from this interpreter, saying why."""
    from importlib.util import find_spec

    if sys.version_info < _OLDEST_PYTHON:
        raise unavailable("no daemon listens, and Python %d.%d is too old to run one" % sys.version_info[:2])
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise unavailable("no daemon listens, and none can be started: %s not installed here" % ", ".join(missing))
    if not sys.executable:
        raise unavailable("no daemon listens, and none can be started: this Python does not know its own executable")


def launch() -> bool:
    """Starts the user's daemon. False when another process is doing so right now, or one listens by now.

    Raises DaemonNotAvailableError when it is impossible, NotPermittedError when the runtime folder is somebody else's.
    """
    refuse_if_impossible()
    folder = runtime.make_folder()
    lock = os.open(os.path.join(folder, "launch.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        try:
            if _somebody_listens(runtime.user_socket()):
                return False
            listener = _listen(runtime.user_socket())
            try:
                _start(listener, folder)
            finally:
                listener.close()
            return True
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)  # a fork in another thread may have copied the descriptor
    finally:
        os.close(lock)


def _somebody_listens(path: str) -> bool:
    probe = socket.socket(socket.AF_UNIX)
    try:
        probe.setblocking(False)
        runtime.with_short_name(path, probe.connect)
        return True
    except BlockingIOError:  # its queue is full
        return True
    except (FileNotFoundError, ConnectionRefusedError):
        return False
    finally:
        probe.close()


def _listen(path: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    temporary = "%s.%d" % (path, os.getpid())
    try:
        try:
            os.unlink(temporary)  # of a process that died here and had our number
        except FileNotFoundError:
            pass
        runtime.with_short_name(temporary, listener.bind)
        os.chmod(temporary, 0o600)
        listener.listen(_BACKLOG)
        os.rename(temporary, path)
        return listener
    except BaseException:
        listener.close()
        raise


def _start(listener: socket.socket, folder: str) -> None:
    import subprocess

    with open(_fresh_log(folder), "ab") as log:
        subprocess.run(
            [sys.executable, "-I", "-S", "-c", _DETACH, str(listener.fileno()), sys.executable],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd="/",  # `-m` looks there for modules first
            env=_environment(),
            pass_fds=[listener.fileno()],
            start_new_session=True,
            timeout=_MAX_START_SECONDS,
            check=True,
        )


def _fresh_log(folder: str) -> str:
    path = os.path.join(folder, "daemon.log")
    try:
        if os.stat(path).st_size > _MAX_LOG_BYTES:
            os.replace(path, path + ".1")
    except FileNotFoundError:
        pass
    return path


def _environment() -> Dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if name not in _NOT_THE_DAEMONS}
    environment.update(LISTEN_FDS="1", LISTEN_PID="auto")
    environment["PYTHONPATH"] = import_path(environment.get("PYTHONPATH", ""))
    return environment


def import_path(inherited: str) -> str:
    """Where another interpreter finds the packages that this process found, however it came to find them."""
    from importlib.util import find_spec

    path = [os.path.abspath(entry) for entry in inherited.split(os.pathsep) if entry]
    for name in ("modelcached", "modelcache"):
        found = find_spec(name)
        for package in (found and found.submodule_search_locations) or ():
            parent = os.path.dirname(os.path.abspath(package))
            # where installed packages lie is on the path anyway, behind the standard library
            if parent not in path and os.path.basename(parent) not in ("site-packages", "dist-packages"):
                path.append(parent)
    return os.pathsep.join(path)
