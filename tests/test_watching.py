"""`modelcache.watch` in a process that trains: with a block, without one, and however the process ends. Real daemons, real watchers."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import modelcache
from modelcache import units, watch_client, watching
from modelcache.client import shared
from modelcache.errors import DaemonConnectionError

from . import trainer
from .checkpoints import archive, write
from .conftest import ROOT
from .daemon import IMPORT_PATH, Daemon, clean_environment
from .fake_daemon import Request
from .fake_keeper import FakeKeeper
from .saves import fill, until
from .test_keeping import Private

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with Daemon.start(tmp_path_factory.mktemp("daemon") / "root") as daemon:
        yield daemon


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    return re.sub(r"\W", "-", request.node.name)


@pytest.fixture
def out(tmp_path: Path, daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("MODELCACHE_SOCKET", daemon.socket)
    yield tmp_path / "out"
    shared().close()
    shared().leases.close()


def steps(name: str) -> list[int | None]:
    return [units.step_of(each) for each in units.newest_first(modelcache.list("checkpoint", name))]


def train(out: Path, *some: int) -> None:
    for step in some:
        trainer.save(out, step, trainer.weights_after(step))


def program(code: str, socket: str, *arguments: str, **options: Any) -> subprocess.Popen[str]:
    environment = clean_environment(MODELCACHE_SOCKET=socket, PYTHONPATH=os.pathsep.join([IMPORT_PATH, str(ROOT)]))
    return subprocess.Popen([sys.executable, "-u", "-c", code, *arguments], env=environment, stdout=subprocess.PIPE, text=True, **options)


def test_a_block(out: Path, name: str) -> None:
    with modelcache.watch(out, name, flush_seconds=3) as watched:
        assert (watched.directory, watched.name, watched.where, watched.restored) == (str(out), name, "daemon", None)
        train(out, 10, 20)
    latest = modelcache.latest(name)
    assert latest is not None and latest["unit"] == "checkpoint-20"
    status = watched.stop()  # once more is no more
    assert (status.captured_count, status.pending) == (2, [])
    assert steps(name) == [20, 10]
    with modelcache.watch(out.with_name("again"), name, resume=True, flush_seconds=1) as watched:
        assert watched.restored is not None and watched.restored["unit"] == "checkpoint-20"
        assert trainer.load(out.with_name("again") / "checkpoint-20") == (20, trainer.weights_after(20))
    assert watched.status().captured_count == 0  # what was put back is no news


def test_a_copy_that_was_put_back_is_no_news(out: Path, name: str, tmp_path: Path) -> None:
    """Lightning's last.ckpt, made again of the numbered one."""
    (tmp_path / "rules.json").write_text(json.dumps([{"name": "lightning", "pattern": r".*\.ckpt", "kind": "file", "settle": 0}]))
    layout, unit = str(tmp_path / "rules.json"), "epoch=1-step=20.ckpt"
    with modelcache.watch(out, name, layout=layout, flush_seconds=3):
        write(out, {"last.ckpt": archive(b"10"), unit: archive(b"20")})
        os.utime(out / "last.ckpt", (1, 1))
    for _ in range(2):  # the second one finds all of it there
        with modelcache.watch(tmp_path / "again", name, layout=layout, resume=True, flush_seconds=3) as watched:
            assert watched.restored is not None and (watched.restored["unit"], watched.restored["extra"]) == (unit, "last.ckpt")
            assert (tmp_path / "again/last.ckpt").read_bytes() == archive(b"20")
        assert watched.status().captured_count == 0


def test_an_end_without_time(out: Path, name: str) -> None:
    watched = modelcache.watch(out, name)
    train(out, 10)
    assert len(watching.unfinished(watched.stop(0))) == 1
    until(lambda: steps(name) == [10])


def test_without_a_block_and_without_a_name(out: Path, name: str) -> None:
    watched = modelcache.watch(str(out.with_name(name)))
    assert watched.name == name and repr(watched).startswith("<Watching ")
    train(out.with_name(name), 10)
    until(lambda: watched.status().captured_count == 1)
    assert watched.stop(1).pending == []
    assert steps(name) == [10]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_block_that_fails(out: Path, name: str, error: type[BaseException]) -> None:
    def fail() -> None:
        with modelcache.watch(out, name, flush_seconds=3):
            train(out, 10)
            raise error("it broke")

    with pytest.raises(error, match="it broke"):
        fail()
    assert steps(name) == [10]


