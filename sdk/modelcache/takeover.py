"""The part of the wire that `modelcache import` speaks. As in `protocol`, both sides import it, and fields are only ever appended."""

# No `from __future__ import annotations`, as in protocol.py.
from typing import List, NamedTuple, Optional, Tuple


class ImportFiles(NamedTuple):
    """Hands over files that another cache has of a repo, one descriptor each, read-only (method `import_files`). Owners only.

    Reply: ImportFilesReply.
    """

    repo_id: str
    files: List[Tuple[str, int]]  # what the hub calls the bytes, a SHA-256 or a git id, and their size
    repo_type: str = "model"
    endpoint: Optional[str] = None


class ImportFilesReply(NamedTuple):
    taken: List[int]  # positions; what is in neither list was here already
    refused: List[int]  # their bytes are not what their name says


class ImportCommit(NamedTuple):
    """Says which files a commit has (method `import_commit`). One descriptor, a file that holds a listing as in FetchReply. Owners only.

    Reply: ImportCommitReply. Nobody is asked for it but the hub, as soon as it can be.
    """

    repo_id: str
    refs: List[Tuple[str, float]]  # names that led to the commit, and when (seconds since the epoch)
    is_whole: bool  # the listing has every file of the commit
    repo_type: str = "model"
    endpoint: Optional[str] = None
    public: bool = False  # everybody on this node may have it, though the hub was not asked


class ImportCommitReply(NamedTuple):
    tree: str  # empty: none of its files is here
    files: int
    size_bytes: int
    missing: List[str]  # paths
