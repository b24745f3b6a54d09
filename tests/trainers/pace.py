"""What the training scripts have in common with each other and with the test: where to stop, what to say, how fast to go.

On stdout first "pid N", then a line "step N" for every step, and "end N LOSS DIGEST": the last step, its loss, a digest of the weights.
"""

from __future__ import annotations

import hashlib
import os
import signal
import time
from collections.abc import Iterable
from typing import Any

STEPS = 12
SAVE_EVERY = 3
STEP_SECONDS = 0.15  # what a step of a real model would compute

print("pid", os.getpid(), flush=True)


def step(number: int) -> None:
    print("step", number, flush=True)
    if str(number) == os.environ.get("PACE_HOLD"):
        signal.pause()  # until it is killed
    time.sleep(STEP_SECONDS)  # stands for work


def end(number: int, loss: float, weights: Iterable[Any]) -> None:
    digest = hashlib.sha256()
    for tensor in weights:
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    print("end", number, repr(float(loss)), digest.hexdigest()[:16], flush=True)
