"""Units in a scan: what the rules take for checkpoints, and what speaks against each being complete. Pure functions of what was seen.

Invariants:
- A folder that is a unit is one as a whole: nothing in it is a unit of its own. One of which no rule says so, but its contents do
  (`layouts` tells how), is one of the fallback's rule, or none.
- A name on its way (`layouts.TEMPORARY`) is no unit, and a unit with one in it is not complete (G1).
- `signature` is equal in two scans only if no stat of anything in the unit changed, the unit's own included (G2, G5).
"""

from __future__ import annotations

import os
from fnmatch import fnmatchcase
from typing import AbstractSet, List, NamedTuple, Optional, Sequence, Tuple

from . import layouts
from .layouts import Rule
from .scanning import FILE, FOLDER, LINK, OTHER, Entry, Scan, joined, shown
from .units import is_extra

Entries = Tuple[Tuple[str, Entry], ...]
_LIKE = 0.25  # of the larger one's size: so much two checkpoints of one series may differ


class Unit(NamedTuple):
    path: str
    kind: str  # "folder" or "file"
    rule: Rule
    step: Optional[int]
    entries: Entries  # the unit and everything in it, by path in the watched folder
    settle: float  # seconds
    problem: str  # why it is not complete, as far as names tell; "" if nothing speaks against it
    aliases: Tuple[Tuple[str, str], ...] = ()  # links beside it that stand for it, or for the newest: path, target
    extra: str = ""  # the copy of the newest one that its trainer keeps beside it (`units.is_extra`); "" if there is none

    @property
    def signature(self) -> int:
        return hash(self.entries)

    @property
    def written_ns(self) -> int:
        """When its trainer changed it last. One that was put back is as old as it was: its mtimes are, its ctimes can't be.

        Folders don't count: deleting changes them, and an old one that is half deleted must not look newer than the newest.
        """
        return max((entry.mtime_ns for _, entry in self.entries if entry.kind == FILE), default=0)

    @property
    def changed_ns(self) -> int:
        """When anybody changed anything of it."""
        return max(entry.stamp_ns for _, entry in self.entries)

    @property
    def size(self) -> int:
        return sum(entry.size for _, entry in self.entries)

    @property
    def files(self) -> List[str]:
        return [path for path, entry in self.entries if entry.kind == FILE]

    def is_rest_of(self, before: Entries) -> bool:
        """Whether all that happened since is that something in it went, and nothing else was written."""
        return _contents(self.entries) < _contents(before)

    @property
    def order(self) -> Tuple[int, int]:
        """Newer ones are larger."""
        return self.written_ns, -1 if self.step is None else self.step


def find(scan: Scan, rules: Sequence[Rule]) -> List[Unit]:
    """All units, complete or not, oldest first. Rules of a higher tier count only where those of lower ones find nothing."""
    for tier in (layouts.FRAMEWORK, layouts.SINGLE, layouts.FALLBACK):
        mine = [rule for rule in rules if rule.tier == tier]
        whole = [rule for rule in rules if rule.tier == layouts.FALLBACK] if tier == layouts.SINGLE else None
        found = sorted(_find(scan, mine, whole), key=lambda unit: unit.order) if mine else []
        if found:
            return found
    return []


def at(scan: Scan, path: str, rules: Sequence[Rule]) -> Optional[Unit]:
    """The unit at a path by the first rule that fits it, of whatever tier: for who knows that it is one. None if no rule does."""
    rule = _taker(scan, path, rules)
    return None if rule is None else of(scan, path, rule)


def of(scan: Scan, path: str, rule: Rule) -> Optional[Unit]:
    """One unit as it is now, by the rule that found it; None if it has gone."""
    return _unit(scan, path, rule, _beside(scan, path.rpartition("/")[0])) if path in scan.entries else None


def _contents(entries: Entries) -> AbstractSet[Tuple[str, Tuple[int, ...]]]:
    return {path: entry.identity if entry.kind == FOLDER else entry.content for path, entry in entries}.items()


def _find(scan: Scan, rules: Sequence[Rule], whole: Optional[Sequence[Rule]]) -> List[Unit]:
    """`whole`: where rules are of single files, by which of these a folder that is one checkpoint is one."""
    found = []
    pending = [""]
    while pending:
        folder = pending.pop()
        beside = _beside(scan, folder)
        for name in scan.names.get(folder, ()):
            path = joined(folder, name)
            entry = scan.entries[path]
            if layouts.is_temporary(name) or entry.kind not in (FILE, FOLDER):
                continue
            rule = _taker(scan, path, rules)
            if rule is not None:
                found.append(_unit(scan, path, rule, beside))
            elif entry.kind == FOLDER and layouts.may_hold_checkpoints(name):
                if whole is not None and layouts.may_be_checkpoint(name) and _is_one(scan, path, rules):
                    found += [_unit(scan, path, rule, beside) for rule in whole[:1]]
                else:
                    pending.append(path)
    return found


def _is_one(scan: Scan, folder: str, rules: Sequence[Rule]) -> bool:
    """Whether a folder is one checkpoint, though single files in it might be."""
    names = scan.names.get(folder, ())
    files = [name for name in names if scan.entries[joined(folder, name)].kind == FILE and not layouts.is_temporary(name)]
    foreign = (name for name in files if layouts.may_be_checkpoint(name) and _taker(scan, joined(folder, name), rules) is None)
    if any(map(layouts.is_log, names)) or not (any(foreign) or any(layouts.is_part(name, files) for name in files)):
        return False
    below = [path for path, entry in scan.below(folder) if entry.kind == FILE]
    taken = [(rule, path.rpartition("/")[2]) for path in below for rule in [_taker(scan, path, rules)] if rule is not None]
    return bool(taken) and not any(layouts.is_version(rule, name) for rule, name in taken)


