"""Watching a folder: what an unmodified trainer writes into it is kept, checkpoint by checkpoint, while this process goes on.

    with modelcache.watch("out", name="run-7", keep=3, resume=True):
        train()

The watching itself happens elsewhere (`watch_client`) and outlives this process. What happens here is what comes before and after:
the newest checkpoint is put back, and the end waits for the store.
"""

from __future__ import annotations

import atexit
import os
import signal
import threading
from typing import Any, Dict, List, Optional, Set, Union

from . import client, flushing, keys, layouts, resume, retention, scanning, units, views, watch_client
from .errors import ModelcacheError

Path = Union[str, "os.PathLike[str]"]

SIGNALLED_SECONDS = 30.0  # for the end of what was told to end
_NAMED = 5  # of what is not captured

_running: Set[Watching] = set()


def watch(
    directory: Path,
    name: Optional[str] = None,
    *,
    keep: Optional[int] = None,
    keep_best: Optional[str] = None,
    every: Optional[float] = None,
    layout: str = "auto",
    resume: bool = False,
    store: Optional[str] = None,
    flush_seconds: Optional[float] = None,
) -> Watching:
    """Keeps every checkpoint that appears in `directory`, as soon as it is complete, until `stop` or the end of a `with` block.

    Nothing is ever written into the folder while it is watched, and the trainer waits for nothing. When this process is killed,
    what was complete by then is kept all the same.

    Args:
        directory: what the trainer writes into; it is made if it is not there.
        name: the checkpoints' name: `latest(name)` is the newest. None is the name of the folder.
        keep: so many of the newest stay in the store, older ones are deleted there; never the newest that is sure to be complete.
            Files in `directory` are the trainer's own business.
        keep_best: the best one stays too: a number's name in its metadata, "eval_loss" or "accuracy:max". Without ":min" or ":max"
            less is better for names with loss, error or perplexity in them, else more. Without `keep` the best and the newest stay.
        every: seconds between two checkpoints that are kept, at least; None keeps all.
        layout: how the trainer writes them; "auto" knows many, see the table in docs/api.md. Or the path of a JSON file with rules.
        resume: first put the newest complete checkpoint of that name into `directory`, where the trainer's own resume finds it;
            nothing, if what is there is newer.
        store: as in `save`.
        flush_seconds: how long the end of the watch waits for the store; None is MODELCACHE_EXIT_FLUSH_SECONDS (300), and 30 when
            the block ends with KeyboardInterrupt or SystemExit.

    Raises:
        ValueError: an argument makes no sense. DaemonNotAvailableError, and with `resume` what `load` raises.
    """
    path = path_of(directory)
    called = name_of(path, name)
    ask = watch_client.Ask(path, called, keep, keep_best, every, layout, store)
    return begin(ask, _kept(called, store) if resume else None, flush_seconds)


def begin(ask: watch_client.Ask, listed: Optional[resume.Listed], flush_seconds: Optional[float] = None) -> Watching:
    """`watch` for callers that know what may be put back: `listed`, None for nothing."""
    thin = retention.Rule.parse(ask.keep, ask.keep_best)
    if ask.every is not None and not 0 <= ask.every < float("inf"):
        raise ValueError("every is a number of seconds, not %r" % (ask.every,))
    layouts.rules(ask.layout)
    restored = None if listed is None else resume.restore(ask.directory, listed, views.warn, ask.layout)
    os.makedirs(ask.directory, exist_ok=True)
    if restored is not None:
        ask = ask._replace(restored=(restored.unit, *restored.extras))
    client.shared().hello()  # a daemon that has to be started first inherits what this thread blocks
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # signals are for threads that know what to do with them
    try:
        running = watch_client.start(ask)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return Watching(running, ask, watch_client.series_of(ask), thin, restored, flush_seconds)


def path_of(directory: Path) -> str:
    return os.path.abspath(os.path.expanduser(os.fspath(directory)))


def name_of(path: str, name: Optional[str]) -> str:
    """What the checkpoints of a folder are called. ValueError for what can't be a part of a key."""
    return keys.check_name(keys.default_label(path) if name is None else name, "name")


