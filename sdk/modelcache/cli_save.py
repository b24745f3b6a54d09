"""`modelcache save`: a folder or file is kept, and its key is on stdout. It ends when the bytes are safe on this node, or in the store.

What is wrong with the path or the options is said before the daemon is asked. The key is printed as soon as the save is kept,
whatever becomes of the waiting that may follow.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from typing import Any, Dict, Optional

from . import cli_daemon, client, flushing, keys, saving
from .cli_show import OK, Show, UsageError, count, printable, seconds, size
from .errors import LocalEntryNotFoundError, SavesPendingError
from .metadata import encode


def save(asked: argparse.Namespace, show: Show) -> int:
    _check_path(asked.path)
    _check_names(asked)
    metadata = None if asked.metadata is None else _metadata(asked.metadata)
    cli_daemon.lead_sdk(asked, show)
    began = time.monotonic()
    try:
        reference = saving.save(
            asked.path,
            asked.label,
            metadata,
            asked.format,
            kind=asked.kind,
            name=asked.name,
            durable=asked.durable,
            supersede=asked.supersede,
            follow_links=asked.follow_links,
            store=asked.store,
        )
        took = time.monotonic() - began
        show.data({**reference, "metadata": encode(reference["metadata"])}, [reference["key"]])
        sys.stdout.flush()
        show.as_json = False  # the one document is out; an error from here on is words
        what = "%s, %s in %s" % (count(reference["files"], "file"), size(reference["size"]), seconds(took))
        show.word("saved %s: %s; its store is %s" % (printable(asked.path), what, reference["store"]))
        _wait(asked.flush, show)
    finally:
        flushing.leave()
    return OK


def _wait(is_asked_for: bool, show: Show) -> None:
    if is_asked_for:
        began = time.monotonic()
        flushing.flush()
        show.word("in the store after another %s" % seconds(time.monotonic() - began))
    elif client.shared().hello().private:  # it may end with the container this command runs in
        try:
            flushing.flush(flushing.exit_seconds())
        except SavesPendingError as error:
            show.warn(error.message)


def _check_path(path: str) -> None:
    if os.path.exists(path):
        return
    what = "not there"
    if os.path.islink(path):
        what = "a link to %s, which is not there" % printable(os.readlink(path))
    elif path.endswith("/") and os.path.exists(path.rstrip("/")):
        what = "a file, and no folder"
    raise LocalEntryNotFoundError("%s: %s" % (printable(path) or "''", what), "save takes a folder, or one file")


def _check_names(asked: argparse.Namespace) -> None:
    if asked.kind == keys.MODEL and asked.name is not None:
        raise UsageError("a model has a label, only a checkpoint has a name", "--label %s, or --kind checkpoint" % asked.name)
    if asked.kind == keys.CHECKPOINT and asked.label is not None:
        raise UsageError("a checkpoint has a name, only a model has a label", "--name %s, or --kind model" % asked.label)
    for name, what in ((asked.label, "label"), (asked.name, "name")):
        try:
            if name is not None:
                keys.check_name(name, what)
        except ValueError as error:
            raise UsageError(str(error), "it becomes a part of the key") from error


def _metadata(text: str) -> Optional[Dict[str, Any]]:
    hint = """as in: --metadata '{"loss": 0.12}'"""
    try:
        metadata = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError("--metadata is not JSON: %s" % error, hint) from error
    if not isinstance(metadata, dict):
        raise UsageError("--metadata is a JSON object, and this is none: %s" % text[:80], hint)
    return metadata
