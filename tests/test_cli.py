"""The `modelcache` command as its users meet it: a real process, a real daemon, a real hub; output, exit codes, mistakes.

`exec` is tested in test_cli_exec.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from .conftest import as_uid
from .daemon import IMPORT_PATH, Daemon, clean_environment
from .hub import Hub, Random

DEADLINE_SECONDS = 15.0
WEIGHTS = Random("weights", 3_000_000)
LARGE = Random("large", 6_000_000)
SLOW = 400_000  # bytes a second: a pull of LARGE takes longer than any test
TOKEN = "hf_accepted"


class World(NamedTuple):
    hub: Hub
    daemon: Daemon
    folder: Path
    commit: str  # of org/name

    def environment(self, **more: str) -> dict[str, str]:
        return clean_environment(HOME=str(self.folder), MODELCACHE_SOCKET=self.daemon.socket, **more)

    def run(self, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
        return run(self.environment(**more), *words)

    def json(self, *words: str, **more: str) -> Any:
        return json.loads(self.run("--json", *words, **more).stdout)


def run(environment: dict[str, str], *words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-m", "modelcache", *words]
    return subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=DEADLINE_SECONDS, cwd=cwd
    )


@contextlib.contextmanager
def started(environment: dict[str, str], *words: str, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A command that is still running; killed at the end if the test failed to end it."""
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "modelcache", *words],
        **{"env": environment, "stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options},
    )
    try:
        with process:
            yield process
            process.communicate(timeout=DEADLINE_SECONDS)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("cli")
    with Hub.start(folder) as hub, Daemon.start(folder / "root", hub, fresh_seconds=0, hub_attempts=1) as daemon:
        hub.commit("org/name", {"config.json": b"{}", "sub/größe.txt": b"x", "model.safetensors": WEIGHTS})
        hub.tag("org/name", "v1")
        commit = hub.commit("org/name", {"config.json": b'{"v": 2}'})
        hub.commit("org/large", {"large.safetensors": LARGE})
        hub.commit("org/small", {"config.json": b"{}", "weights.safetensors": Random("small", 100_000)})
        hub.commit("org/data", {"train.csv": b"1,2\n"}, repo_type="dataset")
        hub.commit("org/gated", {"config.json": b"gated"}, gated=True, tokens=[TOKEN])
        hub.commit("org/private", {"config.json": b"private"}, private=True, tokens=[TOKEN])
        yield World(hub, daemon, folder, commit)


@pytest.fixture(autouse=True)
def _calm(world: World) -> Iterator[None]:
    yield
    world.hub.calm()
    world.hub.reset_log()


# ---- pull


def test_pull_prints_the_path_and_says_what_it_is(world: World) -> None:
    ran = world.run("pull", "org/name")
    assert ran.returncode == 0, ran.stderr
    path = Path(ran.stdout.removesuffix("\n"))
    assert (path / "config.json").read_bytes() == b'{"v": 2}'
    assert (path / "model.safetensors").stat().st_size == WEIGHTS.size
    assert f"org/name@main: commit {world.commit}, 3 files, 3.0 MB in " in ran.stderr and ran.stderr.count("\n") == 1
    assert ran.stderr.endswith(" from the hub\n") and "\x1b" not in ran.stderr

    said = world.json("pull", "org/name@v1", "--include", "*.json")
    assert said["revision"] == "v1" and said["files"] == 1 and said["size_bytes"] == 2 and not said["is_private"]
    assert os.listdir(said["path"]) == ["config.json"]


def test_pull_names_revision_and_type_in_several_ways(world: World) -> None:
    by_name, by_option = world.run("pull", "org/name@v1"), world.run("pull", "org/name", "--revision", "v1")
    assert by_name.stdout == by_option.stdout != world.run("pull", "org/name").stdout
    assert world.run("pull", "datasets/org/data").stdout == world.run("pull", "org/data", "--repo-type", "dataset").stdout != ""


def test_pull_to_a_folder_gives_private_files(world: World, tmp_path: Path) -> None:
    target = tmp_path / "deep" / "model"
    ran = world.run("pull", "org/name", "--to", str(target))
    assert ran.stdout == f"{target}\n", ran.stderr
    (target / "config.json").write_text("mine")
    (target / "notes.txt").write_text("mine too")
    again = world.run("pull", "org/name", "--to", str(target), "--exclude", "*.safetensors")
    assert again.returncode == 0 and "notes.txt" in again.stderr
    assert (target / "config.json").read_text() == '{"v": 2}' and (target / "notes.txt").read_text() == "mine too"
    view = Path(world.run("-q", "pull", "org/name").stdout.strip())
    assert not os.path.samefile(view / "config.json", target / "config.json")


