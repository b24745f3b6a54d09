"""Tasks: SDK code in real processes of its own, in the hands of a test.

    with Client.of(daemon) as task:
        outcome = task.call("snapshot_download", repo_id="org/name")

Invariants: every wait has a deadline; a process is ended by its pid when its block ends; nothing of the tester's own environment
(tokens, homes, hubs) reaches a task.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .conftest import ROOT, as_uid
from .daemon import Daemon
from .hub import Random
from .hub.oracle import Outcome

DEADLINE_SECONDS = 60.0

Tree = Mapping[str, bytes | Random]


class Client:
    """A task. One call at a time: `begin`, then `progress` as often as wanted, then `end`; or `call` for all of it."""

    def __init__(self, environment: Mapping[str, str], *, uid: int | None = None, command: Sequence[str] = ()) -> None:
        """`command` goes before the interpreter: another namespace, for example."""
        self._errors = tempfile.TemporaryFile()
        self._process: subprocess.Popen[bytes] | None = subprocess.Popen(
            [*(() if uid is None else as_uid(uid)), *command, sys.executable, "-m", "tests.client_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            cwd="/",
            env=_private_environment(environment),
        )
        assert self._process.stdin is not None and self._process.stdout is not None
        self.pid = self._process.pid
        self._in, self._out = self._process.stdin.fileno(), self._process.stdout.fileno()
        self._received = b""

    @classmethod
    def of(
        cls, daemon: Daemon, environment: Mapping[str, str] | None = None, *, uid: int | None = None, command: Sequence[str] = ()
    ) -> Client:
        """A task of that daemon's node; `environment` is added to what every task there has."""
        return cls({**daemon.environment, **(environment or {})}, uid=uid, command=command)

    def call(self, name: str, timeout: float = DEADLINE_SECONDS, **arguments: Any) -> Outcome:
        self.begin(name, **arguments)
        return self.end(timeout)

    def begin(self, name: str, **arguments: Any) -> None:
        os.write(self._in, json.dumps({"call": name, "arguments": arguments}).encode() + b"\n")

    def end(self, timeout: float = DEADLINE_SECONDS) -> Outcome:
        """What came of the call. Progress that nobody asked for is dropped."""
        deadline = time.monotonic() + timeout
        while "progress" in (message := self._next(deadline)):
            pass
        return Outcome(**message)

    @property
    def has_answered(self) -> bool:
        """Whether there is something to read: for a call without progress, its outcome."""
        return bool(self._received or select.select([self._out], [], [], 0)[0])

    def good(self, timeout: float = DEADLINE_SECONDS) -> Outcome:
        """`end` of a call that has to succeed."""
        outcome = self.end(timeout)
        assert outcome.error is None, f"{outcome.error[0]}: {outcome.message}"
        return outcome

    def progress(self, wanted: Callable[[dict[str, Any]], bool], timeout: float = DEADLINE_SECONDS) -> dict[str, Any]:
        """The first notification of a raw fetch that is as wanted."""
        deadline = time.monotonic() + timeout
        seen: list[dict[str, Any]] = []
        while "progress" in (message := self._next(deadline)):
            seen.append(message["progress"])
            if wanted(seen[-1]):
                return seen[-1]
        raise AssertionError(f"ended without it: {message}; progress: {seen[-3:]}")

    def download(self, repo_id: str, timeout: float = DEADLINE_SECONDS, **arguments: Any) -> str:
        """The folder that snapshot_download returns."""
        self.begin("snapshot_download", repo_id=repo_id, **arguments)
        path = self.good(timeout).path
        assert path is not None
        return path

    def fetch(self, repo_id: str, timeout: float = DEADLINE_SECONDS, **arguments: Any) -> dict[str, Any]:
        """The daemon's whole reply."""
        self.begin("fetch", repo_id=repo_id, **arguments)
        reply: dict[str, Any] = self.good(timeout).value
        return reply

    def ask(self, method: str, **arguments: Any) -> Any:
        """Any other verb."""
        self.begin("ask", method=method, **arguments)
        return self.good().value

    def refused(self, name: str, timeout: float = DEADLINE_SECONDS, **arguments: Any) -> Outcome:
        """The outcome of a call that has to fail."""
        outcome = self.call(name, timeout, **arguments)
        assert outcome.error is not None, f"succeeded with {outcome.path} {outcome.value}"
        return outcome

    @property
    def stderr(self) -> str:
        """What the process wrote there so far: warnings."""
        return os.pread(self._errors.fileno(), 1 << 20, 0).decode(errors="replace")

    def fork(self) -> Client:
        """The handle of a child that the task forks now: it inherits connections and leases."""
        with tempfile.TemporaryDirectory(prefix="modelcached-fork-") as folder:
            os.chmod(folder, 0o777)
            asked, told = os.path.join(folder, "asked"), os.path.join(folder, "told")
            for path in (asked, told):
                os.mkfifo(path)
                os.chmod(path, 0o666)
            self.begin("fork", asked=asked, told=told)
            child = Client.__new__(Client)
            child.pid = self.good().value
            child._errors, child._process, child._received = self._errors, None, b""
            child._out = os.open(told, os.O_RDONLY)  # both opens wait for the child's
            child._in = os.open(asked, os.O_WRONLY)
        return child

    def kill(self) -> None:
        """kill -9; returns when it is dead."""
        with contextlib.suppress(ProcessLookupError):
            ended = os.pidfd_open(self.pid)
            os.kill(self.pid, 9)
            select.select([ended], [], [], DEADLINE_SECONDS)
            os.close(ended)
        if self._process is not None:
            self._process.wait(DEADLINE_SECONDS)

    def close(self) -> None:
        self.kill()
        if self._process is None:
            os.close(self._in)
            os.close(self._out)
            return
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _next(self, deadline: float) -> dict[str, Any]:
        while b"\n" not in self._received:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._out], [], [], left)[0]:
                raise AssertionError(f"the task did not answer in time; its stderr: {self.stderr[-2000:]}")
            data = os.read(self._out, 1 << 16)
            if not data:
                raise AssertionError(f"the task has ended; its stderr: {self.stderr[-2000:]}")
            self._received += data
        line, _, self._received = self._received.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message

    def __repr__(self) -> str:
        return f"<Client pid {self.pid}>"


