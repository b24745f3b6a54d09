"""The SDK's end of the wire: lines, descriptors, threads that share one connection, callers that leave."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from modelcache.connection import Connection
from modelcache.errors import DaemonConnectionError, HubError, InvalidRequestError, ProtocolError, RepositoryNotFoundError
from modelcache.protocol import MAX_DESCRIPTORS, MAX_MESSAGE_BYTES, MAX_REQUESTS, Progress

from .conftest import ROOT
from .fake_daemon import WAIT_SECONDS, FakeDaemon, Request, in_memory


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[FakeDaemon]:
    with FakeDaemon(tmp_path) as daemon:
        yield daemon


@pytest.fixture
def connection(daemon: FakeDaemon) -> Iterator[Connection]:
    connection = dial(daemon)
    yield connection
    connection.close()


def dial(daemon: FakeDaemon) -> Connection:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(str(daemon.socket_path))
    return Connection(sock)


def open_descriptors() -> set[str]:
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            found.add(f"{name} {os.readlink(f'/proc/self/fd/{name}')}")
        except FileNotFoundError:  # the listing's own
            pass
    return found


def line(message: Any) -> bytes:
    return json.dumps(message).encode() + b"\n"


def run(work: Callable[[], Any]) -> Callable[[], Any]:
    """Starts `work` in a thread; the returned function waits for its result."""
    outcome: list[Any] = []

    def target() -> None:
        try:
            outcome.append(work())
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=target, daemon=True)
    thread.start()

    def result() -> Any:
        thread.join(WAIT_SECONDS)
        assert outcome, "still waiting"
        if isinstance(outcome[0], BaseException):
            raise outcome[0]
        return outcome[0]

    return result


# ---- messages


def test_a_reply_in_single_bytes_between_others(daemon: FakeDaemon, connection: Connection) -> None:
    def answer(request: Request) -> None:
        reply = line({"jsonrpc": "2.0", "id": request.id, "result": {"text": "ä\n🙂"}})
        stray = line({"jsonrpc": "2.0", "id": 999, "result": {}})
        for byte in stray + line({"jsonrpc": "2.0", "method": "progress", "params": {"id": 998, "phase": "list"}}) + reply:
            request.peer.send_raw(bytes([byte]))

    daemon.answers["echo"] = answer
    assert connection.request("echo", {}).result == {"text": "ä\n🙂"}


def test_many_messages_in_one_piece(daemon: FakeDaemon, connection: Connection) -> None:
    seen: list[Progress] = []

    def answer(request: Request) -> None:
        news = [
            line({"method": "progress", "params": {"id": request.id, "phase": "download", "done_bytes": n, "later": 1}}) for n in range(5)
        ]
        request.peer.send_raw(b"".join(news) + line({"jsonrpc": "2.0", "id": request.id, "result": {}}))

    daemon.answers["slow"] = answer
    connection.request("slow", {}, seen.append)
    assert seen == [Progress("download", done_bytes=4)]  # only the latest of what came at once, without fields it does not know


def test_progress_is_called_in_the_callers_thread(daemon: FakeDaemon, connection: Connection) -> None:
    def answer(request: Request) -> None:
        request.progress(phase="look up", message=str(request.params["n"]))
        everybody.wait(WAIT_SECONDS)
        request.reply({"n": request.params["n"]})

    daemon.answers["work"] = answer
    everybody = threading.Barrier(8)

    def work(n: int) -> Any:
        seen = []
        reply = connection.request("work", {"n": n}, lambda progress: seen.append((progress.message, threading.get_ident())))
        return reply.result["n"], seen == [(str(n), threading.get_ident())]

    waiting = [run(partial(work, n)) for n in range(8)]
    assert [result() for result in waiting] == [(n, True) for n in range(8)]


@pytest.mark.parametrize("size", [10, 3 << 20])
def test_a_large_result_in_a_file(daemon: FakeDaemon, connection: Connection, size: int) -> None:
    def answer(request: Request) -> None:
        extra = os.open("/dev/null", os.O_RDONLY)
        request.reply({"in_fd": True}, [in_memory(json.dumps({"text": "x" * size}).encode()), extra])

    daemon.answers["big"] = answer
    reply = connection.request("big", {})
    assert len(reply.result["text"]) == size
    assert [os.readlink(f"/proc/self/fd/{descriptor}") for descriptor in reply.descriptors] == ["/dev/null"]
    os.close(reply.descriptors[0])


def test_a_request_that_is_too_long_is_not_sent(daemon: FakeDaemon, connection: Connection) -> None:
    with pytest.raises(InvalidRequestError):
        connection.request("echo", {"text": "x" * MAX_MESSAGE_BYTES})
    daemon.answers["echo"] = lambda request: request.reply({})
    assert connection.request("echo", {}).result == {}


@pytest.mark.parametrize(
    ("name", "kind"),
    [("repo_not_found", RepositoryNotFoundError), ("of_a_newer_daemon", Exception), ("shutting_down", DaemonConnectionError)],
)
def test_errors_have_names_and_data(daemon: FakeDaemon, connection: Connection, name: str, kind: type[Exception]) -> None:
    def answer(request: Request) -> None:
        data = {"name": name, "hint": "look again", "repo": "a/b"}
        request.peer.send({"jsonrpc": "2.0", "id": request.id, "error": {"code": -1, "message": "gone", "data": data}})

    daemon.answers["fetch"] = answer
    with pytest.raises(kind) as caught:
        connection.request("fetch", {})
    assert (caught.value.name, caught.value.hint, caught.value.data) == (name, "look again", {"repo": "a/b"})  # type: ignore[attr-defined]
    assert isinstance(caught.value, HubError) == (kind is RepositoryNotFoundError)


@pytest.mark.parametrize(
    ("said", "descriptors"),
    [
        pytest.param(b"no json\n", 0, id="no JSON"),
        pytest.param(b"[1]\n", 0, id="no object"),
        pytest.param(line({"jsonrpc": "2.0", "id": 1}), 0, id="neither result nor error"),
        pytest.param(line({"jsonrpc": "2.0", "id": {}, "result": {}}), 0, id="no id of ours"),
        pytest.param(line({"jsonrpc": "2.0", "method": "progress", "params": {}}), 0, id="progress of nothing"),
        pytest.param(line({"jsonrpc": "2.0", "id": 1, "result": {}, "fds": 2}), 1, id="a descriptor is missing"),
        pytest.param(line({"jsonrpc": "2.0", "id": 1, "result": {}, "fds": -1}), 0, id="less than none"),
        pytest.param(line({"jsonrpc": "2.0", "id": 1, "result": {}, "fds": 1.5}), 2, id="half a descriptor"),
        pytest.param(line({"jsonrpc": "2.0", "id": 1, "result": {}}), 2, id="descriptors are left over"),
        pytest.param(b"x", MAX_DESCRIPTORS + 1, id="too many descriptors"),
        pytest.param(b"x" * (MAX_MESSAGE_BYTES + 1), 0, id="a line without end"),
    ],
)
def test_nonsense_ends_the_connection_and_leaks_nothing(daemon: FakeDaemon, said: bytes, descriptors: int) -> None:
    before = open_descriptors()
    connection = dial(daemon)
    passed = [os.open("/dev/zero", os.O_RDONLY) for _ in range(descriptors)]
    daemon.answers["fetch"] = lambda request: request.peer.send_raw(said, passed)
    outcome: BaseException | None = None
    try:
        reply = connection.request("fetch", {})
        assert said.endswith(b"}\n")  # a sound reply, followed by what is left over
        assert reply.result == {}
        connection.request("fetch", {}, deadline=0)
    except (ProtocolError, DaemonConnectionError) as error:
        outcome = error
    assert outcome is not None
    assert connection.is_broken
    with pytest.raises((ProtocolError, DaemonConnectionError)):
        connection.request("fetch", {})
    connection.close()
    for descriptor in passed:
        os.close(descriptor)
    daemon.stop()
    assert {name for name in open_descriptors() if "/dev/zero" in name} == {name for name in before if "/dev/zero" in name}


# ---- descriptors


def test_descriptors_are_closed_on_exec(daemon: FakeDaemon, connection: Connection) -> None:
    daemon.answers["fetch"] = lambda request: request.reply({}, [os.open("/dev/zero", os.O_RDONLY) for _ in range(MAX_DESCRIPTORS)])
    received = connection.request("fetch", {}).descriptors
    assert len(received) == MAX_DESCRIPTORS
    assert not any(os.get_inheritable(descriptor) for descriptor in received)
    child = subprocess.run(["sh", "-c", "ls -l /proc/$$/fd"], close_fds=False, capture_output=True, text=True, check=True)
    assert "/dev/zero" not in child.stdout
    assert str(daemon.socket_path) not in child.stdout
    for descriptor in received:
        os.close(descriptor)


def test_each_message_takes_its_own(daemon: FakeDaemon, connection: Connection, tmp_path: Path) -> None:
    """Replies that overtake each other, with different numbers of descriptors, in one burst."""
    together = threading.Barrier(6)

    def answer(request: Request) -> None:
        together.wait(WAIT_SECONDS)
        count = request.params["count"]
        for n in range(count):
            (tmp_path / f"{count}-{n}").touch()
        request.reply({"count": count}, [os.open(tmp_path / f"{count}-{n}", os.O_RDONLY) for n in range(count)])

    daemon.answers["fetch"] = answer

    def work(count: int) -> list[str]:
        reply = connection.request("fetch", {"count": count})
        names = [os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")) for descriptor in reply.descriptors]
        for descriptor in reply.descriptors:
            os.close(descriptor)
        return names

    waiting = [run(partial(work, count)) for count in range(6)]
    assert [result() for result in waiting] == [[f"{count}-{n}" for n in range(count)] for count in range(6)]


def test_descriptors_can_be_sent(daemon: FakeDaemon, connection: Connection) -> None:
    """The fake reads with `recv`, so the kernel drops them: what counts is that the line arrives with its number."""
    daemon.answers["save"] = lambda request: request.reply({})
    with open("/dev/null") as file:
        connection.request("save", {}, descriptors=[file.fileno()])
        os.fstat(file.fileno())  # still the caller's
    assert daemon.next_request().method == "save"


# ---- many callers


def test_more_callers_than_the_daemon_takes(daemon: FakeDaemon, connection: Connection) -> None:
    running = 0
    most = 0
    lock = threading.Lock()
    full = threading.Event()

    def answer(request: Request) -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
            if running == MAX_REQUESTS:
                full.set()
        full.wait(WAIT_SECONDS)
        with lock:
            running -= 1
        request.reply({"n": request.params["n"]})

    daemon.answers["work"] = answer
    waiting = [run(partial(connection.request, "work", {"n": n})) for n in range(MAX_REQUESTS + 20)]
    assert [result().result["n"] for result in waiting] == list(range(MAX_REQUESTS + 20))
    assert most == MAX_REQUESTS


def test_a_slow_callback_stops_nobody_else(daemon: FakeDaemon, connection: Connection) -> None:
    daemon.answers["quick"] = lambda request: request.reply({})
    release = threading.Event()

    def slow(request: Request) -> None:
        request.progress(phase="download")
        release.wait(WAIT_SECONDS)
        request.reply({})

    daemon.answers["slow"] = slow
    inside = threading.Event()

    def on_progress(_: Progress) -> None:
        inside.set()
        release.wait(WAIT_SECONDS)

    waiting = run(lambda: connection.request("slow", {}, on_progress))
    assert inside.wait(WAIT_SECONDS)  # the thread that reads is busy with its own news
    connection.request("quick", {})
    release.set()
    waiting()


def test_everybody_hears_of_the_end(daemon: FakeDaemon, connection: Connection) -> None:
    daemon.answers["work"] = lambda request: None
    waiting = [run(lambda: connection.request("work", {})) for _ in range(5)]
    for _ in range(5):
        daemon.next_request()
    daemon.stop()
    for result in waiting:
        with pytest.raises(DaemonConnectionError):
            result()


def test_a_silent_daemon_meets_the_deadline(daemon: FakeDaemon) -> None:
    daemon.answers["hello"] = lambda request: None
    connection = dial(daemon)
    with pytest.raises(DaemonConnectionError, match="does not answer"):
        connection.request("hello", {}, deadline=0)


# ---- callers that leave


class Leave(BaseException):
    pass


def test_a_caller_that_leaves_cancels_only_its_own(daemon: FakeDaemon, connection: Connection) -> None:
    release = threading.Event()

    def slow(request: Request) -> None:
        request.progress(phase="download")
        release.wait(WAIT_SECONDS)
        request.reply({}, [os.open("/dev/zero", os.O_RDONLY)])

    daemon.answers["slow"] = slow
    stays = run(lambda: connection.request("slow", {}))
    staying = daemon.next_request()

    def leave(_: Progress) -> None:
        raise Leave

    with pytest.raises(Leave):
        connection.request("slow", {}, leave)
    assert daemon.cancelled.get(timeout=WAIT_SECONDS).id != staying.id
    release.set()  # both are answered now; the descriptor nobody waits for is closed on arrival
    for descriptor in stays().descriptors:
        os.close(descriptor)
    daemon.answers["quick"] = lambda request: request.reply({})
    connection.request("quick", {})
    assert not connection.is_broken
    daemon.stop()  # has closed its own
    assert not [name for name in open_descriptors() if "/dev/zero" in name]


INTERRUPTED = """
import signal, socket, sys, threading
from modelcache.connection import Connection
sock = socket.socket(socket.AF_UNIX)
sock.connect(sys.argv[1])
connection = Connection(sock)
other = threading.Thread(target=lambda: print(connection.request("stays", {}).result, flush=True))
if sys.argv[2] == "reads":  # the main thread is the one that reads, or one that waits for another
    sys.stdout.flush()
