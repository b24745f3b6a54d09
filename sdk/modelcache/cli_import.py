"""`modelcache import [DIR]`: takes over what huggingface_hub's own cache has. Nothing is downloaded, and nothing there is removed."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from typing import Any, Dict, Iterator, List, Tuple

from . import cli_daemon, hfscan
from .cli_show import DAMAGED, NOT_FOUND, OK, Show, UsageError, count, size
from .client import Client, fields_of
from .takeover import ImportCommit, ImportCommitReply, ImportFiles, ImportFilesReply

_FILES_AT_ONCE = 32
_NAMED = 3  # files that a remark names


def take_over(asked: argparse.Namespace, show: Show) -> int:
    cache = asked.directory or hfscan.default_cache()
    if not os.path.isdir(cache):
        raise UsageError("%s is no folder" % cache, "name huggingface_hub's cache, the folder with models--org--name in it")
    connected = cli_daemon.client(asked, show)
    done: List[Dict[str, Any]] = []
    for found in hfscan.scan(cache):
        with show.progress(found.what):
            done.append(_import(connected, found, asked.public, show))
    heads = ["REPO", "FILES", "SIZE", "NEW", "STATE"]
    rows = [[each["what"], str(each["files"]), size(each["size_bytes"]), str(each["taken"]), each["state"]] for each in done]
    if not done:
        show.word("%s has no repos" % cache)
    if done or show.as_json:
        show.table({"directory": cache, "imported": done}, heads, rows, ("FILES", "SIZE", "NEW"))
    damaged = sum(len(each["damaged"]) for each in done)
    if damaged:
        show.warn("%s were left out: their bytes are not what their names say" % count(damaged, "file"))
        return DAMAGED
    return OK if done else NOT_FOUND


def _import(client: Client, found: hfscan.Found, public: bool, show: Show) -> Dict[str, Any]:
    taken, damaged = 0, []
    for batch in _batches(sorted(found.blobs.items())):
        reply = _hand_over(client, found, batch)
        taken += len(reply.taken)
        damaged += [batch[position][1] for position in reply.refused]
    if found.unnamed:
        shown = ", ".join(found.unnamed[:_NAMED]) + (", ..." if len(found.unnamed) > _NAMED else "")
        show.warn("%s: left out, for their bytes have no name of the hub's: %s" % (found.what, shown))
    said = _tell(client, found, public)
    state = "whole" if found.is_whole and not said.missing else "some files" if said.files else "nothing"
    if not found.is_whole and said.files:
        state = "as it was"  # nobody but the hub knows whether that is all of it
    return {
        "what": found.what,
        "repo_id": found.repo_id,
        "repo_type": found.repo_type,
        "commit": found.commit,
        "files": said.files,
        "size_bytes": said.size_bytes,
        "taken": taken,
        "damaged": damaged,
        "missing": said.missing,
        "state": state,
    }


def _batches(blobs: List[Tuple[str, str]]) -> Iterator[List[Tuple[str, str]]]:
    for start in range(0, len(blobs), _FILES_AT_ONCE):
        yield blobs[start : start + _FILES_AT_ONCE]


def _hand_over(client: Client, found: hfscan.Found, batch: List[Tuple[str, str]]) -> ImportFilesReply:
    descriptors: List[int] = []
    try:
        for _, path in batch:
            descriptors.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        files = [(etag, os.fstat(descriptor).st_size) for (etag, _), descriptor in zip(batch, descriptors)]
        params = fields_of(ImportFiles(found.repo_id, files, found.repo_type))
        reply = client.session(lambda connection, _: connection.request("import_files", params, descriptors=descriptors))
        return ImportFilesReply(**reply.result)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _tell(client: Client, found: hfscan.Found, public: bool) -> ImportCommitReply:
    with tempfile.NamedTemporaryFile() as file:
        file.write(json.dumps(found.listing).encode("utf-8", "surrogatepass"))
        file.flush()
        listing = os.open(file.name, os.O_RDONLY | os.O_CLOEXEC)
        try:
            params = fields_of(ImportCommit(found.repo_id, found.refs, found.is_whole, found.repo_type, public=public))
            reply = client.session(lambda connection, _: connection.request("import_commit", params, descriptors=[listing]))
            return ImportCommitReply(**reply.result)
        finally:
            os.close(listing)
