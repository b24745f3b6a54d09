"""Resume: the newest complete checkpoint of a watched folder is put back into it, as the trainer that wrote it expects to find it.

Invariants:
- A unit appears under its name all at once: it is made elsewhere on the same filesystem and renamed. What names it (`latest`, a link
  `last.ckpt`) is written after it, so a trainer that is started too early finds an older checkpoint, never half of one.
- What the trainer itself changed later than what is to be put back stays as it is, and then nothing is put back.
- What is in its place makes room for it only when it is a part of it, byte for byte (what rotation left); else it is moved away, and said.
- Files are the user's own, writable, and as old as what they are copies of: trainers that delete their oldest checkpoints go by that.
- Names in a reference come from a store: none leads out of the folder (I9).
"""

from __future__ import annotations

import fcntl
import os
import stat
from contextlib import contextmanager
from typing import Any, Callable, Dict, Iterable, Iterator, List, NamedTuple, Optional, Tuple

from . import client, errors, files, leftovers, progress, references, units, views
from .protocol import Load

_Say = Callable[[str], None]


class Restored(NamedTuple):
    reference: Dict[str, Any]
    unit: str
    was_there: bool  # nothing had to be put back
    extras: Tuple[str, ...]  # copies of it that are there under other names, made now or before


Listed = Callable[[], Tuple[List[Dict[str, Any]], List[Dict[str, Any]]]]  # what is there, best first, and what is awaited


def restore(directory: str, listed: Listed, say: _Say, layout: str = "auto") -> Optional[Restored]:
    """Puts the first of what is listed into `directory`, which is made if it is not there; None if there is none to put.

    A newer one that another node is bringing to the store is waited for, as a task does when it begins. What can't be loaded is said,
    and the next one taken. `layout`: as a watch is given it. Errors: as `modelcache.load`.
    """
    found = references.settled(listed, say)
    os.makedirs(directory, exist_ok=True)
    for reference in found:
        try:
            with _locked(directory):
                return _Place(directory, reference, say).put(layout)
        except (errors.ReferenceNotFoundError, errors.IncompatibleReferenceError) as error:
            say("skipping %s: %s" % (reference["key"], error))
    return None


def listed_in(series: units.Series) -> Listed:
    """What a watch kept of a series."""

    def listed() -> Tuple[List[Dict[str, Any]], List[Dict[str, Any]]]:
        found, awaited = references.and_awaited(series.prefix, series.pathspec, series.name, series.store)
        return best_first(filter(series.has, found)), list(filter(series.has, awaited))

    return listed


def best_first(found: Iterable[Dict[str, Any]]) -> List[Dict[str, Any]]:
    """What a watch kept: the newest, and a guess only when nothing is sure."""
    return sorted(units.newest_first(filter(units.is_watched, found)), key=units.is_guessed)


class _Place:
    """Where one unit belongs, and what is there."""

    def __init__(self, directory: str, reference: Dict[str, Any], say: _Say) -> None:
        self._directory = directory
        self._reference = reference
        self._say = say
        self._unit = _inside(reference["unit"], reference)
        self._target = os.path.join(directory, self._unit)
        self._companions = {_inside(path, reference): str(text) for path, text in dict(reference.get("companions") or {}).items()}
        self._aliases = [_inside(path, reference) for path in reference.get("aliases") or ()]
        self._extras = [_inside(path, reference) for path in (reference.get("extra"),) if path]

    def put(self, layout: str) -> Optional[Restored]:
        leftovers.sweep(self._directory)
        is_guessed = units.is_guessed(self._reference)
        newer = leftovers.newer(self._directory, self._unit, layout, units.written(self._reference), is_guessed)
        for unit in newer.partial:
            if not leftovers.is_quiet(self._directory, unit, layout):
                self._say("%s is being written by somebody else: nothing is put back" % os.path.join(self._directory, unit))
                return None
            self._say(leftovers.set_aside(self._directory, unit))
        if newer.whole:
            self._say("%s is newer than what was kept: nothing is put back" % os.path.join(self._directory, newer.whole[0]))
            return None
        with _shown(self._reference) as view:
            source = view if self._reference.get("unit_type") == units.FOLDER else os.path.join(view, os.path.basename(self._unit))
            if not os.path.lexists(source):
                raise errors.IncompatibleReferenceError("%s has no %s in it" % (self._reference["key"], os.path.basename(self._unit)))
            is_there = os.path.lexists(self._target) and self._is_known(source)
            if not is_there:
                self._bring(source)
        self._name()
        return Restored(self._reference, self._unit, is_there, tuple(filter(self._is_copy, self._extras)))

    def _is_known(self, source: str) -> bool:
        """As a watch knows it again, by names, sizes and age; only what has another age has to be read."""
        if _contents(self._target) != _contents(source):
            return False
        return _written_ns(self._target) == references.written_ns(self._reference) or _is_part(self._target, source)

    def _is_copy(self, path: str) -> bool:
        """As a watch knows it again."""
        place = os.path.join(self._directory, path)
        return _contents(place) == _contents(self._target) and _written_ns(place) == references.written_ns(self._reference)

    def _bring(self, source: str) -> None:
        with leftovers.beside(self._directory) as temporary:
            made = self._copy(source, temporary)
            os.makedirs(os.path.dirname(self._target), exist_ok=True)
            if os.path.lexists(self._target):  # a folder can't be replaced by a rename
                if _is_part(self._target, made):  # what rotation left of the same one
                    os.rename(self._target, os.path.join(temporary, "replaced"))
                else:
                    self._set_aside(self._unit)
            os.rename(made, self._target)

    def _copy(self, source: str, temporary: str) -> str:
        """The user's own copy of it, for a rename."""
        made = os.path.join(temporary, "unit")
        if os.path.isdir(source):
            files.copy_tree(source, made)
        else:
            files.copy_file(source, made)
        _make_old(made, references.written_ns(self._reference))
        return made

    def _name(self) -> None:
        """What the trainer looks at to find the unit."""
        for path in self._extras:
            place = os.path.join(self._directory, path)
            if not os.path.lexists(place):  # no link: the trainer would write the next one through it
                with leftovers.beside(self._directory) as temporary:
                    made = self._copy(self._target, temporary)
                    os.makedirs(os.path.dirname(place), exist_ok=True)
                    os.rename(made, place)
        for path, text in self._companions.items():
            place = os.path.join(self._directory, path)
            if _text_of(place) != text:
                os.makedirs(os.path.dirname(place), exist_ok=True)
                files.put_text(text, place)
        for path in self._aliases:  # its target is the unit, wherever the link pointed on the other node
            place = os.path.join(self._directory, path)
            os.makedirs(os.path.dirname(place), exist_ok=True)
            if not _is_newer_file(place, units.written(self._reference)):
                if os.path.lexists(place) and not os.path.islink(place) and not _is_part(place, self._target):
                    self._set_aside(path)
                files.put_link(os.path.relpath(self._target, os.path.dirname(place)), place)

    def _set_aside(self, path: str) -> None:
        self._say(leftovers.set_aside(self._directory, path, "differs from what was kept"))
        place = os.path.join(self._directory, path)
        if os.path.lexists(place):
            raise errors.StorageError("%s is in the way of what is put back" % place, "move it away, or watch another folder")


