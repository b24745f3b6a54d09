"""Save: what a task has made is kept. The call returns when the node's daemon has a copy of its own; the rest happens behind it."""

from __future__ import annotations

import os
from typing import Any, Dict, Optional, Tuple, Union

from . import client, flushing, keys, progress, references, views, walk
from .connection import Connection, OnProgress, known_fields
from .errors import NotSaveableError
from .handover import Handover
from .metadata import encode, plain
from .patience import GONE, Moved, Patience
from .protocol import HelloReply, References, SaveClosed, SaveOpen, SaveTree

Path = Union[str, "os.PathLike[str]"]

STORAGE_FORMATS = ("files", "tar")


def save(
    path: Path,
    label: Optional[str] = None,
    metadata: Optional[Dict[str, Any]] = None,
    storage_format: str = "files",
    *,
    kind: str = "model",
    name: Optional[str] = None,
    durable: bool = False,
    supersede: bool = False,
    follow_links: bool = False,
    store: Optional[str] = None,
    pathspec: Optional[str] = None,
    attempt: int = 0,
) -> Dict[str, Any]:
    """Keeps a folder, or one file, for any task on any node. Returns as soon as the daemon has its own copy on this node.

    From then on the path may be changed or removed, `load` gives the saved state on this node, and the daemon brings it to the
    store, across its own restarts; `flush` waits for that.

    Args:
        path: a folder with everything in it (empty folders, links among its files, executable bits), or one file, which is
            saved under its own name.
        label: a part of the key of a model; None is the name of the path.
        metadata: a dict of plain data. Converted are NumPy and torch scalars, dates, paths, enums, tuples and sets.
        storage_format: how it lies in the store: "files" (large files one by one, small ones together) or "tar" (one tar).
            A load gives the same for both.
        kind: "model" or "checkpoint".
        name: a checkpoint's name, which `latest` asks for; None is "mfchckpt".
        durable: return only when it also survives a power cut.
        supersede: checkpoints of the same name that are newer go to the store before older ones.
        follow_links: save what links that lead out of the path point to. Without it such a link is an error.
        store: one of the stores that the daemon's configuration allows, as an URL; None is its own.
        pathspec: the task that made it, "flow/run/step/task".
        attempt: of that task.

    Returns:
        The reference: a dict with key, type, url, size, created_on, metadata, ... `load`, and any later process, takes it or its key.

    Raises:
        NotSaveableError (ValueError): a device, socket or FIFO is in the way, a link that leads out, a name that is not UTF-8.
        MetadataError (ValueError): a value of the metadata is no plain data. Both come before anything is copied.
        FileChangedError (OSError): a file is still open for writing after 15 s of waiting for it, or was removed meanwhile.
        NotPermittedError (PermissionError), FileNotFoundError, NoSpaceError (OSError), StoreNotAllowedError.
        DaemonNotAvailableError (ConnectionError): no daemon, and none could be started.
        ValueError: an argument makes no sense.
    """
    if kind not in keys.KINDS:
        raise ValueError("kind is 'model' or 'checkpoint', not %r" % (kind,))
    if kind == keys.MODEL and name is not None:
        raise ValueError("a model has a label, only a checkpoint has a name")
    if kind == keys.CHECKPOINT and label is not None:
        raise ValueError("a checkpoint has a name, only a model has a label")
    if kind == keys.MODEL:
        reference = model_reference(path, label, pathspec, attempt)
    else:
        reference = checkpoint_reference(keys.DEFAULT_CHECKPOINT_NAME if name is None else name, pathspec, attempt)
    return keep(path, reference, metadata, storage_format, durable=durable, supersede=supersede, follow_links=follow_links, store=store)


def model_reference(path: Path, label: Optional[str] = None, pathspec: Optional[str] = None, attempt: int = 0) -> Dict[str, Any]:
    """What a new reference to a model says before anything is saved."""
    checked = keys.default_label(os.fsdecode(path)) if label is None else keys.check_name(label, "label")
    uuid = keys.new_model_uuid(checked)
    return {
        "type": keys.MODEL,
        "key": keys.model_key(uuid),
        "uuid": uuid,
        "model_uuid": uuid,
        "label": checked,
        "pathspec": pathspec,
        "attempt": int(attempt),
        "source": "task",
    }


def checkpoint_reference(
    name: str,
    pathspec: Optional[str] = None,
    attempt: int = 0,
    folder: Optional[str] = None,
    root_prefix: str = keys.CHECKPOINTS,
) -> Dict[str, Any]:
    """What a new reference to a checkpoint says. `folder`, `root_prefix`: see `keys.checkpoint_key`."""
    keys.check_name(name, "name")
    version = keys.next_version()
    return {
        "type": keys.CHECKPOINT,
        "key": keys.checkpoint_key(name, version, pathspec, int(attempt), folder, root_prefix),
        "name": name,
        "pathspec": pathspec,
        "pathspec_hash": keys.pathspec_hash(pathspec or ""),
        "attempt": int(attempt),
        "version_id": version,
        "creation_context": "task",
    }


