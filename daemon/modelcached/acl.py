"""POSIX ACLs of one folder: an entry per accepted uid, written as the kernel's extended attribute.

Format (linux/posix_acl_xattr.h): little-endian version 2, then entries of tag, permissions, id.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterable
from pathlib import Path

_NAME = "system.posix_acl_access"
_USER_OBJ, _USER, _GROUP_OBJ, _MASK, _OTHER = 0x01, 0x02, 0x04, 0x10, 0x20
_NO_ID = 0xFFFFFFFF
_READ_AND_ENTER = 5


def grant(folder: Path, uids: Iterable[int]) -> bool:
    """Lets exactly these uids (and the owner) read and enter `folder`; False where the filesystem keeps no ACLs."""
    entries = [(_USER_OBJ, _READ_AND_ENTER, _NO_ID)]
    entries += [(_USER, _READ_AND_ENTER, uid) for uid in sorted(set(uids))]
    entries += [(_GROUP_OBJ, 0, _NO_ID), (_MASK, _READ_AND_ENTER, _NO_ID), (_OTHER, 0, _NO_ID)]
    packed = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)
    try:
        os.setxattr(folder, _NAME, packed)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.ENOSYS):
            return False
        raise
    return True


def granted(folder: Path) -> set[int]:
    """The uids with an entry of their own."""
    try:
        packed = os.getxattr(folder, _NAME)
    except OSError:
        return set()
    entries = struct.iter_unpack("<HHI", packed[4:])
    return {uid for tag, _, uid in entries if tag == _USER}
