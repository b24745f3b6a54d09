"""The daemon, as seen from a command: where it should listen, whether it does, how it is doing. `status` starts none."""

from __future__ import annotations

import argparse
import atexit
import errno
import os
import sys
import time
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

from . import __version__, runtime
from .cli_show import OK, Show, columns, count, seconds, size
from .client import Client
from .errors import DaemonNotAvailableError
from .protocol import PROTOCOL_VERSION

NODES = "the node's"


class Place(NamedTuple):
    path: str
    origin: str  # who says that it is there
    may_start: bool  # the SDK starts a private daemon there


def place(asked: argparse.Namespace) -> Place:
    """Where the SDK looks for the daemon."""
    if asked.socket:
        return Place(os.path.abspath(asked.socket), "--socket", False)
    named = runtime.named_socket()
    if named:
        return Place(named, "MODELCACHE_SOCKET", False)
    if os.path.exists(runtime.NODE_SOCKET):
        return Place(runtime.NODE_SOCKET, NODES, False)
    return Place(runtime.user_socket(), "yours", True)


def probe(path: str) -> Optional[OSError]:
    """None when somebody listens there; otherwise what the kernel says."""
    import socket
    import stat

    with socket.socket(socket.AF_UNIX) as trial:
        trial.setblocking(False)
        try:
            if not stat.S_ISSOCK(os.stat(path).st_mode):
                return OSError(errno.ENOTSOCK, "not a socket")
            runtime.with_short_name(path, trial.connect)
        except BlockingIOError:  # its queue is full: somebody is there
            return None
        except OSError as error:
            return error
    return None


def client(asked: argparse.Namespace, show: Show) -> Client:
    """For commands that may wait for the daemon, or start one."""
    at = _expected(asked, show)
    return _closing(Client(at.path if asked.socket else None))


