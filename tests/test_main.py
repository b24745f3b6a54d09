from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from modelcached import __version__, config
from modelcached.command import main

from .fake_service import DEADLINE_SECONDS, Client, Daemon

SERVE = (sys.executable, "-m", "tests.fake_service", "serve")


def refused(*flags: str) -> subprocess.CompletedProcess[str]:
    """A daemon that does not start."""
    return subprocess.run([*SERVE, *flags], capture_output=True, text=True, timeout=DEADLINE_SECONDS)


@pytest.fixture
def folder(shared_tmp_path: Path) -> Path:
    return shared_tmp_path


@pytest.fixture
def started(folder: Path) -> Iterator[Daemon]:
    running = Daemon(folder)
    yield running
    running.kill()


# ---- commands that end: in this process, for an interpreter takes longer to start than they to run


class Ended(NamedTuple):
    code: int
    out: str
    err: str


Ask = Callable[..., Ended]


@pytest.fixture
def ask(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Ask:
    def run_here(*words: str, **environment: str) -> Ended:
        with monkeypatch.context() as changed:
            for name, value in environment.items():
                changed.setenv(name, value)
            try:
                code = main(words)
            except SystemExit as exit:
                code = int(exit.code or 0)
        return Ended(code, *capsys.readouterr())

    return run_here


def test_version(ask: Ask) -> None:
    assert ask("version").out.startswith(f"modelcached {__version__} (protocol 1")
    assert json.loads(ask("version", "--json").out)["version"] == __version__


@pytest.mark.parametrize("package", ["aiobotocore", "aiohttp", "huggingface_hub", "msgspec", "prometheus_client"])
def test_a_package_that_is_missing_is_named_at_once(package: str) -> None:
    """Also one that is loaded with the first question: whoever starts the daemon should hear of it, and not whoever asks it."""
    code = f"import sys; sys.modules[{package!r}] = None; from modelcached.__main__ import main; sys.exit(main(['version']))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=DEADLINE_SECONDS)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.splitlines() == [f"modelcached: the daemon needs the package {package}", "hint: pip install 'modelcached[daemon]'"]


def test_help_names_every_field_and_exit_code(ask: Ask) -> None:
    words = ask("serve", "--help").out
    assert all(f"--{name.replace('_', '-')}" in words for name in config.SETTINGS)
    assert "exit codes:" in words and "75" in words and "--private" in words


@pytest.mark.parametrize("words", [(), ("sreve",), ("serve", "--roott", "/x"), ("serve", "--roo", "/x"), ("check-config", "extra")])
def test_wrong_usage(ask: Ask, words: tuple[str, ...]) -> None:
    assert ask(*words).code == 2


def test_check_config_prints_a_file_that_says_the_same(ask: Ask, tmp_path: Path) -> None:
    shown = ask("check-config", "--verdict-seconds", "90s", "--offline", MODELCACHED_MIN_FREE="5%")
    assert shown.code == 0
    assert (
        "verdict_seconds = 90.0" in shown.out
        and "# flag --verdict-seconds" in shown.out
        and "# environment MODELCACHED_MIN_FREE" in shown.out
    )
    (tmp_path / "config.toml").write_text(shown.out)
    again = json.loads(ask("check-config", "--json", "--config", str(tmp_path / "config.toml")).out)
    assert again["verdict_seconds"] == {"value": 90.0, "origin": f"file {tmp_path}/config.toml"}
    assert again["min_free"]["value"] == "5%" and again["offline"]["value"] is True and again["idle_exit"]["value"] == "never"


def test_check_config_names_all_problems(ask: Ask) -> None:
    ended = ask("check-config", "--verdict-seconds", "x", "--hub-connections", "0", MODELCACHED_ROOTT="/x", MODELCACHED_CONFIG="/no")
    assert (ended.code, ended.out) == (2, "")
    assert all(
        word in ended.err for word in ("verdict_seconds (flag --verdict-seconds)", "hub_connections", "did you mean root?", "config (/no)")
    )
    assert len(json.loads(ask("check-config", "--json", "--verdict-seconds", "x", "--root", "y").out)["problems"]) == 2
    assert ask("serve", "--verdict-seconds", "x").code == 2


def test_private_daemon_uses_the_users_own_folders(ask: Ask, tmp_path: Path) -> None:
    shown = json.loads(ask("check-config", "--json", "--private", XDG_DATA_HOME=str(tmp_path), XDG_RUNTIME_DIR=str(tmp_path)).out)
    assert shown["root"]["value"] == f"{tmp_path}/modelcached" and shown["idle_exit"]["value"] == 600
    assert shown["socket"]["value"] == f"{tmp_path}/modelcached/modelcached.sock"
    shown = json.loads(ask("check-config", "--json", "--private", XDG_RUNTIME_DIR="").out)
    assert shown["socket"]["value"] == f"/tmp/modelcached-{os.getuid()}/modelcached.sock"


# ---- the socket


def test_socket_is_for_everybody_or_for_one(folder: Path) -> None:
    for name, flags, mode, folder_mode in (("all", (), 0o666, 0o755), ("one", ("--private",), 0o600, 0o700)):
        running = Daemon(folder, *flags, "--socket", str(folder / name / "in" / "s"))
        assert (folder / name / "in" / "s").stat().st_mode & 0o777 == mode
        assert (folder / name / "in").stat().st_mode & 0o777 == folder_mode
        running.ask_to_end()
        assert running.wait() == 0
        assert not (folder / name / "in" / "s").exists()
        running.kill()


def test_second_daemon_on_the_same_socket_is_refused(started: Daemon) -> None:
    ran = refused("--socket", str(started.socket))
    assert ran.returncode == 1 and f"another daemon serves {started.socket}" in ran.stderr
    with Client(started.socket) as client:
        assert client.welcome["pid"] == started.process.pid


def test_a_live_socket_without_a_lock_is_not_taken_over(folder: Path) -> None:
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(folder / "s"))
        other.listen()
        ran = refused("--socket", str(folder / "s"))
        assert ran.returncode == 1 and "another daemon serves" in ran.stderr
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(folder / "s"))


