"""The spool: captured saves that are not in the store yet. Durable, one folder per save, drained by the uploader (I3).

    spool/<id>/entry.json         what was saved: reference, files and where their bytes are, links, folders; written last
    spool/<id>/files/<n>          large files; once hashed they are second names of blobs, so nothing is copied twice
    spool/<id>/packs/<n>          small files one after another, as the client sent them
    spool/<id>/tree               the tree's name, once everything is hashed
    spool/<id>/<sha256>.sending   how far a large blob is on its way to the store
    spool/corrupt/<id>            could not be read; kept, and reported

A save is put together in tmp/ and renamed into place: it is here whole or not at all. One that its client left open is
known by a lock file whose descriptor only the client holds.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import re
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec

from . import durable
from .errors import NoSpace, SaveUnknown, TooMany, UnsafePath
from .filesystems import gib
from .layout import Layout
from .model import Digest, TreeId, check_links, check_paths, is_digest

ENTRY_FORMAT = 1
SYNC_THREADS = 8  # they wait for the disk, not for a core
COPIES_AT_ONCE = 4  # of one save
MAX_OPEN = 256  # saves that one uid has open at the same time
_SOURCE = re.compile(r"(files|packs)/\d+")
log = logging.getLogger(__name__)


class SavedFile(msgspec.Struct):
    """One captured file: its bytes are `size` bytes from `offset` of `source` in the save's folder."""

    path: str
    size: int  # bytes
    executable: bool
    source: str
    offset: int = 0

    @property
    def is_packed(self) -> bool:
        return self.source.startswith("packs/")


class Entry(msgspec.Struct):
    """One save."""

    id: str
    uid: int
    created: float  # seconds since the epoch
    reference: dict[str, Any]
    storage_format: str
    store: str
    durable: bool
    supersede: bool
    files: list[SavedFile]
    links: list[tuple[str, str]]
    folders: list[str]
    format: int = ENTRY_FORMAT
    linked: bool = False  # its files are further names of blobs: it takes nothing of a quota

    @property
    def key(self) -> str:
        return str(self.reference["key"])

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)


_entry_json = msgspec.json.Decoder(Entry)


class OpenSave:
    """A save whose client is still handing files over. Only the event loop touches it; copies are made in threads."""

    def __init__(self, folder: Path, entry: Entry, size: int) -> None:
        self.folder = folder
        self.entry = entry
        self.room_left = size  # bytes that may still be handed over
        self.reserved_bytes = size  # of them, what is not on the disk yet
        self.capturing = 0  # messages whose files are being copied
        self.lanes = asyncio.Semaphore(COPIES_AT_ONCE)
        self.files: dict[str, SavedFile] = {}  # by path: what is handed over again replaces what was
        self.links: list[tuple[str, str]] = []
        self.folders: list[str] = []
        self._sources = 0
        self._named: dict[str, tuple[int, int]] = {}  # of a source with captured bytes: by how many files it is named, and its size

    def next_source(self, kind: str) -> str:
        self._sources += 1
        return f"{kind}/{self._sources}"

    def add(self, source: str, files: list[SavedFile]) -> None:
        """Files whose bytes are in this source now."""
        self.files.update((file.path, file) for file in files)
        size = sum(file.size for file in files)
        self._named[source] = len(files), size
        self.reserved_bytes -= size

    def unnamed(self, files: list[SavedFile]) -> dict[str, int]:
        """Sources that nothing names without these files, and their sizes: large files, and packs of which all are among them."""
        lost = Counter(file.source for file in files)
        return {source: self._named[source][1] for source, count in lost.items() if self._named[source][0] == count}

    def replace(self, files: list[SavedFile]) -> None:
        """These are handed over again. What nothing names any more goes, and what it took may be used again."""
        unnamed = self.unnamed(files)
        for file in files:
            del self.files[file.path]
            count, size = self._named[file.source]
            self._named[file.source] = count - 1, size
        for source, size in unnamed.items():
            del self._named[source]
            (self.folder / source).unlink()
            self.room_left += size
            self.reserved_bytes += size


