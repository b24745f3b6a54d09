"""What a task's cards say, as plain data: what it loaded, what it saved, and where that came from.

Whatever a user, a repo or another task has named or written is only ever the text of a table's cell or a point of a plot: none of
it becomes a part of a sentence, which whoever draws the card may read as Markdown or HTML.
"""

from __future__ import annotations

import json
from typing import Any, Dict, Iterable, List, NamedTuple, Optional, Sequence

from .notes import Load
from .progress import size

_MOST_ROWS = 200  # of a table, the newest; a plot has all that fit
_MOST_POINTS = 2_000
_LONGEST_TEXT = 2_000
_NOTHING = "–"
_LOADED_AS_VIEW = "shared view"


class Table(NamedTuple):
    title: str
    columns: List[str]
    rows: List[List[str]]


class Point(NamedTuple):
    at: str  # ISO 8601
    size_bytes: int
    blocked_seconds: Optional[float]
    name: str


class Card(NamedTuple):
    id: str
    title: str
    sentences: List[str]
    tables: List[Table]
    points: Sequence[Point] = ()  # checkpoints, the oldest first


def of_repos(loads: List[Load]) -> Card:
    """Of what @huggingface_hub loaded."""
    columns = ["Repo", "Type", "Revision", "Commit", "Selection", "Size", "From", "Seconds", "Path", "Key"]
    rows = []
    for load in loads:
        said = load.reference.get("metadata") or {}
        rows.append([
            load.name, _text(said.get("repo_type")), _text(said.get("revision")), _text(said.get("commit")), _selection(said),
            _size(load.reference), load.source or "the store has it", _seconds(load.seconds), _place(load), load.reference["key"],
        ])  # fmt: skip
    return Card("huggingface_hub_models", "Repos of the Hugging Face Hub", [], [_table("Loaded", columns, rows)])


def of_models(pathspec: str, attempt: int, saved: List[Dict[str, Any]], loads: List[Load], all_loads: List[Load]) -> Card:
    """Of what @model saved and loaded. `all_loads`, those of other decorators too, are what the saved models are made from."""
    tables = []
    if saved:
        columns = ["Label", "Saved", "Size", "Format", "Blocked s", "Key"]
        rows = [
            [each["label"], each["created_on"], _size(each), _text(each.get("storage_format")), _blocked(each), each["key"]]
            for each in saved
        ]
        tables.append(_table("Saved", columns, rows))
        said = [[each["label"], str(name), _text(value)] for each in saved for name, value in (each.get("metadata") or {}).items()]
        if said:
            tables.append(_table("Metadata of what was saved", ["Label", "Name", "Value"], said))
        lineage = [["saved by", _maker(pathspec, attempt), "", ""]]
        lineage += [["which loaded, by @%s" % load.by, load.name, _origin(load), load.reference["key"]] for load in all_loads]
        tables.append(_table("Lineage", ["", "What", "From", "Key"], lineage))
    if loads:
        columns = ["Name", "Type", "Size", "From", "Seconds", "Path", "Saved by", "Metadata", "Key"]
        rows = [
            [load.name, _text(load.reference.get("type")), _size(load.reference), load.source, _seconds(load.seconds), _place(load),
             _origin(load), _text(load.reference.get("metadata") or None), load.reference["key"]]
            for load in loads
        ]  # fmt: skip
        tables.append(_table("Loaded", columns, rows))
    return Card("model_card", "Models", [], tables)


def of_checkpoints(saved: List[Dict[str, Any]], loads: List[Load], begun_with: Optional[str], waited_seconds: float) -> Card:
    """Of the task's checkpoints, in all its attempts, newest first, and what it loaded. `begun_with`: the key of what it began with."""
    tables = []
    if saved:
        columns = ["Name", "Attempt", "Saved", "Size", "Blocked s", "Node", "Metadata", "Key"]
        rows = [
            [_text(each.get("name")), _text(each.get("attempt")), _text(each.get("created_on")), _size(each), _blocked(each),
             _text(each.get("node_index")), _text(each.get("metadata") or None), each["key"]]
            for each in saved
        ]  # fmt: skip
        tables.append(_table("Saved, newest first", columns, rows))
    if loads:
        columns = ["Name", "", "Saved by", "Size", "From", "Seconds", "Key"]
        rows = [
            [load.name, "the task began with it" if load.reference["key"] == begun_with else "", _origin(load),
             _size(load.reference), load.source, _seconds(load.seconds), load.reference["key"]]
            for load in loads
        ]  # fmt: skip
        tables.append(_table("Loaded", columns, rows))
    total = size(sum(each.get("size") or 0 for each in saved))
    sentences = []
    if saved:
        waited = _seconds(waited_seconds)
        sentences.append("%d saved, %s. At its end the task waited %s seconds for the store." % (len(saved), total, waited))
    points = [
        Point(str(each["created_on"]), int(each.get("size") or 0), each.get("blocked_seconds"), str(each.get("name")))
        for each in saved[:_MOST_POINTS]
    ]
    return Card("task_checkpoints", "Checkpoints", sentences, tables, points[::-1])


def _table(title: str, columns: List[str], rows: List[List[str]]) -> Table:
    if len(rows) > _MOST_ROWS:
        title = "%s (%d of %d)" % (title, _MOST_ROWS, len(rows))
    return Table(title, columns, [[_shortened(cell) for cell in row] for row in rows[:_MOST_ROWS]])


def _text(value: Any) -> str:
    if value is None:
        return _NOTHING
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)


def _shortened(text: str) -> str:
    return text if len(text) <= _LONGEST_TEXT else text[:_LONGEST_TEXT] + " …"


def _size(reference: Dict[str, Any]) -> str:
    return size(reference["size"]) if isinstance(reference.get("size"), (int, float)) else _NOTHING


def _seconds(seconds: float) -> str:
    return "%.2f" % seconds


def _blocked(reference: Dict[str, Any]) -> str:
    blocked = reference.get("blocked_seconds")
    return _NOTHING if blocked is None else "%.3f" % blocked


def _place(load: Load) -> str:
    if load.path is None:
        return _NOTHING
    return _LOADED_AS_VIEW if load.is_view else load.path


def _selection(said: Dict[str, Any]) -> str:
    words = {"only": said.get("allow_patterns"), "without": said.get("ignore_patterns")}
    return ", ".join("%s %s" % (word, _joined(patterns)) for word, patterns in words.items() if patterns) or "everything"


def _joined(patterns: Iterable[Any]) -> str:
    return patterns if isinstance(patterns, str) else " ".join(map(str, patterns))


def _origin(load: Load) -> str:
    """Where what was loaded is from: the commit of a repo, else the task that saved it."""
    said = load.reference.get("metadata") or {}
    if said.get("repo_id") and said.get("commit"):
        return "%s@%s" % (said["repo_id"], said["commit"])
    return _maker(load.reference.get("pathspec"), load.reference.get("attempt"))


def _maker(pathspec: Optional[str], attempt: Any) -> str:
    return _NOTHING if pathspec is None else "%s, attempt %s" % (pathspec, attempt)
