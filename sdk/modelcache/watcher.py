"""The watcher: looks at a folder again and again, and captures what has become complete. Where it runs, `watch_host` decides.

Events only wake it up; what is there, a scan says. One thread does all of it, so nothing here needs a lock but the few fields
that `report` copies.

Invariants:
- Nothing is written to the watched folder, and no file in it is opened but for reading.
- A unit is captured only when it has passed every gate, was quiet for its time, and was the same after the capture.
- What is left of a unit while somebody removes it is no news: of one that was captured, or that newer ones have followed.
- The newest unit comes first. One that can't be captured is said to be skipped, and stands in nobody's way.
"""

from __future__ import annotations

import os
import threading
import time
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Set

from . import candidates, gates, keys, references, saving, scanning, unit_capture
from .candidates import Entries, Unit
from .errors import FileChangedError, ModelcacheError, NotSaveableError
from .layouts import Rule
from .units import is_extra
from .watch_client import Ask, Captured

WAKE_SECONDS = 0.2  # between an event and the scan: many events come together
SCAN_SECONDS = 5.0  # between scans that nothing asked for
_SHARE = 0.05  # of a core: so much scans may take, where a folder is so large that they take long
_BACKOFF_SECONDS = 5.0  # after the daemon refused, doubled up to
_LONGEST_BACKOFF = 60.0
_WRITER_SECONDS = 15.0  # at the end, for whoever has a file open for writing
_REMEMBERED = 100  # captured and skipped units that the status names
_GONE = "; it is gone"


class Report(NamedTuple):
    captured: List[Captured]
    captured_count: int
    skipped: List[str]
    last_error: str
    is_settled: bool  # nothing complete waits to be captured
    quiet_since: float  # time.monotonic: when a unit changed last
    looked: float  # and when the last look began that has ended
    unfinished: List[str]  # units that wait to be captured, or are being captured
    scanned: float  # when the look began that found these


class _Known(NamedTuple):
    signature: int
    key: str  # "" if it was here before, or can't be captured at all


class _Watched(NamedTuple):
    signature: int
    since: float  # time.monotonic, when this signature was seen first
    scans: int
    whole: Entries  # when nothing spoke against it
    is_rest: bool  # of that: files of it went since, and no other was written


