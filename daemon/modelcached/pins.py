"""Pins: named wishes to keep trees, `pins/<name>.json`. They survive restarts and power cuts, and may expire (I4).

All of them are in memory too, so whether a tree is pinned can be asked in the step that takes it away.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from . import durable
from .errors import InvalidRequest, LocalEntryNotFound, TooMany
from .layout import Layout
from .model import Caller, TreeId, is_digest, is_owner

MAX_NAME_BYTES = 200
MAX_PINS = 1000  # of one uid
log = logging.getLogger(__name__)


class Pin(msgspec.Struct, frozen=True):
    name: str
    what: str  # the repo or key, as its owner named it
    trees: tuple[str, ...]
    uid: int
    created: float  # seconds since the epoch
    expires: float | None = None  # None: never

    def is_over(self, now: float) -> bool:
        return self.expires is not None and self.expires <= now


_pin_json = msgspec.json.Decoder(Pin)


class Pins:
    """`_pins` are the pins as the disk has them, by uid and name; only the event loop touches it."""

    def __init__(self, layout: Layout, clock: Callable[[], float] = time.time) -> None:
        self._layout = layout
        self._clock = clock
        self._pins = {(pin.uid, pin.name): pin for pin in self._read()}

    def all(self) -> list[Pin]:
        now = self._clock()
        return sorted((pin for pin in self._pins.values() if not pin.is_over(now)), key=lambda pin: pin.created)

    def holding(self, tree: TreeId) -> list[Pin]:
        now = self._clock()
        return [pin for pin in self._pins.values() if tree in pin.trees and not pin.is_over(now)]

    def held(self) -> set[TreeId]:
        return {TreeId(tree) for pin in self.all() for tree in pin.trees}

    def put(
        self, name: str, what: str, trees: tuple[TreeId, ...], caller: Caller, seconds: float | None
    ) -> tuple[Pin, Callable[[], None]]:
        """Pins from now on; the pin, and what makes it last (blocks). A pin of the same name and uid is replaced."""
        if not name or len(name.encode()) > MAX_NAME_BYTES or not name.isprintable():
            raise InvalidRequest(f"{name[:80]!r} is no name for a pin", f"1 to {MAX_NAME_BYTES} bytes that can be printed")
        if sum(uid == caller.uid for uid, _ in self._pins) >= MAX_PINS and (caller.uid, name) not in self._pins:
            raise TooMany(f"uid {caller.uid} has {MAX_PINS} pins", "remove some: modelcache pin --list, modelcache unpin NAME")
        now = self._clock()
        pin = Pin(name, what, tuple(trees), caller.uid, now, None if seconds is None else now + seconds)
        self._pins[caller.uid, name] = pin
        return pin, lambda: durable.write(self._layout.pin(pin.uid, name), msgspec.json.encode(pin), self._layout.fresh("pin"))

    def remove(self, name: str, caller: Caller) -> Callable[[], None]:
        """Unpins at once; returns what makes it last (blocks). Owners remove the pins of that name whosever they are."""
        meant = [pin for pin in self.all() if pin.name == name and (pin.uid == caller.uid or is_owner(caller))]
        if not meant:
            raise LocalEntryNotFound(f"you have no pin {name[:80]!r}", "see what there is: modelcache pin --list")
        return self._drop(meant)

    def sweep(self) -> Callable[[], None]:
        """Forgets the pins that have expired; returns what is left to do (blocks)."""
        now = self._clock()
        return self._drop([pin for pin in self._pins.values() if pin.is_over(now)])

    def _drop(self, pins: list[Pin]) -> Callable[[], None]:
        for pin in pins:
            del self._pins[pin.uid, pin.name]

        def unlink() -> None:
            for pin in pins:
                self._layout.pin(pin.uid, pin.name).unlink(missing_ok=True)
            if pins:
                durable.sync_folders([self._layout.pins])

        return unlink

    def _read(self) -> list[Pin]:
        found = []
        for path in sorted(self._layout.pins.glob("*.json")):
            try:
                pin = _decode(path)
            except (OSError, ValueError) as error:  # whoever wanted it can pin again; the file is kept
                log.warning("a pin can't be read", extra={"pin": path.name, "error": str(error)})
                continue
            found.append(pin)
        return found

    def __len__(self) -> int:
        return len(self._pins)

    def __repr__(self) -> str:
        return f"<Pins {len(self._pins)}>"


def _decode(path: Path) -> Pin:
    with contextlib.suppress(msgspec.MsgspecError):
        pin = _pin_json.decode(path.read_bytes())
        if all(map(is_digest, pin.trees)):
            return pin
    raise ValueError("not a pin")
