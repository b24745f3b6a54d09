"""A little trainer that nobody taught anything: it writes checkpoints as transformers' Trainer does, deletes the oldest, and resumes.

    python -m tests.trainer out --steps 30 --every 10 [--limit 2] [--kill 25 | --wait 25] [--pace SECONDS]

Each step changes the weights by what the state of its random numbers says, so that a run that was resumed ends with the same weights
as one that was not interrupted, or was not resumed rightly. `trainer_state.json` comes last; rotation goes by the folders' mtimes, as
transformers' does. `--kill N`: ends itself by SIGKILL after step N; `--wait N`: waits for a signal there, and goes
on at SIGUSR1. It says what it does, a line each.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path


def weights_after(steps: int) -> bytes:
    """What an uninterrupted run ends with."""
    weights = b"begin"
    for step in range(1, steps + 1):
        weights = _next(weights, step)
    return weights


def checkpoints(folder: Path) -> list[Path]:
    """As transformers' `get_last_checkpoint` sees them: by name, whatever is in them."""
    found = [path for path in folder.iterdir() if re.fullmatch(r"checkpoint-\d+", path.name) and path.is_dir()] if folder.is_dir() else []
    return sorted(found, key=lambda path: int(path.name.partition("-")[2]))


def save(folder: Path, step: int, weights: bytes, limit: int | None = None, loss: float | None = None) -> Path:
    made = folder / f"checkpoint-{step}"
    made.mkdir(parents=True, exist_ok=True)
    (made / "model.safetensors").write_bytes(_safetensors(weights))
    (made / "optimizer.pt").write_text(json.dumps({"step": step}) * 100)
    log = [{"step": step, "epoch": step / 10, "loss": 1 / step if loss is None else loss}]
    (made / "trainer_state.json").write_text(json.dumps({"global_step": step, "epoch": step / 10, "log_history": log}))
    if limit is not None:
        by_age = sorted(checkpoints(folder), key=lambda path: path.stat().st_mtime)
        for path in by_age[: max(0, len(by_age) - limit)]:
            shutil.rmtree(path)
    return made


def load(made: Path) -> tuple[int, bytes]:
    state = json.loads((made / "trainer_state.json").read_text())
    return state["global_step"], (made / "model.safetensors").read_bytes()[-32:]


def _next(weights: bytes, step: int) -> bytes:
    return hashlib.sha256(weights + b"%d" % step).digest()


def _safetensors(weights: bytes) -> bytes:
    filled = bytes(100_000) + weights
    header = json.dumps({"w": {"dtype": "U8", "shape": [len(filled)], "data_offsets": [0, len(filled)]}}).encode()
    return len(header).to_bytes(8, "little") + header + filled


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--kill", type=int)
    parser.add_argument("--wait", type=int)
    parser.add_argument("--code", type=int, default=0)
    parser.add_argument("--pace", type=float, default=0.0)
    asked = parser.parse_args()
    step, weights = 0, b"begin"
    existing = checkpoints(asked.out)
    if existing:
        step, weights = load(existing[-1])
        print("resumed", step, flush=True)
    while step < asked.steps:
        step += 1
        time.sleep(asked.pace)  # as if it computed something
        weights = _next(weights, step)
        if step % asked.every == 0:
            save(asked.out, step, weights, asked.limit)
        if step == asked.kill:
            os.kill(os.getpid(), signal.SIGKILL)
        if step == asked.wait:
            signal.signal(signal.SIGUSR1, lambda *_: None)
            print("waiting", step, flush=True)
            signal.pause()
    print("ended", step, weights.hex(), flush=True)
    sys.exit(asked.code)


if __name__ == "__main__":
    main()
