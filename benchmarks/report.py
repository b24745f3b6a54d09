"""What a benchmark found: rows of ours against a peer, as a table for people and as JSON for programs."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"


@dataclass(frozen=True)
class Row:
    """One measure; less is better. Samples of one index were taken one after the other, so their ratio is fair on a busy machine."""

    what: str
    unit: str
    ours: Sequence[float]
    peer: Sequence[float] = ()
    most: float | None = None  # the goal for ours, in `unit`
    most_ratio: float | None = None  # the goal for ours / peer
    peer_is: str = ""  # when it is not the obvious one
    digits: int = 2
    ratios: list[float] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "ratios", [ours / peer for ours, peer in zip(self.ours, self.peer, strict=False) if peer])

    @property
    def is_met(self) -> bool | None:
        """Whether the goals are met by the median; None without a goal."""
        verdicts = []
        if self.most is not None:
            verdicts.append(statistics.median(self.ours) <= self.most)
        if self.most_ratio is not None and self.ratios:
            verdicts.append(statistics.median(self.ratios) <= self.most_ratio)
        return all(verdicts) if verdicts else None

    def cells(self) -> list[str]:
        goals = [f"≤ {self.most:g} {self.unit}".strip()] if self.most is not None else []
        goals += [f"≤ {self.most_ratio:.3g}x"] if self.most_ratio is not None else []
        peer = _spread(self.peer, self.unit, self.digits) + (f" {self.peer_is}" if self.peer_is else "")
        mark = {True: "yes", False: "**no**", None: ""}[self.is_met]
        return [self.what, _spread(self.ours, self.unit, self.digits), peer, _spread(self.ratios, "x", 2), ", ".join(goals), mark]

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "is_met": self.is_met}

    @classmethod
    def from_json(cls, said: dict[str, Any]) -> Row:
        return cls(**{each.name: said[each.name] for each in fields(cls) if each.init})


def table(rows: Sequence[Row]) -> str:
    head = ["", "modelcached", "peer", "ratio", "goal", "met"]
    lines = [head, ["---"] * len(head), *(row.cells() for row in rows)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def write_into(readme: Path, text: str) -> bool:
    """Replaces what stands between the markers; False when there are none."""
    before, begin, rest = readme.read_text().partition(BEGIN) if readme.exists() else ("", "", "")
    _, end, after = rest.partition(END)
    if not (begin and end):
        return False
    readme.write_text(f"{before}{begin}\n{text}\n{end}{after}")
    return True


def _spread(samples: Sequence[float], unit: str, digits: int) -> str:
    if not samples:
        return ""
    middle = f"{statistics.median(samples):.{digits}f}{'' if unit == 'x' else ' '}{unit}".strip()
    return middle if len(samples) == 1 else f"{middle} ({min(samples):.{digits}f}–{max(samples):.{digits}f})"
