"""`modelcache exec`: unmodified programs find the repos in huggingface_hub's cache, and the command's end is its own.

The real huggingface_hub is asked, in processes that know nothing of the daemon.
"""

from __future__ import annotations

import contextlib
import json
import os
import pty
import select
import signal
import subprocess
import sys
import tempfile
import termios
from collections.abc import Iterator
from fcntl import ioctl
from pathlib import Path
from typing import Any

import pytest

from .daemon import Daemon, clean_environment
from .hub import Hub, Random

DEADLINE_SECONDS = 15.0
WEIGHTS = Random("weights", 2_000_000)

# What a program without any idea of modelcache does.
PROGRAM = """
import json, os, sys
import huggingface_hub as hub
asked = json.loads(sys.argv[1])
said = {}
try:
    said["snapshot"] = hub.snapshot_download(**asked)
    found = [os.path.join(folder, name) for folder, _, names in os.walk(said["snapshot"]) for name in names]
    said["files"] = sorted(os.path.relpath(path, said["snapshot"]) for path in found)
except Exception as error:
    said["snapshot_error"] = type(error).__name__
said["config"] = open(hub.hf_hub_download(filename="config.json", **asked)).read()
said["tree"] = sorted(file.path for file in hub.get_cached_repo_tree(**asked))
found = hub.scan_cache_dir()
said["repos"] = sorted((repo.repo_type, repo.repo_id, repo.nb_files, sorted(repo.refs)) for repo in found.repos)
said["warnings"] = list(map(str, found.warnings))
print(json.dumps(said))
"""


