"""What a command says: data to stdout, words to stderr, progress to a terminal; and the code it ends with.

`rich` draws tables and bars where it is installed and somebody looks; without it the same words come as plain lines.
"""

from __future__ import annotations

import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Dict, Iterable, Iterator, List, Optional, Sequence

if TYPE_CHECKING:
    from . import progress
    from .protocol import Progress

OK, FAILED, USAGE, NOT_FOUND, NOT_PERMITTED, NO_DAEMON, NO_SPACE, AWAY, DAMAGED, PENDING = range(10)  # explained in cli_words.EPILOG
CANNOT_RUN, NO_SUCH_COMMAND, BY_SIGNAL = 126, 127, 128
INTERRUPTED, BROKEN_PIPE, TERMINATED = BY_SIGNAL + 2, BY_SIGNAL + 13, BY_SIGNAL + 15

_CODES = {
    "repo_not_found": NOT_FOUND,
    "revision_not_found": NOT_FOUND,
    "entry_not_found": NOT_FOUND,
    "local_entry_not_found": NOT_FOUND,
    "incomplete_snapshot": NOT_FOUND,
    "reference_not_found": NOT_FOUND,
    "store_missing_bucket": NOT_FOUND,
    "gated_repo": NOT_PERMITTED,
    "token_refused": NOT_PERMITTED,
    "token_not_found": NOT_PERMITTED,
    "not_permitted": NOT_PERMITTED,
    "store_denied": NOT_PERMITTED,
    "shutting_down": NO_DAEMON,
    "no_space": NO_SPACE,
    "store_full": NO_SPACE,
    "hub_unavailable": AWAY,
    "store_unavailable": AWAY,
    "store_slow": AWAY,
    "content_mismatch": DAMAGED,
    "store_mismatch": DAMAGED,
    "missing_object": DAMAGED,  # what a reference names
    "saves_pending": PENDING,
    "not_saveable": FAILED,
    "incompatible_reference": FAILED,
    "repo_id_invalid": USAGE,
    "invalid_params": USAGE,
    "endpoint_not_allowed": USAGE,
}
_REDRAW_SECONDS = 0.1
_SHOWN_AFTER_SECONDS = 0.2  # what is over sooner is not worth a line


class UsageError(ValueError):
    """Words that make no sense together; found after they were parsed."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class Show:
    def __init__(self, as_json: bool, is_quiet: bool) -> None:
        self.as_json = as_json
        self._is_quiet = is_quiet

    def data(self, document: Any, lines: Iterable[str]) -> None:
        """The answer: `document` with --json, else the lines."""
        if self.as_json:
            self.json(document)
        else:
            for line in lines:
                print(line)

    def json(self, document: Any) -> None:
        import json

        print(json.dumps(document, indent=2))

    def table(self, document: Any, heads: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[str] = ()) -> None:
        """Like `data`, in columns; those of `numbers` are aligned to the right."""
        if self.as_json:
            self.json(document)
            return
        widths = [max(map(len, column)) for column in zip(heads, *rows)]
        if not (sys.stdout.isatty() and _draw_table(heads, rows, numbers, sum(widths) + 2 * len(widths))):
            for row in (heads, *rows):
                cells = [cell.rjust(width) if head in numbers else cell.ljust(width) for cell, width, head in zip(row, widths, heads)]
                print("  ".join(cells).rstrip())

    def word(self, text: str) -> None:
        """A remark."""
        if not self._is_quiet:
            print(text, file=sys.stderr)

    def warn(self, text: str) -> None:
        print("warning: %s" % text, file=sys.stderr)

    def fail(self, error: BaseException) -> int:
        """Says what went wrong and what to do; the exit code."""
        name = getattr(error, "name", "internal")
        message = _message_of(error).strip().rstrip(".")
        hint = getattr(error, "hint", "") or _hint_for(error)
        code = code_of(error)
        if self.as_json:
            said = {"name": type(error).__name__ if name == "internal" else name, "message": message, "hint": hint, "exit_code": code}
            self.json({"error": said})
        print("modelcache: error: %s" % message, file=sys.stderr)
        if hint:
            print("hint: %s" % hint, file=sys.stderr)
        return code

    @contextmanager
    def progress(self, label: str) -> Iterator[Optional[_Shown]]:
        """What to call with each Progress, or None when nobody looks."""
        from . import progress

        line = None if self._is_quiet else progress.reporter(label)
        reporter = None if line is None else _Shown(label, line)
        try:
            yield reporter
        finally:
            if reporter is not None:
                reporter.close(False)


def code_of(error: BaseException) -> int:
    import errno

    from .errors import DaemonConnectionError, DaemonNotAvailableError

    if isinstance(error, (DaemonNotAvailableError, DaemonConnectionError)):
        return NOT_PERMITTED if isinstance(error.__cause__, PermissionError) else NO_DAEMON
    name = getattr(error, "name", None)
    if isinstance(name, str) and name in _CODES:
        return _CODES[name]
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NO_SPACE
    if isinstance(error, PermissionError):
        return NOT_PERMITTED
    return USAGE if isinstance(error, ValueError) else FAILED


def size(size_bytes: float) -> str:
    from . import progress

    return progress.size(size_bytes)


def seconds(duration: float) -> str:
    """ "0.12 s", "12 s", "3 min", "5 h 7 min", "2 d 4 h"."""
    if duration < 100:
        return "%.*f s" % (0 if duration >= 10 else 1 if duration >= 1 else 2, duration)
    minutes = int(duration // 60)
    if minutes < 60:
        return "%d min" % minutes
    if minutes < 24 * 60:
        return "%d h %d min" % divmod(minutes, 60)
    return "%d d %d h" % divmod(minutes // 60, 24)


def count(number: int, noun: str) -> str:
    return "%d %s%s" % (number, noun, "" if number == 1 else "s")


def printable(name: str) -> str:
    """A file's name on one line, and without what a terminal would obey."""
    return name if name.isprintable() else ascii(name)[1:-1]


