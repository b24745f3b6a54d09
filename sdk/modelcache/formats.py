"""Whether a file is whole, as far as its format tells: cheap looks at its head and its end. Nothing is unpickled.

Size alone tells nothing: safetensors and others make the file full-size first and write afterwards. No lock is tried: a trainer
that opens its file in that moment would fail.
"""

from __future__ import annotations

import json
import os
import struct
import zipfile
from typing import Any, Callable, Dict, Optional

_MAX_HEADER = 100 << 20  # of safetensors, by its own definition
_MAX_JSON = 64 << 20
_HDF5 = b"\x89HDF\r\n\x1a\n"
_ZIP = b"PK\x03\x04"


def problem(descriptor: int, name: str) -> str:
    """Why the file can't be whole; "" if nothing speaks against it."""
    suffix = name.rpartition(".")[2].lower() if "." in name else ""
    check = _CHECKS.get(suffix)
    try:
        return check(descriptor, os.fstat(descriptor).st_size) if check else ""
    except (OSError, ValueError, KeyError, TypeError, IndexError, OverflowError, RecursionError, struct.error) as error:
        return "can't be read as .%s: %s" % (suffix, error)


def read_json(descriptor: int) -> Any:
    """The whole file as JSON. ValueError for what is none, or is too large."""
    size = os.fstat(descriptor).st_size
    if size > _MAX_JSON:
        raise ValueError("too large for JSON that a trainer writes")
    return json.loads(_read(descriptor, 0, size).decode())


def _json(descriptor: int, size: int) -> str:
    if size > _MAX_JSON:
        return ""
    read_json(descriptor)
    return ""


def _safetensors(descriptor: int, size: int) -> str:
    if size < 10:
        return "is too short"
    (length,) = struct.unpack("<Q", _read(descriptor, 0, 8))
    if not 2 <= length <= min(_MAX_HEADER, size - 8):
        return "has no header yet"
    header = json.loads(_read(descriptor, 8, length).decode())
    if not isinstance(header, dict):
        return "has no header yet"
    ends = [each["data_offsets"][1] for name, each in header.items() if name != "__metadata__"]
    expected = 8 + length + max(ends, default=0)
    return "" if expected == size else "has %d bytes, its header says %d" % (size, expected)


def _archive(descriptor: int, size: int) -> str:
    """torch.save's archives, and .keras: zip. What torch wrote before 1.6, and other tools' files with such names, are let through."""
    if not size:
        return "is empty"
    head = _read(descriptor, 0, 8)
    if head == b"\0" * len(head):
        return "begins with zeros"
    if head[: len(_HDF5)] == _HDF5:
        return _hdf5(descriptor, size)
    return _zip(descriptor, size) if head[:4] == _ZIP else ""


def _keras(descriptor: int, size: int) -> str:
    return _archive(descriptor, size) or ("" if _read(descriptor, 0, 4) == _ZIP else "is no zip")


def _zip(descriptor: int, size: int) -> str:
    with os.fdopen(os.dup(descriptor), "rb") as file:
        try:
            with zipfile.ZipFile(file) as archive:
                for member in archive.infolist():
                    if _read(descriptor, member.header_offset, 4) != _ZIP:
                        return "lacks its member %s" % member.filename
        except (zipfile.BadZipFile, RuntimeError) as error:
            return "is no whole zip: %s" % error
    return ""


def _hdf5(descriptor: int, size: int) -> str:
    head = _read(descriptor, 0, 96)
    if head[:8] != _HDF5:
        return "has no HDF5 signature"
    version = head[8]
    if version >= 2:
        width, flags, at = head[9], head[11] if version >= 3 else 0, 12 + 2 * head[9]
    else:
        width, flags, at = head[13], 0, 24 + (4 if version == 1 else 0) + 2 * head[13]
    if flags & 0b101:
        return "is marked as open for writing"
    end = int.from_bytes(head[at : at + width], "little")
    if end != size:
        return "has %d bytes, its header says %d" % (size, end)
    return ""


def _read(descriptor: int, offset: int, size: int) -> bytes:
    data = b""
    while len(data) < size:
        some = os.pread(descriptor, size - len(data), offset + len(data))
        if not some:
            raise ValueError("it ends early")
        data += some
    return data


_CHECKS: Dict[str, Optional[Callable[[int, int], str]]] = {
    "safetensors": _safetensors,
    "pt": _archive,
    "pth": _archive,
    "bin": _archive,
    "ckpt": _archive,
    "keras": _keras,
    "h5": _hdf5,
    "hdf5": _hdf5,
    "json": _json,
}
