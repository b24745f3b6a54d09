"""`modelcache watch` and `modelcache checkpoints`: a real trainer under a real watch, and every way in which it can end."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from . import trainer
from .conftest import ROOT
from .daemon import IMPORT_PATH, Daemon, clean_environment
from .fake_keeper import FakeKeeper
from .saves import fill, until
from .test_cli import DEADLINE_SECONDS, run, started
from .test_watching import ends, serve, with_a_helper

pytestmark = [pytest.mark.slow, pytest.mark.timeout(90)]

TRAINER = [sys.executable, "-u", "-m", "tests.trainer"]
END = f"ended 30 {trainer.weights_after(30).hex()}\n"


class World:
    """A node; `name` is of the test's own checkpoints."""

    def __init__(self, daemon: Daemon | FakeKeeper, folder: Path, name: str) -> None:
        self.folder = folder
        self.name = name
        self.out = folder / "out"
        path, socket = os.pathsep.join([IMPORT_PATH, str(ROOT)]), str(daemon.socket if isinstance(daemon, Daemon) else daemon.socket_path)
        self.environment = clean_environment(HOME=str(folder), MODELCACHE_SOCKET=socket, PYTHONPATH=path)

    def words(self, *options: str, out: Path | None = None) -> list[str]:
        return ["watch", str(out or self.out), "--name", self.name, "--deadline", "3s", *options]

    def watch(self, *options: str, out: Path | None = None) -> subprocess.CompletedProcess[str]:
        return run(self.environment, *self.words(*options, out=out))

    def train(self, *arguments: str, options: tuple[str, ...] = (), out: Path | None = None) -> subprocess.CompletedProcess[str]:
        return self.watch(*options, "--", *TRAINER, str(out or self.out), *arguments, out=out)

    @property
    def checkpoints(self) -> list[dict[str, Any]]:
        said = json.loads(run(self.environment, "checkpoints", self.name, "--json").stdout)
        assert said["name"] == self.name
        return list(said["checkpoints"])

    @property
    def steps(self) -> list[int]:
        return [each["step"] for each in self.checkpoints]


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with Daemon.start(tmp_path_factory.mktemp("daemon") / "root") as daemon:
        yield daemon


@pytest.fixture
def world(daemon: Daemon, tmp_path: Path, request: pytest.FixtureRequest) -> World:
    return World(daemon, tmp_path, re.sub(r"\W", "-", request.node.name))


def test_killed_and_resumed_on_another_node(tmp_path: Path) -> None:
    """The run that was killed and went on elsewhere ends as one that nobody disturbed."""
    store = f"file://{tmp_path}/store"
    with Daemon.start(tmp_path / "here", store=store) as here, Daemon.start(tmp_path / "there", store=store) as there:
        first, second = World(here, tmp_path / "a", "run-7"), World(there, tmp_path / "b", "run-7")
        first.folder.mkdir()
        second.folder.mkdir()
        killed = first.train("--kill", "25", "--limit", "1", options=("--resume",))
        assert (killed.returncode, killed.stdout) == (128 + signal.SIGKILL, ""), killed.stderr
        assert "nothing was put back" in killed.stderr and "; everything is in the store" in killed.stderr
        assert first.steps[0] == 20
        resumed = second.train(options=("--resume",))
        assert (resumed.returncode, resumed.stdout) == (0, "resumed 20\n" + END), resumed.stderr
        assert f"begins with {second.out}/checkpoint-20, step 20\n" in resumed.stderr
        assert second.steps[:2] == [30, 20]
        again = second.train(options=("--resume",))  # nothing new: what is there was kept already
        assert again.stdout == "resumed 30\n" + END and "kept 0 checkpoints" in again.stderr


@pytest.mark.parametrize("code", [0, 3])
def test_the_end_is_the_commands(world: World, code: int) -> None:
    ended = world.train("--code", str(code), options=("--json",))
    assert ended.returncode == code and ended.stdout == END  # stdout is the command's
    document = json.loads(next(line for line in ended.stderr.splitlines() if line.startswith("{")))
    assert [each["step"] for each in document["captured"]] and document["pending"] == []
    assert world.steps == [30, 20, 10]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_goes_on_to_the_command(world: World, number: signal.Signals) -> None:
    with started(world.environment, *world.words("--", *TRAINER, str(world.out), "--wait", "25")) as process:
        assert process.stdout is not None and process.stdout.readline() == "waiting 25\n"
        process.send_signal(number)
    assert process.returncode in (128 + number, 1)  # Python's own way to end at Ctrl-C
    assert world.steps == [20, 10]


