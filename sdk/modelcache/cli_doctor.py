"""`modelcache doctor`: everything between a task and its files, one after the other, each with what mends it.

It starts no daemon and downloads nothing; the hub is asked, by the daemon, for a repo that does not exist.
"""

from __future__ import annotations

import argparse
import os
import time
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Tuple

from . import __version__, cli_daemon, runtime, tokens
from .cli_show import FAILED, OK, Show, size
from .client import Client
from .errors import (
    DaemonNotAvailableError,
    HubUnavailableError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    ModelcacheError,
    NotPermittedError,
    RepositoryNotFoundError,
    TokenRefusedError,
)
from .protocol import PROTOCOL_VERSION, Fetch, HelloReply, List_, References

FINE, NOTE, WRONG = "ok", "note", "wrong"
_NO_SUCH_REPO = "modelcache-doctor/no-such-repo"
_NO_SUCH_KEY = "mf.models/modelcache-doctor/no-such-key"
_LATE_SECONDS = 600


class Finding(NamedTuple):
    check: str
    state: str
    message: str
    hint: str = ""


def examine(asked: argparse.Namespace, show: Show) -> int:
    found: List[Finding] = []
    for finding in _examine(asked, show):
        found.append(finding)
        if not show.as_json:
            print("%-5s  %-7s  %s" % (finding.state, finding.check, finding.message), flush=True)
            if finding.hint:
                print("                hint: %s" % finding.hint)
    wrong = sum(finding.state == WRONG for finding in found)
    show.data({"findings": [finding._asdict() for finding in found]}, [])
    show.word("%d of %d checks found something wrong" % (wrong, len(found)) if wrong else "nothing is wrong")
    return FAILED if wrong else OK


def _examine(asked: argparse.Namespace, show: Show) -> Iterator[Finding]:
    yield _clock()
    token, finding = _token(asked)
    yield finding
    yield from _variables()
    at = cli_daemon.place(asked)
    failure = cli_daemon.probe(at.path)
    yield _socket(at, failure)
    if failure is None:
        try:
            connected = Client(at.path)
            hello = connected.hello()
            status = connected.call("status")
        except ModelcacheError as error:
            yield Finding("daemon", WRONG, error.message, error.hint or "look at its log: journalctl -u modelcached")
            return
        yield _daemon(hello)
        yield from _root(hello, connected)
        yield _rights(hello, status)
        yield from _features(status["features"], hello)
        yield _disk(status["disk"], status["room"])
        yield from _spool(status)
        show.word("asking the store ...")
        yield _store(connected, status)
        show.word("asking the hub ...")
        yield _hub(connected, hello, token)


def _socket(at: cli_daemon.Place, failure: Optional[OSError]) -> Finding:
    if failure is None:
        return Finding("socket", FINE, "a daemon listens at %s (%s)" % (at.path, at.origin))
    if not at.may_start or isinstance(failure, PermissionError):
        refused = cli_daemon.refusal(at, failure)
        return Finding("socket", WRONG, refused.message, refused.hint)
    from . import launcher

    try:
        runtime.check_folder(os.path.dirname(at.path))
        launcher.refuse_if_impossible()
    except (DaemonNotAvailableError, NotPermittedError) as error:
        return Finding("socket", WRONG, error.message, error.hint)
    return Finding(
        "socket", NOTE, "no daemon runs; one of your own is started when it is needed", "modelcache ls starts it; then ask again"
    )


def _daemon(hello: HelloReply) -> Finding:
    kind = "private daemon" if hello.private else "daemon"
    what = "%s %s, protocol %d, pid %d" % (kind, hello.version, hello.protocol, hello.pid)
    if hello.protocol < PROTOCOL_VERSION:
        return Finding("daemon", WRONG, "%s is older than this client (protocol %d)" % (what, PROTOCOL_VERSION), "upgrade the daemon first")
    if hello.version != __version__:
        return Finding("daemon", NOTE, "%s; this client is %s" % (what, __version__))
    return Finding("daemon", FINE, what)


