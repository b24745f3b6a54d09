"""The process's client: leases, fork, a daemon that goes and comes back, a socket that is not what it should be."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from modelcache.client import Client, shared
from modelcache.errors import (
    DaemonConnectionError,
    DaemonNotAvailableError,
    InvalidRequestError,
    NotPermittedError,
    ProtocolError,
    RepositoryNotFoundError,
)
from modelcache.leases import MAX_HELD, Leases
from modelcache.protocol import Fetch, List_

from .fake_daemon import WAIT_SECONDS, FakeDaemon, Request, is_locked
from .test_sdk_connection import open_descriptors, run, sdk_path


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[FakeDaemon]:
    with FakeDaemon(tmp_path) as daemon:
        daemon.repos = {"org/a": {"a": b"a"}, "org/b": {"b": b"b"}}
        yield daemon


@pytest.fixture
def client(daemon: FakeDaemon) -> Iterator[Client]:
    client = Client(str(daemon.socket_path))
    yield client
    client.close()
    client.leases.close()


def in_python(daemon: FakeDaemon, code: str, **environment: str) -> subprocess.Popen[str]:
    variables = {**os.environ, **sdk_path(), "MODELCACHE_SOCKET": str(daemon.socket_path), **environment}
    return subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=variables)


# ---- requests


def test_what_is_not_asked_for_is_not_sent(daemon: FakeDaemon, client: Client) -> None:
    client.fetch(Fetch("org/a", token="t", revision="main"))
    assert daemon.next_request().params == {"repo_id": "org/a", "token": "t"}  # the rest are defaults an older daemon may not know
    daemon.answers["ls"] = lambda request: request.reply({"repos": []})
    assert client.call("ls", List_()) == {"repos": []}
    assert daemon.next_request().params == {}


def test_one_connection_for_all_threads(daemon: FakeDaemon, client: Client) -> None:
    waiting = [run(lambda: client.fetch(Fetch("org/a")).reply.tree) for _ in range(20)]
    assert len({result() for result in waiting}) == 1
    assert daemon.connections == 1


@pytest.mark.parametrize(
    "change",
    [{"leased": True, "descriptors": 0}, {"leased": False, "descriptors": 0}, {"leased": True, "descriptors": 2}, {"drop": "tree"}],
)
def test_a_reply_that_lacks_what_it_needs(daemon: FakeDaemon, client: Client, change: dict[str, Any]) -> None:
    def answer(request: Request) -> None:
        tree, view = daemon.show({"a": b"a"})
        reply = daemon.reply_for(tree, view, {"a": b"a"}, change.get("leased", False))
        reply.pop(change.get("drop", ""), None)
        request.reply(reply, [os.open("/dev/zero", os.O_RDONLY) for _ in range(change.get("descriptors", 0))])

    daemon.answers["fetch"] = answer
    with pytest.raises(ProtocolError):
        client.fetch(Fetch("org/a"))
    daemon.stop()  # has closed its own
    assert not [name for name in open_descriptors() if "/dev/zero" in name]
    assert client.leases.trees() == []


# ---- leases


def test_one_lease_a_tree(daemon: FakeDaemon, client: Client) -> None:
    first, second, other = (client.fetch(Fetch(repo)) for repo in ("org/a", "org/a", "org/b"))
    tree = first.reply.tree
    asked = [daemon.next_request().params.get("held", []) for _ in range(3)]
    assert asked == [[], [tree], [tree]]
    assert (first.reply.leased, second.reply.leased, daemon.leases(tree)) == (True, False, 1)
    first.lease.close()
    first.lease.close()  # counts once
    assert daemon.leases(tree) == 1
    second.lease.close()
    assert (daemon.leases(tree), client.leases.trees()) == (0, [other.reply.tree])


def test_a_lease_that_was_named_stays_until_the_reply(daemon: FakeDaemon, client: Client) -> None:
    """The daemon answers "you hold it already": true even when another thread let go in between."""
    first = client.fetch(Fetch("org/a"))
    tree = first.reply.tree
    go_on = threading.Event()
    answer = daemon.answers["fetch"]

    def answer_later(request: Request) -> None:
        go_on.wait(WAIT_SECONDS)
        answer(request)

    daemon.answers["fetch"] = answer_later
    daemon.next_request()
    waiting = run(lambda: client.fetch(Fetch("org/a")))
    assert daemon.next_request().params["held"] == [tree]
    first.lease.close()
    assert daemon.leases(tree) == 1
    go_on.set()
    second = waiting()
    assert (second.reply.leased, daemon.leases(tree)) == (False, 1)
    second.lease.close()
    assert daemon.leases(tree) == 0


def test_two_replies_with_a_lease_on_one_tree(daemon: FakeDaemon, client: Client) -> None:
    together = threading.Barrier(2)
    answer = daemon.answers["fetch"]

    def answer_together(request: Request) -> None:
        together.wait(WAIT_SECONDS)
        answer(request)

    daemon.answers["fetch"] = answer_together
    waiting = [run(lambda: client.fetch(Fetch("org/a"))) for _ in range(2)]
    fetched = [result() for result in waiting]
    tree = fetched[0].reply.tree
    assert [each.reply.leased for each in fetched] == [True, True]
    assert daemon.leases(tree) == 1  # the second was closed: one a process
    for each in fetched:
        each.lease.close()
    assert daemon.leases(tree) == 0


def test_the_latest_leases_are_named(tmp_path: Path) -> None:
    leases = Leases()
    for number in range(MAX_HELD + 10):
        leases.adopt("/root", f"t{number}", os.open("/dev/null", os.O_RDONLY))
    leases.adopt("/root", "t0", None)  # asked for again: latest now
    leases.adopt("/elsewhere", "t1", os.open("/dev/null", os.O_RDONLY))
    held = leases.hold("/root")
    assert len(held) == MAX_HELD
    assert [held[0].tree, held[-1].tree] == ["t11", "t0"]
    assert [lease.tree for lease in leases.hold("/elsewhere")] == ["t1"]
    assert leases.adopt("/root", "never seen", None) is None
    leases.close()


FORKS = """
import os, sys
import modelcache
from modelcache.client import shared
def say(*words):  # in one piece: two processes write
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())
path = modelcache.snapshot_download("org/a")
pid = os.fork()
if pid == 0:
    sockets = [name for name in os.listdir("/proc/self/fd") if os.path.exists("/proc/self/fd/" + name)]
    links = [os.readlink("/proc/self/fd/" + name) for name in sockets]
    say("child", any("socket:" in link for link in links), any("/leases/" in link for link in links))
    say("child", modelcache.snapshot_download("org/a") == path, shared().leases.trees() != [])
    sys.stdin.read()  # outlives its parent
    os._exit(0)
