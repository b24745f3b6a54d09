"""Saves in the hands of a test: the wire without the SDK's walk (`Wire`), and what lies in a store, read by none of our code (`contents`).

Invariant: `contents` believes nothing: names are compared with digests, packs are read by Python's tarfile, and what a reference
names and the store has not is an AssertionError.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from modelcache.client import Client as Connections
from modelcache.connection import Call, Connection, Reply

from .hub import Random
from .seaweed import SeaweedFS

MIB = 1 << 20
SMALL_BYTES = 256 << 10
Tree = Mapping[str, bytes | Random]


def key_of(name: str) -> str:
    """The key of a model with that label, the same every time."""
    return f"mf.models/models/artifacts/{name}_{hashlib.md5(name.encode()).hexdigest()}"


def fill(folder: Path, tree: Tree) -> Path:
    for path, content in tree.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(bytes(content))
    return folder


def hashes(tree: Tree) -> dict[str, str]:
    return {path: hashlib.sha256(bytes(content)).hexdigest() for path, content in tree.items()}


def until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Waits for what lies on a disk or in a store, or what a daemon says of itself: none of them sends events."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.01)  # see above


def read_only_file(data: bytes) -> int:
    """A read-only descriptor of a file in memory."""
    writable = os.memfd_create("test")
    try:
        os.write(writable, data)
        return os.open(f"/proc/self/fd/{writable}", os.O_RDONLY)
    finally:
        os.close(writable)


class Wire:
    """One connection. Descriptors that are passed in are closed."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self._started: set[Call] = set()

    def request(self, method: str, descriptors: Iterable[int] = (), **params: Any) -> Any:
        reply = self.reply(method, descriptors, **params)
        for descriptor in reply.descriptors:
            os.close(descriptor)
        return reply.result

    def reply(self, method: str, descriptors: Iterable[int] = (), **params: Any) -> Reply:
        return self.wait(self.start(method, descriptors, **params))

    def wait(self, call: Call) -> Reply:
        self.forget(call)
        return call.wait()

    def forget(self, call: Call) -> None:
        """Somebody else waits for it."""
        self._started.discard(call)

    def leave(self) -> None:
        """Abandons what was started and not waited for."""
        while self._started:
            self._started.pop().abandon()

    def start(self, method: str, descriptors: Iterable[int] = (), **params: Any) -> Call:
        passed = list(descriptors)
        try:
            call = self.connection.start(method, params, passed)
            assert call is not None
            self._started.add(call)
            return call
        finally:
            for descriptor in passed:
                os.close(descriptor)

    def open(self, name: str, size: int, files: int = 1, **more: Any) -> Saving:
        reply = self.reply(
            "save_open", reference={"key": key_of(name), "type": "model", **more.pop("reference", {})}, files=files, size_bytes=size, **more
        )
        (alive,) = reply.descriptors
        return Saving(self, reply.result["save"], alive)

    def save(self, name: str, tree: Tree, **more: Any) -> dict[str, Any]:
        """Hands over everything as the SDK does, from memory."""
        data = {path: bytes(content) for path, content in tree.items()}
        with self.open(name, sum(map(len, data.values())), len(data), **more) as saving:
            saving.pack({path: content for path, content in data.items() if len(content) < SMALL_BYTES})
            for path, content in data.items():
                if len(content) >= SMALL_BYTES:
                    saving.file(path, content)
            return saving.close()

    def load(self, name: str, **more: Any) -> dict[str, Any]:
        loaded: dict[str, Any] = self.request("load", key=key_of(name), **more)
        return loaded

    def references(self, **more: Any) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.request("references", **more)["references"]
        return found

    def flush(self, deadline: float | None = 30.0) -> dict[str, Any]:
        flushed: dict[str, Any] = self.request("flush", deadline_seconds=deadline)
        return flushed


