"""`modelcache exec`: a program that looks into huggingface_hub's cache finds the named repos there, and asks no hub.

The cache is a folder of this run's own below the user's runtime folder: links to leased views, and what huggingface_hub needs
to tell a whole snapshot from a part of one.

Invariants:
- The command inherits the leases and the lock on the folder, so the files stay as long as it or a descendant lives, even when
  this process is killed. What a killed one leaves behind is removed by the next run that finds its lock free.
- A folder has its name only once it is locked: nobody takes a new one for a dead one's.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import shutil
import sys
from contextlib import contextmanager
from typing import Any, Dict, Iterator, List, Tuple

from . import cli_daemon, cli_run, hfcache, hub, runtime
from .cli_pull import NOT_SHOWN, fetch, request_for
from .cli_repos import named
from .cli_show import Show, UsageError, plain
from .client import Client


def execute(asked: argparse.Namespace, show: Show) -> int:
    if not asked.program:
        raise UsageError("no command to run", "it follows --, as in: modelcache exec %s -- python train.py" % asked.repos[0])
    connected = cli_daemon.client(asked, show)
    with _cache_folder() as (cache, lock):
        prepared = _fill(cache, asked, connected, show)
        connected.close()  # a private daemon may rest while the command runs; the leases don't need it
        if show.as_json:
            sys.stdout.flush()
            _say_json({"HF_HUB_CACHE": cache, "repos": prepared})
        environment = {**os.environ, "HF_HUB_CACHE": cache, "HF_HUB_OFFLINE": "1"}
        return cli_run.run(asked.program, environment, [lock, *connected.leases.descriptors()]).code


def _fill(cache: str, asked: argparse.Namespace, connected: Client, show: Show) -> List[Dict[str, Any]]:
    """Fetches the repos and shows them below `cache`."""
    prepared = []
    for wanted in [named(text, asked) for text in asked.repos]:  # all are read before the first is fetched
        request = request_for(wanted, asked, "modelcache exec %s" % os.path.basename(asked.program[0]))
        fetched = fetch(connected, wanted, request._replace(listing=True), show)
        reply = fetched.reply
        hfcache.link_snapshot(cache, wanted.repo_id, wanted.repo_type, [request.revision], reply.path, hub.listing_of(fetched))
        prepared.append({**wanted._asdict(), "revision": request.revision, **plain(reply, *NOT_SHOWN)})
    return prepared


@contextmanager
def _cache_folder() -> Iterator[Tuple[str, int]]:
    """A new folder and the lock that says it is in use; removed at the end."""
    parent = os.path.join(runtime.make_folder(), "tmp")
    os.makedirs(parent, 0o700, exist_ok=True)
    _sweep(parent)
    name = "%d-%s" % (os.getpid(), os.urandom(6).hex())
    unlocked, path = os.path.join(parent, "new-" + name), os.path.join(parent, "exec-" + name)
    os.mkdir(unlocked, 0o700)
    try:
        lock = os.open(unlocked, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.rename(unlocked, path)
        yield path, lock
    finally:
        for folder in (unlocked, path):
            shutil.rmtree(folder, ignore_errors=True)


def _sweep(parent: str) -> None:
    """Removes what killed runs left behind."""
    for name in os.listdir(parent):
        path = os.path.join(parent, name)
        if name.startswith("exec-"):
            try:
                trial = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            except FileNotFoundError:  # another run was faster
                continue
            try:
                fcntl.flock(trial, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            except BlockingIOError:
                pass
            finally:
                os.close(trial)


def _say_json(document: Dict[str, Any]) -> None:
    """To stderr: stdout is the command's."""
    import json

    print(json.dumps(document), file=sys.stderr)
