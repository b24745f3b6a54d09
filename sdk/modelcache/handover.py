"""Handing a listed path over to the daemon: one attempt, on one connection.

Large files go as descriptors, small ones in packs; a few messages are on their way at a time, and so many descriptors are open
at most. Around the copy of each file stand two looks, at its stat and at whether somebody has it open for writing: what
changed, or may have, is handed over again after a pause.

Invariants:
- The lock descriptor, which keeps the save open, is held until the daemon has kept or dropped it.
- A file counts as handed over only if both looks saw the same, and no writer; and the first one only if the file was last changed
  so long before that another change gets another stamp.
- `Moved` means that the listing no longer holds: the caller lists again and makes another attempt.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections import deque
from typing import Any, Callable, Deque, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple, TypeVar

from . import walk
from .client import fields_of
from .connection import Call, Connection, known_fields
from .errors import ModelcacheError, NotPermittedError, ProtocolError
from .packs import PACK_BYTES, Packer
from .patience import CHANGED, GONE, WRITER, Moved, Patience
from .probe import Writers
from .protocol import MAX_DESCRIPTORS, Progress, SaveClose, SaveClosed, SaveFiles, SaveFilesReply, SaveLinks, SaveOpen, SaveOpened, SavePack

SMALL_BYTES = 256 << 10  # smaller files travel in packs
_BATCH_BYTES = 256 << 20  # a message's files; more of them go in the next
_NAMES_BYTES = 512 << 10  # a message's names, as JSON: half of what a line may have
_IN_FLIGHT = 4  # messages
_OPEN_FILES = 128  # descriptors
_TICK_NS = 20_000_000  # changes closer together may have the same stamp: Linux before 6.13, and some filesystems, stamp by the clock's tick

_Entry = TypeVar("_Entry", Tuple[str], Tuple[str, str])


class _Look(NamedTuple):
    """What tells that a file is as it was. The mtime alone does not: it is stamped when a write starts."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int


class _Opened(NamedTuple):
    file: walk.File
    descriptor: int
    before: _Look


class _Flight(NamedTuple):
    call: Call
    opened: List[_Opened]  # to be looked at again when the daemon has copied them
    size: int  # bytes
    files: int


