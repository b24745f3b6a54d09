"""One file to one object: in parts, several at a time, read twice and held in memory never.

One thread reads ahead in order, for the SHA-256 of the whole and the CRC-32 of each part; each sender then streams its part from the
page cache. The server checks every part against its CRC, which is a signed header, and the object comes into being only when
the whole is what its name says. What is there already after a crash is asked (ListParts) and compared with the file (MD5).
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import random
import zlib
from base64 import b64encode
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import msgspec
from aiohttp.abc import AbstractStreamWriter
from aiohttp.payload import Payload

from modelcached import durable
from modelcached.errors import ModelcachedError, StoreClockSkew, StoreDenied, StoreProblem, StoreSlow, StoreUnavailable
from modelcached.model import Digest
from modelcached.rates import Rate
from modelcached.spans import Budget
from modelcached.tasks import Pool, apart

from .contract import Report, check_digest
from .local import opened, read, scan
from .s3_client import Client
from .s3_errors import code_of

PART_BYTES = 16 << 20
MAX_PARTS = 10_000
SLICE_BYTES = 512 << 10
STALLS = 3  # a part that stopped moving is sent so often
ABORT_SECONDS = 10.0


class Md5(Protocol):
    def hexdigest(self) -> str: ...


class _State(msgspec.Struct, frozen=True):
    """What is kept beside the file, to go on after a crash."""

    store: str
    name: str
    size: int
    sha256: str
    part_bytes: int
    upload: str


_state_json = msgspec.json.Decoder(_State)


class _Part(NamedTuple):
    number: int  # from 1
    start: int
    length: int
    crc: str


class _Present(NamedTuple):
    size: int
    etag: str
    crc: str | None


class Upload:
    def __init__(
        self,
        client: Client,
        pool: Pool,
        budget: Budget,
        connections: int,
        stall_seconds: float,
        name: str,
        size: int,
        sha256: Digest,
        report: Report,
        rate: Rate,
    ) -> None:
        self._client = client
        self._pool = pool
        self._budget = budget
        self._connections = connections
        self._stall_seconds = stall_seconds
        self._name = name
        self._size = size
        self._sha256 = sha256
        self._report = report
        self._rate = rate
        self._sent: dict[int, dict[str, Any]] = {}  # by part number, what completes the upload; only the event loop touches it
        self._is_confirmed = True  # the server has proved, for everything so far, that it got our bytes

    async def run(self, file: Path | int, resume: Path | None) -> bool:
        """Writes the object. False: it is there, but the server has given no proof of every byte."""
        async with opened(self._pool, file) as handle:
            if self._size <= PART_BYTES:
                await self._run_whole(handle)
            else:
                await self._run_parts(handle, resume)
        return self._is_confirmed

    async def _run_whole(self, handle: int) -> None:
        digest = hashlib.sha256()
        await self._pool.run(scan, handle, 0, self._size, digest.update)
        check_digest(self._name, digest.hexdigest(), self._sha256)
        checksum = b64encode(digest.digest()).decode()
        answer = await self._send(handle, 0, self._size, "put_object", ChecksumSHA256=checksum)
        await self._confirm(handle, 0, self._size, answer, "ChecksumSHA256", checksum)
        self._report(self._size)

    async def _run_parts(self, handle: int, resume: Path | None) -> None:
        state, present = await self._begin(resume)
        try:
            digest = hashlib.sha256()
            parts: asyncio.Queue[_Part | None] = asyncio.Queue(1)

            async def read_and_send() -> None:
                async with asyncio.TaskGroup() as group:
                    group.create_task(self._read_ahead(handle, state, present, digest.update, parts))
                    for _ in range(self._connections):
                        group.create_task(self._send_parts(handle, state, parts))

            try:
                await apart(read_and_send())
            except ExceptionGroup as errors:
                raise errors.exceptions[0] from None
            check_digest(self._name, digest.hexdigest(), self._sha256)
            await self._complete(state)
        except BaseException as error:
            if resume is None or not _can_go_on(error):
                await self._abort(state, resume)
            raise
        await self._forget(resume)

    async def _begin(self, resume: Path | None) -> tuple[_State, dict[int, _Present]]:
        """The upload that `resume` tells of and the parts it has, or a new one."""
        if resume is not None and (state := await self._pool.run(_load, resume)) is not None:
            if (state.store, state.name, state.size, state.sha256) == (self._client.place.url, self._name, self._size, self._sha256):
                try:
                    return state, await self._list_parts(state)
                except StoreProblem as error:
                    if code_of(error) != "NoSuchUpload":
                        raise
        part_bytes = max(PART_BYTES, -(-self._size // MAX_PARTS // 2**20) * 2**20)
        answer = await self._client.call("create_multipart_upload", self._name, Key=self._name, ChecksumAlgorithm="CRC32")
        state = _State(self._client.place.url, self._name, self._size, self._sha256, part_bytes, answer["UploadId"])
        if resume is not None:
            await self._pool.run(durable.record, resume, msgspec.json.encode(state), resume.with_name(resume.name + ".new"))
        return state, {}

    async def _list_parts(self, state: _State) -> dict[int, _Present]:
        found: dict[int, _Present] = {}
        marker = 0
        while True:
            answer = await self._client.call(
                "list_parts", self._name, Key=self._name, UploadId=state.upload, **({"PartNumberMarker": marker} if marker else {})
            )
            for part in answer.get("Parts", ()):
                found[part["PartNumber"]] = _Present(part["Size"], part["ETag"], part.get("ChecksumCRC32"))
            if not answer.get("IsTruncated"):
                return found
            marker = answer["NextPartNumberMarker"]

    async def _read_ahead(
        self,
        handle: int,
        state: _State,
        present: dict[int, _Present],
        hashed: Callable[[memoryview], None],
        parts: asyncio.Queue[_Part | None],
    ) -> None:
        for number, start in enumerate(range(0, self._size, state.part_bytes), 1):
            length = min(state.part_bytes, self._size - start)
            crc, md5, there = _Crc(), hashlib.md5(usedforsecurity=False), present.get(number)
            takers = (hashed, crc.update) if there is None else (hashed, crc.update, md5.update)
            await self._pool.run_behind(scan, handle, start, length, *takers)
            if there is not None and there.size == length and (there.crc == crc.text or is_md5(there.etag, md5)):
                self._add(number, there.etag, crc.text, length)
            else:
                await parts.put(_Part(number, start, length, crc.text))
        for _ in range(self._connections):
            await parts.put(None)

    async def _send_parts(self, handle: int, state: _State, parts: asyncio.Queue[_Part | None]) -> None:
        while (part := await parts.get()) is not None:
            answer = await self._send(
                handle, part.start, part.length, "upload_part", UploadId=state.upload, PartNumber=part.number, ChecksumCRC32=part.crc
            )
            await self._confirm(handle, part.start, part.length, answer, "ChecksumCRC32", part.crc)
            self._add(part.number, answer["ETag"], part.crc, part.length)

    def _add(self, number: int, etag: str, crc: str, length: int) -> None:
        self._sent[number] = {"PartNumber": number, "ETag": etag, "ChecksumCRC32": crc}
        self._report(length)

    async def _send(self, handle: int, start: int, length: int, operation: str, **parameters: Any) -> dict[str, Any]:
        """Sends a span of the file. botocore tries again what fails; what does not move any more is noticed here."""
        for attempt in range(1, STALLS + 1):
            with suppress(TimeoutError):
                async with self._budget.connection(), asyncio.timeout(None) as patience:
                    body = _FileSpan(self._pool, handle, start, length, patience, self._stall_seconds, self._rate)
                    return await self._client.call(
                        operation, self._name, Key=self._name, Body=body if length else b"", ContentLength=length, **parameters
                    )
            await asyncio.sleep(0.1 * 2**attempt * random.uniform(0.5, 1.0))
        place = self._client.place
        raise StoreSlow(f"{place.url}: {place.endpoint} takes no more bytes of {self._name}", "look at the network, or try again later")

    async def _confirm(self, handle: int, start: int, length: int, answer: dict[str, Any], checksum: str, wanted: str) -> None:
        """Notes whether the server has proved that it got our bytes: by a checksum of its own, else by an ETag that is their MD5."""
        if answer.get(checksum) != wanted:
            md5 = hashlib.md5(usedforsecurity=False)
            await self._pool.run(scan, handle, start, length, md5.update)
            self._is_confirmed &= is_md5(answer["ETag"], md5)

    async def _complete(self, state: _State) -> None:
        parts = [self._sent[number] for number in sorted(self._sent)]
        try:
            await self._client.call(
                "complete_multipart_upload", self._name, Key=self._name, UploadId=state.upload, MultipartUpload={"Parts": parts}
            )
        except StoreProblem as error:
            if code_of(error) != "NoSuchUpload":
                raise
            # The request was sent twice and its first answer got lost, or the upload is gone: what is there tells.
            await self._client.call("head_object", self._name, Key=self._name)
            self._is_confirmed = False

    async def _abort(self, state: _State, resume: Path | None) -> None:
        """Best effort: what can't be said now, `abort_orphans` finds later."""
        with suppress(ModelcachedError, TimeoutError):
            async with asyncio.timeout(ABORT_SECONDS):
                await self._client.call("abort_multipart_upload", self._name, Key=self._name, UploadId=state.upload)
        await self._forget(resume)

    async def _forget(self, resume: Path | None) -> None:
        if resume is not None:
            await self._pool.run(resume.unlink, missing_ok=True)


