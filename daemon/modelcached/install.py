"""`modelcached install`: puts the systemd units where systemd finds them, for the host or for one user.

It writes files and nothing else. What makes users, enables and starts is the administrator's to run: the command is told.
The units name the program that installs them; one that the hardened unit could not run is refused before anything is written.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

UNITS = Path(__file__).parent / "systemd"
PACKAGED_COMMAND = "/usr/bin/modelcached"  # what the units name until they are installed
LEAST_SYSTEMD = 251  # finds credentials in /etc/credstore, and says where they are (%d)
HIDDEN = ("/home", "/root", "/run/user", "/tmp", "/var/tmp")  # from the host's unit: ProtectHome=, PrivateTmp=
START = "systemctl daemon-reload && systemctl enable --now modelcached.service"
START_FOR_HOST = "systemd-sysusers modelcached.conf && systemd-tmpfiles --create modelcached.conf && " + START
START_FOR_USER = "systemctl --user daemon-reload && systemctl --user enable --now modelcached.socket"


class InstallError(Exception):
    """Nothing was installed, or not all of it."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class Installed(NamedTuple):
    files: tuple[Path, ...]
    next: str  # the command that brings it to life


def install_for_host(root: Path = Path("/"), prefix: Path = Path("/usr/local"), command: str = "") -> Installed:
    """`root`: below which folder, for images and packages; `command`: the program as it is called there (default: this one)."""
    if not command:
        _refuse_hidden()
    if root == Path("/"):
        _refuse_old()
    library = root / prefix.relative_to("/") / "lib"
    targets = {library / "systemd" / "system": UNITS, library / "systemd" / "user": UNITS / "user"}
    targets |= {library / folder: UNITS / folder for folder in ("sysusers.d", "tmpfiles.d")}
    start = START_FOR_HOST if root == Path("/") else f"systemctl --root={shlex.quote(str(root))} enable modelcached.service"
    return Installed(tuple(_write(targets, command or own_command())), start)


def install_for_user(environment: Mapping[str, str], command: str = "") -> Installed:
    home = environment.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return Installed(tuple(_write({Path(home, "systemd", "user"): UNITS / "user"}, command or own_command())), START_FOR_USER)


def own_command() -> str:
    """How a unit calls this very program."""
    script = Path(sys.executable).with_name("modelcached")
    return _spelt(script) if os.access(script, os.X_OK) else f"{_spelt(Path(sys.executable))} -m modelcached"


def _write(targets: Mapping[Path, Path], command: str) -> Iterator[Path]:
    for folder, sources in targets.items():
        for source in sorted(sources.glob("modelcached.*")):
            target = folder / source.name
            try:
                folder.mkdir(parents=True, exist_ok=True)
                target.write_text(source.read_text().replace(f"={PACKAGED_COMMAND} ", f"={command} "))
                target.chmod(0o644)
            except OSError as error:
                hint = "run it as root, or for yourself alone: modelcached install --user"
                raise InstallError(f"can't write {target}: {error.strerror}", hint) from None
            yield target


def _refuse_old() -> None:
    """Where systemd is older, the unit would start without the store's keys. Where there is none, nobody starts it here."""
    try:
        said = subprocess.run(["systemctl", "--version"], capture_output=True, text=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError):
        return
    found = re.match(r"systemd (\d+)", said)
    if found and int(found[1]) < LEAST_SYSTEMD:
        raise InstallError(
            f"this host's systemd {found[1]} is too old: the unit needs {LEAST_SYSTEMD}",
            "let each user run a daemon (modelcached install --user), or run the container of kubernetes/",
        )


def _refuse_hidden() -> None:
    for path in (Path(sys.executable), Path(sys.executable).resolve(), Path(sys.base_prefix), Path(__file__).resolve()):
        for above in (path, *path.parents):
            if str(above) in HIDDEN or (above.is_dir() and not above.stat().st_mode & 0o001):
                raise InstallError(
                    f"the unit can't run {path}: {above} is closed to it",
                    "install into a folder for everybody: python3 -m venv /opt/modelcached, then "
                    "/opt/modelcached/bin/pip install 'modelcached[daemon,cli]' and /opt/modelcached/bin/modelcached install",
                )


def _spelt(path: Path) -> str:
    """As systemd reads it: quoted where it has to be, and "%" is special."""
    text = str(path).replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{text}"' if any(character in text for character in " \"'\\;") else text
