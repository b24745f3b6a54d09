"""`modelcache doctor PATH`: what a path is, whether one may write there, and how to get files of one's own.

It is told from the path itself; a daemon that runs adds which repos the files belong to.
"""

from __future__ import annotations

import argparse
import os
import re
import stat
from typing import Any, Dict, List, NamedTuple, Optional

from . import cli_daemon
from .cli_show import FAILED, NOT_FOUND, OK, Show, columns
from .errors import ModelcacheError

_VIEW = re.compile(r"(?P<root>.*)/views/(?P<tree>[0-9a-f]{64})(?:/(?P<file>.*))?")
_BLOB = re.compile(r"(?P<root>.*)/blobs/sha256/[0-9a-f]{2}/(?P<blob>[0-9a-f]{64})(?:\.x)?")
_HUGGINGFACE = re.compile(r".*/(?:models|datasets|spaces)--[^/]+/(?:blobs|snapshots|refs|trees)(?:/.*)?")
_COPY = re.compile(r".*/modelcache-(?P<pid>[0-9]+)-[0-9a-f]{12}(?:/.*)?")
_BLOB_MTIME = 315_532_800  # seconds: the daemon gives every file of the cache this one
_GET_YOUR_OWN = (
    "your own files: modelcache pull REPO (load KEY) --to DIR; local_dir=DIR in Python; MODELCACHE_LOADED=private for a whole process"
)


class Explained(NamedTuple):
    path: str
    real_path: str
    kind: str  # "view", "blob", "huggingface_hub cache", "private copy", "private"
    what: str
    is_writable: bool  # by this user, as the kernel sees it
    writing: str
    root: Optional[str] = None
    tree: Optional[str] = None
    file: Optional[str] = None  # in the view
    repos: List[str] = []
    problem: str = ""
    hint: str = ""


def explain(asked: argparse.Namespace, show: Show) -> int:
    path = asked.path
    if not os.path.exists(path):
        return _missing(path, show)
    said = _look(path, asked)
    lines = [("path", said.path)]
    if said.real_path != os.path.abspath(path):
        lines.append(("really", said.real_path))
    lines += [("is", said.what), ("writing", said.writing)]
    lines += [("repo", repo) for repo in said.repos]
    if said.problem:
        lines.append(("wrong", said.problem))
    show.data(said._asdict(), columns(lines))
    if said.hint:
        show.word("hint: %s" % said.hint)
    return FAILED if said.problem else OK


def _look(path: str, asked: argparse.Namespace) -> Explained:
    real = os.path.realpath(path)
    can_write = os.access(real, os.W_OK)
    plainly = "you may write there" if can_write else "uid %d may not write there" % os.geteuid()
    view, blob, copy = _VIEW.fullmatch(real), _BLOB.fullmatch(real), _COPY.fullmatch(real)
    if view and os.path.isdir(view["root"]):
        problem = _damage(real)
        return Explained(
            path=path,
            real_path=real,
            kind="view",
            what="%s of a view: shared with every task of this node, read-only" % ("a file" if view["file"] else "the folder"),
            is_writable=can_write,
            writing=_why_not(can_write),
            root=view["root"],
            tree=view["tree"],
            file=view["file"],
            repos=_repos_of(view["tree"], asked),
            problem=problem,
            hint="find out what else was changed: modelcache verify" if problem else _GET_YOUR_OWN,
        )
    if blob:
        what = "a blob: the cache's own bytes, shown in views"
        return Explained(path, real, "blob", what, can_write, _why_not(can_write), blob["root"], problem=_damage(real), hint=_GET_YOUR_OWN)
    if copy:
        what = "a private copy of process %s, which removes it when it ends" % copy["pid"]
        return Explained(path, real, "private copy", what, can_write, plainly, hint="" if can_write else _GET_YOUR_OWN)
    if _HUGGINGFACE.fullmatch(real):
        what = "in a cache of huggingface_hub, which is no part of the shared one"
        return Explained(path, real, "huggingface_hub cache", what, can_write, plainly)
    what = "a private %s: no part of the shared cache" % ("folder" if os.path.isdir(real) else "file")
    return Explained(path, real, "private", what, can_write, plainly)


def _why_not(can_write: bool) -> str:
    if not can_write:
        return "fails, as it should: the files belong to everybody"
    return "works, since uid %d may write anywhere, and must not be done: it changes the files of everybody" % os.geteuid()


def _damage(real: str) -> str:
    """What shows that somebody wrote through a link to a file of the cache."""
    found = os.stat(real)
    if not stat.S_ISREG(found.st_mode):
        return ""
    if found.st_mtime != _BLOB_MTIME or found.st_mode & 0o222:
        return "it was changed after it had been checked: its bytes can't be trusted"
    return ""


def _repos_of(tree: str, asked: argparse.Namespace) -> List[str]:
    try:
        entries: List[Dict[str, Any]] = cli_daemon.running_client(asked).call("ls")["repos"]
    except (ModelcacheError, OSError):
        return []
    return ["%s (%s) %s" % (entry["repo_id"], entry["repo_type"], entry["commit"]) for entry in entries if entry["tree"] == tree]


def _missing(path: str, show: Show) -> int:
    view = _VIEW.fullmatch(os.path.realpath(path))
    hint = ""
    if view and not os.path.isdir(view["root"]):
        hint = "the cache of this node is not here: mount %s at the same place, read-only" % view["root"]
    elif view and not os.path.isdir(os.path.join(view["root"], "views", view["tree"])):
        hint = "a view goes when nobody holds a lease on it; ask for the repo again: modelcache pull REPO"
    elif view:
        hint = "the view is there, and has no such file: it shows only the files that were asked for"
    error = FileNotFoundError(2, "not there, or not to be seen by uid %d" % os.geteuid(), path)
    error.hint = hint  # type: ignore[attr-defined]
    show.fail(error)
    return NOT_FOUND
