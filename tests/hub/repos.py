"""The repos: commits, references, listings, and who may see them.

Invariants: a commit never changes; its hash, and every folder's, is git's own over deterministic data (no clock), so the same
publications give the same hashes in every run; a refusal says what the real hub says (status, X-Error-Code, X-Error-Message).
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from .content import Blob

FIRST_COMMIT_TIME = 1_700_000_000  # commit n is n minutes later
_AUTHOR = "A Hub <hub@localhost>"


class Refused(Exception):
    """The hub says no."""

    def __init__(self, status: int, code: str | None, message: str, commit: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.commit = status, code, message, commit


class Moved(Exception):
    """The repo has a new name."""

    def __init__(self, repo_id: str) -> None:
        super().__init__(repo_id)
        self.repo_id = repo_id


class Commit:
    """One state of a repo. A hostile one lists its entries just as they were given, and nothing else."""

    def __init__(self, entries: list[tuple[str, Blob]], parent: Commit | None, title: str, number: int, hostile: bool) -> None:
        self.title = title
        self.parent: Commit | None = parent
        self.entries = entries
        self.time = FIRST_COMMIT_TIME + 60 * number
        self._by_path = dict(reversed(entries))  # of two with the same name the first
        self._rows = [blob.row(path) for path, blob in entries]
        self._folders: dict[str, list[dict[str, Any]]] = {}
        self._recursive: dict[str, list[dict[str, Any]]] = {}
        self._is_hostile = hostile
        tree = hashlib.sha1(repr(self._rows).encode()).hexdigest() if hostile else self._plant()
        lines = [f"tree {tree}", *([f"parent {parent.sha}"] if parent else [])]
        lines += [f"{who} {_AUTHOR} {self.time} +0000" for who in ("author", "committer")]
        text = ("\n".join(lines) + f"\n\n{title}\n").encode()
        self.sha: str = hashlib.sha1(b"commit %d\0" % len(text) + text).hexdigest()

    @property
    def date(self) -> str:
        return time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(self.time))

    def find(self, path: str) -> Blob | None:
        return self._by_path.get(path)

    def listing(self, folder: str, recursive: bool) -> list[dict[str, Any]] | None:
        """The rows of a folder as the tree API gives them, folders first; None: there is no such folder."""
        if self._is_hostile:
            return self._rows
        if folder not in self._folders:
            return None
        if not recursive:
            return self._folders[folder]
        if folder not in self._recursive:
            rows: list[dict[str, Any]] = []
            stack = list(reversed(self._folders[folder]))
            while stack:
                row = stack.pop()
                rows.append(row)
                if row["type"] == "directory":
                    stack.extend(reversed(self._folders[row["path"]]))
            self._recursive[folder] = rows
        return self._recursive[folder]

    def _plant(self) -> str:
        """Makes the folders and returns the root's id."""
        folders: dict[str, list[dict[str, Any]]] = {"": []}
        for row in self._rows:
            above = row["path"].rpartition("/")[0]
            folders.setdefault(above, []).append(row)
            while above and (above := above.rpartition("/")[0]) not in folders:
                folders[above] = []
        root = ""
        for path in sorted(folders, key=lambda path: (path.count("/") + 1 if path else 0, path), reverse=True):
            rows = folders[path]
            rows.sort(key=lambda row: (row["type"] == "file", row["path"]))
            root = _tree_id(rows)
            if path:
                folders[path.rpartition("/")[0]].append({"type": "directory", "oid": root, "size": 0, "path": path})
        self._folders = folders
        return root


def _tree_id(rows: Iterable[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        name = row["path"].rpartition("/")[2].encode()
        is_folder = row["type"] == "directory"
        lines.append((name + b"/" * is_folder, (b"40000 " if is_folder else b"100644 ") + name + b"\0" + bytes.fromhex(row["oid"])))
    text = b"".join(line for _, line in sorted(lines))
    return hashlib.sha1(b"tree %d\0" % len(text) + text).hexdigest()


@dataclass
class Repo:
    repo_id: str
    repo_type: str
    private: bool = False
    gated: bool = False
    tokens: set[str] = field(default_factory=set)  # who may see it when private, have its files when gated
    branches: dict[str, Commit] = field(default_factory=dict)
    tags: dict[str, Commit] = field(default_factory=dict)
    pulls: dict[str, Commit] = field(default_factory=dict)  # "refs/pr/1"
    commits: dict[str, Commit] = field(default_factory=dict)

    def find(self, revision: str) -> Commit:
        """By branch, tag, pull request, full or shortened hash."""
        plain = revision.removeprefix("refs/heads/").removeprefix("refs/tags/")
        for names in (self.branches, self.tags, self.pulls):
            if plain in names:
                return names[plain]
        if len(revision) >= 7:
            found = [commit for sha, commit in self.commits.items() if sha.startswith(revision)]
            if len(found) == 1:
                return found[0]
        raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")

    def publish(self, entries: list[tuple[str, Blob]], branch: str, title: str, hostile: bool) -> Commit:
        names = self.pulls if branch.startswith("refs/pr/") else self.branches
        parent = names.get(branch) or self.branches.get("main")
        names[branch] = made = Commit(entries, parent, title, len(self.commits), hostile)
        self.commits[made.sha] = made
        return made


class Catalogue:
    """All repos, and all tokens the hub knows."""

    def __init__(self) -> None:
        self.users: set[str] = set()
        self._repos: dict[tuple[str, str], Repo] = {}
        self._renamed: dict[tuple[str, str], str] = {}

    def has(self, repo_type: str, repo_id: str) -> bool:
        return (repo_type, repo_id) in self._repos or (repo_type, repo_id) in self._renamed

    def get(self, repo_type: str, repo_id: str) -> Repo:
        return self._repos[repo_type, repo_id]

    def create(self, repo_type: str, repo_id: str) -> Repo:
        return self._repos.setdefault((repo_type, repo_id), Repo(repo_id, repo_type))

    def delete(self, repo_type: str, repo_id: str) -> None:
        del self._repos[repo_type, repo_id]

    def rename(self, repo_type: str, old: str, new: str) -> None:
        repo = self._repos.pop((repo_type, old))
        repo.repo_id = new
        self._repos[repo_type, new] = repo
        self._renamed[repo_type, old] = new

    def check_token(self, token: str | None) -> None:
        if token is not None and token not in self.users:
            raise Refused(401, None, "Invalid credentials in Authorization header")

    def open(self, repo_type: str, repo_id: str, token: str | None, content: bool) -> Repo:
        """The repo, if this token may see it; with `content`, if it may have its files too."""
        repo = self._repos.get((repo_type, repo_id))
        if repo is None and (repo_type, repo_id) in self._renamed:
            raise Moved(self._renamed[repo_type, repo_id])
        if repo is None or (repo.private and token not in repo.tokens):
            if token is None:  # who isn't logged in does not learn what exists
                raise Refused(401, "RepoNotFound", "Invalid username or password.")
            raise Refused(404, "RepoNotFound", "Repository not found")
        if content and repo.gated and token not in repo.tokens:
            start = f"Access to {repo_type} {repo_id} is restricted"
            if token is None:
                raise Refused(401, "GatedRepo", f"{start}. You must have access to it and be authenticated to access it. Please log in.")
            raise Refused(403, "GatedRepo", f"{start} and you are not in the authorized list. Visit its page to ask for access.")
        return repo
