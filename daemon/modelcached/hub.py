"""The Hugging Face Hub: what a revision is, which files it has, who may have them, and where their bytes are.

All of it goes through huggingface_hub (its URLs, paging, patterns, error codes), one call in a thread each. Its own retries
are cut short by a response hook, so that waiting is done here: one pause for everybody when an endpoint says 429.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import msgspec
from huggingface_hub import HfApi, constants, hf_hub_url
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import _http as hf_http
from huggingface_hub.utils._paths import filter_repo_objects

from .errors import EntryNotFound, GatedRepo, HubProblem, HubUnavailable, ModelcachedError, RepoNotFound, RevisionNotFound, TokenRefused
from .model import Commit, ListedFile, Listing, Repo, check_paths, is_commit, is_digest
from .spans import Again
from .tasks import Pool

T = TypeVar("T")
API_TIMEOUT_SECONDS = 10.0
API_THREADS = 8
MAX_BACKOFF_SECONDS = 30.0
MAX_PAUSE_SECONDS = 3600.0
_CODES = {GatedRepoError: "GatedRepo", RepositoryNotFoundError: "RepoNotFound", RevisionNotFoundError: "RevisionNotFound"}  # subclass first


class Answer(NamedTuple):
    """What a revision is, as the hub says to one caller."""

    commit: Commit
    private: bool
    gated: bool


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
        if "SSL_CERT_FILE" not in os.environ and (bundle := os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE")):
            os.environ["SSL_CERT_FILE"] = bundle  # what huggingface_hub's client and ssl itself read
        for name in ("http_proxy", "https_proxy"):  # huggingface_hub's client takes "all" for both, aiohttp does not
            everywhere = os.environ.get("all_proxy") or os.environ.get("ALL_PROXY") or ""
            if everywhere.startswith("http") and name not in os.environ and name.upper() not in os.environ:
                os.environ[name] = everywhere
        os.environ["NETRC"] = os.devnull  # a caller's token is the only one (I8)
        constants.HF_HUB_DISABLE_TELEMETRY = True  # it would ask the default endpoint, whatever the config allows (I8)
        hf_http.set_client_factory(_client)

    async def look_up(self, repo: Repo, revision: str, token: str | None, attempts: int | None = None) -> Answer:
        """The commit a revision points to now. `attempts` below the setting: when an older answer would do."""
        info = await self._ask(repo, lambda: _api(repo, token).repo_info(repo.id, repo_type=repo.type, revision=revision), attempts)
        if not isinstance(info.sha, str) or not is_commit(info.sha):
            raise HubProblem(
                f"{repo.endpoint} says that {repo}@{revision} is commit {info.sha!r}", "is this a hub at all? look at hub_endpoint"
            )
        return Answer(Commit(info.sha), bool(info.private), bool(getattr(info, "gated", False)))

    async def list_files(self, repo: Repo, commit: Commit, token: str | None) -> Listing:
        """Every file of a commit, its names checked (I9)."""

        def ask() -> list[ListedFile]:
            entries = _api(repo, token).list_repo_tree(repo.id, recursive=True, revision=commit, repo_type=repo.type)
            return [_listed(entry) for entry in entries if isinstance(entry, RepoFile)]

        files = await self._ask(repo, ask)
        check_paths([file.path for file in files], str(repo))
        for file in files:
            if file.size < 0 or (file.sha256 is not None and not is_digest(file.sha256)) or not is_commit(file.oid):
                raise HubProblem(
                    f"{repo.endpoint} lists {file.path!r} of {repo} with no sound size and id", "is this a hub at all? look at hub_endpoint"
                )
        return Listing(commit, tuple(sorted(files, key=lambda file: file.path)))

    async def check_access(self, repo: Repo, token: str | None) -> None:
        """Returns if the hub gives this repo's files to this token; RepoNotFound, GatedRepo or TokenRefused if not."""
        await self._ask(repo, lambda: _api(repo, token).auth_check(repo.id, repo_type=repo.type))

    async def _ask(self, repo: Repo, question: Callable[[], T], attempts: int | None = None) -> T:
        attempts = attempts or self.attempts
        for attempt in range(1, attempts + 1):
            await self.pauses.wait(repo.endpoint)
            self.requests += 1
            try:
                with _translated(repo):
                    return await self._pool.abandon(question)
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
        hf_http.close_session()


def unavailable(endpoint: str, reason: str) -> HubUnavailable:
    return HubUnavailable(
        f"the hub at {endpoint} can't be reached: {reason}",
        "check the network and HF_ENDPOINT, or ask for what is here with local_files_only=True (modelcache ls)",
    )


