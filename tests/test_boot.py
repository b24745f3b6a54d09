"""The installed units under a real systemd: a small Debian is made and booted, and the wheel installed as README.md says.

What the kernel and systemd make of the hardening is asked of the running daemon, not read in the unit.
"""

from __future__ import annotations

import json
import re
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from . import wheels
from .booted import Booted, debian
from .clients import Tree, hashes
from .hub import Hub, Random

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1200)]

TASK = 4711  # a user the machine has never heard of, as a container's may be
USER = 4712
CAP_LEASE = 1 << 28
VENV = "/opt/modelcached"
TREE: Tree = {"config.json": b"{}", "model.safetensors": Random("boot", 3_000_000)}
UNIT = "modelcached.service"

FETCH = """
import hashlib, os, sys, modelcache
path = modelcache.snapshot_download(sys.argv[1])
for name in sorted(os.listdir(path)):
    print(os.path.join(path, name), hashlib.sha256(open(os.path.join(path, name), "rb").read()).hexdigest())
"""
SAVE = """
import os, sys, tempfile, modelcache
with tempfile.TemporaryDirectory() as folder:
    open(os.path.join(folder, "weights"), "wb").write(b"w" * 1_000_000)
    reference = modelcache.save(folder, label="booted")
modelcache.flush(60)
path = modelcache.load(reference)
assert open(os.path.join(path, "weights"), "rb").read() == b"w" * 1_000_000
try:
    open(os.path.join(path, "weights"), "ab")
except PermissionError:
    print("kept", reference["key"])
"""


