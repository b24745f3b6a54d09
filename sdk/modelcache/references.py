"""References: what was saved, by this node or any other with the same store, found again and taken out."""

from __future__ import annotations

from typing import Any, Dict, List, Optional, Tuple

from . import artifacts, client, keys
from .metadata import decode
from .protocol import DeleteReference, References


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
    """The newest reference that `save` made for a checkpoint's name (a model's label); None if there is none."""
    if kind not in keys.KINDS:
        raise ValueError("kind is 'model' or 'checkpoint', not %r" % (kind,))
    prefix = keys.checkpoints_of(name) if kind == keys.CHECKPOINT else keys.models_of(name)
    return next(iter(_ask(References(prefix, kind, name, store, limit=1))), None)


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


def received(reference: Dict[str, Any]) -> Dict[str, Any]:
    """A reference from the wire, as users see it."""
    return {**reference, "metadata": decode(reference.get("metadata") or {})}


def _ask(request: References) -> List[Dict[str, Any]]:
    return [received(reference) for reference in client.shared().call("references", request).get("references", ())]
