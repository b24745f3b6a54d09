"""Old artifacts: what the package metaflow-checkpoint left in the same datastore. Read, never written or deleted.

    <prefix>/(models|checkpoints)/artifacts/<rest>                       a tar ("tar"), or the folder of its files ("files")
    <prefix>/(models|checkpoints)/artifact_metadata/<rest>.metadata      its reference, in JSON
    <prefix>/checkpoints/artifact_metadata/<folder>/latest               the reference that a later task begins with

Nothing of it has a checksum: that all of it is there is known from the size in its reference alone.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec

from .blobs import hash_bytes
from .errors import IncompatibleReference, InvalidRequest, MissingObject, ReferenceNotFound, StoreDenied, StoreMismatch, StoreProblem
from .model import Digest
from .store import Object, Store
from .tasks import each

PACKAGE = "metaflow-checkpoint"
STORAGE_FORMATS = ("files", "tar")
MAX_RECORD_BYTES = 1 << 20
MAX_ANSWER_BYTES = 960 << 10  # of a reference: it has to fit into one message
SECRETS = ("token", "use_auth_token")  # huggingface_hub's arguments were kept as they came
HUB_PREFIX = "mf.huggingface_hub/"
HUB_BOOKKEEPING = ".cache/huggingface/"  # huggingface_hub's own, which was saved with a repo's files
RECORD_SUFFIX = ".metadata"
LATEST_SUFFIX = "/latest"
READ_AT_ONCE = 32
_DATASTORE = re.compile(r"(file:///.+|s3://[^/]+(?:/.+)?)/modelcached")
_KEY = re.compile(r"((?:.+?/)?(?:models|checkpoints))/artifacts/(.+)", re.DOTALL)  # the first of the two words says which
_TAG = re.compile(r"\$+float")
log = logging.getLogger(__name__)


class Found(NamedTuple):
    """An old artifact as its datastore knows it."""

    key: str
    reference: dict[str, Any]
    record: Digest  # of the bytes that the reference was read from: who saves over a key writes others

    @property
    def is_tar(self) -> bool:
        """IncompatibleReference if it is of no kind we know."""
        storage_format = self.reference.get("storage_format")
        if storage_format not in STORAGE_FORMATS:
            raise IncompatibleReference(
                f"{self.key} was saved in the storage_format {storage_format!r}, which this daemon does not know",
                f"upgrade the daemon, or load it with {PACKAGE}",
                key=self.key,
            )
        return bool(storage_format == "tar")


def datastore(store_url: str) -> str:
    """Metaflow's datastore: ours is a folder in it, or else is its own."""
    below = _DATASTORE.fullmatch(store_url)
    return below.group(1) if below else store_url


def record_key(key: str) -> str | None:
    """Where the reference to an old artifact lies; None for what can't be one."""
    parts = _KEY.fullmatch(key)
    return f"{parts.group(1)}/artifact_metadata/{parts.group(2)}{RECORD_SUFFIX}" if parts else None


async def find(store: Store, key: str) -> Found | None:
    """The old artifact of that key in a datastore, if there is one. IncompatibleReference if what is known of it can't be read."""
    record = record_key(key)
    if record is None:
        return None
    try:
        raw = await store.get(record, MAX_RECORD_BYTES)
    except (MissingObject, InvalidRequest):
        return None
    except StoreDenied as error:  # beside a store of ours there need not be one of Metaflow's
        log.warning("what may be an old artifact can't be read", extra={"key": key, "error": error.message})
        return None
    except StoreProblem as error:
        raise _unreadable(key, error.message) from error
    return Found(key, _reference(raw, key), hash_bytes(raw))


async def folder(store: Store, key: str) -> Found:
    """Whatever lies in a folder of a store, as if it were an artifact saved as files; its listing is its record."""
    objects = sorted([part async for part in store.list(f"{key}/")])
    if not objects:
        raise ReferenceNotFound(f"nothing lies in the folder {key} of {store.url}", "is its name spelt right?", key=key)
    return Found(key, {"storage_format": "files"}, hash_bytes(repr(objects).encode()))


