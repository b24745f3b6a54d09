"""What this process has loaded, noted for whoever tells of it at the end of a task. Saves need no note: their references say it all."""

from __future__ import annotations

from collections import deque
from typing import Any, Deque, Dict, List, NamedTuple, Optional

_KEPT = 1_000  # the latest; a process that serves models loads for weeks


class Load(NamedTuple):
    by: str  # the decorator whose load it is
    name: str  # as the caller called it: an artifact, a repo, a checkpoint
    reference: Dict[str, Any]
    source: str  # "hub", "store" or "disk": the tier that the bytes came from; "" if none were asked for
    seconds: float  # that the caller waited
    path: Optional[str] = None  # None: a reference was all that was asked for
    is_view: bool = False  # `path` is shared and read-only


_loads: Deque[Load] = deque(maxlen=_KEPT)


def note(load: Load) -> None:
    _loads.append(load)


def loads(by: Optional[str] = None) -> List[Load]:
    """In order; those of one decorator."""
    return [load for load in _loads if by in (None, load.by)]