def file_url(repo: Repo, commit: Commit, path: str) -> str:
    return hf_hub_url(repo.id, path, repo_type=repo.type, revision=commit, endpoint=repo.endpoint)


def matching(paths: Iterable[str], allow: list[str] | None, ignore: list[str] | None) -> list[str]:
    """The paths that huggingface_hub's patterns select."""
    return list(filter_repo_objects(paths, allow_patterns=allow, ignore_patterns=ignore))


def pause_asked(headers: Mapping[str, str]) -> float:
    """Seconds that an answer asks to wait (`RateLimit`, `Retry-After`), 0 if it does not say."""
    limit = hf_http.parse_ratelimit_headers(headers)
    if limit is not None and limit.remaining == 0:
        return float(limit.reset_in_seconds)
    return float(hf_http._parse_retry_after(headers) or 0)


def refusal(status: int, headers: Mapping[str, str], repo: Repo, what: str, code: str | None = None) -> ModelcachedError:
    """What a 4xx answer means for a caller, by the hub's own error codes (`code`: as huggingface_hub read it)."""
    code, said = code or headers.get("X-Error-Code"), headers.get("X-Error-Message", "")
    if code == "GatedRepo":
        return GatedRepo(
            f"access to {repo} is gated",
            f"ask for access at {repo.endpoint}/{repo}, then pass a token that has it (HF_TOKEN)",
            repo_id=repo.id,
        )
    if code == "RevisionNotFound":
        return RevisionNotFound(
            f"{repo} has no such revision: {what}", "look at the repo's branches and tags; a commit hash has 40 digits", repo_id=repo.id
        )
    if code == "EntryNotFound":
        return EntryNotFound(f"{repo} has no such file: {what}", "list the repo's files with: modelcache pull --dry-run", repo_id=repo.id)
    if status == 401 and said.startswith("Invalid credentials"):
        return TokenRefused(f"{repo.endpoint} does not accept the token", "log in again (hf auth login) or set HF_TOKEN to a valid token")
    if code == "RepoNotFound" or status in (401, 404):
        return RepoNotFound(
            f"{repo} does not exist on {repo.endpoint}, or is private",
            "check the repo id and --repo-type; for a private repo pass a token that may read it (HF_TOKEN)",
            repo_id=repo.id,
        )
    return HubProblem(
        f"{repo.endpoint} refused {repo} ({what}) with HTTP {status}: {said[:200]}",
        "check that the token may read this repo",
        status=status,
    )


@contextmanager
def _translated(repo: Repo) -> Iterator[None]:
    """Maps huggingface_hub's exceptions and its client's to ours; the one place that knows them."""
    try:
        yield
    except HfHubHTTPError as error:
        code = next((code for kind, code in _CODES.items() if isinstance(error, kind)), None)
        what = str(error.response.request.url).partition("?")[0]
        raise refusal(error.response.status_code, error.response.headers, repo, what, code) from error
    except _transport_error() as error:
        raise Again(f"{type(error).__name__}: {str(error)[:200]}") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:  # no JSON, or not what a hub says: some proxy's own page
        raise Again(f"its answer makes no sense ({type(error).__name__}: {str(error)[:200]})") from error


def _api(repo: Repo, token: str | None) -> HfApi:
    return HfApi(endpoint=repo.endpoint, token=token if token else False, library_name="modelcached")


def _listed(entry: RepoFile) -> ListedFile:
    lfs = entry.lfs
    return msgspec.convert((entry.path, entry.size, entry.blob_id, lfs.sha256 if lfs else None, entry.xet_hash), ListedFile)


def _client() -> Any:
    """huggingface_hub's own client with a deadline, and without its patience: retries are ours."""
    client = hf_http.default_client_factory()
    client.event_hooks["request"].append(_limit)
    client.event_hooks["response"].append(_raise_if_again)
    return client


def _limit(request: Any) -> None:
    """Its methods ask with timeout=None when they are not told otherwise, and that wins over the client's own."""
    request.extensions["timeout"] = dict.fromkeys(("connect", "read", "write", "pool"), API_TIMEOUT_SECONDS)


def _raise_if_again(response: Any) -> None:
    if response.status_code == 429 or response.status_code >= 500:
        raise Again(f"HTTP {response.status_code}", pause_asked(dict(response.headers)))


def _transport_error() -> type[Exception]:
    """The base of its HTTP client's connection errors, whichever client this version of huggingface_hub uses."""
    client = sys.modules[HfHubHTTPError.__mro__[1].__module__.partition(".")[0]]
    error: type[Exception] = client.TransportError
    return error
