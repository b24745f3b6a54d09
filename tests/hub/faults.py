"""Misbehaviour that tests switch on: which request meets which fault.

Invariant: `times` counts only requests that really met the fault: a HEAD does not use up a "reset", nor does an empty body.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from .log import Request

CONTENT_KINDS = ("resolve", "cache", "lfs")

INSTEAD = ("429", "ratelimit", "5xx", "expired", "hang")  # met instead of an answer
IN_BODY = ("reset", "short", "stall", "wrong")  # met in the middle of a body
KINDS = (*INSTEAD, *IN_BODY, "no_range", "gzip", "slow", "down")


@dataclass
class Fault:
    """`after`: bytes of the body that still go out as they should; half of it when not said."""

    kind: str
    match: str | None = None  # see Request.is_match; without it a fault in a body is met by files only, "expired" by the LFS host only
    times: int | None = None  # None: until calm()
    after: int | None = None
    retry_after: int = 1  # seconds, "429" and "ratelimit"
    status: int = 503  # "5xx"
    rate: float = 0.0  # bytes a second, "slow": all connections together, or each with `per_connection`
    per_connection: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"no such misbehaviour: {self.kind!r}; there are {', '.join(KINDS)}")
        if self.kind == "slow" and self.rate <= 0:
            raise ValueError("slow needs a rate")

    def is_for(self, request: Request) -> bool:
        if self.times == 0:
            return False
        if self.match is not None:
            return request.is_match(None, self.match)
        if self.kind == "expired":
            return request.kind == "lfs"
        if self.kind == "gzip":
            return request.kind in ("resolve", "cache")
        return self.kind in INSTEAD or request.kind in CONTENT_KINDS


class Pace:
    """Lets at most `rate` bytes a second pass, whoever sends them; everything once `ended` is set."""

    def __init__(self, rate: float, ended: asyncio.Event) -> None:
        self.piece_bytes = max(1024, min(256 << 10, int(rate / 50)))
        self._rate = rate
        self._ended = ended
        self._free_at = 0.0

    async def passed(self, count: int) -> None:
        if self._ended.is_set():
            return
        now = asyncio.get_running_loop().time()
        self._free_at = max(self._free_at, now) + count / self._rate
        await asyncio.sleep(self._free_at - now)


class Faults:
    """What is switched on now. `calmed` is set, and replaced, by calm(): stalled connections wait for it."""

    def __init__(self, rate: float = 0.0) -> None:
        self._rate = rate
        self.calmed = asyncio.Event()
        self.calm()

    def calm(self) -> None:
        self.calmed.set()
        self.calmed = asyncio.Event()
        self._faults: list[Fault] = []
        self._pace = Pace(self._rate, self.calmed) if self._rate else None
        self._slow: Fault | None = None

    def add(self, fault: Fault) -> None:
        if fault.kind == "slow":
            self._slow, self._pace = fault, Pace(fault.rate, self.calmed)
        else:
            self._faults.append(fault)

    def meet(self, request: Request, kinds: tuple[str, ...], body_bytes: int = 0) -> Fault | None:
        """The fault of one of `kinds` that this request meets, counted. `body_bytes`: how much would be sent."""
        for fault in self._faults:
            if fault.kind not in kinds or not fault.is_for(request):
                continue
            if fault.kind in IN_BODY and (request.method == "HEAD" or body_bytes <= (fault.after or 0)):
                continue
            if fault.times is not None:
                fault.times -= 1
            request.fault = fault.kind
            return fault
        return None

    def pace(self, request: Request) -> Pace | None:
        if self._slow is None:
            return self._pace if request.kind in CONTENT_KINDS else None
        if not self._slow.is_for(request):
            return None
        return Pace(self._slow.rate, self.calmed) if self._slow.per_connection else self._pace