def test_a_dead_socket_is_replaced(folder: Path) -> None:
    dead = Daemon(folder)
    dead.kill()
    assert dead.socket.is_socket()
    running = Daemon(folder)
    with Client(running.socket) as client:
        assert client.welcome["pid"] == running.process.pid
    running.kill()


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_what_is_no_socket_is_left_alone(folder: Path, kind: str) -> None:
    path = folder / "s"
    if kind == "file":
        path.write_text("precious")
    elif kind == "folder":
        path.mkdir()
    else:
        (folder / "target").write_text("precious")
        path.symlink_to("target")
    ran = refused("--socket", str(path))
    assert ran.returncode == 1 and f"{path} exists and is no socket" in ran.stderr
    assert path.is_dir() if kind == "folder" else path.read_text() == "precious"


def test_only_our_own_socket_is_removed_at_the_end(started: Daemon) -> None:
    started.socket.unlink()
    started.socket.write_text("somebody else's")
    started.ask_to_end()
    assert started.wait() == 0
    assert started.socket.read_text() == "somebody else's"


@pytest.mark.skipif(os.getuid() != 0, reason="another uid takes root to become")
def test_private_folder_of_somebody_else_is_refused(folder: Path) -> None:
    (folder / "theirs").mkdir(mode=0o777)
    os.chown(folder / "theirs", 4711, 4711)
    ran = refused("--private", "--socket", str(folder / "theirs" / "s"))
    assert ran.returncode == 1 and "does not belong to this user" in ran.stderr


def test_a_place_where_no_socket_can_be(folder: Path) -> None:
    (folder / "file").touch()
    ran = refused("--socket", str(folder / "file" / "s"))
    assert ran.returncode == 1 and "can't listen on" in ran.stderr and "--socket" in ran.stderr