def _message_of(error: BaseException) -> str:
    message = getattr(error, "message", None)
    if isinstance(message, str):
        return message
    if isinstance(error, OSError) and error.strerror:
        return "%s: %s" % (error.filename, error.strerror) if error.filename else error.strerror
    return str(error) or type(error).__name__


def _hint_for(error: BaseException) -> str:
    """For what the system says itself."""
    if getattr(error, "message", None) is None and code_of(error) == NO_SPACE:
        return "free some space there, or name another folder"
    return ""


class _Shown:
    """One bar of `rich`, or the plain line; what it says is the same."""

    def __init__(self, label: str, line: progress.Reporter) -> None:
        self._label = label
        self._line = line
        self._next = time.monotonic() + _SHOWN_AFTER_SECONDS
        self._bar: Any = None
        self._has_rich = True

    def __call__(self, progress: Progress) -> None:
        if progress.message:
            progress = progress._replace(phase="%s: %s" % (progress.phase, progress.message), message="")
        now = time.monotonic()
        if not self._has_rich:
            self._line(progress)
        elif now >= self._next:
            self._next = now + _REDRAW_SECONDS
            self._draw(progress)

    def close(self, done: bool) -> None:
        self._line.close(done)
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _draw(self, shown: Progress) -> None:
        from .progress import one_line

        if self._bar is None:
            self._bar = _bar(self._label)
            if self._bar is None:
                self._has_rich = False
                return self._line(shown)
        words = one_line(self._label, shown)[len(self._label) + 1 :].strip()
        self._bar.update(0, completed=shown.done_bytes, total=shown.total_bytes or None, words=words, refresh=True)
        return None


def _bar(label: str) -> Any:
    try:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn
        from rich.table import Column
    except ImportError:
        return None
    name = Column(no_wrap=True, min_width=min(len(label), 40))  # long words behind it must not squeeze it away
    words = (
        TextColumn("{task.description}", markup=False, table_column=name),
        BarColumn(20),
        TextColumn("{task.fields[words]}", markup=False),
    )
    bar = Progress(*words, console=Console(stderr=True), transient=True, auto_refresh=False)
    bar.add_task(label, total=None, words="")
    bar.start()
    return bar


def _draw_table(heads: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[str], width: int) -> bool:
    """False when it can't be drawn: a table that is too wide would break paths, which then can't be copied."""
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        return False
    console = Console()
    if width > console.width:
        return False
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for head in heads:
        table.add_column(head, justify="right" if head in numbers else "left")
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)
    return True


def plain(fields: Any, *left_out: str) -> Dict[str, Any]:
    """A NamedTuple of the wire as JSON has it."""
    return {name: value for name, value in fields._asdict().items() if name not in left_out}


def columns(pairs: Sequence[Sequence[str]]) -> List[str]:
    """Names and what they are, one a line."""
    width = max(len(pair[0]) for pair in pairs)
    return ["%s  %s" % (name.ljust(width), value) for name, value in pairs]
