"""`modelcache top`: what the daemon does now, again and again: fetches, saves on their way, rates, room, who holds what.

`rich` redraws a screen where it is installed and somebody looks; else the same lines come one round after the other.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any, Dict, List, Sequence, Tuple

from .cli_daemon import place, running_client
from .cli_show import OK, Show, count, printable, seconds, size
from .client import Client
from .protocol import List_

MOST_ROWS = 20  # of each table: a screen
_NAMES_SECONDS = 5.0  # how long the names of trees are believed

Table = Tuple[Sequence[str], List[Sequence[str]]]  # heads, rows


def top(asked: argparse.Namespace, show: Show) -> int:
    connected = running_client(asked)
    where = place(asked).path
    names = Names(connected)
    if asked.once:
        said = look(connected, names, where)
        show.data(said, lines(said))
        return OK
    screen = None if show.as_json or not sys.stdout.isatty() else _screen()
    try:
        while True:
            said = look(connected, names, where)
            if show.as_json:
                print(json.dumps(said), flush=True)
            elif screen is None:
                print("\n".join(lines(said)) + "\n", flush=True)
            else:
                screen.update("\n".join(lines(said)))
            time.sleep(asked.interval)
    finally:
        if screen is not None:
            screen.stop()


class Names:
    """What trees are, in words: repos that this caller may see. The rest are saves."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._names: Dict[str, str] = {}
        self._until = 0.0

    def of(self, tree: str) -> str:
        if tree not in self._names and time.monotonic() >= self._until:
            self._until = time.monotonic() + _NAMES_SECONDS
            found = self._client.call("ls", List_())["repos"]
            self._names = {entry["tree"]: "%s@%s" % (entry["repo_id"], entry["commit"][:8]) for entry in found}
        return self._names.get(tree, "tree %s" % tree[:12])


def look(client: Client, names: Names, where: str) -> Dict[str, Any]:
    said: Dict[str, Any] = client.call("status")
    said["socket"] = where
    for holder in said["holders"]:
        holder["what"] = names.of(holder["tree"])
    return said


def lines(said: Dict[str, Any]) -> List[str]:
    """One round, as text."""
    disk, spool = said["disk"], said["spool"]
    found = [
        "modelcached %s, pid %d, up %s, %s"
        % (said["version"], said["pid"], seconds(max(0.0, time.time() - said["started"])), count(said["connections"], "client")),
        "disk   %s of %s free, %s stay free" % (size(disk["free_bytes"]), size(disk["size_bytes"]), size(disk["min_free_bytes"])),
        "hub    %s%s" % (_rate(said["activities"], "hub"), _limit(said["rates"]["hub_rate"])),
        "store  %s%s" % (_rate(said["activities"], "store"), _limit(said["rates"]["store_rate"])),
        "spool  %s" % ("empty" if not spool["saves"] else "%s, %s, the oldest for %s"
                        % (count(spool["saves"], "save"), size(spool["size_bytes"]), seconds(spool["oldest_seconds"]))),
    ]  # fmt: skip
    if spool["last_error"]:
        found.append("       %s" % printable(spool["last_error"]))
    for title, (heads, rows) in (("under way", _activities(said)), ("held", _holders(said))):
        found += ["", *(_aligned(heads, rows[:MOST_ROWS]) if rows else ["nothing is %s" % title])]
        if len(rows) > MOST_ROWS:
            found.append("and %d more" % (len(rows) - MOST_ROWS))
    return found


def _activities(said: Dict[str, Any]) -> Table:
    rows: List[Sequence[str]] = []
    for each in said["activities"]:
        total, done = each["total_bytes"], each["done_bytes"]
        share = "%d%%" % (100 * done // total) if total else ""
        rows.append(
            (
                printable(each["what"]),
                each["phase"] if not each["source"] else "%s (%s)" % (each["phase"], each["source"]),
                share,
                "%s of %s" % (size(done), size(total)) if total else "",
                "%s/s" % size(each["rate"]) if each["rate"] else "",
                str(each["waiters"]),
            )
        )
    return ("DOING", "PHASE", "DONE", "BYTES", "RATE", "WAITING"), rows


def _holders(said: Dict[str, Any]) -> Table:
    now = time.time()
    rows: List[Sequence[str]] = [
        (each["what"], str(each["uid"]), str(each["pid"]), seconds(max(0.0, now - each["start"])), printable(each["purpose"])[:60])
        for each in sorted(said["holders"], key=lambda each: each["start"])
    ]
    return ("HELD", "UID", "PID", "FOR", "BY"), rows


def _rate(activities: Sequence[Dict[str, Any]], source: str) -> str:
    rate = sum(each["rate"] for each in activities if each["source"] == source)
    return "%s/s" % size(rate) if rate else "quiet"


def _limit(limit: int) -> str:
    return ", at most %s/s" % size(limit) if limit else ""


def _aligned(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> List[str]:
    widths = [max(map(len, column)) for column in zip(heads, *rows)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in (heads, *rows)]


class _Screen:
    def __init__(self, live: Any, text: Any) -> None:
        self._live = live
        self._text = text
        live.start()

    def update(self, text: str) -> None:
        self._live.update(self._text(text), refresh=True)

    def stop(self) -> None:
        self._live.stop()


def _screen() -> Any:
    """None without `rich`."""
    try:
        from rich.live import Live
        from rich.text import Text
    except ImportError:
        return None
    return _Screen(Live(screen=True, auto_refresh=False), lambda text: Text(text, no_wrap=True, overflow="ellipsis"))
