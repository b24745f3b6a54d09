from __future__ import annotations

import json
import os
import random
import resource
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from modelcache.codes import ERROR_CODES
from modelcache.protocol import MAX_DESCRIPTORS, MAX_MESSAGE_BYTES, MAX_REQUESTS, PROTOCOL_VERSION, Fetch
from modelcached.errors import InvalidRequest
from modelcached.verbs import Verb

from .fake_service import Client, Daemon, daemon


@pytest.fixture(scope="module")
def running() -> Iterator[Daemon]:
    with daemon() as started:
        yield started


@pytest.fixture
def client(running: Daemon) -> Iterator[Client]:
    """A connection; afterwards the daemon holds no descriptor more than before, whatever was sent."""
    with Client(running.socket) as watching:
        before = running.descriptors()
        with Client(running.socket) as connected:
            yield connected
        while watching.call("traffic")["result"]["connections"] > 1:
            pass
        assert running.descriptors() == before


def name_of(message: dict[str, Any]) -> str:
    error = message["error"]
    assert error["code"] == ERROR_CODES[error["data"]["name"]] and error["message"]
    return str(error["data"]["name"])


# ---- requests and answers


def test_hello_says_who_we_are(client: Client, running: Daemon) -> None:
    assert client.welcome["protocol"] == PROTOCOL_VERSION and client.welcome["pid"] == running.process.pid


@pytest.mark.parametrize("protocol", [PROTOCOL_VERSION + 1, 0, -1])
def test_versions_that_are_not_spoken(client: Client, running: Daemon, protocol: int) -> None:
    with Client(running.socket, hello=False) as other:
        answer = other.call("hello", protocol=protocol, client="modelcache/9")
        assert name_of(answer) == "unsupported_version" and "upgrade the daemon" in answer["error"]["data"]["hint"]
        assert name_of(other.call("echo", text="x")) == "invalid_request"  # hello has to come first
        assert other.call("hello", protocol=1)["result"]["protocol"] == PROTOCOL_VERSION


def test_results_are_objects_at_every_depth(client: Client) -> None:
    echo = {"text": "a", "number": 0, "words": [], "maybe": None}
    assert client.call("nested")["result"] == {"inner": echo, "several": [{**echo, "text": "b"}, {**echo, "text": "c"}]}


def test_caller_is_known_by_the_kernels_word(client: Client) -> None:
    assert client.call("who")["result"] == {"uid": os.getuid(), "gid": os.getgid(), "pid": os.getpid()}


@pytest.mark.skipif(os.getuid() != 0, reason="another uid takes root to become")
def test_caller_of_another_uid(shared_tmp_path: Path) -> None:
    running = Daemon(shared_tmp_path)
    try:
        os.setegid(4712)
        os.seteuid(4711)  # the kernel vouches for the effective ids
        try:
            other = Client(running.socket)
        finally:
            os.seteuid(0)
            os.setegid(0)
        with other:
            assert other.call("who")["result"] == {"uid": 4711, "gid": 4712, "pid": os.getpid()}
    finally:
        running.kill()


@pytest.mark.parametrize(
    ("method", "params", "words"),
    [
        ("echo", {}, "`text`"),
        ("echo", {"text": 1}, "$.text"),
        ("echo", {"text": "x", "number": "1"}, "$.number"),
        ("echo", {"text": "x", "number": 1.5}, "$.number"),
        ("echo", {"text": "x", "number": True}, "$.number"),
        ("echo", {"text": "x", "words": ["a", None]}, "$.words"),
        ("echo", {"text": "x", "txt": "y"}, "`txt`"),
        ("echo", {"text": "a\0b"}, "NUL"),
        ("echo", {"text": "x", "words": ["a\0b"]}, "NUL"),
        ("echo", [], "object"),
        ("echo", None, "object"),
        ("who", {"x": 1}, "`x`"),
        ("hello", {"protocol": "1"}, "$.protocol"),
    ],
)
def test_parameters_are_refused_by_name(client: Client, method: str, params: Any, words: str) -> None:
    client.raw(json.dumps({"jsonrpc": "2.0", "id": 7, "method": method, "params": params}).encode() + b"\n")
    answer = client.receive().message
    assert answer["id"] == 7 and name_of(answer) == "invalid_params"
    assert words in answer["error"]["message"] and method in answer["error"]["data"]["hint"]
    assert client.call("echo", text="still here")["result"]["text"] == "still here"