def test_pull_checks_the_folder_before_it_downloads(world: World, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    ran = world.run("pull", "org/large", "--to", str(tmp_path / "file" / "below"))
    assert ran.returncode == 1 and "file: not a folder" in ran.stderr
    assert world.hub.requests() == []


def test_dry_run_tells_and_fetches_nothing(world: World) -> None:
    ran = world.run("pull", "org/large", "--dry-run")
    assert ran.returncode == 0 and ran.stdout.splitlines()[1].split() == ["fetch", "6.0", "MB", "large.safetensors"]
    assert "1 of 1 file to fetch, 6.0 MB" in ran.stderr
    said = world.json("pull", "org/large", "--dry-run")
    assert said["files"] == [{"path": "large.safetensors", "size_bytes": LARGE.size, "is_cached": False}]
    assert said["to_fetch_bytes"] == LARGE.size and world.hub.bytes_sent() == 0


def test_offline_asks_no_hub(world: World) -> None:
    path = world.run("pull", "org/small").stdout
    world.hub.reset_log()
    assert world.run("pull", "--offline", "org/small").stdout == path
    assert world.run("pull", "org/small", HF_HUB_OFFLINE="1").stdout == path
    assert world.run("pull", "--offline", "org/large").returncode == 3
    assert world.hub.requests() == []


def test_force_mends_what_was_damaged(world: World, tmp_path: Path) -> None:
    path = Path(world.run("pull", "org/small").stdout.strip())
    _damage(path / "weights.safetensors")
    assert world.run("pull", "org/small", "--force").returncode == 0
    world.run("pull", "org/small", "--to", str(tmp_path))
    assert (tmp_path / "weights.safetensors").read_bytes() == (path / "weights.safetensors").read_bytes()
    assert world.run("verify").returncode == 0


def test_private_and_gated_repos_need_the_callers_token(world: World) -> None:
    for repo, code in (("org/gated", 4), ("org/private", 3)):
        assert world.run("pull", repo).returncode == code
        assert world.run("pull", repo, "--token", TOKEN).returncode == 0
        assert world.run("pull", repo, HF_TOKEN=TOKEN).returncode == 0
        assert world.run("pull", repo).returncode == code, "what is here is not for everybody"
        refused = world.run("pull", repo, "--token", "hf_wrong")
        assert refused.returncode == 4 and "hf_wrong" not in refused.stderr
    assert TOKEN not in world.daemon.log


# ---- mistakes


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ([], 2, "arguments are required: COMMAND"),
        (["pul", "org/name"], 2, "invalid choice: 'pul'"),
        (["pull"], 2, "arguments are required: REPO"),
        (["pull", "org/name", "--inc", "x"], 2, "unrecognized arguments: --inc"),
        (["pull", "org/name", "--repo-type", "thing"], 2, "invalid choice: 'thing'"),
        (["pull", "a/b/c"], 2, "'a/b/c'"),
        (["pull", "org/name@"], 2, "nothing follows the @"),
        (["pull", "org/name@v1", "--revision", "main"], 2, "two revisions"),
        (["pull", "datasets/org/data", "--repo-type", "model"], 2, "org/data is a dataset"),
        (["pull", "https://huggingface.co/org/name"], 2, "an address, not a repo"),
        (["pull", "org/nothing"], 3, "org/nothing does not exist"),
        (["pull", "org/name@nowhere"], 3, "no such revision"),
        (["ls", "org/nothing"], 3, "nothing of org/nothing is on this node"),
        (["rm", "org/nothing"], 3, "nothing of org/nothing"),
        (["verify", "org/nothing"], 3, "nothing of org/nothing"),
        (["verify", "org/name@v1"], 2, "all revisions"),
        (["status", "--socket", "/nowhere/at.all"], 5, "no daemon listens at /nowhere/at.all (--socket)"),
        (["pull", "--socket", "/nowhere/at.all", "org/name"], 5, "no daemon listens at /nowhere/at.all (--socket)"),
        (["pull", "--socket", "/etc/passwd", "org/name"], 5, "not a socket"),
        (["doctor", "/nowhere/at.all"], 3, "/nowhere/at.all: not there"),
        (["exec", "org/name"], 2, "no command to run"),
        (["exec", "--", "true"], 2, "arguments are required: REPO"),
        (["exec", "org/nothing", "--", "true"], 3, "org/nothing does not exist"),
    ],
)
def test_a_mistake_has_a_code_a_message_and_a_hint(world: World, words: list[str], code: int, said: str) -> None:
    ran = world.run(*words)
    error, hint = ran.stderr.splitlines()[-2:] if "hint:" in ran.stderr else (ran.stderr.strip(), "hint: ")
    assert (ran.returncode, ran.stdout) == (code, "") and said in error and error.startswith("modelcache"), ran.stderr
    assert hint.startswith("hint: ") and not error.endswith(".") and not hint.endswith("."), ran.stderr


