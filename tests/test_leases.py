"""Leases: a lease lives exactly as long as somebody holds its descriptor, whatever becomes of the daemon (I4)."""

from __future__ import annotations

import array
import contextlib
import fcntl
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from modelcached.layout import Layout
from modelcached.leases import Leases
from modelcached.model import Caller, TreeId
from modelcached.root import open_root

from .daemon import clean_environment

TREE, OTHER = TreeId("a" * 64), TreeId("b" * 64)
CALLER = Caller(1001, 1002, 1003)


@pytest.fixture
def layout(tmp_path: Path) -> Iterator[Layout]:
    layout, lock = open_root(tmp_path / "root", private=True)
    yield layout
    os.close(lock)
    assert os.listdir(layout.tmp) == []


@pytest.fixture
def leases(layout: Layout) -> Leases:
    return Leases(layout)


@contextlib.contextmanager
def holding(*descriptors: int) -> Iterator[subprocess.Popen[bytes]]:
    """A process that holds these descriptors and does nothing."""
    code = "import os; os.write(1, b'.'); os.read(0, 1)"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=descriptors)
    try:
        assert process.stdout is not None and process.stdout.read(1) == b"."
        for descriptor in descriptors:
            os.close(descriptor)
        yield process
    finally:
        process.kill()
        process.communicate()


def test_who_holds_what(leases: Leases, layout: Layout) -> None:
    before = time.time()
    first, second = leases.grant(TREE, CALLER, "train.py"), leases.grant(TREE, Caller(0, 0, 1), "x" * 1000)
    third = leases.grant(OTHER, CALLER, "")
    assert not os.get_inheritable(first)
    assert sorted(holder[:2] + holder[3:] for holder in leases.holders(TREE)) == [(0, 1, "x" * 200), (1001, 1003, "train.py")]
    assert all(before <= holder.start <= time.time() for holder in leases.holders(TREE))
    assert {tree: len(holders) for tree, holders in leases.held().items()} == {TREE: 2, OTHER: 1}
    os.close(first)
    assert [holder.uid for holder in leases.holders(TREE)] == [0]
    assert len(os.listdir(layout.lease_folder(TREE))) == 1  # the dead one's file is gone
    os.close(second)
    os.close(third)
    assert leases.held() == {} and os.listdir(layout.leases) == []
    assert leases.holders(TREE) == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_it_ends_with_its_holder(leases: Leases, number: signal.Signals) -> None:
    with holding(leases.grant(TREE, CALLER, "")) as process:
        assert len(leases.holders(TREE)) == 1
        process.send_signal(number)
        process.wait(10)
        assert leases.holders(TREE) == []


def test_it_outlives_the_daemon(leases: Leases, layout: Layout) -> None:
    """The process that granted it is killed; the next one on the same root sees who holds it."""
    code = """
import array, os, signal, socket, sys
from pathlib import Path
from modelcached.layout import Layout
from modelcached.leases import Leases
from modelcached.model import Caller
lease = Leases(Layout(Path(sys.argv[1]))).grant("a" * 64, Caller(1, 2, 3), "task")
socket.socket(fileno=0).sendmsg([b"."], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [lease]))])
os.kill(os.getpid(), signal.SIGKILL)
"""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        daemon = subprocess.Popen([sys.executable, "-c", code, str(layout.root)], stdin=theirs.fileno(), env=clean_environment())
        ours.settimeout(15)
        _, ancillary, _, _ = ours.recvmsg(1, socket.CMSG_SPACE(4), socket.MSG_CMSG_CLOEXEC)
        assert daemon.wait(15) == -signal.SIGKILL
    lease = array.array("i", ancillary[0][2])[0]
    assert [holder.purpose for holder in leases.holders(TREE)] == ["task"]
    assert not os.get_inheritable(lease)
    os.close(lease)
    assert leases.holders(TREE) == []


def test_passed_on_and_shared(leases: Leases) -> None:
    """Over a socket and through forks it stays one lease; the last one to close it ends it."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        lease = leases.grant(TREE, CALLER, "")
        ours.sendmsg([b"."], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [lease]))])
        os.close(lease)  # as the daemon does
        assert len(leases.holders(TREE)) == 1  # on its way
        _, ancillary, _, _ = theirs.recvmsg(1, socket.CMSG_SPACE(4), socket.MSG_CMSG_CLOEXEC)
        lease = array.array("i", ancillary[0][2])[0]
    with holding(os.dup(lease)) as first, holding(os.dup(lease)) as second:
        os.close(lease)
        assert len(leases.holders(TREE)) == 1
        first.kill()
        first.wait(10)
        assert len(leases.holders(TREE)) == 1
        second.kill()
        second.wait(10)
        assert leases.holders(TREE) == []


def test_nobody_is_blocked_by_a_look(leases: Leases, layout: Layout) -> None:
    """Somebody who asks for the lock himself does not hold up the daemon, and his wait ends with the lease."""
    lease = leases.grant(TREE, CALLER, "")
    (path,) = layout.lease_folder(TREE).iterdir()
    waiting = threading.Event()

    def wait() -> None:
        with open(path) as file:
            waiting.set()
            fcntl.flock(file, fcntl.LOCK_SH)

    waiter = threading.Thread(target=wait)
    waiter.start()
    assert waiting.wait(5)
    assert len(leases.holders(TREE)) == 1
    os.close(lease)
    waiter.join(5)
    assert not waiter.is_alive()
    assert leases.holders(TREE) == []


def test_it_is_locked_before_it_has_its_name(leases: Leases, layout: Layout) -> None:
    """A sweep that runs all the time never takes a new lease for a dead one."""
    ended = threading.Event()
    failed: list[BaseException] = []

    def sweep() -> None:
        with open(os.devnull) as anything:
            while not ended.is_set():
                for tree in layout.leases.iterdir():
                    for path in tree.iterdir():
                        try:
                            with open(path) as lease:
                                fcntl.flock(lease, fcntl.LOCK_EX | fcntl.LOCK_NB)
                                failed.append(AssertionError(f"{path} was not locked"))
                        except BlockingIOError:
                            pass
            anything.read()

    keeper = leases.grant(TREE, CALLER, "keeps the folder")
    sweeper = threading.Thread(target=sweep)
    sweeper.start()
    granted = [leases.grant(TREE, CALLER, str(number)) for number in range(300)]
    ended.set()
    sweeper.join()
    assert failed == []
    assert len(leases.holders(TREE)) == 301
    for lease in (keeper, *granted):
        os.close(lease)
    assert leases.held() == {}


NOTES = [b"", b"{", b"[]", b"null", b'{"uid": null}', b'{"uid": 1, "pid": 2, "start": "x", "purpose": ""}', b"\xff" * 5000]


@pytest.mark.parametrize("note", NOTES)
def test_a_lease_whose_note_is_damaged_still_holds(leases: Leases, layout: Layout, note: bytes) -> None:
    lease = leases.grant(TREE, CALLER, "")
    (path,) = layout.lease_folder(TREE).iterdir()
    path.write_bytes(note)
    assert [holder.purpose for holder in leases.holders(TREE)] == ["unknown"]
    os.close(lease)
    assert leases.holders(TREE) == []


def test_no_descriptors_left(leases: Leases, layout: Layout) -> None:
    """A grant that fails leaves neither a file nor a descriptor."""
    layout.leases.rmdir()
    layout.leases.touch()
    before = os.listdir("/proc/self/fd")
    with pytest.raises(OSError, match="Not a directory"):
        leases.grant(TREE, CALLER, "")
    assert os.listdir("/proc/self/fd") == before