@pytest.mark.parametrize("text", [b'"\\ud800"', b"[" * 5_000 + b"]" * 5_000], ids=["half a letter", "depth"])
def test_parameters_that_no_decoder_takes(client: Client, text: bytes) -> None:
    client.raw(b'{"id": 7, "method": "echo", "params": {"text": "x", "maybe": ' + text + b"}}\n")
    assert client.refusal() == "parse_error"


def test_protocols_own_types_are_read(client: Client) -> None:
    verb = Verb("fetch", Fetch)
    first, second = (verb.read(b'{"repo_id": "a/b", "allow_patterns": ["*.json"]}') for _ in range(2))  # type: ignore[arg-type]
    assert first == Fetch("a/b", allow_patterns=["*.json"]) and first.held is not second.held  # no default is shared
    with pytest.raises(InvalidRequest, match="repo_idd"):
        verb.read(b'{"repo_idd": "a/b"}')  # type: ignore[arg-type]


def test_errors_carry_their_data(client: Client) -> None:
    answer = client.call("refuse", name="5 GB")
    assert name_of(answer) == "no_space" and answer["error"]["data"] == {"name": "no_space", "hint": "free some", "needed": "5 GB"}
    assert name_of(client.call("nothing")) == "method_not_found"
    assert name_of(client.call("give_up")) == "shutting_down"  # cancelled from below: nobody has to wait for ever
    assert name_of(client.call("unsendable")) == "storage"  # data that is no JSON and a message that is no UTF-8


def test_what_nobody_expected_is_internal_and_logged_on_one_line_without_the_token(client: Client, running: Daemon) -> None:
    answer = client.call("crash")
    assert name_of(answer) == "internal" and "secret" not in str(answer)
    (line,) = [line for line in running.log.read_text().splitlines() if "RuntimeError" in line]
    assert f"uid={os.getuid()} pid={os.getpid()} method=crash" in line and "hf_abc" not in line


def test_requests_run_side_by_side(client: Client) -> None:
    slow = client.request("wait", name="side")
    assert client.call("echo", text="quick")["result"]["text"] == "quick"
    client.request("release", name="side")
    assert {client.receive().message["id"] for _ in range(2)} == {slow, slow + 2}


def test_an_id_is_not_used_twice_at_the_same_time(client: Client) -> None:
    client.raw(b'{"id": "a", "method": "wait", "params": {"name": "twice"}}\n' * 2)
    assert client.refusal() == "invalid_request"
    client.raw(b'{"method": "cancel", "params": {"id": "a"}}\n')
    assert client.call("cancelled", name="twice")["result"] == {}
    client.raw(b'{"id": "a", "method": "echo", "params": {"text": "again"}}\n')
    assert client.receive().message["result"]["text"] == "again"


def test_at_most_so_many_requests_of_one_connection(client: Client) -> None:
    for _ in range(MAX_REQUESTS):
        client.request("wait", name="many")
    assert name_of(client.call("echo", text="x")) == "too_many"
    client.close()


# ---- who leaves


def test_cancel_ends_the_request_without_an_answer(client: Client) -> None:
    request = client.request("wait", name="cancel")
    client.call("started", name="cancel")
    client.cancel(request)
    client.cancel(12345)
    client.raw(b'{"method": "cancel"}\n{"method": "cancel", "params": {"id": []}}\n{"method": "unknown"}\n')
    assert client.call("cancelled", name="cancel")["result"] == {}  # and nothing came before


def test_a_closed_connection_ends_its_requests(client: Client, running: Daemon) -> None:
    with Client(running.socket) as leaving:
        leaving.request("wait", name="leave")
        client.call("started", name="leave")
    assert client.call("cancelled", name="leave")["result"] == {}


# ---- descriptors


