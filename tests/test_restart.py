"""An upgrade in the middle of everything: fifty tasks fetch and save while their daemon ends and another takes its place.

The socket is held by a supervisor, as systemd holds it (tests/test_boot.py): callers wait there, and continue. Nothing is lost, refused
or done twice over: every fetch has the right bytes, every save is in the store, whole.
"""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from .clients import Client, Tree, hashes
from .daemon import IMPORT_PATH, clean_environment
from .hub import Hub, Random
from .saves import contents, fill, in_folder, until

pytestmark = [pytest.mark.soak, pytest.mark.timeout(300)]

TASKS = 25  # fetch, and as many save
HELD = 15  # of those that save wait for a file that somebody still writes
MIB = 1 << 20


class Supervisor:
    """Holds the socket, and runs one daemon after the other on it."""

    def __init__(self, folder: Path, hub: Hub) -> None:
        self.socket, self.root, self.log = folder / "s", folder / "root", folder / "log"
        self._flags = ["--root", str(self.root), "--hub-endpoint", hub.endpoint, "--min-free", "0"]
        self._flags += ["--shutdown-seconds", "2", "--log-level", "debug"]  # most are told to ask again
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(str(self.socket))
        self._listening.listen(1024)
        self.process = self._start()

    def end(self, number: signal.Signals) -> int:
        """Ends the daemon so; the exit code. Nobody accepts connections from now on."""
        self.process.send_signal(number)
        return self.process.wait(60)

    def start(self) -> None:
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        # Between: the descriptor has to be number 3.
        code = "import os, sys; os.dup2(int(sys.argv[1]), 3); os.execv(sys.executable, [sys.executable, *sys.argv[2:]])"
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-c", code, str(self._listening.fileno()), "-m", "modelcached", "serve", *self._flags],
                env=clean_environment(PYTHONPATH=IMPORT_PATH, LISTEN_FDS="1", LISTEN_PID="auto"),
                pass_fds=[self._listening.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._listening.close()


@pytest.fixture
def supervisor(shared_tmp_path: Path, hub: Hub) -> Iterator[Supervisor]:
    running = Supervisor(shared_tmp_path, hub)
    yield running
    running.close()
    print(running.log.read_text())  # seen when the test fails


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["orderly", "killed"])
def test_nothing_is_lost(supervisor: Supervisor, hub: Hub, tmp_path: Path, number: signal.Signals) -> None:
    prefix = f"org/{number.name.lower()}"
    repos: dict[str, Tree] = {
        f"{prefix}-{n}": {"a.safetensors": Random(f"{prefix}-{n}", 2 * MIB), "b.json": b"{}"} for n in range(TASKS)
    }
    for repo, tree in repos.items():
        hub.commit(repo, tree)
    made: dict[str, Tree] = {
        f"saved-{n}": {"weights": Random(f"saved-{n}", 4 * MIB), "config.json": b"%d" % n} for n in range(TASKS)
    }
    for name, tree in made.items():
        fill(tmp_path / name, tree)
    environment = clean_environment(MODELCACHE_SOCKET=str(supervisor.socket), MODELCACHE_CONNECT_SECONDS="60")
    with contextlib.ExitStack() as stack:
        fetching = {repo: stack.enter_context(Client(environment)) for repo in repos}
        saving = {name: stack.enter_context(Client(environment)) for name in made}
        hub.misbehave("slow", match="^lfs", rate=8 * MIB)  # so that they are not done before the daemon ends
        written = stack.enter_context(contextlib.ExitStack())
        for name in list(made)[:HELD]:
            written.enter_context((tmp_path / name / "weights").open("ab"))
        for repo, task in fetching.items():
            task.begin("snapshot_download", repo_id=repo, hashes=True)
        for name, task in saving.items():
            task.begin("save", path=str(tmp_path / name), label=name)
        hub.wait(kind="lfs", requests=3, timeout=60)
        until(lambda: sum(1 for _ in (supervisor.root / "tmp").glob("save-*")) >= HELD)
        running = [sum(not task.has_answered for task in tasks.values()) for tasks in (fetching, saving)]
        print(f"running: {running[0]} fetches, {running[1]} saves")
        assert running[0] >= TASKS // 2 and running[1] >= HELD
        assert supervisor.end(number) == (0 if number == signal.SIGTERM else -number)
        written.close()
        supervisor.start()
        hub.calm()
        for repo, tree in repos.items():
            assert fetching[repo].good(120).files == hashes(tree)
        keys = {name: task.good(120).value["key"] for name, task in saving.items()}
        assert supervisor.end(signal.SIGTERM) == 0
        supervisor.start()  # and once more, with nothing but the spool to bring along
        saving["saved-0"].begin("flush", everything=True)
        saving["saved-0"].good(120)
    assert len(set(keys.values())) == TASKS
    assert contents(*in_folder(supervisor.root / "store")) == {keys[name]: hashes(tree) for name, tree in made.items()}
