"""A daemon without a hub: obeys the wire, shows views of repos that a test gave it, and misbehaves when told to.

Real where the SDK can tell the difference: a Unix socket, passed descriptors, locked lease files, folders that lie where it
says. Every request runs in a thread of its own, so an answer may wait for an event of the test.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import fnmatch
import hashlib
import json
import os
import queue
import socket
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Self

from modelcache.codes import ERROR_CODES
from modelcache.protocol import PROTOCOL_VERSION

WAIT_SECONDS = 10.0
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Request:
    """One request; `is_cancelled` is set when its caller has left."""

    def __init__(self, peer: Peer, message: dict[str, Any], descriptors: list[int]) -> None:
        self.peer = peer
        self.id: int = message["id"]
        self.method: str = message["method"]
        self.params: dict[str, Any] = message["params"]
        self.descriptors = descriptors  # what came with it; closed when the answer is out
        self.is_cancelled = threading.Event()

    def reply(self, result: Any, descriptors: Iterable[int] = ()) -> None:
        """Passes the descriptors on and closes them here, as the daemon does."""
        descriptors = list(descriptors)
        fds = {"fds": len(descriptors)} if descriptors else {}
        self.peer.running.pop(self.id, None)
        with self.peer.replying:
            self.peer.send({"jsonrpc": "2.0", "id": self.id, "result": result, **fds}, descriptors)
            for descriptor in descriptors:
                os.close(descriptor)

    def error(self, name: str, message: str = "no", hint: str = "do not", **data: Any) -> None:
        self.peer.running.pop(self.id, None)
        body = {"code": ERROR_CODES[name], "message": message, "data": {"name": name, "hint": hint, **data}}
        self.peer.send({"jsonrpc": "2.0", "id": self.id, "error": body})

    def progress(self, **fields: Any) -> None:
        self.peer.send({"jsonrpc": "2.0", "method": "progress", "params": {"id": self.id, **fields}})


class Peer:
    """One connected client."""

    def __init__(self, daemon: FakeDaemon, connected: socket.socket) -> None:
        self._daemon = daemon
        self._socket = connected
        self._sending = threading.Lock()
        self.replying = threading.Lock()  # free again when the fake's own copies of what it passed are closed
        self.running: dict[int, Request] = {}

    def send(self, message: dict[str, Any], descriptors: Iterable[int] = ()) -> None:
        self.send_raw(json.dumps(message).encode() + b"\n", descriptors)

    def send_raw(self, data: bytes, descriptors: Iterable[int] = ()) -> None:
        rights = array.array("i", descriptors)
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)] if rights else []
        with self._sending, contextlib.suppress(OSError):
            sent = self._socket.sendmsg([data], ancillary)
            self._socket.sendall(data[sent:])

    def serve(self) -> None:
        buffer = b""
        arrived: list[int] = []
        with contextlib.suppress(OSError):
            while True:
                data, ancillary, _, _ = self._socket.recvmsg(1 << 16, socket.CMSG_SPACE(64 * 4), socket.MSG_CMSG_CLOEXEC)
                for _, _, rights in ancillary:
                    arrived.extend(array.array("i", rights))
                if not data:
                    break
                *lines, buffer = (buffer + data).split(b"\n")
                for line in lines:
                    message = json.loads(line)
                    count = message.get("fds", 0)
                    self._take(message, arrived[:count])
                    del arrived[:count]
        for request in list(self.running.values()):
            request.is_cancelled.set()
        self._socket.close()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def _take(self, message: dict[str, Any], descriptors: list[int]) -> None:
        if message["method"] == "cancel":
            if request := self.running.get(message["params"]["id"]):
                request.is_cancelled.set()
                self._daemon.cancelled.put(request)
            return
        request = Request(self, message, descriptors)
        self.running[request.id] = request
        if message["method"] != "hello":
            self._daemon.requests.put(request)
        self._daemon.spawn(self._answer, request)

    def _answer(self, request: Request) -> None:
        try:
            self._daemon.answers[request.method](request)
        finally:
            for descriptor in request.descriptors:
                os.close(descriptor)


class FakeDaemon:
    def __init__(self, folder: Path) -> None:
        self.socket_path = folder / "fake.sock"
        self.root = folder / "root"
        self.repos: dict[str, Mapping[str, bytes]] = {}
        self.answers: dict[str, Callable[[Request], None]] = {"hello": self.hello, "fetch": self.fetch, "plan": self.plan}
        self.requests: queue.Queue[Request] = queue.Queue()  # every one but hello, as it comes
        self.cancelled: queue.Queue[Request] = queue.Queue()
        self._threads: list[threading.Thread] = []
        self._peers: list[Peer] = []
        self._listener: socket.socket | None = None

    # ---- its life

    def start(self) -> Self:
        self.socket_path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(self.socket_path))
        listener.listen(128)
        self._listener = listener
        self.spawn(self._accept, listener)
        return self

    def stop(self) -> None:
        """Ends as a killed daemon does: the connections break, the socket's name stays."""
        if self._listener is not None:
            self._listener.shutdown(socket.SHUT_RDWR)
        for peer in self._peers:
            peer.close()
        for thread in list(self._threads):
            thread.join(WAIT_SECONDS)
            assert not thread.is_alive(), thread
        if self._listener is not None:
            self._listener.close()
        self._listener, self._peers, self._threads = None, [], []

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def next_request(self) -> Request:
        return self.requests.get(timeout=WAIT_SECONDS)

    @property
    def connections(self) -> int:
        return len(self._peers)

    def spawn(self, target: Callable[..., None], *arguments: Any) -> None:
        thread = threading.Thread(target=target, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connected, _ = listener.accept()
            except OSError:
                return
            peer = Peer(self, connected)
            self._peers.append(peer)
            self.spawn(peer.serve)

    # ---- what it answers

    def hello(self, request: Request) -> None:
        request.reply(
            {
                "protocol": PROTOCOL_VERSION,
                "version": "0",
                "root": str(self.root),
                "endpoint": "http://hub.invalid",
                "private": False,
                "pid": os.getpid(),
                "of_a_newer_daemon": 1,
            }
        )

    def fetch(self, request: Request) -> None:
        found = self._find(request)
        if found is None:
            return
        tree, view = self.show(found)
        leased = tree not in request.params.get("held", [])
        descriptors = [self.grant(tree)] if leased else []
        if request.params.get("listing"):
            descriptors.append(in_memory(json.dumps(listing(self.repos[request.params["repo_id"]])).encode()))
        request.reply(self.reply_for(tree, view, found, leased), descriptors)

    def plan(self, request: Request) -> None:
        found = self._find(request)
        if found is not None:
            request.reply({"commit": COMMIT, "tree": None, "files": [[path, len(content), False] for path, content in found.items()]})

    def reply_for(self, tree: str, view: Path, files: Mapping[str, bytes], leased: bool) -> dict[str, Any]:
        status = view.stat()
        return {
            "path": str(view),
            "device": status.st_dev,
            "inode": status.st_ino,
            "tree": tree,
            "commit": COMMIT,
            "files": len(files),
            "size_bytes": sum(map(len, files.values())),
            "hub_bytes": 0,
            "seconds": 0.0,
            "leased": leased,
            "warnings": [],
        }

    def show(self, files: Mapping[str, bytes]) -> tuple[str, Path]:
        """The tree's id and its view, which is made if need be."""
        tree = hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest()
        view = self.root / "views" / tree
        view.mkdir(parents=True, exist_ok=True)
        for path, content in files.items():
            file = view / path
            if not file.exists():
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(content)
                file.chmod(0o555 if path.endswith(".sh") else 0o444)
        return tree, view

    def grant(self, tree: str) -> int:
        folder = self.root / "leases" / tree
        folder.mkdir(parents=True, exist_ok=True)
        lease = os.open(folder / os.urandom(4).hex(), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
        fcntl.flock(lease, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return lease

    def leases(self, tree: str) -> int:
        """How many leases clients hold, as the daemon would find out."""
        for peer in self._peers:
            with peer.replying:
                pass
        folder = self.root / "leases" / tree
        return sum(map(is_locked, folder.iterdir())) if folder.exists() else 0

    def _find(self, request: Request) -> dict[str, bytes] | None:
        params = request.params
        repo = self.repos.get(params["repo_id"])
        if repo is None:
            request.error("repo_not_found", f"no repo {params['repo_id']}")
        elif (name := params.get("filename")) is not None:
            if name in repo:
                return {name: repo[name]}
            request.error("entry_not_found", f"no file {name}")
        else:
            return {path: content for path, content in repo.items() if _is_wanted(path, params)}
        return None


def listing(files: Mapping[str, bytes]) -> dict[str, Any]:
    """The commit's listing; what has a dot and "safetensors" in its name is kept as LFS."""
    rows = []
    for path, content in files.items():
        oid = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        lfs = hashlib.sha256(content).hexdigest() if path.endswith(".safetensors") else None
        rows.append([path, len(content), oid, lfs, None])
    return {"commit": COMMIT, "files": rows}


def is_locked(path: Path) -> bool:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)


def in_memory(content: bytes) -> int:
    descriptor = os.memfd_create("fake")
    os.write(descriptor, content)  # the offset stays at the end: nobody may count on it
    return descriptor


def _is_wanted(path: str, params: dict[str, Any]) -> bool:
    allow, ignore = params.get("allow_patterns"), params.get("ignore_patterns")
    return (allow is None or any(fnmatch.fnmatch(path, each) for each in allow)) and not any(
        fnmatch.fnmatch(path, each) for each in ignore or []
    )
