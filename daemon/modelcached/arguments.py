"""The command line of `modelcached`: every field of the configuration is a flag, described by the field itself."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import config, filesystems, first_start, logs
from .config import Config

EPILOG = """\
exit codes:
  0   ended in order
  1   failed: the socket or the root can't be used, another daemon serves the socket, a background task died
  2   wrong usage or configuration; all problems are listed
  75  temporary: the root is in use by another daemon; try again

Each field can also be set in the configuration file, and as MODELCACHED_<FIELD> in the environment
(flag over environment over file over default). Sizes: 512KiB, 10GB. Durations: 90s, 10m, 1h.
"""

INSTALL = "put the systemd units in place, and tell the command that starts the daemon"


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="modelcached",
        description="The node daemon of modelcache: one disk cache for every task of a host.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, words in (
        ("serve", "run the daemon in the foreground"),
        ("check-config", "print every value and where it came from, or everything that is wrong"),
        ("version", "print the version"),
    ):
        command = commands.add_parser(
            name,
            help=words,
            description=words[0].upper() + words[1:] + ".",
            epilog=EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        if name != "serve":
            command.add_argument("--json", action="store_true", help="print JSON")
        else:
            command.add_argument("--log-format", choices=logs.FORMATS, default="text", help="key=value or JSON (default: text)")
            command.add_argument("--log-level", choices=logs.LEVELS, default="info", help="what is worth a line (default: info)")
        if name != "version":
            _add_settings(command)
    _add_install(commands.add_parser("install", help=INSTALL, description=INSTALL[0].upper() + INSTALL[1:] + ".", allow_abbrev=False))
    return top


def _add_install(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="print JSON")
    command.add_argument("--user", action="store_true", help="for yourself alone, in your own systemd")
    for flag, default, words in (
        ("--prefix", "/usr/local", "units go to DIR/lib"),
        ("--root", "/", "below DIR, for an image or a package"),
    ):
        command.add_argument(flag, metavar="DIR", type=Path, default=Path(default), help=f"{words} (default: %(default)s)")
    command.add_argument("--command", metavar="PATH", dest="program", default="", help="what the units run (default: this program)")


def _add_settings(command: argparse.ArgumentParser) -> None:
    where = f"configuration file (default: {config.DEFAULT_FILE} if it is there; MODELCACHED_CONFIG)"
    command.add_argument("--config", metavar="FILE", type=Path, help=where)
    command.add_argument("--private", action="store_true", help="serve one user: root and socket in the user's folders, ends when idle")
    fields = command.add_argument_group("fields")
    for name, field in config.SETTINGS.items():
        words = f"{field.metadata['doc']}: {config.allowed(field)} (default: {config.as_toml(field, field.default).strip(chr(34))})"
        is_flag = field.metadata["kind"] == "flag"
        options: dict[str, Any] = {"nargs": "?", "const": "true", "metavar": "true|false"} if is_flag else {"metavar": "VALUE"}
        fields.add_argument(f"--{name.replace('_', '-')}", dest=f"field_{name}", help=words.replace("%", "%%"), **options)


def settings(asked: argparse.Namespace) -> Config:
    """The checked configuration of `serve` and `check-config`; ConfigError."""
    flags = {name: text for name in config.SETTINGS if (text := getattr(asked, f"field_{name}")) is not None}
    named = asked.config or os.environ.get("MODELCACHED_CONFIG")
    defaults = {"root": _private_root(os.environ), "socket": _private_socket(os.environ)} if asked.private else {}
    found = config.load(flags, os.environ, private=asked.private, file=Path(named) if named else None, defaults=defaults)
    if not asked.private or found.origins["max_size"] != "default":
        return found
    size = first_start.max_size(found.root)
    return dataclasses.replace(found, max_size=size, origins={**found.origins, "max_size": first_start.ORIGIN})


def _private_root(environment: Mapping[str, str]) -> Path:
    data = environment.get("XDG_DATA_HOME", "")
    home = Path(data) if data.startswith("/") else Path(os.path.expanduser("~")) / ".local" / "share"  # "~" for a uid without a home
    is_usable = home.is_absolute() and filesystems.is_local(home)
    return home / "modelcached" if is_usable else Path(f"/var/tmp/modelcached-{os.getuid()}")


def _private_socket(environment: Mapping[str, str]) -> Path:
    """In the user's runtime folder, where the SDK looks for it."""
    runtime = environment.get("XDG_RUNTIME_DIR", "")
    folder = Path(runtime, "modelcached") if runtime and Path(runtime).is_dir() else Path(f"/tmp/modelcached-{os.getuid()}")
    return folder / "modelcached.sock"