def lead_sdk(asked: argparse.Namespace, show: Show) -> None:
    """For commands that are the SDK's own functions: they ask the same daemon as `client`, and speak as a command does."""
    import logging

    from . import progress

    class Warnings(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            show.warn(record.getMessage())

    at = _expected(asked, show)
    if asked.socket:
        os.environ["MODELCACHE_SOCKET"] = at.path
    progress.draw_with(show.progress)
    logging.getLogger("modelcache").addHandler(Warnings())


def _expected(asked: argparse.Namespace, show: Show) -> Place:
    """Where a daemon is, or will be."""
    at = place(asked)
    failure = None if at.may_start else probe(at.path)
    if failure is not None:
        # A socket that is not there is most likely a wrong path, unless somebody says how long to wait for it.
        is_awaited = isinstance(failure, FileNotFoundError) and "MODELCACHE_CONNECT_SECONDS" in os.environ
        if not is_awaited and not isinstance(failure, ConnectionRefusedError):
            raise refusal(at, failure)
        show.word("no daemon listens at %s, waiting for it" % at.path)
    return at


def running_client(asked: argparse.Namespace) -> Client:
    """For commands that only look: DaemonNotAvailableError when none runs, at once."""
    at = place(asked)
    failure = probe(at.path)
    if failure is not None:
        raise refusal(at, failure)
    return _closing(Client(at.path))


def _closing(made: Client) -> Client:
    """Ends its connection when the command ends: left to the interpreter's last steps, Python may complain."""
    atexit.register(made.close)
    return made


def refusal(at: Place, failure: OSError) -> DaemonNotAvailableError:
    """Why nobody can be asked there, and what to do about it."""
    reason = failure.strerror or str(failure)
    where = "%s (%s)" % (at.path, at.origin)
    if isinstance(failure, PermissionError):
        refused = DaemonNotAvailableError(
            "uid %d may not use %s: %s" % (os.geteuid(), where, reason), "its folders need x and the socket rw for this user"
        )
        refused.__cause__ = failure  # not permitted, which is something else than not there
        return refused
    if at.may_start:
        return DaemonNotAvailableError("no daemon runs", "one of your own is started when it is needed: modelcache pull REPO")
    if at.origin == NODES:
        return DaemonNotAvailableError("no daemon listens at %s: %s" % (where, reason), "systemctl start modelcached")
    return DaemonNotAvailableError(
        "no daemon listens at %s: %s" % (where, reason),
        "check that path, or leave it away to find the node's daemon or your own; one is started there by: modelcached serve --socket %s"
        % at.path,
    )


def status(asked: argparse.Namespace, show: Show) -> int:
    connected = running_client(asked)
    said = connected.call("status")
    said["socket"] = place(asked).path
    show.data(said, columns(_lines(said)))
    return OK


def version(show: Show) -> int:
    python = "%d.%d.%d" % sys.version_info[:3]
    known = {"version": __version__, "protocol": PROTOCOL_VERSION, "python": python}
    show.data(known, ["modelcache %s (protocol %d, Python %s)" % (__version__, PROTOCOL_VERSION, python)])
    return OK


def _lines(said: Dict[str, Any]) -> List[Tuple[str, str]]:
    disk, hub, fetches, flights = said["disk"], said["hub"], said["fetches"], said["blob_flights"]
    kind = "private daemon" if said["private"] else "daemon"
    lines = [
        (kind, "%s, pid %d, up %s" % (said["version"], said["pid"], seconds(max(0.0, time.time() - said["started"])))),
        ("socket", said["socket"]),
        ("root", said["root"]),
        ("disk", "%s of %s free, %s stay free" % (size(disk["free_bytes"]), size(disk["size_bytes"]), size(disk["min_free_bytes"]))),
        ("cache", _room(said["room"])),
        ("hub", said["endpoint"]),
        ("from hub", "%s in %s, %s" % (size(hub["bytes"]), count(hub["requests"], "request"), count(hub["pauses"], "pause"))),
        ("damaged", "%d from the hub, %d on disk (in quarantine)" % (hub["mismatches"], said["quarantined"])),
        ("fetches", "%d running, %d so far, %d joined another" % (fetches["running"], fetches["started"], fetches["joined"])),
        ("files", "%d being fetched, %d so far, %d joined another" % (flights["running"], flights["started"], flights["joined"])),
        ("handed out", "%s from disk, the store, the hub" % _tiers(fetches["tiers"])),
        ("loaded", "%s from disk, the store" % _tiers(said["loads"])),
        ("leases", "%d, and %s" % (said["leases"], count(said["room"]["pins"], "pin"))),
        ("clients", "%s, %s running" % (count(said["connections"], "connection"), count(said["requests"], "request"))),
        ("limits", ", ".join("%s %s/s" % (name[:-5], size(rate)) for name, rate in said["rates"].items() if rate) or "none"),
        ("store", said["store"]),
        ("to store", "%s in %s so far" % (size(said["spool"]["sent_bytes"]), count(said["spool"]["sent_saves"], "save"))),
    ]
    watches = [("watching", _watch_line(watch)) for watch in said.get("watches", ())]
    return lines + _spool_lines(said["spool"]) + watches


def _watch_line(watch: Dict[str, Any]) -> str:
    line = "%s as %s, by %s: %s captured" % (watch["directory"], watch["name"], watch["where"], count(watch["captured"], "checkpoint"))
    return line + ("; " + watch["last_error"] if watch["last_error"] else "")


def _room(room: Dict[str, Any]) -> str:
    most = size(room["max_size_bytes"]) if room["max_size_bytes"] else "all there is"
    evicted = "%s evicted so far, %s" % (count(room["evictions"], "tree"), size(room["evicted_bytes"]))
    return "%s of at most %s; %s; %s" % (size(room["used_bytes"]), most, evicted, count(room["refusals"], "refusal"))


def _tiers(counts: Dict[str, int]) -> str:
    return " + ".join(str(counts[tier]) for tier in ("disk", "store", "hub") if tier in counts)


def _spool_lines(spool: Dict[str, Any]) -> List[Tuple[str, str]]:
    """What is not in the store yet, and why."""
    waiting = "empty"
    if spool["saves"]:
        waiting = "%s, %s, the oldest for %s" % (count(spool["saves"], "save"), size(spool["size_bytes"]), seconds(spool["oldest_seconds"]))
    lines = [("spool", waiting)]
    if spool["last_error"]:
        lines.append(("last error", spool["last_error"]))
    if spool["corrupt"]:
        lines.append(("unreadable", "%s in spool/corrupt: %s" % (count(len(spool["corrupt"]), "save"), ", ".join(spool["corrupt"]))))
    return lines
