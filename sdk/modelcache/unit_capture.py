"""Capturing a unit before its trainer rotates it away: all its files are opened first, then handed over through these descriptors.

Invariants:
- The unit is looked at again when every file is open: nothing had changed by then, nothing was gone (G5). From there on a trainer that
  removes it costs nothing, since an open file survives its name.
- It is looked at once more before the daemon keeps it. What changed meanwhile in any other way than by going is dropped as a whole.
- Units of more files than may be held open are opened one by one: then going is a change too.
"""

from __future__ import annotations

import os
from typing import Any, Dict, Optional, Tuple

from . import gates, saving, scanning, walk
from .candidates import Unit
from .errors import FileChangedError, NotSaveableError
from .patience import Patience
from .probe import has_writer
from .scanning import FILE, FOLDER, LINK, Entry

HELD_FILES = 512  # descriptors
_TRIES = 4  # looks at a file that looks different after its copy: unlinking it changes its stamp, once


class UnitSource:
    """A unit to be handed over; `folder` is the watched folder's descriptor, and stays its owner's. A `walk.Readable`."""

    def __init__(self, folder: int, unit: Unit, shown_folder: str) -> None:
        self.root = os.path.join(shown_folder, unit.path)
        self._folder = folder
        self._unit = unit
        self._seen: Dict[str, Entry] = dict(unit.entries)
        self._held: Dict[str, int] = {}

    def hold(self) -> None:
        """FileChangedError, NotSaveableError: it is not what was found complete, or not any more."""
        try:
            if len(self._unit.files) <= HELD_FILES:
                for path in self._unit.files:
                    self._held[path] = scanning.open_file(self._folder, path)
            now = self._now()
        except OSError as error:
            raise self._changed("%s: %s" % (self._unit.path, error.strerror or error)) from error
        if now != self._seen:
            raise self._changed(_first_difference(self._seen, now))

    def listing(self) -> walk.Listing:
        made = walk.Listing([], [], [], {})
        for path, entry in self._unit.entries:
            inside = self._inside(path)
            if entry.kind == FILE:
                executable = bool(entry.mode & 0o100)
                made.files.append(walk.File(inside, entry.size, executable, entry.inode))
            elif entry.kind == LINK:
                if not walk.stays_inside(inside, entry.target):
                    raise NotSaveableError("%s is a link that leads out of it" % self.name(inside), "make it a file", {"paths": [inside]})
                made.links.append((inside, entry.target))
            elif entry.kind == FOLDER:
                made.stamps[inside] = (entry.device, entry.inode, entry.mtime_ns, entry.ctime_ns)
        folders = {path.rpartition("/")[0] for path, _ in self._unit.entries}
        made.folders.extend(self._inside(path) for path, entry in self._unit.entries[1:] if entry.kind == FOLDER and path not in folders)
        return made

    def open(self, path: str) -> int:
        whole = self._outside(path)
        return os.dup(self._held[whole]) if whole in self._held else scanning.open_file(self._folder, whole)

    def difference(self, before: walk.Listing) -> Tuple[str, str]:
        now = self._now()
        if now != self._seen and not self._has_only_gone(now):
            raise self._changed(_first_difference(self._seen, now))
        for path, descriptor in self._held.items():
            if has_writer(descriptor):
                raise self._changed("%s is open for writing" % path)
        return "", ""

    def name(self, path: str) -> str:
        return os.path.join(self.root, path) if self._unit.kind == FOLDER else self.root

    def close(self) -> None:
        while self._held:
            os.close(self._held.popitem()[1])

    def __enter__(self) -> UnitSource:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _now(self) -> Dict[str, Entry]:
        above, _, name = self._unit.path.rpartition("/")
        try:
            if self._unit.kind == FOLDER:
                return scanning.scan(self._folder, self._unit.path).entries
            descriptor = scanning.open_folder(self._folder, above)
            try:
                return {self._unit.path: scanning.entry_of(os.stat(name, dir_fd=descriptor, follow_symlinks=False))}
            finally:
                os.close(descriptor)
        except (FileNotFoundError, NotADirectoryError):
            return {}

    def _has_only_gone(self, now: Dict[str, Entry]) -> bool:
        """Whether all that happened since everything was opened is that names went away."""
        if len(self._held) < len(self._unit.files):
            return False
        for path, seen in self._seen.items():
            if seen.kind == FILE:
                found = scanning.entry_of(os.fstat(self._held[path]))
                is_same = found == seen or (found.links < seen.links and found.content == seen.content)
                if not is_same or (path in now and now[path] != found):
                    return False
            elif path in now and now[path].identity != seen.identity:
                return False
        return all(path in self._seen for path in now)

    def _inside(self, path: str) -> str:
        """A path below the unit, of one below the watched folder. A unit that is a file is called by its name."""
        return path[len(self._unit.path) + 1 :] if self._unit.kind == FOLDER else path.rpartition("/")[2]

    def _outside(self, path: str) -> str:
        return scanning.joined(self._unit.path, path) if self._unit.kind == FOLDER else self._unit.path

    def _changed(self, what: str) -> FileChangedError:
        return FileChangedError("%s changed while it was looked at: %s" % (self.root, what), "it is captured when it is quiet", {})

    def __repr__(self) -> str:
        return "<UnitSource %s held=%d>" % (self.root, len(self._held))


def capture(folder: int, unit: Unit, shown_folder: str, reference: Dict[str, Any], store: Optional[str]) -> Dict[str, Any]:
    """Hands the unit to the daemon; the complete reference. FileChangedError: it changed, and nothing was kept."""
    with UnitSource(folder, unit, shown_folder) as source:
        source.hold()
        fields = {
            **reference,
            "unit": unit.path,
            "unit_type": unit.kind,
            "layout": unit.rule.name,
            "complete": "guessed" if unit.rule.guessed else "whole",
            "written_ns": unit.written_ns,
            "companions": gates.companions(unit),
            "aliases": dict(unit.aliases),
            "extra": unit.extra,
        }
        return saving.keep_source(source, fields, gates.metadata(folder, unit), Patience(source, _quietly, tries=_TRIES), store)


def _quietly(message: str) -> None:
    """The watch tells what it did not capture."""


def _first_difference(before: Dict[str, Entry], now: Dict[str, Entry]) -> str:
    return min((path for path in {*before, *now} if before.get(path) != now.get(path)), default="")
