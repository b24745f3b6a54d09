"""Room on this node: `pin`, `unpin`, `evict`, `explain`; and the pin that `pull` leaves."""

from __future__ import annotations

import argparse
import os
import time
from typing import Any, Dict, List, Optional

from . import cli_daemon, tokens
from .cli_repos import Named, ago, named
from .cli_show import NOT_FOUND, OK, Show, UsageError, columns, count, seconds, size
from .client import Client
from .errors import DaemonError
from .protocol import Evict, Explain, Fetch, Pin, Pins, Unpin

PULLED_SECONDS = 24 * 3600.0
_KIND_WORDS = {
    "lease": "in use by",
    "pin": "pinned by",
    "spool": "on its way to the store, saved by",
    "flight": "being fetched",
    "grace": "used a moment ago",
}
_AGAIN_WORDS = {"store": "the store", "hub": "the hub", "": "nowhere: it is never evicted"}


def pin(asked: argparse.Namespace, show: Show) -> int:
    connected = cli_daemon.client(asked, show)
    if asked.list:
        if asked.what is not None:
            raise UsageError("--list lists all pins", "modelcache pin --list; modelcache explain %s" % asked.what)
        return _list(connected, show)
    if asked.what is None:
        raise UsageError("what is to be pinned is not said", "modelcache pin REPO, modelcache pin KEY, or modelcache pin --list")
    request = Pin(**_meant(asked), name=asked.name, seconds=asked.duration)
    pinned = connected.call("pin", request)
    show.data(pinned, [pinned["name"]])
    until = "until it is unpinned" if pinned["expires"] is None else "for %s" % seconds(pinned["expires"] - time.time())
    show.word("pinned %s (%s), %s" % (pinned["what"], count(len(pinned["trees"]), "set") + " of files", until))
    return OK


def keep_for_a_day(connected: Client, wanted: Named, request: Fetch, tree: str) -> None:
    """What was pulled is wanted soon by somebody who does not run yet."""
    name = "pulled %s@%s" % (wanted.repo_id if wanted.repo_type == "model" else wanted.repo_type + "s/" + wanted.repo_id, request.revision)
    pinned = Pin(wanted.repo_id, wanted.repo_type, None, request.endpoint, trees=[tree], name=name[:200], seconds=PULLED_SECONDS)
    try:
        connected.call("pin", pinned)
    except DaemonError:  # an older daemon knows no pins; the files are here all the same
        return


def unpin(asked: argparse.Namespace, show: Show) -> int:
    cli_daemon.client(asked, show).call("unpin", Unpin(asked.name))
    show.data({"name": asked.name}, [])
    show.word("unpinned %s" % asked.name)
    return OK


def _list(connected: Client, show: Show) -> int:
    pins: List[Dict[str, Any]] = connected.call("pins", Pins())["pins"]
    if not pins and not show.as_json:
        show.word("nothing is pinned")
        return OK
    rows = [[each["name"], each["what"], str(each["uid"]), ago(each["created"]), _until(each["expires"])] for each in pins]
    show.table({"pins": pins}, ["NAME", "WHAT", "UID", "SINCE", "LEFT"], rows, ())
    return OK


def evict(asked: argparse.Namespace, show: Show) -> int:
    said = cli_daemon.client(asked, show).call("evict", Evict(asked.to, asked.dry_run))
    heads = ["FREES", "USED", "AGAIN FROM", "WHAT"]
    rows = [[size(each["frees_bytes"]), ago(each["last_used"]), each["again"], each["what"] or each["tree"]] for each in said["victims"]]
    if rows or show.as_json:
        show.table(said, heads, rows, ("FREES",))
    verb = "would free" if asked.dry_run else "freed"
    leftovers = " and %s" % count(said["leftovers"], "leftover") if said["leftovers"] else ""
    show.word("%s %s of %s: %s%s" % (verb, size(said["freed_bytes"]), size(said["used_bytes"]), count(len(rows), "tree"), leftovers))
    return OK


def explain(asked: argparse.Namespace, show: Show) -> int:
    trees: List[Dict[str, Any]] = cli_daemon.client(asked, show).call("explain", Explain(**_meant(asked, paths=True)))["trees"]
    if not trees:
        return NOT_FOUND
    lines: List[str] = []
    for each in trees:
        lines += [""] if lines else []
        lines += columns(
            [
                ("what", each["what"] or each["tree"]),
                ("path", each["path"]),
                ("size", "%s in %s" % (size(each["size_bytes"]), count(each["files"], "file"))),
                ("used", ago(each["last_used"])),
                ("held", "by nobody: it goes when room is needed" if not each["held"] else _holder(each["held"][0])),
                *[("", _holder(holder)) for holder in each["held"][1:]],
                ("evicting frees", size(each["frees_bytes"])),
                ("again from", _AGAIN_WORDS.get(each["again"], each["again"])),
            ]
        )
    show.data({"trees": trees}, lines)
    return OK


def _holder(held: Dict[str, Any]) -> str:
    words = [_KIND_WORDS.get(held["kind"], held["kind"]), held["who"]]
    if held["name"]:
        words.append("(%s)" % held["name"])
    if held["since"]:
        words.append("since %s" % ago(held["since"]))
    if held["until"] is not None:
        words.append("for %s more" % seconds(max(0.0, held["until"] - time.time())))
    return " ".join(word for word in words if word)


def _until(expires: Optional[float]) -> str:
    return "until unpin" if expires is None else seconds(max(0.0, expires - time.time()))


def _meant(asked: argparse.Namespace, paths: bool = False) -> Dict[str, Any]:
    """A repo, a key, or a path, as somebody typed it. Keys have more than one slash, and so have addresses."""
    what: str = asked.what
    if paths and (what.startswith(("/", "./", "../", "~")) or os.path.lexists(what)):
        return {"path": os.path.realpath(os.path.expanduser(what))}
    plain = what.partition("@")[0]
    if "://" in what or plain.count("/") > 2 or (plain.count("/") == 2 and not plain.startswith(("datasets/", "spaces/"))):
        from .artifacts import as_reference

        return {"key": as_reference(what)["key"]}
    wanted = named(what, asked)
    return {"repo_id": wanted.repo_id, "repo_type": wanted.repo_type, "revision": wanted.revision, "endpoint": tokens.endpoint()}
