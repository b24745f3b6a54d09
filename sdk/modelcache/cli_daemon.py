"""The daemon, as seen from a command: where it should listen, whether it does, how it is doing. `status` starts none."""

from __future__ import annotations

import argparse
import os
import sys
import time
from typing import Any, Dict, List, NamedTuple, Optional, Tuple

from . import __version__, runtime
from .cli_show import OK, Show, columns, count, seconds, size
from .client import Client
from .errors import DaemonNotAvailableError, unavailable
from .protocol import PROTOCOL_VERSION


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
        return Place(runtime.NODE_SOCKET, "the node's", False)
    return Place(runtime.user_socket(), "yours", True)


def probe(path: str) -> Optional[OSError]:
    """None when somebody listens there; otherwise what the kernel says."""
    import socket

    with socket.socket(socket.AF_UNIX) as trial:
        trial.setblocking(False)
        try:
            runtime.with_short_name(path, trial.connect)
        except BlockingIOError:  # its queue is full: somebody is there
            return None
        except OSError as error:
            return error
    return None


def client(asked: argparse.Namespace, show: Show) -> Client:
    """For commands that may wait for the daemon, or start one."""
    at = place(asked)
    if not at.may_start and isinstance(probe(at.path), ConnectionRefusedError):
        show.word("no daemon listens at %s, waiting for it" % at.path)
    return Client(at.path if asked.socket else None)


def running_client(asked: argparse.Namespace) -> Client:
    """For commands that only look: DaemonNotAvailableError when none runs, at once."""
    at = place(asked)
    failure = probe(at.path)
    if failure is None:
        return Client(at.path)
    reason = failure.strerror or str(failure)
    if isinstance(failure, PermissionError):
        raise DaemonNotAvailableError("uid %d may not use %s: %s" % (os.geteuid(), at.path, reason), "ask for access to it") from failure
    if at.may_start:
        from . import launcher

        launcher.refuse_if_impossible()
        raise DaemonNotAvailableError("no daemon runs", "one is started when it is needed: modelcache pull REPO")
    raise unavailable("no daemon listens at %s (%s): %s" % (at.path, at.origin, reason))


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
    return [
        (kind, "%s, pid %d, up %s" % (said["version"], said["pid"], seconds(max(0.0, time.time() - said["started"])))),
        ("socket", said["socket"]),
        ("root", said["root"]),
        ("disk", "%s of %s free, %s stay free" % (size(disk["free_bytes"]), size(disk["size_bytes"]), size(disk["min_free_bytes"]))),
        ("hub", said["endpoint"]),
        ("from hub", "%s in %s, %s" % (size(hub["bytes"]), count(hub["requests"], "request"), count(hub["pauses"], "pause"))),
        ("damaged", "%d from the hub, %d on disk (in quarantine)" % (hub["mismatches"], said["quarantined"])),
        ("fetches", "%d running, %d so far, %d joined another" % (fetches["running"], fetches["started"], fetches["joined"])),
        ("files", "%d being fetched, %d so far, %d joined another" % (flights["running"], flights["started"], flights["joined"])),
        ("leases", str(said["leases"])),
        ("clients", "%s, %s running" % (count(said["connections"], "connection"), count(said["requests"], "request"))),
    ]
