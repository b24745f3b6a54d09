"""Load: what was saved comes back as a folder, shared and read-only, or as the caller's own files."""

from __future__ import annotations

import os
import sys
import time
from typing import Any, Callable, Dict, NamedTuple, Optional, Union

from . import artifacts, client, progress, references, views
from .errors import ReferenceNotFoundError
from .leases import Lease
from .protocol import Load, LoadFolder, Progress

Path = Union[str, "os.PathLike[str]"]


class Brought(NamedTuple):
    path: str
    reference: Dict[str, Any]  # complete, as the store has it
    lease: Optional[Lease]  # on the view at `path`, the caller's to close; None for private files
    source: str  # the tier that the bytes came from, "store" or "disk"
    tree: str


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
        ReferenceNotFoundError (KeyError): nothing was saved under this key, or it was deleted; or another node is still bringing it
            to the store, and `data["pending"]` says which and since when: for that it waits, MODELCACHE_PENDING_SECONDS at most.
        IncompatibleReferenceError (ValueError): not a reference, or one that this version can't read.
        StoreUnavailableError (ConnectionError), StoreDeniedError (PermissionError), StoreNotAllowedError (ValueError).
        ViewNotVisibleError, NoSpaceError, DaemonNotAvailableError: as in `snapshot_download`.
        ValueError: `reference` stands for nothing that could be loaded.
    """
    return bring(reference, path, store).path  # the lease is never closed: the path is good as long as this process lives


def bring(
    reference: Any, path: Optional[Path] = None, store: Optional[str] = None, new_folder: Optional[Callable[[], str]] = None
) -> Brought:
    """`load` for a caller who wants to know more, and to give the view back.

    Where the caller gets private files for it, they are those of the whole process; with `new_folder` a copy of the caller's own, there.
    """
    fields = artifacts.as_reference(reference)
    return _bring(Load(fields["key"], store or fields.get("store"), purpose=_purpose()), fields["key"], path, new_folder)


def bring_folder(url: str, path: Optional[Path] = None) -> Brought:
    """`bring` for a folder of a store that no save made. What comes has no checksums; that all of it came is known by the sizes."""
    return _bring(LoadFolder(url, purpose=_purpose()), url.rstrip("/"), path)


def _purpose() -> str:
    return os.path.basename(sys.argv[0] if sys.argv else "")[:200]  # not the arguments: they may hold secrets


def _bring(
    request: Union[Load, LoadFolder], called: str, path: Optional[Path], new_folder: Optional[Callable[[], str]] = None
) -> Brought:
    with progress.shown(called.rpartition("/")[2]) as on_progress:
        loaded = when_there(client.shared(), request, on_progress)
    reply, is_kept = loaded.reply, False
    try:
        views.check_visible(reply, loaded.root)
        for warning in reply.warnings:
            views.warn(warning)
        known = references.received(reply.reference)
        source = "store" if reply.store_bytes else "disk"
        if path is not None:
            return Brought(_put(reply.path, path), known, None, source, reply.tree)
        if views.gets_copy(reply):
            copy = views.kept_copy(reply, loaded.root) if new_folder is None else _put(reply.path, new_folder())
            return Brought(copy, known, None, source, reply.tree)
        is_kept = True
        return Brought(reply.path, known, loaded.lease, source, reply.tree)
    finally:
        if not is_kept:
            loaded.lease.close()


def when_there(connected: client.Client, request: Union[Load, LoadFolder], on_progress: Optional[progress.OnProgress]) -> client.Loaded:
    """Loads, and waits before that for what another node is still bringing to the store."""
    end = time.monotonic() + references.pending_seconds()
    while True:
        try:
            return connected.load(request, on_progress)
        except ReferenceNotFoundError as error:
            if "pending" not in error.data or time.monotonic() >= end:
                raise
            if on_progress is not None:
                on_progress(Progress("paused", message=error.message))
        time.sleep(references.POLL_SECONDS)


def _put(view: str, path: Path) -> str:
    from . import files

    given = os.fspath(path)
    foreign = files.copy_tree(view, os.path.expanduser(given))
    if foreign:
        views.warn(files.foreign_warning(given, foreign))
    return given
