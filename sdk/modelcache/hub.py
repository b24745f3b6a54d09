"""Repos of the Hugging Face Hub through the node's daemon, with huggingface_hub's own signatures.

What a call returns without `local_dir` or `cache_dir` is a shared, read-only folder of the cache (a view), which this process
keeps with a lease until it ends. `snapshot` is the same with an end: it drops the lease after a `with` block.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import warnings
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, TypeVar, Union, cast

from . import client, names, tokens, views
from .connection import read_all
from .errors import DryRunError, LocalEntryNotFoundError, ModelcacheError
from .protocol import Fetch

Folder = Union[str, "os.PathLike[str]"]
Patterns = Union[List[str], str, None]
_Function = TypeVar("_Function", bound=Callable[..., Any])

DEPRECATED = {
    "proxies": "The `proxies` argument is ignored in `%s`. To set up proxies, use the HTTP_PROXY / HTTPS_PROXY environment variables "
    "of the daemon, which asks the hub.",
    "resume_download": "The `resume_download` argument is deprecated and ignored in `%s`. Downloads always resume whenever possible.",
    "force_filename": "The `force_filename` argument is deprecated and ignored in `%s`. Filename is always the same as on the Hub.",
    "local_dir_use_symlinks": "The `local_dir_use_symlinks` argument is deprecated and ignored in `%s`. Downloading to a local "
    "directory does not use symlinks anymore.",
}


class DryRunFileInfo(NamedTuple):
    """What `dry_run=True` tells about a file; the fields are huggingface_hub's."""

    commit_hash: str
    file_size: Optional[int]  # bytes
    filename: str  # in the repo
    local_path: str  # where it would be; "" when that is not known before the download
    is_cached: bool  # on this node
    will_download: bool


