"""Import: takes over what huggingface_hub's own cache has, without the network: bytes from descriptors, and what a commit's files are.

Only owners may (I8), for nobody but them says here what is a commit's. The bytes are checked against their names, which are the hub's: a
SHA-256, or a git id. A listing that huggingface_hub kept is whole; one made up from the files that are there is not, and counts only
when the hub can't be asked (`Repos.imported`).

A file is a reflink where the filesystem can, else a copy, and never a second name, not even for a file of the daemon's own: the other
cache could be written through it (I1), would see its mode and times change, and would keep an eviction from freeing anything.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec

from modelcache.takeover import ImportCommit, ImportCommitReply, ImportFiles, ImportFilesReply

from . import capture
from .blobs import HASH_BYTES, Blobs
from .config import Config
from .errors import InvalidRequest, disk_errors
from .holds import Hand, Holds, Lingering
from .lanes import Lanes
from .layout import Layout
from .meter import Report
from .model import (
    Caller,
    Commit,
    Content,
    Digest,
    Listing,
    Reply,
    Repo,
    Tree,
    TreeFile,
    check_paths,
    check_repo,
    check_revision,
    is_commit,
    is_digest,
    listing_json,
    require_owner,
)
from .repos import Repos, Selected
from .room import Room
from .tasks import Pool, each
from .trees import Trees

COPIES_AT_ONCE = 4
MAX_LISTING_BYTES = 64 << 20
MAX_REFS = 10_000
IDLE_SECONDS = 600.0  # an import that brings nothing for so long has ended: what no commit shows is anybody's leftover then
log = logging.getLogger(__name__)

Verb = Callable[[Any, Caller, Report, tuple[int, ...]], Awaitable[Reply]]


class Importing:
    def __init__(
        self, config: Config, layout: Layout, blobs: Blobs, trees: Trees, repos: Repos, pool: Pool, lanes: Lanes, room: Room, holds: Holds
    ) -> None:
        self._config = config
        self._layout = layout
        self._blobs = blobs
        self._trees = trees
        self._repos = repos
        self._pool = pool
        self._lanes = lanes
        self._room = room
        self._holds = holds
        self._handed = Lingering(holds, IDLE_SECONDS)  # by repo: what was handed over, and no commit shows yet
        self._copies = asyncio.Semaphore(COPIES_AT_ONCE)
        self.verbs: dict[str, tuple[type, Verb]] = {
            "import_files": (ImportFiles, self._files),
            "import_commit": (ImportCommit, self._commit),
        }
        self.taking = frozenset(self.verbs)

    async def _files(self, params: ImportFiles, caller: Caller, report: Report, descriptors: tuple[int, ...]) -> Reply:
        repo = self._repo(params, caller)
        if len(descriptors) != len(params.files):
            raise InvalidRequest(f"{len(params.files)} files came with {len(descriptors)} descriptors", "one for each")
        if not all(size >= 0 and (is_digest(name) or is_commit(name)) for name, size in params.files):
            raise InvalidRequest("a file's name is no SHA-256 and no git id", "name them as huggingface_hub's cache does")
        taken: list[int] = []
        refused: list[int] = []

        async def take(position: int) -> None:
            name, size = params.files[position]
            digest = await self._pool.run(self._here, repo, name, size)
            if digest is not None:
                hand.add([digest])
                if self._blobs.has(digest, size):  # still, now that nobody takes it away
                    return
            (taken if await self._take(repo, name, size, descriptors[position], caller, hand) else refused).append(position)

        with self._handed.hand(repo) as hand, disk_errors("importing files"):
            await each(range(len(descriptors)), take, COPIES_AT_ONCE)
        return Reply(ImportFilesReply(sorted(taken), sorted(refused)))

    async def _commit(self, params: ImportCommit, caller: Caller, report: Report, descriptors: tuple[int, ...]) -> Reply:
        repo = self._repo(params, caller)
        if len(descriptors) != 1 or len(params.refs) > MAX_REFS:
            raise InvalidRequest("a commit comes with one descriptor, its listing, and a bounded number of names")
        listing = await self._pool.run(_read_listing, descriptors[0], repo)
        for revision, _ in params.refs:
            check_revision(revision)
        with self._handed.hand(repo):
            reply = await self._take_over(repo, listing, params)
        self._handed.let_go(repo)
        return reply

    async def _take_over(self, repo: Repo, listing: Listing, params: ImportCommit) -> Reply:
        seen = await self._pool.run(self._all_here, repo, listing)
        with self._holds.hand(*seen.values()), disk_errors(f"importing {repo}"):
            here = await self._pool.run(self._all_here, repo, listing)  # once more, now that nobody takes them away
            here = {path: digest for path, digest in here.items() if path in seen}
            missing = [file.path for file in listing.files if file.path not in here]
            await self._pool.run(self._note, repo, listing, params)
            if not here:
                return Reply(ImportCommitReply("", 0, 0, missing))
            tree = Tree(tuple(TreeFile(file.path, file.size, here[file.path]) for file in listing.files if file.path in here))
            paths = tuple(here) if missing or not params.is_whole else None
            name = await self._pool.run(self._show, repo, tree, Selected(listing.commit, paths, None, None))
        counts = {"files": len(here), "bytes": tree.size, "missing": len(missing)}
        log.info("imported", extra={"repo": str(repo), "commit": listing.commit, **counts})
        return Reply(ImportCommitReply(name, len(here), tree.size, missing))

    def _repo(self, params: ImportFiles | ImportCommit, caller: Caller) -> Repo:
        require_owner(caller, "import")
        return check_repo(self._config.endpoint(params.endpoint), params.repo_type, params.repo_id)

    def _here(self, repo: Repo, name: str, size: int) -> Digest | None:
        digest = Digest(name) if is_digest(name) else self._repos.digest_of(repo, name)
        return digest if digest is not None and self._blobs.has(digest, size) else None

    def _all_here(self, repo: Repo, listing: Listing) -> dict[str, Digest]:
        found = {file.path: self._here(repo, file.sha256 or file.oid, file.size) for file in listing.files}
        return {path: digest for path, digest in found.items() if digest is not None}

    async def _take(self, repo: Repo, name: str, size: int, descriptor: int, caller: Caller, hand: Hand) -> bool:
        """One file becomes a blob. False: its bytes are not what its name says, or it changes."""
        target = self._layout.fresh("import")

        async def work() -> bool:
            own = os.dup(descriptor)  # a copy that hangs outlives the request, and its descriptors
            return await self._lanes.run(
                caller.uid, self._copies, lambda beat: capture.capture(own, name, size, target, beat), lambda: os.close(own)
            )

        content = Content("sha256" if is_digest(name) else "git-sha1", name, size, str(self._layout.repo(repo)))
        try:
            if not await self._room.run({content: lambda: size}, f"the import of {repo}", work):
                return False
            digest = await self._pool.run(_digest_if_right, target, name, size)
            if digest is None:
                return False
            hand.add([digest])
            await self._blobs.adopt(target, digest)
            if not is_digest(name):
                self._layout.repo(repo).mkdir(mode=0o700, parents=True, exist_ok=True)
                self._repos.set_digest(repo, name, digest)
            return True
        finally:
            with contextlib.suppress(OSError):
                target.unlink(missing_ok=True)

    def _note(self, repo: Repo, listing: Listing, params: ImportCommit) -> None:
        """What the hub is known to have said. Whether the repo is public is not among it, unless an owner says so (I8)."""
        if self._repos.visibility(repo) is None:
            self._repos.set_visibility(repo, private=not (params.public or self._config.private), gated=False, checked=0.0)
        if params.is_whole:
            self._repos.set_listing(repo, listing)
        else:
            self._repos.set_imported(repo, msgspec.structs.replace(listing, is_whole=False))
        for revision, checked in params.refs:
            if self._repos.ref(repo, revision) is None:
                self._repos.set_ref(repo, revision, Commit(listing.commit), checked)

    def _show(self, repo: Repo, tree: Tree, selected: Selected) -> str:
        name = self._trees.save(tree)
        self._trees.mend(name, tree)
        self._repos.set_shown(repo, name, selected)
        return name


def _read_listing(descriptor: int, repo: Repo) -> Listing:
    """What a client says are a commit's files, every name checked (I9)."""
    size = capture.look(descriptor, "the listing").size
    if size > MAX_LISTING_BYTES:
        raise InvalidRequest(f"a listing of {size} bytes is too long", f"at most {MAX_LISTING_BYTES >> 20} MiB")
    try:
        listing = listing_json.decode(os.pread(descriptor, size, 0))
    except msgspec.MsgspecError as error:
        raise InvalidRequest(f"the listing makes no sense: {error}", "is it huggingface_hub's?") from None
    check_paths([file.path for file in listing.files], str(repo))
    is_sound = all(file.size >= 0 and is_commit(file.oid) and is_digest(file.sha256 or "0" * 64) for file in listing.files)
    if not is_commit(listing.commit) or not is_sound:
        raise InvalidRequest("the listing has a file or a commit without a sound id", "is it huggingface_hub's?")
    return Listing(listing.commit, tuple(sorted(listing.files, key=lambda file: file.path)))


def _digest_if_right(path: Path, name: str, size: int) -> Digest | None:
    """A file's SHA-256 if its bytes are what its name says (blocks)."""
    sha256, sha1 = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(HASH_BYTES):
            sha256.update(chunk)
            if is_commit(name):
                sha1.update(chunk)
    return Digest(sha256.hexdigest()) if name in (sha256.hexdigest(), sha1.hexdigest()) else None
