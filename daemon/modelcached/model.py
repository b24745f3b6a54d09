"""The values everything else speaks of: digests, trees, repos, listings, and who is asking.

A tree's name is the SHA-256 of its canonical JSON, so two nodes that hold the same files give them the same name.
Names from outside are checked here, once, before they can become a path (I9).
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, NewType
from urllib.parse import quote

import msgspec

from .errors import InvalidRequest, NotPermitted, UnsafePath

Digest = NewType("Digest", str)  # 64 lower-case hex digits: a blob's SHA-256
TreeId = NewType("TreeId", str)  # 64 lower-case hex digits: the SHA-256 of a tree's canonical JSON
Commit = NewType("Commit", str)  # 40 lower-case hex digits

REPO_TYPES = ("model", "dataset", "space")
MAX_NAME_BYTES = 255  # a path component, on every Linux filesystem
MAX_PATH_BYTES = 3072  # PATH_MAX less what a root and a view's name need

_DIGEST = re.compile(r"[0-9a-f]{64}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_REPO_ID = re.compile(r"(?:\w(?:[\w\-.]*\w)?/)?\w(?:[\w\-.]*\w)?", re.ASCII)
MAX_REPO_ID = 96  # letters, as on the hub


class Caller(NamedTuple):
    """The process at the other end, as the kernel vouches for it (SO_PEERCRED)."""

    uid: int
    gid: int
    pid: int


def is_owner(caller: Caller) -> bool:
    """Root, or the daemon's own user: they see and may do everything on this node."""
    return caller.uid in (0, os.geteuid())


def require_owner(caller: Caller, what: str) -> None:
    """NotPermitted for all but root and the daemon's own user."""
    if not is_owner(caller):
        raise NotPermitted(
            f"uid {caller.uid} may not {what}", f"only root and the daemon's own user (uid {os.geteuid()}) may: sudo modelcache ..."
        )


class Reply(NamedTuple):
    """What a verb returns. Whoever holds a Reply owns its descriptors and closes them."""

    result: Any
    descriptors: tuple[int, ...] = ()


class Repo(NamedTuple):
    endpoint: str  # no slash at the end
    type: str  # one of REPO_TYPES
    id: str  # "name" or "org/name"

    def __str__(self) -> str:
        return self.id if self.type == "model" else f"{self.type}s/{self.id}"


class ListedFile(msgspec.Struct, frozen=True, array_like=True):
    """One file of a commit as the hub lists it. `sha256` is known beforehand for LFS files only."""

    path: str
    size: int  # bytes
    oid: str  # git blob id: SHA-1 of b"blob <size>\0" + content (of the pointer, for an LFS file)
    sha256: str | None = None
    xet_hash: str | None = None


class Listing(msgspec.Struct, frozen=True, omit_defaults=True):
    """All files of one commit, sorted by path, every path checked."""

    commit: str
    files: tuple[ListedFile, ...]
    is_whole: bool = True  # False: those that another cache had, perhaps not all


class Content(NamedTuple):
    """Bytes as they are known *before* they are here: by SHA-256, or by a git id that means something in one repo only (I10).

    An "object" has no digest that anybody knows: its `hex` names the place it comes from.
    """

    algorithm: str  # "sha256", "git-sha1" or "object"
    hex: str
    size: int  # bytes
    scope: str = ""  # the repo's folder for git-sha1


@dataclass(frozen=True, slots=True)
class TreeFile:
    path: str
    size: int  # bytes
    sha256: Digest
    executable: bool = False


@dataclass(frozen=True)
class Tree:
    """Immutable list of files, links and empty directories; see `tree_id` for its name."""

    files: tuple[TreeFile, ...]
    links: tuple[tuple[str, str], ...] = ()  # path, relative target that stays inside
    folders: tuple[str, ...] = ()  # empty ones

    @cached_property
    def size(self) -> int:
        return sum(file.size for file in self.files)

    def encode(self) -> bytes:
        """Canonical JSON: sorted by path, no white space, one spelling for every tree."""
        return msgspec.json.encode(
            {
                "files": [[f.path, f.size, f.sha256, f.executable] for f in sorted(self.files, key=lambda f: f.path)],
                "folders": sorted(self.folders),
                "links": sorted(self.links),
            }
        )

    def tree_id(self) -> TreeId:
        return TreeId(hashlib.sha256(self.encode()).hexdigest())


class _TreeJson(msgspec.Struct, forbid_unknown_fields=True):
    files: list[tuple[str, int, str, bool]]
    folders: list[str]
    links: list[tuple[str, str]]


# Decoders are made where types are, and not where they are used: msgspec looks at a type once, and two threads that do so at the same
# time crash the process. `tests/test_layers.py` sees to it.
_tree_json = msgspec.json.Decoder(_TreeJson)
listing_json = msgspec.json.Decoder(Listing)


