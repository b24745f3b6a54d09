"""A daemon that keeps what it is given in memory: obeys the contract of saves, checks that the client does, and misbehaves when told to."""

from __future__ import annotations

import fcntl
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .fake_daemon import FakeDaemon, Request, is_locked


class Kept:
    """One save, open or closed."""

    def __init__(self, params: dict[str, Any], lock: Path) -> None:
        self.reference: dict[str, Any] = params["reference"]
        self.params = params
        self.lock = lock
        self.files: dict[str, bytes] = {}
        self.executable: set[str] = set()
        self.links: dict[str, str] = {}
        self.folders: list[str] = []
        self.messages: list[tuple[str, int, int]] = []  # method, files, bytes


class FakeKeeper(FakeDaemon):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.open: dict[str, Kept] = {}
        self.kept: dict[str, Kept] = {}  # by key
        self.dropped: list[Kept] = []
        self.changed: Callable[[str, int], bool] = lambda path, descriptor: False  # what it says has changed while it copied
        self.running = 0  # messages with files that are not answered yet
        self.most_running = 0
        self._lock = threading.Lock()
        self.answers |= {
            "save_open": self.save_open,
            "save_files": self.save_files,
            "save_pack": self.save_pack,
            "save_links": self.save_links,
            "save_close": self.save_close,
            "references": self.references,
            "delete": self.delete,
            "flush": self.flush,
            "load": self.load,
        }

    def only(self) -> Kept:
        (kept,) = self.kept.values()
        return kept

    def save_open(self, request: Request) -> None:
        self.root.mkdir(exist_ok=True)
        name = os.urandom(6).hex()
        lock = self.root / f"{name}.alive"
        alive = os.open(lock, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(alive, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self.open[name] = Kept(request.params, lock)
        request.reply({"save": name}, [alive])

    def save_files(self, request: Request) -> None:
        kept = self._take(request)
        if kept is None:
            return
        changed = []
        for position, ((path, size, executable), descriptor) in enumerate(zip(request.params["files"], request.descriptors, strict=True)):
            found = os.fstat(descriptor)
            assert stat.S_ISREG(found.st_mode) and fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
            if found.st_size != size or self.changed(path, descriptor):
                changed.append(position)
            else:
                self._keep(kept, path, os.pread(descriptor, size, 0), executable)
        self._finish(request, {"changed": changed})

    def save_pack(self, request: Request) -> None:
        kept = self._take(request)
        if kept is None:
            return
        (descriptor,) = request.descriptors
        offset = 0
        assert fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
        assert os.fstat(descriptor).st_size == sum(size for _, size, _ in request.params["files"])
        for path, size, executable in request.params["files"]:
            self._keep(kept, path, os.pread(descriptor, size, offset), executable)
            offset += size
        self._finish(request, {"changed": []})

    def save_links(self, request: Request) -> None:
        kept = self.open[request.params["save"]]
        self._name(kept, request.params)
        request.reply({})

    def save_close(self, request: Request) -> None:
        name = request.params["save"]
        kept = self.open.pop(name, None)
        if kept is None:
            return request.error("save_unknown", f"no save {name} is open")
        assert is_locked(kept.lock), "the client has let go of the lock before the end"
        if request.params.get("drop"):
            self.dropped.append(kept)
            return request.reply({})
        self._name(kept, request.params)
        assert len(kept.files) == kept.params["files"] and sum(map(len, kept.files.values())) == kept.params["size_bytes"]
        self.complete(kept)
        return request.reply({"reference": kept.reference})

    def complete(self, kept: Kept) -> None:
        size = sum(map(len, kept.files.values()))
        kept.reference |= {"size": size, "files": len(kept.files), "created_on": "2025-01-01T00:00:00+00:00", "url": "file:///nowhere"}
        self.kept[kept.reference["key"]] = kept

    def references(self, request: Request) -> None:
        asked = request.params
        found = [kept.reference for key, kept in reversed(self.kept.items()) if key.startswith(asked.get("prefix", ""))]
        found = [each for each in found if asked.get("type") in (None, each["type"])]
        found = [each for each in found if asked.get("name") in (None, each.get("name"), each.get("label"))]
        request.reply({"references": found[: asked.get("limit", 10_000)]})

    def delete(self, request: Request) -> None:
        if self.kept.pop(request.params["key"], None) is None:
            return request.error("reference_not_found", f"no save has the key {request.params['key']}")
        return request.reply({})

    def flush(self, request: Request) -> None:
        request.reply({"pending": []})

    def load(self, request: Request) -> None:
        kept = self.kept.get(request.params["key"])
        if kept is None:
            return request.error("reference_not_found", f"no save has the key {request.params['key']}")
        tree, view = self.show(kept.files)
        for path in kept.executable:
            (view / path).chmod(0o555)
        for path, target in kept.links.items():
            if not (view / path).is_symlink():
                (view / path).symlink_to(target)
        for folder in kept.folders:
            (view / folder).mkdir(parents=True, exist_ok=True)
        leased = tree not in request.params.get("held", [])
        shown = self.reply_for(tree, view, kept.files, leased) | {"store_bytes": 0, "reference": kept.reference}
        return request.reply(shown, [self.grant(tree)] if leased else [])

    def _take(self, request: Request) -> Kept | None:
        with self._lock:
            self.running += 1
            self.most_running = max(self.most_running, self.running)
        kept = self.open.get(request.params["save"])
        if kept is None:
            request.error("save_unknown", f"no save {request.params['save']} is open")
            return None
        sizes = [size for _, size, _ in request.params["files"]]
        kept.messages.append((request.method, len(sizes), sum(sizes)))
        return kept

    def _finish(self, request: Request, result: dict[str, Any]) -> None:
        with self._lock:
            self.running -= 1
        request.reply(result)

    def _keep(self, kept: Kept, path: str, content: bytes, executable: bool) -> None:
        kept.files[path] = content
        (kept.executable.add if executable else kept.executable.discard)(path)

    def _name(self, kept: Kept, params: dict[str, Any]) -> None:
        kept.links |= dict(params.get("links", []))
        kept.folders += params.get("folders", [])