def test_an_error_is_json_when_json_is_asked_for(world: World) -> None:
    ran = world.run("pull", "org/nothing", "--json")
    said = json.loads(ran.stdout)["error"]
    assert said["name"] == "repo_not_found" and said["exit_code"] == ran.returncode == 3 and said["hint"] in ran.stderr


def test_hub_down(world: World) -> None:
    path = world.run("pull", "org/name").stdout
    world.hub.misbehave("down")
    ran = world.run("pull", "org/large", "--revision", "unknown")
    assert ran.returncode == 7, ran.stderr
    known = world.run("pull", "org/name")
    assert (known.returncode, known.stdout) == (0, path) and "warning: " in known.stderr, "a branch that is known is served with a warning"


def test_no_space(world: World, tmp_path: Path) -> None:
    with Daemon.start(tmp_path / "root", world.hub, min_free="99%") as daemon:
        ran = run({**world.environment(), "MODELCACHE_SOCKET": daemon.socket}, "pull", "org/large")
        assert ran.returncode == 6, ran.stderr


def test_a_target_that_is_full(world: World) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full on this machine")
    with open("/dev/full", "w") as full:
        ran = subprocess.run(
            [sys.executable, "-m", "modelcache", "version"],
            env=world.environment(),
            stdout=full,
            stderr=subprocess.PIPE,
            timeout=DEADLINE_SECONDS,
        )
    assert ran.returncode == 6, ran.stderr


def test_daemon_killed_in_mid_pull(world: World, tmp_path: Path) -> None:
    world.hub.misbehave("slow", rate=SLOW)
    with Daemon.start(tmp_path / "root", world.hub) as daemon:
        environment = {**world.environment(MODELCACHE_CONNECT_SECONDS="0.5"), "MODELCACHE_SOCKET": daemon.socket}
        with started(environment, "pull", "org/large") as pulling:
            world.hub.wait(bytes_sent=200_000, kind="lfs")
            daemon.kill()
            _, words = pulling.communicate(timeout=DEADLINE_SECONDS)
        assert pulling.returncode == 5 and words.startswith("modelcache: error: no daemon listens at "), words
        daemon.restart()
        world.hub.reset_log()
        with started({**environment, "MODELCACHE_CONNECT_SECONDS": "15"}, "pull", "org/large") as pulling:
            world.hub.wait(bytes_sent=200_000, kind="lfs")
            daemon.kill()
            daemon.restart()
            world.hub.calm()
            path, words = pulling.communicate(timeout=DEADLINE_SECONDS)
        assert pulling.returncode == 0, words
        assert (Path(path.strip()) / "large.safetensors").stat().st_size == LARGE.size


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted(world: World, number: signal.Signals, code: int) -> None:
    world.hub.misbehave("slow", rate=SLOW)
    with started(world.environment(), "pull", "org/large") as pulling:
        world.hub.wait(requests=1, kind="lfs")
        pulling.send_signal(number)
        out, words = pulling.communicate(timeout=DEADLINE_SECONDS)
    assert (pulling.returncode, out) == (code, "") and "Traceback" not in words


def test_a_reader_who_has_enough_is_no_error(world: World) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with started(world.environment(), "ls", stdout=writing) as listing:
        os.close(writing)
        _, words = listing.communicate(timeout=DEADLINE_SECONDS)
    assert (listing.returncode, words) == (141, "")