def decode_tree(raw: bytes, name: TreeId) -> Tree:
    """The tree in `raw`; ValueError if it is not the tree of that name."""
    if hashlib.sha256(raw).hexdigest() != name:
        raise ValueError(f"not the tree {name}")
    read = _tree_json.decode(raw)
    files = tuple(TreeFile(path, size, Digest(sha256), executable) for path, size, sha256, executable in read.files)
    if any(file.size < 0 or not is_digest(file.sha256) for file in files):
        raise ValueError(f"the tree {name} has a file without size or digest")
    check_paths([*(file.path for file in files), *(path for path, _ in read.links), *read.folders], "tree")
    check_links(read.links)
    return Tree(files, tuple(read.links), tuple(read.folders))


def is_digest(text: str) -> bool:
    return _DIGEST.fullmatch(text) is not None


def is_commit(text: str) -> bool:
    return _COMMIT.fullmatch(text) is not None


def check_repo(endpoint: str, repo_type: str, repo_id: str) -> Repo:
    """The repo of that name; InvalidRequest tells what a name looks like."""
    if repo_type not in REPO_TYPES:
        raise InvalidRequest(f"unknown repo type {repo_type!r}", f"one of {', '.join(REPO_TYPES)}")
    is_sound = len(repo_id) <= MAX_REPO_ID and _REPO_ID.fullmatch(repo_id) and not any(bad in repo_id for bad in ("--", ".."))
    if not is_sound or repo_id.endswith(".git"):
        raise InvalidRequest(
            f"{repo_id!r} is no repo id", "a repo id is 'name' or 'organisation/name' with letters, digits, '-', '_' and '.'"
        )
    return Repo(endpoint, repo_type, repo_id)


def check_revision(revision: str) -> str:
    """A name that git allows and that stays one name on disk, quoted (`Layout.ref`)."""
    is_sound = 0 < len(revision) <= 255 and revision not in (".", "..") and revision.isprintable()
    if not is_sound or len(quote(revision, safe="")) > MAX_NAME_BYTES:
        raise InvalidRequest(f"{revision[:80]!r} is no revision", "a branch, a tag, 'refs/pr/1' or a commit hash")
    return revision


def check_paths(paths: Iterable[str], where: str) -> None:
    """Refuses, by name, a list of files that does not describe a directory of its own (I9)."""
    files: set[str] = set()
    folders: set[str] = set()
    for path in paths:
        problem = _path_problem(path)
        if problem is None and (path in files or path in folders):
            problem = "stands for two entries"
        if problem is None:
            parts = path.split("/")
            for depth in range(1, len(parts)):
                parent = "/".join(parts[:depth])
                if parent in files:
                    problem = f"lies in {parent!r}, which is a file"
                folders.add(parent)
            files.add(path)
        if problem is not None:
            raise UnsafePath(
                f"{where}: the file name {path[:200]!r} {problem}",
                "the repo's owner has to rename it; other files can be had with patterns that leave it out",
                path=path[:200].encode(errors="backslashreplace").decode(),  # can be sent, whatever it is
            )


def check_links(links: Sequence[tuple[str, str]]) -> None:
    """Refuses links that lead out of the tree, over other links too (I9): targets are relative and stay inside."""
    targets = dict(links)
    for path, target in links:
        is_sound = 0 < len(target) <= MAX_PATH_BYTES and not target.startswith("/") and "\0" not in target
        if not is_sound or _leads_out(path, target, targets):
            raise UnsafePath(
                f"the link {path[:200]!r} leads out of what is saved, to {target[:200]!r}",
                "save the folder it leads to as well, or the file itself",
            )


def _leads_out(path: str, target: str, links: dict[str, str]) -> bool:
    """Follows a link as the kernel would."""
    place, todo = path.split("/")[:-1], target.split("/")[::-1]
    for _ in range(MAX_PATH_BYTES):
        if not todo:
            return False
        part = todo.pop()
        if part == "..":
            if not place:
                return True
            place.pop()
        elif part not in ("", "."):
            inner = links.get("/".join([*place, part]))
            if inner is None:
                place.append(part)
            else:
                todo += inner.split("/")[::-1]
    return False  # it leads round and round, so nowhere


def _path_problem(path: str) -> str | None:
    if not path:
        return "is empty"
    if "\0" in path:
        return "contains NUL"
    if path.startswith("/"):
        return "is absolute"
    try:
        raw = path.encode()
    except UnicodeEncodeError:
        return "is not UTF-8"
    parts = path.split("/")
    if any(part in ("", ".", "..") for part in parts):
        return "is not a normalised relative path"
    if len(raw) > MAX_PATH_BYTES or any(len(part.encode()) > MAX_NAME_BYTES for part in parts):
        return "is too long"
    return None
