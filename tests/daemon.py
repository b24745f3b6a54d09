"""`Daemon`: the real daemon in a process of its own, in the hands of a test.

    with Hub.start(tmp_path) as hub, Daemon.start(tmp_path / "root", hub, fresh_seconds=0) as daemon:
        subprocess.run([...], env=daemon.environment)

Invariants: it is ready when `start` and `restart` return (its own READY=1, on a notify socket); it is ended by its pid when the
block ends; an orderly end has exit code 0 and leaves nothing in root/tmp. Calls block: an asynchronous test makes them in a thread.
"""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, Self

import modelcache
import modelcached

from .conftest import as_uid

START_SECONDS = 20.0
END_SECONDS = 20.0
NOBODY_LISTENS = "http://127.0.0.1:9"  # the hub of a daemon that is given none
TASKS_OWN = ("HF_", "HUGGING_FACE_", "TRANSFORMERS_", "MODELCACHE_SOCKET", "MODELCACHE_LOADED", "MODELCACHED_", "XDG_")
IMPORT_PATH = os.pathsep.join(dict.fromkeys(str(Path(str(package.__file__)).parents[1]) for package in (modelcache, modelcached)))


class HasEndpoint(Protocol):
    endpoint: str


class DaemonError(AssertionError):
    """The daemon did not do what every daemon does; the message has the end of its log."""


