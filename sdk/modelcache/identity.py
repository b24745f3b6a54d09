"""Identity: which saves belong together, as metaflow-checkpoint spells it, so that either finds what the other saved.

    scope       who shares checkpoints: the namespace of a run, or what one of its tags says
    identifier  the same work in every run: the step, in a foreach with the values of its items
    repo name   what a repo of the hub is called among a scope's: by what was asked for

A hash of a value is that of its JSON, quotes and all.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, Iterable, List, Optional, Sequence, Tuple

from .keys import json_hash

_SCOPE_TAG = "checkpoint:"
_DIGITS = 12
_FOREACH = json_hash("foreach-task-entropy")
_GANG = json_hash("parallel-task-entropy")

# What stands for flow/step/scope/identifier in the keys of repos that a whole flow, or everybody, shares.
_FLOWS_REPOS = "mf:internal/huggingface-hub/registry:flow/%s"
_EVERYBODYS_REPOS = "mf:internal/huggingface-hub/registry:global/fully-global"


def scope_of(namespace: Optional[str], tags: Iterable[str] = ()) -> str:
    """Who shares: a tag `checkpoint:NAME` of the run wins over its namespace; of several the first in order."""
    named = sorted(tag for tag in tags if _SCOPE_TAG in tag)
    text = named[0].split(":")[1] if named else namespace or ""
    return hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]


def task_identifier(step: str, items: Optional[Sequence[Tuple[int, Any]]] = None, is_gang: bool = False) -> str:
    """What names the task in every run.

    Args:
        items: index and value of each enclosing foreach, the outermost first; None or empty outside of any.
        is_gang: the last of them is a gang's: all its nodes are one task.
    """
    if not items:
        return json_hash(step)[:_DIGITS]
    values: List[Any] = [_hashable(index, value) for index, value in items]
    values[-1 if is_gang else len(values) :] = [0, _GANG] if is_gang else [_FOREACH]
    return hashlib.sha256("".join(map(json_hash, values)).encode()).hexdigest()[:_DIGITS]


def repo_name(
    repo_id: str,
    repo_type: str = "model",
    revision: Optional[str] = None,
    allow_patterns: Optional[Iterable[str]] = None,
    ignore_patterns: Optional[Iterable[str]] = None,
) -> str:
    """The name of what was asked for. The same ask has one name, however it is spelt."""
    asked = "%s/%s" % (repo_type, repo_id)
    if revision not in (None, "main"):
        asked += "/revision=%s" % json.dumps(revision)
    for name, patterns in (("ignore_patterns", ignore_patterns), ("allow_patterns", allow_patterns)):
        if patterns is not None:
            asked += "/%s=%s" % (name, json.dumps(sorted(set(patterns))))
    return hashlib.md5(asked.encode(), usedforsecurity=False).hexdigest()[:10]


def repo_folder(cache_scope: str, flow: str, own: str) -> str:
    """Where in keys a scope's repos lie; `own` is the task's own folder."""
    if cache_scope == "flow":
        return _FLOWS_REPOS % flow
    return own if cache_scope == "checkpoint" else _EVERYBODYS_REPOS


def _hashable(index: int, value: Any) -> Any:
    """An item that JSON can't say counts by its index."""
    try:
        json.dumps(value, sort_keys=True)
    except (TypeError, ValueError, RecursionError):
        return index
    return value