class Watching:
    """A running watch. `directory`, `name`; `where` it runs; `restored`, the reference that was put back, or None."""

    def __init__(
        self,
        watch: watch_client.Watch,
        ask: watch_client.Ask,
        series: units.Series,
        thin: retention.Rule,
        restored: Optional[resume.Restored],
        flush_seconds: Optional[float],
    ) -> None:
        self.directory = ask.directory
        self.name = ask.name
        self.restored: Optional[Dict[str, Any]] = None if restored is None else restored.reference
        self._watch = watch
        self._series = series
        self._thin = thin
        self._flush_seconds = flush_seconds
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._last: Optional[watch_client.Status] = None
        _register(self)

    @property
    def where(self) -> str:
        """ "daemon", or "helper" and its pid: who looks at the folder."""
        return self._watch.where

    def descriptors(self) -> List[int]:
        """Whoever inherits these keeps the watch going when this process is killed."""
        return self._watch.descriptors()

    def status(self) -> watch_client.Status:
        """What was kept and skipped, and why; after `stop`, how it was then."""
        with self._lock:
            return self._watch.status() if self._last is None else self._last

    def stop(self, deadline: Optional[float] = None) -> watch_client.Status:
        """One last look: everything complete is kept and brought to the store, within `deadline` seconds (None: `flush_seconds`).

        Returns the status. `pending` in it has the keys that are on this node only, `unfinished` what is not captured yet; daemon and
        watcher go on with them.
        """
        with self._lock:
            if self._last is None:
                _running.discard(self)
                self._last = self._watch.stop(self._seconds(deadline))
                self._watch.close()
                self._delete()
            return self._last

    def close(self) -> None:
        """Lets go without waiting: the watch ends by itself when everything complete is kept."""
        _running.discard(self)
        self._watch.close()

    def __enter__(self) -> Watching:
        return self

    def __exit__(self, kind: Any, error: Any, _: Any) -> None:
        is_told = isinstance(error, (KeyboardInterrupt, SystemExit)) and self._flush_seconds is None
        try:
            status = self.stop(SIGNALLED_SECONDS if is_told else None)
        except ModelcacheError as failure:
            if kind is None:
                raise
            views.warn(str(failure))  # what ended the block is the one to be seen
            return
        for text in unfinished(status):
            views.warn(text)

    def _seconds(self, deadline: Optional[float]) -> float:
        chosen = self._flush_seconds if deadline is None else deadline
        return flushing.exit_seconds() if chosen is None else chosen

    def _delete(self) -> None:
        """The watcher does so after each capture; now that the store has the last one, once more."""
        try:
            retention.apply(self._series, self._thin)
        except ModelcacheError as error:
            views.warn("older checkpoints of %s stay in the store: %s" % (self.name, error))

    def __repr__(self) -> str:
        return "<Watching %s as %r by %s>" % (self.directory, self.name, self.where)


def uncaptured(status: watch_client.Status) -> List[str]:
    """What is to be said of a watch that ended before everything was captured."""
    if not status.unfinished:
        return []
    more = len(status.unfinished) - _NAMED
    named = ", ".join(map(scanning.shown, status.unfinished[:_NAMED])) + (" and %d more" % more if more > 0 else "")
    return ["not captured yet of %s: %s; the watcher (%s) goes on" % (status.name, named, status.where)]


def unfinished(status: watch_client.Status) -> List[str]:
    """The same, or before everything was in the store."""
    if not status.pending:
        return uncaptured(status)
    reason = ": " + status.last_error if status.last_error else ""
    kept = "%d checkpoint%s" % (len(status.pending), "" if len(status.pending) == 1 else "s")
    text = "%s of %s not in the store yet%s; safe on this node, and the daemon goes on" % (kept, status.name, reason)
    return [*uncaptured(status), text]


def _kept(name: str, store: Optional[str]) -> resume.Listed:
    return resume.listed_in(units.Series.of_name(name, store))


def _register(watching: Watching) -> None:
    if not _running:
        atexit.unregister(_end_all)
        atexit.register(_end_all)
    _running.add(watching)


def _end_all() -> None:
    """At exit. A node's daemon goes on without us; a private one may end with the job's container."""
    for watching in list(_running):
        if watching._pid != os.getpid():  # a forked child: its parent does it
            continue
        try:
            if client.shared().hello().private:
                for text in unfinished(watching.stop()):
                    views.warn(text)
            else:
                watching.close()
        except ModelcacheError as error:
            views.warn(str(error))