class _FileSpan(Payload):
    """A span of an open file as a request's body: read slice by slice, as the connection takes them, as often as botocore asks.

    While it is being sent, `patience` ends the request when no slice has been taken for `stall_seconds`; before and after,
    aiohttp's own timeouts count.
    """

    def __init__(
        self, pool: Pool, handle: int, start: int, length: int, patience: asyncio.Timeout, stall_seconds: float, rate: Rate
    ) -> None:
        super().__init__(None, content_type="application/octet-stream")
        self._size = length
        self._pool = pool
        self._handle = handle
        self._start = start
        self._patience = patience
        self._stall_seconds = stall_seconds
        self._rate = rate

    async def write(self, writer: AbstractStreamWriter) -> None:
        await self.write_with_length(writer, None)

    async def write_with_length(self, writer: AbstractStreamWriter, content_length: int | None) -> None:
        assert self._size is not None
        position, end = self._start, self._start + self._size
        loop = asyncio.get_running_loop()
        try:
            while position < end:
                self._wait_until(loop.time() + self._stall_seconds)
                chunk = await self._pool.run(read, self._handle, min(SLICE_BYTES, end - position), position)
                self._wait_until(None)
                await self._rate.passed(len(chunk))
                self._wait_until(loop.time() + self._stall_seconds)
                await writer.write(chunk)
                position += len(chunk)
        finally:
            self._wait_until(None)

    def _wait_until(self, when: float | None) -> None:
        with suppress(RuntimeError):  # the request is over: it was answered before it was read
            self._patience.reschedule(when)

    def decode(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        raise io.UnsupportedOperation

    # What botocore takes for a file:

    def read(self, size: int = -1) -> bytes:
        raise io.UnsupportedOperation

    def seek(self, offset: int, whence: int = 0) -> int:
        return 0

    def tell(self) -> int:
        return 0


class _Crc:
    def __init__(self) -> None:
        self._value = 0

    def update(self, chunk: memoryview) -> None:
        self._value = zlib.crc32(chunk, self._value)

    @property
    def text(self) -> str:
        return b64encode(self._value.to_bytes(4, "big")).decode()


def is_md5(etag: str, md5: Md5) -> bool:
    """Whether an ETag is the MD5 of these bytes. That proves something; that it is not proves nothing."""
    return etag.strip('"').lower() == md5.hexdigest()


def _can_go_on(error: BaseException) -> bool:
    """Whether a later call can use the parts that are there."""
    return isinstance(error, StoreUnavailable | StoreDenied | StoreClockSkew | asyncio.CancelledError)


def _load(resume: Path) -> _State | None:
    try:
        return _state_json.decode(resume.read_bytes())
    except (FileNotFoundError, msgspec.MsgspecError):
        return None
