"""What was saved, as seen from a command: load it, list it, take it out of the store, wait until all of it is there, tidy up after it."""

from __future__ import annotations

import argparse
import os
from datetime import datetime
from typing import Any, Dict, List, NamedTuple, Optional

from . import artifacts, cli_daemon, flushing, loading, views
from .cli_pull import NOT_SHOWN, check_target, put
from .cli_repos import ago
from .cli_show import DAMAGED, OK, Show, UsageError, count, plain, seconds, size
from .errors import IncompatibleReferenceError, SavesPendingError
from .protocol import DeleteReference, GcStore, Load, References


class _Meant(NamedTuple):
    text: Optional[str]  # a key, or what keys begin with
    store: Optional[str]


def load(asked: argparse.Namespace, show: Show) -> int:
    wanted = _reference(asked.key)
    target: Optional[str] = None if asked.to is None else os.path.realpath(asked.to)
    connected = cli_daemon.client(asked, show)
    if target is not None:
        check_target(target)
    key = wanted["key"]
    with show.progress(key.rpartition("/")[2]) as reporter:
        request = Load(key, asked.store or wanted.get("store"), purpose="modelcache load")
        loaded = loading.when_there(connected, request, reporter)
    reply = loaded.reply
    views.check_visible(reply, loaded.root)
    for warning in reply.warnings:
        show.warn(warning)
    if target is not None:
        put(reply.path, reply.size_bytes, target, show)
    path = target or reply.path
    show.data({"key": key, **plain(reply, *NOT_SHOWN), "path": path, "is_private": target is not None}, [path])
    what = "%s, %s in %s" % (count(reply.files, "file"), size(reply.size_bytes), seconds(reply.seconds))
    show.word("%s: %s, %s from the store" % (key, what, size(reply.store_bytes)))
    return OK


def ls(asked: argparse.Namespace, show: Show) -> int:
    meant = _meant(asked)
    request = References(meant.text or "", asked.kind, asked.name, meant.store)
    said = cli_daemon.client(asked, show).call("references", request)
    pending = set(said["pending"])
    found = [{**reference, "state": "pending" if reference["key"] in pending else "stored"} for reference in said["references"]]
    if not found:
        show.word("nothing was saved yet" if request == References(store=meant.store) else "nothing that was saved matches")
        if not show.as_json:
            return OK
    rows = [[_created(each), size(each.get("size", 0)), each["state"], each["key"]] for each in found]
    show.table({"references": found}, ["CREATED", "SIZE", "STATE", "KEY"], rows, ("SIZE",))
    return OK


def rm(asked: argparse.Namespace, show: Show) -> int:
    meant = _meant(asked)
    if meant.text is None and meant.store is None:
        raise UsageError("which save is to be removed is not said", "modelcache rm --store KEY; modelcache ls --store lists the keys")
    wanted = _reference(meant.text or meant.store or "")
    store = meant.store if meant.text is not None and meant.store else wanted.get("store")
    cli_daemon.client(asked, show).call("delete", DeleteReference(wanted["key"], store))
    show.data({"removed": wanted["key"]}, [])
    show.word("removed %s: nobody can load it any more" % wanted["key"])
    return OK


def flush(asked: argparse.Namespace, show: Show) -> int:
    cli_daemon.lead_sdk(asked, show)
    pending: List[str] = []
    error = ""
    try:
        flushing.flush(asked.deadline, everything=True)
    except SavesPendingError as late:
        pending, error = late.data["pending"], late.data["error"]
    show.data({"pending": pending, "error": error}, pending)
    if not pending:
        show.word("everything is in the store")
        return OK
    is_or_are = "is" if len(pending) == 1 else "are"
    late_words = "%s %s not in the store yet%s" % (count(len(pending), "save"), is_or_are, ": " + error if error else "")
    return Show(False, False).fail(SavesPendingError(late_words, "safe on this node, and the daemon goes on: modelcache status"))


def gc_store(asked: argparse.Namespace, show: Show) -> int:
    connected = cli_daemon.client(asked, show)
    with show.progress("gc-store") as reporter:
        said = connected.call("gc_store", GcStore(asked.dry_run, asked.alone, asked.store), reporter)
    show.data(said, said["keys"])
    gone, kept = said["deleted"], said["kept"]
    show.word("%s %s" % ("would delete" if said["dry_run"] else "deleted", _tally(gone)))
    show.word("kept %s" % _tally(kept))
    for found in said["findings"]:
        show.warn("%s: %s" % (found["key"], found["problem"]))
    if said["findings"]:
        show.word("hint: what is gone can't be loaded; modelcache rm --store KEY takes such a reference away")
        return DAMAGED
    return OK


def _tally(kinds: Dict[str, Dict[str, int]]) -> str:
    """ "1.2 GB: 3 blobs, 1 tree"."""
    one = {"blobs": "blob", "trees": "tree", "references": "reference", "pending": "save that never came", "repos": "record of repos"}
    many = {"pending": "saves that never came", "repos": "records of repos"}
    counts = [(each["objects"], kind) for kind, each in kinds.items() if each["objects"]]
    words = ["%d %s" % (number, one[kind] if number == 1 else many.get(kind, kind)) for number, kind in counts]
    return "%s: %s" % (size(sum(each["bytes"] for each in kinds.values())), ", ".join(words)) if words else "nothing"


def _meant(asked: argparse.Namespace) -> _Meant:
    """`--store` may have an URL. What follows it without being one is what the command is about."""
    given: str = asked.store
    if given and "://" not in given:
        if asked.repo is not None:
            raise UsageError("%s is no store" % given, "file:///path or s3://bucket/prefix; without an URL it is the daemon's own")
        return _Meant(given, None)
    return _Meant(asked.repo, given or None)


def _reference(text: str) -> Dict[str, Any]:
    """A key, or the URL that a reference has."""
    try:
        return artifacts.as_reference(text)
    except IncompatibleReferenceError as error:
        raise UsageError(error.message, "a key is what modelcache save printed; modelcache ls --store lists them") from error


def _created(reference: Dict[str, Any]) -> str:
    try:
        return ago(datetime.fromisoformat(reference["created_on"]).timestamp())
    except (KeyError, TypeError, ValueError):  # somebody else wrote it
        return "-"