# ---- what is here


def test_ls_rm_verify(world: World, tmp_path: Path) -> None:
    with Daemon.start(tmp_path / "root", world.hub) as daemon:
        environment = {**world.environment(), "MODELCACHE_SOCKET": daemon.socket}
        empty = run(environment, "ls")
        assert (empty.returncode, empty.stdout, empty.stderr) == (0, "", "nothing is on this node yet\n")
        assert json.loads(run(environment, "ls", "--json").stdout) == {"repos": []}

        small = run(environment, "pull", "org/small").stdout.strip()
        run(environment, "pull", "org/name@v1", "--include", "*.json")
        lines = run(environment, "ls").stdout.splitlines()
        assert lines[0].split() == ["REPO", "TYPE", "REVISION", "COMMIT", "FILES", "SIZE", "USED", "LEASES"]
        assert [line.split()[:3] for line in lines[1:]] == [["org/name", "model", "v1"], ["org/small", "model", "main"]]
        assert run(environment, "ls", "org/small").stdout.split()[-1] == small
        (entry,) = json.loads(run(environment, "ls", "org/small", "--json").stdout)["repos"]
        assert entry["path"] == small and entry["size_bytes"] == 100_002

        assert run(environment, "verify").stderr == "2 blobs, 100.0 kB: all as they should be\n", "equal files are one blob"
        _damage(Path(small) / "weights.safetensors")
        verified = run(environment, "verify", "org/small")
        assert verified.returncode == 8 and verified.stdout.startswith("damaged  ") and "hint: " in verified.stderr
        assert run(environment, "pull", "org/small").returncode == run(environment, "verify").returncode == 0

        with _held(environment, "org/small"):
            kept = run(environment, "rm", "org/small")
            assert kept.returncode == 1 and "in use" in kept.stderr and "modelcache exec cat" in kept.stderr
        removed = run(environment, "rm", "org/small")
        assert removed.returncode == 0 and removed.stderr.startswith("removed org/small: 1 set of files, 10")
        assert json.loads(run(environment, "--json", "rm", "org/name@v1").stdout)["trees"] and run(environment, "ls").stdout == ""


def test_status(world: World) -> None:
    ran = world.run("status")
    assert ran.returncode == 0 and f"pid {world.daemon.pid}, up " in ran.stdout and str(world.daemon.root) in ran.stdout
    for words in ("of at most all there is", "0 trees evicted", "limits", "from disk, the store, the hub"):
        assert words in ran.stdout, ran.stdout
    assert world.json("status")["pid"] == world.daemon.pid and world.json("status")["socket"] == world.daemon.socket


def test_version_needs_no_daemon() -> None:
    ran = run(clean_environment(MODELCACHE_SOCKET="/nowhere"), "version", "--json")
    assert sorted(json.loads(ran.stdout)) == ["protocol", "python", "version"]


def test_options_stand_before_or_behind_the_command(world: World) -> None:
    wrong = {**world.environment(), "MODELCACHE_SOCKET": "/nowhere"}
    for words in (["--socket", world.daemon.socket, "--json", "status"], ["status", "--socket", world.daemon.socket, "--json"]):
        assert json.loads(run(wrong, *words).stdout)["pid"] == world.daemon.pid
    assert world.run("-q", "pull", "org/name").stderr == world.run("pull", "org/name", "--quiet").stderr == ""


def test_another_user_may_read_and_not_remove(world: World, shared_tmp_path: Path) -> None:
    prefix = as_uid(12345)
    with Daemon.start(shared_tmp_path / "root", world.hub) as daemon:
        environment = clean_environment(HOME="/nowhere", MODELCACHE_SOCKET=daemon.socket)

        def other(*words: str) -> subprocess.CompletedProcess[str]:
            command = [*prefix, sys.executable, "-m", "modelcache", *words]
            return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=DEADLINE_SECONDS)

        path = other("pull", "org/small").stdout.strip()
        assert "fails, as it should" in other("doctor", path).stdout
        assert other("rm", "org/small").returncode == other("verify").returncode == other("pull", "org/small", "--to", "/x").returncode == 4


# ---- doctor


