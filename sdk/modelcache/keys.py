"""Keys: what a save is called in the store, made without asking anyone, and what a key, a URL or a name says.

    mf.models/models/artifacts/<label>_<32 hex>
    mf.checkpoints/checkpoints/artifacts/<flow>/<step>/<scope>/<task id>/<hash>.<attempt>.<name>.<version>.<unique>

The shapes are those of the metaflow-checkpoint package. Names may contain dots, so a checkpoint's last component is read from
both ends; the `unique` part (time and random) is ours, older keys lack it, and older readers accept it.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import time
from typing import NamedTuple, Optional

from . import errors

MODEL = "model"
CHECKPOINT = "checkpoint"
KINDS = (MODEL, CHECKPOINT)
CHECKPOINTS = "mf.checkpoints"  # what keys begin with
REPOS = "mf.huggingface_hub"
DEFAULT_CHECKPOINT_NAME = "mfchckpt"
MAX_NAME_BYTES = 180  # with everything around it still a file's name in a store that is a folder

# The components of a checkpoint that belongs to no task: its name alone says who shares it.
_NO_TASK = "mf:internal/modelcache/registry:name"
_UNIQUE = re.compile(r"\d{8}T\d{12}-[0-9a-f]{8}")
_KEY = re.compile(r"(?:.+?/)?(models|checkpoints)/artifacts/(.+)", re.DOTALL)  # the first of the two words says which
_LAST = re.compile(r"(?:[^/]+/){4}(.+)", re.DOTALL)
_IN_URL = tuple(re.compile(prefix + r"/(?:models|checkpoints)/artifacts/.+", re.DOTALL) for prefix in (r"mf\.[^/]+", r"[^/]+"))
_OURS = re.compile(r"(.*)/refs/([^/]+/(?:models|checkpoints)/artifacts/.+)\.json", re.DOTALL)
_versions = itertools.count()  # of this process, shared by all names


class CheckpointName(NamedTuple):
    """The last component of a checkpoint's key."""

    pathspec_hash: str
    attempt: str
    name: str
    version: str
    unique: str  # "" in keys of metaflow-checkpoint


class Place(NamedTuple):
    """Where a reference is: its key, and its store if the URL of one told."""

    key: str
    store: Optional[str]


def check_name(name: str, what: str) -> str:
    """`name` if it can be a part of a key; else a ValueError."""
    if not isinstance(name, str):
        raise ValueError("a %s is a string, not %s" % (what, type(name).__name__))
    if not name:
        raise ValueError("a %s can't be empty" % what)
    if not all(map(_is_allowed, name)):
        raise ValueError("a %s can't contain '/', backslashes or control characters: %r" % (what, name))
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        raise ValueError("a %s is valid Unicode: %r" % (what, name)) from None
    if size > MAX_NAME_BYTES:
        raise ValueError("a %s has at most %d bytes, %r has %d" % (what, MAX_NAME_BYTES, name[:40] + "...", size))
    return name


def _is_allowed(letter: str) -> bool:
    """In a name. Some stores list a backslash as a slash."""
    return letter not in "/\\" and ord(letter) >= 32 and not 127 <= ord(letter) < 160


def default_label(path: str) -> str:
    """A label for what lies at `path`: its name, less what no label may contain."""
    name = os.path.basename(os.path.abspath(path))
    name = "".join(filter(_is_allowed, name))
    return name.encode(errors="ignore")[:MAX_NAME_BYTES].decode(errors="ignore") or MODEL


def new_model_uuid(label: str) -> str:
    return "%s_%s" % (label, os.urandom(16).hex())


def model_key(uuid: str) -> str:
    return "mf.models/models/artifacts/%s" % uuid


def models_of(label: str) -> str:
    """What the keys of models with this label begin with."""
    return model_key(check_name(label, "label") + "_")


def next_version() -> int:
    return next(_versions)


def checkpoint_key(
    name: str,
    version: int,
    pathspec: Optional[str] = None,
    attempt: int = 0,
    folder: Optional[str] = None,
    root_prefix: str = CHECKPOINTS,
) -> str:
    """A new key. `folder` is "flow/step/scope/task id"; without it the name alone says which checkpoints belong together."""
    last = "%s.%d.%s.%d.%s" % (pathspec_hash(pathspec or ""), attempt, name, version, _new_unique())
    return checkpoints_in(folder or _folder_of(name), root_prefix) + last


def checkpoints_in(folder: str, root_prefix: str = CHECKPOINTS) -> str:
    """What the keys of checkpoints in this "flow/step/scope/task id" begin with."""
    return "%s/checkpoints/artifacts/%s/" % (root_prefix, folder)


def checkpoints_of(name: str) -> str:
    """What the keys of checkpoints with this name, made outside of a task, begin with."""
    return checkpoints_in(_folder_of(check_name(name, "name")))


def pathspec_hash(pathspec: str) -> str:
    return json_hash(pathspec)[:8]


def json_hash(value: object) -> str:
    """SHA-256 of the JSON of `value`, in hex: how keys name what is not text."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def type_of(key: str) -> str:
    """ "model" or "checkpoint". KeyNotCompatibleException for what is neither."""
    found = _KEY.fullmatch(key)
    if found and found.group(1) == "models":
        return MODEL
    checkpoint_name(key)
    return CHECKPOINT


def checkpoint_name(key: str) -> CheckpointName:
    """What a checkpoint's key says, whatever dots its name has."""
    found = _KEY.fullmatch(key)
    last = _LAST.fullmatch(found.group(2)) if found and found.group(1) == "checkpoints" else None
    parts = last.group(1).split(".") if last else []
    unique = parts.pop() if len(parts) > 4 and _UNIQUE.fullmatch(parts[-1]) else ""
    if len(parts) < 4:
        raise errors.KeyNotCompatibleException("%r is not the key of a model or checkpoint" % key, "a key is what a save returned as `key`")
    return CheckpointName(parts[0], parts[1], ".".join(parts[2:-1]), parts[-1], unique)


def place_of(text: str) -> Place:
    """The key in a key or a URL, one of the store's own or one that metaflow-checkpoint wrote."""
    ours = _OURS.fullmatch(text)
    if ours:
        return Place(ours.group(2), ours.group(1))
    if "://" in text or text.startswith("/"):
        for pattern in _IN_URL:
            found = pattern.search(text)
            if found:
                return Place(found.group(), None)
        raise errors.KeyNotCompatibleException("%r is not the URL of a model or checkpoint" % text, "load takes what a save returned")
    type_of(text)
    return Place(text, None)


def is_url(text: str) -> bool:
    """Whether a URL is that of a model or checkpoint."""
    try:
        place_of(text)
    except errors.IncompatibleReferenceError:
        return False
    return True


def _folder_of(name: str) -> str:
    return "%s/%s" % (_NO_TASK, json_hash(name)[:12])


def _new_unique() -> str:
    seconds, nanoseconds = divmod(time.time_ns(), 1_000_000_000)
    return "%s%06d-%s" % (time.strftime("%Y%m%dT%H%M%S", time.gmtime(seconds)), nanoseconds // 1000, os.urandom(4).hex())