async def listed(store: Store, prefix: str, is_wanted: Callable[[str], bool]) -> list[dict[str, Any]]:
    """The references of old artifacts whose keys begin so, in no order: those that can be read. A prefix of several kinds has none.

    A checkpoint's `latest` says whether a task may begin with it. The package noted that down of the last one only.
    """
    if "/artifacts/" not in prefix:
        return []
    records = prefix.replace("/artifacts/", "/artifact_metadata/", 1)
    found: list[dict[str, Any]] = []
    latest: set[str] = set()

    async def read(key: str) -> None:
        with contextlib.suppress(IncompatibleReference):
            old = await find(store, key)
            if old is not None:
                found.append(old.reference)

    async def read_latest(name: str) -> None:
        with contextlib.suppress(StoreProblem, ValueError, TypeError, LookupError, RecursionError):  # missing, damaged: nothing is
            latest.add(str(json.loads(await store.get(name, MAX_RECORD_BYTES))["key"]))

    try:
        names = [part.key async for part in store.list(records)]
    except StoreDenied as error:
        log.warning("old artifacts can't be listed", extra={"prefix": prefix, "error": error.message})
        return []
    keys = [
        name.removesuffix(RECORD_SUFFIX).replace("/artifact_metadata/", "/artifacts/", 1) for name in names if name.endswith(RECORD_SUFFIX)
    ]
    keys = [key for key in keys if is_wanted(key)]
    folders = {str(record_key(key)).rpartition("/")[0] + LATEST_SUFFIX for key in keys}
    await each(sorted(folders.intersection(names)), read_latest, READ_AT_ONCE)
    await each(keys, read, READ_AT_ONCE)
    for reference in found:
        if reference.get("type") == "checkpoint":
            reference["latest"] = reference["key"] in latest
    return found


async def payload(store: Store, found: Found) -> list[Object]:
    """Every object of the artifact; of a tar, itself. StoreMismatch if something is missing.

    There may be more files than were counted: a later save under the same key adds to an earlier one.
    """
    if found.is_tar:
        head = await store.head(found.key)
        objects = [head] if head is not None else []
    else:
        objects = sorted([part async for part in store.list(f"{found.key}/")])
    here, counted = sum(part.size for part in objects), found.reference.get("size")
    if not objects:
        raise StoreMismatch("nothing of it is there", "it was deleted, or an empty folder was saved")
    if isinstance(counted, int) and (here != counted if found.is_tar else here < counted):
        raise StoreMismatch(f"it has {here} bytes there, and had {counted} when it was saved", "a part was deleted")
    return objects


def is_bookkeeping(found: Found, each: Object) -> bool:
    """Whether an object is no file of the artifact, but what huggingface_hub noted down about them."""
    return found.key.startswith(HUB_PREFIX) and each.key.startswith(f"{found.key}/{HUB_BOOKKEEPING}")


def _reference(raw: bytes, key: str) -> dict[str, Any]:
    """The record's reference, as references of ours are: no token, an attempt that is a number, metadata that can be sent."""
    try:
        read = json.loads(raw)
        if not isinstance(read, dict):
            raise ValueError("it is no JSON object")
        metadata = read.get("metadata")
        if isinstance(metadata, dict) and isinstance(metadata.get("kwargs"), dict):
            metadata = {**metadata, "kwargs": {name: value for name, value in metadata["kwargs"].items() if name not in SECRETS}}
        reference = {**read, "key": key, "metadata": _spelt(metadata)}
        if isinstance(read.get("attempt"), str) and read["attempt"].isdecimal():
            reference["attempt"] = int(read["attempt"])
        if len(msgspec.json.encode(reference)) > MAX_ANSWER_BYTES:
            raise ValueError("its metadata is too large")
    except (ValueError, OverflowError, RecursionError, msgspec.MsgspecError) as error:
        raise _unreadable(key, str(error)) from error
    return reference


def _spelt(value: Any) -> Any:
    """Metadata as the SDK reads it from the wire, where there is no NaN and no infinity."""
    if isinstance(value, float) and not math.isfinite(value):
        return {"$float": repr(value)}
    if isinstance(value, list):
        return [_spelt(each) for each in value]
    if isinstance(value, dict):
        return {f"${name}" if len(value) == 1 and _TAG.fullmatch(name) else name: _spelt(each) for name, each in value.items()}
    return value


def _unreadable(key: str, why: str) -> IncompatibleReference:
    return IncompatibleReference(f"what {PACKAGE} knows of {key} can't be read: {why}", "its record was damaged: save it again", key=key)