def test_doctor_finds_nothing_wrong(world: World) -> None:
    ran = world.run("doctor", HF_TOKEN=TOKEN)
    assert ran.returncode == 0, ran.stdout
    assert "wrong" not in ran.stdout and "accepts your token" in ran.stdout and TOKEN not in ran.stdout + ran.stderr
    checks = {finding["check"]: finding["state"] for finding in world.json("doctor")["findings"]}
    wanted = {"clock", "token", "socket", "daemon", "root", "rights", "copies", "privacy", "disk", "spool", "store", "hub"}
    assert wanted <= set(checks) and "wrong" not in checks.values()


def test_doctor_finds_what_is_wrong_and_what_mends_it(world: World, tmp_path: Path) -> None:
    def wrong(**environment: str) -> dict[str, str]:
        ran = world.run("doctor", "--json", **environment)
        found = [finding for finding in json.loads(ran.stdout)["findings"] if finding["state"] == "wrong"]
        assert ran.returncode == 1 and all(finding["hint"] for finding in found), ran.stdout
        return {finding["check"]: finding["message"] for finding in found}

    assert "refuses your token" in wrong(HF_TOKEN="hf_wrong")["hub"]
    assert "does not talk to" in wrong(HF_ENDPOINT="http://127.0.0.1:1")["hub"]
    assert "MODELCACHE_LOADED" in wrong(MODELCACHE_LOADED="mine")["loaded"]
    world.hub.misbehave("down")
    assert world.hub.endpoint in wrong()["hub"]
    world.hub.calm()
    with Daemon.start(tmp_path / "root", world.hub, min_free="99%") as daemon:
        ran = run({**world.environment(), "MODELCACHE_SOCKET": daemon.socket}, "doctor")
        assert ran.returncode == 1 and "no download can start" in ran.stdout
    ran = run({**world.environment(), "MODELCACHE_SOCKET": daemon.socket}, "doctor")
    assert ran.returncode == 1 and "no daemon listens" in ran.stdout
    with socket.socket(socket.AF_UNIX) as silent:  # as systemd's, of a daemon that does not start
        silent.bind(str(tmp_path / "silent"))
        silent.listen()
        ran = run({**world.environment(MODELCACHE_CONNECT_SECONDS="0.5"), "MODELCACHE_SOCKET": str(tmp_path / "silent")}, "doctor")
        assert ran.returncode == 1 and re.search(r"^wrong +daemon .*does not answer\n +hint: look at ", ran.stdout, re.M), ran.stdout
    with Daemon.start(tmp_path / "root", world.hub, allowed_repos="org/*") as daemon:  # says nothing of the hub
        ran = run({**world.environment(), "MODELCACHE_SOCKET": daemon.socket}, "doctor")
        assert ran.returncode == 0 and re.search(r"^note +hub +not asked: ", ran.stdout, re.M), ran.stdout
    (tmp_path / "file").write_text("")
    with Daemon.start(tmp_path / "other", world.hub, store=f"file://{tmp_path}/file", shutdown_seconds=0) as daemon:
        ran = run({**world.environment(), "MODELCACHE_SOCKET": daemon.socket}, "doctor")
        assert ran.returncode == 1 and re.search(r"^wrong +store .*\n +hint: ", ran.stdout, re.M), ran.stdout


def test_nobody_is_started_only_to_be_looked_at(tmp_path: Path) -> None:
    if os.path.exists("/run/modelcached/modelcached.sock"):
        pytest.skip("a daemon of this node runs")
    environment = clean_environment(HOME=str(tmp_path), XDG_RUNTIME_DIR=str(tmp_path))
    assert run(environment, "status").returncode == 5
    ran = run(environment, "doctor")
    assert ran.returncode == 0 and "one of your own is started" in ran.stdout
    assert os.listdir(tmp_path) == []


def test_doctor_tells_what_a_path_is(world: World, tmp_path: Path) -> None:
    path = Path(world.run("pull", "org/small").stdout.strip())
    said = world.json("doctor", str(path / "config.json"))
    assert said["kind"] == "view" and said["file"] == "config.json" and said["tree"] == path.name and not said["problem"]
    assert said["repos"][0].startswith("org/small (model) ") and "--to" in said["hint"]
    link = tmp_path / "link"
    link.symlink_to(path)
    assert f"really   {path}" in world.run("doctor", str(link)).stdout
    (tmp_path / "mine").write_text("")
    assert world.json("doctor", str(tmp_path / "mine"))["kind"] == "private"
    missing = world.run("doctor", str(path / "nothing"))
    assert missing.returncode == 3 and "hint: the view is there" in missing.stderr
    gone = world.run("doctor", str(path.with_name("0" * 64)))
    assert gone.returncode == 3 and "ask for the repo again" in gone.stderr
    _damage(path / "weights.safetensors")
    ran = world.run("doctor", str(path / "weights.safetensors"))
    assert ran.returncode == 1 and "can't be trusted" in ran.stdout
    assert world.run("pull", "--force", "org/small").returncode == 0