# ---- sockets that are passed in


def passing(path: Path, pid: str) -> list[str]:
    """A command that listens on `path`, passes that as descriptor 3 and becomes the daemon."""
    code = (
        "import os, socket, sys\n"
        "s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); s.listen()\n"
        "kept = os.dup2(s.fileno(), 63, inheritable=False)\n"
        "os.dup2(63, 3, inheritable=True)\n"
        "os.environ.update(LISTEN_FDS='1', LISTEN_PID=sys.argv[2].replace('own', str(os.getpid())))\n"
        "os.execv(sys.executable, [sys.executable, '-m', 'tests.fake_service', 'serve', *sys.argv[3:]])\n"
    )
    return [sys.executable, "-c", code, str(path), pid]


@pytest.mark.parametrize("pid", ["own", "auto"])
def test_socket_that_was_passed_in(folder: Path, pid: str) -> None:
    running = Daemon(folder, command=passing(folder / "passed", pid))
    with Client(folder / "passed") as client:
        assert client.welcome["pid"] == running.process.pid
    assert not running.socket.exists()  # nothing was bound
    running.ask_to_end()
    assert running.wait() == 0
    assert (folder / "passed").is_socket()  # belongs to whoever made it
    running.kill()


def test_socket_that_was_passed_to_somebody_else(folder: Path) -> None:
    running = Daemon(folder, command=passing(folder / "passed", "1"))
    with Client(running.socket) as client:
        assert client.welcome["pid"] == running.process.pid
    running.kill()


@pytest.mark.parametrize(("count", "words"), [("2", "one is expected"), ("1", "descriptor 3 is no")], ids=["too many", "no socket"])
def test_what_is_passed_in_has_to_be_one_listening_socket(folder: Path, count: str, words: str) -> None:
    code = f"import os, sys; os.dup2(0, 3, inheritable=True); os.execv(sys.executable, {list(SERVE)})"
    environment = {**os.environ, "LISTEN_FDS": count, "LISTEN_PID": "auto"}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert ran.returncode == 1 and words in ran.stderr


@pytest.mark.skipif(shutil.which("systemd-socket-activate") is None, reason="systemd-socket-activate is not installed")
def test_systemd_passes_its_socket(folder: Path) -> None:
    """systemd-socket-activate starts the daemon at the first connection, which is not lost."""
    with (folder / "log").open("wb") as log:
        activating = ["systemd-socket-activate", "-l", str(folder / "s")]
        for name in ("PYTHONPATH", "MODELCACHE_TEST_SESSION"):
            activating += ["-E", f"{name}={os.environ.get(name, '')}"]
        process = subprocess.Popen([*activating, *SERVE], stderr=subprocess.PIPE, stdin=subprocess.DEVNULL)
        assert process.stderr is not None
        log.write(process.stderr.readline())  # "Listening on ..."
        try:
            with Client(folder / "s") as client:
                assert client.welcome["pid"] == process.pid  # it became the daemon
            process.send_signal(signal.SIGTERM)
            assert process.wait(DEADLINE_SECONDS) == 0
        finally:
            process.kill()
            process.wait()
            process.stderr.close()


# ---- the end


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_running_requests_may_end_first(started: Daemon, number: signal.Signals) -> None:
    with Client(started.socket) as client, Client(started.socket) as other:
        request = client.request("wait", name="end")
        other.call("started", name="end")
        started.process.send_signal(number)
        started.wait_for("STOPPING=1")
        with pytest.raises((FileNotFoundError, ConnectionRefusedError)):
            Client(started.socket)
        answer = other.call("echo", text="new")
        assert answer["error"]["data"]["name"] == "shutting_down" and answer["error"]["data"]["hint"]
        client.cancel(request)
        assert client.is_closed()
    assert started.wait() == 0
    assert "closed last" in started.log.read_text()