def test_a_command_that_ends_well_when_it_is_told_to(world: World) -> None:
    code = "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(0)); print('ready', flush=True); signal.pause()"
    with started(world.environment, *world.words("--", sys.executable, "-c", code)) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        process.terminate()
    assert process.returncode == 0


@pytest.mark.parametrize("code", [0, 3])
def test_what_is_not_in_the_store_is_said(tmp_path: Path, code: int) -> None:
    """It is the exit code only where the command has none of its own."""
    with Daemon.start(tmp_path / "root") as daemon:
        world = World(daemon, tmp_path, "run")
        (daemon.root / "store").mkdir(exist_ok=True)
        fill(daemon.root / "store", {"blobs": b"no folder: nothing can be put into it"})
        ended = world.train("--code", str(code))
        assert ended.returncode == (code or 9), ended.stderr
        assert "3 checkpoints of run not in the store yet" in ended.stderr and "the daemon goes on" in ended.stderr
        assert {each["state"] for each in world.checkpoints} == {"captured"}
        (daemon.root / "store/blobs").unlink()
        until(lambda: {each["state"] for each in world.checkpoints} == {"uploaded"})
        assert world.steps == [30, 20, 10]


@pytest.mark.parametrize("code", [0, 3])
def test_what_is_not_captured_is_said(keeper: FakeKeeper, tmp_path: Path, code: int) -> None:
    """The last checkpoint takes longer than the deadline: it is captured all the same, by a watcher that outlives us."""
    world, goes_on = World(keeper, tmp_path, "run"), with_a_helper(keeper)
    try:
        ended = world.train("--code", str(code))
        assert ended.returncode == (code or 9), ended.stderr
        said = re.search(r"not captured yet of run: 'checkpoint-10', .*'checkpoint-30'; the watcher \(helper (\d+)\) goes on", ended.stderr)
        assert said is not None and "everything" not in ended.stderr, ended.stderr
        helper = os.pidfd_open(int(said[1]))
    finally:
        goes_on.set()
    is_over = select.poll()
    is_over.register(helper, select.POLLIN)
    assert is_over.poll(30_000)
    assert {kept.reference["unit"] for kept in keeper.kept.values()} == {"checkpoint-10", "checkpoint-20", "checkpoint-30"}
    os.close(helper)


def test_no_watcher_at_the_end(keeper: FakeKeeper, tmp_path: Path) -> None:
    """The command's code is the end's, whatever becomes of the watch."""
    world = World(keeper, tmp_path, "run")
    serve(keeper, ends, ends)
    ended = world.watch("--", "sh", "-c", "exit 3")
    assert ended.returncode == 3 and "gives no answer: it has ended" in ended.stderr, ended.stderr


def test_a_second_signal_ends_the_waiting(tmp_path: Path) -> None:
    with Daemon.start(tmp_path / "root") as daemon:
        world = World(daemon, tmp_path, "run")
        (daemon.root / "store").mkdir(exist_ok=True)
        fill(daemon.root / "store", {"blobs": b"no folder: nothing can be put into it"})
        words = ["watch", str(world.out), "--name", "run", "--deadline", "10m", "--", *TRAINER, str(world.out)]
        with started(world.environment, *words) as process:
            until(lambda: len(world.checkpoints) == 3)
            process.terminate()
        assert process.returncode == 9
        (daemon.root / "store/blobs").unlink()
        assert run(world.environment, "flush").returncode == 0
        assert world.steps == [30, 20, 10]