def test_descriptors_come_with_their_message_and_the_daemon_keeps_none(client: Client) -> None:
    client.request("open", count=MAX_DESCRIPTORS)
    message, descriptors = client.receive()
    assert message["fds"] == len(descriptors) == MAX_DESCRIPTORS
    assert not any(os.get_inheritable(descriptor) for descriptor in descriptors)
    for descriptor in descriptors:
        os.close(descriptor)


def test_too_many_descriptors_in_a_reply_are_the_daemons_fault(client: Client) -> None:
    assert name_of(client.call("open", count=MAX_DESCRIPTORS + 1)) == "internal"
    assert name_of(client.call("open_and_fail", count=3)) == "internal"


def test_descriptors_for_a_caller_that_has_left(client: Client, running: Daemon) -> None:
    for _ in range(20):
        with Client(running.socket) as leaving:
            leaving.request("open", count=8)


@pytest.mark.parametrize(("declared", "sent"), [(0, 1), (1, 2), (2, 1), (MAX_DESCRIPTORS + 1, 3), (0, MAX_DESCRIPTORS + 1), (5, 200)])
def test_descriptors_that_do_not_add_up_end_the_connection(client: Client, running: Daemon, declared: int, sent: int) -> None:
    with Client(running.socket) as wrong, open("/dev/null", "rb") as file:
        message = {"id": 9, "method": "echo", "params": {"text": "x"}, "fds": declared}
        wrong.raw(json.dumps(message).encode() + b"\n", [file.fileno()] * sent)
        assert wrong.refusal() == "invalid_request"
        assert wrong.is_closed()


def test_a_verb_that_takes_no_descriptors(client: Client) -> None:
    with open("/dev/null", "rb") as file:
        client.request("echo", [file.fileno()], text="x")
    assert client.refusal() == "invalid_params"


@pytest.mark.parametrize(("method", "count"), [("large", 0), ("large_open", 1)])
def test_a_large_result_travels_in_a_file(client: Client, method: str, count: int) -> None:
    client.request(method, count=MAX_MESSAGE_BYTES)
    message, descriptors = client.receive()
    assert message["result"] == {"in_fd": True} and len(descriptors) == 1 + count
    with open(descriptors[0], "rb") as file:
        assert json.load(file) == {"text": "x" * MAX_MESSAGE_BYTES}
    for descriptor in descriptors[1:]:
        os.close(descriptor)


# ---- clients that do not behave


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "parse_error"),
        (b"\xff\xfe\n", "parse_error"),
        (b'{"id": 1, "method": "echo"\0}\n', "parse_error"),
        (b"x" * (MAX_MESSAGE_BYTES + 1), "invalid_request"),
        (b"[]\n", "invalid_request"),
    ],
)
def test_what_is_no_message_is_answered_and_ends_the_connection(client: Client, running: Daemon, data: bytes, name: str) -> None:
    with Client(running.socket) as wrong:
        try:
            wrong.raw(data)
        except BrokenPipeError:  # the daemon had read enough
            pass
        assert wrong.refusal() == name
        assert wrong.is_closed()


def test_json_that_is_no_request_is_answered(client: Client) -> None:
    client.raw(b'{"id": 1.5, "method": "echo"}\n{"jsonrpc": "1.0", "method": "echo"}\n{"id": 1, "result": {}}\n')
    assert [client.refusal() for _ in range(3)] == ["invalid_request"] * 3


def test_malformed_messages_and_descriptor_floods(client: Client, running: Daemon) -> None:
    chance = random.Random(20)
    good = json.dumps({"jsonrpc": "2.0", "id": 1, "method": "echo", "params": {"text": "x", "words": ["é", "\n"]}, "fds": 0}).encode()
    before = running.memory_bytes()
    wrong = Client(running.socket)
    with open("/dev/null", "rb") as file:
        for _ in range(2_500):
            data = bytearray(good)
            for _ in range(chance.randint(0, 3)):
                place = chance.randrange(len(data))
                data[place : place + chance.randint(0, 4)] = chance.randbytes(chance.randint(0, 4))
            try:
                wrong.raw(bytes(data) + b"\n", [file.fileno()] * chance.choice((0, 0, 0, 0, 0, 1, 3, 64, 90)))
            except OSError:  # closed already, for what came before
                wrong.close()
                wrong = Client(running.socket)
    wrong.close()
    assert client.call("echo", text="alive")["result"]["text"] == "alive"
    assert running.memory_bytes() - before < 16 << 20


