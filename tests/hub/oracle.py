"""The real huggingface_hub, in a process of its own: it reads its environment when imported, and keeps connections.

`Oracle` is the handle; `python -m tests.hub.oracle` the process: a JSON line in for each call, a JSON line out with its outcome.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Outcome:
    """What came of a call. `files` are path and SHA-256 of what the returned path shows; `error` the exception's classes, nearest first."""

    path: str | None = None
    files: dict[str, str] | None = None
    value: Any = None
    error: list[str] | None = None
    message: str = ""

    def is_error(self, name: str) -> bool:
        return self.error is not None and name in self.error


def file_hashes(folder: Path) -> dict[str, str]:
    """Path and SHA-256 of every file below, what huggingface_hub notes in a local_dir left out."""
    found = {}
    for above, names, files in os.walk(folder):
        if Path(above) == folder and ".cache" in names:
            names.remove(".cache")
        for name in files:
            with open(os.path.join(above, name), "rb") as file:
                found[os.path.relpath(os.path.join(above, name), folder)] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


class Oracle:
    """A huggingface_hub that talks to one hub; without cache_dir its files are in `folder`/hub."""

    def __init__(self, folder: Path, endpoint: str, **environment: str) -> None:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_") and not name.lower().endswith("_proxy")}
        quiet = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        root = str(Path(__file__).resolve().parents[2])
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.hub.oracle"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**clean, **quiet, "PYTHONPATH": root, "HF_HOME": str(folder), "HF_ENDPOINT": endpoint, **environment},
        )

    def call(self, name: str, **arguments: Any) -> Outcome:
        """Calls huggingface_hub.<name>, or for "api.<name>" the method of an HfApi."""
        self.begin(name, **arguments)
        return self.end()

    def begin(self, name: str, **arguments: Any) -> None:
        """Starts a call; one at a time."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"call": name, "arguments": arguments}) + "\n")
        self._process.stdin.flush()

    def end(self) -> Outcome:
        assert self._process.stdout is not None
        return Outcome(**json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()

    def __enter__(self) -> Oracle:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _call(name: str, arguments: dict[str, Any]) -> Outcome:
    import huggingface_hub

    try:
        if name.startswith("api."):
            value = getattr(huggingface_hub.HfApi(), name[4:])(**arguments)
            return Outcome(value=value if hasattr(value, "__dataclass_fields__") or not hasattr(value, "__next__") else list(value))
        path = getattr(huggingface_hub, name)(**arguments)
    except Exception as error:
        return Outcome(error=[kind.__name__ for kind in type(error).__mro__], message=str(error))
    if arguments.get("dry_run"):
        return Outcome(value=path)
    if name == "snapshot_download":
        return Outcome(path, file_hashes(Path(path)))
    shown = os.path.join(arguments.get("subfolder") or "", arguments["filename"])
    return Outcome(path, {shown: hashlib.sha256(Path(path).read_bytes()).hexdigest()})


def _plain(value: Any) -> Any:
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else str(value)


def _main() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        ask = json.loads(line)
        outcome = _call(ask["call"], ask["arguments"])
        answers.write(json.dumps(vars(outcome), default=_plain) + "\n")
        answers.flush()


if __name__ == "__main__":
    _main()
