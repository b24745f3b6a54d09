"""Nonsense on the wire, from a seed that is printed: whatever a client sends, the daemon lives, answers others, and keeps nothing of it.

Methods and parameters are those that the daemon names itself, so a new verb is among them from its first day. Descriptors of every
kind come along, declared or not. Memory is flat: RSS grows by 16 MiB at most after the first rounds, and as many descriptors are open
afterwards as before.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import select
import socket
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from modelcache.codes import ERROR_CODES
from modelcache.protocol import MAX_DESCRIPTORS, MAX_MESSAGE_BYTES, PROTOCOL_VERSION

from .daemon import Daemon
from .fake_service import Client
from .saves import until

MIB = 1 << 20
FLAT_BYTES = 16 * MIB
WORDS = ["", "x", "main", "org/name", "../..", "/etc/passwd", "a\u0000b", "\ud800", "é" * 200, "0" * 40, "0" * 64, "%s{}\n"]
LONG = "x" * 70_000
NUMBERS = [0, 1, -1, 63, 64, 65, 1 << 31, -(1 << 63), 1 << 64, 1e308, 0.5]


class Grammar:
    """What this daemon understands, as its own errors tell."""

    def __init__(self, daemon: Daemon) -> None:
        with Client(daemon.socket) as client:
            named = client.call("nothing of that name")["error"]["data"]["hint"]
            self.methods: dict[str, list[str]] = {name: [] for name in re.findall(r"\w+", named.partition(":")[2])}
            for name in self.methods:
                hint = client.call(name, nothing_of_that_name=1)["error"]["data"]["hint"]
                self.methods[name] = re.findall(r"\w+", hint.partition(":")[2])
        assert {"hello", "fetch", "save_open", "save_files", "load", "status"} <= set(self.methods)
        assert "repo_id" in self.methods["fetch"] and "size_bytes" in self.methods["save_open"]


class Fuzz:
    """One seed's nonsense. Everything that is opened here is closed here."""

    def __init__(self, daemon: Daemon, grammar: Grammar, seed: str) -> None:
        self.random = random.Random(seed)
        self._daemon = daemon
        self._methods = grammar.methods
        self._connection: socket.socket | None = None
        self.sent: Counter[str] = Counter()
        self.heard: Counter[str] = Counter()

    def run(self, messages: int) -> None:
        kinds = [self.valid, self.valid, self.mutated, self.mutated, self.junk, self.envelope, self.flood, self.many_floods, self.half]
        try:
            for _ in range(messages):
                kind = self.random.choice(kinds)
                self.sent[kind.__name__] += 1
                kind()
                if self.random.random() < 0.1:
                    self._leave()
        finally:
            self._leave()

    # ---- kinds of nonsense

    def valid(self) -> None:
        """A request with the right names and any values."""
        self._send(self._request())

    def mutated(self) -> None:
        """One with bytes changed, left out, or doubled."""
        line = bytearray(self._request())
        for _ in range(self.random.randint(1, 8)):
            place = self.random.randrange(len(line))
            how = self.random.randrange(3)
            if how == 0:
                line[place] = self.random.randrange(256)
            elif how == 1:
                del line[place : place + self.random.randrange(1, 20)]
            else:
                line[place:place] = line[place : place + self.random.randrange(1, 200)]
            line = line or bytearray(b"{")
        self._send(bytes(line) + b"\n")

    def junk(self) -> None:
        size = self.random.choice([1, 100, 5000, MAX_MESSAGE_BYTES - 1, MAX_MESSAGE_BYTES + 1])
        what = self.random.choice([b"\n", b"[", b'{"a":', b"\0", b"\xff", b'"', b"9", b" ", self.random.randbytes(50)])
        self._send((what * (size // len(what) + 1))[:size] + b"\n")

    def envelope(self) -> None:
        """JSON that is no request, or just about."""
        fields = {"jsonrpc": "2.0", "id": 1, "method": "status", "params": {}, "fds": 0}
        for name in self.random.sample(list(fields), self.random.randint(1, 4)):
            fields[name] = self._value(2)
        self._send(json.dumps(fields).encode() + b"\n")

    def flood(self) -> None:
        """Descriptors: as many as are declared, more, or fewer."""
        with self._descriptors() as descriptors:
            declared = self.random.choice([len(descriptors), len(descriptors), 0, 1, MAX_DESCRIPTORS, MAX_DESCRIPTORS + 1])
            self._send(self._request(declared), descriptors)

    def many_floods(self) -> None:
        """Descriptors on a message that never ends, again and again."""
        with self._descriptors() as descriptors:
            for _ in range(self.random.randint(1, 10)):
                self._send(b" ", descriptors)

    def half(self) -> None:
        line = self._request()
        self._send(line[: self.random.randrange(len(line))])
        self._leave()

    # ---- how it is made and sent

    def _request(self, declared: int = 0) -> bytes:
        method = self.random.choice(list(self._methods))
        names = self._methods[method]
        params: Any = {name: self._fitting(name) for name in names if self.random.random() < 0.8}
        if self.random.random() < 0.1:
            params = self._value(2)
        message = {"jsonrpc": "2.0", "id": self.random.choice([1, 2, 3, "a", self.random.randrange(1 << 40)]), "method": method}
        return json.dumps({**message, "params": params, **({"fds": declared} if declared else {})}).encode() + b"\n"

    def _fitting(self, name: str) -> Any:
        """Mostly a value of the type that the name suggests, so that requests get beyond the reading."""
        fitting: dict[str, Any] = {
            "protocol": PROTOCOL_VERSION,
            "repo_id": "org/name",
            "repo_type": "model",
            "key": "mf.models/models/artifacts/fuzz_0123",
            "reference": {"key": "mf.models/models/artifacts/fuzz_0123", "type": "model"},
            "files": self.random.choice([1, [["a", 1, False]], [["a", 0, True]] * 3]),
            "size_bytes": self.random.choice([0, 1, 1000, 1 << 50]),
            "deadline_seconds": 0.001,
            "storage_format": self.random.choice(["files", "tar"]),
        }
        return fitting[name] if name in fitting and self.random.random() < 0.8 else self._value(3)

    def _value(self, depth: int) -> Any:
        kind = self.random.randrange(7 if depth else 4)
        if kind < 2:
            return self.random.choice(WORDS) if self.random.random() < 0.99 else LONG
        if kind == 2:
            return self.random.choice(NUMBERS)
        if kind == 3:
            return self.random.choice([None, True, False])
        if kind == 4:
            return {self.random.choice(WORDS): self._value(depth - 1) for _ in range(self.random.randrange(4))}
        return [self._value(depth - 1) for _ in range(self.random.choice([0, 1, 2, 3] if depth > 1 else [0, 1, 300]))]

    @contextlib.contextmanager
    def _descriptors(self) -> Iterator[list[int]]:
        """Of every kind: files for reading, for writing, by path only, folders, pipes, sockets, the connection itself."""
        with contextlib.ExitStack() as stack:

            def one() -> int:
                kind = self.random.randrange(7)
                if kind == 5 and self._connection is not None:
                    return self._connection.fileno()
                if kind == 6:
                    ours, theirs = socket.socketpair()
                    stack.callback(ours.close)
                    return theirs.detach()
                if kind == 4:
                    reading, writing = os.pipe()
                    stack.callback(os.close, writing)
                    return reading
                path, flags = [("/dev/null", os.O_RDWR), (__file__, os.O_RDONLY), (__file__, os.O_PATH), ("/", os.O_RDONLY)][kind % 4]
                return os.open(path, flags | os.O_CLOEXEC)

            found = [one() for _ in range(self.random.choice([1, 2, 3, 10, MAX_DESCRIPTORS, MAX_DESCRIPTORS, 200]))]
            for descriptor in found:
                if self._connection is None or descriptor != self._connection.fileno():
                    stack.callback(os.close, descriptor)
            yield found

    def _send(self, data: bytes, descriptors: list[int] | None = None) -> None:
        """As far as the daemon listens: it may hang up at any byte."""
        try:
            connection = self._connected()
            if descriptors:
                rights = b"".join(descriptor.to_bytes(4, "little") for descriptor in descriptors)
                sent = connection.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
                data = data[sent:]
            connection.sendall(data)
            self._listen()
        except (OSError, ValueError) as error:
            self.heard[type(error).__name__] += 1
            self._leave()

    def _listen(self) -> None:
        """Reads what is there, and not always: a client may be slow."""
        assert self._connection is not None
        patience = self.random.choice([0, 0, 0.05])
        while self.random.random() < 0.8 and select.select([self._connection], [], [], patience)[0]:
            data, ancillary, _, _ = self._connection.recvmsg(1 << 16, socket.CMSG_SPACE(4 * MAX_DESCRIPTORS), socket.MSG_CMSG_CLOEXEC)
            for _, _, rights in ancillary:
                for start in range(0, len(rights) - len(rights) % 4, 4):
                    os.close(int.from_bytes(rights[start : start + 4], "little"))
            if not data:
                raise ConnectionResetError
            self.heard.update(name for name in re.findall(rb'"name":"(\w+)"', data) if name.decode() in ERROR_CODES)
            self.heard["results"] += data.count(b'"result"')

    def _connected(self) -> socket.socket:
        if self._connection is None:
            self._connection = socket.socket(socket.AF_UNIX)
            self._connection.settimeout(20)
            self._connection.connect(self._daemon.socket)
            if self.random.random() < 0.95:
                hello = {"id": 0, "method": "hello", "params": {"protocol": PROTOCOL_VERSION}}
                self._connection.sendall(json.dumps(hello).encode() + b"\n")
        return self._connection

    def _leave(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


class Watch:
    """What the daemon holds, as soon as it has nothing to do."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon

    def settled(self) -> tuple[int, int]:
        """Descriptors and RSS in bytes, when everybody has gone."""

        with Client(self._daemon.socket) as client:

            def is_quiet() -> bool:
                status = client.call("status")["result"]
                return bool(status["connections"] == 1 and status["requests"] == 1 and status["spool"]["saves"] == 0)

            until(is_quiet)
            return len(os.listdir(f"/proc/{self._daemon.pid}/fd")), self._daemon.memory_bytes


def fuzz(folder: Path, warm_up: int, messages: int) -> None:
    seed = os.environ.get("MODELCACHE_TEST_SEED") or str(random.randrange(10**6))
    print(f"seed {seed} (MODELCACHE_TEST_SEED)")
    with Daemon.start(folder / "root", hub_attempts=1, hub_backoff_seconds=0.01) as daemon:
        grammar, watch = Grammar(daemon), Watch(daemon)
        Fuzz(daemon, grammar, f"{seed} warm").run(warm_up)
        descriptors, rss = watch.settled()
        fuzzing = Fuzz(daemon, grammar, seed)
        fuzzing.run(messages)
        with Client(daemon.socket) as other:
            assert other.call("status")["result"]["pid"] == daemon.pid
        after, rss_after = watch.settled()
        print(f"sent {dict(fuzzing.sent)}; heard {dict(fuzzing.heard)}; descriptors {descriptors} -> {after}; RSS {rss} -> {rss_after}")
        assert fuzzing.heard["results"] > 0 and len(fuzzing.heard) > 5 and all(fuzzing.sent.values())
        assert after <= descriptors, [os.readlink(path) for path in Path(f"/proc/{daemon.pid}/fd").iterdir()]
        assert rss_after - rss <= FLAT_BYTES
        unexpected = [line for line in daemon.log.splitlines() if "failed unexpectedly" in line or "Traceback" in line]
        assert unexpected == []


@pytest.mark.timeout(60)
def test_nonsense(tmp_path: Path) -> None:
    fuzz(tmp_path, warm_up=400, messages=800)


@pytest.mark.soak
@pytest.mark.timeout(300)
def test_much_nonsense(tmp_path: Path) -> None:
    fuzz(tmp_path, warm_up=2_000, messages=10_000)


@pytest.mark.timeout(60)
def test_a_connection_that_holds_itself(tmp_path: Path) -> None:
    """Who passes its own end along, on a message that never ends, would never be seen to leave."""
    with Daemon.start(tmp_path / "root") as daemon:
        for _ in range(50):
            with socket.socket(socket.AF_UNIX) as connection:
                connection.connect(daemon.socket)
                socket.send_fds(connection, [b"{"], [connection.fileno()])
        Watch(daemon).settled()


@pytest.mark.timeout(60)
def test_connections_that_flood_and_read_nothing(tmp_path: Path) -> None:
    """All at the same time; the daemon has more callers than this."""
    with Daemon.start(tmp_path / "root", max_connections=128) as daemon, contextlib.ExitStack() as stack:
        watch = Watch(daemon)
        before, _ = watch.settled()
        files = [stack.enter_context(tempfile.TemporaryFile()).fileno() for _ in range(MAX_DESCRIPTORS)]
        hello = b'{"id": 0, "method": "hello", "params": {"protocol": 1}}\n'
        line = b'{"id": 1, "method": "status", "params": {}, "fds": %d' % MAX_DESCRIPTORS
        for _ in range(120):
            connection = stack.enter_context(socket.socket(socket.AF_UNIX))
            connection.connect(daemon.socket)
            connection.sendall(hello)
            socket.send_fds(connection, [line], files)
        assert daemon.status()["connections"] == 121
        until(lambda: len(os.listdir(f"/proc/{daemon.pid}/fd")) >= 120 * (1 + MAX_DESCRIPTORS))
        stack.close()
        assert watch.settled()[0] <= before
