"""Temporary folders of a task: private, writable, removed at the latest when its process ends in order."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from typing import List, Optional, Tuple

_made: List[Tuple[int, str]] = []  # by whom: a forked child removes none of its parent's


def make(prefix: str, root: Optional[str] = None) -> str:
    """A new folder in `root`, which is made if it is not there; None is where temporary files go."""
    if root is not None:
        os.makedirs(root, exist_ok=True)
    if not _made:
        atexit.register(_remove_all)
    folder = tempfile.mkdtemp(prefix=prefix + "_", dir=root)
    _made.append((os.getpid(), folder))
    return folder


def remove(folder: str) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    if (os.getpid(), folder) in _made:
        _made.remove((os.getpid(), folder))


def _remove_all() -> None:
    for pid, folder in list(_made):
        if pid == os.getpid():
            remove(folder)
