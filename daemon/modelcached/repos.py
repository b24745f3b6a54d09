"""What the hub said about repos, and when: commits of revisions, listings, visibility, and which git id is which SHA-256.

All of it can be asked again, so it is written without syncs and believed only if it parses; nothing here proves anything
about bytes. The git ids hold inside their own repo only (I10).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
import zlib
from collections.abc import Iterator, Mapping
from urllib.parse import unquote

import msgspec

from . import durable
from .layout import Layout
from .model import Caller, Commit, Content, Digest, ListedFile, Listing, Repo, TreeId, check_paths, is_commit, is_owner, listing_json
from .recent import Recent


class Ref(msgspec.Struct, frozen=True):
    """What a branch or tag pointed to, and when the hub said so (seconds since the epoch)."""

    commit: str
    checked: float

    def age(self) -> float:
        """Seconds since the hub said so; infinite if that lies in the future, for then some clock was wrong."""
        age = time.time() - self.checked
        return age if age >= 0 else float("inf")


class Visibility(msgspec.Struct, frozen=True):
    """Who may have a repo. `id` and `endpoint` name it, for the folder's name is not always unique to read back."""

    private: bool
    gated: bool
    checked: float
    endpoint: str
    type: str
    id: str

    @property
    def is_public(self) -> bool:
        return not (self.private or self.gated)


class Selected(msgspec.Struct, frozen=True):
    """Which files of a commit a tree shows: as they were asked for."""

    commit: str
    allow: tuple[str, ...] | None
    ignore: tuple[str, ...] | None
    filename: str | None


ref_json = msgspec.json.Decoder(Ref)
visibility_json = msgspec.json.Decoder(Visibility)
_admitted_json = msgspec.json.Decoder(set[int])
_selected_json = msgspec.json.Decoder(Selected)


