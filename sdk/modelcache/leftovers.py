"""What a run that was killed left in a watched folder: units that are newer than what was kept, whole or half; and a place to work in.

Invariants:
- Nothing of the user is deleted: half a unit, which the trainer would try to resume from, is moved out of the folder, and where to is said.
  So is what has the name of what is put back, and is older and another.
- Half a unit is moved only when it has been quiet for as long as a watch would wait: another process may be writing it.
- What is made on the way lies beside the folder, on the same filesystem; what a killed process left of it goes with the next one.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from contextlib import contextmanager
from typing import Dict, Iterator, List, NamedTuple, Optional, Tuple

from . import candidates, gates, layouts, probe, scanning, units

_DIGITS = re.compile(r"\d+")
_VERSION = re.compile(r"(?:-v\d+)?\.ckpt\Z")  # Lightning's, of a name that was taken
_POLL_SECONDS = 0.5  # the quiet sends no events


class Newer(NamedTuple):
    """Units in the folder that were written after a moment, by their paths in it; the newest first."""

    whole: List[str]
    partial: List[str]


class _Look(NamedTuple):
    entries: Dict[str, scanning.Entry]
    is_written: bool

    @property
    def changed(self) -> float:
        return max((entry.mtime_ns for entry in self.entries.values()), default=0) / 1e9


def newer(directory: str, unit: str, layout: str, written: float, is_guessed: bool) -> Newer:
    """Of the units that lie beside `unit` and are called alike, itself included, those that were written after `written`.

    Lightning's `last.ckpt` counts beside what it may be a copy of: it is written over in place, and `ckpt_path="last"` takes it first.
    `layout`: as a watch is given it. Where the unit itself `is_guessed`, because only quiet tells there, all of them count as whole.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        scan = scanning.scan(descriptor)
        changed = _changed(scan, unit, written)
        if not changed:
            return Newer([], [])
        rules = [rule for rule in layouts.rules(layout) if not rule.guessed]
        latest = sorted(changed, key=lambda path: changed[path], reverse=True)
        whole = [path for path in latest if is_guessed or _is_whole(descriptor, candidates.at(scan, path, rules))]
    finally:
        os.close(descriptor)
    return Newer(whole, [path for path in latest if path not in whole])


def is_quiet(directory: str, unit: str, layout: str) -> bool:
    """Whether nobody writes to half a unit: waits until its last change is old enough, and says no if there is another meanwhile."""
    rules = [rule for rule in layouts.rules(layout) if not rule.guessed and rule.regex.fullmatch(os.path.basename(unit))]
    settle = max((rule.settle for rule in rules), default=0.0)
    began = time.monotonic()
    first = now = _look(directory, unit)
    while now == first and not now.is_written:
        left = settle - max(time.time() - first.changed, time.monotonic() - began)  # stamps may lie in the future
        if left <= 0:
            return True
        time.sleep(min(left, _POLL_SECONDS))
        now = _look(directory, unit)
    return False


def set_aside(directory: str, unit: str, why: str = "is not complete") -> str:
    """Moves what is in the way out of the folder; what is to be said about it. (Watches ignore names that end so.)"""
    place = os.path.join(directory, unit)
    home, name = _home(directory)
    target = os.path.join(home, "%s.incomplete" % name)
    try:
        os.makedirs(target, exist_ok=True)
        moved = os.path.join(target, "%s-%s" % (unit.replace("/", "_"), os.urandom(4).hex()))
        os.rename(place, moved)
    except OSError as error:
        return "%s %s, and can't be moved away: %s" % (place, why, error.strerror)
    return "%s %s: moved to %s" % (place, why, moved)


def _changed(scan: scanning.Scan, unit: str, written: float) -> Dict[str, float]:
    """Units with a file that was written since, and when. Folders don't count: deleting changes them."""
    parent, _, name = unit.rpartition("/")
    numbered = re.compile(_DIGITS.sub(r"\\d+", re.escape(_VERSION.sub("", name))))
    is_ckpt = name.endswith(".ckpt")
    found = {}
    for each in scan.names.get(parent, ()):
        path = scanning.joined(parent, each)
        is_alike = numbered.fullmatch(_VERSION.sub("", each)) and each.endswith(".ckpt") == is_ckpt
        if is_alike or (is_ckpt and units.is_extra(each)):
            files = (entry.mtime_ns / 1e9 for _, entry in scan.below(path) if entry.kind == scanning.FILE)
            latest = max(files, default=0.0)
            if latest > written:
                found[path] = latest
    return found


def _is_whole(folder: int, unit: Optional[candidates.Unit]) -> bool:
    return unit is not None and not (unit.problem or gates.examine(folder, unit).problem)


def _look(directory: str, unit: str) -> _Look:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        entries = dict(scanning.scan(descriptor).below(unit))
        writers = probe.Writers()
        is_written = any(_has_writer(descriptor, path, writers) for path, entry in entries.items() if entry.kind == scanning.FILE)
        return _Look(entries, is_written)
    finally:
        os.close(descriptor)


def _has_writer(folder: int, path: str, writers: probe.Writers) -> bool:
    try:
        descriptor = scanning.open_file(folder, path)
    except OSError:  # gone meanwhile
        return True
    try:
        found = os.fstat(descriptor)
        return writers.has(descriptor, (found.st_dev, found.st_ino))
    finally:
        os.close(descriptor)


def sweep(directory: str) -> None:
    """Removes what a killed resume was making. The caller is the only one who resumes there."""
    home, prefix = _work_place(directory)
    for each in os.listdir(home):
        if each.startswith(prefix):
            shutil.rmtree(os.path.join(home, each), ignore_errors=True)


@contextmanager
def beside(directory: str) -> Iterator[str]:
    """A temporary folder on the same filesystem."""
    home, prefix = _work_place(directory)
    temporary = os.path.join(home, prefix + os.urandom(6).hex())
    os.mkdir(temporary, 0o700)
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _work_place(directory: str) -> Tuple[str, str]:
    home, name = _home(directory)
    return home, ".%s.resuming-" % name.lstrip(".")


def _home(directory: str) -> Tuple[str, str]:
    """Where things can be moved to from the folder, and what names there begin with: beside it, where the trainer does not look.

    In it, with a hidden name, where it is a mount of its own or nothing may be made, or found again, beside it.
    """
    whole = os.path.realpath(directory)
    parent, name = os.path.split(whole)
    is_apart = os.stat(parent).st_dev != os.stat(whole).st_dev or not os.access(parent, os.R_OK | os.W_OK | os.X_OK)
    return (whole, ".modelcache") if is_apart else (parent, name)
