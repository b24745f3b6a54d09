"""Retention: which checkpoints of a watched folder the store keeps, and taking the others out. Files of the user are never touched.

Invariants:
- The newest complete checkpoint stays, whatever is asked for; a guessed one never takes its place.
- Only what the store has counts and is deleted: what is still on its way might not arrive.
- Only what a watch made counts and is deleted: a checkpoint that somebody saved by hand under the same name is none of ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Set, Tuple

from . import client, errors, keys, references, units
from .protocol import References

_SMALLER_IS_BETTER = ("loss", "error", "perplexity")
_ORDERS = ("min", "max")


class Metric(NamedTuple):
    """What makes a checkpoint the best: a name in its metadata, and in which direction."""

    name: str
    is_max: bool

    @classmethod
    def parse(cls, text: str) -> Metric:
        """ "eval_loss", "accuracy:max". Without a direction less is better for names with loss, error or perplexity in them."""
        name, colon, order = text.rpartition(":")
        if not colon:
            return cls(_checked(text), not any(word in text.lower() for word in _SMALLER_IS_BETTER))
        if order not in _ORDERS:
            raise ValueError("the direction of %r is one of %s" % (text, " and ".join(":" + each for each in _ORDERS)))
        return cls(_checked(name), order == "max")

    def of(self, reference: Mapping[str, Any]) -> Optional[float]:
        """Its value, larger being better; None where there is none, or nothing that can be compared."""
        value = (reference.get("metadata") or {}).get(self.name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            return None
        return float(value if self.is_max else -value)


class Rule(NamedTuple):
    """What stays. False when nothing is ever deleted."""

    keep: Optional[int] = None
    best: Optional[Metric] = None

    @classmethod
    def parse(cls, keep: Optional[int], keep_best: Optional[str]) -> Rule:
        if keep is not None and (isinstance(keep, bool) or not isinstance(keep, int) or keep < 1):
            raise ValueError("keep is how many checkpoints stay, at least 1, not %r" % (keep,))
        return cls(keep, None if keep_best is None else Metric.parse(keep_best))

    def __bool__(self) -> bool:
        return self != (None, None)


def plan(stored: Sequence[Mapping[str, Any]], rule: Rule) -> List[str]:
    """Keys to delete, oldest first, of references that the store has.

    `keep` of the newest stay (with `best` alone: one), and the best stays beside them. Of several captures of one unit (a guess
    that was wrong, a step that was trained again) only the newest counts, and the others go. The newest `last.ckpt` stays beside the
    `keep`, as it does in the folder, unless it is older than one of them that it can be made of again (`extra`).
    """
    if not rule:
        return []
    made = units.newest_first([each for each in stored if units.is_watched(each)])
    current = _current(made)
    counted = [each for each in current if not units.is_extra(str(each["unit"]))] or current
    stays: Set[str] = {str(each["key"]) for each in counted[: rule.keep or 1]}
    stays.update(str(each["key"]) for each in made[:1])
    complete = [each for each in made if not units.is_guessed(each)]
    stays.update(str(each["key"]) for each in complete[:1])
    if rule.best is not None:
        best = _best(current, rule.best)
        if best is not None:
            stays.add(str(best["key"]))
    last = next((each for each in made if units.is_extra(str(each["unit"]))), None)
    if last is not None:
        newer = [each for each in made[: made.index(last)] if each["key"] in stays]
        if not any(each.get("extra") == last["unit"] for each in newer):
            stays.add(str(last["key"]))
    return [str(each["key"]) for each in reversed(made) if each["key"] not in stays]


def apply(series: units.Series, rule: Rule) -> List[str]:
    """Deletes what `plan` says of the series; the keys that went. Errors: as `modelcache.list`."""
    if not rule:
        return []
    gone = []
    for key in plan(_stored(series), rule):
        try:
            references.delete(key, store=series.store)
        except (errors.ReferenceNotFoundError, errors.InUseError):  # another watch was faster; it is saved again right now
            continue
        gone.append(key)
    return gone


def _stored(series: units.Series) -> List[Dict[str, Any]]:
    last = "" if series.pathspec is None else keys.pathspec_hash(series.pathspec) + "."
    reply = client.shared().call("references", References(series.prefix, keys.CHECKPOINT, series.name, series.store, last=last))
    pending = set(reply.get("pending", ()))
    found = [each for each in reply.get("references", ()) if series.has(each) and each.get("key") not in pending]
    return [references.received(each) for each in found]


def _current(made: Sequence[Mapping[str, Any]]) -> List[Mapping[str, Any]]:
    """Without those that a newer capture of the same unit has replaced."""
    seen: Set[Tuple[str, Optional[int]]] = set()
    found = []
    for each in made:
        unit = (str(each["unit"]), units.step_of(each))
        if unit in seen and (unit[1] is not None or units.is_guessed(each)):
            continue
        seen.add(unit)
        found.append(each)
    return found


def _best(current: Sequence[Mapping[str, Any]], metric: Metric) -> Optional[Mapping[str, Any]]:
    """The newest of equals."""
    rated = [(value, each) for each in current for value in [metric.of(each)] if value is not None]
    return max(rated, key=lambda pair: pair[0])[1] if rated else None  # max takes the first: the newest


def _checked(name: str) -> str:
    if not name:
        raise ValueError("a metric has a name, as in eval_loss or accuracy:max")
    return name
