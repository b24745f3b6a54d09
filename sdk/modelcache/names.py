"""What a repo, a revision and a file in it may be called: huggingface_hub's rules, checked before anybody is asked."""

from __future__ import annotations

import re
from typing import Iterable, List, Optional, Union

from .errors import HFValidationError

DEFAULT_REVISION = "main"
REPO_TYPES = ("model", "dataset", "space")

_REPO_ID = re.compile(r"(\b[\w\-.]{1,96}\b/)?\b[\w\-.]{1,96}\b", re.ASCII)


def check_repo_id(repo_id: str) -> None:
    """HFValidationError (a ValueError) unless `repo_id` is "name" or "org/name" as the hub allows it."""
    if not isinstance(repo_id, str):
        raise HFValidationError("Repo id must be a string, not %s: '%s'." % (type(repo_id), repo_id))
    if repo_id.count("/") > 1:
        raise HFValidationError(
            "Repo id must be in the form 'repo_name' or 'namespace/repo_name': '%s'. Use `repo_type` argument if needed." % repo_id
        )
    if not _REPO_ID.fullmatch(repo_id):
        raise HFValidationError(
            "Repo id must use alphanumeric chars, '-', '_' or '.'. The name cannot start or end with '-' or '.' and the maximum length "
            "is 96: '%s'." % repo_id
        )
    if "--" in repo_id or ".." in repo_id:
        raise HFValidationError("Cannot have -- or .. in repo_id: '%s'." % repo_id)
    if repo_id.endswith(".git"):
        raise HFValidationError("Repo_id cannot end by '.git': '%s'." % repo_id)


def repo_type_of(repo_type: Optional[str]) -> str:
    """None means a model; what the hub has no files for in this protocol is a ValueError."""
    if repo_type is None:
        return "model"
    if repo_type == "kernel":
        raise ValueError("Invalid repo type: kernel. Kernels are not cached here; use huggingface_hub for them")
    if repo_type not in REPO_TYPES:
        raise ValueError("Invalid repo type: %s. Accepted repo types are: %s" % (repo_type, [None, *REPO_TYPES]))
    return repo_type


def revision_of(revision: Optional[str]) -> str:
    """None means main; a revision that was resolved before (huggingface_hub's ResolvedRevision) means its commit."""
    if revision is None:
        return DEFAULT_REVISION
    return str(getattr(revision, "resolved", revision))


def patterns_of(patterns: Union[Iterable[str], str, None]) -> Optional[List[str]]:
    if patterns is None or isinstance(patterns, str):
        return None if patterns is None else [patterns]
    return [str(pattern) for pattern in patterns]


def filename_of(filename: str, subfolder: Optional[str]) -> str:
    """The file's path in the repo. ValueError for one that would leave the folder it is put into."""
    name = "%s/%s" % (subfolder, filename) if subfolder else filename
    if ".." in name.replace("\\", "/").split("/"):
        raise ValueError("Invalid filename '%s': cannot contain a '..' path segment." % name)
    if not name or name.startswith("/") or any(re.match(r"\\|.:", part, re.DOTALL) for part in name.split("/")):
        raise ValueError("Invalid filename '%s': cannot be an absolute, drive-relative or UNC path." % name)
    return name


def cache_folder_name(repo_id: str, repo_type: str) -> str:
    """A repo's folder in huggingface_hub's cache: "models--org--name"."""
    return "--".join(["%ss" % repo_type, *repo_id.split("/")])
