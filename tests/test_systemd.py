"""The units, as systemd's own tools judge them, what `install` makes of them, and the daemon in the hands of a service manager.

tests/test_boot.py boots a systemd with them.
"""

from __future__ import annotations

import configparser
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import modelcached
from modelcached.install import UNITS, install_for_host, install_for_user, own_command

from .clients import Client, hashes
from .conftest import ROOT
from .daemon import IMPORT_PATH, clean_environment
from .fake_service import DEADLINE_SECONDS
from .fake_service import Client as Raw
from .fake_service import Daemon as FakeDaemon
from .hub import Hub
from .kernel import require_root

MOST_EXPOSED = 2.0
TREE = {"config.json": b"{}", "weights.bin": b"w" * 100_000}


def run(*command: str | Path, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Without the network, a terminal, or anything of this user's."""
    env = {**os.environ, "SYSTEMD_COLORS": "0", **(environment or {})}
    return subprocess.run([str(word) for word in command], env=env, text=True, capture_output=True, stdin=subprocess.DEVNULL, timeout=60)


def told(command: str, *words: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, "-m", command, *words, environment={**clean_environment(), **environment})


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """The folder of units of a host whose daemon is this interpreter's."""
    install_for_host(tmp_path, Path("/usr"), f"{sys.executable} -m modelcached")
    return tmp_path / "usr" / "lib" / "systemd"


def values(unit: Path) -> configparser.SectionProxy:
    """What a [Service] or [Socket] says; of repeated keys the last."""
    parsed = configparser.ConfigParser(strict=False, interpolation=None)
    parsed.optionxform = str  # type: ignore[assignment,method-assign]
    parsed.read(unit)
    return parsed[unit.suffix[1:].capitalize()]


# ---- the units


def verify(*units: Path, manager: str = "--system") -> str:
    """What systemd has to say against these units; it also talks about others of this host."""
    with tempfile.TemporaryDirectory(prefix="modelcached-test-") as runtime:  # --user wants one
        ran = run("systemd-analyze", manager, "--man=no", "verify", *units, environment={"XDG_RUNTIME_DIR": runtime})
    said = "\n".join(line for line in ran.stderr.splitlines() if "modelcached" in line)
    return said or ("" if ran.returncode == 0 else ran.stderr)


def test_systemd_understands_the_units(installed: Path) -> None:
    assert verify(installed / "system" / "modelcached.service", installed / "system" / "modelcached.socket") == ""
    assert verify(installed / "user" / "modelcached.service", installed / "user" / "modelcached.socket", manager="--user") == ""


def test_systemd_would_say_what_it_does_not_understand(installed: Path) -> None:
    unit = installed / "system" / "modelcached.service"
    unit.write_text(unit.read_text().replace("ProtectHome=yes", "ProtectHouse=yes"))
    assert "ProtectHouse" in verify(unit)


def exposure(unit: Path, threshold: float) -> subprocess.CompletedProcess[str]:
    return run("systemd-analyze", "security", "--offline=true", "--no-pager", f"--threshold={round(threshold * 10)}", unit)


def test_hardening(installed: Path) -> None:
    unit = installed / "system" / "modelcached.service"
    judged = exposure(unit, MOST_EXPOSED)
    assert judged.returncode == 0, judged.stdout
    assert exposure(unit, 0.5).returncode != 0  # it does compare
    service = values(unit)
    assert service["CapabilityBoundingSet"] == service["AmbientCapabilities"] == "CAP_LEASE"
    assert service["PrivateUsers"] == "no"  # or every caller would be "nobody"


@pytest.mark.parametrize("kind", ["system", "user"])
def test_nothing_ends_a_daemon_that_does_well(installed: Path, kind: str) -> None:
    service = values(installed / kind / "modelcached.service")
    assert not {"MemoryMax", "MemoryHigh", "RuntimeMaxSec"} & set(service)
    assert service["Type"] == "notify" and service["Restart"] in ("always", "on-failure")
    from modelcached.command import OVERTIME_SECONDS
    from modelcached.config import Config

    # systemd would kill it in the middle of an orderly end
    assert float(service["TimeoutStopSec"].removesuffix("s")) > Config().shutdown_seconds + OVERTIME_SECONDS


def test_units_and_sdk_agree_on_the_places(installed: Path) -> None:
    from modelcache.runtime import NODE_SOCKET
    from modelcached import config

    service, socket_unit = (values(installed / "system" / f"modelcached.{kind}") for kind in ("service", "socket"))
    assert socket_unit["ListenStream"] == NODE_SOCKET == str(config.NODE_SOCKET)
    assert str(config.NODE_ROOT) == f"/var/lib/{service['StateDirectory']}"
    assert str(config.DEFAULT_FILE.parent) == f"/etc/{service['ConfigurationDirectory']}"
    assert service["RuntimeDirectoryPreserve"] == "yes"  # the socket lies there
    private = values(installed / "user" / "modelcached.socket")
    assert private["ListenStream"] == "%t/modelcached/modelcached.sock" and private["DirectoryMode"] == "0700"


@pytest.fixture
def image(installed: Path, tmp_path: Path) -> Path:
    """A root folder in which the daemon's user has been made."""
    require_root()
    (tmp_path / "image" / "etc").mkdir(parents=True)
    made = run("systemd-sysusers", f"--root={tmp_path / 'image'}", installed.parent / "sysusers.d" / "modelcached.conf")
    assert made.returncode == 0, made.stderr
    return tmp_path / "image"


def test_user_and_folders_are_made(installed: Path, image: Path) -> None:
    (line,) = [line for line in (image / "etc" / "passwd").read_text().splitlines() if line.startswith("modelcached:")]
    _, _, uid, gid, _, home, shell = line.split(":")
    assert home == "/var/lib/modelcached" and shell.endswith("nologin") and 0 < int(uid) < 1000
    made = run("systemd-tmpfiles", f"--root={image}", "--create", installed.parent / "tmpfiles.d" / "modelcached.conf")
    assert made.returncode == 0, made.stderr
    for name in ("run/modelcached", "var/lib/modelcached"):
        found = (image / name).stat()
        assert (found.st_uid, found.st_gid, found.st_mode & 0o777) == (int(uid), int(gid), 0o755)
    secrets = (image / "etc" / "credstore").stat()
    assert (secrets.st_uid, secrets.st_mode & 0o777) == (0, 0o700)


def test_caches_of_users_are_not_swept_away(installed: Path, image: Path, tmp_path: Path) -> None:
    sweeping = tmp_path / "sweeping.conf"
    for name in ("var/tmp/modelcached-1000/blobs/b", "var/tmp/other/b", "tmp/modelcached-1000/launch.lock", "tmp/other"):
        (image / name).parent.mkdir(parents=True, exist_ok=True)
        (image / name).touch()
    sweeping.write_text("d /var/tmp 1777 - - 0\nd /tmp 1777 - - 0\n")  # 0: everything, however new
    ours = installed.parent / "tmpfiles.d" / "modelcached.conf"
    cleaned = run("systemd-tmpfiles", f"--root={image}", "--clean", sweeping, ours)
    assert cleaned.returncode == 0, cleaned.stderr
    left = {str(path.relative_to(image)) for path in image.glob("**/tmp/**/*") if path.is_file()}
    assert left == {"var/tmp/modelcached-1000/blobs/b", "tmp/modelcached-1000/launch.lock"}


# ---- install


def test_install_tells_what_it_wrote_and_what_comes_next(tmp_path: Path) -> None:
    ran = told("modelcached", "install", "--root", tmp_path, "--command", "/opt/mc/bin/modelcached")
    assert ran.returncode == 0, ran.stderr
    files = [Path(line) for line in ran.stdout.splitlines()]
    library = tmp_path / "usr" / "local" / "lib"
    assert {str(path.relative_to(library)) for path in files} == {
        "systemd/system/modelcached.service",
        "systemd/system/modelcached.socket",
        "systemd/user/modelcached.service",
        "systemd/user/modelcached.socket",
        "sysusers.d/modelcached.conf",
        "tmpfiles.d/modelcached.conf",
    }
    assert ran.stderr == f"next: systemctl --root={tmp_path} enable modelcached.service\n"
    assert values(files[0])["ExecStart"] == "/opt/mc/bin/modelcached serve"
    assert values(library / "systemd/user/modelcached.service")["ExecStart"] == "/opt/mc/bin/modelcached serve --private"
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in files)
    again = json.loads(told("modelcached", "install", "--root", tmp_path, "--prefix", "/usr", "--command", "/c", "--json").stdout)
    assert str(tmp_path / "usr/lib/systemd/system/modelcached.service") in again["files"] and "enable" in again["next"]


