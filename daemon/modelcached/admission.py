"""Who may connect: users and groups of the configuration, and how many connections one user has.

Root and the daemon's own user always may. Who is calling, and in which groups, is what the kernel says of the process that connected
(SO_PEERCRED, SO_PEERGROUPS), never what a message says. Who is turned away is told why and what to do, and nothing else.
"""

from __future__ import annotations

import ctypes
import grp
import logging
import os
import pwd
import socket
import time
from collections.abc import Iterable

from .config import Config
from .errors import ModelcachedError, NotPermitted, TooMany
from .model import Caller, is_owner
from .recent import Recent

SO_PEERGROUPS = 59  # asm-generic/socket.h; Python has no name for it
MAX_GROUPS = 65_536  # NGROUPS_MAX
SAID_AGAIN_SECONDS = 60.0  # a uid that knocks all the time does not fill the log
log = logging.getLogger(__name__)


class Admission:
    """Only the event loop touches it."""

    def __init__(self, users: Iterable[str] = (), groups: Iterable[str] = (), max_per_user: int = 0) -> None:
        """Names or ids; neither: everybody. `max_per_user`: connections, 0 is no limit."""
        self._users = frozenset(int(name) if name.isdecimal() else pwd.getpwnam(name).pw_uid for name in users)
        self._groups = frozenset(int(name) if name.isdecimal() else grp.getgrnam(name).gr_gid for name in groups)
        self._max_per_user = max_per_user
        self._said: Recent[int, float] = Recent(1024)  # monotonic; by uid

    @classmethod
    def of(cls, config: Config) -> Admission:
        return cls(config.allow_users, config.allow_groups, config.max_connections_per_user)

    def refusal(self, connected: socket.socket, caller: Caller, connections: int) -> ModelcachedError | None:
        """Why this caller, who has so many connections already, gets none; None: it does."""
        error: ModelcachedError | None = None
        if is_owner(caller):
            return None
        if not self._is_allowed(connected, caller):
            error = NotPermitted(
                f"uid {caller.uid} may not use this daemon",
                f"ask who runs this node to put uid {caller.uid} into allow_users, or one of its groups into allow_groups",
            )
        elif self._max_per_user and connections >= self._max_per_user:
            error = TooMany(
                f"uid {caller.uid} has {connections} connections already, the most that one user may have",
                "end processes that no longer need theirs, or raise max_connections_per_user",
            )
        if error is not None:
            self._note(caller, error)
        return error

    def _is_allowed(self, connected: socket.socket, caller: Caller) -> bool:
        if not self._users and not self._groups:
            return True
        return caller.uid in self._users or (bool(self._groups) and not self._groups.isdisjoint({caller.gid, *peer_groups(connected)}))

    def _note(self, caller: Caller, error: ModelcachedError) -> None:
        said = self._said.get(caller.uid)
        if said is None or time.monotonic() - said > SAID_AGAIN_SECONDS:
            self._said.put(caller.uid, time.monotonic())
            log.warning("a caller is turned away", extra={"uid": caller.uid, "pid": caller.pid, "reason": error.message})


def peer_groups(connected: socket.socket) -> list[int]:
    """The supplementary groups that the process at the other end had when it connected. Python's getsockopt ends at 256 of them."""
    groups = (ctypes.c_uint32 * MAX_GROUPS)()
    size = ctypes.c_uint32(ctypes.sizeof(groups))
    if _libc.getsockopt(connected.fileno(), socket.SOL_SOCKET, SO_PEERGROUPS, groups, ctypes.byref(size)):
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return list(groups[: size.value // ctypes.sizeof(ctypes.c_uint32)])


_libc = ctypes.CDLL(None, use_errno=True)