# ---- on a terminal, and how fast


@pytest.mark.parametrize("has_rich", [True, False])
def test_progress_on_a_terminal(world: World, has_rich: bool) -> None:
    world.hub.misbehave("slow", rate=2_000_000)
    with Daemon.start(world.folder / f"root-{has_rich}", world.hub) as daemon:
        seen = _on_terminal({**world.environment(), "MODELCACHE_SOCKET": daemon.socket}, has_rich, "pull", "org/large")
    assert " of 6.0 MB" in seen and "MB/s" in seen and "of 1 files" in seen, seen
    assert ("━" in seen) == has_rich
    assert seen.splitlines()[-1].rpartition("\x1b[K")[2].rpartition("\x1b[2K")[2].startswith("org/large@main: commit "), "the bar is gone"


def test_a_pause_is_shown(world: World) -> None:
    with Daemon.start(world.folder / "root-paused", world.hub) as daemon:
        world.hub.misbehave("429", "lfs", times=1, retry_after=2)
        seen = _on_terminal({**world.environment(), "MODELCACHE_SOCKET": daemon.socket}, True, "pull", "org/large")
    assert "paused: the hub asks to wait" in seen, seen


def test_help_is_quick() -> None:
    """`python -X importtime` lists what costs; the rest of a start is argparse."""
    code = "import sys; from modelcache import cli; sys.argv = ['modelcache', '--help']; sys.exit(cli.main())"
    loaded = subprocess.run(
        [sys.executable, "-c", code.replace("sys.exit(cli.main())", "\ntry: cli.main()\nexcept SystemExit: print(sorted(sys.modules))")],
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
    )
    assert "exit codes:" in loaded.stdout, loaded.stderr
    for name in ("json", "rich", "socket", "subprocess", "modelcache.client", "modelcache.protocol"):
        assert f"'{name}'" not in loaded.stdout

    def cheapest(*words: str) -> float:
        return min(_cpu_seconds(*words) for _ in range(7))

    assert cheapest("-c", code) - cheapest("-c", "pass") < 0.06


def _cpu_seconds(*words: str) -> float:
    """What a wait costs on an idle machine; a clock on the wall would time the other tests too."""
    process = subprocess.Popen([sys.executable, *words], env=clean_environment(), stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_utime + usage.ru_stime


def _damage(path: Path) -> None:
    """What a task that is root can do by mistake."""
    with open(path, "r+b") as file:
        file.write(b"!")


@contextlib.contextmanager
def _held(environment: dict[str, str], repo: str) -> Iterator[None]:
    """The repo is in use."""
    with started(environment, "exec", repo, "--", "cat") as holding:
        assert holding.stdin is not None and holding.stdout is not None
        holding.stdin.write("held\n")
        holding.stdin.flush()
        assert holding.stdout.readline() == "held\n"
        yield
        holding.stdin.close()
        holding.stdin = None


def _on_terminal(environment: dict[str, str], has_rich: bool, *words: str) -> str:
    """What a command writes to a terminal of 120 columns."""
    hide = "" if has_rich else "sys.modules['rich'] = None; "
    code = f"import sys; {hide}from modelcache import cli; sys.exit(cli.main({list(words)!r}))"
    ours, theirs = pty.openpty()
    environment = {**environment, "TERM": "xterm", "COLUMNS": "120", "PYTHONPATH": IMPORT_PATH}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        seen, deadline = b"", time.monotonic() + DEADLINE_SECONDS
        with contextlib.suppress(OSError):  # EIO: the other end is closed
            while select.select([ours], [], [], max(0, deadline - time.monotonic()))[0]:
                part = os.read(ours, 65536)
                if not part:
                    break
                seen += part
        os.close(ours)
        if process.wait(DEADLINE_SECONDS):
            raise AssertionError(seen.decode())
    return seen.decode().replace("\r\n", "\n")
