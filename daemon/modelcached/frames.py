"""Bytes and descriptors in, messages out: the wire's bookkeeping, without any I/O.

Descriptors ride on the first byte of the message that declares them (`"fds": N`) and queue in order of arrival.
What is fed here is owned here: a descriptor leaves with its message or is closed, whatever goes wrong.
A `FrameError` means that this peer and we no longer agree where messages begin: the connection has to be closed.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable
from typing import Annotated, Any, Literal, NamedTuple

import msgspec

from modelcache.protocol import MAX_DESCRIPTORS, MAX_MESSAGE_BYTES

_Id = Annotated[int, msgspec.Meta(ge=0, le=1 << 53)] | Annotated[str, msgspec.Meta(max_length=128)]
RequestId = int | str


class Envelope(msgspec.Struct, gc=False):
    """What every message from a client has in common; `params` stays raw until the method is known."""

    method: Annotated[str, msgspec.Meta(max_length=64)]
    id: _Id | None = None  # None: a notification
    params: msgspec.Raw = msgspec.Raw(b"{}")
    fds: Annotated[int, msgspec.Meta(ge=0, le=MAX_DESCRIPTORS)] = 0
    jsonrpc: Literal["2.0"] = "2.0"


class _Descriptors(msgspec.Struct, gc=False):
    """What has to be known even of a message that is no request: how many descriptors are its own."""

    fds: Annotated[int, msgspec.Meta(ge=0, le=MAX_DESCRIPTORS)] = 0


class Message(NamedTuple):
    envelope: Envelope | None  # None: JSON, but no request; `problem` says why
    descriptors: tuple[int, ...] = ()  # whoever takes the message owns them
    problem: str = ""


class FrameError(Exception):
    """`name` is the wire's name of the condition."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(message)
        self.name = name
        self.message = message


_envelope = msgspec.json.Decoder(Envelope)
_descriptors = msgspec.json.Decoder(_Descriptors)
_encoder = msgspec.json.Encoder()


class Frames:
    """One direction of one connection."""

    def __init__(self) -> None:
        self._partial = bytearray()  # a line without its end yet; at most MAX_MESSAGE_BYTES
        self._descriptors: deque[int] = deque()  # received, not yet taken by a message
        self._failed = False

    def feed(self, data: bytes, descriptors: Iterable[int] = ()) -> list[Message]:
        """The messages that are complete now. On FrameError everything still owned is closed, the messages before it included."""
        self._descriptors.extend(descriptors)
        messages: list[Message] = []
        try:
            if self._failed:
                raise FrameError("invalid_request", "this connection is broken already")
            for line in self._lines(data):
                messages.append(self._message(line))
            if len(self._descriptors) > (MAX_DESCRIPTORS if self._partial else 0):
                raise FrameError("invalid_request", f"{len(self._descriptors)} descriptors arrived that no message declares")
        except FrameError:
            for message in messages:
                close_all(message.descriptors)
            self.close()
            raise
        return messages

    def close(self) -> None:
        """Closes what is still owned. Idempotent."""
        self._failed = True
        self._partial.clear()
        close_all(self._descriptors)
        self._descriptors.clear()

    def _lines(self, data: bytes) -> list[bytes]:
        lines = data.split(b"\n")
        rest = lines.pop()
        if self._partial and lines:
            lines[0] = bytes(self._partial) + lines[0]
            self._partial.clear()
        self._partial += rest
        if len(self._partial) >= MAX_MESSAGE_BYTES or any(len(line) >= MAX_MESSAGE_BYTES for line in lines):
            raise FrameError("invalid_request", f"a message has at most {MAX_MESSAGE_BYTES} bytes")
        return lines

    def _message(self, line: bytes) -> Message:
        problem = ""
        envelope: Envelope | None = None
        try:
            text = line.decode()  # what a decoder skips over it does not check
            if "\0" in text:
                raise FrameError("parse_error", "a message contains NUL")
            try:
                envelope = _envelope.decode(text)
                count = envelope.fds
            except msgspec.ValidationError as error:
                problem, count = str(error), _descriptors.decode(text).fds
        except UnicodeDecodeError:
            raise FrameError("parse_error", "a message is not UTF-8") from None
        except msgspec.ValidationError as error:
            raise FrameError("invalid_request", str(error)) from None
        except (msgspec.DecodeError, RecursionError) as error:
            raise FrameError("parse_error", f"a message is not JSON: {error}") from None
        if count > len(self._descriptors):
            raise FrameError("invalid_request", f"a message declares {count} descriptors, {len(self._descriptors)} came with it")
        return Message(envelope, tuple(self._descriptors.popleft() for _ in range(count)), problem)

    def __repr__(self) -> str:
        return f"<Frames partial={len(self._partial)} descriptors={len(self._descriptors)}>"


def encode(message: dict[str, Any]) -> bytes:
    """One message as one line."""
    return _encoder.encode(message) + b"\n"


def close_all(descriptors: Iterable[int]) -> None:
    for descriptor in descriptors:
        try:
            os.close(descriptor)
        except OSError:  # the kernel has let go of it all the same
            pass
