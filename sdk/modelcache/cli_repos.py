"""What is on this node: list it, remove it, hash it again. Also how a repo is named on the command line."""

from __future__ import annotations

import argparse
import time
from typing import Any, Dict, List, NamedTuple, Optional

from . import cli_daemon, names, tokens
from .cli_show import DAMAGED, OK, Show, UsageError, count, seconds, size
from .errors import HFValidationError, LocalEntryNotFoundError
from .protocol import List_, Remove, Verify

_PREFIXES = {"datasets": "dataset", "spaces": "space"}  # as in the hub's own addresses


class Named(NamedTuple):
    repo_id: str
    repo_type: str
    revision: Optional[str]

    def __str__(self) -> str:
        return self.repo_id if self.revision is None else "%s@%s" % (self.repo_id, self.revision)


def named(text: str, asked: argparse.Namespace) -> Named:
    """A repo as somebody typed it: [datasets/]org/name[@revision], and what the options add. ValueError."""
    if "://" in text:
        raise UsageError("%s is an address, not a repo" % text, "name it as org/name; HF_ENDPOINT chooses the hub")
    repo_id, at, revision = text.partition("@")
    if at and not revision:
        raise UsageError("nothing follows the @ of %s" % text, "org/name@v1.0, or org/name for the default branch")
    option = getattr(asked, "revision", None)
    if at and option not in (None, revision):
        raise UsageError("two revisions of one repo: %s and --revision %s" % (text, option), "give one of them")
    repo_type = getattr(asked, "repo_type", None)
    prefix, _, rest = repo_id.partition("/")
    if prefix in _PREFIXES and rest:
        if repo_type not in (None, _PREFIXES[prefix]):
            raise UsageError("%s is a %s, and --repo-type says %s" % (repo_id, _PREFIXES[prefix], repo_type), "give one of them")
        repo_id, repo_type = rest, _PREFIXES[prefix]
    try:
        names.check_repo_id(repo_id)
    except HFValidationError as error:
        raise UsageError(error.message, "a repo is org/name, a dataset datasets/org/name") from error
    return Named(repo_id, repo_type or "model", revision or option or None)


def ls(asked: argparse.Namespace, show: Show) -> int:
    if asked.kind or asked.name:
        raise UsageError("--kind and --name are about what was saved", "modelcache ls --store --kind checkpoint")
    wanted = None if asked.repo is None else named(asked.repo, asked)
    found: List[Dict[str, Any]] = cli_daemon.client(asked, show).call("ls", List_(wanted and wanted.repo_id))["repos"]
    if wanted is not None:
        found = [entry for entry in found if _is_meant(entry, wanted, asked.repo)]
        if not found:
            raise LocalEntryNotFoundError("nothing of %s is on this node" % str(wanted), "fetch it: modelcache pull %s" % asked.repo)
    found.sort(key=lambda entry: (entry["repo_id"], entry["repo_type"], -entry["last_used"]))
    if not found:
        show.word("nothing is on this node yet")
        if not show.as_json:
            return OK
    heads = ["REPO", "TYPE", "REVISION", "COMMIT", "FILES", "SIZE", "USED", "LEASES"]
    rows = [_row(entry) for entry in found]
    if wanted is not None:
        heads.append("PATH")
        rows = [[*row, entry["path"]] for row, entry in zip(rows, found)]
    show.table({"repos": found}, heads, rows, ("FILES", "SIZE", "LEASES"))
    return OK


def _is_meant(entry: Dict[str, Any], wanted: Named, text: str) -> bool:
    is_type_said = text.partition("/")[0] in _PREFIXES
    return (not is_type_said or entry["repo_type"] == wanted.repo_type) and (
        wanted.revision is None or wanted.revision in entry["revisions"] or entry["commit"] == wanted.revision
    )


def _row(entry: Dict[str, Any]) -> List[str]:
    return [
        entry["repo_id"],
        entry["repo_type"],
        ", ".join(entry["revisions"]) or "-",
        entry["commit"][:8],
        str(entry["files"]),
        size(entry["size_bytes"]),
        ago(entry["last_used"]),
        str(entry["leases"]),
    ]


def ago(moment: float) -> str:
    passed = time.time() - moment
    return "%s ago" % seconds(passed) if passed >= 1 else "just now"


def rm(asked: argparse.Namespace, show: Show) -> int:
    if asked.repo is None:
        raise UsageError("which repo is to be removed is not said", "modelcache rm REPO; modelcache ls lists them")
    wanted = named(asked.repo, asked)
    request = Remove(wanted.repo_id, wanted.repo_type, wanted.revision, tokens.endpoint())
    removed = cli_daemon.client(asked, show).call("rm", request)
    show.data(removed, [])
    show.word("removed %s: %s, %s freed" % (wanted, count(len(removed["trees"]), "set") + " of files", size(removed["freed_bytes"])))
    return OK


def verify(asked: argparse.Namespace, show: Show) -> int:
    wanted = None if asked.repo is None else named(asked.repo, asked)
    if wanted is not None and wanted.revision is not None:
        raise UsageError("all revisions of a repo are verified together", "modelcache verify %s" % wanted.repo_id)
    request = Verify() if wanted is None else Verify(wanted.repo_id, wanted.repo_type)
    connected = cli_daemon.client(asked, show)
    with show.progress("verify") as reporter:
        said = connected.call("verify", request, reporter)
    if wanted is not None and not said["blobs"]:
        raise LocalEntryNotFoundError("nothing of %s is on this node" % str(wanted), "see what is: modelcache ls")
    damaged, missing = said["damaged"], said["missing"]
    show.data(said, [*("damaged  %s" % digest for digest in damaged), *("missing  %s" % digest for digest in missing)])
    found = "%d damaged, %d missing" % (len(damaged), len(missing)) if damaged or missing else "all as they should be"
    show.word("%s, %s: %s" % (count(said["blobs"], "blob"), size(said["size_bytes"]), found))
    if damaged or missing:
        show.word("hint: they are fetched again when next asked for: modelcache pull REPO")
        return DAMAGED
    return OK