def has(pid: int, field: str, number: signal.Signals) -> bool:
    """Whether a signal is in that set (SigBlk, SigIgn, SigCgt) of a process."""
    found = re.search(rf"{field}:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return bool(int(found[1], 16) >> (number - 1) & 1)


IGNORED = [signal.SIGHUP, signal.SIGINT, signal.SIGTERM]  # as by nohup, and by what a shell runs in the background


@pytest.mark.parametrize("number", IGNORED)
def test_a_signal_that_is_ignored_stays_ignored(world: World, number: signal.Signals) -> None:
    """The command may take it again, and gets those that are meant for it, not ours."""
    code = (
        "import signal as s, sys; s.pthread_sigmask(s.SIG_BLOCK, [int(sys.argv[1]), s.SIGUSR1, s.SIGUSR2]); print('ready', flush=True);"
        "s.sigwait([s.SIGUSR2]); print(*map(int, s.sigpending()))"
    )
    words = world.words("--", sys.executable, "-c", code, str(int(number)))
    with started(world.environment, *words, preexec_fn=lambda: signal.signal(number, signal.SIG_IGN)) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        child = child_of(process.pid)
        assert [has(each, "SigIgn", number) for each in (process.pid, child)] == [True, True]
        assert not has(process.pid, "SigBlk", number)
        process.send_signal(number)
        process.send_signal(signal.SIGUSR1)
        until(lambda: has(child, "ShdPnd", signal.SIGUSR1))
        os.kill(child, signal.SIGUSR2)
        out, _ = process.communicate(timeout=DEADLINE_SECONDS)
    assert (process.returncode, out) == (0, f"{int(signal.SIGUSR1)}\n")


@pytest.mark.parametrize("number", IGNORED)
def test_a_signal_that_is_ignored_does_not_end_it(world: World, number: signal.Signals) -> None:
    with started(world.environment, *world.words(), preexec_fn=lambda: signal.signal(number, signal.SIG_IGN)) as process:
        assert process.stderr is not None and process.stderr.readline().startswith("watching ")
        process.send_signal(number)
        assert [has(process.pid, field, number) for field in ("SigIgn", "SigBlk")] == [True, False]
        process.send_signal(signal.SIGQUIT)
    assert process.returncode == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_without_a_command_until_a_signal(world: World, number: signal.Signals) -> None:
    with started(world.environment, *world.words()) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == f"watching {world.out} as {world.name} (daemon)\n"
        trainer.save(world.out, 10, b"weights")
        process.send_signal(number)
        out, _ = process.communicate(timeout=DEADLINE_SECONDS)
    assert process.returncode == 0
    assert out.splitlines() == [each["key"] for each in world.checkpoints] and world.steps == [10]


def test_the_command_outlives_us(world: World) -> None:
    """A kill -9 of `modelcache` alone: what the trainer writes afterwards is kept."""
    with started(world.environment, *world.words("--", *TRAINER, str(world.out), "--wait", "15", "--steps", "20")) as process:
        assert process.stdout is not None and process.stdout.readline() == "waiting 15\n"
        child = child_of(process.pid)
        process.kill()
        process.wait()
        os.kill(child, signal.SIGUSR1)  # go on
        assert process.stdout.readline().startswith("ended 20 ")
    until(lambda: world.steps == [20, 10])


def test_what_stays(world: World) -> None:
    assert world.train("--steps", "40", options=("--keep", "2")).returncode == 0
    assert world.steps == [40, 30] and len(trainer.checkpoints(world.out)) == 4
    assert world.watch("--keep-best", "loss:max", "--", "true").returncode == 0  # the folder still has those that went
    assert world.steps == [40, 10]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--keep", "0"], "at least 1"),
        (["--keep-best", "f1:best"], "the direction of 'f1:best'"),
        (["--layout", "unheard-of"], "no layout is called 'unheard-of'"),
        (["--name", "a/b"], "can't contain '/'"),
        (["--every", "often"], "is not a duration"),
    ],
)
def test_words_that_make_no_sense(world: World, words: list[str], said: str) -> None:
    ran = run(world.environment, "watch", str(world.out), *words, "--", "touch", str(world.folder / "ran"))
    assert ran.returncode == 2 and said in ran.stderr, ran.stderr
    assert not world.out.exists() and not (world.folder / "ran").exists()


def test_no_folder(world: World) -> None:
    world.out.write_text("a file")
    ran = world.watch("--", "true")
    assert ran.returncode == 2 and "is no folder" in ran.stderr


def test_no_command_of_that_name(world: World) -> None:
    assert world.watch("--", "no-such-command").returncode == 127


def test_no_daemon(world: World) -> None:
    """Nothing runs that nobody would watch."""
    socket = str(world.folder / "nobody.sock")
    ran = run({**world.environment, "MODELCACHE_SOCKET": socket}, *world.words("--", "touch", str(world.folder / "ran")))
    assert ran.returncode == 5 and not (world.folder / "ran").exists()


