"""The root: one folder on one local filesystem, one daemon, one format version. Recovery is the normal start (I11)."""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path

from . import durable
from .errors import DISK_FULL, InUse, RootError
from .filesystems import filesystem_type, is_local
from .layout import FORMAT_VERSION, PRIVATE_FOLDERS, PUBLIC_FOLDERS, Layout

FOREIGN_FINE = {"lost+found", "daemon.log"}  # what may lie in a root that has not been used yet


class RootLocked(InUse, RootError):
    """Another daemon has the root: trying again later may help."""


def open_root(path: Path, private: bool) -> tuple[Layout, int]:
    """The layout of a root that is ours alone now, and the descriptor that keeps it so. RootError says why not."""
    layout = Layout(path)
    try:
        path.mkdir(mode=0o700 if private else 0o755, parents=True, exist_ok=True)
        owner = path.stat().st_uid
        if owner != os.geteuid():
            raise RootError(
                f"the root {path} belongs to uid {owner}, and the daemon is uid {os.geteuid()}",
                f"chown -R {os.geteuid()} {path}, or choose another root",
            )
        if not is_local(path):
            raise RootError(
                f"the root {path} lies on {filesystem_type(path)}, where locks and links can't be trusted",
                "choose a root on a local disk (ext4, xfs, btrfs)",
            )
        _check_version(layout)  # before anything is made in a folder that is not ours
        lock = _lock(layout)
        try:
            _check_version(layout)
            _recover(layout)
        except BaseException:
            os.close(lock)
            raise
    except OSError as error:
        raise RootError(
            f"the root {path} can't be used: {error.strerror} ({error.filename})",
            "check its owner, its mode and that its filesystem is mounted read-write",
        ) from error
    return layout, lock


def _lock(layout: Layout) -> int:
    lock = os.open(layout.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(lock, 32).decode(errors="replace").strip() or "unknown"
        os.close(lock)
        raise RootLocked(f"another daemon (pid {holder}) uses the root {layout.root}", "stop it first, or choose another root") from None
    with contextlib.suppress(OSError):  # a full disk; what counts is the lock
        os.ftruncate(lock, os.pwrite(lock, f"{os.getpid()}\n".encode(), 0))
    return lock


def _check_version(layout: Layout) -> None:
    try:
        found = layout.version.read_text().strip()
    except FileNotFoundError:
        foreign = sorted({entry.name for entry in layout.root.iterdir()} - FOREIGN_FINE - {"lock"})
        if foreign and not layout.blobs.exists():
            raise RootError(
                f"{layout.root} is not empty and no root of modelcached: it holds {', '.join(foreign[:3])}", "choose an empty folder"
            ) from None
        return
    if not found.isdigit() or int(found) > FORMAT_VERSION:
        raise RootError(
            f"the root {layout.root} has format {found[:20]!r}, and this daemon knows formats up to {FORMAT_VERSION}",
            "upgrade the daemon, or choose another root",
        )


def _recover(layout: Layout) -> None:
    """Makes what is missing and empties tmp/. Partial downloads stay, but for what a kill in the middle of their publication left."""
    for name in PRIVATE_FOLDERS:
        (layout.root / name).mkdir(mode=0o700, exist_ok=True)
        (layout.root / name).chmod(0o700)  # whoever made it
    for name, mode in PUBLIC_FOLDERS.items():
        (layout.root / name).mkdir(exist_ok=True)
        (layout.root / name).chmod(mode)
    for leftover in layout.tmp.iterdir():
        if leftover.is_dir() and not leftover.is_symlink():
            durable.remove_tree(leftover)
        else:
            leftover.unlink()
    for partial in sorted(layout.partials.iterdir()):
        has_data = partial.suffix not in (".map", ".new") or partial.with_suffix("").exists()
        if partial.suffix == ".new" or not has_data or partial.stat().st_nlink > 1:
            partial.unlink()
    _probe_links(layout)
    if not layout.version.exists():
        for shard in layout.shards():
            shard.mkdir(mode=0o700, exist_ok=True)
        durable.sync_folders([layout.blobs, layout.blobs.parent, layout.root])
        durable.write(layout.version, f"{FORMAT_VERSION}\n".encode(), layout.fresh("version"))


def _probe_links(layout: Layout) -> None:
    probe, second = layout.fresh("probe"), layout.fresh("probe")
    try:
        probe.touch()
        durable.link(probe, second)
    except OSError as error:
        if error.errno in DISK_FULL and layout.version.exists():
            return  # an earlier start found them, and only a daemon that runs can make room
        raise RootError(
            f"the root {layout.root} lies on {filesystem_type(layout.root)}, which has no hard links ({error.strerror})",
            "choose a root on ext4, xfs or btrfs",
        ) from error
    finally:
        probe.unlink(missing_ok=True)
        second.unlink(missing_ok=True)
