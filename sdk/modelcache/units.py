"""Units: what references say of the checkpoints that a watch found. `watch_client` tells what each field means."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Iterable, List, NamedTuple, Optional, Tuple, TypeVar

from . import keys, references

GUESSED = "guessed"
FOLDER = "folder"
_EXTRA = re.compile(r"last(?:-v\d+)?\.ckpt")

_Reference = TypeVar("_Reference", bound=Mapping[str, Any])


class Series(NamedTuple):
    """Which checkpoints belong together."""

    prefix: str  # of their keys
    name: str
    store: Optional[str] = None
    pathspec: Optional[str] = None  # only those of this task
    marks: Mapping[str, Any] = {}  # and with these fields: nodes of a gang are one task

    @classmethod
    def of_name(cls, name: str, store: Optional[str] = None) -> Series:
        return cls(keys.checkpoints_of(name), name, store)

    def has(self, reference: Mapping[str, Any]) -> bool:
        """Whether one whose key begins so belongs to it."""
        is_named = reference.get("name") == self.name and self.pathspec in (None, reference.get("pathspec"))
        return is_named and all(reference.get(field) == value for field, value in self.marks.items())


def is_watched(reference: Mapping[str, Any]) -> bool:
    """Whether a watch made it, and not somebody's save."""
    return isinstance(reference.get("unit"), str) and bool(reference["unit"]) and "layout" in reference


def step_of(reference: Mapping[str, Any]) -> Optional[int]:
    step = (reference.get("metadata") or {}).get("step")
    return step if isinstance(step, int) and not isinstance(step, bool) else None


def is_guessed(reference: Mapping[str, Any]) -> bool:
    return reference.get("complete") == GUESSED


def is_extra(path: str) -> bool:
    """Lightning's `last.ckpt`: written over and over beside the numbered ones, and none of them where these are counted."""
    return _EXTRA.fullmatch(path.rpartition("/")[2]) is not None


def written(reference: Mapping[str, Any]) -> float:
    """When its trainer changed it last, in seconds since the epoch."""
    return references.written_ns(reference) / 1e9


def age(reference: Mapping[str, Any]) -> Tuple[int, int, float]:
    """Newer ones are larger."""
    step = step_of(reference)
    return references.written_ns(reference), -1 if step is None else step, references.created(reference)


def newest_first(found: Iterable[_Reference]) -> List[_Reference]:
    return sorted(found, key=age, reverse=True)
