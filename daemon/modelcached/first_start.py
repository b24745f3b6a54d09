"""What a user's daemon may take of a disk that nobody has given it: a share of what was free when it first started.

The answer is written down below the root, so that a cache that has filled up is not given less and less.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from .filesystems import free_bytes
from .kinds import MIB, Space
from .layout import Layout

SHARE = 0.60
ORIGIN = "60 % of what was free at the first start"


def max_size(root: Path) -> Space:
    """As it was decided, or as it would be now."""
    with contextlib.suppress(OSError, ValueError):
        return Space(max(MIB, int(Layout(root).first_start.read_text())))
    there = next(folder for folder in (root, *root.parents) if folder.exists())
    return Space(max(MIB, int(free_bytes(there) * SHARE) // MIB * MIB))


def remember(layout: Layout, size: Space) -> None:
    """Holds for every later start; what is written down already, stays. On a full disk a later start decides."""
    with contextlib.suppress(OSError), open(layout.first_start, "x") as file:
        file.write(str(size.size_bytes))