class World:
    def __init__(self, hub: Hub, daemon: Daemon, runtime: str) -> None:
        self.hub = hub
        self.daemon = daemon
        self.folders = Path(runtime) / "modelcached" / "tmp"
        self.environment = clean_environment(HOME=runtime, XDG_RUNTIME_DIR=runtime, MODELCACHE_SOCKET=daemon.socket)

    def command(self, *words: str) -> list[str]:
        return [sys.executable, "-W", "error", "-m", "modelcache", "exec", *words]

    def run(self, *words: str, **options: Any) -> subprocess.CompletedProcess[str]:
        options = {"env": self.environment, "capture_output": True, "text": True, "timeout": DEADLINE_SECONDS, **options}
        return subprocess.run(self.command(*words), **options)

    @contextlib.contextmanager
    def started(self, *words: str) -> Iterator[subprocess.Popen[str]]:
        """One that still runs. Its command reads stdin, so it ends with the block."""
        process = subprocess.Popen(
            self.command(*words), env=self.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        with process:
            try:
                yield process
            except BaseException:
                process.kill()
                raise

    def program(self, asked: dict[str, Any], *words: str) -> dict[str, Any]:
        ran = self.run(*words, "--", sys.executable, "-c", PROGRAM, json.dumps(asked))
        assert ran.returncode == 0, ran.stderr
        said: dict[str, Any] = json.loads(ran.stdout)
        assert said["warnings"] == []
        return said

    def leases(self) -> int:
        leases: int = self.daemon.status()["leases"]
        return leases

    def left(self) -> list[str]:
        return os.listdir(self.folders)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("exec")
    with tempfile.TemporaryDirectory() as runtime, Hub.start(folder) as hub, Daemon.start(folder / "root", hub) as daemon:
        hub.commit("org/name", {"config.json": b"first", "model.safetensors": WEIGHTS})
        hub.tag("org/name", "v1")
        hub.commit("org/name", {"config.json": b"second", "größe/vocab.txt": b"a"})
        hub.commit("org/data", {"config.json": b"data", "train.csv": b"1"}, repo_type="dataset")
        yield World(hub, daemon, runtime)


@pytest.fixture(autouse=True)
def _leaves_nothing(world: World) -> Iterator[None]:
    yield
    assert world.left() == [] and world.leases() == 0


# ---- the cache


def test_huggingface_hub_finds_a_whole_snapshot(world: World) -> None:
    said = world.program({"repo_id": "org/name"}, "org/name", "datasets/org/data")
    assert said["files"] == said["tree"] == ["config.json", "größe/vocab.txt", "model.safetensors"]
    assert said["config"] == "second"
    assert said["repos"] == [["dataset", "org/data", 2, ["main"]], ["model", "org/name", 3, ["main"]]]
    assert world.program({"repo_id": "org/data", "repo_type": "dataset"}, "org/data", "--repo-type", "dataset")["config"] == "data"


def test_two_revisions_of_one_repo(world: World) -> None:
    words = ("org/name@v1", "org/name")
    assert world.program({"repo_id": "org/name", "revision": "v1"}, *words)["config"] == "first"
    said = world.program({"repo_id": "org/name"}, *words)
    assert said["config"] == "second" and said["repos"] == [["model", "org/name", 5, ["main", "v1"]]]


def test_some_of_the_files_are_not_taken_for_all(world: World) -> None:
    said = world.program({"repo_id": "org/name"}, "org/name", "--include", "*.json")
    assert said["snapshot_error"] == "IncompleteSnapshotError" and said["config"] == "second" and len(said["tree"]) == 3


def test_what_is_not_named_is_not_there(world: World) -> None:
    code = "import huggingface_hub as hub; print(hub.try_to_load_from_cache('org/name', 'config.json'))"
    assert world.run("datasets/org/data", "--", sys.executable, "-c", code).stdout == "None\n"


def test_only_two_variables_differ(world: World) -> None:
    code = "import os, json; print(json.dumps(dict(os.environ)))"
    seen = json.loads(world.run("org/name", "--", sys.executable, "-c", code).stdout)
    differ = {name: value for name, value in seen.items() if world.environment.get(name) != value and name != "LC_CTYPE"}
    assert sorted(differ) == ["HF_HUB_CACHE", "HF_HUB_OFFLINE"] and differ["HF_HUB_OFFLINE"] == "1"
    assert set(world.environment) <= set(seen)


def test_json_goes_to_stderr(world: World) -> None:
    ran = world.run("--json", "org/name", "--", "cat", input="the command's own")
    assert ran.stdout == "the command's own"
    (repo,) = json.loads(ran.stderr)["repos"]
    assert repo["repo_id"] == "org/name" and repo["files"] == 3


# ---- the command


@pytest.mark.parametrize(
    ("command", "code", "words"),
    [
        (["sh", "-c", "exit 7"], 7, ""),
        (["sh", "-c", "kill -TERM $$"], 143, ""),
        (["sh", "-c", "kill -KILL $$"], 137, ""),
        (["no-such-command"], 127, "modelcache: error: no-such-command: command not found\n"),
        (["/etc/passwd"], 126, "modelcache: error: /etc/passwd: Permission denied\n"),
        (["echo", "--", "--json", "-q"], 0, ""),
    ],
)
def test_it_ends_as_the_command_does(world: World, command: list[str], code: int, words: str) -> None:
    ran = world.run("org/name", "--", *command)
    assert (ran.returncode, ran.stderr) == (code, words)
    assert ran.stdout == ("-- --json -q\n" if command[0] == "echo" else "")


def test_the_commands_end_is_seen_where_a_caller_ignores_sigchld(world: World) -> None:
    """The command, too, finds it as shells expect it."""
    code = "import signal, sys; sys.exit(7 if signal.getsignal(signal.SIGCHLD) is signal.SIG_DFL else 1)"
    ran = world.run("org/name", "--", sys.executable, "-c", code, preexec_fn=lambda: signal.signal(signal.SIGCHLD, signal.SIG_IGN))
    assert ran.returncode == 7, ran.stderr


def test_what_the_caller_handed_down_is_the_commands(world: World) -> None:
    with tempfile.TemporaryFile("w+") as file:
        ran = world.run("org/name", "--", sys.executable, "-c", f"import os; os.write({file.fileno()}, b'hello')", pass_fds=[file.fileno()])
        file.seek(0)
        assert (ran.returncode, file.read()) == (0, "hello"), ran.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_go_on_to_the_command(world: World, number: signal.Signals) -> None:
    code = (
        "import signal as s; w = [%d]; s.pthread_sigmask(0, w); print('ready', flush=True); print(int(s.sigwait(w))); raise SystemExit(5)"
    )
    with world.started("org/name", "--", sys.executable, "-c", code % number) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        assert len(world.left()) == 1
        process.send_signal(number)
        out, words = process.communicate(timeout=DEADLINE_SECONDS)
    assert (process.returncode, out, words) == (5, f"{int(number)}\n", "")


def test_sigterm_ends_both_and_removes_the_folder(world: World) -> None:
    with world.started("org/name", "--", "cat") as process:
        _echo(process, "here")
        process.terminate()
        assert process.wait(DEADLINE_SECONDS) == 143


def test_ctrl_c_reaches_the_command_once(world: World) -> None:
    """The terminal tells the whole group; a signal that was passed on as well would arrive before the SIGUSR1 that follows it."""
    code = """
import os, signal
wanted = [signal.SIGINT, signal.SIGUSR1]
signal.pthread_sigmask(signal.SIG_BLOCK, wanted)
print("ready", flush=True)
print(signal.sigwait(wanted).name)
os.kill(os.getppid(), signal.SIGUSR1)
print(signal.sigwait(wanted).name, flush=True)
"""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        world.command("-q", "org/name", "--", sys.executable, "-c", code),
        env=world.environment,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=lambda: ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(theirs)
    try:
        _read_until(ours, b"ready\r\n")
        os.write(ours, b"\x03")
        assert _read_until(ours, b"SIGUSR1\r\n").endswith(b"SIGINT\r\nSIGUSR1\r\n")
        assert process.wait(DEADLINE_SECONDS) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)


