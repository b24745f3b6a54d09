"""Scripts that train something tiny with the real libraries, for tests/test_trainers.py; they run by themselves, too."""

from __future__ import annotations

import re
from pathlib import Path


def pace_of() -> tuple[int, int]:
    """How many steps all of them take, and how many lie between two checkpoints."""
    text = Path(__file__).with_name("pace.py").read_text()
    found = {name: int(value) for name, value in re.findall(r"^(STEPS|SAVE_EVERY) = (\d+)$", text, re.M)}
    return found["STEPS"], found["SAVE_EVERY"]
