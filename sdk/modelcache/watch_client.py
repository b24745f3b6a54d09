"""Watching a directory, seen from the process that asks for it: `start`, and the handle that it gives.

The watching itself goes on in the daemon when that has this process's uid, else in a helper process of this uid; either way it
outlives this process, until everything complete was captured. Handle and watcher talk over one stream socket, a JSON object a line
each way; that it closes is how the watcher learns that this process is gone.

Each unit (a checkpoint as its trainer wrote it: a folder or one file) is kept as a checkpoint reference of `ask.name`, with these
fields beside those of every checkpoint; whoever puts a unit back needs nothing else:

    unit        its path in the watched directory, "checkpoint-100" or "lightning_logs/version_0/checkpoints/epoch=1-step=20.ckpt".
    unit_type   "folder": what a load gives are the contents of that folder; "file": a load gives one file, named like the unit.
    layout      the rule that found it ("hf-trainer", ..., "quiet" for the fallback).
    complete    "whole", or "guessed" when only quiet told that nobody was writing to it any more.
    written_ns  when its trainer changed it last (nanoseconds since the epoch). The newest unit is the one with the greatest
                (written_ns, step), not the one saved last: who comes late takes the newest first.
    companions  {path in the watched directory: text}: files that lie beside the unit and name it, for the trainer to find ("latest",
                "latest_checkpointed_iteration.txt"); to be written when the unit is put back, in exactly this text, after it.
    aliases     {path in the watched directory: target}: symbolic links that stood for the unit, or for the newest ("last.ckpt").
    extra       path in the watched directory of the copy that the trainer keeps of its newest one (Lightning's "last.ckpt" as a file,
                of about its size), or "": one killed between the two left that copy older than the unit. Where there is none, it is
                made of the unit.
    supersedes  the key that the same unit had before it changed; "" if there is none.

`metadata` holds `step` (int, if the unit's name tells) and the numbers that the trainer wrote about it as JSON: epoch, loss, ...
"""

from __future__ import annotations

import json
import os
import select
import socket
import sys
import threading
import time
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

from . import client, keys, layouts, units
from .connection import Connection, Reply, known_fields
from .errors import DaemonConnectionError, ModelcacheError, ProtocolError
from .protocol import HelloReply, WatchOpen

_LINGER_SECONDS = 60.0
_ANSWER_SECONDS = 15.0
_START_SECONDS = 30.0
_TICK_SECONDS = 1.0


class Ask(NamedTuple):
    directory: str
    name: str
    keep: Optional[int] = None
    keep_best: Optional[str] = None
    every: Optional[float] = None  # seconds between two captures, at least
    layout: str = "auto"  # "auto", the name of a rule in `layouts`, or the path of a JSON file with rules
    store: Optional[str] = None
    pathspec: Optional[str] = None
    attempt: int = 0
    restored: Tuple[str, ...] = ()  # units that were just put back: not captured again unless they change
    folder: Optional[str] = None  # of a task: in keys, where its checkpoints lie (`saving.checkpoint_reference`); None: the name says it
    marks: Dict[str, Any] = {}  # of a task: further fields of each reference (`latest`, `foreach_index`, `node_index`)


class Captured(NamedTuple):
    unit: str
    step: Optional[int]
    key: str
    when: float  # seconds since the epoch
    complete: str  # "whole" or "guessed"
    size_bytes: int = 0


class Status(NamedTuple):
    directory: str
    name: str
    where: str  # "daemon" or "helper <pid>"
    captured: List[Captured]  # the latest ones, oldest first
    captured_count: int  # ever
    skipped: List[str]  # what was not captured and why, one sentence each; the latest ones
    last_error: str
    pending: List[str]  # keys that are captured on this node and not known to be in the store
    scan_only: bool  # no events: the tree is looked at every few seconds
    unfinished: List[str] = []  # units not captured yet; the directory, if a last look did not end in time