# ---- the leases


def test_the_files_are_held_while_the_command_runs(world: World) -> None:
    with world.started("org/name", "datasets/org/data", "--", "cat") as process:
        _echo(process, "here")
        assert world.leases() == 2
        assert world.daemon.status()["connections"] == 1, "only the one that asks"
        process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == 0


def test_a_descendant_holds_the_files_when_the_rest_was_killed(world: World) -> None:
    """What is left behind goes with the next run, once nobody uses it."""
    with world.started("org/name", "--", "sh", "-c", "echo $HF_HUB_CACHE; exec cat") as process:
        assert process.stdin is not None and process.stdout is not None
        cache = Path(process.stdout.readline().strip())
        process.kill()
        process.wait()
        _echo(process, "still here")
        assert world.run("datasets/org/data", "--", "true").returncode == 0, "sweeps, and leaves alone what is in use"
        assert world.leases() == 1 and (next(cache.glob("*/snapshots/*")) / "config.json").read_text() == "second"
        process.stdin.close()
        assert process.stdout.read() == "", "the command has ended"
    assert cache.exists()
    _wait_until_unlocked(cache)
    assert world.run("datasets/org/data", "--", "true").returncode == 0
    assert not cache.exists()


def test_leases_outlive_the_daemon(world: World) -> None:
    with world.started("org/name", "--", "cat") as process:
        _echo(process, "here")
        world.daemon.restart()
        assert world.leases() == 1
        process.communicate(timeout=DEADLINE_SECONDS)


def _echo(process: subprocess.Popen[str], word: str) -> None:
    """The command runs, and is a `cat`."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(word + "\n")
    process.stdin.flush()
    assert process.stdout.readline() == word + "\n"


def _read_until(descriptor: int, wanted: bytes) -> bytes:
    seen = b""
    while wanted not in seen:
        assert select.select([descriptor], [], [], DEADLINE_SECONDS)[0], seen
        seen += os.read(descriptor, 4096)
    return seen


def _wait_until_unlocked(folder: Path) -> None:
    """A pipe's end may be seen before the kernel has closed the rest of what a process held."""
    subprocess.run(["flock", "--timeout", str(int(DEADLINE_SECONDS)), str(folder), "true"], check=True)
