"""Who writes to a file? Asked of the kernel by its owner, because equal stats before and after a copy do not prove that it is whole.

A read lease is refused while anybody has the file open for writing, through a descriptor or a shared mapping. It is given back
at once, and would it be broken in that moment, the signal is SIGURG, which does nothing by default (SIGIO, the kernel's own
choice, ends a process). No lease at all (another owner's file, a filesystem without leases, one of a server, which may refuse for
reasons of its own) means *unknown*, never *nobody*: then /proc is searched for writers, as far as it shows other processes.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import signal
import stat
from typing import Dict, Iterator, Optional, Set, Tuple

Identity = Tuple[int, int]  # device, inode

_WRITABLE = 0o200  # of a link in /proc/<pid>/fd: open for writing
_REMOTE = ("nfs", "nfs4", "cifs", "smb3")  # their clients refuse a lease unless the server has granted them one
_SHARED_WRITABLE = re.compile(rb"\S+ .w.s ")  # a line of /proc/<pid>/maps


def has_writer(descriptor: int) -> Optional[bool]:
    """Whether anybody has the file open for writing now; None when the kernel can't tell this process.

    `descriptor` is open for reading only.
    """
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except OSError as error:
        return True if error.errno == errno.EAGAIN and not _is_remote(os.fstat(descriptor).st_dev) else None
    fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return False


class Writers:
    """The probe during one save, with /proc where the kernel doesn't tell."""

    def __init__(self) -> None:
        self._seen: Optional[Dict[Identity, int]] = None  # from /proc, when first needed
        self._unknown: Set[Identity] = set()

    def has(self, descriptor: int, identity: Identity) -> bool:
        found = has_writer(descriptor)
        if found is not None:
            return found
        self._unknown.add(identity)
        if self._seen is None:
            self._seen = open_for_writing()
        return identity in self._seen

    def late(self) -> Set[Identity]:
        """Files of which the kernel didn't tell and that are open for writing by now. Looks afresh."""
        self._seen = open_for_writing() if self._unknown else None
        return self._unknown.intersection(self._seen or ())


def open_for_writing() -> Dict[Identity, int]:
    """Every file that a process has open for writing, and the process: those that /proc shows to this user."""
    return {identity: pid for pid in _processes() for identity in _written_by(pid)}


def writer_of(identity: Identity) -> Optional[int]:
    """A process that has the file open for writing, if one can be seen."""
    return next((pid for pid in _processes() if identity in _written_by(pid)), None)


def describe(pid: int) -> str:
    """ "pid 123 (python train.py)"."""
    try:
        with open("/proc/%d/cmdline" % pid, "rb") as file:
            command = " ".join(file.read(200).replace(b"\0", b" ").decode(errors="replace").split())
    except OSError:
        command = ""
    who = "pid %d, this process" % pid if pid == os.getpid() else "pid %d" % pid
    return "%s (%s)" % (who, command[:80]) if command else who


def filesystem_of(device: int) -> str:
    """The type of the filesystem mounted from `device` (an st_dev) by now, for numbers are used again; "" when that is not told."""
    try:
        with open("/proc/self/mountinfo", "rb") as mounts:
            for line in mounts:
                fields = line.split(b" ")
                major, minor = fields[2].split(b":")
                if os.makedev(int(major), int(minor)) == device:
                    return fields[fields.index(b"-") + 1].decode()
    except (OSError, ValueError, IndexError):
        pass
    return ""


def _is_remote(device: int) -> bool:
    return filesystem_of(device) in _REMOTE


def _processes() -> Iterator[int]:
    try:
        names = os.listdir("/proc")
    except OSError:
        return
    yield os.getpid()  # most likely a handle that its owner forgot
    yield from (int(name) for name in names if name.isdigit() and int(name) != os.getpid())


def _written_by(pid: int) -> Set[Identity]:
    found: Set[Identity] = set()
    try:
        with os.scandir("/proc/%d/fd" % pid) as descriptors:
            for link in descriptors:
                try:
                    if link.stat(follow_symlinks=False).st_mode & _WRITABLE:
                        seen = os.stat(link.path)
                        if stat.S_ISREG(seen.st_mode):
                            found.add((seen.st_dev, seen.st_ino))
                except OSError:  # closed meanwhile
                    pass
        with open("/proc/%d/maps" % pid, "rb") as maps:
            found.update(_mapped(line) for line in maps if _SHARED_WRITABLE.match(line))
    except (OSError, ValueError):  # it ended, or is another user's
        pass
    return found


def _mapped(line: bytes) -> Identity:
    """The file of a line like "7f...-7f... rw-s 00000000 fe:00 1234  /path"."""
    device, inode = line.split(None, 5)[3:5]
    major, minor = device.split(b":")
    return os.makedev(int(major, 16), int(minor, 16)), int(inode)
