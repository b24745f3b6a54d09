"""The words of the `modelcache` command: commands, options, help. Nothing else is imported for it."""

from __future__ import annotations

import argparse
from typing import Any, List, NoReturn, Optional, Tuple

from . import __version__
from .cli_show import USAGE

EPILOG = """\
exit codes:
  0    done
  1    failed
  2    wrong usage
  3    not found: repo, revision, file, key, bucket, or nothing of it on this node
  4    not permitted: gated, token refused, this user may not, or the store refuses the daemon
  5    no daemon
  6    no space: on this node, or in the store
  7    the hub or the store can't be reached
  8    damaged: verify or gc-store found some, or bytes from the hub or the store are missing or not what their name says
  9    not all saves are in the store yet
  130  interrupted (Ctrl-C)
  exec and watch end with the command's own code, 128+N when signal N ended it, 127 when it is not there, 126 when it can't be run; watch
  with 9 if that is 0 and the deadline has passed before everything was in the store
"""
ENVIRONMENT = """\
environment: MODELCACHE_SOCKET (the daemon's socket), HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE, and where huggingface_hub keeps its token
"""
KEY_HELP = "what save printed, or the URL in its reference"
STORE_HELP = "file:///path or s3://bucket/prefix, one of those the daemon serves (default: its own)"
REPO_HELP = "org/name, datasets/org/name or spaces/org/name"

_KINDS = ("model", "checkpoint")
_SECONDS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400}


class _Parser(argparse.ArgumentParser):
    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, "%s: error: %s\nhint: %s --help\n" % (self.prog, message, self.prog))


def split(words: List[str]) -> Tuple[List[str], List[str]]:
    """What is ours, and what follows `exec ... --` or `watch ... --`, which is read by nobody here."""
    if "--" in words and {"exec", "watch"}.intersection(words[: words.index("--")]):
        at = words.index("--")
        return words[:at], words[at + 1 :]
    return words, []