def test_install_for_one_user(tmp_path: Path) -> None:
    done = install_for_user({"XDG_CONFIG_HOME": str(tmp_path)})
    assert {path.parent for path in done.files} == {tmp_path / "systemd" / "user"} and len(done.files) == 2
    assert values(tmp_path / "systemd/user/modelcached.service")["ExecStart"] == f"{own_command()} serve --private"
    assert done.next.startswith("systemctl --user ")


def test_client_command_installs_too(tmp_path: Path) -> None:
    ran = told("modelcache", "install", "--user", XDG_CONFIG_HOME=str(tmp_path))
    assert ran.returncode == 0 and "systemctl --user" in ran.stderr
    assert (tmp_path / "systemd/user/modelcached.socket").exists()


def test_install_refuses_what_the_unit_could_not_run(tmp_path: Path) -> None:
    """A virtualenv below /tmp: the unit has a /tmp of its own."""
    closed = tmp_path / "venv" / "bin"
    closed.mkdir(parents=True)
    (closed / "python").symlink_to(sys.executable)
    code = "import sys; sys.executable = sys.argv[1]; from modelcached.install import install_for_host; install_for_host(sys.argv[2])"
    ran = run(sys.executable, "-c", code, closed / "python", tmp_path / "root", environment=clean_environment())
    assert "InstallError" in ran.stderr and "is closed to it" in ran.stderr
    assert not (tmp_path / "root").exists()