class Handover:
    def __init__(
        self,
        connection: Connection,
        source: walk.Readable,
        listing: walk.Listing,
        patience: Patience,
        on_progress: Optional[Callable[[Progress], None]],
    ) -> None:
        self._connection = connection
        self._source = source
        self._listing = listing
        self._patience = patience
        self._on_progress = on_progress
        self._writers = Writers()
        self._packer = Packer()
        self._batch: List[_Opened] = []
        self._packed: List[walk.File] = []  # in the packer
        self._packed_cost = 0
        self._flights: Deque[_Flight] = deque()
        self._later: Dict[str, Tuple[walk.File, str]] = {}  # path to what has to be handed over again, and why
        self._save = ""
        self._total = sum(file.size for file in listing.files)
        self._done_bytes = self._done_files = 0
        self._began = time.monotonic()

    def run(self, request: SaveOpen, on_closing: Callable[[], None]) -> Dict[str, Any]:
        """The complete reference. `on_closing` is called when the daemon may have kept the save, whatever comes next."""
        request = request._replace(files=len(self._listing.files), size_bytes=self._total)
        reply = self._connection.request("save_open", fields_of(request))
        try:
            if len(reply.descriptors) != 1:
                raise ProtocolError("the daemon passed %d descriptors with a save" % len(reply.descriptors))
            self._save = known_fields(SaveOpened, reply.result).save
            self._hand_over(self._listing.files)
            while self._later:
                (path, (_, what)), *_ = self._later.items()
                self._patience.pause(path, what)
                again, self._later = self._later, {}
                self._writers.late()
                self._hand_over([file for file, _ in again.values()], is_first=False)
            self._check_listing()
            return self._close(on_closing)
        except BaseException:
            self._drop()
            raise
        finally:
            for descriptor in reply.descriptors:
                os.close(descriptor)

    def _check_listing(self) -> None:
        gone, new = self._source.difference(self._listing)
        if gone or new:
            raise Moved(gone or new, GONE if gone else CHANGED)
        late = {inode for _, inode in self._writers.late()}
        for file in self._listing.files if late else ():
            if file.inode in late:
                raise Moved(file.path, WRITER)

    def _close(self, on_closing: Callable[[], None]) -> Dict[str, Any]:
        links, folders = self._listing.links, self._listing.folders
        if sum(_cost(path, target) for path, target in links) + sum(map(_cost, folders)) > _NAMES_BYTES:
            for some in _chunks(links):
                self._connection.request("save_links", fields_of(SaveLinks(self._save, links=some)))
            for names in _chunks([(folder,) for folder in folders]):
                self._connection.request("save_links", fields_of(SaveLinks(self._save, folders=[name for (name,) in names])))
            links, folders = [], []
        on_closing()
        reply = self._connection.request("save_close", fields_of(SaveClose(self._save, links, folders)))
        return known_fields(SaveClosed, reply.result).reference

    def _drop(self) -> None:
        while self._flights:
            flight = self._flights.popleft()
            flight.call.abandon()
            _close_all(flight.opened)
        _close_all(self._batch)
        if self._save and not self._connection.is_broken:
            try:
                self._connection.request("save_close", fields_of(SaveClose(self._save, drop=True)))
            except ModelcacheError:  # it goes when the lock does
                pass

    # ---- files

    def _hand_over(self, files: List[walk.File], is_first: bool = True) -> None:
        for file in files:
            opened = self._open(file, is_first)
            if opened is None:
                continue
            if file.size >= SMALL_BYTES:
                self._add(opened)
                continue
            try:
                self._pack(opened)
            finally:
                os.close(opened.descriptor)
        self._send_batch()
        self._send_pack()
        while self._flights:
            self._land()

    def _open(self, file: walk.File, is_first: bool) -> Optional[_Opened]:
        """None if it has to wait."""
        descriptor = self._descriptor(file.path)
        try:
            found = os.fstat(descriptor)
            before = _as_look(found)
            if not _is_old(descriptor, before):
                self._later[file.path] = file, CHANGED
            elif self._writers.has(descriptor, (before.device, before.inode)):
                self._later[file.path] = file, WRITER
            elif not stat.S_ISREG(found.st_mode) or (found.st_size != file.size and not is_first):
                raise Moved(file.path, CHANGED)
            elif found.st_size != file.size:
                self._later[file.path] = file, CHANGED
            else:
                opened = _Opened(file, descriptor, before)
                descriptor = -1
                return opened
            return None
        finally:
            if descriptor >= 0:
                os.close(descriptor)

    def _descriptor(self, path: str) -> int:
        while True:
            try:
                return self._source.open(path)
            except PermissionError as error:
                raise NotPermittedError("uid %d may not read %s" % (os.geteuid(), self._source.name(path)), "save as its owner") from error
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE) and (self._flights or self._batch):
                    self._send_batch()
                    self._land()
                elif error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO):
                    raise Moved(path, GONE) from error
                else:
                    raise

    def _is_same(self, opened: _Opened) -> bool:
        """The second look. A file that fails it will be handed over again."""
        before = opened.before
        is_same = _look(opened.descriptor) == before and not self._writers.has(opened.descriptor, (before.device, before.inode))
        if not is_same:
            self._later[opened.file.path] = opened.file, CHANGED
        return is_same

    def _pack(self, opened: _Opened) -> None:
        file, packer = opened.file, self._packer
        if packer.size + file.size > PACK_BYTES or self._packed_cost > _NAMES_BYTES:
            self._send_pack()
        start = packer.size
        is_whole = packer.add(opened.descriptor, file.size)
        if self._is_same(opened) and is_whole:
            self._packed.append(file)
            self._packed_cost += _cost(file.path)
        else:
            packer.size = start

    def _add(self, opened: _Opened) -> None:
        self._batch.append(opened)
        size, cost = sum(each.file.size for each in self._batch), sum(_cost(each.file.path) for each in self._batch)
        if len(self._batch) >= MAX_DESCRIPTORS or size >= _BATCH_BYTES or cost > _NAMES_BYTES:
            self._send_batch()

    # ---- messages

    def _send_batch(self) -> None:
        batch, self._batch = self._batch, []
        if batch:
            try:
                params = SaveFiles(self._save, [each.file[:3] for each in batch])
                self._send("save_files", params, [each.descriptor for each in batch], batch, [each.file for each in batch])
            except BaseException:
                _close_all(batch)
                raise

    def _send_pack(self) -> None:
        packed, self._packed, self._packed_cost = self._packed, [], 0
        if packed:
            sealed = self._packer.seal()
            try:
                self._send("save_pack", SavePack(self._save, [file[:3] for file in packed]), [sealed], [], packed)
            finally:
                os.close(sealed)

    def _send(self, method: str, params: Any, descriptors: List[int], opened: List[_Opened], files: List[walk.File]) -> None:
        while self._flights and (len(self._flights) >= _IN_FLIGHT or len(opened) + self._open_files() > _OPEN_FILES):
            self._land()
        while True:
            call = self._connection.start(method, fields_of(params), descriptors, is_patient=not self._flights)
            if call is not None:
                break
            self._land()
        self._flights.append(_Flight(call, opened, sum(file.size for file in files), len(files)))

    def _open_files(self) -> int:
        return sum(len(flight.opened) for flight in self._flights)

    def _land(self) -> None:
        """Waits for the oldest message's reply, and looks at its files again."""
        flight = self._flights.popleft()
        try:
            changed = known_fields(SaveFilesReply, flight.call.wait(self._report).result).changed
            for position, opened in enumerate(flight.opened):
                if self._is_same(opened) and position in changed:
                    self._later[opened.file.path] = opened.file, CHANGED
        finally:
            _close_all(flight.opened)
        self._done_bytes += flight.size
        self._done_files += flight.files
        self._report(None)

    def _report(self, inner: Optional[Progress]) -> None:
        if self._on_progress is not None:
            done = self._done_bytes + (inner.done_bytes if inner else 0)
            rate = done / max(time.monotonic() - self._began, 1e-3)
            self._on_progress(Progress("save", done, self._total, rate, "", self._done_files, len(self._listing.files)))

    def __repr__(self) -> str:
        return "<Handover %s flights=%d later=%d>" % (self._save, len(self._flights), len(self._later))


def _is_old(descriptor: int, seen: _Look) -> bool:
    """Whether the next change will have another stamp than the last one. Waits for that, once."""
    age = time.time_ns() - seen.ctime_ns
    if abs(age) >= _TICK_NS:
        return True
    time.sleep((_TICK_NS - age) / 1e9)
    return _look(descriptor) == seen


def _look(descriptor: int) -> _Look:
    return _as_look(os.fstat(descriptor))


def _as_look(found: os.stat_result) -> _Look:
    return _Look(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


def _cost(*names: str) -> int:
    """Bytes of an entry as JSON, at most."""
    return sum(6 * len(name) + 3 for name in names) + 40


def _chunks(entries: Sequence[_Entry]) -> Iterator[List[_Entry]]:
    chunk: List[_Entry] = []
    cost = 0
    for entry in entries:
        chunk.append(entry)
        cost += _cost(*entry)
        if cost > _NAMES_BYTES:
            yield chunk
            chunk, cost = [], 0
    if chunk:
        yield chunk


def _close_all(opened: List[_Opened]) -> None:
    while opened:
        os.close(opened.pop().descriptor)