class Saving:
    """An open save; its lock goes with the block."""

    def __init__(self, wire: Wire, name: str, alive: int) -> None:
        self.wire = wire
        self.name = name
        self.alive = alive

    def files(self, descriptors: list[int], files: list[tuple[str, int, bool]]) -> list[int]:
        changed: list[int] = self.wire.request("save_files", descriptors, save=self.name, files=files)["changed"]
        return changed

    def file(self, path: str, content: bytes, executable: bool = False) -> None:
        assert self.files([read_only_file(content)], [(path, len(content), executable)]) == []

    def pack(self, tree: Mapping[str, bytes]) -> None:
        files = [(path, len(content), False) for path, content in tree.items()]
        self.wire.request("save_pack", [read_only_file(b"".join(tree.values()))], save=self.name, files=files)

    def close(self, **more: Any) -> dict[str, Any]:
        reference: dict[str, Any] = self.wire.request("save_close", save=self.name, **more)["reference"]
        return reference

    def let_go(self) -> None:
        if self.alive >= 0:
            os.close(self.alive)
            self.alive = -1

    def __enter__(self) -> Saving:
        return self

    def __exit__(self, *_: object) -> None:
        self.let_go()


@contextmanager
def wired(socket: str) -> Iterator[Wire]:
    with closing(Connections(socket)) as connections:
        connection, _ = connections._connected()
        wire = Wire(connection)
        try:
            yield wire
        finally:
            wire.leave()


# ---- what lies in a store


Read = Callable[[str], bytes]


def in_folder(store: Path) -> tuple[list[str], Read]:
    keys = [str(path.relative_to(store)) for path in store.rglob("*") if path.is_file()]
    return keys, lambda key: (store / key).read_bytes()


def in_bucket(seaweed: SeaweedFS, url: str) -> tuple[list[str], Read]:
    bucket, client = url.removeprefix("s3://"), seaweed.client()
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket)
    keys = [found["Key"] for page in pages for found in page.get("Contents", ())]

    def read(key: str) -> bytes:
        data: bytes = client.get_object(Bucket=bucket, Key=key)["Body"].read()
        return data

    return keys, read


def contents(keys: list[str], read: Read) -> dict[str, dict[str, str]]:
    """Of every reference: its files' paths and digests, each found and found right."""
    found: dict[str, dict[str, str]] = {}
    present = {key for key in keys if not key.startswith(".modelcached/")}
    seen: dict[str, str] = {}

    def digest(key: str, data: bytes | None = None) -> str:
        assert key in present, f"{key} is named and not there"
        if key not in seen:
            seen[key] = hashlib.sha256(read(key) if data is None else data).hexdigest()
        return seen[key]

    for key in sorted(present):
        if key.startswith("refs/") and key.endswith(".json"):
            reference = json.loads(read(key))
            name = reference["tree"]
            assert f"trees/{name}.json" in present, f"{key} names a tree that is not there"
            record = json.loads(read(f"trees/{name}.json"))
            canonical = json.dumps(record["tree"], separators=(",", ":"), ensure_ascii=False).encode()
            assert hashlib.sha256(canonical).hexdigest() == name
            packed: dict[str, str] = {}
            for pack in record["packs"]:
                at = f"blobs/sha256/{pack['sha256'][:2]}/{pack['sha256']}"
                data = read(at) if at in present else b""
                assert digest(at, data) == pack["sha256"] and len(data) == pack["size"]
                packed |= unpacked(data, pack["files"])
            for path, size, sha256, _ in record["tree"]["files"]:
                held = packed[path] if path in packed else digest(f"blobs/sha256/{sha256[:2]}/{sha256}")
                assert held == sha256, f"{path} of {key} has other bytes"
                assert size >= 0
            found[reference["reference"]["key"]] = {path: sha256 for path, _, sha256, _ in record["tree"]["files"]}
    return found


def unpacked(data: bytes, index: Iterable[tuple[str, int, int]]) -> dict[str, str]:
    """Path and digest of every file in a pack; its index says the same as the tar itself."""
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        inside = {member.name: (member.offset_data, member.size) for member in tar.getmembers()}
    assert inside == {path: (offset, size) for path, offset, size in index}
    return {path: hashlib.sha256(data[offset : offset + size]).hexdigest() for path, (offset, size) in inside.items()}