class Repos:
    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._refs: Recent[tuple[Repo, str], Ref] = Recent(4096)
        self._visibility: Recent[Repo, Visibility] = Recent(4096)
        self._admitted: Recent[Repo, set[int]] = Recent(4096)
        self._listings: Recent[tuple[Repo, Commit], Listing] = Recent(50_000, lambda listing: len(listing.files))  # about 15 MB
        self._oids: Recent[Repo, dict[str, Digest]] = Recent(8)

    def ref(self, repo: Repo, revision: str) -> Ref | None:
        known = self._refs.get((repo, revision))
        if known is None:
            with contextlib.suppress(OSError, msgspec.MsgspecError):
                read = ref_json.decode(self._layout.ref(repo, revision).read_bytes())
                known = self._refs.put((repo, revision), read) if is_commit(read.commit) else None
        return known

    def set_ref(self, repo: Repo, revision: str, commit: Commit, checked: float | None = None) -> None:
        """`checked`: when the hub said so, if it was not now."""
        ref = self._refs.put((repo, revision), Ref(commit, time.time() if checked is None else checked))
        path = self._layout.ref(repo, revision)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        durable.record(path, msgspec.json.encode(ref), self._layout.fresh("ref"))

    def visibility(self, repo: Repo) -> Visibility | None:
        known = self._visibility.get(repo)
        if known is None:
            with contextlib.suppress(OSError, msgspec.MsgspecError):
                known = visibility_json.decode(self._layout.visibility(repo).read_bytes())
                self._visibility.put(repo, known)
        return known

    def set_visibility(self, repo: Repo, private: bool, gated: bool, checked: float | None = None) -> Visibility:
        """`checked`: when the hub said so, if it was not now; 0 if nobody knows."""
        seen = self._visibility.put(repo, Visibility(private, gated, time.time() if checked is None else checked, *repo))
        path = self._layout.visibility(repo)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        durable.record(path, msgspec.json.encode(seen), self._layout.fresh("visibility"))
        return seen

    def admitted(self, repo: Repo) -> set[int]:
        """The uids that have been given something of a private or gated repo: to others it is not even listed (I8)."""
        known = self._admitted.get(repo)
        if known is None:
            known = set()
            with contextlib.suppress(OSError, msgspec.MsgspecError):
                known = _admitted_json.decode(self._layout.admitted(repo).read_bytes())
            self._admitted.put(repo, known)
        return known

    def may_know(self, repo: Repo, caller: Caller) -> bool:
        """Whether the caller may be told that something of this repo is here (I8)."""
        seen = self.visibility(repo)
        return is_owner(caller) or (seen is not None and seen.is_public) or caller.uid in self.admitted(repo)

    def note_admitted(self, repo: Repo, uid: int) -> None:
        known = self.admitted(repo)
        if uid not in known:
            known.add(uid)
            durable.record(self._layout.admitted(repo), msgspec.json.encode(sorted(known)), self._layout.fresh("admitted"))

    def has_listing(self, repo: Repo, commit: Commit) -> bool:
        return self._listings.get((repo, commit)) is not None or self._layout.listing(repo, commit).exists()

    def listing(self, repo: Repo, commit: Commit) -> Listing | None:
        """All files of a commit (blocks when it is not in memory)."""
        known = self._listings.get((repo, commit))
        if known is None:
            try:
                known = listing_json.decode(self._layout.listing(repo, commit).read_bytes())
                if known.commit != commit:
                    return None
                check_paths([file.path for file in known.files], str(repo))
            except (OSError, msgspec.MsgspecError):
                return None
            self._listings.put((repo, commit), known)
        return known

    def set_listing(self, repo: Repo, listing: Listing) -> None:
        """Keeps a listing (blocks)."""
        commit = Commit(listing.commit)
        path = self._layout.listing(repo, commit)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        durable.record(path, msgspec.json.encode(listing), self._layout.fresh("listing"))
        self._listings.put((repo, commit), listing)

    def set_imported(self, repo: Repo, listing: Listing) -> None:
        """Keeps what another cache had of a commit's files: perhaps not all of them (blocks)."""
        path = self._layout.imported(repo, Commit(listing.commit))
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        durable.record(path, msgspec.json.encode(listing), self._layout.fresh("listing"))

    def imported(self, repo: Repo, commit: Commit) -> Listing | None:
        """That, for when the hub can't be asked (blocks)."""
        with contextlib.suppress(OSError, msgspec.MsgspecError):
            known = listing_json.decode(self._layout.imported(repo, commit).read_bytes())
            check_paths([file.path for file in known.files], str(repo))
            return known if known.commit == commit else None
        return None

    def has_imported(self, repo: Repo, commit: Commit) -> bool:
        return self._layout.imported(repo, commit).exists()

    def open_listing(self, repo: Repo, commit: Commit) -> int:
        """A descriptor of the listing's JSON, for a caller; whoever gets it owns it."""
        path = self._layout.listing(repo, commit)
        if not path.exists():
            path = self._layout.imported(repo, commit)
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def content(self, repo: Repo, file: ListedFile) -> Content:
        """What is known of a listed file's bytes before they are here."""
        if file.sha256 is not None:
            return Content("sha256", file.sha256, file.size)
        return Content("git-sha1", file.oid, file.size, str(self._layout.repo(repo)))

    def digest(self, repo: Repo, file: ListedFile) -> Digest | None:
        """The SHA-256 of a listed file: from the listing, else from an earlier download of the same git id in this repo."""
        return Digest(file.sha256) if file.sha256 is not None else self.digest_of(repo, file.oid)

    def digest_of(self, repo: Repo, oid: str) -> Digest | None:
        """What a git id of this repo turned out to be."""
        return self._oids_of(repo).get(oid)

    def set_digest(self, repo: Repo, oid: str, digest: Digest) -> None:
        """Remembers what a git id turned out to be."""
        self.set_digests(repo, {oid: digest})

    def set_digests(self, repo: Repo, found: Mapping[str, Digest]) -> None:
        """The same for several; each is a line of the log `oids`."""
        known = self._oids_of(repo)
        news = {oid: digest for oid, digest in found.items() if known.get(oid) != digest}
        if not news:
            return
        known.update(news)
        lines = (f"{oid} {digest}".encode() for oid, digest in news.items())
        with open(self._layout.oids(repo), "ab", buffering=0) as log:
            # The newline first: a torn line does not swallow the next one.
            log.write(b"".join(b"\n%s %08x" % (line, zlib.crc32(line)) for line in lines))

    def set_shown(self, repo: Repo, tree: TreeId, selected: Selected) -> None:
        """Remembers that this tree shows files of this repo."""
        path = self._layout.shown(repo, tree)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        durable.record(path, msgspec.json.encode(selected), self._layout.fresh("shown"))

    def shown(self, repo: Repo) -> dict[TreeId, Selected]:
        """Every tree that shows files of this repo (blocks)."""
        found = {}
        for path in sorted(self._layout.shown(repo, TreeId("")).glob("*")):
            with contextlib.suppress(OSError, msgspec.MsgspecError):
                found[TreeId(path.name)] = _selected_json.decode(path.read_bytes())
        return found

    def forget_shown(self, repo: Repo, tree: TreeId) -> None:
        self._layout.shown(repo, tree).unlink(missing_ok=True)

    def forget(self, repo: Repo, revision: str | None = None) -> None:
        """Drops what is known of the repo, or of one revision."""
        if revision is None:
            shutil.rmtree(self._layout.repo(repo), ignore_errors=True)
        else:
            self._layout.ref(repo, revision).unlink(missing_ok=True)
        for memory in (self._refs, self._visibility, self._admitted, self._listings, self._oids):
            memory.clear()

    def known(self) -> Iterator[tuple[Repo, Visibility]]:
        """Every repo this node has heard of (blocks)."""
        for path in sorted(self._layout.repos.glob("*/*/visibility.json")):
            with contextlib.suppress(OSError, msgspec.MsgspecError):
                seen = visibility_json.decode(path.read_bytes())
                yield Repo(seen.endpoint, seen.type, seen.id), seen

    def refs(self, repo: Repo) -> dict[str, Ref]:
        """Every revision of the repo that was asked for by name."""
        found = {}
        folder = self._layout.repo(repo) / "refs"
        if folder.is_dir():
            for path in sorted(folder.iterdir()):
                revision = unquote(path.name)
                ref = self.ref(repo, revision)
                if ref is not None:
                    found[revision] = ref
        return found

    def commits(self, repo: Repo) -> list[Commit]:
        """Every commit of the repo whose listing is here."""
        names = (path.stem for path in self._layout.repo(repo).glob("*.json"))
        return [Commit(name) for name in names if is_commit(name)]

    def _oids_of(self, repo: Repo) -> dict[str, Digest]:
        known = self._oids.get(repo)
        if known is None:
            known = self._oids.put(repo, dict(_read_oids(self._layout.oids(repo).read_bytes()) if self._layout.oids(repo).exists() else ()))
        return known


def _read_oids(raw: bytes) -> Iterator[tuple[str, Digest]]:
    """The log's lines that are whole; the last one may be torn."""
    for line in raw.split(b"\n"):
        said, _, crc = line.rpartition(b" ")
        with contextlib.suppress(ValueError):
            if zlib.crc32(said) == int(crc, 16):
                oid, digest = said.decode().split(" ")
                yield oid, Digest(digest)
