"""Where `modelcached` starts: says what is missing where the daemon can't run, before anything else is imported."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.util import find_spec

EXIT_USAGE = 2
LOADED_LATER = ("aiobotocore", "aiohttp", "huggingface_hub", "prometheus_client")  # when they are used first: what lacks is said now


def main(words: Sequence[str] | None = None) -> int:
    """Runs the command; its exit code."""
    if sys.version_info < (3, 11):  # noqa: UP036 - the SDK may be installed on an older one, and this file with it
        return _missing("the daemon needs Python 3.11 or newer, this is " + sys.version.split()[0], "run it with a newer Python")
    try:
        from . import command
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "modelcached":
            raise
        return _missing_package(error.name)
    for name in LOADED_LATER:
        if find_spec(name) is None:
            return _missing_package(name)
    return command.main(words)


def _missing_package(name: str | None) -> int:
    return _missing(f"the daemon needs the package {name}", "pip install 'modelcached[daemon]'")


def _missing(what: str, hint: str) -> int:
    print(f"modelcached: {what}", file=sys.stderr)
    print(f"hint: {hint}", file=sys.stderr)
    return EXIT_USAGE


if __name__ == "__main__":
    sys.exit(main())
