"""Who may connect, and how often: by the kernel's word about uid and groups; who is turned away is told why.

The daemon and the callers are uids of their own, none of them root.
"""

from __future__ import annotations

import contextlib
import grp
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from modelcache.connection import Connection
from modelcache.errors import DaemonConnectionError, NotPermittedError
from modelcached.admission import peer_groups
from modelcached.config import ConfigError, load
from modelcached.errors import NotPermitted
from modelcached.verbs import encode_error

from .clients import Client
from .conftest import as_uid
from .daemon import Daemon
from .fake_service import Client as Raw
from .saves import until

DAEMON, ALICE, BOB = 1500, 1001, 1002
STAFF = 4000  # a group that nobody has a name for
STATUS = "import sys; from modelcache.client import Client; print(Client(sys.argv[1]).call('status')['pid'])"


def ask(daemon: Daemon, uid: int, *groups: int, gid: int | None = None) -> str:
    """What a process of that uid, in these groups, is told: the daemon's pid, or why not."""
    command = as_uid(uid, gid)
    if groups:
        command[command.index("--clear-groups")] = f"--groups={','.join(map(str, groups))}"
    ran = subprocess.run([*command, sys.executable, "-c", STATUS, daemon.socket], env=daemon.environment, capture_output=True, text=True)
    return ran.stdout.strip() or ran.stderr[ran.stderr.index("modelcache.errors") :]


def is_served(said: str) -> bool:
    return said.isdecimal()


@contextlib.contextmanager
def node(folder: Path, **config: Any) -> Iterator[Daemon]:
    as_uid(DAEMON)  # or skip
    with Daemon.start(folder / "root", uid=DAEMON, **config) as daemon:
        yield daemon


def test_users_and_groups(shared_tmp_path: Path) -> None:
    with node(shared_tmp_path, allow_users=[str(ALICE)], allow_groups=[str(STAFF), "daemon"]) as daemon:
        assert is_served(ask(daemon, ALICE)) and is_served(ask(daemon, 0)) and is_served(ask(daemon, DAEMON))
        refused = ask(daemon, BOB)
        assert "NotPermittedError" in refused and f"uid {BOB} may not use this daemon" in refused
        assert is_served(ask(daemon, BOB, gid=STAFF)), "the group it runs in"
        assert is_served(ask(daemon, BOB, 100, STAFF, 101)), "a supplementary one"
        assert is_served(ask(daemon, BOB, grp.getgrnam("daemon").gr_gid)), "one with a name"
        assert not is_served(ask(daemon, BOB, STAFF + 1, gid=100))
        many = [*range(10_000, 10_600), STAFF]
        assert is_served(ask(daemon, BOB, *many)), "more groups than Python's getsockopt can tell"


def test_nobody_is_named(shared_tmp_path: Path) -> None:
    with node(shared_tmp_path) as daemon:
        assert is_served(ask(daemon, ALICE)) and is_served(ask(daemon, BOB))


def test_who_is_turned_away_hears_why_at_once(shared_tmp_path: Path) -> None:
    """Whatever it was about to send, as often as it tries: never "no daemon listens", and the log does not fill."""
    with node(shared_tmp_path, allow_users=ALICE) as daemon:
        with Client.of(daemon, uid=BOB) as task:
            for _ in range(50):
                refused = task.refused("ask", method="status")
                assert refused.error is not None and refused.error[0] == "NotPermittedError", refused
                assert re.search(f"hint: .*uid {BOB}.*allow_users.*allow_groups", refused.message)
        said = [line for line in daemon.log.splitlines() if "turned away" in line]
        assert len(said) == 1 and f"uid={BOB}" in said[0]
        assert daemon.status()["refused"] == 0  # that is for who is above a limit


def test_what_was_said_before_the_end_is_heard() -> None:
    """A client that finds the connection closed while it writes still reads why."""
    ours, theirs = socket.socketpair()
    theirs.sendall(encode_error(None, NotPermitted("not you", "ask somebody")))
    theirs.close()
    connection = Connection(ours)
    for _ in range(2):
        with pytest.raises(NotPermittedError, match="not you"):
            connection.request("hello", {})
    connection.close()
    ours, theirs = socket.socketpair()
    theirs.close()
    connection = Connection(ours)
    with pytest.raises(DaemonConnectionError):  # nothing was said: it is worth another try
        connection.request("hello", {})
    connection.close()


def test_connections_of_one_user(shared_tmp_path: Path) -> None:
    with node(shared_tmp_path, max_connections_per_user=3) as daemon, contextlib.ExitStack() as stack:
        tasks = [stack.enter_context(Client.of(daemon, uid=ALICE)) for _ in range(4)]
        for task in tasks[:3]:
            task.begin("ask", method="status")
            task.good()
        refused = tasks[3].refused("ask", method="status")
        assert refused.error is not None and refused.error[0] == "DaemonError", refused
        assert daemon.status()["refused"] == 1
        assert f"uid {ALICE} has 3 connections" in refused.message and "max_connections_per_user" in refused.message
        assert is_served(ask(daemon, BOB))
        for _ in range(5):
            stack.enter_context(Raw(daemon.socket))  # root
        tasks[0].kill()
        until(lambda: is_served(ask(daemon, ALICE)))


def test_groups_of_a_peer() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert sorted(peer_groups(ours)) == sorted(os.getgroups())


@pytest.mark.parametrize(
    ("raw", "is_read_as"),
    [("root, 12", ("root", "12")), (["root", 12, "root"], ("root", "12")), (7, ("7",)), ("", ()), ([], ())],
)
def test_spellings(tmp_path: Path, raw: object, is_read_as: tuple[str, ...]) -> None:
    file = tmp_path / "config.toml"
    file.write_text(f"allow_users = {raw!r}\n")
    assert load({}, {}, file=file).allow_users == is_read_as


@pytest.mark.parametrize("raw", ["nobody-has-this-name", str(1 << 32), "-1", "a\tb", "٣"])
@pytest.mark.parametrize(("field", "what"), [("allow_users", "user"), ("allow_groups", "group")])
def test_names_that_mean_nobody(field: str, what: str, raw: str) -> None:
    with pytest.raises(ConfigError, match=f"{field}.*this machine has no {what}"):
        load({field: raw}, {})
