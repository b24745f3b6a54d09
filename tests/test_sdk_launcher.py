"""The private daemon: started when nobody listens, one however many try, nobody's child, heir of nothing."""

from __future__ import annotations

import fcntl
import os
import select
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from modelcache import launcher, runtime
from modelcache.client import Client
from modelcache.errors import DaemonNotAvailableError

from .conftest import ROOT

DAEMON = str(ROOT / "daemon")


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A user without a daemon; one that was started is ended afterwards."""
    for name in ("XDG_RUNTIME_DIR", "XDG_DATA_HOME", "HOME"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.delenv("MODELCACHE_SOCKET", raising=False)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "sdk"), DAEMON]))
    yield tmp_path
    listener = socket.socket(socket.AF_UNIX)
    try:
        listener.connect(runtime.user_socket())
    except OSError:
        return
    finally:
        listener.close()
    client = Client()
    pid = client.hello().pid
    client.close()
    end(pid)


def end(pid: int) -> None:
    """Ends a daemon that is nobody's child, and waits for it."""
    process = os.pidfd_open(pid)
    try:
        os.kill(pid, signal.SIGTERM)
        ended, _, _ = select.select([process], [], [], 10)
        assert ended, "the daemon does not end"
    finally:
        os.close(process)


def status_of(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def descriptors_of(pid: int) -> dict[int, str]:
    return {int(name): os.readlink(f"/proc/{pid}/fd/{name}") for name in os.listdir(f"/proc/{pid}/fd")}


@pytest.mark.timeout(60)
def test_a_daemon_of_ones_own(user: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    inherited = os.open("/dev/zero", os.O_RDONLY)
    os.set_inheritable(inherited, True)  # as some C library's
    client = Client()
    hello = client.hello()
    os.close(inherited)
    folder = user / "XDG_RUNTIME_DIR" / "modelcached"
    assert hello.private
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "modelcached.sock").stat().st_mode) == 0o600
    assert sorted(path.name for path in folder.iterdir()) == ["daemon.log", "launch.lock", "modelcached.sock"]

    status = status_of(hello.pid)
    assert int(status["PPid"]) != os.getpid()
    assert os.getsid(hello.pid) not in (os.getsid(0), hello.pid)  # a session of its own, without a terminal or a way to get one
    assert os.readlink(f"/proc/{hello.pid}/cwd") == "/"
    descriptors = descriptors_of(hello.pid)
    assert (descriptors[0], descriptors[1], descriptors[2]) == ("/dev/null", str(folder / "daemon.log"), str(folder / "daemon.log"))
    assert descriptors[3].startswith("socket:")
    assert "/dev/zero" not in descriptors.values()
    assert str(folder / "launch.lock") not in descriptors.values()
    environment = Path(f"/proc/{hello.pid}/environ").read_bytes().decode()
    assert "secret" not in environment
    assert "HF_HUB_OFFLINE" not in environment

    assert launcher.launch() is False  # one listens
    client.close()


HELLO = """
import sys
from modelcache.client import shared
print("ready", flush=True)
sys.stdin.readline()
print(shared().hello().pid, flush=True)
sys.stdin.readline()
"""


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_fifty_processes_start_one(user: Path) -> None:
    processes = [
        subprocess.Popen([sys.executable, "-c", HELLO], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(50)
    ]
    try:
        for process in processes:
            assert read_line(process) == "ready"
        for process in processes:  # all at once
            write_line(process)
        pids = {int(read_line(process)) for process in processes}
        assert len(pids) == 1
        log = (Path(runtime.folder()) / "daemon.log").read_text()
        assert log.count("event=ready") == 1
    finally:
        for process in processes:
            process.communicate("\n")


def read_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def write_line(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


@pytest.mark.timeout(60)
def test_it_is_started_again_when_it_has_gone(user: Path) -> None:
    client = Client()
    first = client.hello().pid
    end(first)
    client.call("status")
    assert client.hello().pid != first
    client.close()


def test_a_socket_left_behind_is_replaced(user: Path) -> None:
    folder = Path(runtime.make_folder())
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(folder / "modelcached.sock"))
    client = Client()
    assert client.hello().private
    client.close()


def test_another_starter_is_waited_for(user: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELCACHE_CONNECT_SECONDS", "0.2")
    folder = runtime.make_folder()
    with open(os.path.join(folder, "launch.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert launcher.launch() is False
        with pytest.raises(DaemonNotAvailableError, match="no daemon listens"):
            Client().hello()
    assert sorted(os.listdir(folder)) == ["launch.lock"]


def test_one_that_does_not_live_is_not_started_for_ever(user: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELCACHED_ROOT", "not absolute")
    with pytest.raises(DaemonNotAvailableError, match="does not live") as caught:
        Client().hello()
    assert "not absolute" in str(caught.value)  # the end of its log
    assert "modelcached[daemon]" in caught.value.hint


def test_a_named_socket_starts_nobody(user: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELCACHE_SOCKET", str(user / "none"))
    with pytest.raises(DaemonNotAvailableError):
        Client().hello()
    assert not os.path.exists(runtime.folder())


def test_a_runtime_folder_too_deep_for_a_socket(user: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = user / ("d" * 100)
    deep.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(deep))
    runtime.make_folder()
    with launcher._listen(runtime.user_socket()), socket.socket(socket.AF_UNIX) as client:
        assert launcher._somebody_listens(runtime.user_socket())
        with pytest.raises(OSError, match="too long"):
            client.connect(runtime.user_socket())
        runtime.with_short_name(runtime.user_socket(), client.connect)


def run_without(code: str) -> Any:
    """Runs in an interpreter that finds nothing of what the daemon needs."""
    bare = f"import sys; sys.path = [p for p in sys.path if 'site-packages' not in p]; sys.path.insert(0, {str(ROOT / 'sdk')!r})\n{code}"
    return subprocess.run([sys.executable, "-I", "-S", "-c", bare], capture_output=True, text=True)


def test_without_the_daemon_installed(user: Path) -> None:
    ran = run_without("import modelcache; modelcache.snapshot_download('org/name')")
    last = ran.stderr.strip().splitlines()[-2:]
    assert "DaemonNotAvailableError: no daemon listens, and none can be started: " in last[0]
    assert last[0].endswith("modelcached, aiohttp, huggingface_hub, msgspec not installed here")
    for way in ("pip install 'modelcached[daemon]'", "systemctl enable --now modelcached", "set MODELCACHE_SOCKET"):
        assert way in last[1]


def test_the_environment_finds_the_same_packages(user: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "relative")
    path = launcher._environment()["PYTHONPATH"].split(os.pathsep)
    assert path[0] == os.path.abspath("relative")
    assert str(ROOT / "sdk") in path
    assert not [entry for entry in path if "site-packages" in entry]


def test_a_long_log_is_put_aside(user: Path) -> None:
    folder = Path(runtime.make_folder())
    (folder / "daemon.log").write_bytes(b"x" * (2 << 20))
    client = Client()
    client.hello()
    client.close()
    assert (folder / "daemon.log.1").stat().st_size == 2 << 20
    assert (folder / "daemon.log").stat().st_size < 1 << 20