@pytest.fixture(scope="module")
def machine(the_hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Booted]:
    """Booted, with the daemon installed in the way, and started by the very command, that `install` tells."""
    built = wheels.build(tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel"))
    with tempfile.TemporaryDirectory(prefix="modelcached-boot-", dir="/var/tmp") as folder, debian(Path(folder)) as tree:
        shown = {"/opt/site": Path(sysconfig.get_path("purelib")), "/opt/wheel": built.parent}
        python = f"/usr/bin/python{sys.version_info.major}.{sys.version_info.minor}"
        if sys.base_prefix != "/usr":  # not the distribution's own
            shown[sys.base_prefix] = Path(sys.base_prefix)
            python = f"{sys.base_prefix}/bin/{Path(python).name}"
        (tree / "etc/modelcached").mkdir()
        config = f'hub_endpoint = "{the_hub.endpoint}"\nmin_free = "64MiB"\nmetrics = "127.0.0.1:0"\n'
        (tree / "etc/modelcached/modelcached.toml").write_text(config)
        for source in shown:
            (tree / source[1:]).mkdir(parents=True, exist_ok=True)
        with Booted.start(tree, shown) as machine:
            machine.run(python, "-m", "venv", "--without-pip", VENV)
            pip = ("env", "PYTHONPATH=/opt/site", f"{VENV}/bin/python", "-m", "pip", "install", "--quiet", "--no-index", "--no-deps")
            machine.run(*pip, f"/opt/wheel/{built.name}")
            site = machine.run(f"{VENV}/bin/python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))")
            machine.run("sh", "-c", f"echo /opt/site > {site}/extras.pth")  # what the wheel needs, behind it
            told = json.loads(machine.run(f"{VENV}/bin/modelcached", "install", "--json"))
            machine.run("sh", "-ec", told["next"])
            yield machine


@pytest.fixture
def daemon(machine: Booted) -> Iterator[Booted]:
    """The machine, with its daemon running."""
    machine.run("systemctl", "start", UNIT)
    yield machine
    machine.run("systemctl", "reset-failed")


def python(machine: Booted, code: str, *arguments: str) -> str:
    return machine.run(f"{VENV}/bin/python", "-c", code, *arguments, uid=TASK)


def main_pid(machine: Booted) -> str:
    return machine.show(UNIT, "MainPID")


def test_told_command_starts_it_ready_and_enabled(daemon: Booted) -> None:
    assert daemon.show(UNIT, "SubState") == "running" and daemon.show(UNIT, "StatusText") == "serving"
    assert daemon.run("systemctl", "is-enabled", UNIT, "modelcached.socket").split() == ["enabled", "enabled"]
    status = daemon.run(f"{VENV}/bin/modelcache", "status", uid=TASK)
    assert "/var/lib/modelcached" in status
    assert "level=" not in daemon.run("journalctl", "--no-pager", "--unit=modelcached.*", "--priority=warning")
    assert "level=info" in daemon.run("journalctl", "--no-pager", "--unit=modelcached.*", "--priority=info")


def test_metrics_of_the_daemons_process(daemon: Booted) -> None:
    """What the sandbox hides from it must not be what they need."""
    address = re.findall(r"event=metrics address=(\S+)", daemon.run("journalctl", "--no-pager", f"--unit={UNIT}"))[-1]
    read = "import sys, urllib.request; print(urllib.request.urlopen(sys.argv[1]).read().decode())"
    said = daemon.run(f"{VENV}/bin/python", "-c", read, address)
    assert "process_resident_memory_bytes" in said and "process_open_fds" in said and "modelcached_disk_free_bytes" in said


def test_fetch_and_save_as_another_user(daemon: Booted, hub: Hub) -> None:
    hub.commit("org/booted", TREE)
    said = python(daemon, FETCH, "org/booted")
    assert all(digest in said for digest in hashes(TREE).values()) and said.startswith("/var/lib/modelcached/views/")
    assert python(daemon, SAVE).startswith("kept mf.models/")
    assert not [name for name in daemon.run("ls", "-A", "/var/lib/modelcached").split() if name.startswith(".")]  # nobody's cache of caches
    owner = daemon.run("stat", "--format=%U %a", "/var/lib/modelcached/blobs")
    assert owner == "modelcached 700"


def test_hardening_is_in_force(daemon: Booted) -> None:
    pid = main_pid(daemon)
    status = dict(line.split(":\t", 1) for line in daemon.run("cat", f"/proc/{pid}/status").splitlines() if ":\t" in line)
    capabilities = {status[name] for name in ("CapEff", "CapPrm", "CapBnd", "CapAmb")}
    assert capabilities == {f"{CAP_LEASE:016x}"}
    assert status["NoNewPrivs"] == "1" and status["Seccomp"] == "2"
    assert status["Uid"].split() == [daemon.run("id", "-u", "modelcached")] * 4
    # Its own view of the filesystem shuts out root too.
    inside = ("nsenter", "--target", pid, "--mount", "--")
    for path in ("/etc/written", "/usr/written", "/srv/written"):
        assert "Read-only file system" in daemon.run(*inside, "touch", path, check=False)
    assert daemon.run("ls", "-A", "/root") != "" and daemon.run(*inside, "ls", "-A", "/root") == ""
    assert "fuse" not in daemon.run(*inside, "ls", "/dev") and "null" in daemon.run(*inside, "ls", "/dev")
    own = ("setpriv", "--reuid=modelcached", "--regid=modelcached", "--clear-groups", "--")
    daemon.run(*own, "ls", "-d", "/proc/1")
    assert "No such file" in daemon.run(*inside, *own, "ls", "-d", "/proc/1", check=False)
    daemon.run(*inside, *own, "touch", "/tmp/written")
    assert "written" not in daemon.run("ls", "/tmp")  # it has a /tmp of its own
    # A core would hold tokens.
    assert daemon.run("sh", "-c", f"grep 'Max core' /proc/{pid}/limits").split()[4:6] == ["0", "0"]


def test_request_starts_a_daemon_that_was_stopped(daemon: Booted, hub: Hub) -> None:
    hub.commit("org/activated", TREE)
    daemon.run("systemctl", "stop", UNIT)
    assert daemon.show(UNIT, "ActiveState") == "inactive" and daemon.show("modelcached.socket", "ActiveState") == "active"
    assert hashes(TREE)["config.json"] in python(daemon, FETCH, "org/activated")
    assert daemon.show(UNIT, "ActiveState") == "active"


def test_stop_lets_running_requests_end(daemon: Booted, hub: Hub) -> None:
    hub.commit("org/slow", {"model.safetensors": Random("slow", 1_000_000)})
    hub.misbehave("slow", match="^lfs", rate=1000)
    task = daemon.begin(f"{VENV}/bin/python", "-c", FETCH, "org/slow", uid=TASK)
    hub.wait(kind="lfs", requests=1, timeout=60)
    daemon.run("systemctl", "stop", "--no-block", UNIT)
    daemon.until(UNIT, "StatusText", "ending")
    hub.calm()
    said, _ = task.communicate(timeout=60)
    assert task.returncode == 0 and "/model.safetensors " in said, said
    daemon.until(UNIT, "ActiveState", "inactive")
    assert daemon.show(UNIT, "Result") == "success"
    assert daemon.run("ls", "/var/lib/modelcached/tmp") == ""


def test_watchdog_ends_a_daemon_that_hangs_and_callers_go_on(daemon: Booted, hub: Hub) -> None:
    hub.commit("org/watched", TREE)
    daemon.configure(UNIT, "WatchdogSec=3s")
    daemon.run("systemctl", "restart", UNIT)
    before = main_pid(daemon)
    daemon.run("systemctl", "kill", "--signal=STOP", UNIT)
    assert hashes(TREE)["config.json"] in python(daemon, FETCH, "org/watched")  # waits for the next one
    assert main_pid(daemon) not in (before, "0") and daemon.show(UNIT, "NRestarts") == "1"
    assert "watchdog" in daemon.run("journalctl", "--no-pager", "--unit=modelcached.service").lower()
    daemon.configure(UNIT, "")


def test_secrets_are_the_daemons_alone(daemon: Booted) -> None:
    passed = f"/run/credentials/{UNIT}/aws"
    daemon.run("sh", "-c", "umask 077; echo '[default]' > /etc/credstore/modelcached.aws")
    daemon.run("systemctl", "restart", UNIT)
    read = ("nsenter", "--target", main_pid(daemon), "--mount", "--", "setpriv", "--clear-groups")
    assert daemon.run(*read, "--reuid=modelcached", "--regid=modelcached", "--", "cat", passed) == "[default]"
    assert "Permission denied" in daemon.run(*read, f"--reuid={TASK}", f"--regid={TASK}", "--", "cat", passed, check=False)
    environment = daemon.run("cat", f"/proc/{main_pid(daemon)}/environ").split("\0")
    assert f"AWS_SHARED_CREDENTIALS_FILE={passed}" in environment
    daemon.run("rm", "/etc/credstore/modelcached.aws")


def test_reload_goes_on_with_the_same_process(daemon: Booted) -> None:
    before = main_pid(daemon)
    daemon.run("sh", "-c", "echo 'fresh_seconds = 5' >> /etc/modelcached/modelcached.toml")
    daemon.run("systemctl", "reload", UNIT)
    daemon.until(UNIT, "ActiveState", "active")
    assert main_pid(daemon) == before
    assert "reloaded" in daemon.run("journalctl", "--no-pager", f"--unit={UNIT}")


def test_one_users_own(machine: Booted, hub: Hub) -> None:
    """In the user's own systemd, by the command that `install --user` tells."""
    hub.commit("org/own", TREE)
    machine.run("useradd", "--create-home", f"--uid={USER}", "own")
    runtime = f"/run/user/{USER}"
    machine.configure(f"user@{USER}.service", f"Environment=XDG_RUNTIME_DIR={runtime}")  # what a login would set
    machine.run("systemctl", "start", f"user@{USER}.service")
    own = ("env", "HOME=/home/own", f"XDG_RUNTIME_DIR={runtime}", f"MODELCACHE_SOCKET={runtime}/modelcached/modelcached.sock")
    told = json.loads(machine.run(*own, f"{VENV}/bin/modelcached", "install", "--user", "--json", uid=USER))
    settings = (f"MODELCACHED_HUB_ENDPOINT={hub.endpoint}", "MODELCACHED_MIN_FREE=64MiB")
    machine.run(*own, "systemctl", "--user", "set-environment", *settings, uid=USER)
    machine.run(*own, "sh", "-ec", told["next"], uid=USER)
    assert hashes(TREE)["config.json"] in machine.run(*own, f"{VENV}/bin/python", "-c", FETCH, "org/own", uid=USER)  # starts it
    assert machine.run(*own, "systemctl", "--user", "is-active", UNIT, uid=USER) == "active"
    assert machine.run("stat", "--format=%U %a", "/home/own/.local/share/modelcached") == "own 700"
    machine.run("systemctl", "stop", f"user@{USER}.service")


def test_socket_goes_when_it_is_stopped(daemon: Booted) -> None:
    """Without its file, tasks see at once that there is no daemon on this host."""
    daemon.run("systemctl", "stop", "modelcached.socket", UNIT)
    assert daemon.run("ls", "/run/modelcached") == ""
    daemon.run("systemctl", "start", "modelcached.socket")
    assert daemon.run("ls", "/run/modelcached") == "modelcached.sock"
