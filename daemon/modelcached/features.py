"""What the root's filesystem can do beside holding files; tried out, for no table says it of every kernel and mount."""

from __future__ import annotations

import os

from . import acl, capture, durable
from .errors import DISK_FULL
from .filesystems import filesystem_type
from .layout import Layout


def features(layout: Layout) -> dict[str, str | bool]:
    """Its kind; whether copies can share blocks; whether a folder can be opened to one more user (blocks). A full disk tells only the
    first: the daemon has to start on it all the same, or nobody makes room."""
    folder = layout.fresh("features")
    try:
        folder.mkdir(mode=0o700)
        (folder / "one").write_bytes(bytes(4096))
        source = os.open(folder / "one", os.O_RDONLY | os.O_CLOEXEC)
        try:
            has_reflinks = capture.clone(source, 4096, folder / "two")
        finally:
            os.close(source)
        return {"filesystem": filesystem_type(layout.root), "reflinks": has_reflinks, "acls": acl.grant(folder, {os.geteuid()})}
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        return {"filesystem": filesystem_type(layout.root)}
    finally:
        if folder.exists():
            durable.remove_tree(folder)