def parser() -> argparse.ArgumentParser:
    top = _Parser(
        prog="modelcache",
        description="Models and datasets of the Hugging Face Hub from this node's shared cache, and what tasks keep in the store",
        epilog=EPILOG + "\n" + ENVIRONMENT,
    )
    top.set_defaults(json=False, quiet=False, socket=None)
    everywhere = _everywhere()
    _add_everywhere(top)
    top.add_argument("--version", action="version", version="modelcache %s" % __version__)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, words: str, usage: Optional[str] = None) -> argparse.ArgumentParser:
        command: argparse.ArgumentParser = commands.add_parser(
            name, help=words, description=words[0].upper() + words[1:], epilog=EPILOG, parents=[everywhere], usage=usage
        )
        return command

    pull = add("pull", "fetch a repo, and print the path of its files")
    pull.add_argument("repo", metavar="REPO[@REV]", help=REPO_HELP + "; REV is a branch, a tag, refs/pr/1 or a commit (default: main)")
    pull.add_argument("--revision", metavar="REV", help="the same as @REV")
    _add_selection(pull)
    pull.add_argument("--to", metavar="DIR", help="put private, writable copies into DIR (default: the shared, read-only files)")
    pull.add_argument("--force", action="store_true", help="ask the hub now, re-hash what is here, fetch again what fails")
    pull.add_argument("--dry-run", action="store_true", help="list the files and what would be fetched, and fetch nothing")

    save = add("save", "keep a folder or a file, and print the key that loads it on any node")
    save.add_argument("path", metavar="PATH", help="what to keep; it may be changed or removed as soon as the command has ended")
    save.add_argument("--label", help="a part of a model's key (default: the name of PATH)")
    save.add_argument("--name", help="a checkpoint's name; ls --store --name finds it again (default: mfchckpt)")
    save.add_argument("--kind", choices=_KINDS, default=_KINDS[0], help="(default: %(default)s)")
    save.add_argument("--metadata", metavar="JSON", help="an object that the reference carries")
    save.add_argument("--format", choices=("files", "tar"), default="files", help="how it lies in the store (default: %(default)s)")
    save.add_argument("--durable", action="store_true", help="end only when a power cut can't take it either")
    save.add_argument("--flush", action="store_true", help="end only when the store has it")
    save.add_argument("--supersede", action="store_true", help="newer checkpoints of this name go to the store before older ones")
    save.add_argument("--follow-links", action="store_true", help="keep what links that lead out of PATH point to (default: an error)")
    save.add_argument("--store", metavar="URL", help=STORE_HELP)

    load = add("load", "bring what was saved, and print the path of its files")
    load.add_argument("key", metavar="KEY", help=KEY_HELP)
    load.add_argument("--to", metavar="DIR", help="put private, writable copies into DIR (default: the shared, read-only files)")
    load.add_argument("--store", metavar="URL", help=STORE_HELP)

    flush = add("flush", "wait until everything you saved on this node is in the store; what is not is listed")
    flush.add_argument(
        "--deadline", metavar="TIME", type=_duration, help="wait so long at most: 25s, 10m, 1h (default: as long as it takes)"
    )

    collect = add("gc-store", "delete from the store what nothing that was saved needs any more")
    collect.add_argument("--dry-run", action="store_true", help="list what would be deleted, and delete nothing")
    collect.add_argument("--alone", action="store_true", help="no other collection runs: say so where the store can't tell")
    collect.add_argument("--store", metavar="URL", help=STORE_HELP)

    listing = add(
        "ls", "list what is on this node, or with --store what was saved", "modelcache ls [options] [REPO | --store [URL] [PREFIX]]"
    )
    listing.add_argument("repo", metavar="REPO", nargs="?", help="only this repo, with paths; with --store: only keys that begin so")
    _add_in_store(listing)
    listing.add_argument("--kind", choices=_KINDS, help="with --store: only these")
    listing.add_argument("--name", help="with --store: only checkpoints of this name, and models of this label")

    remove = add(
        "rm", "remove a repo from this node, or with --store what was saved", "modelcache rm [options] REPO[@REV] | --store [URL] KEY"
    )
    remove.add_argument("repo", metavar="REPO[@REV]", nargs="?", help=REPO_HELP + "; with --store: " + KEY_HELP)
    _add_in_store(remove)
    remove.add_argument("--revision", metavar="REV", help="the same as @REV (default: all of them)")
    _add_type(remove)

    add("status", "show how the daemon is doing")

    live = add("top", "show what the daemon does now, again and again: fetches, saves on their way, who holds what")
    live.add_argument("--once", action="store_true", help="one round, and no more")
    live.add_argument("--interval", metavar="TIME", type=_duration, default=1.0, help="between two rounds (default: 1s)")

    pin = add("pin", "keep a repo, or what was saved, on this node", "modelcache pin [options] REPO[@REV] | KEY | --list")
    pin.add_argument("what", metavar="REPO[@REV]|KEY", nargs="?", help=REPO_HELP + "; or " + KEY_HELP)
    pin.add_argument("--list", action="store_true", help="list your pins (root: everybody's)")
    pin.add_argument("--name", help="of the pin (default: what is pinned); the same name again replaces it")
    pin.add_argument("--for", dest="duration", metavar="TIME", type=_duration, help="how long: 90m, 12h, 7d (default: until unpin)")
    _add_type(pin)

    unpin = add("unpin", "let go of what was pinned")
    unpin.add_argument("name", metavar="NAME", help="as pin --list shows it")

    evict = add("evict", "free room on this node now: what is not in use, and can be fetched again")
    evict.add_argument("--dry-run", action="store_true", help="list what would go, and remove nothing")
    evict.add_argument("--to", metavar="SIZE", type=_size, help="what the cache may have then: 0, 500MB, 1TiB (default: its low watermark)")

    explain = add("explain", "tell who holds something on this node, and what evicting it would free")
    explain.add_argument("what", metavar="REPO[@REV]|KEY|PATH", help=REPO_HELP + "; " + KEY_HELP + "; or a path that was handed out")
    _add_type(explain)

    importing = add("import", "take over what huggingface_hub's own cache has, without the network; nothing there is changed")
    importing.add_argument("directory", metavar="DIR", nargs="?", help="the cache (default: HF_HUB_CACHE, HF_HOME/hub, or yours)")
    importing.add_argument("--public", action="store_true", help="everybody on this node may have these repos, though no hub says so yet")

    verify = add("verify", "hash what is on this node again; what is damaged is fetched again when next asked for")
    verify.add_argument("repo", metavar="REPO", nargs="?", help="only this repo (default: everything)")
    _add_type(verify)

    execute = add(
        "exec",
        "run a command that finds these repos, and only these, in its huggingface_hub cache",
        "modelcache exec [options] REPO[@REV] ... -- COMMAND ...",
    )
    execute.add_argument("repos", metavar="REPO[@REV]", nargs="+", help=REPO_HELP + "; the files stay while the command runs")
    _add_selection(execute)

    watch = add(
        "watch",
        "keep the checkpoints that a trainer writes into a folder, while a command runs or until it is ended (Ctrl-C, SIGTERM)",
        "modelcache watch DIR [options] [-- COMMAND ...]",
    )
    watch.add_argument("directory", metavar="DIR", help="what the trainer writes into; made if it is not there, never written to")
    watch.add_argument("--name", help="the checkpoints' name: modelcache checkpoints NAME lists them (default: the name of DIR)")
    watch.add_argument("--keep", metavar="N", type=int, help="so many of the newest stay in the store (default: all); DIR is left alone")
    watch.add_argument("--keep-best", metavar="METRIC", help="the best one stays too: eval_loss, accuracy:max (less is better for losses)")
    watch.add_argument("--every", metavar="TIME", type=_duration, help="keep one in so long at most: 30s, 10m (default: each)")
    watch.add_argument("--layout", default="auto", help="how they are written: a name in docs/api.md, a JSON file (default: %(default)s)")
    watch.add_argument("--resume", action="store_true", help="first put the newest complete one back into DIR, if that has no newer one")
    watch.add_argument(
        "--deadline", metavar="TIME", type=_duration, help="wait so long for the store at the end (default: 30s after a signal, else 5m)"
    )
    watch.add_argument("--store", metavar="URL", help=STORE_HELP)

    checkpoints = add("checkpoints", "list the checkpoints of a name: step, time, size, and whether the store has them")
    checkpoints.add_argument("name", metavar="NAME", help="as given to watch, or to save --kind checkpoint --name")
    checkpoints.add_argument("--store", metavar="URL", help=STORE_HELP)

    doctor = add("doctor", "find out what keeps this from working, or what a path is")
    doctor.add_argument("path", metavar="PATH", nargs="?", help="tell what this is, who may write there, and how to get your own files")

    install = add("install", "put the systemd units of the daemon in place, and tell the command that starts it")
    install.add_argument("--user", action="store_true", help="for yourself alone, in your own systemd")
    install.add_argument("--prefix", metavar="DIR", help="units go to DIR/lib (default: /usr/local)")
    install.add_argument("--root", metavar="DIR", help="below DIR, for an image or a package (default: /)")
    install.add_argument("--command", metavar="PATH", dest="program_path", help="what the units run (default: the modelcached beside this)")

    add("version", "print the version")
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


def _add_in_store(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--store", metavar="URL", nargs="?", const="", help="in the store, not on this node: " + STORE_HELP)


def _duration(text: str) -> float:
    """ "90", "500ms", "25s", "10m", "1h" in seconds."""
    number = text.rstrip("dhms")
    unit = text[len(number) :] or "s"
    try:
        duration = float(number) * _SECONDS[unit]
    except (KeyError, ValueError):
        duration = -1
    if not 0 <= duration < float("inf"):
        raise argparse.ArgumentTypeError("%r is not a duration: 25s, 10m, 1h" % text)
    return duration


def _size(text: str) -> int:
    """ "0", "500MB", "1.5GiB" in bytes."""
    number = text.rstrip("kKmMgGtTiIbB")
    unit = text[len(number) :].lower().rstrip("b")
    factors = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30, "ti": 1 << 40}
    try:
        found = float(number) * factors[unit]
    except (KeyError, ValueError):
        found = -1
    if not 0 <= found < 1e18:
        raise argparse.ArgumentTypeError("%r is not a size: 0, 500MB, 1TiB" % text)
    return int(found)