say("parent", modelcache.snapshot_download("org/a") == path)
os._exit(0)
"""


def test_a_fork_has_its_own_connection_and_keeps_the_lease(daemon: FakeDaemon) -> None:
    with in_python(daemon, FORKS, MODELCACHE_LOADED="shared") as process:
        assert process.stdout is not None
        said = sorted(process.stdout.readline() for _ in range(3))
        assert said == ["child False True\n", "child True True\n", "parent True\n"]
        process.wait(WAIT_SECONDS)
        tree = daemon.show(daemon.repos["org/a"])[0]
        assert daemon.connections == 2
        assert daemon.leases(tree) == 1  # the child's copy, not a second lease: it said it holds one
        (lease,) = (path for path in (daemon.root / "leases" / tree).iterdir() if is_locked(path))
        assert process.stdin is not None
        process.stdin.close()
        process.stdout.read()  # ends when the child has gone
    assert not is_locked(lease)


FORKS_BUSY = """
import os, sys, threading
import modelcache
def busy():
    modelcache.snapshot_download("org/slow")
threading.Thread(target=busy, daemon=True).start()
sys.stdin.readline()
pid = os.fork()
if pid == 0:
    modelcache.snapshot_download("org/a")
    os._exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
os._exit(0)
"""


def test_a_fork_in_the_middle_of_another_threads_request(daemon: FakeDaemon) -> None:
    answer = daemon.answers["fetch"]
    daemon.answers["fetch"] = lambda request: None if request.params["repo_id"] == "org/slow" else answer(request)
    with in_python(daemon, FORKS_BUSY) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        daemon.next_request()
        process.stdin.write("go\n")
        process.stdin.flush()
        assert process.stdout.readline() == "7\n"


def test_a_killed_process_holds_nothing(daemon: FakeDaemon) -> None:
    with in_python(daemon, "import modelcache; print(modelcache.snapshot_download('org/a'), flush=True); input()") as process:
        assert process.stdout is not None
        process.stdout.readline()
        tree = daemon.show(daemon.repos["org/a"])[0]
        assert daemon.leases(tree) == 1
        process.kill()
        process.wait()
    assert daemon.leases(tree) == 0


# ---- a daemon that goes and comes back


def test_a_restart_between_requests(daemon: FakeDaemon, client: Client) -> None:
    first = client.fetch(Fetch("org/a"))
    daemon.stop()
    daemon.start()
    second = client.fetch(Fetch("org/a"))
    assert (second.reply.leased, daemon.leases(first.reply.tree)) == (False, 1)  # the lease outlived the daemon


@pytest.mark.parametrize("end", ["kill", "shutting_down"])
def test_a_restart_during_a_request(daemon: FakeDaemon, client: Client, end: str) -> None:
    answer = daemon.answers["fetch"]
    daemon.answers["fetch"] = lambda request: request.error("shutting_down") if end == "shutting_down" else None
    waiting = run(lambda: client.fetch(Fetch("org/a")))
    daemon.next_request()
    daemon.stop()
    daemon.answers["fetch"] = answer
    daemon.start()
    assert waiting().reply.path.endswith(daemon.show({"a": b"a"})[0])


def test_errors_are_not_asked_for_again(daemon: FakeDaemon, client: Client) -> None:
    with pytest.raises(RepositoryNotFoundError):
        client.fetch(Fetch("org/none"))
    assert daemon.next_request()
    assert daemon.requests.empty()


def test_a_daemon_that_does_not_come_back(daemon: FakeDaemon, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELCACHE_CONNECT_SECONDS", "0.2")
    client.fetch(Fetch("org/a"))
    daemon.stop()
    with pytest.raises(DaemonNotAvailableError, match=str(daemon.socket_path)):
        client.fetch(Fetch("org/a"))


def test_a_daemon_that_dies_of_this_request(daemon: FakeDaemon, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELCACHE_CONNECT_SECONDS", "0.3")
    daemon.answers["fetch"] = lambda request: request.peer.close()
    with pytest.raises(DaemonConnectionError):
        client.fetch(Fetch("org/a"))
    assert daemon.connections > 1


def test_another_root_behind_the_same_socket(daemon: FakeDaemon, client: Client, tmp_path: Path) -> None:
    first = client.fetch(Fetch("org/a"))
    daemon.stop()
    daemon.root = tmp_path / "another"
    daemon.start()
    second = client.fetch(Fetch("org/a"))
    assert (first.reply.tree, second.reply.leased) == (second.reply.tree, True)  # what is held there is not held here


def test_the_environment_may_change(daemon: FakeDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELCACHE_SOCKET", str(daemon.socket_path))
    first = shared()
    assert first is shared()
    monkeypatch.setenv("MODELCACHE_SOCKET", str(tmp_path / "other"))
    assert shared() is not first


# ---- a socket that is not what it should be


def test_a_named_socket_that_is_missing_fails_at_once(tmp_path: Path) -> None:
    with pytest.raises(DaemonNotAvailableError) as caught:
        Client(str(tmp_path / "none")).hello()
    assert all(way in caught.value.hint for way in ("pip install 'modelcached[daemon]'", "systemctl", "MODELCACHE_SOCKET"))
    assert isinstance(caught.value, ConnectionError)


def test_a_named_socket_is_waited_for_when_told_so(daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    daemon.stop()
    daemon.socket_path.unlink()
    monkeypatch.setenv("MODELCACHE_CONNECT_SECONDS", "10")
    client = Client(str(daemon.socket_path))
    waiting = run(client.hello)
    daemon.start()
    assert waiting().root == str(daemon.root)
    client.close()


def test_a_socket_that_nobody_serves(daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELCACHE_CONNECT_SECONDS", "0.1")
    daemon.stop()
    with pytest.raises(DaemonNotAvailableError, match="refused"):
        Client(str(daemon.socket_path)).hello()


def test_a_full_queue_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELCACHE_CONNECT_SECONDS", "0.1")
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as first:
        listener.bind(str(tmp_path / "s"))
        listener.listen(0)
        first.connect(str(tmp_path / "s"))
        with pytest.raises(DaemonNotAvailableError):
            Client(str(tmp_path / "s")).hello()


@pytest.mark.parametrize("what", ["file", "folder"])
def test_what_is_no_socket(tmp_path: Path, what: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(DaemonNotAvailableError, match="is not a socket"):
        Client(str(tmp_path / what)).hello()
    with pytest.raises(DaemonNotAvailableError):
        Client(str(tmp_path / "file" / "below")).hello()


def test_a_socket_in_a_deep_folder(daemon: FakeDaemon, tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 120)
    deep.symlink_to(tmp_path)
    client = Client(str(deep / daemon.socket_path.name))
    assert client.hello().root == str(daemon.root)
    client.close()


def test_a_daemon_that_is_newer_or_older(daemon: FakeDaemon, client: Client) -> None:
    daemon.answers["hello"] = lambda request: request.error("unsupported_version", "speaks protocol 9", "upgrade")
    with pytest.raises(ProtocolError, match="speaks protocol 9"):
        client.hello()


def test_connect_seconds_is_a_number(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELCACHE_CONNECT_SECONDS", "soon")
    with pytest.raises(ValueError, match="MODELCACHE_CONNECT_SECONDS"):
        client.hello()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_a_socket_of_somebody_else(shared_tmp_path: Path) -> None:
    with FakeDaemon(shared_tmp_path) as daemon:
        daemon.socket_path.chmod(0o600)
        code = "import os; from modelcache.client import Client; os.setresuid(12345, 12345, 12345); Client().hello()"
        with in_python(daemon, f"try:\n  {code}\nexcept OSError as error:\n  print(type(error).__name__, error)") as process:
            assert process.stdout is not None
            assert "DaemonNotAvailableError uid 12345 may not use" in process.stdout.read()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_a_runtime_folder_of_somebody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever makes the folder first would otherwise get everybody's tokens."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.delenv("MODELCACHE_SOCKET", raising=False)
    folder = tmp_path / "modelcached"
    folder.mkdir(mode=0o700)
    for uid, mode in ((1, 0o700), (0, 0o755)):
        os.chown(folder, uid, uid)
        folder.chmod(mode)
        with pytest.raises(NotPermittedError, match="only uid 0"):
            Client().hello()
    folder.rmdir()
    folder.symlink_to("/tmp")
    with pytest.raises(NotPermittedError):
        Client().hello()


def test_too_long_is_said_here(client: Client) -> None:
    with pytest.raises(InvalidRequestError):
        client.fetch(Fetch("org/a", allow_patterns=["x" * 1000] * 1100))
