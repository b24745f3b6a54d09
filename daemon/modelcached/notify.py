"""Tells the service manager how the daemon is doing (sd_notify). Without one, every call does nothing.

Sending never blocks and never fails the daemon: a service manager that does not listen is its own problem.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import MutableMapping


class Notifier:
    def __init__(self, address: str | None = None, watchdog_seconds: float | None = None) -> None:
        self._address = "\0" + address[1:] if address and address.startswith("@") else address
        self.watchdog_seconds = watchdog_seconds  # None: no watchdog. WATCHDOG=1 has to come more often than this

    @classmethod
    def take_from(cls, environment: MutableMapping[str, str]) -> Notifier:
        """The manager named by the environment, which is removed from it: child processes do not speak for the daemon."""
        address = environment.pop("NOTIFY_SOCKET", None)
        microseconds = environment.pop("WATCHDOG_USEC", "")
        meant_for = environment.pop("WATCHDOG_PID", "") or str(os.getpid())
        is_watched = microseconds.isdigit() and int(microseconds) > 0 and meant_for == str(os.getpid())
        return cls(address, int(microseconds) / 1e6 if is_watched else None)

    def ready(self) -> None:
        self._send("READY=1")

    def status(self, text: str) -> None:
        self._send("STATUS=" + " ".join(text.split()))

    def reloading(self) -> None:
        """Follow it with `ready`."""
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self, seconds: float) -> None:
        """And so long the end may take: more than the unit says, if the daemon's own settings do."""
        self._send("STOPPING=1")
        self._send(f"EXTEND_TIMEOUT_USEC={round(seconds * 1e6)}")

    def alive(self) -> None:
        self._send("WATCHDOG=1")

    def _send(self, state: str) -> None:
        if self._address is None:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK) as sending:
                sending.sendto(state.encode(), self._address)
        except OSError:
            pass
