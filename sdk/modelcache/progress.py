"""Shows how a fetch is getting on: on the caller's own bar (`tqdm_class`), else on one line of the terminal, else nowhere.

What is shown is this caller's share of what the node does, so a caller who joins late starts at what is there already.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from typing import Any, Callable, ContextManager, Iterator, Optional

from .protocol import Progress

OnProgress = Callable[[Progress], None]

_REDRAW_SECONDS = 0.1
_SHOWN_AFTER_SECONDS = 0.2  # what is over sooner is not worth a line
_LOGGED_SECONDS = 10.0  # between two lines in a log
_is_logged = False
_draw: Optional[Callable[[str], ContextManager[Optional[OnProgress]]]] = None


class Reporter:
    """Called with each Progress; `close` ends the line or the bar, `done=True` when everything is in place."""

    def __call__(self, progress: Progress) -> None: ...

    def close(self, done: bool) -> None: ...


def reporter(label: str, tqdm_class: Optional[Any] = None) -> Optional[Reporter]:
    """None when nobody wants to see anything."""
    if tqdm_class is not None:
        return Bar(label, tqdm_class)
    if _is_wanted():
        return Line(label)
    return Lines(label) if _is_logged and not sys.stderr.isatty() else None


class Bar(Reporter):
    """Drives a tqdm as huggingface_hub does: made with a total of 0 bytes, which grows as it becomes known."""

    def __init__(self, label: str, tqdm_class: Any) -> None:
        self._done_bytes = 0
        self._bar = tqdm_class(desc=label, total=0, initial=0, unit="B", unit_scale=True)

    def __call__(self, progress: Progress) -> None:
        if progress.total_bytes:
            self._bar.total = progress.total_bytes
        self._describe(note(progress))
        if progress.phase == "download" and progress.done_bytes != self._done_bytes:
            self._bar.update(progress.done_bytes - self._done_bytes)
            self._done_bytes = progress.done_bytes

    def close(self, done: bool) -> None:
        missing = (getattr(self._bar, "total", 0) or 0) - self._done_bytes
        if done and missing > 0:
            self._bar.update(missing)
        close = getattr(self._bar, "close", None)  # huggingface_hub's silent bar has none
        if close is not None:
            close()

    def _describe(self, text: str) -> None:
        describe = getattr(self._bar, "set_postfix_str", None)
        if describe is not None:
            describe(text, refresh=False)


class Line(Reporter):
    def __init__(self, label: str) -> None:
        self._label = label
        self._next = time.monotonic() + _SHOWN_AFTER_SECONDS
        self._is_shown = False

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        if now >= self._next:
            self._next = now + _REDRAW_SECONDS
            self._draw(one_line(self._label, progress))

    def close(self, done: bool) -> None:
        if self._is_shown:
            self._is_shown = False
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()

    def _draw(self, text: str) -> None:
        try:
            width = os.get_terminal_size(sys.stderr.fileno()).columns
        except (OSError, ValueError):
            width = 0
        sys.stderr.write("\r\x1b[K" + text[: (width or 80) - 1])
        sys.stderr.flush()
        self._is_shown = True


class Lines(Reporter):
    """For a log: a line now and then, none for what is over soon."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._next = time.monotonic() + _LOGGED_SECONDS

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        if now >= self._next:
            self._next = now + _LOGGED_SECONDS
            print("[modelcache] %s" % one_line(self._label, progress), file=sys.stderr, flush=True)

    def close(self, done: bool) -> None:
        pass


def draw_in_log() -> None:
    """From now on what takes long says so in the log, where there is no terminal: a task of a flow."""
    global _is_logged
    _is_logged = True


def draw_with(draw: Callable[[str], ContextManager[Optional[OnProgress]]]) -> None:
    """From now on `shown` is what `draw` makes of a label: the command line has bars of its own."""
    global _draw
    _draw = draw


@contextlib.contextmanager
def shown(label: str, tqdm_class: Optional[Any] = None) -> Iterator[Optional[OnProgress]]:
    """A reporter while the block runs; it tells how the block ended."""
    if _draw is not None and tqdm_class is None:
        with _draw(label) as drawn:
            yield drawn
        return
    made = reporter(label, tqdm_class)
    is_done = False
    try:
        yield made
        is_done = True
    finally:
        if made is not None:
            made.close(is_done)


def one_line(label: str, progress: Progress) -> str:
    """ "org/name: 45 %  1.2 GB of 2.7 GB  85.3 MB/s  from hub  12 of 20 files  3 wait"."""
    words = ["%s:" % label]
    if progress.total_bytes:
        words.append("%d %%  %s of %s" % (
            100 * progress.done_bytes // progress.total_bytes, size(progress.done_bytes), size(progress.total_bytes)
        ))  # fmt: skip
    if progress.rate:
        words.append("%s/s" % size(progress.rate))
    if progress.total_files:
        words.append("%d of %d %s" % (progress.done_files, progress.total_files, "saves" if _is_upload(progress) else "files"))
    words.append(note(progress))
    return "  ".join(word for word in words if word)


def note(progress: Progress) -> str:
    """What is going on, in words: the phase unless it is the download itself, the source, who else waits, why it pauses."""
    words = [] if progress.phase == "download" else [progress.phase]
    if progress.source:
        words.append("%s %s" % ("to" if _is_upload(progress) else "from", progress.source))
    if progress.waiters > 1:
        words.append("%d wait for it" % progress.waiters)
    if progress.message:
        words.append(progress.message)
    return "  ".join(words)


def _is_upload(progress: Progress) -> bool:
    """It counts saves, not files."""
    return progress.phase.partition(":")[0] == "upload"


def size(size_bytes: float) -> str:
    """Decimal units, as disks and the hub count: "1.2 GB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if size_bytes < 1000:
            return "%.*f %s" % (0 if unit == "B" else 1, size_bytes, unit)
        size_bytes /= 1000
    return "%.1f TB" % size_bytes


def _is_wanted() -> bool:
    from .tokens import is_true

    if is_true("HF_HUB_DISABLE_PROGRESS_BARS") or sys.stderr is None or not sys.stderr.isatty():
        return False
    theirs = sys.modules.get("huggingface_hub.utils.tqdm")  # disable_progress_bars() counts here too
    return not (theirs is not None and "HF_HUB_DISABLE_PROGRESS_BARS" not in os.environ and theirs.are_progress_bars_disabled())
