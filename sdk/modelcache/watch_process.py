"""A helper process that runs a watcher where the daemon can't: it has another uid than the trainer, so may not read its files.

    python -m modelcache.watch_process CONTROL PARENT      two inherited descriptors, see `watch_host`

It has a session of its own and no parent: what ends the trainer does not end it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys

from . import watch_host


def main() -> int:
    control, parent = (int(word) for word in sys.argv[1:])
    for descriptor in (control, parent):
        os.set_inheritable(descriptor, False)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # whoever started it may have blocked some
    if os.fork():
        return 0
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    host = watch_host.Host(socket.socket(fileno=control), parent, "helper %d" % os.getpid(), contextlib.nullcontext)
    signal.signal(signal.SIGTERM, lambda *_: host.end())
    host.serve()
    return 0


if __name__ == "__main__":
    sys.exit(main())