@contextlib.contextmanager
def clients(daemon: Daemon, count: int) -> Iterator[list[Client]]:
    """So many tasks of that daemon's node, each in a process of its own."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(Client.of(daemon)) for _ in range(count)]


def hashes(tree: Tree) -> dict[str, str]:
    """What `file_hashes` of a folder has to be that shows this."""
    return {path: sha256(content) for path, content in tree.items()}


def sha256(content: bytes | Random) -> str:
    digest = hashlib.sha256()
    for chunk in [content] if isinstance(content, bytes) else content.chunks():
        digest.update(chunk)
    return digest.hexdigest()


def blobs(daemon: Daemon) -> set[str]:
    """The names below blobs/: what is complete, whatever else lies around."""
    return {path.name for path in (daemon.root / "blobs" / "sha256").glob("*/*")}


def partials(daemon: Daemon) -> dict[str, int]:
    """The unfinished downloads, each with the bytes that its map vouches for."""
    found = {}
    for path in (daemon.root / "partial").glob("*.map"):
        with contextlib.suppress(OSError, ValueError):
            lines = path.read_text().splitlines()
            found[path.stem] = sum(int(line.split()[1]) for line in lines if len(line.split()) == 3)
    return found


def views(daemon: Daemon) -> list[Path]:
    return sorted((daemon.root / "views").iterdir())


def _private_environment(environment: Mapping[str, str]) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH", "")]))
    # A home without a token, and a temp folder on another filesystem than the root: what root gets is the shared view everywhere.
    return {"HF_HOME": "/nonexistent", **environment, "TMPDIR": "/dev/shm", "PYTHONPATH": path}
