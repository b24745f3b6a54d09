"""Where `modelcached` starts: says what is missing where the daemon can't run, before anything else is imported."""

from __future__ import annotations

import sys
from collections.abc import Sequence

EXIT_USAGE = 2


def main(words: Sequence[str] | None = None) -> int:
    """Runs the command; its exit code."""
    if sys.version_info < (3, 11):  # noqa: UP036 - the SDK may be installed on an older one, and this file with it
        return _missing("the daemon needs Python 3.11 or newer, this is " + sys.version.split()[0], "run it with a newer Python")
    try:
        from . import command
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "modelcached":
            raise
        return _missing(f"the daemon needs the package {error.name}", "pip install 'modelcached[daemon]'")
    return command.main(words)


def _missing(what: str, hint: str) -> int:
    print(f"modelcached: {what}", file=sys.stderr)
    print(f"hint: {hint}", file=sys.stderr)
    return EXIT_USAGE


if __name__ == "__main__":
    sys.exit(main())
