"""What is in huggingface_hub's own cache: repos, their commits, and under which of the hub's names the bytes lie.

    models--org--name/refs/<revision>               a commit
    models--org--name/snapshots/<commit>/<path>     a link to ../../blobs/<etag>: a SHA-256, or a git id
    models--org--name/trees/<commit>.json           the commit's whole listing, where huggingface_hub has kept one

Nothing is believed: whoever takes a file over compares its bytes with its name.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Tuple

from .files import walk

_FOLDER = re.compile(r"(model|dataset|space)s--(.+)")
_ETAG = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_COMMIT = re.compile(r"[0-9a-f]{40}")


class Found(NamedTuple):
    """One commit of one repo."""

    repo_id: str
    repo_type: str
    commit: str
    refs: List[Tuple[str, float]]  # names that led here, and when
    blobs: Dict[str, str]  # etag to the file with the bytes
    listing: Dict[str, Any]  # as in FetchReply
    is_whole: bool
    unnamed: List[str]  # files whose bytes have no name

    @property
    def what(self) -> str:
        prefix = "" if self.repo_type == "model" else "%ss/" % self.repo_type
        return "%s%s@%s" % (prefix, self.repo_id, self.commit[:8])


def default_cache() -> str:
    """Where huggingface_hub keeps it."""
    cache = os.environ.get("XDG_CACHE_HOME", os.path.join("~", ".cache"))
    home = os.environ.get("HF_HOME", os.path.join(cache, "huggingface"))
    named = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or os.path.join(home, "hub")
    return os.path.expandvars(os.path.expanduser(named))


def scan(cache: str) -> Iterator[Found]:
    """Every commit that has files there, repo by repo. OSError when there is no such folder."""
    for name in sorted(os.listdir(cache)):
        match = _FOLDER.fullmatch(name)
        snapshots = os.path.join(cache, name, "snapshots")
        if match is None or not os.path.isdir(snapshots):
            continue
        refs = _refs(os.path.join(cache, name, "refs"))
        for commit in sorted(os.listdir(snapshots)):
            if _COMMIT.fullmatch(commit):
                leading = [(revision, when) for revision, target, when in refs if target == commit]
                yield _commit(os.path.join(cache, name), match[2].replace("--", "/"), match[1], commit, leading)


def _commit(folder: str, repo_id: str, repo_type: str, commit: str, refs: List[Tuple[str, float]]) -> Found:
    blobs: Dict[str, str] = {}
    rows: Dict[str, List[Any]] = {}
    unnamed: List[str] = []
    inside = os.path.join(os.path.realpath(folder), "")
    for path, entry in walk(os.path.join(folder, "snapshots", commit)):
        real = os.path.realpath(entry.path)
        etag = os.path.basename(real)
        if os.path.isdir(real):
            continue
        if not real.startswith(inside) or not _ETAG.fullmatch(etag) or not os.path.isfile(real):
            unnamed.append(path)
            continue
        blobs[etag] = real
        size = os.stat(real).st_size
        rows[path] = [path, size, etag, None, None] if len(etag) == 40 else [path, size, _pointer_oid(etag, size), etag, None]
    whole = _whole(os.path.join(folder, "trees", "%s.json" % commit))
    files = whole if whole is not None else [rows[path] for path in sorted(rows)]
    return Found(repo_id, repo_type, commit, refs, blobs, {"commit": commit, "files": files}, whole is not None, unnamed)


def _whole(path: str) -> Optional[List[List[Any]]]:
    """The commit's listing as huggingface_hub keeps it; None when there is none that can be read."""
    try:
        with open(path, encoding="utf-8") as file:
            entries = json.load(file)["files"]
        return [
            [name, int(entry["size"]), str(entry["blob_id"]), entry.get("lfs_sha256"), entry.get("xet_hash")]
            for name, entry in sorted(entries.items())
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _refs(folder: str) -> List[Tuple[str, str, float]]:
    found = []
    for above, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(above, name)
            with open(path, encoding="utf-8", errors="replace") as file:
                found.append((os.path.relpath(path, folder), file.read().strip(), os.stat(path).st_mtime))
    return sorted(found)


def _pointer_oid(sha256: str, size: int) -> str:
    """The git id of the pointer that stands for an LFS file."""
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize %d\n" % (sha256.encode(), size)
    return hashlib.sha1(b"blob %d\0" % len(pointer) + pointer).hexdigest()