def test_checkpoints_in_words(world: World) -> None:
    assert world.train().returncode == 0
    fill(world.folder / "mine", {"a": b"a"})
    words = ("save", str(world.folder / "mine"), "--kind", "checkpoint", "--name", world.name, "--flush")
    saved = run(world.environment, *words).stdout.strip()
    head, newest, *rest = run(world.environment, "checkpoints", world.name).stdout.splitlines()
    assert head.split() == ["STEP", "WRITTEN", "SIZE", "STATE", "COMPLETE", "UNIT", "KEY"]
    assert newest.split()[0] == "-" and newest.endswith(saved) and " uploaded  yes " in newest
    assert [line.split()[0] for line in rest] == ["30", "20", "10"]
    assert all(f"checkpoint-{step} " in line for step, line in zip((30, 20, 10), rest, strict=True))
    nothing = run(world.environment, "checkpoints", "unheard-of")
    assert (nothing.returncode, nothing.stdout) == (0, "") and "no checkpoint is called unheard-of" in nothing.stderr


def test_a_checkpoint_on_its_way_from_another_node_is_listed(tmp_path: Path) -> None:
    store = f"file://{tmp_path}/store"
    with Daemon.start(tmp_path / "here", store=store) as here, Daemon.start(tmp_path / "there", store=store) as there:
        (tmp_path / "store").mkdir(exist_ok=True)
        fill(tmp_path / "store", {"blobs": b"no folder: nothing can be put into it"})
        fill(tmp_path / "mine", {"a": b"a"})
        away, world = World(there, tmp_path, "run"), World(here, tmp_path, "run")
        run(away.environment, "save", str(tmp_path / "mine"), "--kind", "checkpoint", "--name", "run")
        until(lambda: bool(world.checkpoints))
        assert [each["state"].startswith("on ") for each in world.checkpoints] == [True]
        (tmp_path / "store/blobs").unlink()


@pytest.mark.soak
@pytest.mark.timeout(300)
def test_killed_at_random_points(tmp_path: Path) -> None:
    """The trainer, or `modelcache` and the trainer together, by kill -9; each run goes on in a new folder, on the other of two nodes.

    What was whole when the kill came is what the next run begins with; the last one ends as one that nobody disturbed.
    """
    seed, last = int.from_bytes(os.urandom(4)), 250
    chance = random.Random(seed)
    store = f"file://{tmp_path}/store"
    with Daemon.start(tmp_path / "here", store=store) as here, Daemon.start(tmp_path / "there", store=store) as there:
        whole, kills = 0, 0
        for number in range(100):
            world = World((here, there)[number % 2], tmp_path, "run")
            world.out = tmp_path / f"out{number}"
            ended, said = one_life(world, whole, last, chance.uniform(0.0, 0.8), is_together=kills % 2 == 1)
            assert said.startswith(f"resumed {whole}\n" if whole else ""), (seed, number, said)
            whole = newest_whole(world.out)
            wait_for(world, whole)  # which nobody did, if both were killed
            if ended:
                assert said.endswith(f"ended {last} {trainer.weights_after(last).hex()}\n")
                break
            kills += 1
        else:
            raise AssertionError(f"it never came to its end; seed {seed}")
    print("seed", seed, "kills", kills)
    assert kills >= 2, f"too few to tell: {kills}, seed {seed}"


def one_life(world: World, before: int, last: int, seconds: float, is_together: bool) -> tuple[bool, str]:
    """Whether it came to its end before the kill, and what the trainer said."""
    trained = [*TRAINER, str(world.out), "--steps", str(last), "--every", "5", "--limit", "3", "--pace", "0.01"]
    with started(world.environment, *world.words("--resume", "--", *trained), start_new_session=True) as process:
        assert process.stdout is not None
        until(lambda: newest_whole(world.out) > before)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
        if process.poll() is None and is_together:
            os.killpg(process.pid, signal.SIGKILL)
        elif process.poll() is None:
            with contextlib.suppress(ValueError, ProcessLookupError):  # it has ended, and is waited for
                os.kill(child_of(process.pid), signal.SIGKILL)
        process.wait()
        said = process.stdout.read()
    return "ended" in said, said


def wait_for(world: World, step: int) -> None:
    until(lambda: world.steps[:1] == [step])


def child_of(pid: int) -> int:
    (child,) = (int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    return child


def newest_whole(folder: Path) -> int:
    """Its step; 0 if there is none."""
    for made in reversed(trainer.checkpoints(folder)):
        with contextlib.suppress(OSError, ValueError):
            step, _ = trainer.load(made)
            if made.name == f"checkpoint-{step}":
                return step
    return 0
