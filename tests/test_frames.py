from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelcache.protocol import MAX_DESCRIPTORS, MAX_MESSAGE_BYTES
from modelcached.frames import FrameError, Frames, close_all, encode


def line(method: str = "m", **members: object) -> bytes:
    return encode({"jsonrpc": "2.0", "id": 1, "method": method, **members})


def opened(count: int) -> list[int]:
    return [os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC) for _ in range(count)]


@pytest.fixture(autouse=True)
def _no_descriptor_is_lost() -> Iterator[None]:
    before = set(os.listdir("/proc/self/fd"))
    yield
    assert set(os.listdir("/proc/self/fd")) == before


@given(st.lists(st.tuples(st.integers(0, 3), st.text(max_size=20)), max_size=8), st.randoms(use_true_random=False))
def test_messages_come_out_as_they_went_in_however_the_bytes_are_cut(sent: list[tuple[int, str]], cuts: random.Random) -> None:
    passed = opened(sum(count for count, _ in sent))
    frames, received, riding = Frames(), [], list(passed)
    try:
        for count, text in sent:
            data = line(params={"text": text}, fds=count)
            descriptors, riding = riding[:count], riding[count:]
            while data:  # descriptors arrive with the first byte
                size = cuts.randint(1, len(data))
                received += frames.feed(data[:size], descriptors)
                data, descriptors = data[size:], []
    finally:
        close_all(passed)
    assert [(len(m.descriptors), json.loads(bytes(m.envelope.params))["text"]) for m in received if m.envelope] == sent
    assert [descriptor for message in received for descriptor in message.descriptors] == passed  # in order of arrival


def test_messages_in_one_piece_share_out_what_came_with_it() -> None:
    descriptors = opened(3)
    first, second, third = Frames().feed(line(fds=1) + line() + line(fds=2), descriptors)
    assert (first.descriptors, second.descriptors, third.descriptors) == ((descriptors[0],), (), tuple(descriptors[1:]))
    close_all(descriptors)


@pytest.mark.parametrize(
    ("data", "count", "name"),
    [
        pytest.param(b"no\n", 0, "parse_error", id="no JSON"),
        pytest.param(b"\n", 0, "parse_error", id="empty"),
        pytest.param(b'{"method": "m", "x": "\xff"}\n', 0, "parse_error", id="no UTF-8, where nobody looks"),
        pytest.param(b'{"method": "m"}\0\n', 0, "parse_error", id="NUL"),
        pytest.param(b'{"x": "a\0b", "method": "m"}\n', 0, "parse_error", id="NUL in a text"),
        pytest.param(b"[" * 100_000 + b"\n", 0, "invalid_request", id="depth"),
        pytest.param(b'{"params":' * 10_000 + b"1" + b"}" * 10_000 + b"\n", 0, "parse_error", id="depth of params"),
        pytest.param(b"x" * MAX_MESSAGE_BYTES, 0, "invalid_request", id="too long, without an end"),
        pytest.param(line(params={"x": "x" * MAX_MESSAGE_BYTES}), 0, "invalid_request", id="too long"),
        pytest.param(line(fds=2), 1, "invalid_request", id="missing descriptors"),
        pytest.param(line(fds=1), 2, "invalid_request", id="left-over descriptors"),
        pytest.param(line(), 1, "invalid_request", id="undeclared descriptors"),
        pytest.param(line(fds=MAX_DESCRIPTORS + 1), 3, "invalid_request", id="too many declared"),
        pytest.param(line(fds=-1), 1, "invalid_request", id="fewer than none declared"),
        pytest.param(line(fds="1"), 1, "invalid_request", id="declared as a text"),
        pytest.param(line()[:-1], MAX_DESCRIPTORS + 1, "invalid_request", id="flood before the end of a line"),
    ],
)
def test_what_breaks_a_connection_closes_every_descriptor(data: bytes, count: int, name: str) -> None:
    frames = Frames()
    with pytest.raises(FrameError) as raised:
        frames.feed(data, opened(count))
    assert raised.value.name == name
    with pytest.raises(FrameError):
        frames.feed(line(fds=1), opened(1))


def test_good_messages_before_a_bad_one_lose_their_descriptors_too() -> None:
    with pytest.raises(FrameError):
        Frames().feed(line(fds=1) + b"no\n", opened(1))


@pytest.mark.parametrize(
    "members",
    [
        {"method": 1},
        {"id": 1.5},
        {"id": -1},
        {"id": True},
        {"id": [1]},
        {"id": "x" * 129},
        {"id": 1 << 60},
        {"jsonrpc": "1.0"},
        {"method": "m" * 65},
    ],
)
def test_json_that_is_no_request_keeps_the_connection_and_its_descriptors_apart(members: dict[str, object]) -> None:
    frames = Frames()
    bad, good = frames.feed(encode({"method": "m", "fds": 1, **members}) + line(), descriptors := opened(1))
    assert (bad.envelope, bad.descriptors, good.problem) == (None, tuple(descriptors), "") and bad.problem
    close_all(descriptors)


@pytest.mark.parametrize("data", [b"[]\n", b"1\n", b'"x"\n', b"null\n"])
def test_json_that_is_no_object(data: bytes) -> None:
    with pytest.raises(FrameError, match="object"):
        Frames().feed(data)


def test_the_longest_message() -> None:
    size = MAX_MESSAGE_BYTES - len(line(params={"x": ""}))
    (message,) = Frames().feed(longest := line(params={"x": "x" * size}))
    assert len(longest) == MAX_MESSAGE_BYTES and message.envelope is not None


def test_close_is_for_what_was_not_taken() -> None:
    frames = Frames()
    assert frames.feed(line(fds=1)[:-1], opened(1)) == []
    assert repr(frames).endswith("descriptors=1>")
    frames.close()
    frames.close()
