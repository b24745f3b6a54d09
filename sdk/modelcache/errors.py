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
├── InUseError                        (OSError, EBUSY)   a task holds a lease on it
├── ViewNotVisibleError               (FileNotFoundError)  the daemon's path is not this path here: a mount is missing
├── HFValidationError                 (ValueError)       not the id of a repo; nobody was asked
├── LocalTokenNotFoundError           (OSError)          `token=True`, and no token is to be found
└── DryRunError                       (OSError)          `dry_run=True`, and the hub may not or can't be asked
"""

from __future__ import annotations

import errno
from typing import Any, Dict, Optional, Type


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
        )
    },
}


def from_wire(error: Dict[str, Any]) -> ModelcacheError:
    """The exception for a JSON-RPC error object of the daemon."""
    data = dict(error.get("data") or {})
    name, hint = data.pop("name", "internal"), data.pop("hint", "")
    kind = _BY_NAME.get(name, DaemonError)
    made = kind(str(error.get("message", name)), hint, data)
    made.name = name
    return made


def unavailable(message: str) -> DaemonNotAvailableError:
    """The error that tells the three ways to get a daemon."""
    return DaemonNotAvailableError(
        message,
        "one of these gives you a daemon: (1) pip install 'modelcached[daemon]' here (Python 3.11 or newer), and one is started for you; "
        "(2) run the node's: systemctl enable --now modelcached; "
        "(3) in a container, mount the node's socket and its cache (read-only), and set MODELCACHE_SOCKET to where the socket is",
    )
