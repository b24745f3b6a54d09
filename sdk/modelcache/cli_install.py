"""`modelcache install`: the same as `modelcached install`, for those who look for it here. The daemon's package has the units."""

from __future__ import annotations

import argparse
import os
import sys
from importlib.util import find_spec
from typing import NoReturn

from .cli_show import Show
from .errors import DaemonNotAvailableError


def install(asked: argparse.Namespace, show: Show) -> NoReturn:
    if find_spec("modelcached") is None or sys.version_info < (3, 11):
        raise DaemonNotAvailableError(
            "the daemon is not installed beside %s" % sys.executable, "with Python 3.11 or newer: pip install 'modelcached[daemon]'"
        )
    words = [sys.executable, "-m", "modelcached", "install"]
    words += ["--json"] * show.as_json + ["--user"] * asked.user
    for option, value in (("--root", asked.root), ("--prefix", asked.prefix), ("--command", asked.program_path)):
        words += [option, value] if value else []
    sys.stdout.flush()
    # Root may stand in a folder where others write: nothing is imported from there.
    os.execve(sys.executable, words, {**os.environ, "PYTHONSAFEPATH": "1"})
