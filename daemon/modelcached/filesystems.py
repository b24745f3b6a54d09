"""What kind of filesystem a path lies on, read from the kernel's mount table."""

from __future__ import annotations

from pathlib import Path

# flock, inotify and hard links mean something else there: other hosts, or no kernel, stand behind them.
NOT_LOCAL = ("nfs", "cifs", "smb", "9p", "ceph", "lustre", "gpfs", "afs", "glusterfs", "fuse", "virtiofs", "sshfs", "beegfs")


def filesystem_type(path: Path) -> str:
    """The type of the mount that holds `path` (which need not exist yet), e.g. "ext4", "nfs4", "fuse.sshfs"."""
    where = path.resolve()
    best, kind = -1, "unknown"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, rest = line.partition(" - ")
        mount = Path(fields.split()[4].encode().decode("unicode_escape"))
        depth = len(mount.parts)
        if depth >= best and (where == mount or mount in where.parents):
            best, kind = depth, rest.split()[0]
    return kind


def is_local(path: Path) -> bool:
    kind = filesystem_type(path)
    return kind == "fuseblk" or not kind.startswith(NOT_LOCAL)
