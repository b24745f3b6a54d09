"""Whether somebody writes: asked of real writers, and never at the cost of the process that asks."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from modelcache.errors import FileChangedError
from modelcache.patience import CHANGED, GONE, WRITER, Patience
from modelcache.probe import Writers, describe, filesystem_of, has_writer, open_for_writing, writer_of
from modelcache.walk import Source

from .conftest import as_uid
from .kernel import mounted
from .test_sdk_connection import sdk_path

# How a process has a file open; each says "ready", and ends when its stdin does.
HOLDERS = {
    "write": "f = open(path, 'r+b')",
    "append": "f = open(path, 'ab')",
    "mapping whose descriptor is closed": "f = open(path, 'r+b'); m = mmap.mmap(f.fileno(), 0); f.close()",
    "read": "f = open(path, 'rb')",
    "private mapping": "f = open(path, 'rb'); m = mmap.mmap(f.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)",
    "closed again": "open(path, 'ab').close()",
}
WRITERS = ("write", "append", "mapping whose descriptor is closed")


@contextlib.contextmanager
def holder(path: Path, how: str, *prefix: str) -> Iterator[subprocess.Popen[bytes]]:
    code = f"import mmap, sys\npath = {str(path)!r}\n{HOLDERS[how]}\nprint('ready', flush=True)\nsys.stdin.read()"
    with subprocess.Popen([*prefix, sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            assert process.stdout.readline() == b"ready\n"
            yield process
        finally:
            process.stdin.close()
            process.wait()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "file").write_bytes(b"content")
    return tmp_path / "file"


@contextlib.contextmanager
def opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def identity(path: Path) -> tuple[int, int]:
    return path.stat().st_dev, path.stat().st_ino


@pytest.mark.parametrize("how", HOLDERS)
def test_the_kernel_knows_who_writes(file: Path, how: str) -> None:
    with opened(file) as descriptor:
        assert has_writer(descriptor) is False
        with holder(file, how) as process:
            assert has_writer(descriptor) is (how in WRITERS)
            assert writer_of(identity(file)) == (process.pid if how in WRITERS else None)
            assert open_for_writing().get(identity(file)) == (process.pid if how in WRITERS else None)
        assert has_writer(descriptor) is False
        file.write_bytes(b"a writer does not have to wait for us")


def test_no_lease_stays(file: Path) -> None:
    with opened(file) as descriptor:
        has_writer(descriptor)
        number = f":{file.stat().st_ino} "
        assert not [line for line in Path("/proc/locks").read_text().splitlines() if "LEASE" in line and number in line]


def test_a_forgotten_handle_of_this_process_is_found(file: Path) -> None:
    with open(file, "ab"), opened(file) as descriptor:
        assert has_writer(descriptor) is True
        assert writer_of(identity(file)) == os.getpid()
        assert "this process" in describe(os.getpid())


def test_what_has_no_leases_is_unknown() -> None:
    with opened(Path("/")) as descriptor:
        assert has_writer(descriptor) is None


def test_a_server_may_refuse_a_lease_for_reasons_of_its_own() -> None:
    """So the filesystem is looked up before a refusal counts."""
    assert filesystem_of(os.stat("/proc/self").st_dev) == "proc"
    assert filesystem_of(os.stat("/dev/null").st_dev) in ("devtmpfs", "tmpfs")
    assert filesystem_of(os.makedev(4000, 7)) == ""


def test_the_number_of_a_device_is_used_again(tmp_path: Path) -> None:
    with mounted(tmp_path, "-t", "ramfs", "none"):
        device = os.stat(tmp_path).st_dev
        assert filesystem_of(device) == "ramfs"
    assert filesystem_of(device) != "ramfs"


# The breaker opens the file for writing while a lease is held; the kernel tells the holder by a signal.
HURT = """
import fcntl, os, signal, sys
descriptor = os.open(sys.argv[1], os.O_RDONLY)
if sys.argv[2] == "SIGURG":
    fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)
fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)
try:
    os.open(sys.argv[1], os.O_WRONLY | os.O_NONBLOCK)
except BlockingIOError:
    print("unhurt", flush=True)