def _root(hello: HelloReply, connected: Client) -> Iterator[Finding]:
    views = os.path.join(hello.root, "views")
    mount = "mount %s at the same place, read-only: docker run -v %s:%s:ro ..." % ((hello.root,) * 3)
    try:
        found = os.statvfs(views)
    except OSError as error:
        yield Finding("root", WRONG, "the daemon's %s is not here: %s" % (hello.root, error.strerror), mount)
        return
    entries = connected.call("ls", List_())["repos"]
    if entries and not any(_is_here(entry["path"]) for entry in entries):
        yield Finding("root", WRONG, "%s is another folder here than for the daemon" % hello.root, mount)
        return
    is_read_only = bool(found.f_flag & os.ST_RDONLY)
    yield Finding("root", FINE, "%s on %s%s" % (hello.root, _filesystem(views), ", mounted read-only" if is_read_only else ""))
    if os.geteuid() == 0 and not is_read_only:
        hint = "mount it read-only into tasks, run them as another user, or take private files (--to, MODELCACHE_LOADED=private)"
        yield Finding("views", NOTE, "root can write through the shared files, and must not", hint)


def _is_here(path: str) -> bool:
    try:
        os.stat(path)
    except PermissionError:  # somebody else's private repo: it is there
        return True
    except OSError:
        return False
    return True


def _disk(disk: Dict[str, Any], room: Dict[str, Any]) -> Finding:
    free, keep, most = disk["free_bytes"], disk["min_free_bytes"] + room["checkpoint_reserve_bytes"], room["max_size_bytes"]
    what = "%s of %s free, downloads leave %s of it" % (size(free), size(disk["size_bytes"]), size(keep))
    hint = "modelcache evict --dry-run tells what could go, modelcache explain who holds the rest; or give the cache more room"
    if free + room["used_bytes"] <= keep:
        return Finding("disk", WRONG, what + ": no download can start", "make room on it, or lower min_free or checkpoint_reserve")
    if free <= keep:
        return Finding("disk", NOTE, what + ": something has to go before one can start", hint)
    if most and room["used_bytes"] >= most:
        return Finding("disk", NOTE, "the cache has all of its %s (max_size): something has to go before a download" % size(most), hint)
    return Finding("disk", FINE, what)


def _rights(hello: HelloReply, status: Dict[str, Any]) -> Finding:
    """What this user may do here; who may not even connect has been told so before."""
    uid = os.geteuid()
    if hello.private or uid in (0, status["uid"]):
        return Finding("rights", FINE, "uid %d may do everything with this daemon" % uid)
    what = "uid %d may fetch, save and load; only root and uid %d may remove, verify, evict and import"
    return Finding("rights", FINE, what % (uid, status["uid"]))


def _features(features: Dict[str, Any], hello: HelloReply) -> Iterator[Finding]:
    kind = features["filesystem"]
    if "reflinks" not in features:
        yield Finding("copies", NOTE, "the disk was full when the daemon started: what else this %s can do is not known" % kind)
        return
    if features["reflinks"]:
        yield Finding("copies", FINE, "private copies and saves share their blocks on this %s" % kind)
    else:
        hint = "put the root on xfs (reflink=1) or btrfs where private copies and checkpoints are large"
        yield Finding("copies", NOTE, "%s shares no blocks: private copies and saves take time and room" % kind, hint)
    if features["acls"]:
        yield Finding("privacy", FINE, "private repos are closed to all but those the hub accepts")
    elif not hello.private:
        hint = "mount it with ACLs (ext4, xfs, btrfs and tmpfs have them), or let users run private daemons"
        yield Finding("privacy", NOTE, "%s keeps no ACLs: private repos are refused to all but root and the daemon's user" % kind, hint)


def _spool(status: Dict[str, Any]) -> Iterator[Finding]:
    spool, hanging = status["spool"], status["captures"]["hanging"]
    waiting = "%d saves wait for the store, the oldest for %d s" % (spool["saves"], spool["oldest_seconds"])
    if spool["corrupt"]:
        hint = "look at them in %s/spool/corrupt, and at the disk they lay on" % status["root"]
        yield Finding("spool", WRONG, "%d saves can't be read and were set aside" % len(spool["corrupt"]), hint)
    elif spool["last_error"]:
        yield Finding("spool", WRONG, "%s: %s" % (waiting, spool["last_error"]), "mend the store; it is tried again by itself")
    elif spool["saves"] and spool["oldest_seconds"] > _LATE_SECONDS:
        yield Finding("spool", NOTE, waiting, "a slow store, or a low store_rate; modelcache top shows how fast it goes")
    else:
        yield Finding("spool", FINE, waiting if spool["saves"] else "everything saved here is in its store")
    if hanging:
        hint = "look at the mounts that tasks save from: is their server there?"
        yield Finding("captures", WRONG, "%d files that tasks save do not answer" % hanging, hint)


