"""`modelcache watch | checkpoints`: an unmodified trainer runs, its checkpoints are kept, and the next run goes on with them.

Invariants:
- The command's end is ours: its code is changed only when it is 0 and not everything is captured, and in the store.
- The command inherits the way to the watcher, so what it writes is kept as long as it lives, even when this process is killed.
- After the end of the command a second signal ends the waiting, not what was kept.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from typing import Any, Dict, List, NoReturn

from . import cli_daemon, cli_run, flushing, layouts, references, retention, units, watching
from .cli_repos import ago
from .cli_show import BY_SIGNAL, OK, PENDING, TERMINATED, Show, UsageError, count, printable, size
from .errors import ModelcacheError
from .metadata import encode
from .protocol import References
from .watch_client import Status

_SKIPPED_NAMED = 5  # of what was not kept, at the end


def watch(asked: argparse.Namespace, show: Show) -> int:
    _check(asked)
    cli_daemon.lead_sdk(asked, show)
    _leave_at(signal.SIGHUP)
    running = watching.watch(
        asked.directory,
        asked.name,
        keep=asked.keep,
        keep_best=asked.keep_best,
        every=asked.every,
        layout=asked.layout,
        resume=asked.resume,
        store=asked.store,
    )
    if not asked.program:
        signal.pthread_sigmask(signal.SIG_BLOCK, cli_run.heeded(cli_run.PASSED_ON))  # from here on a signal is the way it ends well
    _say_begin(running, asked.resume, show)
    if asked.program:
        ended = cli_run.run(asked.program, dict(os.environ), running.descriptors())
    else:
        ended = _wait_for_signal()
    return _end(running, ended, asked, show)


def checkpoints(asked: argparse.Namespace, show: Show) -> int:
    series = units.Series.of_name(asked.name, asked.store)
    said = cli_daemon.client(asked, show).call("references", References(series.prefix, "checkpoint", series.name, series.store))
    pending = set(said["pending"])
    found = [_checkpoint(references.received(each), pending) for each in said["references"]]
    awaited = [{**_checkpoint(each, pending), "state": "on %s" % (each.get("node") or "another node")} for each in said["elsewhere"]]
    found = sorted([*found, *awaited], key=lambda each: (each["written"], each["step"] or 0), reverse=True)
    if not found:
        show.word("no checkpoint is called %s" % printable(asked.name))
        if not show.as_json:
            return OK
    rows = [_row(each) for each in found]
    heads = ["STEP", "WRITTEN", "SIZE", "STATE", "COMPLETE", "UNIT", "KEY"]
    show.table({"name": asked.name, "checkpoints": found}, heads, rows, ("STEP", "SIZE"))
    return OK


def _check(asked: argparse.Namespace) -> None:
    """What is wrong with the words is said before anything is asked, or made."""
    try:
        retention.Rule.parse(asked.keep, asked.keep_best)
        layouts.rules(asked.layout)
        if asked.name is not None:
            units.Series.of_name(asked.name)
    except ValueError as error:
        raise UsageError(str(error), "modelcache watch --help") from error
    if os.path.exists(asked.directory) and not os.path.isdir(asked.directory):
        raise UsageError("%s is no folder" % printable(asked.directory), "name the folder that the trainer writes into")


def _say_begin(running: watching.Watching, is_resumed: bool, show: Show) -> None:
    if running.restored is not None:
        step = units.step_of(running.restored)
        said = "" if step is None else ", step %d" % step
        show.word("begins with %s%s" % (printable(os.path.join(running.directory, running.restored["unit"])), said))
    elif is_resumed:
        show.word("nothing was put back into %s" % printable(running.directory))
    show.word("watching %s as %s (%s)" % (printable(running.directory), running.name, running.where))


def _wait_for_signal() -> cli_run.Ended:
    """Without a command: until somebody ends it."""
    signal.sigwait(cli_run.heeded(cli_run.ENDING))
    return cli_run.Ended(OK, True)


def _end(running: watching.Watching, ended: cli_run.Ended, asked: argparse.Namespace, show: Show) -> int:
    is_hurried = ended.was_told or ended.code > BY_SIGNAL
    deadline = asked.deadline
    if deadline is None:
        deadline = watching.SIGNALLED_SECONDS if is_hurried else flushing.exit_seconds()
    _leave_at(signal.SIGTERM)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, cli_run.PASSED_ON - {signal.SIGUSR1, signal.SIGUSR2})
    try:
        status = running.stop(deadline)
    except (KeyboardInterrupt, SystemExit):
        running.close()
        show.warn("not waited for: what was kept of %s is safe on this node, and the daemon goes on" % running.name)
        return ended.code or PENDING
    except ModelcacheError as error:
        show.warn(error.message)
        return ended.code or PENDING
    _say_end(status, bool(asked.program), show)
    return ended.code or (PENDING if status.pending or status.unfinished else OK)


def _say_end(status: Status, has_command: bool, show: Show) -> None:
    document = {**status._asdict(), "captured": [each._asdict() for each in status.captured]}
    if not has_command:
        show.data(document, [each.key for each in status.captured])
    elif show.as_json:  # stdout is the command's
        import json

        print(json.dumps(document), file=sys.stderr)
    for text in watching.unfinished(status):
        show.warn(text)
    for text in status.skipped[-_SKIPPED_NAMED:]:
        show.word(text)
    if status.last_error and not status.pending:
        show.warn(status.last_error)
    kept = count(status.captured_count, "checkpoint")
    is_all = not status.pending and not status.unfinished
    show.word("kept %s of %s%s" % (kept, status.name, "; everything is in the store" if is_all else ""))


def _leave_at(number: signal.Signals) -> None:
    if cli_run.heeded({number}):
        signal.signal(number, _leave)


def _leave(*_: Any) -> NoReturn:
    raise SystemExit(TERMINATED)


def _checkpoint(reference: Dict[str, Any], pending: Any) -> Dict[str, Any]:
    """What is told of one; what somebody saved by hand is complete, for they said so."""
    return {
        "step": units.step_of(reference),
        "written": units.written(reference),
        "created_on": reference.get("created_on"),
        "size": reference.get("size", 0),
        "state": "captured" if reference.get("key") in pending else "uploaded",
        "complete": "guessed" if units.is_guessed(reference) else "yes",
        "unit": reference.get("unit"),
        "layout": reference.get("layout"),
        "key": reference.get("key"),
        "metadata": encode(reference.get("metadata") or {}),
    }


def _row(each: Dict[str, Any]) -> List[str]:
    step = "-" if each["step"] is None else str(each["step"])
    unit = printable(each["unit"]) if each["unit"] else "-"
    return [step, ago(each["written"]), size(each["size"]), each["state"], each["complete"], unit, each["key"]]
