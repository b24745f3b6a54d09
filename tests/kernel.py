"""What only the kernel can show: other users, filesystems that are full, read-only or fail, power cuts, system calls that fail, and FUSE.

Invariant: whatever is mounted or started is gone when its block ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import resource
import select
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from .daemon import Daemon, clean_environment

_DEADLINE_SECONDS = 15.0
# The interpreter may lie where other users cannot read, so it starts as root and becomes somebody else when everything is imported.
_BECOME = """
import asyncio, errno, fcntl, json, os, stat, sys, time
from pathlib import Path
from modelcached import acl, blobs, durable, errors, layout, leases, model, partials, repos, root, tasks, trees
b"x".decode("unicode_escape")  # imports what it needs
uid = int(sys.argv.pop(1))
os.setgroups([]); os.setresgid(uid, uid, uid); os.setresuid(uid, uid, uid)
"""


def require_root() -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root: it becomes other users, or mounts")


def run_as(uid: int, code: str, *arguments: object) -> str:
    """What `code` prints, run in a process of `uid` without any other group. The daemon's lower modules are imported already."""
    require_root()
    command = [sys.executable, "-c", _BECOME + code, str(uid), *map(str, arguments)]
    ran = subprocess.run(command, env=clean_environment(), cwd="/", capture_output=True, text=True, timeout=_DEADLINE_SECONDS)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@contextlib.contextmanager
def mounted(at: Path, *options: str) -> Iterator[Path]:
    """`mount OPTIONS... AT`, for as long as the block runs."""
    require_root()
    at.mkdir(parents=True, exist_ok=True)
    ran = subprocess.run(["mount", *options, str(at)], capture_output=True, text=True, timeout=_DEADLINE_SECONDS)
    if "permission denied" in ran.stderr:
        pytest.skip("needs a root that may mount (CAP_SYS_ADMIN)")
    assert ran.returncode == 0, ran.stderr
    try:
        yield at
    finally:
        subprocess.run(["umount", "--lazy", str(at)], check=True, timeout=_DEADLINE_SECONDS)


def small_tmpfs(at: Path, size: str = "1m") -> contextlib.AbstractContextManager[Path]:
    return mounted(at, "-t", "tmpfs", "-o", f"size={size},mode=755", "none")


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[Path]:
    """`folder` as a bind mount over itself that nobody can write to."""
    with mounted(folder, "--bind", str(folder)):
        subprocess.run(["mount", "-o", "remount,bind,ro", str(folder)], check=True, timeout=_DEADLINE_SECONDS)
        yield folder


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """No file of this process grows above `size` bytes (EFBIG)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def fuse(folder: Path, *, refuse: str = "", block_device: bool = False) -> Iterator[Path]:
    """A FUSE filesystem in `folder`/mnt that keeps its files in `folder`/kept and writes each change's name to `folder`/calls.

    `refuse` names calls that fail with EIO ("fsync", "link:EPERM"). With `block_device` the kernel calls it "fuseblk", a local disk.
    """
    require_root()
    if shutil.which("fusermount3") is None or not os.path.exists("/dev/fuse"):
        pytest.skip("needs FUSE: Debian's package fuse3 and /dev/fuse")
    kept, mount, calls = folder / "kept", folder / "mnt", folder / "calls"
    kept.mkdir(parents=True)
    mount.mkdir()
    calls.touch()
    device = ""
    if block_device:
        with open(folder / "disk", "wb") as disk:
            disk.truncate(1 << 20)
        device = subprocess.check_output(["losetup", "--show", "--find", str(folder / "disk")], text=True).strip()
    try:
        command = [sys.executable, "-m", "tests.fuse_process", str(kept), str(mount), str(calls), refuse, device]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[1], env=clean_environment())
        try:
            assert process.stdout is not None
            ready, _, _ = select.select([process.stdout], [], [], _DEADLINE_SECONDS)
            assert ready and process.stdout.readline() == b"mounted\n", "the FUSE filesystem did not start"
            try:
                yield mount
            finally:
                subprocess.run(["umount", "--lazy", str(mount)], check=True)
                process.wait(_DEADLINE_SECONDS)
        finally:
            process.kill()
            process.communicate()
    finally:
        if device:
            subprocess.run(["losetup", "--detach", device], check=True)


SHUTDOWN, WITHOUT_LOG = 0x8004587D, 2  # EXT4_IOC_SHUTDOWN, XFS_IOC_GOINGDOWN; what is not on the disk does not go there any more


class Machine:
    """A filesystem whose power can be cut."""

    def __init__(self, folder: Path, kind: str, size: int = 320 << 20) -> None:
        require_root()
        if shutil.which(f"mkfs.{kind}") is None:
            pytest.skip(f"needs mkfs.{kind} (Debian's package xfsprogs or e2fsprogs)")
        self._image, self.place = folder / f"{kind}.img", folder / kind
        with open(self._image, "wb") as image:
            image.truncate(size)
        subprocess.run([f"mkfs.{kind}", "-q", self._image], check=True)

    @contextlib.contextmanager
    def on(self) -> Iterator[Path]:
        with mounted(self.place, "-o", "loop", str(self._image)):
            yield self.place

    def spoil(self, content: bytes) -> None:
        """Changes one bit of the file with this (random) content, where it lies on the disk. The machine is off."""
        with open(self._image, "r+b") as image, mmap.mmap(image.fileno(), 0) as disk:
            where = disk.find(content[:4096])
            assert where >= 0, "the file is not on the disk"
            disk[where] ^= 1

    def cut(self) -> None:
        """From now on every change is an error, and what was not synced is gone after the next `on`."""
        handle = os.open(self.place, os.O_RDONLY)
        try:
            fcntl.ioctl(handle, SHUTDOWN, struct.pack("I", WITHOUT_LOG))
        finally:
            os.close(handle)


class Straced(Daemon):
    """A daemon whose system calls strace delays or fails, or ends it at. With --seccomp-bpf strace 6.1 does not count in threads."""

    options: Sequence[str] = ()

    def _launch(self) -> None:
        if shutil.which("strace") is None:
            pytest.skip("needs strace (Debian's package strace)")
        self.wrapper = ("strace", "-D", "-f", "-qq", "-o", "/dev/null", *self.options)
        super()._launch()


def straced(calls: str, how: str, *more: str) -> type[Straced]:
    """`how` is what strace injects into these system calls: "error=EIO:when=1", "signal=SIGKILL:when=7", "delay_enter=10ms"."""
    return type("Straced", (Straced,), {"options": ("-e", f"trace={calls}", "-e", f"inject={calls}:{how}", *more)})


def on_ext4(folder: Path) -> bool:
    """Whether `folder` lies on a filesystem with ext4's limit on links."""
    return os.pathconf(folder, "PC_LINK_MAX") == 65_000