def clean_environment(**more: str) -> dict[str, str]:
    """This process's environment without anything that says who or where the caller is, so that a test says it."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(TASKS_OWN)}
    return {**kept, "PYTHONPATH": IMPORT_PATH, **more}


class Daemon:
    """A running daemon. `config` are fields of its configuration, in the spelling of the configuration (fresh_seconds=0)."""

    wrapper: Sequence[str] = ()  # a subclass says what runs the interpreter: strace
    program: Sequence[str] = ("-m", "modelcached")  # and what the interpreter runs: a daemon that is broken on purpose

    def __init__(self, root: Path | str, hub: HasEndpoint | str | None, uid: int | None, config: dict[str, Any]) -> None:
        self.root = Path(root)
        self.uid = uid  # None: the test's own
        self.config: dict[str, Any] = {"hub_endpoint": _endpoint(hub), **config}
        self.log_path = self.root.with_name(self.root.name + ".log")
        self._folder = Path(tempfile.mkdtemp(prefix="modelcached-"))  # a socket's path has to be short; pytest's folders are not
        self._folder.chmod(0o755)
        self.socket = str(self._folder / "modelcached.sock")
        self._process: subprocess.Popen[bytes] | None = None

    @classmethod
    def start(cls, root: Path | str, hub: HasEndpoint | str | None = None, *, uid: int | None = None, **config: Any) -> Daemon:
        """Starts it on `root`, for `hub` (a Hub, an URL, or None: a hub that is down), as `uid` (the caller is root then)."""
        daemon = cls(root, hub, uid, config)
        try:
            if uid is not None:
                daemon.root.mkdir(parents=True, exist_ok=True)
                os.chown(daemon.root, uid, uid)
                os.chown(daemon._folder, uid, uid)
            daemon._launch()
            return daemon
        except BaseException:
            daemon.close()
            raise

    @property
    def pid(self) -> int:
        assert self._process is not None, "the daemon does not run"
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def log(self) -> str:
        """What it wrote so far, in all its lives."""
        with contextlib.suppress(FileNotFoundError):
            return self.log_path.read_text()
        return ""

    @property
    def environment(self) -> dict[str, str]:
        """For a client's process."""
        return clean_environment(MODELCACHE_SOCKET=self.socket)

    @property
    def memory_bytes(self) -> int:
        """What it has in memory now (RSS)."""
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def status(self) -> dict[str, Any]:
        """Its reply to `status`, over a connection of its own."""
        from modelcache.client import Client

        client = Client(self.socket)
        try:
            return client.call("status")
        finally:
            client.close()

    def kill(self) -> None:
        """kill -9; returns when it is dead."""
        process = self._take()
        process.kill()
        process.wait()

    def terminate(self) -> None:
        """Asks it to end, and checks that it does so in order."""
        process = self._take()
        process.terminate()
        try:
            code = process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise self._error(f"the daemon did not end within {END_SECONDS:.0f} s of SIGTERM") from None
        if code:
            raise self._error(f"the daemon ended with exit code {code}")
        self.check_no_temp_files()

    def restart(self, **config: Any) -> None:
        """A new process on the same root and socket, with these fields changed. One that runs is ended in order first."""
        if self.is_running:
            self.terminate()
        elif self._process is not None:
            self._take().wait()
        self.config.update(config)
        self._launch()

    def check_no_temp_files(self) -> None:
        """Nothing half-made lies around. True of a daemon that ended, and soon of one with nothing to do: the scrub notes how far it is."""
        deadline = time.monotonic() + END_SECONDS
        while (left := sorted(os.listdir(self.root / "tmp"))) and self.is_running and time.monotonic() < deadline:
            time.sleep(0.01)  # it tells nobody
        if left:
            raise self._error(f"left in {self.root / 'tmp'}: {', '.join(left[:5])}")

    def close(self, is_orderly: bool = False) -> None:
        try:
            if self._process is not None and is_orderly:
                self.terminate()
            elif self._process is not None:
                self.kill()
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.close(is_orderly=kind is None)

    def _launch(self) -> None:
        flags = [f"--{name.replace('_', '-')}={_spelt(value)}" for name, value in self.config.items()]
        flags += [f"--root={self.root}", f"--socket={self.socket}"]
        command = [*self.wrapper, sys.executable, *self.program, "serve", "--log-level", "debug", *flags]
        self.root.parent.mkdir(parents=True, exist_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as notified:
            notified.bind(b"\0modelcached-test-" + os.urandom(8).hex().encode())  # in no folder: every uid may write to it
            address = "@" + notified.getsockname()[1:].decode()
            with open(self.log_path, "ab") as log:
                self._process = subprocess.Popen(
                    command if self.uid is None else [*as_uid(self.uid), *command],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    cwd="/",
                    env=clean_environment(NOTIFY_SOCKET=address, **({} if self.uid is None else {"HOME": str(self._folder)})),
                )
            self._wait_until_ready(notified)

    def _wait_until_ready(self, notified: socket.socket) -> None:
        deadline = time.monotonic() + START_SECONDS
        with contextlib.ExitStack() as stack:
            ended = os.pidfd_open(self.pid)
            stack.callback(os.close, ended)
            waiting = select.poll()
            waiting.register(notified, select.POLLIN)
            waiting.register(ended, select.POLLIN)
            while (left := deadline - time.monotonic()) > 0:
                events = {descriptor for descriptor, _ in waiting.poll(left * 1000)}
                if notified.fileno() in events:
                    if b"READY=1" in notified.recv(4096).split(b"\n"):
                        return
                elif ended in events:
                    raise self._error(f"the daemon ended with exit code {self._take().wait()} before it was ready")
        raise self._error(f"the daemon was not ready within {START_SECONDS:.0f} s")

    def _take(self) -> subprocess.Popen[bytes]:
        assert self._process is not None, "the daemon does not run"
        process, self._process = self._process, None
        return process

    def _error(self, message: str) -> DaemonError:
        return DaemonError(f"{message}; its log ends:\n{self.log[-3000:]}")

    def __repr__(self) -> str:
        how = "not running" if self._process is None else f"pid {self._process.pid}"
        return f"<Daemon {self.root} {how}>"


def _endpoint(hub: HasEndpoint | str | None) -> str:
    return NOBODY_LISTENS if hub is None else hub if isinstance(hub, str) else hub.endpoint


def _spelt(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else ",".join(value) if isinstance(value, (list, tuple)) else str(value)
