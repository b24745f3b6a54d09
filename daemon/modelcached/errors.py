"""What can go wrong in the daemon, named for the condition; `name` is a key of `modelcache.codes.ERROR_CODES`.

ModelcachedError
├── InvalidRequest        the arguments make no sense
│   └── EndpointNotAllowed, StoreNotAllowed
├── HubProblem            the hub said no: asking again does not help
│   ├── RepoNotFound, GatedRepo, TokenRefused, RevisionNotFound, EntryNotFound
│   ├── ContentMismatch   its bytes are not what their name says
│   └── UnsafePath        a listing with a name that would leave its folder
├── LocalEntryNotFound    not on this node, and the hub may not be asked
│   ├── IncompleteSnapshot
│   └── HubUnavailable    the hub can't be reached: asking again may help
├── NoSpace, Storage      the node's disk
│   └── LocalMismatch     a file on it is not what its name says
│       └── SaveDamaged   a captured save can't be brought to the store any more
├── StoreProblem          the store said no: asking again does not help
│   ├── StoreDenied, StoreMissingBucket, StoreClockSkew, StoreFull
│   ├── StoreMismatch     its bytes are not what was put there
│   └── MissingObject, ObjectExists, ObjectChanged    what a key holds is not what the caller counted on
├── StoreUnavailable      the store can't be reached, or broke off: asking again may help
│   └── StoreSlow         it stopped answering
├── SaveUnknown           no such save is open
├── ReferenceNotFound, IncompatibleReference   nothing has this key, or what has can't be read
├── NotPermitted, InUse, TooMany, ShuttingDown
└── RootError             the root can't be used; raised only at start
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class ModelcachedError(Exception):
    """`message` says what happened, `hint` what to do, `data` travels to the caller beside them."""

    name = "internal"

    def __init__(self, message: str, hint: str = "", **data: Any) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.data = data


class InvalidRequest(ModelcachedError):
    name = "invalid_params"


class EndpointNotAllowed(InvalidRequest):
    name = "endpoint_not_allowed"


class HubProblem(ModelcachedError):
    pass


class RepoNotFound(HubProblem):
    name = "repo_not_found"


class GatedRepo(RepoNotFound):
    name = "gated_repo"


class TokenRefused(HubProblem):
    name = "token_refused"


class RevisionNotFound(HubProblem):
    name = "revision_not_found"


class EntryNotFound(HubProblem):
    name = "entry_not_found"


class ContentMismatch(HubProblem):
    name = "content_mismatch"


class UnsafePath(HubProblem):
    name = "unsafe_path"


class LocalEntryNotFound(ModelcachedError):
    name = "local_entry_not_found"


class IncompleteSnapshot(LocalEntryNotFound):
    name = "incomplete_snapshot"


class HubUnavailable(LocalEntryNotFound):
    name = "hub_unavailable"


class NoSpace(ModelcachedError):
    name = "no_space"


class Storage(ModelcachedError):
    name = "storage"


class LocalMismatch(Storage):
    pass


class SaveDamaged(LocalMismatch):
    pass


class StoreProblem(ModelcachedError):
    name = "store_problem"


class StoreDenied(StoreProblem):
    name = "store_denied"


class StoreMissingBucket(StoreProblem):
    name = "store_missing_bucket"


class StoreClockSkew(StoreProblem):
    name = "store_clock_skew"


class StoreFull(StoreProblem):
    name = "store_full"


class StoreMismatch(StoreProblem):
    name = "store_mismatch"


class MissingObject(StoreProblem):
    name = "missing_object"


class ObjectExists(StoreProblem):
    name = "object_exists"


class ObjectChanged(StoreProblem):
    name = "object_changed"


class StoreUnavailable(ModelcachedError):
    name = "store_unavailable"


class StoreSlow(StoreUnavailable):
    name = "store_slow"


class NotPermitted(ModelcachedError):
    name = "not_permitted"


class InUse(ModelcachedError):
    name = "in_use"


class TooMany(ModelcachedError):
    name = "too_many"


class ShuttingDown(ModelcachedError):
    name = "shutting_down"


class SaveUnknown(ModelcachedError):
    name = "save_unknown"


class ReferenceNotFound(ModelcachedError):
    name = "reference_not_found"


class IncompatibleReference(ModelcachedError):
    name = "incompatible_reference"


class StoreNotAllowed(InvalidRequest):
    name = "store_not_allowed"


class RootError(ModelcachedError):
    name = "storage"


DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def disk_errors(what: str) -> Iterator[None]:
    """Translates what the node's disk says while doing `what`: the one place where an OSError gets a name."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FULL:
            raise NoSpace(
                f"the disk is full: {what}", "free space on the cache's filesystem, or remove repos: modelcache ls, modelcache rm"
            ) from error
        place = f" ({error.filename})" if error.filename else ""
        raise Storage(
            f"{what}: {os.strerror(error.errno or errno.EIO)}{place}", "look at the kernel log, then run: modelcache doctor"
        ) from error
