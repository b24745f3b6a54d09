"""A Debian with a systemd of its own, in the hands of a test: `Booted`.

    with debian(folder) as tree, Booted.start(tree, {"/opt/site": site}) as machine:
        machine.run("systemctl", "is-active", "modelcached")

Made by debootstrap from the mirror that this host's own apt uses, in memory, and booted by systemd-nspawn with this host's network.
Invariants: commands run inside every namespace of the machine; what was mounted or started is gone when its block ends.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from .kernel import mounted, require_root

PACKAGES = "systemd,systemd-sysv,dbus,python3"
MAKE_SECONDS = 900.0
BOOT_SECONDS = 120.0
RUN_SECONDS = 120.0
END_SECONDS = 60.0
NEEDED = ("debootstrap", "systemd-nspawn", "nsenter")


def mirror() -> tuple[str, str]:
    """Where this host's apt gets its own distribution from, and which release that is."""
    lines = [line.partition("=") for line in Path("/etc/os-release").read_text().splitlines()]
    codename = {name: value.strip('"') for name, _, value in lines}.get("VERSION_CODENAME", "")
    words = ["apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE) $(COMPONENT)", "Created-By: Packages"]
    for line in subprocess.run(words, check=True, capture_output=True, text=True).stdout.splitlines():
        uri, release, component = line.split()
        if (release, component) == (codename, "main"):
            return uri, codename
    raise AssertionError(f"apt has no source for {codename} main")


def _proxy() -> dict[str, str]:
    """apt's proxy, for a program that reads the environment."""
    found = {}
    for scheme in ("http", "https"):
        words = ["apt-config", "shell", "proxy", f"Acquire::{scheme}::Proxy"]
        said = subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip()
        if said:
            found[f"{scheme}_proxy"] = said.partition("=")[2].strip("'")
    return found


@contextlib.contextmanager
def debian(folder: Path) -> Iterator[Path]:
    """The root folder of a small system."""
    require_root()
    for program in NEEDED:
        if shutil.which(program) is None:
            pytest.skip(f"needs {program} (Debian's packages debootstrap and systemd-container)")
    uri, codename = mirror()
    with mounted(folder / "tree", "-t", "tmpfs", "-o", "size=2g,mode=755", "none") as tree:
        # What it mounts inside goes with its namespace, so that nothing of this host is below the folder when that is removed.
        command = ["unshare", "--mount", "--propagation=slave", "--", "debootstrap", "--variant=minbase", f"--include={PACKAGES}"]
        ran = subprocess.run(
            [*command, codename, str(tree), uri], env={**os.environ, **_proxy()}, capture_output=True, text=True, timeout=MAKE_SECONDS
        )
        assert ran.returncode == 0, f"debootstrap: {ran.stdout[-3000:]}{ran.stderr[-1000:]}"
        (tree / "etc/resolv.conf").unlink(missing_ok=True)
        yield tree


class Booted:
    """A running machine."""

    def __init__(self, process: subprocess.Popen[bytes], tree: Path, log: Path) -> None:
        self._process = process
        self._tree = tree
        self._log = log
        self._first = 0  # its process 1, as this host counts

    @classmethod
    @contextlib.contextmanager
    def start(cls, tree: Path, folders: Mapping[str, Path]) -> Iterator[Booted]:
        """Boots `tree`; `folders` of this host are shown in it, read-only."""
        log = tree.with_name("console")
        command = ["systemd-nspawn", "--quiet", "--register=no", "--keep-unit", "--boot", "--console=pipe"]
        command += [f"--machine=modelcached-{os.getpid()}", f"--directory={tree}"]
        command += [f"--bind-ro={source}:{shown}" for shown, source in folders.items()]
        with log.open("wb") as console:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=console, stderr=console)
        machine = cls(process, tree, log)
        try:
            machine._wait_until_up()
            yield machine
        finally:
            machine._end()

    def run(self, *command: str | Path, uid: int | None = None, check: bool = True, stdin: str = "") -> str:
        """What a command inside prints on stdout and stderr, as root or as `uid` without any other group."""
        process = self.begin(*command, uid=uid)
        try:
            said, _ = process.communicate(stdin, RUN_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            raise AssertionError(f"{command} did not end\n{self.journal()}") from None
        assert process.returncode == 0 or not check, f"{' '.join(map(str, command))}: {said}\n{self.journal()}"
        return said.strip()

    def begin(self, *command: str | Path, uid: int | None = None) -> subprocess.Popen[str]:
        inside = [] if uid is None else ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--"]
        return subprocess.Popen(
            ["nsenter", "--target", str(self._first), "--all", "--", *inside, *map(str, command)],
            env={"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def journal(self) -> str:
        words = ("nsenter", "--target", str(self._first), "--all", "--", "journalctl", "--no-pager", "--lines=60", "--unit=modelcached.*")
        return subprocess.run(words, capture_output=True, text=True, timeout=RUN_SECONDS).stdout

    def show(self, unit: str, name: str) -> str:
        """One property of a unit."""
        return self.run("systemctl", "show", "--value", f"--property={name}", unit)

    def configure(self, unit: str, setting: str) -> None:
        """Changes one setting of a service, from its next start on; the change before is forgotten."""
        folder = f"/run/systemd/system/{unit}.d"
        self.run("sh", "-ec", f"mkdir -p {folder}; cat > {folder}/test.conf; systemctl daemon-reload", stdin=f"[Service]\n{setting}\n")

    def until(self, unit: str, name: str, wanted: str) -> None:
        """Waits for a property; systemd tells of changes on its bus only."""
        deadline = time.monotonic() + RUN_SECONDS
        while (found := self.show(unit, name)) != wanted:
            assert time.monotonic() < deadline, f"{unit}: {name} is {found}, not {wanted}\n{self.journal()}"
            time.sleep(0.1)  # see above

    def _wait_until_up(self) -> None:
        deadline = time.monotonic() + BOOT_SECONDS
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        while True:
            assert self._process.poll() is None and time.monotonic() < deadline, f"it did not boot: {self._console()}"
            self._first = next((int(pid) for pid in children.read_text().split() if self._is_first(pid)), 0)
            if self._first and self.run("systemctl", "is-system-running", check=False) in ("running", "degraded"):
                return
            time.sleep(0.2)  # there is nobody yet who could tell

    def _is_first(self, pid: str) -> bool:
        """Whether it is the machine's process 1: a command that ran in another one would change this host."""
        with contextlib.suppress(OSError):
            numbers = Path(f"/proc/{pid}/status").read_text().partition("NSpid:")[2].partition("\n")[0].split()  # one per namespace
            return numbers[-1:] == ["1"] and os.path.samefile(f"/proc/{pid}/root", self._tree)
        return False

    def _end(self) -> None:
        self._process.send_signal(signal.SIGTERM)  # an orderly shutdown
        try:
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _console(self) -> str:
        return self._log.read_text(errors="replace")[-3000:]