def test_what_stays(out: Path, name: str) -> None:
    losses = {10: 3.0, 20: 1.0, 30: 2.0, 40: 2.5}
    with modelcache.watch(out, name, keep=1, keep_best="loss", flush_seconds=3):
        for step, loss in losses.items():
            trainer.save(out, step, b"weights", loss=loss)
    assert steps(name) == [40, 20]
    assert len(trainer.checkpoints(out)) == 4


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"keep": 0}, "at least 1"),
        ({"keep_best": "f1:best"}, "direction"),
        ({"every": -1}, "every is a number of seconds"),
        ({"layout": "unheard-of"}, "no layout is called"),
        ({"name": "a/b"}, "can't contain '/'"),
    ],
)
def test_what_makes_no_sense(out: Path, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        modelcache.watch(out, **arguments)
    assert not out.exists()


def test_a_folder_that_is_none(out: Path) -> None:
    out.write_text("a file")
    with pytest.raises(OSError, match="out"):
        modelcache.watch(out)


KILLED = """
import os, signal, sys
from pathlib import Path
import modelcache
from tests import trainer
out = Path(sys.argv[1])
watched = modelcache.watch(out, sys.argv[2])
trainer.save(out, 10, b"weights")
print("saved", flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_process(out: Path, name: str, daemon: Daemon) -> None:
    with program(KILLED, daemon.socket, str(out), name) as process:
        assert process.communicate(timeout=30)[0] == "saved\n"
    assert process.returncode == -signal.SIGKILL
    until(lambda: steps(name) == [10])


ENDS = """
import os, sys
from pathlib import Path
import modelcache
from tests import trainer
out = Path(sys.argv[1])
watched = modelcache.watch(out, sys.argv[2], flush_seconds=3)
trainer.save(out, 10, b"weights")
if os.fork() == 0:
    sys.exit()  # its parent's watch is not its own
os.wait()
print(watched.status().captured_count, flush=True)
"""


def test_the_end_of_a_process_waits_for_a_private_daemon(tmp_path: Path) -> None:
    """It may end with the job's container."""
    store = tmp_path / "store"
    with Private.start(tmp_path / "root", store=f"file://{store}") as daemon:
        with program(ENDS, daemon.socket, str(tmp_path / "out"), "run") as process:
            assert process.communicate(timeout=30)[0] == "0\n" and process.returncode == 0
        assert len(list(store.rglob("refs/**/*.run.*.json"))) == 1


def test_the_end_of_a_process_does_not_wait_for_a_nodes_daemon(out: Path, name: str, daemon: Daemon) -> None:
    with program(ENDS, daemon.socket, str(out), name) as process:
        assert process.communicate(timeout=30)[0] == "0\n" and process.returncode == 0
        assert steps(name) == []  # it has to be quiet for longer than the process took
    until(lambda: steps(name) == [10])


WAITS_FOR_A_SIGNAL = """
import os, signal, sys
import modelcache
mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
with modelcache.watch(sys.argv[1], sys.argv[2], flush_seconds=1):
    os.kill(os.getpid(), signal.SIGUSR1)
    assert signal.sigtimedwait([signal.SIGUSR1], 5) is not None
assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == mask | {signal.SIGUSR1}
"""


def test_signals_stay_the_programs(out: Path, name: str, daemon: Daemon) -> None:
    """No thread of ours takes one that the program blocks to wait for it."""
    with program(WAITS_FOR_A_SIGNAL, daemon.socket, str(out), name) as process:
        assert process.wait(30) == 0


def test_what_is_not_in_the_store_is_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    with Daemon.start(tmp_path / "root") as daemon:
        monkeypatch.setenv("MODELCACHE_SOCKET", daemon.socket)
        fill(daemon.root / "store", {"blobs": b"no folder: nothing can be put into it"})
        with modelcache.watch(tmp_path / "out", "run", flush_seconds=3):
            train(tmp_path / "out", 10)
        assert ["1 checkpoint of run not in the store yet" in text for text in caplog.messages] == [True]
        (daemon.root / "store/blobs").unlink()
        modelcache.flush(everything=True)
        shared().close()
        shared().leases.close()


@pytest.mark.skipif(os.getuid() != 0, reason="takes root: the daemon has another uid than the trainer")
def test_a_daemon_of_another_user(shared_tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Daemon.start(shared_tmp_path / "root", uid=1500) as daemon:
        monkeypatch.setenv("MODELCACHE_SOCKET", daemon.socket)
        out = shared_tmp_path / "out"
        with modelcache.watch(out, "run", flush_seconds=3) as watched:
            assert watched.where.startswith("helper ")
            train(out, 10)
        assert steps("run") == [10] and watching.unfinished(watched.status()) == []
        shared().close()
        shared().leases.close()


# ---- watchers and daemons that do not do what they should


Peer = Callable[[socket.socket, dict[str, Any]], None]


def serve(keeper: FakeKeeper, *peers: Peer) -> list[dict[str, Any]]:
    """The watchers that the daemon begins, one after the other: each is told how to obey. What they were asked first."""
    asked: list[dict[str, Any]] = []
    left = iter(peers)

    def obey(control: socket.socket, peer: Peer) -> None:
        with control, control.makefile() as lines:
            asked.append(json.loads(lines.readline())["ask"])
            control.sendall(b'{"where": "daemon"}\n')
            for line in lines:
                peer(control, json.loads(line))

    def watch(request: Request) -> None:
        ours, theirs = socket.socketpair()
        keeper.spawn(obey, ours, next(left))
        request.reply({"here": True}, [theirs.detach()])

    keeper.answers["watch"] = watch
    return asked


def ends(control: socket.socket, _: dict[str, Any]) -> None:
    control.shutdown(socket.SHUT_RDWR)


def says_nothing(_: socket.socket, __: dict[str, Any]) -> None: ...


def answers(control: socket.socket, order: dict[str, Any]) -> None:
    assert order["do"] == "status" or 0 < order["deadline"] <= 60
    status = watch_client.Status("out", "run", "daemon", [], 0, [], "", [], False)
    control.sendall(json.dumps(status._asdict()).encode() + b"\n")


def test_a_watcher_that_ended_is_replaced_at_the_end(keeper: FakeKeeper, tmp_path: Path) -> None:
    """What was put back is put back no more: by then the trainer may have changed it."""
    asked = serve(keeper, ends, answers)
    watch = watch_client.start(watch_client.Ask(str(tmp_path), "run", restored=("last.pt",)))
    assert watch.stop(60.0).captured_count == 0
    assert [each["restored"] for each in asked] == [["last.pt"], []]


def test_no_watcher_stays_until_the_end(keeper: FakeKeeper, tmp_path: Path) -> None:
    serve(keeper, ends, ends)
    with pytest.raises(RuntimeError, match="the user's own"), modelcache.watch(tmp_path / "out", "run", flush_seconds=60):
        raise RuntimeError("the user's own")
    serve(keeper, ends, ends)
    with pytest.raises(DaemonConnectionError, match="has ended"):
        modelcache.watch(tmp_path / "out", "run").stop(60.0)


def test_a_watcher_that_does_not_answer_at_the_end(keeper: FakeKeeper, tmp_path: Path) -> None:
    """It is at work on the last checkpoint: another one would do the same once more."""
    asked = serve(keeper, says_nothing, answers)
    watch = watch_client.Watch(watch_client.Ask(str(tmp_path), "run"), patience=1.0)
    for _ in range(2):
        with pytest.raises(DaemonConnectionError, match="still at work"):
            watch.stop(0.0)
    assert len(asked) == 1


def with_a_helper(keeper: FakeKeeper) -> threading.Event:
    """The daemon may not read the folder, and begins no save before the event."""
    goes_on, save_open = threading.Event(), keeper.answers["save_open"]

    def when_told(request: Request) -> None:
        goes_on.wait()
        save_open(request)

    keeper.answers["watch"] = lambda request: request.reply({"here": False})
    keeper.answers["watch_told"] = lambda request: request.reply({})
    keeper.answers["save_open"] = when_told
    return goes_on


@pytest.mark.parametrize("is_begun", [False, True], ids=["begun by the end", "begun before"])
def test_a_capture_that_outlasts_the_end(keeper: FakeKeeper, tmp_path: Path, is_begun: bool, caplog: pytest.LogCaptureFixture) -> None:
    goes_on = with_a_helper(keeper)
    try:
        with modelcache.watch(tmp_path / "out", "run", flush_seconds=2) as watched:
            helper = os.pidfd_open(int(watched.where.split()[1]))
            train(tmp_path / "out", 10)
            if is_begun:
                while keeper.next_request().method != "save_open":
                    pass
        status = watched.status()
        assert (status.captured_count, status.unfinished) == (0, ["checkpoint-10"])
        said = f"not captured yet of run: 'checkpoint-10'; the watcher ({watched.where}) goes on"
        assert [said in text for text in caplog.messages] == [True]
        ended = select.poll()
        ended.register(helper, select.POLLIN)
        assert not ended.poll(3000)  # it is there for as long as the capture takes
    finally:
        goes_on.set()
    assert ended.poll(30_000)
    assert [kept.reference["unit"] for kept in keeper.kept.values()] == ["checkpoint-10"]
    os.close(helper)


def test_a_daemon_that_comes_back_waits_for_what_was_captured_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Daemon.start(tmp_path / "root") as daemon:
        monkeypatch.setenv("MODELCACHE_SOCKET", daemon.socket)
        fill(daemon.root / "store", {"blobs": b"no folder: nothing can be put into it"})
        watched = modelcache.watch(tmp_path / "out", "run")
        train(tmp_path / "out", 10)
        until(lambda: watched.status().captured_count == 1)
        (captured,) = watched.status().captured
        daemon.kill()
        daemon.restart()
        status = watched.stop(2)
        assert (status.captured_count, status.pending, status.unfinished) == (0, [captured.key], [])
        (daemon.root / "store/blobs").unlink()
        modelcache.flush(everything=True)
        shared().close()
        shared().leases.close()


def test_a_daemon_that_comes_back_knows_a_changed_file_from_what_was_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trainer that writes into the same file again and again."""
    with Daemon.start(tmp_path / "root") as daemon:
        monkeypatch.setenv("MODELCACHE_SOCKET", daemon.socket)
        with modelcache.watch(tmp_path / "out", "run", flush_seconds=5):
            write(tmp_path / "out", {"last.pt": archive()})
        watched = modelcache.watch(tmp_path / "again", "run", resume=True)
        assert watched.restored is not None and watched.restored["unit"] == "last.pt"
        daemon.kill()
        write(tmp_path / "again", {"last.pt": archive(b"changed")})
        daemon.restart()
        assert [each.unit for each in watched.stop(5).captured] == ["last.pt"]
        shared().close()
        shared().leases.close()