class Watch:
    """A running watch, for any number of threads. Its watcher goes on when this process ends without `stop`.

    When the watcher ends by itself (the daemon was restarted, the helper killed) another one is started.
    """

    def __init__(self, ask: Ask, linger: float = _LINGER_SECONDS, patience: float = _ANSWER_SECONDS) -> None:
        self._ask = ask
        self._linger = linger
        self._patience = patience  # seconds that an answer may take, beyond what is done for it
        self._rules = layouts.as_plain(layouts.rules(ask.layout))
        self._lock = threading.RLock()
        # Under the lock:
        self._control: Optional[socket.socket] = None
        self._received = b""
        self._error = ""  # why no watcher could be started again
        self._is_lost = False  # it was told to stop, and gave no answer in time
        self._is_over = threading.Event()
        self.where = ""
        self._begin()
        threading.Thread(target=self._mind, name="modelcache watch", daemon=True).start()

    def status(self) -> Status:
        """How it gets on. Takes no longer than a question to the daemon."""
        return self._order("status")

    def stop(self, deadline: float) -> Status:
        """One last look: everything complete is captured, then brought to the store, all within `deadline` seconds.

        Raises nothing for what did not get there: `pending` and `unfinished` of the status say it; daemon and watcher go on with it.
        DaemonConnectionError: there is no watcher, or it does not answer.
        """
        with self._lock:
            self._is_over.set()
            try:
                return self._order("stop", deadline)
            finally:
                self._hang_up()

    def close(self) -> None:
        """Lets go of the watcher; it ends by itself when nothing complete is left to capture. Idempotent."""
        with self._lock:
            self._is_over.set()
            self._hang_up()

    def descriptors(self) -> List[int]:
        """Of the way to the watcher, which takes this process for alive as long as anybody has it open."""
        with self._lock:
            return [] if self._control is None else [self._control.fileno()]

    # ---- under the lock

    def _order(self, what: str, deadline: float = 0.0) -> Status:
        end = time.monotonic() + deadline
        with self._lock:
            try:
                try:
                    answer = self._answer(what, end)
                except _Gone:  # once more, of another one
                    answer = self._answer(what, end)
            except ModelcacheError:
                raise
            except (_Gone, OSError) as error:
                raise DaemonConnectionError(
                    "the watch of %s gives no answer: %s" % (self._ask.directory, error),
                    "what was kept: modelcache checkpoints %s" % self._ask.name,
                ) from error
            answer["captured"] = [Captured(*each) for each in answer["captured"]]
            return known_fields(Status, answer)

    def _answer(self, what: str, end: float) -> Dict[str, Any]:
        if self._is_lost:
            raise _Late
        if self._control is None:
            self._begin()
        left = max(0.0, end - time.monotonic())
        try:
            return self._ask_for({"do": what, "deadline": left}, left + self._patience)
        except _Late:
            self._is_lost = what == "stop"  # it is at work on the last checkpoint, and another one would capture that again
            raise

    def _begin(self) -> None:
        self._hang_up()
        folder = os.path.realpath(self._ask.directory)
        above, entry = os.path.split(folder)
        parent = os.open(above, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)  # its owner may let others pass through it, and not list it
        try:
            self._control = _in_daemon(parent, folder, self._ask.name) or _in_helper(parent)
        finally:
            os.close(parent)
        self._received = b""
        first = {"ask": self._ask._asdict(), "rules": self._rules, "entry": entry or ".", "linger": self._linger}
        try:
            self.where = str(self._ask_for(first, self._patience)["where"])
        except _Gone as error:
            raise DaemonConnectionError("the watcher ended at once", "look into the daemon's log") from error
        self._ask = self._ask._replace(restored=())  # the next one finds in the store what was put back, and may find it changed

    def _ask_for(self, order: Dict[str, Any], seconds: float) -> Dict[str, Any]:
        control = self._control
        if control is None:
            raise _Gone
        try:
            control.settimeout(max(seconds, _TICK_SECONDS))
            control.sendall(json.dumps(order).encode() + b"\n")
            while b"\n" not in self._received:
                data = control.recv(1 << 16)
                if not data:
                    self._hang_up()
                    raise _Gone
                self._received += data
        except socket.timeout as error:
            self._hang_up()
            raise _Late from error
        except OSError as error:
            self._hang_up()
            raise _Gone from error
        line, _, self._received = self._received.partition(b"\n")
        return dict(json.loads(line))

    def _hang_up(self) -> None:
        control, self._control = self._control, None
        if control is not None:
            control.close()

    def _mind(self) -> None:
        """Starts another watcher when this one is gone."""
        while not self._is_over.wait(_TICK_SECONDS):
            if not self._lock.acquire(blocking=False):
                continue
            try:
                if self._is_over.is_set() or not _has_ended(self._control):
                    continue
                self._begin()
                self._error = ""
            except (ModelcacheError, OSError) as error:
                self._error = str(error)
            finally:
                self._lock.release()

    def __repr__(self) -> str:
        return "<Watch %s by %s>" % (self._ask.directory, self.where)


