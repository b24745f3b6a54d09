"""What can go wrong, as the caller sees it. Classes are named for the condition, carry data, and say what to do (`hint`).

ModelcacheError
├── DaemonError                       the daemon said no, or can't be reached
│   ├── DaemonNotAvailableError       (ConnectionError)  nobody listens, and none could be started
│   ├── DaemonConnectionError         (ConnectionError)  the connection broke and could not be mended
│   ├── ProtocolError                 one side does not understand the other
│   └── InvalidRequestError           (ValueError)       the daemon refused the arguments
├── HubError                          (OSError)
│   ├── RepositoryNotFoundError       the repo does not exist, or is private and the token is not accepted
│   │   └── GatedRepoError            access has to be granted on the repo's page first
│   ├── TokenRefusedError             the hub does not accept this token
│   ├── RevisionNotFoundError
│   ├── RemoteEntryNotFoundError      (EntryNotFoundError)
│   ├── ContentMismatchError          the hub's bytes are not what their name says
│   └── UnsafePathError               (ValueError)       a file name in the repo would leave its folder
├── LocalEntryNotFoundError           (EntryNotFoundError, FileNotFoundError)  not on this node, and the hub may not be asked
│   ├── IncompleteSnapshotError       some of the files are here, some are not
│   └── HubUnavailableError           (ConnectionError)  the hub can't be reached
├── NoSpaceError                      (OSError, ENOSPC)
├── StorageError                      (OSError)          the node's disk failed
├── NotPermittedError                 (PermissionError)
├── InUseError                        (OSError, EBUSY)   a task holds a lease on it, or it is pinned
├── ViewNotVisibleError               (FileNotFoundError)  the daemon's path is not this path here: a mount is missing
├── HFValidationError                 (ValueError)       not the id of a repo; nobody was asked
├── LocalTokenNotFoundError           (OSError)          `token=True`, and no token is to be found
├── DryRunError                       (OSError)          `dry_run=True`, and the hub may not or can't be asked
├── SaveError                                            nothing was saved
│   ├── NotSaveableError              (ValueError)       the path holds what can't be saved: a device, a link that leads out, ...
│   ├── MetadataError                 (ValueError)       a value of the metadata is not plain data
│   ├── FileChangedError              (OSError, EBUSY)   a file is still being written
│   └── SaveUnknownError                                 the daemon has forgotten a save before its end
├── SavesPendingError                 (TimeoutError)     some saves are on this node and not in the store yet
├── ReferenceNotFoundError            (KeyError)         nothing was saved under this key, or it was deleted
├── IncompatibleReferenceError        (ValueError)       not a reference, or of a newer version, or its tree is damaged
└── StoreError                        (OSError)
    ├── StoreUnavailableError         (ConnectionError)
    ├── StoreDeniedError              (PermissionError)  the store refuses the daemon's credentials
    └── StoreNotAllowedError          (ValueError)       this daemon does not serve that store

The names that flows written for metaflow-checkpoint catch (`METAFLOW_NAMES`) are here too, made when one is asked for. Where Metaflow
is imported they are MetaflowExceptions as well; they can't be it always, for to import Metaflow takes longer than most saves, and
where it is not imported nobody has the class to compare with.
"""

from __future__ import annotations

import errno
import sys
from typing import Any, Dict, Optional, Tuple, Type, Union


