"""The `modelcache` command: what can be asked, and how it ends. The commands themselves are imported when one is asked for.

Data goes to stdout, words to stderr; `--json` prints the same data as one document, an error included. Every way to end has
an exit code of its own, listed in EPILOG.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any, Callable, List, NoReturn, Optional, Sequence, Tuple

from . import __version__
from .cli_show import BROKEN_PIPE, INTERRUPTED, TERMINATED, USAGE, Show

EPILOG = """\
exit codes:
  0    done
  1    failed
  2    wrong usage
  3    not found: repo, revision, file, or nothing of it on this node
  4    not permitted: gated, token refused, or this user may not
  5    no daemon
  6    no space
  7    the hub can't be reached
  8    damaged: verify found some, or the hub's bytes are not what their name says
  130  interrupted (Ctrl-C)
  exec ends with the command's own code, 128+N when signal N ended it, 127 when it is not there, 126 when it can't be run
"""
ENVIRONMENT = """\
environment: MODELCACHE_SOCKET (the daemon's socket), HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE, and where huggingface_hub keeps its token
"""
REPO_HELP = "org/name, datasets/org/name or spaces/org/name"

_Command = Callable[[argparse.Namespace, Show], int]


def main(words: Optional[Sequence[str]] = None) -> int:
    """Runs the command; the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a name that this terminal can't show must not end the command
            stream.reconfigure(errors="backslashreplace")
    show = Show(as_json=False, is_quiet=False)
    try:
        head, program = _split(list(sys.argv[1:] if words is None else words))
        asked = _parser().parse_args(head)
        asked.program = program
        show = Show(as_json=asked.json, is_quiet=asked.quiet)
        _end_on_sigterm()
        command: _Command = asked.run
        code = command(asked, show)
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


class _Parser(argparse.ArgumentParser):
    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, "%s: error: %s\nhint: %s --help\n" % (self.prog, message, self.prog))


def _split(words: List[str]) -> Tuple[List[str], List[str]]:
    """What is ours, and what follows `exec ... --`, which is read by nobody here."""
    if "--" in words and "exec" in words[: words.index("--")]:
        at = words.index("--")
        return words[:at], words[at + 1 :]
    return words, []


def _parser() -> argparse.ArgumentParser:
    top = _Parser(
        prog="modelcache",
        description="Models and datasets of the Hugging Face Hub from this node's shared cache",
        epilog=EPILOG + "\n" + ENVIRONMENT,
    )
    top.set_defaults(json=False, quiet=False, socket=None)
    everywhere = _everywhere()
    _add_everywhere(top)
    top.add_argument("--version", action="version", version="modelcache %s" % __version__)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run: _Command, words: str, usage: Optional[str] = None) -> argparse.ArgumentParser:
        command: argparse.ArgumentParser = commands.add_parser(
            name, help=words, description=words[0].upper() + words[1:], epilog=EPILOG, parents=[everywhere], usage=usage
        )
        command.set_defaults(run=run)
        return command

    pull = add("pull", _pull, "fetch a repo, and print the path of its files")
    pull.add_argument("repo", metavar="REPO[@REV]", help=REPO_HELP + "; REV is a branch, a tag, refs/pr/1 or a commit (default: main)")
    pull.add_argument("--revision", metavar="REV", help="the same as @REV")
    _add_selection(pull)
    pull.add_argument("--to", metavar="DIR", help="put private, writable copies into DIR (default: the shared, read-only files)")
    pull.add_argument("--force", action="store_true", help="ask the hub now, re-hash what is here, fetch again what fails")
    pull.add_argument("--dry-run", action="store_true", help="list the files and what would be fetched, and fetch nothing")

    listing = add("ls", _ls, "list what is on this node")
    listing.add_argument("repo", metavar="REPO", nargs="?", help="only this repo, with paths")

    remove = add("rm", _rm, "remove a repo, or one revision of it, from this node")
    remove.add_argument("repo", metavar="REPO[@REV]", help=REPO_HELP)
    remove.add_argument("--revision", metavar="REV", help="the same as @REV (default: all of them)")
    _add_type(remove)

    add("status", _status, "show how the daemon is doing")

    verify = add("verify", _verify, "hash what is on this node again; what is damaged is fetched again when next asked for")
    verify.add_argument("repo", metavar="REPO", nargs="?", help="only this repo (default: everything)")
    _add_type(verify)

    execute = add(
        "exec",
        _exec,
        "run a command that finds these repos, and only these, in its huggingface_hub cache",
        "modelcache exec [options] REPO[@REV] ... -- COMMAND ...",
    )
    execute.add_argument("repos", metavar="REPO[@REV]", nargs="+", help=REPO_HELP + "; the files stay while the command runs")
    _add_selection(execute)

    doctor = add("doctor", _doctor, "find out what keeps this from working, or what a path is")
    doctor.add_argument("path", metavar="PATH", nargs="?", help="tell what this is, who may write there, and how to get your own files")

    add("version", _version, "print the version")
    return top


def _everywhere() -> _Parser:
    """Options that may stand before and behind the command."""
    common = _Parser(add_help=False)
    _add_everywhere(common)
    return common


def _add_everywhere(parser: argparse.ArgumentParser) -> None:
    suppress = argparse.SUPPRESS  # a default of the command would win over what stands before it
    parser.add_argument("--json", action="store_true", default=suppress, help="print one JSON document")
    parser.add_argument(
        "--socket", metavar="PATH", default=suppress, help="the daemon's socket (else MODELCACHE_SOCKET's, the node's, yours)"
    )
    parser.add_argument("-q", "--quiet", action="store_true", default=suppress, help="no progress and no remarks")


def _add_selection(parser: argparse.ArgumentParser) -> None:
    _add_type(parser)
    parser.add_argument("--include", metavar="GLOB", action="append", help="only files whose path matches; may be given again")
    parser.add_argument("--exclude", metavar="GLOB", action="append", help="no files whose path matches; may be given again")
    parser.add_argument("--token", help="for private and gated repos; others can see it in ps, better set HF_TOKEN (default: yours)")
    parser.add_argument("--offline", action="store_true", help="ask no hub, as HF_HUB_OFFLINE=1")


def _add_type(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repo-type", choices=("model", "dataset", "space"), help="of REPO, when it does not say (default: model)")


def _end_on_sigterm() -> None:
    """SIGTERM is an ordinary exit: what was begun is undone."""
    import signal

    def end(*_: Any) -> NoReturn:
        raise SystemExit(TERMINATED)

    signal.signal(signal.SIGTERM, end)


# ---- one line each, so that the others are not imported


def _pull(asked: argparse.Namespace, show: Show) -> int:
    from .cli_pull import pull

    return pull(asked, show)


def _ls(asked: argparse.Namespace, show: Show) -> int:
    from .cli_repos import ls

    return ls(asked, show)


def _rm(asked: argparse.Namespace, show: Show) -> int:
    from .cli_repos import rm

    return rm(asked, show)


def _verify(asked: argparse.Namespace, show: Show) -> int:
    from .cli_repos import verify

    return verify(asked, show)


def _status(asked: argparse.Namespace, show: Show) -> int:
    from .cli_daemon import status

    return status(asked, show)


def _exec(asked: argparse.Namespace, show: Show) -> int:
    from .cli_exec import execute

    return execute(asked, show)


def _doctor(asked: argparse.Namespace, show: Show) -> int:
    if asked.path is not None:
        from .cli_path import explain

        return explain(asked, show)
    from .cli_doctor import examine

    return examine(asked, show)


def _version(asked: argparse.Namespace, show: Show) -> int:
    from .cli_daemon import version

    return version(show)