def _store(connected: Client, status: Dict[str, Any]) -> Finding:
    """Its clock too: an S3 server refuses what comes from another time."""
    start = time.monotonic()
    try:
        connected.call("references", References(prefix=_NO_SUCH_KEY, limit=1))
    except ModelcacheError as error:
        return Finding("store", WRONG, error.message, error.hint or "look at the daemon's log, and at the store's address in its config")
    return Finding("store", FINE, "%s answers in %.0f ms" % (status["store"], 1000 * (time.monotonic() - start)))


def _hub(connected: Client, hello: HelloReply, token: Optional[str]) -> Finding:
    endpoint = tokens.endpoint()
    asked = endpoint or hello.endpoint
    if tokens.is_offline():
        return Finding("hub", NOTE, "not asked: HF_HUB_OFFLINE is set", "unset it to fetch what is not here yet")
    try:
        connected.plan(Fetch(repo_id=_NO_SUCH_REPO, endpoint=endpoint, token=token))
    except TokenRefusedError as error:
        return Finding("hub", WRONG, "%s answers, and refuses your token" % asked, error.hint)
    except RepositoryNotFoundError:
        return Finding("hub", FINE, "%s answers%s" % (asked, " and accepts your token" if token else ""))
    except HubUnavailableError as error:
        return Finding("hub", WRONG, error.message, error.hint)
    except LocalEntryNotFoundError:
        return Finding("hub", NOTE, "not asked: the daemon is configured to be offline")
    except NotPermittedError as error:  # what may be asked for is this node's policy, and says nothing of the hub
        return Finding("hub", NOTE, "not asked: %s" % error.message, "fetch a small repo that this node allows: modelcache pull REPO")
    except ModelcacheError as error:
        return Finding("hub", WRONG, error.message, error.hint)
    return Finding("hub", WRONG, "%s has a repo %s, which nobody made" % (asked, _NO_SUCH_REPO), "is it a hub?")


def _token(asked: argparse.Namespace) -> Tuple[Optional[str], Finding]:
    """The caller's token, which is never printed, and what is to be said about it."""
    try:
        found = tokens.token_to_send(None)
    except (LocalTokenNotFoundError, OSError, ValueError) as error:
        hint = getattr(error, "hint", "") or "make %s readable for you alone, or set HF_TOKEN" % tokens.token_path()
        return None, Finding("token", WRONG, getattr(error, "message", None) or str(error), hint)
    if found is None:
        return None, Finding("token", FINE, "none: public repos only")
    in_environment = any(os.environ.get(name) for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"))
    return found, Finding("token", FINE, "found in %s" % ("the environment" if in_environment else tokens.token_path()))


def _variables() -> Iterator[Finding]:
    mode = os.environ.get("MODELCACHE_LOADED")
    if mode not in (None, "", "private", "shared"):
        yield Finding("loaded", WRONG, "MODELCACHE_LOADED is %r" % mode, "it is 'private' or 'shared'")
    seconds = os.environ.get("MODELCACHE_CONNECT_SECONDS")
    if seconds and not seconds.replace(".", "", 1).isdigit():
        yield Finding("connect", WRONG, "MODELCACHE_CONNECT_SECONDS is %r" % seconds, "it is a number of seconds")


def _clock() -> Finding:
    now, made = time.time(), os.stat(__file__).st_mtime
    shown = time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(now))
    if now < made - 24 * 3600:
        return Finding("clock", WRONG, "%s: before this program was installed" % shown, "set it: the hub's certificates depend on it")
    return Finding("clock", FINE, shown)


def _filesystem(path: str) -> str:
    """The type of the filesystem that holds `path`, as this process sees it."""
    device = os.stat(path).st_dev
    wanted = "%d:%d" % (os.major(device), os.minor(device))
    best, kind = "", "an unknown filesystem"
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as mounts:
        for line in mounts:
            fields, _, rest = line.partition(" - ")
            _, _, number, _, point = fields.split(" ")[:5]
            if number == wanted or (path + "/").startswith(point.rstrip("/") + "/"):
                if len(point) >= len(best):
                    best, kind = point, rest.split(" ")[0]
    return kind
