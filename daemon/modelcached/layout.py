"""Where everything lies below the root: the only place that computes a path. The folder list is the design.

VERSION  lock
blobs/sha256/ab/<sha256>[.x]     complete, verified, read-only (I1)
partial/<name>[.map]             resumable downloads and what of them counts
trees/<tree>.json                trees; mtime is the last use
views/<tree>/...                 exactly a tree's files (I2)
repos/<endpoint>/<type>--<id>/   visibility.json  admitted  oids  refs/<revision>  shown/<tree>  <commit>.json  imported/<commit>.json
legacy/<artifact>.json           which tree an artifact of metaflow-checkpoint turned out to be
leases/<tree>/<id>               one file per lease, flocked by its holder (I4)
pins/<uid>-<name>.json           named wishes to keep trees (I4)
quarantine/                      blobs that lied (I10)
scrubbed                         how far the running round of the scrub is
tmp/                             emptied at start
"""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from urllib.parse import quote

from .model import Commit, Content, Digest, Repo, TreeId

FORMAT_VERSION = 1
PUBLIC_FOLDERS = {"views": 0o711}  # names in it are not listed to others; the rest is the daemon's own
PRIVATE_FOLDERS = (
    *("blobs", "blobs/sha256", "partial", "trees", "repos", "legacy", "leases", "pins"),
    *("quarantine", "spool", "spool/corrupt", "store", "tmp"),
)


@dataclass(frozen=True)
class Layout:
    root: Path

    @cached_property
    def version(self) -> Path:
        return self.root / "VERSION"

    @cached_property
    def first_start(self) -> Path:
        return self.root / "max_size"

    @cached_property
    def lock(self) -> Path:
        return self.root / "lock"

    @cached_property
    def blobs(self) -> Path:
        return self.root / "blobs" / "sha256"

    @cached_property
    def partials(self) -> Path:
        return self.root / "partial"

    @cached_property
    def trees(self) -> Path:
        return self.root / "trees"

    @cached_property
    def views(self) -> Path:
        return self.root / "views"

    @cached_property
    def repos(self) -> Path:
        return self.root / "repos"

    def legacy(self, store_url: str, key: str) -> Path:
        return self.root / "legacy" / f"{hashlib.sha256(f'{store_url} {key}'.encode()).hexdigest()}.json"

    @cached_property
    def leases(self) -> Path:
        return self.root / "leases"

    @cached_property
    def pins(self) -> Path:
        return self.root / "pins"

    def pin(self, uid: int, name: str) -> Path:
        """Names of one uid are its own; one in another script may be too long for a file's."""
        quoted = quote(name, safe="")
        return self.pins / f"{uid}-{quoted if len(quoted) <= 200 else hashlib.sha256(name.encode()).hexdigest()}.json"

    @cached_property
    def scrubbed(self) -> Path:
        """How far the running round of the scrub is."""
        return self.root / "scrubbed"

    @cached_property
    def quarantine(self) -> Path:
        return self.root / "quarantine"

    @cached_property
    def spool(self) -> Path:
        return self.root / "spool"

    @cached_property
    def corrupt(self) -> Path:
        return self.spool / "corrupt"

    def spool_entry(self, name: str) -> Path:
        return self.spool / name

    @cached_property
    def tmp(self) -> Path:
        return self.root / "tmp"

    def shards(self) -> list[Path]:
        return [self.blobs / f"{shard:02x}" for shard in range(256)]

    def blob(self, digest: Digest, executable: bool = False) -> Path:
        return self.blobs / digest[:2] / (f"{digest}.x" if executable else digest)

    def partial(self, content: Content) -> Path:
        if content.algorithm == "sha256":
            return self.partials / content.hex
        if content.algorithm == "object":
            return self.partials / f"object-{content.hex}"
        scope = hashlib.sha256(content.scope.encode()).hexdigest()[:16]
        return self.partials / f"git-{scope}-{content.hex}"

    def tree(self, tree: TreeId) -> Path:
        return self.trees / f"{tree}.json"

    def view(self, tree: TreeId) -> Path:
        return _joined(self.views, tree)  # several times in every call, however warm

    def repo(self, repo: Repo) -> Path:
        return self.repos / repo_folder(repo)

    def visibility(self, repo: Repo) -> Path:
        return self.repo(repo) / "visibility.json"

    def admitted(self, repo: Repo) -> Path:
        return self.repo(repo) / "admitted"

    def oids(self, repo: Repo) -> Path:
        return self.repo(repo) / "oids"

    def ref(self, repo: Repo, revision: str) -> Path:
        return self.repo(repo) / "refs" / quote(revision, safe="")

    def listing(self, repo: Repo, commit: Commit) -> Path:
        return self.repo(repo) / f"{commit}.json"

    def imported(self, repo: Repo, commit: Commit) -> Path:
        return self.repo(repo) / "imported" / f"{commit}.json"

    def shown(self, repo: Repo, tree: TreeId) -> Path:
        return self.repo(repo) / "shown" / tree

    def lease_folder(self, tree: TreeId) -> Path:
        return self.leases / tree

    def fresh(self, purpose: str) -> Path:
        """A name in tmp/ that nobody else uses."""
        return self.tmp / f"{purpose}-{secrets.token_hex(8)}"


def repo_folder(repo: Repo) -> str:
    """What is known of a repo lies in a folder of this name, on disk and in stores."""
    scheme, _, rest = repo.endpoint.partition("://")
    return f"{quote(scheme, safe='')}+{quote(rest, safe=':')}/{repo.type}--{repo.id.replace('/', '--')}"


@lru_cache(4096)
def _joined(folder: Path, name: str) -> Path:
    return folder / name
