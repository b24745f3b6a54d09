"""What requests and replies look like: parameters in, results and errors out. No I/O but the file of an oversized result.

Parameters are read strictly against the NamedTuples of `modelcache.protocol`: unknown, missing and wrong ones are refused
by name. Results and errors fit into one line of the wire or travel in a file.
"""

from __future__ import annotations

import os
from typing import Any, get_type_hints

import msgspec

from modelcache.codes import ERROR_CODES
from modelcache.protocol import MAX_DESCRIPTORS, MAX_MESSAGE_BYTES

from .errors import InvalidRequest, ModelcachedError
from .frames import RequestId, close_all, encode
from .model import Reply


class RequestError(ModelcachedError):
    """An error of the wire itself, named when it is made."""

    def __init__(self, name: str, message: str, hint: str = "", **data: Any) -> None:
        super().__init__(message, hint, **data)
        self.name = name


class Verb:
    """Reads one method's parameters."""

    def __init__(self, name: str, params: Any) -> None:
        hints, defaults = get_type_hints(params), params._field_defaults
        fields: list[Any] = [(field, hints[field], *([defaults[field]] if field in defaults else [])) for field in params._fields]
        self._decoder = msgspec.json.Decoder(msgspec.defstruct(params.__name__, fields, forbid_unknown_fields=True))
        self._make = params._make
        self._name = name
        self._hint = f"{name} takes: {', '.join(params._fields)}" if params._fields else f"{name} takes no parameters"

    def read(self, raw: msgspec.Raw) -> Any:
        try:
            params = self._decoder.decode(raw)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise InvalidRequest(f"{self._name}: {error}", self._hint) from None
        values = msgspec.structs.astuple(params)
        if b"\\u0000" in bytes(raw) and _has_nul(values):  # as JSON spells it; the byte itself is none of JSON
            raise InvalidRequest(f"{self._name}: a parameter contains NUL", self._hint)
        return self._make(values)


def encode_error(request: RequestId | None, error: ModelcachedError) -> bytes:
    """The line for an error. One that can't be sent as it is loses its data, never its name."""
    code = ERROR_CODES.get(error.name, ERROR_CODES["internal"])
    body = {"code": code, "message": error.message, "data": {**error.data, "name": error.name, "hint": error.hint}}
    try:
        line = encode({"jsonrpc": "2.0", "id": request, "error": body})
    except (TypeError, ValueError):  # no JSON, or a file name that is no UTF-8
        line = b""
    if not 0 < len(line) <= MAX_MESSAGE_BYTES:
        message, hint = (text[:1000].encode(errors="backslashreplace").decode() for text in (error.message, error.hint))
        body = {"code": code, "message": message, "data": {"name": error.name, "hint": hint}}
        line = encode({"jsonrpc": "2.0", "id": request, "error": body})
    return line


def encode_reply(request: RequestId, reply: Reply) -> tuple[bytes, tuple[int, ...]]:
    """The line and its descriptors; a result too large for a line travels in a file of its own, as the first descriptor."""
    descriptors = reply.descriptors
    result = _plain(reply.result)
    fds = {"fds": len(descriptors)} if descriptors else {}
    line = encode({"jsonrpc": "2.0", "id": request, "result": result, **fds})
    if len(line) > MAX_MESSAGE_BYTES:
        descriptors = (_in_memory(msgspec.json.encode(result)), *descriptors)
        line = encode({"jsonrpc": "2.0", "id": request, "result": {"in_fd": True}, "fds": len(descriptors)})
    if len(descriptors) > MAX_DESCRIPTORS:
        close_all(descriptors[: len(descriptors) - len(reply.descriptors)])
        raise ValueError(f"{len(descriptors)} descriptors in one reply")
    return line, descriptors


def _in_memory(content: bytes) -> int:
    descriptor = os.memfd_create("modelcached-result", os.MFD_CLOEXEC)
    try:
        with os.fdopen(descriptor, "wb", closefd=False) as file:
            file.write(content)
        os.lseek(descriptor, 0, os.SEEK_SET)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _plain(value: Any) -> Any:
    """NamedTuples as objects, at any depth: msgspec would send them as arrays."""
    if isinstance(value, (str, int, float)) or value is None:
        return value
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if hasattr(value, "_asdict"):
        return {key: _plain(item) for key, item in value._asdict().items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _has_nul(value: Any) -> bool:
    return "\0" in value if isinstance(value, str) else isinstance(value, (list, tuple)) and any(map(_has_nul, value))
