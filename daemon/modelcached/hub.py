"""The Hugging Face Hub: what a revision is, which files it has, who may have them, and where their bytes are.

All of it goes through huggingface_hub (`hubapi`), one call in a thread each; the first one loads it. Retries and waiting are done here: one
pause for everybody when an endpoint says 429.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from .errors import HubProblem, HubUnavailable
from .model import Commit, ListedFile, Listing, Repo, check_paths, is_commit, is_digest
from .spans import Again
from .tasks import Pool

if TYPE_CHECKING:
    from huggingface_hub import HfApi

T = TypeVar("T")
API_THREADS = 8
MAX_BACKOFF_SECONDS = 30.0
MAX_PAUSE_SECONDS = 3600.0


class Answer(NamedTuple):
    """What a revision is, as the hub says to one caller."""

    commit: Commit
    private: bool
    gated: bool


@dataclass(eq=False)
class Source:
    """One place where a content can be had: a file of a commit, and the token of the caller who asked for it."""

    repo: Repo
    commit: Commit
    path: str
    token: str | None = field(default=None, repr=False)
    location: str | None = field(default=None, repr=False)  # where the last redirect led: valid for a while


class Pauses:
    """Endpoints that asked to be left alone for a while: everybody waits, and progress says why."""

    def __init__(self) -> None:
        self._until: dict[str, float] = {}  # monotonic
        self.count = 0  # pauses ever

    def note(self, endpoint: str, seconds: float) -> None:
        until = time.monotonic() + min(seconds, MAX_PAUSE_SECONDS)
        if until > self._until.get(endpoint, 0.0):
            self._until[endpoint] = until
            self.count += 1

    def remaining(self, endpoint: str) -> float:
        return max(0.0, self._until.get(endpoint, 0.0) - time.monotonic())

    async def wait(self, endpoint: str) -> None:
        while (seconds := self.remaining(endpoint)) > 0:  # noqa: ASYNC110 - a pause can be prolonged while one waits
            await asyncio.sleep(seconds)


class Hub:
    """One conversation with the hub for the whole node; `attempts` and `backoff` are the daemon's settings."""

    def __init__(self, attempts: int, backoff_seconds: float) -> None:
        self.pauses = Pauses()
        self.attempts = attempts
        self.backoff_seconds = backoff_seconds
        self.requests = 0  # questions asked, retries included
        self._pool = Pool("hub", API_THREADS)
        self._close_session: Callable[[], None] = lambda: None  # until there is one
        if "SSL_CERT_FILE" not in os.environ and (bundle := os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE")):
            os.environ["SSL_CERT_FILE"] = bundle  # what huggingface_hub's client and ssl itself read
        for name in ("http_proxy", "https_proxy"):  # huggingface_hub's client takes "all" for both, aiohttp does not
            everywhere = os.environ.get("all_proxy") or os.environ.get("ALL_PROXY") or ""
            if everywhere.startswith("http") and name not in os.environ and name.upper() not in os.environ:
                os.environ[name] = everywhere
        os.environ["NETRC"] = os.devnull  # a caller's token is the only one (I8)

    async def look_up(self, repo: Repo, revision: str, token: str | None, attempts: int | None = None) -> Answer:
        """The commit a revision points to now. `attempts` below the setting: when an older answer would do."""
        info = await self._ask(repo, token, lambda api: api.repo_info(repo.id, repo_type=repo.type, revision=revision), attempts)
        if not isinstance(info.sha, str) or not is_commit(info.sha):
            raise HubProblem(
                f"{repo.endpoint} says that {repo}@{revision} is commit {info.sha!r}", "is this a hub at all? look at hub_endpoint"
            )
        return Answer(Commit(info.sha), bool(info.private), bool(getattr(info, "gated", False)))

    async def list_files(self, repo: Repo, commit: Commit, token: str | None) -> Listing:
        """Every file of a commit, its names checked (I9)."""

        def tree(api: HfApi) -> list[ListedFile]:
            from .hubapi import files_of

            return files_of(api.list_repo_tree(repo.id, recursive=True, revision=commit, repo_type=repo.type))

        files = await self._ask(repo, token, tree)
        check_paths([file.path for file in files], str(repo))
        for file in files:
            if file.size < 0 or (file.sha256 is not None and not is_digest(file.sha256)) or not is_commit(file.oid):
                raise HubProblem(
                    f"{repo.endpoint} lists {file.path!r} of {repo} with no sound size and id", "is this a hub at all? look at hub_endpoint"
                )
        return Listing(commit, tuple(sorted(files, key=lambda file: file.path)))

    async def check_access(self, repo: Repo, token: str | None) -> None:
        """Returns if the hub gives this repo's files to this token; RepoNotFound, GatedRepo or TokenRefused if not."""
        await self._ask(repo, token, lambda api: api.auth_check(repo.id, repo_type=repo.type))

    async def _ask(self, repo: Repo, token: str | None, question: Callable[[HfApi], T], attempts: int | None = None) -> T:
        def ask() -> T:
            from . import hubapi

            self._close_session = hubapi.close_session
            with hubapi.translated(repo):
                return question(hubapi.api(repo, token))

        attempts = attempts or self.attempts
        for attempt in range(1, attempts + 1):
            await self.pauses.wait(repo.endpoint)
            self.requests += 1
            try:
                return await self._pool.abandon(ask)
            except Again as again:
                if again.pause:
                    self.pauses.note(repo.endpoint, again.pause)
                if attempt == attempts:
                    raise unavailable(repo.endpoint, again.reason) from again
                await asyncio.sleep(self.backoff(attempt))
        raise AssertionError("unreachable")

    def backoff(self, failures: int) -> float:
        """Seconds before the next try after so many failures in a row: doubled each time, with jitter."""
        full: float = min(MAX_BACKOFF_SECONDS, self.backoff_seconds * 2 ** (failures - 1))
        return full * random.uniform(0.5, 1.0)

    def close(self) -> None:
        self._pool.close()
        self._close_session()


def unavailable(endpoint: str, reason: str) -> HubUnavailable:
    return HubUnavailable(
        f"the hub at {endpoint} can't be reached: {reason}",
        "check the network and HF_ENDPOINT, or ask for what is here with local_files_only=True (modelcache ls)",
    )
