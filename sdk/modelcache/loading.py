"""Load: what was saved comes back as a folder, shared and read-only, or as the caller's own files."""

from __future__ import annotations

import os
import sys
from typing import Any, Dict, NamedTuple, Optional, Union

from . import artifacts, client, progress, references, views
from .leases import Lease
from .protocol import Load

Path = Union[str, "os.PathLike[str]"]


class Brought(NamedTuple):
    path: str
    reference: Dict[str, Any]  # complete, as the store has it
    lease: Optional[Lease]  # on the view at `path`, the caller's to close; None for private files
    source: str  # the tier that the bytes came from, "store" or "disk"


def load(reference: Any, path: Optional[Path] = None, *, store: Optional[str] = None) -> str:
    """The folder that was saved, or a folder with the file that was saved.

    Args:
        reference: what `save` returned; or its key, its URL, or an artifact object. Those of metaflow-checkpoint too.
        path: put private, writable copies there. The folder is made; files of the save are replaced, each all at once; other
            files stay and are named in a warning.
        store: as in `save`; None is the reference's own.

    Returns:
        `path` as it was given. Without it a shared, read-only folder, which stays for the life of this process and of those it
        forks; see `snapshot_download` for who gets private copies instead.

    Raises:
        ReferenceNotFoundError (KeyError): nothing was saved under this key, or it was deleted.
        IncompatibleReferenceError (ValueError): not a reference, or one that this version can't read.
        StoreUnavailableError (ConnectionError), StoreDeniedError (PermissionError), StoreNotAllowedError (ValueError).
        ViewNotVisibleError, NoSpaceError, DaemonNotAvailableError: as in `snapshot_download`.
        ValueError: `reference` stands for nothing that could be loaded.
    """
    return bring(reference, path, store).path  # the lease is never closed: the path is good as long as this process lives


def bring(reference: Any, path: Optional[Path] = None, store: Optional[str] = None) -> Brought:
    """`load` for a caller who wants to know more, and to give the view back."""
    fields = artifacts.as_reference(reference)
    request = Load(
        key=fields["key"],
        store=store or fields.get("store"),
        purpose=os.path.basename(sys.argv[0] if sys.argv else "")[:200],  # not the arguments: they may hold secrets
    )
    with progress.shown(fields["key"].rpartition("/")[2]) as on_progress:
        loaded = client.shared().load(request, on_progress)
    reply, is_kept = loaded.reply, False
    try:
        views.check_visible(reply, loaded.root)
        for warning in reply.warnings:
            views.warn(warning)
        known = references.received(reply.reference)
        source = "store" if reply.store_bytes else "disk"
        if path is not None:
            return Brought(_put(reply.path, path), known, None, source)
        if views.gets_copy(reply):
            return Brought(views.kept_copy(reply, loaded.root), known, None, source)
        is_kept = True
        return Brought(reply.path, known, loaded.lease, source)
    finally:
        if not is_kept:
            loaded.lease.close()


def _put(view: str, path: Path) -> str:
    from . import files

    given = os.fspath(path)
    foreign = files.copy_tree(view, os.path.expanduser(given))
    if foreign:
        views.warn(files.foreign_warning(given, foreign))
    return given