class Watcher:
    """`parent` is a descriptor of the folder that `ask.directory` lies in, `name` what it is called there; `rules` are of `ask.layout`.

    Another folder that takes its name is watched instead of it. `on_folder` is called with the descriptor of each that is watched.
    """

    def __init__(
        self,
        ask: Ask,
        parent: int,
        name: str,
        rules: Sequence[Rule],
        retain: Callable[[Ask], object] = lambda ask: None,
        on_folder: Callable[[int], object] = lambda folder: None,
    ) -> None:
        self._ask = ask
        self._parent = parent
        self._name = name
        self._folder = -1
        self._rules = rules
        self._retain = retain
        self._on_folder = on_folder
        self._wake = threading.Event()
        self._hurry = threading.Event()
        self._known: Dict[str, _Known] = {}
        self._watched: Dict[str, _Watched] = {}
        self._unsure: Set[str] = set()  # units on a filesystem that tells nobody's writers
        self._last_capture = float("-inf")
        self._backoff = _BACKOFF_SECONDS
        self._not_before = float("-inf")  # the daemon has refused
        self._patient_until = float("inf")  # with who has a file open for writing
        self._is_first = True
        # Under the lock:
        self._lock = threading.Lock()
        self._captured: List[Captured] = []
        self._count = 0
        self._skipped: Dict[str, str] = {}
        self._last_error = ""
        self._is_settled = False
        self._quiet_since = time.monotonic()
        self._looked = float("-inf")
        self._unfinished: List[str] = []
        self._scanned = float("-inf")
        self._new_keys: List[str] = []

    def wake(self) -> None:
        """Something may have happened. From any thread."""
        self._wake.set()

    def end(self) -> None:
        """`run` returns after the look that it takes now. From any thread."""
        self._hurry.set()
        self._wake.set()

    def report(self) -> Report:
        with self._lock:
            skipped = list(self._skipped.values())
            captured, error = list(self._captured), self._last_error
            looked, unfinished = (self._quiet_since, self._looked), list(self._unfinished)
            return Report(captured, self._count, skipped, error, self._is_settled, *looked, unfinished, self._scanned)

    def new_keys(self) -> List[str]:
        """Of what was captured since the last call, by an earlier watch too: the store may not have it yet."""
        with self._lock:
            new, self._new_keys = self._new_keys, []
            return new

    def run(self) -> None:
        """Until `end`."""
        while not self._hurry.is_set():
            self._wake.clear()
            began = time.thread_time()
            try:
                pause = self.look()
            except Exception as error:  # of whatever kind: to stop looking without a word would be worse
                self._failed("unexpected: %r" % error)
                pause = SCAN_SECONDS
            rest = (time.thread_time() - began) / _SHARE
            self._wake.wait(max(pause, rest) if pause >= SCAN_SECONDS else pause)
            if self._wake.is_set():
                self._hurry.wait(min(max(WAKE_SECONDS, rest), SCAN_SECONDS))

    def finish(self, deadline: float) -> None:
        """Captures everything that is complete until `deadline` (time.monotonic), after `run` has returned. Nobody writes any more,
        as far as the caller knows: so what has to be quiet for longer than a third of the time that is left need not be."""
        cap = max(1.0, (deadline - time.monotonic()) / 3)
        self._patient_until = time.monotonic() + _WRITER_SECONDS
        while True:
            wait = self.look(cap)
            if self.report().is_settled or time.monotonic() + wait > deadline:
                return
            time.sleep(max(min(wait, WAKE_SECONDS), 0.01))  # a trainer's last words may come without an event

    def look(self, cap: Optional[float] = None) -> float:
        """One scan, and the captures that it leads to. Returns after how many seconds the next one makes sense.

        `cap`: at the end nothing waits for longer, nor for `every`.
        """
        began = time.monotonic()
        try:
            self._follow_root()
            scan = scanning.scan(self._folder)
        except OSError as error:
            self._failed("%s can't be looked at: %s" % (self._ask.directory, error.strerror or error))
            self._settle(True, began)
            return SCAN_SECONDS
        if scan.problems:
            self._failed(scan.problems[0])
        units = candidates.find(scan, self._rules)
        self._remember(units)
        if self._is_first:
            self._recognise(units)
            self._is_first = False
        for unit in units[:-1]:  # newer ones have followed
            if self._watched[unit.path].is_rest and self._is_news(unit):
                self._give_up(unit, "files of it were removed before")
        pending = [unit for unit in units if self._is_news(unit)]
        for unit in pending:
            if unit.problem:
                self._skip(unit, unit.problem)
        ready, waits, looks = [], [], [SCAN_SECONDS]
        for unit in (unit for unit in pending if not unit.problem):
            wait = self._wait_for(unit, cap)
            if wait > 0:
                waits.append(wait)
            else:
                ready.append(unit)
        with self._lock:
            self._unfinished, self._scanned = [unit.path for unit in pending if not unit.problem], began
        most = 1 if self._ask.every else self._ask.keep if self._ask.keep_best is None else None
        if cap is not None and self._ask.every and waits:  # the last one that there will be is waited for
            ready = []
        taken = 0
        last = next((unit.path for unit in reversed(units) if is_extra(unit.path)), "")
        for unit in sorted(ready, key=lambda unit: unit.order, reverse=True):
            is_beside = unit.path == last  # as `retention.plan` counts
            if most is not None and taken >= most and not is_beside:
                self._give_up(unit, "newer ones are kept")
                self._done_with(unit)
                continue
            wait = self._take(unit, cap)
            taken += wait == 0 and not is_beside
            last = "" if wait == 0 and unit.extra == last else last  # it can be made of this one
            if wait > 0:
                waits.append(wait)
                continue
            self._done_with(unit)
            if wait < 0:
                looks.append(-wait)
        self._settle(not waits, began)
        return min([*looks, *waits])

    def close(self) -> None:
        for descriptor in (self._folder, self._parent):
            if descriptor >= 0:
                os.close(descriptor)
        self._folder = self._parent = -1

    # ---- which

    def _follow_root(self) -> None:
        """Opens the folder that has the name now. While none has it, what is in the one that had it can still become complete."""
        try:
            now = os.stat(self._name, dir_fd=self._parent, follow_symlinks=False)
            if self._folder >= 0:
                here = os.fstat(self._folder)
                if (now.st_dev, now.st_ino) == (here.st_dev, here.st_ino):
                    return
            opened = scanning.open_folder(self._parent, self._name)
        except OSError:
            if self._folder < 0:
                raise
            return
        if self._folder >= 0:
            os.close(self._folder)
            self._known.clear()
        self._folder = opened
        self._on_folder(opened)

    def _remember(self, units: Sequence[Unit]) -> None:
        now = time.monotonic()
        before, self._watched = self._watched, {}
        for unit in units:
            seen = before.get(unit.path)
            if seen is None or seen.signature != unit.signature:
                is_rest = seen is not None and unit.is_rest_of(seen.whole)
                whole = seen.whole if seen is not None and is_rest else () if unit.problem else unit.entries
                seen = _Watched(unit.signature, now, 0, whole, is_rest)
                self._quiet_since = now
            self._watched[unit.path] = seen._replace(scans=seen.scans + 1)
        gone = [path for path in self._skipped if path not in self._watched and not self._skipped[path].endswith(_GONE)]
        for path in gone:
            self._say(path, self._skipped[path] + _GONE)

    def _recognise(self, units: Sequence[Unit]) -> None:
        """What was put back, or captured by an earlier watch and not touched since, is no news."""
        if not units:
            return
        saved = {str(each.get("unit")): each for each in self._saved()}
        for unit in units:
            reference = saved.get(unit.path, {})
            written, size = reference.get("written_ns", -1), reference.get("size", -1)
            # Smaller, and nothing in it is newer: what was left of it when somebody removed it.
            is_saved = (unit.written_ns, unit.size) == (written, size) or (unit.written_ns <= written and unit.size < size)
            if unit.path in self._ask.restored or is_saved:
                key = str(reference.get("key", ""))
                self._known[unit.path] = _Known(unit.signature, key)
                with self._lock:
                    self._new_keys += [key] if key else []

    def _saved(self) -> List[Dict[str, Any]]:
        try:
            return list(reversed(references.of_task(prefix_of(self._ask), self._ask.pathspec, self._ask.name, self._ask.store)))
        except ModelcacheError as error:
            self._failed(str(error))
            return []

    def _is_news(self, unit: Unit) -> bool:
        known, seen = self._known.get(unit.path), self._watched[unit.path]
        return known is None or known.signature not in ([unit.signature, hash(seen.whole)] if seen.is_rest else [unit.signature])

    def _wait_for(self, unit: Unit, cap: Optional[float]) -> float:
        """Seconds until it has been quiet for long enough, and the next capture is due; 0: it may be captured."""
        settle = max(unit.settle, gates.UNSURE_SETTLE) if unit.path in self._unsure else unit.settle
        seen = self._watched[unit.path]
        # A stamp in the future (a clock that was set, a server's): then only what was seen counts.
        quiet = max((time.time_ns() - unit.changed_ns) / 1e9, time.monotonic() - seen.since)
        wait = (settle if cap is None else min(settle, cap)) - quiet
        if unit.rule.guessed and seen.scans < 2:
            wait = max(wait, WAKE_SECONDS)
        if cap is None:
            wait = max(wait, self._last_capture + (self._ask.every or 0.0) - time.monotonic(), self._not_before - time.monotonic())
        return max(wait, 0.0)

    # ---- taking

    def _take(self, unit: Unit, cap: Optional[float]) -> float:
        """Captures it if it passes the gates. 0: done with; else after so many seconds it is tried again (negative: if it changes)."""
        verdict = gates.examine(self._folder, unit)
        if verdict.problem:
            self._skip(unit, verdict.problem)
            return WAKE_SECONDS if verdict.is_written and time.monotonic() < self._patient_until else -SCAN_SECONDS
        if verdict.is_unsure and unit.path not in self._unsure:
            self._unsure.add(unit.path)
            wait = self._wait_for(unit, cap)
            if wait > 0:
                return wait
        before = self._known.get(unit.path)
        reference = saving.checkpoint_reference(self._ask.name, self._ask.pathspec, self._ask.attempt, self._ask.folder)
        reference.update(self._ask.marks)
        reference["supersedes"] = before.key if before else ""
        try:
            kept = unit_capture.capture(self._folder, unit, self._ask.directory, reference, self._ask.store)
        except FileChangedError as error:
            self._skip(unit, error.message)
            return WAKE_SECONDS
        except NotSaveableError as error:
            self._give_up(unit, error.message)
            return 0.0
        except (ModelcacheError, OSError) as error:  # no room, no daemon: the newest one that is there then is tried again
            self._skip(unit, str(error))
            self._failed(str(error))
            self._not_before = time.monotonic() + self._backoff
            wait, self._backoff = self._backoff, min(self._backoff * 2, _LONGEST_BACKOFF)
            return wait
        self._took(unit, kept)
        return 0.0

    def _took(self, unit: Unit, kept: Dict[str, Any]) -> None:
        self._known[unit.path] = _Known(unit.signature, str(kept["key"]))
        self._last_capture = time.monotonic()
        self._backoff, self._not_before = _BACKOFF_SECONDS, float("-inf")
        captured = Captured(unit.path, unit.step, str(kept["key"]), time.time(), str(kept["complete"]), unit.size)
        with self._lock:
            self._captured = [*self._captured, captured][-_REMEMBERED:]
            self._new_keys.append(captured.key)
            self._count += 1
            self._skipped.pop(unit.path, None)
            self._last_error = ""
        self._done_with(unit)
        try:
            self._retain(self._ask)
        except (ModelcacheError, OSError, ValueError) as error:
            self._failed(str(error))

    def _give_up(self, unit: Unit, why: str) -> None:
        """It is not tried again unless it changes."""
        self._known[unit.path] = _Known(unit.signature, "")
        self._skip(unit, why)

    # ---- telling

    def _skip(self, unit: Unit, why: str) -> None:
        self._say(unit.path, "%s was not captured: %s" % (scanning.shown(unit.path), why))

    def _say(self, path: str, what: str) -> None:
        with self._lock:
            if self._skipped.get(path) != what:
                self._skipped.pop(path, None)
            self._skipped[path] = what
            while len(self._skipped) > _REMEMBERED:
                del self._skipped[next(iter(self._skipped))]

    def _failed(self, what: str) -> None:
        with self._lock:
            self._last_error = what

    def _done_with(self, unit: Unit) -> None:
        with self._lock:
            self._unfinished = [path for path in self._unfinished if path != unit.path]

    def _settle(self, is_settled: bool, began: float) -> None:
        with self._lock:
            self._is_settled, self._looked = is_settled, began
            if is_settled:
                self._unfinished, self._scanned = [], began

    def __repr__(self) -> str:
        return "<Watcher %s units=%d captured=%d>" % (self._ask.directory, len(self._watched), self._count)


def prefix_of(ask: Ask) -> str:
    """What the keys of these checkpoints begin with."""
    return keys.checkpoints_of(ask.name) if ask.folder is None else keys.checkpoints_in(ask.folder)