def _taker(scan: Scan, path: str, rules: Sequence[Rule]) -> Optional[Rule]:
    return next((rule for rule in rules if _fits(scan, path, path.rpartition("/")[2], scan.entries[path], rule)), None)


def _fits(scan: Scan, path: str, name: str, entry: Entry, rule: Rule) -> bool:
    if rule.tier == layouts.FALLBACK or rule.name == layouts.QUIET:
        return "/" not in path and layouts.may_be_checkpoint(name) and (entry.kind == FILE or bool(scan.names.get(path)))
    if rule.kind not in (entry.kind, "any") or not rule.regex.fullmatch(name):
        return False
    if rule.marks and not any(_has(scan, path, glob) for glob in rule.marks):
        return False
    return not any(_has(scan, path, glob) for glob in rule.without)


def _unit(scan: Scan, path: str, rule: Rule, beside: List[Tuple[str, str]]) -> Unit:
    entries = tuple(scan.below(path))
    name = path.rpartition("/")[2]
    settle = rule.settle_ranks if rule.settle_ranks and _ranks(scan, path, rule) > 1 else rule.settle
    problem = _unsaveable(entries) or _missing(scan, path, rule)
    return _names(scan, Unit(path, scan.entries[path].kind, rule, layouts.step_of(rule, name), entries, settle, problem), beside)


def _unsaveable(entries: Entries) -> str:
    for path, entry in entries:
        name = path.rpartition("/")[2]
        if layouts.is_temporary(name):
            return "%s is on its way" % shown(path)
        if entry.kind == OTHER:
            return "%s is no file" % shown(path)
        if not name.isascii() and not _is_utf8(name):
            return "%s has a name that is not UTF-8" % shown(path)
    return "" if any(entry.kind == FILE for _, entry in entries) else "no file is in it"


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _missing(scan: Scan, path: str, rule: Rule) -> str:
    for glob in rule.needs:
        if not _has(scan, path, glob):
            return "%s is missing" % glob
    for glob in rule.forbids:
        if _has(scan, path, glob):
            return "%s says that it is not complete" % glob
    if rule.needs_any and not any(_has(scan, path, glob) for glob in rule.needs_any):
        return "none of %s is there" % ", ".join(rule.needs_any)
    for pair in rule.pairs:
        first, _, second = pair.partition(":")
        if _has(scan, path, first) and not _has(scan, path, second):
            return "%s is missing beside %s" % (second, first)
    for number, ranks in enumerate(_counted(scan, path, rule)):
        if ranks != list(range(len(ranks))):
            return "ranks are missing among %s" % rule.counted[number]
    if rule.tracker and joined(path.rpartition("/")[0], rule.tracker) not in scan.entries:
        return "%s is missing" % rule.tracker
    return ""


def _counted(scan: Scan, path: str, rule: Rule) -> List[List[int]]:
    """The ranks of which files are there, by kind of file."""
    found = []
    for pattern in rule.counted:
        matches = (layouts.compiled(pattern).fullmatch(name) for name in scan.names.get(path, ()))
        found.append(sorted({int(match.group(1)) for match in matches if match}))
    return found


def _ranks(scan: Scan, path: str, rule: Rule) -> int:
    return max(map(len, _counted(scan, path, rule)), default=0)


def _has(scan: Scan, path: str, glob: str) -> bool:
    first, slash, rest = glob.partition("/")
    if not any(letter in first for letter in "*?["):
        here = joined(path, first)
        return here in scan.entries and (not slash or _has(scan, here, rest))
    names = (name for name in scan.names.get(path, ()) if fnmatchcase(name, first))
    return any(_has(scan, joined(path, name), rest) for name in names) if slash else any(True for _ in names)


def _beside(scan: Scan, folder: str) -> List[Tuple[str, str]]:
    """What may stand for units of a folder, found once for all of them: links with what they point at, and Lightning's copies with ""."""
    found = []
    for name in scan.names.get(folder, ()):
        path = joined(folder, name)
        target = scan.entries[path].target
        if target or is_extra(name):
            found.append((path, target and os.path.normpath(os.path.join(folder, target))))  # one that is absolute is no unit's
    return found


def _names(scan: Scan, unit: Unit, beside: List[Tuple[str, str]]) -> Unit:
    """With what stands for it."""
    aliases, extras = {}, []
    for path, target in beside:
        entry = scan.entries[path]
        if target == unit.path or (entry.kind == LINK and _may_be_last(scan, unit, path, target)):
            aliases[path] = entry.target
        elif entry.kind == unit.kind and _may_be_last(scan, unit, path, path):
            extras.append(path)
    newest = max(extras, key=lambda path: scan.entries[path].mtime_ns, default="")
    return unit._replace(aliases=tuple(sorted(aliases.items())), extra=newest)


def _may_be_last(scan: Scan, unit: Unit, path: str, target: str) -> bool:
    """Whether Lightning may keep a link to it, or a copy of it, there: written after it, so `target` may still be the one before, or gone.

    Where that has another size, it is no version of this one: of two ModelCheckpoints, one may keep weights only.
    """
    if not unit.rule.name.startswith("lightning") or not is_extra(path) or is_extra(unit.path):
        return False
    size = sum(entry.size for _, entry in scan.below(target))
    return target not in scan.entries or abs(size - unit.size) <= max(size, unit.size) * _LIKE