class ModelcacheError(Exception):
    """The root of all errors of modelcache. `hint` says what to do, `data` what the daemon sent with it."""

    name = "internal"  # the wire's name of the condition

    def __init__(self, message: str, hint: str = "", data: Optional[Dict[str, Any]] = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.data: Dict[str, Any] = dict(data or {})

    def __str__(self) -> str:
        return "%s\nhint: %s" % (self.message, self.hint) if self.hint else self.message

    def __reduce__(self) -> Any:
        return (type(self), (self.message, self.hint, self.data))


class DaemonError(ModelcacheError):
    pass


class DaemonNotAvailableError(DaemonError, ConnectionError):
    pass


class DaemonConnectionError(DaemonError, ConnectionError):
    pass


class ProtocolError(DaemonError):
    pass


class InvalidRequestError(DaemonError, ValueError):
    pass


class EntryNotFoundError(Exception):
    """An entry was not found, on the hub or on this node."""


class HubError(ModelcacheError, OSError):
    pass


class RepositoryNotFoundError(HubError):
    name = "repo_not_found"


class GatedRepoError(RepositoryNotFoundError):
    name = "gated_repo"


class TokenRefusedError(HubError):
    name = "token_refused"


class RevisionNotFoundError(HubError):
    name = "revision_not_found"


class RemoteEntryNotFoundError(HubError, EntryNotFoundError):
    name = "entry_not_found"


class ContentMismatchError(HubError):
    name = "content_mismatch"


class UnsafePathError(HubError, ValueError):
    name = "unsafe_path"


class LocalEntryNotFoundError(ModelcacheError, EntryNotFoundError, FileNotFoundError):
    name = "local_entry_not_found"


class IncompleteSnapshotError(LocalEntryNotFoundError):
    name = "incomplete_snapshot"


class HubUnavailableError(LocalEntryNotFoundError, ConnectionError):
    name = "hub_unavailable"


class NoSpaceError(ModelcacheError, OSError):
    name = "no_space"

    def __init__(self, message: str, hint: str = "", data: Optional[Dict[str, Any]] = None) -> None:
        super().__init__(message, hint, data)
        self.errno = errno.ENOSPC


class StorageError(ModelcacheError, OSError):
    name = "storage"


class NotPermittedError(ModelcacheError, PermissionError):
    name = "not_permitted"


class InUseError(ModelcacheError, OSError):
    name = "in_use"

    def __init__(self, message: str, hint: str = "", data: Optional[Dict[str, Any]] = None) -> None:
        super().__init__(message, hint, data)
        self.errno = errno.EBUSY


class ViewNotVisibleError(ModelcacheError, FileNotFoundError):
    name = "view_not_visible"


class HFValidationError(ModelcacheError, ValueError):
    name = "repo_id_invalid"


class LocalTokenNotFoundError(ModelcacheError, OSError):
    name = "token_not_found"


class DryRunError(ModelcacheError, OSError):
    name = "dry_run_impossible"


class SaveError(ModelcacheError):
    pass


class NotSaveableError(SaveError, ValueError):
    name = "not_saveable"


class MetadataError(SaveError, ValueError):
    name = "metadata_invalid"


class FileChangedError(SaveError, OSError):
    """`data` has the file's `path`, and the `pid` that has it open for writing when one was seen."""

    name = "file_changed"

    def __init__(self, message: str, hint: str = "", data: Optional[Dict[str, Any]] = None) -> None:
        super().__init__(message, hint, data)
        self.errno = errno.EBUSY


class SaveUnknownError(SaveError):
    name = "save_unknown"


class SavesPendingError(ModelcacheError, TimeoutError):
    """`data` has the `pending` keys. They stay on the node, and the daemon goes on bringing them to the store."""

    name = "saves_pending"


class ReferenceNotFoundError(ModelcacheError, KeyError):
    name = "reference_not_found"


class IncompatibleReferenceError(ModelcacheError, ValueError):
    name = "incompatible_reference"


class StoreError(ModelcacheError, OSError):
    pass


class StoreUnavailableError(StoreError, ConnectionError):
    name = "store_unavailable"


class StoreDeniedError(StoreError, PermissionError):
    name = "store_denied"


class StoreNotAllowedError(StoreError, ValueError):
    name = "store_not_allowed"


# The name, and what of ours (or of these) it is.
METAFLOW_NAMES: Dict[str, Tuple[Union[str, Type[Exception]], ...]] = {
    "CheckpointException": (ModelcacheError,),
    "CheckpointNotAvailableException": ("CheckpointException",),
    "ModelException": (ModelcacheError,),
    "LoadingException": (ModelcacheError,),
    "KeyNotFoundError": (ReferenceNotFoundError,),  # what a load or delete raises
    "KeyNotCompatibleException": (IncompatibleReferenceError,),  # not the key of a model or checkpoint
    "KeyNotCompatibleWithObjectException": (IncompatibleReferenceError,),  # of the other kind
    "IncompatibleObjectTypeException": (IncompatibleReferenceError,),  # a dict or object that is no reference
    "DatastoreReadInitException": (StoreError,),
    "DatastoreWriteInitException": (StoreError,),
    "DatastoreNotReadyException": (StoreError,),
    "UnresolvableDatastoreException": (StoreError,),
    "UnhashableValueException": (ModelcacheError, ValueError),
    "ArgumentException": (ModelcacheError, ValueError),  # an argument of a decorator makes no sense
}
_made_for_metaflow: Dict[Tuple[str, bool], Any] = {}  # by name, and whether it is a MetaflowException

_BY_NAME: Dict[str, Type[ModelcacheError]] = {
    "parse_error": ProtocolError,
    "invalid_request": ProtocolError,
    "method_not_found": ProtocolError,
    "unsupported_version": ProtocolError,
    "invalid_params": InvalidRequestError,
    "endpoint_not_allowed": InvalidRequestError,
    "internal": DaemonError,
    "too_many": DaemonError,
    "shutting_down": DaemonConnectionError,
    "store_slow": StoreUnavailableError,
    **dict.fromkeys(
        (
            "store_problem",
            "store_missing_bucket",
            "store_clock_skew",
            "store_full",
            "store_mismatch",
            "missing_object",
            "object_exists",
            "object_changed",
        ),
        StoreError,
    ),
    **{
        kind.name: kind
        for kind in (
            RepositoryNotFoundError,
            GatedRepoError,
            TokenRefusedError,
            RevisionNotFoundError,
            RemoteEntryNotFoundError,
            ContentMismatchError,
            UnsafePathError,
            LocalEntryNotFoundError,
            IncompleteSnapshotError,
            HubUnavailableError,
            NoSpaceError,
            StorageError,
            NotPermittedError,
            InUseError,
            FileChangedError,
            SaveUnknownError,
            ReferenceNotFoundError,
            IncompatibleReferenceError,
            StoreUnavailableError,
            StoreDeniedError,
            StoreNotAllowedError,
        )
    },
}


def from_wire(error: Dict[str, Any]) -> ModelcacheError:
    """The exception for a JSON-RPC error object of the daemon."""
    data = dict(error.get("data") or {})
    name, hint = data.pop("name", "internal"), data.pop("hint", "")
    kind = _BY_NAME.get(name, DaemonError)
    if kind is ReferenceNotFoundError:
        kind = _for_metaflow("KeyNotFoundError")
    made = kind(str(error.get("message", name)), hint, data)
    made.name = name
    return made


def unavailable(message: str) -> DaemonNotAvailableError:
    """The error that tells the three ways to get a daemon."""
    return DaemonNotAvailableError(
        message,
        "one of these gives you a daemon: (1) pip install 'modelcached[daemon]' here (Python 3.11 or newer), and one is started for you; "
        "(2) run the node's: modelcached install, then systemctl enable --now modelcached; "
        "(3) in a container, mount the node's socket and its cache (read-only), and set MODELCACHE_SOCKET to where the socket is",
    )


def _for_metaflow(name: str) -> Any:
    """The class of that name: a MetaflowException where Metaflow is imported, and a subclass of what it was before that."""
    theirs = getattr(sys.modules.get("metaflow.exception"), "MetaflowException", None)
    return _class_for_metaflow(name, theirs)


def _class_for_metaflow(name: str, theirs: Optional[type]) -> Any:
    key = (name, theirs is not None)
    if key not in _made_for_metaflow:
        ours = [_class_for_metaflow(base, None) if isinstance(base, str) else base for base in METAFLOW_NAMES[name]]
        members: Dict[str, Any] = {"__module__": __name__, "__reduce__": _reduce}
        if theirs is not None:  # with what Metaflow prints, and its own constructor would have set
            ours = [_class_for_metaflow(name, None), theirs]
            members.update(headline="modelcache", line_no=None, source_line=None, source_file=None, message=_WithHint(), __str__=_text)
        _made_for_metaflow[key] = type(name, tuple(ours), members)
    return _made_for_metaflow[key]


class _WithHint:
    """`message` of an error that Metaflow prints: it knows nothing of hints."""

    def __get__(self, error: Any, _: Any = None) -> Any:
        message, hint = error.__dict__["_message"], error.__dict__.get("hint")
        return "%s\nhint: %s" % (message, hint) if hint else message

    def __set__(self, error: Any, message: str) -> None:
        error.__dict__["_message"] = message


def _text(error: ModelcacheError) -> str:
    return error.message


def _reduce(error: ModelcacheError) -> Any:
    """By name: whoever unpickles it may have no Metaflow, or have it."""
    message = error.__dict__.get("_message", error.message)
    return (_again, (type(error).__name__, message, error.hint, error.data))


def _again(name: str, message: str, hint: str, data: Dict[str, Any]) -> Any:
    return _for_metaflow(name)(message, hint, data)


def __getattr__(name: str) -> Any:
    if name in METAFLOW_NAMES:
        return _for_metaflow(name)
    raise AttributeError("module %r has no attribute %r" % (__name__, name))
