"""huggingface_hub in this house's words: URLs, paging, patterns, error codes. The only module that imports it.

Loading it takes as long as everything else that the daemon needs to start, so `hub` loads this module with the first question. Its
own retries are cut short by a response hook: waiting is done there.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import msgspec
from huggingface_hub import HfApi, constants, hf_hub_url
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import _http as hf_http
from huggingface_hub.utils._paths import filter_repo_objects

from .errors import EntryNotFound, GatedRepo, HubProblem, ModelcachedError, RepoNotFound, RevisionNotFound, TokenRefused
from .model import Commit, ListedFile, Repo
from .spans import Again

API_TIMEOUT_SECONDS = 10.0
_CODES = {GatedRepoError: "GatedRepo", RepositoryNotFoundError: "RepoNotFound", RevisionNotFoundError: "RevisionNotFound"}  # subclass first


def api(repo: Repo, token: str | None) -> HfApi:
    return HfApi(endpoint=repo.endpoint, token=token if token else False, library_name="modelcached")


def close_session() -> None:
    """Its HTTP connections; the next question opens others."""
    hf_http.close_session()


def file_url(repo: Repo, commit: Commit, path: str) -> str:
    return hf_hub_url(repo.id, path, repo_type=repo.type, revision=commit, endpoint=repo.endpoint)


def matching(paths: Iterable[str], allow: list[str] | None, ignore: list[str] | None) -> list[str]:
    """The paths that huggingface_hub's patterns select."""
    return list(filter_repo_objects(paths, allow_patterns=allow, ignore_patterns=ignore))


def files_of(tree: Iterable[Any]) -> list[ListedFile]:
    """The files among the entries of a repo's tree."""
    return [_listed(entry) for entry in tree if isinstance(entry, RepoFile)]


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
def translated(repo: Repo) -> Iterator[None]:
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


constants.HF_HUB_DISABLE_TELEMETRY = True  # it would ask the default endpoint, whatever the config allows (I8)
hf_http.set_client_factory(_client)