def keep(
    path: Path,
    reference: Dict[str, Any],
    metadata: Optional[Dict[str, Any]] = None,
    storage_format: str = "files",
    *,
    durable: bool = False,
    supersede: bool = False,
    follow_links: bool = False,
    store: Optional[str] = None,
) -> Dict[str, Any]:
    """Saves under a reference that the caller has made (`key` and `type` at least); arguments and errors as in `save`."""
    if storage_format not in STORAGE_FORMATS:
        raise ValueError("storage_format is 'files' or 'tar', not %r" % (storage_format,))
    draft = {**reference, "metadata": encode(plain(metadata)), "storage_format": storage_format}
    if draft["type"] == keys.MODEL:
        draft["serializer"] = storage_format
    request = SaveOpen(draft, 0, 0, storage_format, bool(durable), bool(supersede), store)
    with walk.Source(os.fsdecode(path), follow_links) as source:
        with progress.shown(os.path.basename(source.root) or source.root) as on_progress:
            kept, hello = _Saving(source, request, Patience(source, views.warn), on_progress).run()
    flushing.saved(str(draft["key"]), hello)
    return references.received(kept)


def keep_source(
    source: walk.Readable, reference: Dict[str, Any], metadata: Dict[str, Any], patience: Patience, store: Optional[str] = None
) -> Dict[str, Any]:
    """Saves what a watch found, as `keep`. To bring it to the store in time is the caller's affair: no exit of this process waits."""
    draft = {**reference, "metadata": encode(plain(metadata)), "storage_format": "files"}
    kept, _ = _Saving(source, SaveOpen(draft, 0, 0, supersede=True, store=store), patience, None).run()
    return references.received(kept)


def keep_tree(tree: str, reference: Dict[str, Any], metadata: Optional[Dict[str, Any]], store: Optional[str] = None) -> Dict[str, Any]:
    """Saves what this node shows already, under a reference as in `keep`: no byte moves. The caller holds a lease on `tree`."""
    draft = {**reference, "metadata": encode(plain(metadata)), "storage_format": "files"}

    def attempt(connection: Connection, hello: HelloReply) -> Tuple[Dict[str, Any], HelloReply]:
        reply = connection.request("save_tree", client.fields_of(SaveTree(draft, tree, store)))
        return known_fields(SaveClosed, reply.result).reference, hello

    kept, hello = client.shared().session(attempt)
    flushing.saved(str(draft["key"]), hello)
    return references.received(kept)


class _Saving:
    """One save, over all its attempts."""

    def __init__(self, source: walk.Readable, request: SaveOpen, patience: Patience, on_progress: Optional[OnProgress]) -> None:
        self._source = source
        self._request = request
        self._patience = patience
        self._on_progress = on_progress
        self._listing = self._list()
        self._is_closing = False  # the daemon may have kept it, and only its answer was lost
        if not any(self._listing[:3]):
            views.warn("%s is empty: what is saved holds nothing" % source.root)

    def run(self) -> Tuple[Dict[str, Any], HelloReply]:
        while True:
            try:
                return client.shared().session(self._attempt)
            except Moved as moved:
                self._patience.pause(moved.path, moved.what)
                self._listing = self._list()

    def _attempt(self, connection: Connection, hello: HelloReply) -> Tuple[Dict[str, Any], HelloReply]:
        if self._is_closing:
            asked = client.fields_of(References(prefix=self._key, store=self._request.store))
            for reference in connection.request("references", asked).result.get("references", ()):
                if reference.get("key") == self._key:
                    return reference, hello
            self._is_closing = False
        self._refuse_cache(hello.root)
        handover = Handover(connection, self._source, self._listing, self._patience, self._on_progress)
        return handover.run(self._request, self._now_closing), hello

    def _refuse_cache(self, root: str) -> None:
        """The daemon's copy would be a part of what it copies."""
        try:
            found = os.stat(root)
        except OSError:  # of another user, or not in this container: then it is not in the listing either
            return
        for folder, (device, inode, *_) in self._listing.stamps.items():
            if (device, inode) == (found.st_dev, found.st_ino):
                raise NotSaveableError(
                    "%s can't be saved: %s is the daemon's own cache" % (self._source.root, "%r in it" % folder if folder else "it"),
                    "save the folder that you want to keep, not one that holds the cache",
                    {"paths": [folder]},
                )

    def _now_closing(self) -> None:
        self._is_closing = True

    def _list(self) -> walk.Listing:
        try:
            return self._source.listing()
        except (FileNotFoundError, NotADirectoryError) as error:
            raise self._patience.lost(os.fsdecode(error.filename or ""), GONE) from error

    @property
    def _key(self) -> str:
        return str(self._request.reference["key"])

    def __repr__(self) -> str:
        return "<_Saving %s from %r>" % (self._key, self._source)
