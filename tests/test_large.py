"""One large file, and many small ones: they come back as they were, and the daemon's memory does not grow with the large one.

Wherever it is on its way; from the kernel's own account.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from .clients import Client
from .daemon import Daemon
from .hub import Random
from .saves import MIB, Tree, Wire, fill, hashes, wired
from .seaweed import SeaweedFS

GIB = 1 << 30
FLAT_BYTES = 16 * MIB


class Memory:
    """A daemon's, after it did `usual`, which needs what is made once (threads, connections), and buffers for a file that is not small."""

    def __init__(self, daemon: Daemon, usual: Callable[[], object]) -> None:
        self._folder = Path(f"/proc/{daemon.pid}")
        self._usual = self._peak(usual)

    def grown(self, work: Callable[[], object]) -> int:
        """Bytes that it needed at most, more than for what is usual."""
        return self._peak(work) - self._usual

    def _peak(self, work: Callable[[], object]) -> int:
        (self._folder / "clear_refs").write_text("5")  # it is counted from now on
        work()
        return self._value("VmHWM")

    def _value(self, name: str) -> int:
        lines = (self._folder / "status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name + ":"))


def write(path: Path, content: Random) -> str:
    sha256 = hashlib.sha256()
    with open(path, "wb") as file:
        for chunk in content.chunks():
            file.write(chunk)
            sha256.update(chunk)
    return sha256.hexdigest()


def save(wire: Wire, name: str, path: Path) -> None:
    size = path.stat().st_size
    with wire.open(name, size) as saving:
        assert saving.files([os.open(path, os.O_RDONLY)], [("large.bin", size, False)]) == []
        saving.close()


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_three_gibibytes(tmp_path: Path, seaweed: SeaweedFS, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in seaweed.environment().items():
        monkeypatch.setenv(name, value)
    url, grown = seaweed.bucket(), dict[str, int]()
    first, large = tmp_path / "first", tmp_path / "large"
    write(first, Random("first", 512 * MIB))
    sha256 = write(large, Random("large", 3 * GIB))
    with Daemon.start(tmp_path / "root", store=url, min_free="0") as daemon, wired(daemon.socket) as wire:

        def keep_first() -> None:
            save(wire, "first", first)
            assert wire.flush(300)["pending"] == []

        memory = Memory(daemon, keep_first)
        grown["capture"] = memory.grown(lambda: save(wire, "large", large))
        large.unlink()
        grown["hash"] = memory.grown(lambda: wire.load("large"))
        grown["upload"] = memory.grown(lambda: wire.flush(300))
        assert wire.flush(0)["pending"] == []
    with Daemon.start(tmp_path / "fresh", store=url, min_free="0") as daemon, wired(daemon.socket) as wire:
        memory = Memory(daemon, lambda: wire.load("first"))
        loaded: list[str] = []
        grown["load"] = memory.grown(lambda: loaded.append(wire.load("large")["path"]))
        with open(Path(loaded[0]) / "large.bin", "rb") as file:
            assert hashlib.file_digest(file, "sha256").hexdigest() == sha256
    print({what: f"{size / MIB:.1f} MiB" for what, size in grown.items()})
    assert all(size <= FLAT_BYTES for size in grown.values())


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize("storage_format", ["files", "tar"])
def test_twenty_thousand_small_files(tmp_path: Path, storage_format: str) -> None:
    tree: Tree = {f"{number % 200}/{number}": b"%d" % number * (number % 100) for number in range(20_000)}
    out, store = fill(tmp_path / "out", tree), f"file://{tmp_path}/store"
    with Daemon.start(tmp_path / "root", store=store, min_free="0") as daemon, Client.of(daemon) as task:
        task.begin("save", path=str(out), storage_format=storage_format)
        reference = task.good(120).value
        assert reference["files"] == len(tree)
        assert reference["size"] == sum(map(len, tree.values())) or storage_format == "tar"  # then it is the tar's
        task.begin("flush", deadline=300)
        task.good(300)
    with Daemon.start(tmp_path / "fresh", store=store, min_free="0") as daemon, Client.of(daemon) as task:
        task.begin("load", reference=reference["key"], hashes=True)
        assert task.good(300).files == hashes(tree)