def _like_huggingface_hub(function: _Function) -> _Function:
    """Takes spellings that huggingface_hub has given up, with its warnings, and raises errors that are also its own."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        for name, message in DEPRECATED.items():
            if kwargs.pop(name, None) is not None:
                warnings.warn(message % function.__name__, stacklevel=2)
        try:
            return function(*args, **kwargs)
        except ModelcacheError as error:
            from . import hub_errors

            theirs = hub_errors.as_theirs(error)
            if theirs is error:
                raise
            raise theirs from error.__cause__

    return cast(_Function, wrapper)


@_like_huggingface_hub
def snapshot_download(
    repo_id: str,
    *,
    repo_type: Optional[str] = None,
    revision: Optional[str] = None,
    cache_dir: Optional[Folder] = None,
    local_dir: Optional[Folder] = None,
    library_name: Optional[str] = None,
    library_version: Optional[str] = None,
    user_agent: Union[Dict[str, Any], str, None] = None,
    etag_timeout: float = 10,
    force_download: bool = False,
    token: Union[bool, str, None] = None,
    local_files_only: bool = False,
    allow_patterns: Patterns = None,
    ignore_patterns: Patterns = None,
    max_workers: int = 8,
    tqdm_class: Optional[Any] = None,
    headers: Optional[Dict[str, str]] = None,
    endpoint: Optional[str] = None,
    dry_run: bool = False,
) -> Any:
    """A folder with the repo's files at one commit, downloaded once for the whole node.

    Args:
        repo_id: "org/name" or "name".
        repo_type: "model" (also None), "dataset" or "space".
        revision: branch, tag, "refs/pr/1" or commit hash; None is "main". A branch is looked up again when the daemon's last
            answer is older than its configured time (60 s by default), a full commit hash never.
        cache_dir: put private copies there, in the layout of huggingface_hub's cache, and return the snapshot's folder in it.
        local_dir: put private, writable copies there and return its real path. Files of the repo are replaced, one at a time
            and each all at once; other files stay and are named in a warning. Wins over `cache_dir`.
        force_download: ask the hub now, re-hash what is on the node, and fetch again what fails.
        token: a str is used as it is; None looks where huggingface_hub looks (HF_TOKEN, the token file, ...); True insists on
            finding one; False sends none. It is used for this request only.
        local_files_only: ask no hub; so does HF_HUB_OFFLINE=1.
        allow_patterns, ignore_patterns: globs on the files' paths; a file is taken when it matches one of the first (if any are
            given) and none of the second.
        tqdm_class: a progress bar in bytes, driven like a tqdm. Without it one line on the terminal, if stderr is one.
        headers: only an `authorization` is used, as the token: the daemon asks the hub for everybody.
        endpoint: a hub the daemon is configured for; None is HF_ENDPOINT, else the daemon's own.
        dry_run: download nothing and return a list of DryRunFileInfo.
        library_name, library_version, user_agent, etag_timeout, max_workers: accepted, and without effect here.

    Returns:
        The folder's path (str). Without `local_dir` and `cache_dir` it is shared and read-only, and stays for the life of this
        process and of those it forks; MODELCACHE_LOADED=private in the environment gives private, writable copies instead,
        which go when the process ends. So does root get them, where they cost no copying.

    Raises:
        RepositoryNotFoundError, GatedRepoError, RevisionNotFoundError, TokenRefusedError: what the hub said to this caller.
        LocalEntryNotFoundError (FileNotFoundError), its IncompleteSnapshotError and HubUnavailableError: not all of it is on this
            node, and the hub may not be asked or does not answer.
        ViewNotVisibleError (FileNotFoundError): this container lacks the mount of the cache.
        NoSpaceError, ContentMismatchError, UnsafePathError: the download failed for everybody.
        DaemonNotAvailableError (ConnectionError): no daemon, and none could be started. All are a ModelcacheError.
        ValueError: an argument makes no sense (HFValidationError for the repo's id).
    """
    request = request_for(
        repo_id, repo_type, revision, token, headers, endpoint, force_download, local_files_only, allow_patterns, ignore_patterns
    )
    if dry_run:
        return _plan(request, cache_dir, local_dir)
    return _place(request, cache_dir, local_dir, tqdm_class)


@_like_huggingface_hub
def hf_hub_download(
    repo_id: str,
    filename: str,
    *,
    subfolder: Optional[str] = None,
    repo_type: Optional[str] = None,
    revision: Optional[str] = None,
    library_name: Optional[str] = None,
    library_version: Optional[str] = None,
    cache_dir: Optional[Folder] = None,
    local_dir: Optional[Folder] = None,
    user_agent: Union[Dict[str, Any], str, None] = None,
    force_download: bool = False,
    etag_timeout: float = 10,
    token: Union[bool, str, None] = None,
    local_files_only: bool = False,
    headers: Optional[Dict[str, str]] = None,
    endpoint: Optional[str] = None,
    tqdm_class: Optional[Any] = None,
    dry_run: bool = False,
) -> Any:
    """One file of a repo, downloaded once for the whole node. Arguments and errors as in `snapshot_download`, and:

    Args:
        filename: the file's path in the repo.
        subfolder: the folder in the repo that `filename` is relative to.

    Returns:
        The file's path (str); with `dry_run=True` one DryRunFileInfo.

    Raises:
        RemoteEntryNotFoundError: the repo has no such file at this revision.
        ValueError: also for a filename that would leave its folder.
    """
    name = names.filename_of(filename, subfolder)
    request = _request(repo_id, repo_type, revision, token, headers, endpoint, force_download, local_files_only)._replace(filename=name)
    if dry_run:
        return _plan(request, cache_dir, local_dir)[0]
    return os.path.join(_place(request, cache_dir, local_dir, tqdm_class), *name.split("/"))


class Snapshot:
    """A view and the lease on it: `path` is good until `close`. Works in `with`, which gives the path, and as a path."""

    def __init__(self, fetched: client.Fetched) -> None:
        reply = fetched.reply
        self.commit = reply.commit  # full hash
        self.tree = reply.tree
        self._lease = fetched.lease
        self._copy = views.new_copy(reply.path) if views.gets_copy(reply) else None
        self.path = self._copy or reply.path

    def close(self) -> None:
        """Lets the cache drop it. Other uses of the same files in this process keep it. Idempotent."""
        self._lease.close()
        copy, self._copy = self._copy, None
        if copy is not None:
            views.discard(copy)

    def __enter__(self) -> str:
        return self.path

    def __exit__(self, *_: object) -> None:
        self.close()

    def __fspath__(self) -> str:
        return self.path

    def __repr__(self) -> str:
        return "<Snapshot %s %r>" % (self.path, self._lease)


@_like_huggingface_hub
def snapshot(
    repo_id: str,
    *,
    repo_type: Optional[str] = None,
    revision: Optional[str] = None,
    filename: Optional[str] = None,
    allow_patterns: Patterns = None,
    ignore_patterns: Patterns = None,
    force_download: bool = False,
    token: Union[bool, str, None] = None,
    local_files_only: bool = False,
    endpoint: Optional[str] = None,
    tqdm_class: Optional[Any] = None,
) -> Snapshot:
    """Like `snapshot_download`, for as long as it is needed: the cache may drop the files after the block.

        with modelcache.snapshot("org/name", allow_patterns="*.safetensors") as path:
            model = load(path)

    Arguments and errors as in `snapshot_download`; `filename` asks for that one file. Returns a Snapshot.
    """
    request = _request(repo_id, repo_type, revision, token, None, endpoint, force_download, local_files_only)._replace(
        filename=None if filename is None else names.filename_of(filename, None),
        allow_patterns=names.patterns_of(allow_patterns),
        ignore_patterns=names.patterns_of(ignore_patterns),
    )
    fetched = fetch(request, tqdm_class)
    try:
        return Snapshot(fetched)
    except BaseException:
        fetched.lease.close()
        raise


# What of a call's arguments goes into a request to the daemon.
REQUEST = (
    "repo_id", "repo_type", "revision", "token", "headers", "endpoint", "force_download", "local_files_only", "allow_patterns",
    "ignore_patterns",
)  # fmt: skip


def request_for(
    repo_id: str,
    repo_type: Optional[str] = None,
    revision: Optional[str] = None,
    token: Union[bool, str, None] = None,
    headers: Optional[Mapping[str, str]] = None,
    endpoint: Optional[str] = None,
    force_download: bool = False,
    local_files_only: bool = False,
    allow_patterns: Patterns = None,
    ignore_patterns: Patterns = None,
) -> Fetch:
    """What `snapshot_download` asks the daemon for."""
    request = _request(repo_id, repo_type, revision, token, headers, endpoint, force_download, local_files_only)
    return request._replace(allow_patterns=names.patterns_of(allow_patterns), ignore_patterns=names.patterns_of(ignore_patterns))


def fetch(request: Fetch, tqdm_class: Optional[Any] = None) -> client.Fetched:
    """Fetches with progress and checks that the path is visible here; warnings go to the log. The lease is the caller's."""
    reporter = _reporter(request.filename or request.repo_id, tqdm_class)
    is_done = False
    try:
        fetched = client.shared().fetch(request, reporter)
        is_done = True
    finally:
        if reporter is not None:
            reporter.close(is_done)
    try:
        views.check_visible(fetched.reply, fetched.root)
    except BaseException:
        fetched.lease.close()
        if fetched.listing is not None:
            os.close(fetched.listing)
        raise
    for warning in fetched.reply.warnings:
        views.warn(warning)
    return fetched


def listing_of(fetched: client.Fetched) -> Dict[str, Any]:
    """The commit's full listing, which the request asked for. Closes its descriptor."""
    assert fetched.listing is not None
    try:
        return cast(Dict[str, Any], json.loads(read_all(fetched.listing)))
    finally:
        os.close(fetched.listing)


def _request(
    repo_id: str,
    repo_type: Optional[str],
    revision: Optional[str],
    token: Union[bool, str, None],
    headers: Optional[Mapping[str, str]],
    endpoint: Optional[str],
    force_download: bool,
    local_files_only: bool,
) -> Fetch:
    names.check_repo_id(repo_id)
    if any(name.lower() != "authorization" for name in headers or ()):
        views.warn("headers other than `authorization` are not sent: the daemon asks the hub for everybody")
    return Fetch(
        repo_id=repo_id,
        repo_type=names.repo_type_of(repo_type),
        revision=names.revision_of(revision),
        token=tokens.token_in_headers(headers) or tokens.token_to_send(token),
        endpoint=endpoint.rstrip("/") if endpoint else tokens.endpoint(),
        force_download=bool(force_download),
        local_files_only=bool(local_files_only) or tokens.is_offline(),
        purpose=os.path.basename(sys.argv[0] if sys.argv else "")[:200],  # not the arguments: they may hold secrets
    )


def _place(request: Fetch, cache_dir: Optional[Folder], local_dir: Optional[Folder], tqdm_class: Optional[Any]) -> str:
    """Fetches, and puts the files where the caller wants them; returns the folder that corresponds to the repo's root."""
    wants_cache = cache_dir is not None and local_dir is None
    fetched = fetch(request._replace(listing=wants_cache), tqdm_class)
    view = fetched.reply.path
    is_kept = False
    try:
        if local_dir is not None:
            from . import files

            target = _real(local_dir)
            foreign = files.copy_tree(view, target)
            if foreign and request.filename is None:
                views.warn(files.foreign_warning(target, foreign))
            return target
        if cache_dir is not None:
            from . import hfcache

            return hfcache.fill_snapshot(
                _real(cache_dir),
                request.repo_id,
                request.repo_type,
                request.revision,
                view,
                listing_of(fetched),
                force=request.force_download,
                is_whole=request.filename is None,
            )
        if views.gets_copy(fetched.reply):
            return views.kept_copy(fetched.reply, fetched.root)
        is_kept = True  # the lease is never closed: the path is good as long as this process lives
        return view
    finally:
        if not is_kept:
            fetched.lease.close()


def _plan(request: Fetch, cache_dir: Optional[Folder], local_dir: Optional[Folder]) -> List[DryRunFileInfo]:
    shared = client.shared()
    try:
        plan = shared.plan(request)
    except LocalEntryNotFoundError as error:
        raise DryRunError("a dry run needs the hub: %s" % error.message, error.hint) from error
    if local_dir is not None:
        folder = _real(local_dir)
    elif cache_dir is not None:
        folder = os.path.join(_real(cache_dir), names.cache_folder_name(request.repo_id, request.repo_type), "snapshots", plan.commit)
    else:
        folder = os.path.join(shared.hello().root, "views", plan.tree) if plan.tree else ""
    return [
        DryRunFileInfo(
            commit_hash=plan.commit,
            file_size=size_bytes,
            filename=path,
            local_path=os.path.join(folder, path) if folder else "",
            is_cached=is_cached,
            will_download=request.force_download or not is_cached,
        )
        for path, size_bytes, is_cached in plan.files
    ]


def _reporter(label: str, tqdm_class: Optional[Any]) -> Any:
    """None when nobody would see it: a warm process does not even load what draws."""
    if tqdm_class is None and "modelcache.progress" not in sys.modules and (sys.stderr is None or not sys.stderr.isatty()):
        return None
    from . import progress

    return progress.reporter(label, tqdm_class)


def _real(folder: Folder) -> str:
    return os.path.realpath(os.path.expanduser(os.fspath(folder)))