def test_install_refuses_an_old_systemd(tmp_path: Path) -> None:
    """Its unit would start without the store's keys."""
    program = tmp_path / "bin" / "systemctl"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho 'systemd 249 (249.11-0ubuntu3)'\n")
    program.chmod(0o755)
    words = ("install", "--prefix", str(tmp_path / "prefix"), "--command", "/c")
    ran = told("modelcached", *words, PATH=f"{program.parent}:{os.environ['PATH']}")
    assert ran.returncode == 1 and "systemd 249 is too old" in ran.stderr and "251" in ran.stderr and "--user" in ran.stderr
    assert not (tmp_path / "prefix").exists()
    program.write_text("#!/bin/sh\necho 'systemd 251'\n")
    assert told("modelcached", *words, PATH=f"{program.parent}:{os.environ['PATH']}").returncode == 0


def test_install_says_where_it_may_not_write(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    ran = told("modelcached", "install", "--root", tmp_path / "file", "--command", "/c")
    assert ran.returncode == 1 and "can't write" in ran.stderr and "--user" in ran.stderr and "Traceback" not in ran.stderr


def test_units_lie_at_the_top_too() -> None:
    """One folder under two names: for readers, and for the package."""
    if Path(str(modelcached.__file__)).is_relative_to(ROOT):
        assert UNITS.resolve() == ROOT / "systemd"
    assert {path.name for path in UNITS.iterdir()} >= {"modelcached.service", "modelcached.socket", "user", "sysusers.d", "tmpfiles.d"}


# ---- the daemon under a service manager


def test_watchdog_hears_of_it_only_while_the_loop_is_alive(shared_tmp_path: Path) -> None:
    fifo = shared_tmp_path / "fifo"
    os.mkfifo(fifo)
    running = FakeDaemon(shared_tmp_path, environment={"WATCHDOG_USEC": "200000"})
    try:
        with Raw(running.socket) as client:
            running.wait_for("WATCHDOG=1")
            request = client.request("block", name=str(fifo))
            with fifo.open("w"):  # opens when the daemon has: from here on its loop does nothing
                assert not running.hears(seconds=1.0)  # ten times its interval
            assert client.receive().message["id"] == request
        running.notices.clear()
        running.wait_for("WATCHDOG=1")
    finally:
        running.kill()


def test_real_daemon_is_ready_watched_and_ends(shared_tmp_path: Path, hub: Hub) -> None:
    """On a real notify socket: what a unit of Type=notify with WatchdogSec= waits for."""
    command = (sys.executable, "-m", "modelcached", "serve", "--root", str(shared_tmp_path / "root"), "--hub-endpoint", hub.endpoint)
    running = FakeDaemon(shared_tmp_path, command=command, environment={"WATCHDOG_USEC": "200000", "PYTHONPATH": IMPORT_PATH})
    try:
        for _ in range(3):
            running.notices.clear()
            running.wait_for("WATCHDOG=1")
        running.ask_to_end()
        running.wait_for("STOPPING=1")
        assert running.wait() == 0
    finally:
        running.kill()


@pytest.fixture
def activating(shared_tmp_path: Path, hub: Hub) -> Iterator[subprocess.Popen[bytes]]:
    """systemd-socket-activate: listens, and becomes the daemon at the first connection."""
    words = ["systemd-socket-activate", "-l", str(shared_tmp_path / "s"), "-E", f"PYTHONPATH={IMPORT_PATH}"]
    words += [sys.executable, "-m", "modelcached", "serve", "--root", str(shared_tmp_path / "root"), "--hub-endpoint", hub.endpoint]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, env=clean_environment())
    assert process.stderr is not None
    process.stderr.readline()  # "Listening on ..."
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_first_request_starts_the_daemon(shared_tmp_path: Path, hub: Hub, activating: subprocess.Popen[bytes]) -> None:
    hub.commit("org/activated", TREE)
    assert not (shared_tmp_path / "root").exists()  # nobody runs yet
    with Client(clean_environment(MODELCACHE_SOCKET=str(shared_tmp_path / "s"))) as task:
        assert task.call("snapshot_download", repo_id="org/activated", hashes=True).files == hashes(TREE)
    activating.send_signal(signal.SIGTERM)
    assert activating.wait(DEADLINE_SECONDS) == 0
    assert (shared_tmp_path / "s").is_socket()  # whoever made it removes it
