"""References: what was saved, by this node or any other with the same store, found again and taken out."""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Mapping
from typing import Any, Callable, Dict, List, Optional, Tuple

from . import artifacts, client, keys
from .metadata import decode
from .protocol import DeleteReference, References

_PENDING_SECONDS = 120.0
POLL_SECONDS = 0.5  # a store sends no events
_MANY = 1_000  # checkpoints among which the newest is looked for


def list(  # `modelcache.list`
    kind: Optional[str] = None, name: Optional[str] = None, as_dict: bool = True, *, prefix: str = "", store: Optional[str] = None
) -> List[Any]:
    """What was saved, newest first; what is on its way to the store too, if this user saved it on this node.

    Args:
        kind: "model" or "checkpoint"; None is both.
        name: a model's label or a checkpoint's name.
        as_dict: False gives ModelArtifact and CheckpointArtifact objects; of types that a newer version made, their base class.
        prefix: what the keys begin with. It spares the store a look at all others.
        store: see `save`.
    """
    if kind is not None and kind not in keys.KINDS:
        raise ValueError("kind is 'model' or 'checkpoint', not %r" % (kind,))
    found = _ask(References(prefix, kind, name, store))
    return found if as_dict else [artifacts.MetaflowDataArtifactReference(**reference) for reference in found]


def latest(name: str, kind: str = keys.CHECKPOINT, *, store: Optional[str] = None) -> Optional[Dict[str, Any]]:
    """The newest reference for a checkpoint's name (a model's label); None if there is none.

    What a watch kept is as old as its files: one that comes late may have captured the newest first.
    """
    if kind not in keys.KINDS:
        raise ValueError("kind is 'model' or 'checkpoint', not %r" % (kind,))
    prefix = keys.checkpoints_of(name) if kind == keys.CHECKPOINT else keys.models_of(name)
    found = _ask(References(prefix, kind, name, store, limit=_MANY if kind == keys.CHECKPOINT else 1))
    return max(found, key=written_ns, default=None)  # of equals the one saved last


def delete(reference: Any, *, store: Optional[str] = None) -> None:
    """Takes a reference out of the store: nobody can load it any more. Its bytes go with the next garbage collection.

    `reference`, errors: see `load`.
    """
    fields = artifacts.as_reference(reference)
    client.shared().call("delete", DeleteReference(fields["key"], store or fields.get("store")))


def of_task(prefix: str, pathspec: Optional[str] = None, name: Optional[str] = None, store: Optional[str] = None) -> List[Dict[str, Any]]:
    """Checkpoints whose keys begin so, newest first; those that this task made, of this name."""
    return and_awaited(prefix, pathspec, name, store)[0]


def and_awaited(
    prefix: str, pathspec: Optional[str] = None, name: Optional[str] = None, store: Optional[str] = None
) -> Tuple[List[Dict[str, Any]], List[Dict[str, Any]]]:
    """The same, and what other nodes are still bringing to the store: their pending records, newest first."""
    last = ".%s." % name if name is not None and pathspec is None else ""
    if pathspec is not None:
        last = keys.pathspec_hash(pathspec) + "."
    reply = client.shared().call("references", References(prefix, keys.CHECKPOINT, name, store, last=last))
    found, awaited = (
        [each for each in reply.get(part, ()) if pathspec in (None, each.get("pathspec"))] for part in ("references", "elsewhere")
    )
    return [received(each) for each in found], awaited


def settled(
    listed: Callable[[], Tuple[List[Dict[str, Any]], List[Dict[str, Any]]]], say: Callable[[str], None]
) -> List[Dict[str, Any]]:
    """What may be loaded, best first, when nothing newer is on its way from another node, or that takes too long.

    `listed`: what is there, best first, and what is awaited, newest first.
    """
    end = time.monotonic() + pending_seconds()
    has_said = False
    while True:
        found, awaited = listed()
        newest = created(found[0]) if found else None
        better = [each for each in awaited if newest is None or created(each) > newest]
        if not better or time.monotonic() > end:
            break
        if not has_said:
            has_said = True
            say("waiting for %s, which %s is bringing to the store" % (better[0]["key"], better[0].get("node")))
        time.sleep(POLL_SECONDS)
    for each in better:
        say("skipping %s: %s has not brought it to the store yet" % (each["key"], each.get("node")))
    return found


def created(reference: Mapping[str, Any]) -> float:
    """When it was saved, in seconds since the epoch; a time without an offset is local."""
    try:
        return datetime.datetime.fromisoformat(str(reference.get("created_on"))).timestamp()
    except (ValueError, OverflowError, OSError):
        return 0.0


def written_ns(reference: Mapping[str, Any]) -> int:
    """When what it names was written, in nanoseconds since the epoch: what a watch saw, else when it was saved."""
    moment = reference.get("written_ns")
    return moment if isinstance(moment, int) else int(created(reference) * 1e9)


def pending_seconds() -> float:
    """How long to wait for what another node is bringing."""
    text = os.environ.get("MODELCACHE_PENDING_SECONDS", "")
    try:
        return float(text) if text else _PENDING_SECONDS
    except ValueError:
        raise ValueError("MODELCACHE_PENDING_SECONDS is a number of seconds, not %r" % text) from None


def received(reference: Dict[str, Any]) -> Dict[str, Any]:
    """A reference from the wire, as users see it."""
    return {**reference, "metadata": decode(reference.get("metadata") or {})}


def _ask(request: References) -> List[Dict[str, Any]]:
    return [received(reference) for reference in client.shared().call("references", request).get("references", ())]