class _Gone(Exception):
    """The watcher has ended."""

    def __str__(self) -> str:
        return "it has ended"


class _Late(_Gone):
    """It does not answer in time."""

    def __str__(self) -> str:
        return "it is still at work, and goes on"


def start(ask: Ask, linger: float = _LINGER_SECONDS) -> Watch:
    """Watches `ask.directory`, which has to exist, from now on.

    When nobody holds the other end any more, the watcher goes on until all is captured and nothing changed for `linger` seconds.
    """
    return Watch(ask, linger)


def series_of(ask: Ask) -> units.Series:
    """What the watch keeps."""
    prefix = keys.checkpoints_of(ask.name) if ask.folder is None else keys.checkpoints_in(ask.folder)
    return units.Series(prefix, ask.name, ask.store, ask.pathspec, ask.marks)


def received_ask(values: Dict[str, Any]) -> Ask:
    """An Ask that travelled as JSON; fields of a newer SDK are left out."""
    ask = known_fields(Ask, values)
    return ask._replace(restored=tuple(ask.restored))


def _has_ended(control: Optional[socket.socket]) -> bool:
    if control is None:
        return True
    poll = select.poll()
    poll.register(control, 0)  # only what is always told: that nobody is at the other end
    return bool(poll.poll(0))


def _in_daemon(parent: int, directory: str, name: str) -> Optional[socket.socket]:
    """The way to a watcher in the daemon; None if that has another uid, or is too old."""

    def attempt(connection: Connection, _: HelloReply) -> Reply:
        return connection.request("watch", client.fields_of(WatchOpen(directory, name)), descriptors=[parent])

    try:
        reply = client.shared().session(attempt)
    except ProtocolError:  # it does not know the method
        return None
    if not reply.descriptors:
        return None
    return socket.socket(fileno=reply.descriptors[0])


def _in_helper(parent: int) -> socket.socket:
    import subprocess

    from . import launcher

    ours, theirs = socket.socketpair()
    try:
        subprocess.run(
            [sys.executable, "-m", "modelcache.watch_process", str(theirs.fileno()), str(parent)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",  # `-m` looks there for modules first
            env=dict(os.environ, PYTHONPATH=launcher.import_path(os.environ.get("PYTHONPATH", ""))),
            pass_fds=[theirs.fileno(), parent],
            start_new_session=True,
            timeout=_START_SECONDS,
            check=True,
        )
        return ours
    except BaseException as error:
        ours.close()
        if isinstance(error, subprocess.SubprocessError):
            hint = "try it: python -m modelcache.watch_process"
            raise DaemonConnectionError("no helper process could be started: %s" % error, hint) from error
        raise
    finally:
        theirs.close()