def test_requests_that_take_too_long_are_told(folder: Path) -> None:
    running = Daemon(folder, "--shutdown-seconds", "100ms")
    with Client(running.socket) as client:
        request = client.request("wait", name="long")
        with Client(running.socket) as other:
            other.call("started", name="long")
        running.ask_to_end()
        message, _ = client.receive()
        assert message["id"] == request and message["error"]["data"]["name"] == "shutting_down"
        assert client.is_closed()
    assert running.wait() == 0
    running.kill()


def test_what_does_not_end_is_named(folder: Path) -> None:
    running = Daemon(folder, "--shutdown-seconds", "0", environment={"OVERTIME_SECONDS": "0.1"})
    with Client(running.socket) as client:
        client.call("cling")
    running.ask_to_end()
    assert running.wait() == 1
    log = running.log.read_text()
    assert "something does not end" in log and "cling_when_asked > Event.wait" in log, log
    running.kill()


def test_second_signal_ends_at_once(started: Daemon) -> None:
    with Client(started.socket) as client, Client(started.socket) as other:
        client.request("wait", name="end")
        other.call("started", name="end")
        started.ask_to_end()
        started.wait_for("STOPPING=1")
        started.ask_to_end()
        assert started.wait() == 1
        assert client.is_closed()


def test_background_task_that_dies_takes_the_daemon_down(started: Daemon) -> None:
    with Client(started.socket) as client:
        client.request("end_background")
        assert started.wait() == 1
    log = started.log.read_text()
    assert "a background task died" in log and "closed last" in log
    assert not started.socket.exists()


def test_locked_root_is_temporary(folder: Path) -> None:
    ran = refused("--socket", str(folder / "s"), "--root", str(folder / "locked"))
    assert ran.returncode == 75 and "the root is in use" in ran.stderr and "stop the other daemon" in ran.stderr
    assert not (folder / "s").exists()


def test_idle_daemon_ends(folder: Path) -> None:
    running = Daemon(folder, "--idle-exit", "300ms")
    with Client(running.socket) as client:
        assert client.call("echo", text="x")["result"]["text"] == "x"
    assert running.wait() == 0
    assert "event=idle" in running.log.read_text()
    running.kill()


def test_daemon_with_a_client_is_not_idle(folder: Path) -> None:
    running = Daemon(folder, "--idle-exit", "100ms", environment={"WATCHDOG_USEC": "200000"})
    with Client(running.socket) as client:
        for _ in range(4):  # 100 ms apart
            running.notices.clear()
            running.wait_for("WATCHDOG=1")
        assert client.call("echo", text="x")["result"]["text"] == "x"
    assert running.wait() == 0
    running.kill()


def test_service_manager_hears_it_all(started: Daemon) -> None:
    started.ask_to_end()
    started.wait_for("STOPPING=1")
    assert started.wait() == 0
    assert started.notices[:3] == ["STATUS=starting", "READY=1", "STATUS=serving"]


def test_descriptor_limit_is_raised(folder: Path) -> None:
    limited = ["/bin/sh", "-c", 'ulimit -S -n 64; exec "$@"', "sh", *SERVE]
    running = Daemon(folder, command=limited)
    limits = Path(f"/proc/{running.process.pid}/limits").read_text()
    soft, hard = next(line for line in limits.splitlines() if line.startswith("Max open files")).split()[3:5]
    assert soft == hard
    running.kill()


def test_log_lines_are_json_when_asked(folder: Path) -> None:
    running = Daemon(folder, "--log-format", "json")
    with Client(running.socket) as client:
        client.call("crash")
    running.ask_to_end()
    assert running.wait() == 0
    lines = [json.loads(line) for line in running.log.read_text().splitlines() if line != "closed last"]
    crash = next(line for line in lines if "traceback" in line)
    assert (crash["uid"], crash["pid"], crash["method"]) == (os.getuid(), os.getpid(), "crash") and "***" in crash["traceback"]
    running.kill()
