"""`modelcache pull`: a repo's files are on this node, and their path is on stdout."""

from __future__ import annotations

import argparse
import os
from typing import Optional

from . import cli_daemon, cli_room, files, names, tokens, views
from .cli_repos import Named, named
from .cli_show import OK, Show, count, plain, printable, seconds, size
from .client import Client, Fetched
from .protocol import Fetch

NOT_SHOWN = ("device", "inode", "leased")  # fields of a reply that mean something to the SDK only


def pull(asked: argparse.Namespace, show: Show) -> int:
    wanted = named(asked.repo, asked)
    request = request_for(wanted, asked, "modelcache pull")._replace(force_download=asked.force)
    target: Optional[str] = None if asked.to is None else os.path.realpath(asked.to)
    connected = cli_daemon.client(asked, show)
    if asked.dry_run:
        return _plan(connected, wanted, request, show)
    if target is not None:
        check_target(target)
    fetched = fetch(connected, wanted, request, show)
    reply = fetched.reply
    cli_room.keep_for_a_day(connected, wanted, request, reply.tree)
    if target is not None:
        put(reply.path, reply.size_bytes, target, show)
    document = {**wanted._asdict(), "revision": request.revision, **plain(reply, *NOT_SHOWN)}
    document.update({"path": target or reply.path, "is_private": target is not None})
    show.data(document, [target or reply.path])
    show.word(
        "%s@%s: commit %s, %s, %s in %s, %s from the hub"
        % (
            wanted.repo_id,
            request.revision,
            reply.commit,
            count(reply.files, "file"),
            size(reply.size_bytes),
            seconds(reply.seconds),
            size(reply.hub_bytes),
        )
    )
    return OK


def request_for(wanted: Named, asked: argparse.Namespace, purpose: str) -> Fetch:
    return Fetch(
        repo_id=wanted.repo_id,
        repo_type=wanted.repo_type,
        revision=wanted.revision or names.DEFAULT_REVISION,
        allow_patterns=asked.include,
        ignore_patterns=asked.exclude,
        token=tokens.token_to_send(asked.token or None),
        endpoint=tokens.endpoint(),
        local_files_only=asked.offline or tokens.is_offline(),
        purpose=purpose,
    )


def fetch(connected: Client, wanted: Named, request: Fetch, show: Show) -> Fetched:
    """Fetches with progress; the lease is held until this process ends."""
    with show.progress(str(wanted)) as reporter:
        fetched = connected.fetch(request, reporter)
    views.check_visible(fetched.reply, fetched.root)
    for warning in fetched.reply.warnings:
        show.warn(warning)
    return fetched


def _plan(connected: Client, wanted: Named, request: Fetch, show: Show) -> int:
    with show.progress(str(wanted)) as reporter:
        planned = connected.plan(request, reporter)
    missing = [size_bytes for _, size_bytes, is_cached in planned.files if request.force_download or not is_cached]
    document = {
        **wanted._asdict(),
        "revision": request.revision,
        "commit": planned.commit,
        "files": [{"path": path, "size_bytes": size_bytes, "is_cached": is_here} for path, size_bytes, is_here in planned.files],
        "to_fetch_files": len(missing),
        "to_fetch_bytes": sum(missing),
    }
    rows = [["here" if is_here else "fetch", size(size_bytes), printable(path)] for path, size_bytes, is_here in planned.files]
    show.table(document, ["STATE", "SIZE", "PATH"], rows, ("SIZE",))
    show.word(
        "%s@%s: commit %s, %d of %s to fetch, %s"
        % (wanted.repo_id, request.revision, planned.commit, len(missing), count(len(rows), "file"), size(sum(missing)))
    )
    return OK


def put(view: str, size_bytes: int, target: str, show: Show) -> None:
    """Private, writable copies of a view in the folder `target`."""
    show.word("copying %s to %s" % (size(size_bytes), target))
    foreign = files.copy_tree(view, target)
    if foreign:
        show.warn(files.foreign_warning(target, foreign))


def check_target(target: str) -> None:
    """What can't be written to is said before the download, not after it."""
    existing = target
    while not os.path.lexists(existing):
        existing = os.path.dirname(existing)
    if not os.path.isdir(existing):
        raise NotADirectoryError(20, "not a folder", existing)
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(13, "this user may not write there", existing)
