"""A repo in the layout of huggingface_hub's cache, for programs that look there themselves.

    models--org--name/
        refs/main                       the commit a name points to
        trees/<commit>.json             the commit's full listing, so that nobody takes some of its files for all of them
        snapshots/<commit>              `link_snapshot`: a link to the leased view
        snapshots/<commit>/<path>       `fill_snapshot`: a relative link to ../../blobs/<etag>, which is a private copy

The listing is the daemon's: {"commit": str, "files": [[path, size_bytes, git_oid, lfs_sha256 or None, xet_hash or None], ...]}.
"""

from __future__ import annotations

import json
import os
from typing import Any, Dict, Iterable, Optional

from . import files
from .names import cache_folder_name

_TREE_FORMAT = 1  # huggingface_hub's TREE_CACHE_FORMAT_VERSION
_TAG = (
    "Signature: 8a477f597d28d172789f06886806bc55\n"
    "# This file is a cache directory tag created by modelcache.\n"
    "# For information about cache directory tags, see:\n"
    "#\thttps://bford.info/cachedir/\n"
)


def link_snapshot(cache: str, repo_id: str, repo_type: str, revisions: Iterable[str], view: str, listing: Dict[str, Any]) -> str:
    """Shows a leased view as the snapshot of its commit below `cache`; returns the snapshot's path.

    `revisions` are the names that lead to this commit. FileExistsError when the commit is there with other files: one cache
    shows one set of a commit's files.
    """
    folder = os.path.join(cache, cache_folder_name(repo_id, repo_type))
    commit = listing["commit"]
    snapshot = os.path.join(folder, "snapshots", commit)
    os.makedirs(os.path.dirname(snapshot), exist_ok=True)
    try:
        os.symlink(view, snapshot)
    except FileExistsError:
        if not os.path.islink(snapshot) or os.readlink(snapshot) != view:
            raise
    _put_listing(folder, listing)
    for revision in revisions:
        _put_ref(folder, revision, commit)
    return snapshot


def fill_snapshot(
    cache: str,
    repo_id: str,
    repo_type: str,
    revision: str,
    view: str,
    listing: Dict[str, Any],
    force: bool = False,
    is_whole: bool = True,
) -> str:
    """Puts private copies of a view's files into a huggingface_hub cache; returns the snapshot's path.

    Files whose blob is there already are not copied again unless `force`. `is_whole` is False for single files, which
    huggingface_hub keeps without the commit's listing.
    """
    folder = os.path.join(cache, cache_folder_name(repo_id, repo_type))
    commit = listing["commit"]
    snapshot = os.path.join(folder, "snapshots", commit)
    etags = {path: (lfs_sha256 or git_oid) for path, _, git_oid, lfs_sha256, _ in listing["files"]}
    os.makedirs(os.path.join(folder, "blobs"), exist_ok=True)
    os.makedirs(snapshot, exist_ok=True)
    _put_tag(cache)
    if is_whole:
        _put_listing(folder, listing)
    _put_ref(folder, revision, commit)
    for name, entry in files.walk(view):
        if not entry.is_dir():
            pointer = os.path.join(snapshot, name)
            blob = os.path.join(folder, "blobs", etags[name])
            os.makedirs(os.path.dirname(pointer), exist_ok=True)
            if force or _size_of(blob) != entry.stat().st_size:
                files.copy_file(entry.path, blob)
            files.put_link(os.path.relpath(blob, os.path.dirname(pointer)), pointer)
    return snapshot


def tree_json(listing: Dict[str, Any]) -> str:
    """A listing as huggingface_hub keeps it beside its snapshots."""
    entries: Dict[str, Any] = {}
    for path, size_bytes, git_oid, lfs_sha256, xet_hash in sorted(listing["files"]):
        entries[path] = {"size": size_bytes, "blob_id": git_oid}
        if lfs_sha256 is not None:
            entries[path].update(lfs_sha256=lfs_sha256, lfs_size=size_bytes)
        if xet_hash is not None:
            entries[path]["xet_hash"] = xet_hash
    return json.dumps({"format_version": _TREE_FORMAT, "files": entries}, indent=1)


def _put_listing(folder: str, listing: Dict[str, Any]) -> None:
    path = os.path.join(folder, "trees", "%s.json" % listing["commit"])
    if not os.path.exists(path):  # a commit's listing never changes
        os.makedirs(os.path.dirname(path), exist_ok=True)
        files.put_text(tree_json(listing), path)


def _put_ref(folder: str, revision: str, commit: str) -> None:
    if revision == commit:
        return
    path = os.path.join(folder, "refs", revision)
    try:
        with open(path) as file:
            if file.read() == commit:
                return
    except FileNotFoundError:
        pass
    os.makedirs(os.path.dirname(path), exist_ok=True)
    files.put_text(commit, path)


def _put_tag(cache: str) -> None:
    path = os.path.join(cache, "CACHEDIR.TAG")
    if not os.path.exists(path):
        files.put_text(_TAG, path)


def _size_of(path: str) -> Optional[int]:
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return None
