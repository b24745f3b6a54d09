"""What the kernel says of the filesystem a path lies on: its kind, and its room."""

from __future__ import annotations

import os
from pathlib import Path

# flock, inotify and hard links mean something else there: other hosts, or no kernel, stand behind them.
NOT_LOCAL = ("nfs", "cifs", "smb", "9p", "ceph", "lustre", "gpfs", "afs", "glusterfs", "fuse", "virtiofs", "sshfs", "beegfs")


def filesystem_type(path: Path) -> str:
    """The type of the mount that holds `path` (which need not exist yet), e.g. "ext4", "nfs4", "fuse.sshfs"."""
    where = path.resolve()
    best, kind = -1, "unknown"
    for line in Path("/proc/self/mountinfo").read_bytes().rstrip(b"\n").split(b"\n"):
        fields, _, rest = line.partition(b" - ")
        mount = Path(os.fsdecode(fields.split(b" ")[4].decode("unicode_escape").encode("latin-1")))  # "\\040" is a space
        depth = len(mount.parts)
        if depth >= best and (where == mount or mount in where.parents):
            best, kind = depth, rest.split()[0].decode()
    return kind


def is_local(path: Path) -> bool:
    kind = filesystem_type(path)
    return kind == "fuseblk" or not kind.startswith(NOT_LOCAL)


def free_bytes(root: Path) -> int:
    disk = os.statvfs(root)
    return disk.f_bavail * disk.f_frsize


def gib(size: int) -> str:
    """A size in bytes, for a message: neither too large to be told apart nor too long."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