@contextmanager
def _shown(reference: Dict[str, Any]) -> Iterator[str]:
    """The shared view, leased while the block runs."""
    with progress.shown(str(reference["unit"])) as on_progress:
        asked = Load(str(reference["key"]), reference.get("store"), purpose="resume")
        loaded = client.shared().load(asked, on_progress)
    try:
        views.check_visible(loaded.reply, loaded.root)
        yield loaded.reply.path
    finally:
        loaded.lease.close()


@contextmanager
def _locked(directory: str) -> Iterator[None]:
    """One at a time, where the filesystem can: several processes of a job may resume in one shared folder."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError:  # NFS wants it open for writing, which a folder can't be
            pass
        yield
    finally:
        os.close(descriptor)


def _contents(path: str) -> Dict[str, Tuple[str, Any]]:
    """Everything in it by its relative path: what it is, and a size or a target."""
    found = {"": _kind(path, os.lstat(path))}
    if found[""][0] == units.FOLDER:
        for name, entry in files.walk(path):
            found[name] = _kind(entry.path, entry.stat(follow_symlinks=False))
    return found


def _is_part(path: str, whole: str) -> bool:
    """Whether all of it is in the other as well, byte for byte; what can't be read is not."""
    import filecmp

    found = _contents(path)
    if not found.items() <= _contents(whole).items():
        return False
    names = [name for name, (kind, _) in found.items() if kind == "file"]
    try:
        return all(filecmp.cmp(_below(path, name), _below(whole, name), shallow=False) for name in names)
    except PermissionError:
        return False


def _below(path: str, name: str) -> str:
    return os.path.join(path, name) if name else path


def _written_ns(path: str) -> int:
    """When a file of it was written last, as a watch counts it."""
    written = (os.lstat(_below(path, name)).st_mtime_ns for name, (kind, _) in _contents(path).items() if kind == "file")
    return max(written, default=0)


def _kind(path: str, found: os.stat_result) -> Tuple[str, Any]:
    if stat.S_ISDIR(found.st_mode):
        return units.FOLDER, None
    return ("link", os.readlink(path)) if stat.S_ISLNK(found.st_mode) else ("file", found.st_size)


def _make_old(path: str, moment_ns: int) -> None:
    """Everything in it is as old as the unit; a folder after what is in it. So a watch knows it again, to the nanosecond."""
    inside = [entry.path for _, entry in files.walk(path)] if os.path.isdir(path) else []
    for each in [*reversed(inside), path]:
        os.utime(each, ns=(moment_ns, moment_ns), follow_symlinks=False)


def _is_newer_file(path: str, moment: float) -> bool:
    """Whether the trainer has put its own file, or a folder, where a link was."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return False
    return not stat.S_ISLNK(found.st_mode) and (stat.S_ISDIR(found.st_mode) or found.st_mtime > moment)


def _text_of(path: str) -> Optional[str]:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except (OSError, ValueError):
        return None


def _inside(path: Any, reference: Dict[str, Any]) -> str:
    """A name that stays in its folder. IncompatibleReferenceError for others."""
    if isinstance(path, str) and "\0" not in path and all(part not in ("", ".", "..") for part in path.split("/")):
        return path
    raise errors.IncompatibleReferenceError("%s names %r, which is not in its folder" % (reference["key"], path))