def ask_for_ever(client: Client, method: str, count: int) -> None:
    while True:
        client.request(method, count=count)


def test_a_client_that_does_not_read_is_cut_off(client: Client, running: Daemon) -> None:
    with Client(running.socket) as deaf, pytest.raises((BrokenPipeError, ConnectionResetError)):
        ask_for_ever(deaf, "large", MAX_MESSAGE_BYTES // 2)
    assert "reads no replies" in running.log.read_text()


def test_a_client_that_does_not_read_does_not_hoard_descriptors(client: Client, running: Daemon) -> None:
    with Client(running.socket) as deaf, pytest.raises((BrokenPipeError, ConnectionResetError)):
        ask_for_ever(deaf, "open", MAX_DESCRIPTORS)


def test_a_slow_reader_gets_only_the_latest_progress_and_every_reply(client: Client) -> None:
    count = 20_000
    request = client.request("news", count=count)
    progress, last = 0, {}
    while (last := client.receive().message).get("id") != request:
        assert last["method"] == "progress" and last["params"]["id"] == request
        progress += 1
    assert last["result"] == {} and 0 < progress < count  # the rest was never queued


def test_progress_reaches_who_reads(client: Client) -> None:
    request = client.request("news", count=3)
    seen = [client.receive().message for _ in range(4)]
    assert [message["params"]["done_bytes"] for message in seen[:3]] == [0, 1, 2] and seen[3]["id"] == request


# ---- many of them


def test_200_clients_at_once(client: Client, running: Daemon) -> None:
    failures: list[BaseException] = []

    def ask(number: int) -> None:
        try:
            with Client(running.socket) as one:
                for turn in range(5):
                    assert one.call("echo", text=f"{number} {turn}")["result"]["text"] == f"{number} {turn}"
                    assert one.call("open", count=2)["fds"] == 2
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(200)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_one_connection_too_many_is_told_so() -> None:
    with daemon("--max-connections", "2") as small, Client(small.socket) as first, Client(small.socket) as second:
        with Client(small.socket, hello=False) as third:
            assert third.refusal() == "too_many" and third.is_closed()
        assert first.call("traffic")["result"]["refused"] == 1
        second.close()
        while first.call("traffic")["result"]["connections"] > 1:
            pass
        with Client(small.socket) as fourth:
            assert fourth.call("echo", text="x")["result"]["text"] == "x"


def test_out_of_descriptors_is_waited_out() -> None:
    with daemon() as short, Client(short.socket) as client:
        taken = set(map(int, os.listdir(f"/proc/{short.process.pid}/fd")))
        soft, hard = resource.prlimit(short.process.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(short.process.pid, resource.RLIMIT_NOFILE, (next(n for n in range(1 << 20) if n not in taken), hard))
        with Client(short.socket, hello=False) as waiting:
            while "no connection can be accepted" not in short.log.read_text():
                assert client.call("echo", text="x")["result"]["text"] == "x"
            resource.prlimit(short.process.pid, resource.RLIMIT_NOFILE, (soft, hard))
            assert waiting.call("hello", protocol=1)["result"]["protocol"] == PROTOCOL_VERSION


def test_no_room_for_passed_descriptors_ends_that_connection_only() -> None:
    with daemon() as short, Client(short.socket) as client, Client(short.socket) as wrong, open("/dev/null", "rb") as file:
        taken = set(map(int, os.listdir(f"/proc/{short.process.pid}/fd")))
        _, hard = resource.prlimit(short.process.pid, resource.RLIMIT_NOFILE)
        resource.prlimit(short.process.pid, resource.RLIMIT_NOFILE, (max(taken) + 3, hard))
        wrong.request("echo", [file.fileno()] * MAX_DESCRIPTORS, text="x")
        assert wrong.refusal() == "invalid_request" and wrong.is_closed()
        while client.call("traffic")["result"]["connections"] > 1:
            pass
        assert short.descriptors() == len(taken) - 1
