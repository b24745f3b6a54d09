"""The only place that calls fsync, link and rename: how bytes get a name that can be believed.

Order of a publication: private file, read-only, fixed mtime, fsync, exclusive link, fsync of the folder. A batch does each
step once for all its files. An fsync error is final for its file: it is dropped and never synced again (I1).
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

MTIME_NS = 315_532_800 * 10**9  # 1980-01-01: one fixed mtime for all blobs, the earliest that zip tools accept


class Staged(NamedTuple):
    """A complete, verified private file and the name it shall get."""

    source: Path
    target: Path
    executable: bool = False


def seal(path: Path, executable: bool = False) -> None:
    """Makes a private file what a blob is: read-only, of the fixed mtime, on stable storage."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fchmod(handle, 0o555 if executable else 0o444)
        os.utime(handle, ns=(MTIME_NS, MTIME_NS))
        os.fsync(handle)
    finally:
        os.close(handle)


def publish(batch: Sequence[Staged], in_parallel: Callable[[Callable[[Staged], None], Iterable[Staged]], Iterable[None]]) -> None:
    """Gives every staged file its name, durably; a name that is taken already keeps its bytes. The sources are gone afterwards."""
    try:
        for _ in in_parallel(lambda staged: seal(staged.source, staged.executable), batch):
            pass
        for staged in batch:
            with contextlib.suppress(FileExistsError):
                os.link(staged.source, staged.target)
        sync_folders({staged.target.parent for staged in batch})
    finally:
        for staged in batch:
            staged.source.unlink(missing_ok=True)


def sync_folders(folders: Iterable[Path]) -> None:
    for folder in folders:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def sync_file(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_data(handle: int) -> None:
    os.fdatasync(handle)


def write(path: Path, data: bytes, temporary: Path, mode: int = 0o600) -> None:
    """Writes a whole file under its name at once: readers see the old bytes or the new ones, after a power cut too."""
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        with open(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folders([path.parent])


def record(path: Path, data: bytes, temporary: Path) -> None:
    """Like `write` without the syncs, for what can be asked again: after a power cut it may be missing or damaged."""
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def link(source: Path, target: Path) -> bool:
    """A second name for a file; False when it has as many as its filesystem allows (65,000 on ext4)."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno == errno.EMLINK:
            return False
        raise
    return True


def rename(source: Path, target: Path) -> None:
    """Moves a file or folder to a name on the same filesystem, replacing a file that has it."""
    os.rename(source, target)


def place(temporary: Path, target: Path, replace: bool = True) -> None:
    """Gives a private file its name, durably; FileExistsError if it is taken and `replace` is False. `temporary` is gone afterwards."""
    try:
        sync_file(temporary)
        if replace:
            os.replace(temporary, target)
        else:
            try:
                os.link(temporary, target)
            except FileExistsError:
                if os.stat(temporary).st_nlink == 1:  # 2: over NFS an answer was lost, and the name is ours
                    raise
        sync_folders([target.parent])
    finally:
        temporary.unlink(missing_ok=True)


def make_folders(folder: Path) -> None:
    """Makes a folder and its parents, as far as they are missing, so that they survive a power cut."""
    made = []
    place = folder
    while not place.is_dir():
        made.append(place)
        place = place.parent
    folder.mkdir(parents=True, exist_ok=True)
    sync_folders({place.parent for place in made})


def remove_tree(folder: Path) -> None:
    """Removes a folder of ours, read-only ones inside it too."""
    for place, _, _ in os.walk(folder):
        os.chmod(place, 0o700)
    shutil.rmtree(folder)
