"""A store in an S3 bucket, below a prefix. Small objects in one request each; large ones in ranges (`Download`) and parts (`Upload`).

No ETag is taken for a digest. A put is confirmed by the checksum that the server computed, by an MD5 that its ETag turned out to be,
or, where neither is to be had, by reading the object back.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import secrets
from base64 import b64encode
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

from modelcached.download import Download, Limits, Sink
from modelcached.errors import (
    MissingObject,
    ModelcachedError,
    ObjectChanged,
    ObjectExists,
    StoreDenied,
    StoreMismatch,
    StoreProblem,
    StoreUnavailable,
)
from modelcached.model import Digest
from modelcached.rates import Rate
from modelcached.spans import Again, Body, Budget, Origin, Span
from modelcached.tasks import Pool

from .contract import OWN_FOLDER, Object, Report, check_key, check_prefix, no_report
from .s3_client import Client, date_of
from .s3_errors import broken_connections, code_of
from .s3_upload import Upload, is_md5

ATTEMPTS = 5  # of one range or part in a row that bring nothing; each is botocore's retries
MAX_BACKOFF_SECONDS = 10.0
CONFLICTS = 8  # "somebody else is writing this key" answers until it counts as unavailable


class S3Store:
    def __init__(self, bucket: str, prefix: str, pool: Pool, limits: Limits, stall_seconds: float, rate: Rate) -> None:
        self.url = f"s3://{bucket}/{quote(prefix)}".rstrip("/")
        self._prefix = f"{prefix}/" if prefix else ""
        self._pool = pool
        self._limits = limits
        self._stall_seconds = stall_seconds
        self._rate = rate
        self._client = Client(bucket, self.url, pool, limits.connections, stall_seconds)
        self._budget = Budget(limits.connections)
        self._bucket_is_there = False
        self._has_conditions: bool | None = None
        self._probing = asyncio.Lock()

    async def get(self, key: str, limit_bytes: int) -> bytes:
        check_key(key)
        failures = 0
        while True:
            try:
                async with self.body(key, None) as (body, size):
                    if size > limit_bytes:
                        raise StoreProblem(
                            f"{key} has {size} bytes, more than the {limit_bytes} it may have", "it was written by something else"
                        )
                    data = bytearray()
                    while len(data) < size:
                        chunk = await body.readany()
                        if not chunk:
                            raise Again(f"the answer broke off after {len(data)} of {size} bytes")
                        data += chunk
                    return bytes(data)
            except Again as again:
                failures += 1
                await self.after(key, again, failures)

    def origin(self, key: str, span: Span) -> Origin:
        return _Origin(self, check_key(key), span)

    async def read(self, key: str, span: Span, sink: Sink, report: Report = no_report) -> None:
        await Download(self.origin(key, span), self._pool, self._limits, span[1] - span[0], sink, report).run()

    async def put(self, key: str, data: bytes) -> Object:
        return await self._put(check_key(key), data)

    async def put_new(self, key: str, data: bytes) -> Object:
        try:
            return await self._put(check_key(key), data, IfNoneMatch="*")
        except ObjectChanged as error:
            raise ObjectExists(f"{key} is there already", "somebody else was first", key=key) from error

    async def replace(self, key: str, data: bytes, etag: str) -> Object:
        try:
            return await self._put(check_key(key), data, IfMatch=etag)
        except ObjectChanged:
            if await self.head(key) is None:
                raise MissingObject(f"{key} is not in {self.url}", "it was deleted, or belongs to another store", key=key) from None
            raise

    async def has_conditions(self) -> bool:
        async with self._probing:
            if self._has_conditions is None:
                self._has_conditions = await self._probe()
            return self._has_conditions

    async def put_file(
        self, key: str, file: Path | int, size_bytes: int, sha256: Digest, report: Report = no_report, resume: Path | None = None
    ) -> Object:
        upload = Upload(
            self._client,
            self._pool,
            self._budget,
            self._limits.connections,
            self._stall_seconds,
            self._prefix + check_key(key),
            size_bytes,
            sha256,
            report,
            self._rate,
        )
        confirmed = await upload.run(file, resume)
        found = await self.head(key)
        if found is None or found.size != size_bytes or not (confirmed or await self._has_bytes(key, size_bytes, sha256)):
            with suppress(ModelcachedError):
                await self.delete(key)
            raise _other_bytes(self.url, key)
        return found

    async def head(self, key: str) -> Object | None:
        return await self._head(check_key(key))

    async def list(self, prefix: str) -> AsyncIterator[Object]:
        more: dict[str, str] = {}
        while True:
            answer = await self._client.call("list_objects_v2", Prefix=self._prefix + check_prefix(prefix), **more)
            for found in answer.get("Contents", ()):
                key = found["Key"].removeprefix(self._prefix)
                if not key.startswith(f"{OWN_FOLDER}/") and not key.endswith("/"):
                    yield Object(key, found["Size"], found["LastModified"].timestamp(), found["ETag"])
            if not answer.get("IsTruncated"):
                return
            more = {"ContinuationToken": answer["NextContinuationToken"]}

    async def delete(self, key: str) -> None:
        with suppress(MissingObject):
            await self._client.call("delete_object", key, Key=self._prefix + check_key(key))

    async def now(self) -> float:
        return await self._client.now()

    async def abort_orphans(self, older_than_seconds: float) -> int:
        oldest, removed = await self.now() - older_than_seconds, 0
        more: dict[str, str] = {}
        while True:
            answer = await self._client.call("list_multipart_uploads", Prefix=self._prefix, **more)
            for upload in answer.get("Uploads", ()):
                if upload["Initiated"].timestamp() < oldest:
                    with suppress(MissingObject):
                        await self._client.call("abort_multipart_upload", upload["Key"], Key=upload["Key"], UploadId=upload["UploadId"])
                    removed += 1
            if not answer.get("IsTruncated"):
                break
            more = {"KeyMarker": answer["NextKeyMarker"], "UploadIdMarker": answer.get("NextUploadIdMarker", "")}
        answer = await self._client.call("list_objects_v2", Prefix=f"{self._prefix}{OWN_FOLDER}/")
        for probe in answer.get("Contents", ()):
            if probe["LastModified"].timestamp() < oldest:
                await self._client.call("delete_object", probe["Key"], Key=probe["Key"])
                removed += 1
        return removed

    async def close(self) -> None:
        await self._client.close()

    async def after(self, key: str, again: Again, failures: int) -> None:
        """Waits until an answer that broke off may be asked for again, or gives up after so many failures in a row."""
        if failures >= ATTEMPTS:
            raise StoreUnavailable(f"{self.url}: {key} can't be read: {again.reason}", "look at the network, or try again later", key=key)
        await asyncio.sleep(min(MAX_BACKOFF_SECONDS, 0.1 * 2**failures) * random.uniform(0.5, 1.0))

    @asynccontextmanager
    async def body(self, key: str, span: Span | None) -> AsyncIterator[tuple[Body, int]]:
        """The bytes of an object, or of a span of it, as they come, and how many. Again when the connection breaks inside the block."""
        wanted = {} if span is None else {"Range": f"bytes={span[0]}-{span[1] - 1}"}
        async with self._budget.connection(first=span is None):
            answer = await self._client.call("get_object", key, Key=self._prefix + key, **wanted)
            stream = answer["Body"].raw_stream  # without botocore's layers: a third of the time
            try:
                with broken_connections():
                    if span is not None:
                        self._check_span(key, span, answer)
                    yield _Paced(stream.content, self._rate), answer["ContentLength"]
            finally:
                stream.close()  # a connection that has nothing more to say is in the pool again by then

    def _check_span(self, key: str, span: Span, answer: dict[str, Any]) -> None:
        start, end = span
        if (said := answer.get("ContentRange")) is not None:
            if not said.startswith(f"bytes {start}-{end - 1}/"):
                raise StoreMismatch(f"{key} in {self.url} is shorter than it was", "save it again", key=key)
        elif (start, end) != (0, answer["ContentLength"]):
            raise StoreProblem(
                f"{self.url} can't answer with a part of an object", "is this an S3 server, or something before it?", key=key
            )

    async def _head(self, key: str) -> Object | None:
        try:
            answer = await self._client.call("head_object", key, Key=self._prefix + key)
        except MissingObject:
            await self._check_bucket()
            return None
        return Object(key, answer["ContentLength"], answer["LastModified"].timestamp(), answer["ETag"])

    async def _put(self, key: str, data: bytes, **conditions: str) -> Object:
        """One PUT, confirmed."""
        await self._rate.passed(len(data))
        checksum = b64encode((await self._pool.run(hashlib.sha256, data)).digest()).decode()
        for attempt in range(1, CONFLICTS + 1):
            try:
                answer = await self._client.call(
                    "put_object", key, Key=self._prefix + key, Body=data, ChecksumSHA256=checksum, **conditions
                )
            except ObjectChanged as error:
                if code_of(error) == "ConditionalRequestConflict":  # somebody else's is being written: it has not won yet
                    await asyncio.sleep(min(MAX_BACKOFF_SECONDS, 0.05 * 2**attempt) * random.random())
                    continue
                # An answer got lost, the request was sent again (aiohttp does so without a word), and this is our own object?
                if (found := await self._find(key, data)) is None:
                    raise
                return found
            if answer.get("ChecksumSHA256") != checksum:
                md5 = hashlib.md5(data, usedforsecurity=False)
                if not is_md5(answer["ETag"], md5) and await self._find(key, data) is None:
                    raise _other_bytes(self.url, key)
            return Object(key, len(data), date_of(answer), answer["ETag"])
        raise StoreUnavailable(f"{self.url}: too many write {key} at once", "try again later", key=key)

    async def _find(self, key: str, data: bytes) -> Object | None:
        """The object, if it has just these bytes."""
        found = await self._head(key)
        is_it = found is not None and found.size == len(data)
        return found if is_it and await self._has_bytes(key, len(data), Digest(hashlib.sha256(data).hexdigest())) else None

    async def _has_bytes(self, key: str, size: int, sha256: Digest) -> bool:
        """Reads an object back, from its first byte to its last."""
        digest, position, failures = hashlib.sha256(), 0, 0
        while position < size:
            try:
                async with self.body(key, (position, size)) as (body, _):
                    while chunk := await body.readany():
                        await self._pool.run(digest.update, chunk)
                        position, failures = position + len(chunk), 0
                if position < size:
                    raise Again("the answer broke off")
            except Again as again:
                failures += 1
                await self.after(key, again, failures)
            except (MissingObject, StoreMismatch):
                return False
        return digest.hexdigest() == sha256

    async def _probe(self) -> bool:
        """A name that is taken, and an ETag that is old, have to be refused; a new name and the present ETag have to be accepted."""
        key = f"{OWN_FOLDER}/probe-{secrets.token_hex(8)}"
        try:
            first = await self._put(key, b"1", IfNoneMatch="*")
            if not await self._is_refused(key, IfNoneMatch="*"):
                return False
            await self._put(key, b"2", IfMatch=first.etag)
            return await self._is_refused(key, IfMatch=first.etag)
        except (ObjectChanged, StoreMismatch):
            return False
        except StoreProblem as error:
            if code_of(error) in ("NotImplemented", "InvalidArgument", "InvalidRequest"):
                return False
            raise
        finally:
            with suppress(ModelcachedError):
                await self._client.call("delete_object", key, Key=self._prefix + key)

    async def _is_refused(self, key: str, **conditions: str) -> bool:
        try:
            await self._put(key, b"3", **conditions)
        except ObjectChanged:
            return True
        return False

    async def _check_bucket(self) -> None:
        """A HEAD says 404 for a missing bucket too; so the first of them is followed by a question that tells."""
        if not self._bucket_is_there:
            with suppress(StoreDenied):  # who may not list is not told
                await self._client.call("list_objects_v2", MaxKeys=1)
            self._bucket_is_there = True


def _other_bytes(url: str, key: str) -> StoreMismatch:
    return StoreMismatch(f"{url} took other bytes for {key} than it was given", "look for a proxy that alters them", key=key)


class _Paced:
    """An answer's bytes, no faster than the node's rate."""

    def __init__(self, body: Body, rate: Rate) -> None:
        self._body = body
        self._rate = rate

    async def readany(self) -> bytes:
        chunk = await self._body.readany()
        await self._rate.passed(len(chunk))
        return chunk


class _Origin:
    """A span of an object, as spans of it are asked for."""

    def __init__(self, store: S3Store, key: str, span: Span) -> None:
        self._store = store
        self._key = key
        self._span = span

    @asynccontextmanager
    async def answer(self, span: Span | None) -> AsyncIterator[Body]:
        start, end = span or (0, self._span[1] - self._span[0])
        async with self._store.body(self._key, (self._span[0] + start, self._span[0] + end)) as (body, _):
            yield body

    async def after(self, again: Again, failures: int) -> None:
        await self._store.after(self._key, again, failures)