"""


@pytest.mark.parametrize(("number", "outcome"), [("SIGURG", (b"unhurt\n", 0)), ("SIGIO", (b"", -signal.SIGIO))])
def test_only_the_kernels_own_signal_hurts(file: Path, number: str, outcome: tuple[bytes, int]) -> None:
    """The second row shows that the first could fail."""
    ran = subprocess.run([sys.executable, "-c", HURT, str(file), number], stdout=subprocess.PIPE)
    assert (ran.stdout, ran.returncode) == outcome


# Probes as fast as it can while others open the file for writing as fast as they can, so that leases are broken all the time.
STORM = """
import os, sys, threading
from modelcache.probe import has_writer
path, rounds = sys.argv[1], int(sys.argv[2])
done = threading.Event()
opens = [0, 0]
def write(number):
    while not done.is_set():
        os.close(os.open(path, os.O_WRONLY))
        opens[number] += 1
threads = [threading.Thread(target=write, args=(number,)) for number in range(2)]
for thread in threads:
    thread.start()
descriptor = os.open(path, os.O_RDONLY)
seen = [has_writer(descriptor) for _ in range(rounds)]
done.set()
for thread in threads:
    thread.join()
print(seen.count(None), min(opens) > 0, len(seen))
"""


def test_no_signal_hurts_who_asks(file: Path) -> None:
    ran = subprocess.run([sys.executable, "-c", STORM, str(file), "20000"], capture_output=True, text=True, env=sdk_path())
    assert (ran.stdout, ran.returncode) == ("0 True 20000\n", 0), ran.stderr


UNKNOWN = """
import os, sys
from modelcache.probe import Writers, has_writer
descriptor = os.open(sys.argv[1], os.O_RDONLY)
found = os.fstat(descriptor)
writers = Writers()
print(has_writer(descriptor), writers.has(descriptor, (found.st_dev, found.st_ino)), flush=True)
sys.stdin.readline()
print(len(writers.late()), writers.has(descriptor, (found.st_dev, found.st_ino)), flush=True)
"""


def test_another_owners_file_is_unknown_and_looked_for_in_proc(shared_tmp_path: Path) -> None:
    file = shared_tmp_path / "file"
    file.write_bytes(b"content")
    file.chmod(0o666)
    prefix = as_uid(12345)
    with subprocess.Popen(
        [*prefix, sys.executable, "-c", UNKNOWN, str(file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=sdk_path()
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == b"None False\n"
        with holder(file, "append", *prefix):  # a process that uid 12345 can see
            process.stdin.write(b"\n")
            process.stdin.flush()
            assert process.stdout.readline() == b"1 True\n"


def test_proc_is_searched_once_and_only_when_it_must_be(file: Path) -> None:
    writers = Writers()
    with opened(file) as descriptor, open(file, "ab"):
        assert writers.has(descriptor, identity(file))
        assert writers.late() == set()
        assert writers._seen is None  # the kernel knew


class Clock:
    def __init__(self) -> None:
        self.pauses: list[float] = []
        self.said: list[str] = []

    def patience(self, source: Source) -> Patience:
        return Patience(source, self.said.append, self.pauses.append)


def test_patience_ends_and_names_the_writer(file: Path) -> None:
    clock = Clock()
    with Source(str(file.parent)) as source, holder(file, "write") as process:
        patience = clock.patience(source)
        for _ in range(9):
            patience.pause("file", WRITER)
        with pytest.raises(FileChangedError) as caught:
            patience.pause("file", WRITER)
    assert [round(pause, 3) for pause in clock.pauses] == [0.001, 0.003, 0.01, 0.032, 0.1, 0.316, 1.0, 3.162, 10.0]
    assert caught.value.data == {"path": str(file), "pid": process.pid}
    assert f"{file} is open for writing by pid {process.pid} (" in caught.value.message
    assert len(clock.said) == 1 and f"pid {process.pid}" in clock.said[0]


@pytest.mark.parametrize(("what", "tries"), [(CHANGED, 10), (GONE, 1)])
def test_patience_without_a_writer(file: Path, what: str, tries: int) -> None:
    clock = Clock()
    with Source(str(file.parent)) as source:
        patience = clock.patience(source)
        for _ in range(tries - 1):
            patience.pause("file", what)
        with pytest.raises(FileChangedError, match=what) as caught:
            patience.pause("file", what)
    assert len(clock.pauses) == tries - 1
    assert caught.value.data == {"path": str(file)} and isinstance(caught.value, OSError)
