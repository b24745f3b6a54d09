"""What a node knows of a repo, and asks of the hub when it must: one question at a time per thing asked.

A branch is looked up again when the last answer is older than `fresh_seconds`; a full commit hash is never looked up once
its listing is here. A private or gated repo is for callers whose own token the hub accepted, on a hit too (I8): the verdict
is kept in memory for `verdict_seconds`, under a hash of the token, and when the hub is away a kept verdict counts and none means no. A
repo that was public is looked at again every hour while it is asked for by commit, so that one which was closed does not stay open.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from .errors import ContentMismatch, GatedRepo, HubProblem, HubUnavailable, LocalEntryNotFound, RepoNotFound, ShuttingDown, TokenRefused
from .exchange import Exchange
from .hub import Answer, Hub
from .hubtoken import HubToken
from .model import Commit, Listing, Repo, is_commit
from .recent import Recent
from .repos import Ref, Repos, Visibility
from .singleflight import Flight, Flights
from .tasks import Pool, behind

Warn = Callable[[str], None]
T = TypeVar("T")
PUBLIC_SECONDS = 3600.0  # a repo that was public is looked at again at least so often, while somebody asks for it by commit
log = logging.getLogger(__name__)


class Lookup:
    def __init__(
        self,
        repos: Repos,
        hub: Hub,
        pool: Pool,
        group: asyncio.TaskGroup,
        callers: asyncio.TaskGroup,
        fresh_seconds: float,
        verdict_seconds: float,
        offline: bool,
        exchange: Exchange | None = None,
        own_token: HubToken | None = None,
    ) -> None:
        self._repos = repos
        self._hub = hub
        self._pool = pool
        self._fresh_seconds = fresh_seconds
        self._verdict_seconds = verdict_seconds
        self._offline = offline
        self._exchange = exchange
        self._own_token = own_token or HubToken("", "")
        self._callers = callers
        self._answers: Flights[tuple[Repo, str, str | None], Flight[Answer], Answer] = Flights(group)
        self._listings: Flights[tuple[Repo, Commit, str | None], Flight[Listing], Listing] = Flights(group)
        self._accesses: Flights[tuple[Repo, str | None], Flight[None], None] = Flights(group)
        self._verdicts: Recent[bytes, float] = Recent(65_536)  # monotonic time of the hub's yes
        self._looked_again: Recent[Repo, float] = Recent(4096)  # monotonic
        self._salt = secrets.token_bytes(16)

    async def commit(self, repo: Repo, revision: str, token: str | None, warn: Warn, force: bool = False, local: bool = False) -> Commit:
        """The commit that `revision` means for this caller now."""
        is_known = self._repos.visibility(repo) is not None  # else nobody can be permitted anything before the hub was asked
        if is_known and is_commit(revision) and self._repos.has_listing(repo, Commit(revision)):
            return Commit(revision)
        known = self._repos.ref(repo, revision) if is_known else None
        if known is not None and not force and known.age() < self._fresh_seconds:
            return Commit(known.commit)
        if local or self._offline:
            known = known or self._imported(repo, revision) or (None if local else await self._remembered(repo, revision))
            if known is None:
                raise not_here(repo, revision)
            return Commit(known.commit)
        try:
            answer = await self._look_up(repo, revision, token, attempts=None if known is None else 1)
        except HubUnavailable as error:
            known = known or self._imported(repo, revision) or await self._remembered(repo, revision)
            if known is None:
                raise
            warn(f"{error.message}; using {repo}@{revision} as of {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(known.checked))}")
            return Commit(known.commit)
        return answer.commit

    async def permit(self, repo: Repo, revision: str, token: str | None, local: bool = False) -> bool:
        """Returns whether the repo is private or gated, for a caller who may have it; raises for one who may not (I8)."""
        seen = self._repos.visibility(repo)
        if seen is None:
            raise not_here(repo, revision)
        if seen.is_public:
            if is_commit(revision) and not local and not self._offline:
                self._look_again(repo, revision, token, seen)
            return False
        said = self._verdicts.get(self._verdict_key(repo, token))
        if said is not None and time.monotonic() - said < self._verdict_seconds:
            return True
        if local or self._offline:
            raise not_here(repo, revision)
        await self._accesses.join((repo, token), lambda: Flight(lambda: self._hub.check_access(repo, token)))
        self._accept(repo, token)
        return True

    async def listing(self, repo: Repo, commit: Commit, token: str | None, local: bool = False) -> Listing:
        """All files of a commit."""
        known = await self._pool.run(self._repos.listing, repo, commit)
        if known is not None:
            return known
        if self._exchange is not None and not local:
            with self._exchange.suppressed():
                known = await self._exchange.answered(self._exchange.records.listing(repo, commit))
                if known is not None:
                    await self._pool.run(self._repos.set_listing, repo, known)
                    return known
        if local or self._offline:
            imported = await self._pool.run(self._repos.imported, repo, commit)
            if imported is None:
                raise not_here(repo, commit)
            return imported
        try:
            return await self._listings.join((repo, commit, token), lambda: Flight(lambda: self._list(repo, commit, token)))
        except HubUnavailable:
            imported = await self._pool.run(self._repos.imported, repo, commit)
            if imported is None:
                raise
            return imported

    async def _look_up(self, repo: Repo, revision: str, token: str | None, attempts: int | None) -> Answer:
        return await self._answers.join((repo, revision, token), lambda: Flight(lambda: self._ask(repo, revision, token, attempts)))

    async def with_token(
        self, repo: Repo, token: str | None, question: Callable[[str | None], Awaitable[T]], tells_visibility: bool = False
    ) -> T:
        """Asks the hub for a caller with this token who may have the repo: with the daemon's own where that may be, and what the hub
        does not give to that one with the caller's. An answer that `tells_visibility` shows by itself whether the repo is public still."""
        seen = self._repos.visibility(repo)
        public_since = seen.checked if seen is not None and seen.is_public else None
        if public_since is not None and tells_visibility:
            public_since = time.time()
        sent = self._own_token.instead_of(token, repo, public_since)
        if sent != token:
            try:
                return await question(sent)
            except ContentMismatch:
                raise
            except HubProblem as error:
                if isinstance(error, TokenRefused):
                    self._own_token.refused()
        return await question(token)

    def _look_again(self, repo: Repo, revision: str, token: str | None, seen: Visibility) -> None:
        """A commit is never looked up, but its repo may have become private meanwhile: asks now and then, behind the caller's back."""
        now, said = time.monotonic(), self._looked_again.get(repo)
        is_due = not 0 <= time.time() - seen.checked < PUBLIC_SECONDS and (said is None or now - said > PUBLIC_SECONDS)
        if is_due:
            self._looked_again.put(repo, now)
            behind(self._callers, self._look_quietly(repo, revision, token))

    async def _look_quietly(self, repo: Repo, revision: str, token: str | None) -> None:
        try:
            await self._look_up(repo, revision, token, attempts=1)
        except (HubProblem, HubUnavailable, ShuttingDown) as error:
            log.info("a public repo could not be looked at again", extra={"repo": str(repo), "error": str(error)})

    async def _ask(self, repo: Repo, revision: str, token: str | None, attempts: int | None) -> Answer:
        async def look_up(sent: str | None) -> Answer:
            answer = await self._hub.look_up(repo, revision, sent, attempts)
            if sent != token and (answer.private or answer.gated):
                raise RepoNotFound(f"{repo} is public no more")  # what the daemon's own token is shown is not for this caller (I8)
            return answer

        try:
            answer = await self.with_token(repo, token, look_up, tells_visibility=True)
        except (RepoNotFound, TokenRefused) as error:
            self._verdicts.drop(self._verdict_key(repo, token))  # an earlier yes is over
            self._close(repo, error)
            raise
        self._repos.set_visibility(repo, answer.private, answer.gated)
        if not is_commit(revision):
            self._repos.set_ref(repo, revision, answer.commit)
        if answer.private and not answer.gated:
            self._accept(repo, token)  # the hub has just shown it to this token
        return answer

    def _imported(self, repo: Repo, revision: str) -> Ref | None:
        """A commit that another cache had files of: it is known by its own name, too."""
        is_here = is_commit(revision) and self._repos.has_imported(repo, Commit(revision)) and self._repos.visibility(repo) is not None
        return Ref(revision, time.time()) if is_here else None

    async def _remembered(self, repo: Repo, revision: str) -> Ref | None:
        """What another node left in the store about a public repo."""
        if self._exchange is None:
            return None
        records = self._exchange.records
        with self._exchange.suppressed():
            seen = await self._exchange.answered(records.visibility(repo))
            if seen is None or not seen.is_public:
                return None
            if is_commit(revision):
                listing = await self._exchange.answered(records.listing(repo, Commit(revision)))
                ref = None if listing is None else Ref(revision, seen.checked)
            else:
                ref = await self._exchange.answered(records.ref(repo, revision))
            if ref is not None and self._repos.visibility(repo) is None:
                self._repos.set_visibility(repo, private=False, gated=False, checked=seen.checked)
            return ref
        return None

    async def _list(self, repo: Repo, commit: Commit, token: str | None) -> Listing:
        listing = await self.with_token(repo, token, lambda sent: self._hub.list_files(repo, commit, sent))
        await self._pool.run(self._repos.set_listing, repo, listing)
        return listing

    def _close(self, repo: Repo, error: RepoNotFound | TokenRefused) -> None:
        """A repo that was public and is refused now may have become private: from here on every caller is asked for a token."""
        seen = self._repos.visibility(repo)
        if seen is not None and seen.is_public and isinstance(error, RepoNotFound):
            log.warning("repo closed to the public", extra={"repo": str(repo)})
            now_seen = self._repos.set_visibility(repo, private=True, gated=isinstance(error, GatedRepo))
            if self._exchange is not None:
                behind(self._callers, self._tell(repo, now_seen))

    async def _tell(self, repo: Repo, seen: Visibility) -> None:
        assert self._exchange is not None
        with self._exchange.suppressed():
            await self._exchange.answered(self._exchange.records.put_visibility(repo, seen))

    def _accept(self, repo: Repo, token: str | None) -> None:
        self._verdicts.put(self._verdict_key(repo, token), time.monotonic())

    def _verdict_key(self, repo: Repo, token: str | None) -> bytes:
        """No token is kept: a salted hash is enough to know it again."""
        return hashlib.sha256(self._salt + repr((repo, token)).encode()).digest()


def not_here(repo: Repo, revision: str) -> LocalEntryNotFound:
    """What a caller is told who may not ask the hub: the same for what does not exist, is not here, or is not for him."""
    return LocalEntryNotFound(
        f"{repo}@{revision} is not on this node, and the hub may not be asked",
        "drop local_files_only and HF_HUB_OFFLINE to fetch it, or see what is here: modelcache ls",
    )