class Spool:
    """`_open` and `_entries` are the saves as the loop sees them; only the event loop touches them."""

    def __init__(self, layout: Layout, max_per_user: int = 0) -> None:
        """`max_per_user`: bytes that saves of one uid may take here, but root's and the daemon's own; 0 is no limit."""
        self._layout = layout
        self._max_per_user = max_per_user
        self._taken: dict[str, tuple[int, int]] = {}  # uid and bytes of every save that is open or kept; what only links costs nothing
        self._open: dict[str, OpenSave] = {}
        self._entries: dict[str, Entry] = {}
        self._changed = asyncio.Event()  # of this moment: set, and replaced, by every change

    # ---- open saves

    def begin(self, make: Callable[[str], Entry], size: int) -> tuple[OpenSave, int]:
        """A new open save, and the descriptor that keeps it so; whoever gets it owns it."""
        name = f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{secrets.token_hex(6)}"
        folder, entry = self._layout.tmp / f"save-{name}", make(name)
        if sum(save.entry.uid == entry.uid for save in self._open.values()) >= MAX_OPEN:
            raise TooMany(f"uid {entry.uid} has {MAX_OPEN} saves open", "wait until one of them is complete")
        self.require_quota(entry.uid, size)
        for each in (folder, folder / "files", folder / "packs"):
            each.mkdir(mode=0o700)
        alive = os.open(folder / "alive", os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(alive, fcntl.LOCK_EX | fcntl.LOCK_NB)
        save = self._open[name] = OpenSave(folder, entry, size)
        self._taken[name] = (entry.uid, size)
        return save, alive

    def require_quota(self, uid: int, size: int) -> None:
        """NoSpace unless another save of so many bytes is within what this uid may take."""
        if not self._max_per_user or uid in (0, os.geteuid()):
            return
        taken = sum(taken for owner, taken in tuple(self._taken.values()) if owner == uid)  # threads take away
        if taken + size > self._max_per_user:
            raise NoSpace(
                f"uid {uid} may have {gib(self._max_per_user)} of saves that are not in the store yet, and has {gib(taken)}; this one "
                f"needs {gib(size)}",
                "wait until earlier ones are there (modelcache flush), or have max_spool_per_user raised",
                needed_bytes=size,
                free_bytes=max(0, self._max_per_user - taken),
            )

    def opened(self, name: str, uid: int) -> OpenSave:
        """The open save of that name, for the uid that opened it."""
        save = self._open.get(name)
        if save is None or save.entry.uid != uid:
            raise SaveUnknown(f"no save {name[:80]!r} is open", "the daemon has restarted meanwhile: save again")
        return save

    @property
    def reserved_bytes(self) -> int:
        """What open saves have been promised and have not used yet."""
        return sum(save.reserved_bytes for save in tuple(self._open.values()))  # threads ask as well

    def abandoned(self) -> list[OpenSave]:
        """Open saves whose client has gone."""
        return [save for save in self._open.values() if _is_dead(save.folder / "alive")]

    def forget(self, save: OpenSave) -> Callable[[], None]:
        """The save is no longer open; returns what is left to do if it is not going to be kept (blocks)."""
        self._open.pop(save.entry.id, None)
        return lambda: self._discard(save)

    def close(self) -> None:
        """Drops what is still open (blocks)."""
        for save in tuple(self._open.values()):
            self.forget(save)()

    def _discard(self, save: OpenSave) -> None:
        """Moves it away first: a copy that is still going on finds no folder to put more files into. What can't go now, goes at a start."""
        folder, discarded = save.folder, self._layout.fresh("dropped")
        try:
            with contextlib.suppress(OSError):
                durable.rename(folder, discarded)
            durable.remove_tree(discarded if discarded.exists() else folder)
        except FileNotFoundError:
            pass
        except OSError as error:
            log.warning("a save that is not kept can't be removed", extra={"folder": folder.name, "error": str(error)})
        self._taken.pop(save.entry.id, None)

    # ---- kept saves, on disk: all of these block

    def keep(self, save: OpenSave) -> None:
        """Gives a complete save its name: from here on it survives a kill, and with `durable` a power cut."""
        entry, folder = save.entry, save.folder
        (folder / "alive").unlink()
        raw = msgspec.json.encode(entry)
        if entry.durable:
            with ThreadPoolExecutor(SYNC_THREADS) as syncing:
                list(syncing.map(durable.sync_file, {folder / file.source for file in entry.files}))
            durable.sync_folders([folder / "files", folder / "packs"])
            durable.write(folder / "entry.json", raw, folder / "entry.new")
        else:
            durable.record(folder / "entry.json", raw, folder / "entry.new")
        durable.rename(folder, self._layout.spool_entry(entry.id))
        if entry.durable:
            durable.sync_folders([self._layout.spool, self._layout.tmp])

    def recover(self) -> None:
        """Finds what a predecessor kept. What can't be read is set aside, never deleted."""
        with os.scandir(self._layout.spool) as folders:
            names = sorted(folder.name for folder in folders if folder.name != self._layout.corrupt.name)
        found = []
        for name in names:
            try:
                found.append(self._read(name))
            except (OSError, ValueError, UnsafePath) as error:
                log.error("a save can't be read and is set aside", extra={"save": name, "error": str(error)})
                self._move_aside(name)
        self._entries = {entry.id: entry for entry in sorted(found, key=lambda entry: entry.created)}
        self._taken = {entry.id: (entry.uid, 0 if entry.linked else entry.size) for entry in found}

    def _read(self, name: str) -> Entry:
        folder = self._layout.spool_entry(name)
        entry = _entry_json.decode((folder / "entry.json").read_bytes())
        if entry.format > ENTRY_FORMAT or entry.id != name or not isinstance(entry.reference.get("key"), str):
            raise ValueError("not a spool entry of this format")
        check_paths([*(file.path for file in entry.files), *(path for path, _ in entry.links), *entry.folders], name)
        check_links(entry.links)
        ends: dict[str, int] = {}
        for file in entry.files:
            if file.size < 0 or file.offset < 0 or not _SOURCE.fullmatch(file.source):
                raise ValueError(f"{file.path!r} is nowhere")
            ends[file.source] = max(ends.get(file.source, 0), file.offset + file.size)
        for source, end in ends.items():
            if (folder / source).stat().st_size < end:
                raise ValueError(f"{source} is shorter than it was")
        return entry

    def tree(self, entry: Entry) -> TreeId | None:
        """The save's tree, if it was hashed before."""
        try:
            name = (self._layout.spool_entry(entry.id) / "tree").read_text()
        except FileNotFoundError:
            return None
        return TreeId(name) if is_digest(name) else None

    def note_tree(self, save: OpenSave, tree: TreeId) -> None:
        """An open save holds the bytes of blobs: nothing of it needs to be hashed."""
        durable.record(save.folder / "tree", tree.encode(), save.folder / "tree.new")

    def set_tree(self, entry: Entry, tree: TreeId) -> None:
        """Everything is hashed, and every blob published."""
        folder = self._layout.spool_entry(entry.id)
        durable.write(folder / "tree", tree.encode(), self._layout.fresh("tree"))

    def source(self, entry: Entry, file: SavedFile) -> Path:
        return self._layout.spool_entry(entry.id) / file.source

    def sending(self, entry: Entry, digest: Digest) -> Path:
        """Where an upload notes how far a blob of this save is."""
        return self._layout.spool_entry(entry.id) / f"{digest}.sending"

    def corrupt(self) -> list[str]:
        return sorted(os.listdir(self._layout.corrupt))

    def remove(self, entry: Entry) -> None:
        """The store has confirmed blobs, tree and reference. Follow it with `forget_kept`."""
        discarded = self._layout.fresh("sent")
        durable.rename(self._layout.spool_entry(entry.id), discarded)
        durable.sync_folders([self._layout.spool])
        durable.remove_tree(discarded)

    def set_aside(self, entry: Entry) -> None:
        """It can't be brought to the store any more; it is kept for whoever wants to know why. Follow it with `forget_kept`."""
        self._move_aside(entry.id)

    def _move_aside(self, name: str) -> None:
        target = self._layout.corrupt / name
        if target.exists():
            target = target.with_name(f"{name}-{secrets.token_hex(4)}")
        durable.rename(self._layout.spool_entry(name), target)

    # ---- kept saves, in memory

    @property
    def entries(self) -> list[Entry]:
        """What is not in its store yet, the oldest first."""
        return list(self._entries.values())

    def entry(self, name: str) -> Entry | None:
        """The save of that id, if it is on its way."""
        return self._entries.get(name)

    def has(self, entry: Entry) -> bool:
        """Whether it is still on its way."""
        return entry.id in self._entries

    def add_kept(self, entry: Entry) -> None:
        self._entries[entry.id] = entry
        self._announce()

    def forget_kept(self, entry: Entry) -> None:
        self._entries.pop(entry.id, None)
        self._taken.pop(entry.id, None)
        self._announce()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Returns when the condition holds; it is looked at whenever a save comes or goes."""
        while not condition():
            await self._changed.wait()

    def _announce(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def __iter__(self) -> Iterator[OpenSave]:
        return iter(tuple(self._open.values()))

    def __repr__(self) -> str:
        return f"<Spool {len(self._open)} open, {len(self._entries)} kept>"


def _is_dead(alive: Path) -> bool:
    try:
        handle = os.open(alive, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False  # being dropped
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(handle)
    return True
