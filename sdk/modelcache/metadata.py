"""Metadata: what a user says about a save, as plain data that comes back as it was.

Converted are NumPy and torch scalars (what has `.item()`), dates, paths, enums, tuples and sets, and keys as JSON spells them.
What remains is a MetadataError that names the key. JSON has no NaN and no infinities, so they travel as {"$float": "nan"};
a user's own dict of that shape travels with one more "$".
"""

from __future__ import annotations

import datetime
import enum
import json
import math
import os
import re
from collections.abc import Mapping
from typing import Any, Dict, Optional

from .errors import MetadataError

MAX_BYTES = 512 << 10  # as JSON; it is read whenever references are listed
_MAX_DEPTH = 64
_TAG = re.compile(r"\$+float")
_HINT = "metadata holds text, numbers, None, lists and dicts; convert it first, or save it as a file"


def plain(metadata: Optional[Mapping[Any, Any]]) -> Dict[str, Any]:
    """The metadata as a load will give it back. MetadataError (a ValueError) names what can't be kept."""
    if metadata is None:
        return {}
    if not isinstance(metadata, Mapping):
        raise MetadataError("metadata is a dict, not %s" % type(metadata).__name__, _HINT)
    converted: Dict[str, Any] = _plain(metadata, "metadata", 0)
    size = len(json.dumps(encode(converted)))
    if size > MAX_BYTES:
        raise MetadataError("the metadata has %d bytes, at most %d are kept" % (size, MAX_BYTES), "save the rest as a file")
    return converted


def encode(value: Any) -> Any:
    """What `plain` returned, as JSON can say it."""
    if isinstance(value, float) and not math.isfinite(value):
        return {"$float": repr(value)}
    if isinstance(value, list):
        return [encode(each) for each in value]
    if isinstance(value, dict):
        return {"$" + key if len(value) == 1 and _TAG.fullmatch(key) else key: encode(each) for key, each in value.items()}
    return value


def decode(value: Any) -> Any:
    """The reverse of `encode`. Metadata that somebody else wrote comes back as it is."""
    if isinstance(value, list):
        return [decode(each) for each in value]
    if isinstance(value, dict):
        if len(value) == 1:
            ((key, each),) = value.items()
            if key == "$float" and each in ("nan", "inf", "-inf"):
                return float(each)
            if _TAG.fullmatch(key) and key != "$float":
                return {key[1:]: decode(each)}
        return {key: decode(each) for key, each in value.items()}
    return value


def _plain(value: Any, where: str, depth: int) -> Any:
    if depth > _MAX_DEPTH:
        raise MetadataError("%s... is nested too deeply, or contains itself" % where[:200], _HINT)
    if value is None or type(value) in (bool, int, float):
        return value
    if isinstance(value, enum.Enum):
        return _plain(value.value, where, depth + 1)
    if callable(getattr(value, "item", None)):  # before float and str, which NumPy's scalars also are
        return _plain(_item(value, where), where, depth + 1)
    if isinstance(value, (datetime.date, datetime.time)):  # a datetime is a date
        return value.isoformat()
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
        return _text(os.fsdecode(value) if isinstance(value, bytes) else value, where)
    if isinstance(value, str):
        return _text(str(value), where)
    if isinstance(value, (int, float)):  # subclasses of them
        return int(value) if isinstance(value, int) else float(value)
    if isinstance(value, Mapping):
        return _mapping(value, where, depth)
    if isinstance(value, (list, tuple)):
        return [_plain(each, "%s[%d]" % (where, index), depth + 1) for index, each in enumerate(value)]
    if isinstance(value, (set, frozenset)):
        return sorted((_plain(each, where, depth + 1) for each in value), key=_order)
    raise MetadataError("%s is %s, which metadata can't hold" % (where, _kind(value)), _HINT)


def _mapping(value: Mapping[Any, Any], where: str, depth: int) -> Dict[str, Any]:
    made: Dict[str, Any] = {}
    for key, each in value.items():
        spelt = _key(key, where)
        inner = "%s[%r]" % (where, spelt)
        if spelt in made:
            raise MetadataError("%s is there twice, once as %s" % (inner, _kind(key)), "keys become text")
        made[spelt] = _plain(each, inner, depth + 1)
    return made


def _key(key: Any, where: str) -> str:
    plain_key = key if type(key) is str else _plain(key, "a key of %s" % where, 0)
    if isinstance(plain_key, str):
        return _text(plain_key, "a key of %s" % where)
    if plain_key is None or isinstance(plain_key, (bool, int, float)):
        return json.dumps(plain_key)
    raise MetadataError("a key of %s is %s" % (where, _kind(key)), "keys are text")


def _item(value: Any, where: str) -> Any:
    try:
        item = value.item()
    except Exception as error:
        raise MetadataError("%s is %s with more than one value: %s" % (where, _kind(value), error), "convert it with .tolist()") from error
    if type(item) is type(value):
        raise MetadataError("%s is %s, which metadata can't hold" % (where, _kind(value)), _HINT)
    return item


def _text(value: str, where: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise MetadataError("%s is no valid Unicode: %r" % (where, value), _HINT) from None
    return value


def _order(value: Any) -> Any:
    """Any two values can be compared by it: the same set gives the same list."""
    is_number = type(value) in (int, float) and value == value
    return ("", value, "") if is_number else (type(value).__name__, 0, repr(value))


def _kind(value: Any) -> str:
    kind = type(value)
    return kind.__name__ if kind.__module__ == "builtins" else "%s.%s" % (kind.__module__, kind.__qualname__)
