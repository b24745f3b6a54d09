"""The `modelcache` command: what can be asked, and how it ends. The commands themselves are imported when one is asked for.

Data goes to stdout, words to stderr; `--json` prints the same data as one document, an error included. Every way to end has
an exit code of its own, listed in `cli_words.EPILOG`.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any, Callable, Dict, NoReturn, Optional, Sequence

from . import cli_words
from .cli_show import BROKEN_PIPE, INTERRUPTED, TERMINATED, Show

_Command = Callable[[argparse.Namespace, Show], int]


def main(words: Optional[Sequence[str]] = None) -> int:
    """Runs the command; the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a name that this terminal can't show must not end the command
            stream.reconfigure(errors="backslashreplace")
    show = Show(as_json=False, is_quiet=False)
    try:
        head, program = cli_words.split(list(sys.argv[1:] if words is None else words))
        asked = cli_words.parser().parse_args(head)
        asked.program = program
        show = Show(as_json=asked.json, is_quiet=asked.quiet)
        _end_on_sigterm()
        code = _COMMANDS[asked.command](asked, show)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # the reader has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python flushes at exit, and would complain
        return BROKEN_PIPE
    except KeyboardInterrupt:
        show.word("interrupted")
        return INTERRUPTED
    except (ValueError, OSError) as error:
        return show.fail(error)
    except Exception as error:
        from .errors import ModelcacheError

        if isinstance(error, ModelcacheError):
            return show.fail(error)
        raise


def _end_on_sigterm() -> None:
    """SIGTERM is an ordinary exit: what was begun is undone."""
    import signal

    def end(*_: Any) -> NoReturn:
        raise SystemExit(TERMINATED)

    if signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN:  # whoever started us wants it so
        signal.signal(signal.SIGTERM, end)


# ---- one line each, so that the others are not imported


def _pull(asked: argparse.Namespace, show: Show) -> int:
    from .cli_pull import pull

    return pull(asked, show)


def _save(asked: argparse.Namespace, show: Show) -> int:
    from .cli_save import save

    return save(asked, show)


def _load(asked: argparse.Namespace, show: Show) -> int:
    from .cli_store import load

    return load(asked, show)


def _flush(asked: argparse.Namespace, show: Show) -> int:
    from .cli_store import flush

    return flush(asked, show)


def _gc_store(asked: argparse.Namespace, show: Show) -> int:
    from .cli_store import gc_store

    return gc_store(asked, show)


def _ls(asked: argparse.Namespace, show: Show) -> int:
    if asked.store is None:
        from .cli_repos import ls
    else:
        from .cli_store import ls

    return ls(asked, show)


def _rm(asked: argparse.Namespace, show: Show) -> int:
    if asked.store is None:
        from .cli_repos import rm
    else:
        from .cli_store import rm

    return rm(asked, show)


def _verify(asked: argparse.Namespace, show: Show) -> int:
    from .cli_repos import verify

    return verify(asked, show)


def _room(name: str) -> _Command:
    def run(asked: argparse.Namespace, show: Show) -> int:
        from . import cli_room

        command: _Command = getattr(cli_room, name)
        return command(asked, show)

    return run


def _status(asked: argparse.Namespace, show: Show) -> int:
    from .cli_daemon import status

    return status(asked, show)


def _top(asked: argparse.Namespace, show: Show) -> int:
    from .cli_top import top

    return top(asked, show)


def _import(asked: argparse.Namespace, show: Show) -> int:
    from .cli_import import take_over

    return take_over(asked, show)


def _exec(asked: argparse.Namespace, show: Show) -> int:
    from .cli_exec import execute

    return execute(asked, show)


def _watch(asked: argparse.Namespace, show: Show) -> int:
    from .cli_watch import watch

    return watch(asked, show)


def _checkpoints(asked: argparse.Namespace, show: Show) -> int:
    from .cli_watch import checkpoints

    return checkpoints(asked, show)


def _doctor(asked: argparse.Namespace, show: Show) -> int:
    if asked.path is not None:
        from .cli_path import explain

        return explain(asked, show)
    from .cli_doctor import examine

    return examine(asked, show)


def _install(asked: argparse.Namespace, show: Show) -> int:
    from .cli_install import install

    return install(asked, show)


def _version(asked: argparse.Namespace, show: Show) -> int:
    from .cli_daemon import version

    return version(show)

_COMMANDS: Dict[str, _Command] = {
    "pull": _pull,
    "save": _save,
    "load": _load,
    "flush": _flush,
    "gc-store": _gc_store,
    "ls": _ls,
    "rm": _rm,
    "verify": _verify,
    "status": _status,
    "top": _top,
    "import": _import,
    "exec": _exec,
    "watch": _watch,
    "checkpoints": _checkpoints,
    "doctor": _doctor,
    "install": _install,
    "version": _version,
    "pin": _room("pin"),
    "unpin": _room("unpin"),
    "evict": _room("evict"),
    "explain": _room("explain"),
}