else:
    other.start()
    connection.request("began", {})
try:
    connection.request("slow", {})
except KeyboardInterrupt:
    print("interrupted", flush=True)
if sys.argv[2] == "reads":
    other.start()
other.join()
print(connection.request("quick", {}).result, connection.is_broken)
"""


@pytest.mark.parametrize("role", ["reads", "waits"])
def test_ctrl_c_cancels_and_the_connection_lives(daemon: FakeDaemon, role: str) -> None:
    began, release = threading.Event(), threading.Event()

    def stays(request: Request) -> None:
        began.set()
        release.wait(WAIT_SECONDS)
        request.reply({"stays": 1})

    def replies_when_begun(request: Request) -> None:
        began.wait(WAIT_SECONDS)
        request.reply({})

    daemon.answers.update(
        stays=stays,
        began=replies_when_begun,
        slow=lambda request: None,
        quick=lambda request: request.reply({"quick": 1}),
    )
    with subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, str(daemon.socket_path), role], stdout=subprocess.PIPE, text=True, env=os.environ | sdk_path()
    ) as process:
        assert process.stdout is not None
        while (request := daemon.next_request()).method != "slow":
            pass
        process.send_signal(signal.SIGINT)
        assert daemon.cancelled.get(timeout=WAIT_SECONDS) is request
        assert process.stdout.readline() == "interrupted\n"
        release.set()
        assert process.stdout.read() == "{'stays': 1}\n{'quick': 1} False\n"
    assert process.returncode == 0


def sdk_path() -> dict[str, str]:
    return {"PYTHONPATH": str(ROOT / "sdk")}
