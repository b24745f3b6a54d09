"""Is a unit that looks complete really so? What names and stats can't tell: contents, and who writes (G3, G4).

A gate that can't be asked (no leases on this filesystem) is not passed: the unit then has to be quiet for longer.
"""

from __future__ import annotations

import math
import os
from typing import Any, Dict, NamedTuple, Optional

from . import formats, layouts
from .candidates import Unit
from .probe import Writers, has_writer
from .scanning import FILE, joined, open_file, shown

UNSURE_SETTLE = 10.0  # seconds, where the kernel doesn't tell who writes
_STATE = ("trainer_state.json", "metadata.json", "metrics.json", "state.json", "all_results.json")
_TEXT_BYTES = 4096  # of a tracker


class Verdict(NamedTuple):
    problem: str  # "" if every gate is passed
    is_unsure: bool = False  # of some file nobody could tell whether it has a writer
    is_written: bool = False  # a file is open for writing


def examine(folder: int, unit: Unit) -> Verdict:
    """Opens every file of the unit, looks at it, and closes it."""
    writers, unsure = Writers(), False
    try:
        for path, entry in unit.entries:
            if entry.kind != FILE:
                continue
            descriptor = open_file(folder, path)
            try:
                told = has_writer(descriptor)
                unsure |= told is None
                if told or (told is None and writers.has(descriptor, (entry.device, entry.inode))):
                    return Verdict("%s is open for writing" % shown(path), is_written=True)
                problem = formats.problem(descriptor, path)
                if problem:
                    return Verdict("%s %s" % (shown(path), problem))
            finally:
                os.close(descriptor)
        return Verdict(_contradiction(folder, unit), unsure)
    except OSError as error:
        return Verdict("%s: %s" % (shown(unit.path), error.strerror or error), is_written=True)


def metadata(folder: int, unit: Unit) -> Dict[str, Any]:
    """The step, and the numbers that the trainer wrote as JSON in the unit or as name=value in the unit's name."""
    found: Dict[str, Any] = {}
    for name, value in layouts.numbers_in(unit.path.rpartition("/")[2]):
        found[name] = value
    for name in _STATE:
        state = _json_in(folder, unit, name)
        if isinstance(state, dict):
            for entry in state.get("log_history") or ():
                found.update(_numbers(entry))
            found.update(_numbers(state))
    if unit.step is not None:
        found["step"] = unit.step
    return found


def companions(unit: Unit) -> Dict[str, str]:
    """Files beside the unit that have to name it when it is put back."""
    rule = unit.rule
    if not rule.tracker:
        return {}
    above, _, name = unit.path.rpartition("/")
    return {joined(above, rule.tracker): rule.tracker_text.replace("{name}", name).replace("{step}", str(unit.step))}


def _contradiction(folder: int, unit: Unit) -> str:
    rule = unit.rule
    if rule.step_in and unit.step is not None:
        name, _, field = rule.step_in.partition(":")
        state = _json_in(folder, unit, name)
        if not isinstance(state, dict) or state.get(field) != unit.step:
            return "%s does not say %s %d" % (name, field, unit.step)
    if rule.ended_in:
        name, _, field = rule.ended_in.partition(":")
        state = _json_in(folder, unit, name)
        if isinstance(state, dict) and state.get(field, True) is None:
            return "%s has no %s yet" % (name, field)
    if rule.tracker:
        above, name = unit.path.rpartition("/")[0], rule.tracker
        tracked = layouts.tracked_step(_text(folder, joined(above, name)))
        if tracked is None or (unit.step is not None and tracked < unit.step):
            return "%s does not name it yet" % name
    if unit.kind == "folder":
        for path in unit.files:
            if path.endswith(".index.json") and path.count("/") == unit.path.count("/") + 1:
                missing = _missing_shard(folder, unit, path)
                if missing:
                    return "%s is missing, which %s names" % (shown(missing), shown(path))
    return ""


def _missing_shard(folder: int, unit: Unit, path: str) -> Optional[str]:
    index = _json(folder, path)
    shards = index.get("weight_map") if isinstance(index, dict) else None
    present = set(unit.files)
    wanted = sorted({str(each) for each in shards.values()}) if isinstance(shards, dict) else []
    return next((each for each in wanted if joined(unit.path, each) not in present), None)


def _json_in(folder: int, unit: Unit, name: str) -> Any:
    path = joined(unit.path, name)
    return _json(folder, path) if unit.kind == "folder" and any(path == each for each, _ in unit.entries) else None


def _json(folder: int, path: str) -> Any:
    descriptor = open_file(folder, path)
    try:
        return formats.read_json(descriptor)
    except ValueError:
        return None
    finally:
        os.close(descriptor)


def _text(folder: int, path: str) -> str:
    try:
        descriptor = open_file(folder, path)
    except OSError:
        return ""
    try:
        return os.pread(descriptor, _TEXT_BYTES, 0).decode(errors="replace")
    finally:
        os.close(descriptor)


def _numbers(values: Any) -> Dict[str, Any]:
    if not isinstance(values, dict):
        return {}
    return {
        name: value
        for name, value in values.items()
        if isinstance(name, str) and isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    }
