"""`modelcache top`: what it shows is what is going on, for a screen, for a pipe and as JSON; and for whom."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from .clients import Client
from .conftest import as_uid
from .daemon import Daemon, clean_environment
from .hub import Hub, Random
from .kernel import require_root
from .saves import fill

MIB = 1 << 20
HIDING_RICH = "import sys; sys.modules['rich'] = None; from modelcache.cli import main; sys.exit(main(sys.argv[1:]))"


def top(daemon: Daemon, *words: str, prefix: tuple[str, ...] = ()) -> str:
    command = [*prefix, sys.executable, "-m", "modelcache", "top", *words]
    done = subprocess.run(command, env=daemon.environment, cwd="/", capture_output=True, text=True, timeout=20)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_quiet_daemon(tmp_path: Path) -> None:
    with Daemon.start(tmp_path / "root", hub_rate="10MiB/s") as daemon:
        said = top(daemon, "--once")
        for words in (f"pid {daemon.pid}", "nothing is under way", "nothing is held", "spool  empty", "at most 10.5 MB/s", "store  quiet"):
            assert words in said, said


def test_a_fetch_under_way_and_who_holds_what(tmp_path: Path, hub: Hub) -> None:
    hub.commit("org/held", {"a": b"a"})
    commit = hub.commit("org/model", {"model.safetensors": Random(1, 8 * MIB)})
    with Daemon.start(tmp_path / "root", hub) as daemon, Client.of(daemon) as holder, Client.of(daemon) as one, Client.of(daemon) as two:
        holder.fetch("org/held", purpose="python train.py")
        hub.misbehave("stall", match="model.safetensors", after=2 * MIB)
        for task in (one, two):
            task.begin("fetch", repo_id="org/model")
            task.progress(lambda progress: progress["done_bytes"] >= MIB)
        said: dict[str, Any] = json.loads(top(daemon, "--once", "--json"))
        (doing,) = said["activities"]
        assert doing["what"] == f"org/model@{commit[:8]}" and doing["total_bytes"] == 8 * MIB >= doing["done_bytes"] >= MIB
        assert (doing["phase"], doing["source"], doing["waiters"]) == ("download", "hub", 2)
        (held,) = said["holders"]
        assert (held["pid"], held["uid"], held["purpose"]) == (holder.pid, os.getuid(), "python train.py")
        assert re.fullmatch(r"org/held@[0-9a-f]{8}", held["what"])
        text = top(daemon, "--once")
        assert re.search(rf"^org/model@{commit[:8]} +download \(hub\) +\d+% +\d.* of 8.4 MB", text, re.M), text
        assert re.search(rf"^org/held@\w+ +{os.getuid()} +{holder.pid} .*python train.py$", text, re.M), text
        hub.calm()
        one.good()
        two.good()
        assert json.loads(top(daemon, "--once", "--json"))["activities"] == []


def test_an_upload_under_way(tmp_path: Path) -> None:
    fill(tmp_path / "out", {"weights.bin": Random(1, 64 * MIB)})
    store = f"file://{tmp_path}/store"
    with Daemon.start(tmp_path / "root", store=store, store_rate="8MiB/s", shutdown_seconds=0) as daemon, Client.of(daemon) as task:
        task.begin("save", path=str(tmp_path / "out"))
        key = task.good().value["key"]
        while not (doing := json.loads(top(daemon, "--once", "--json"))["activities"]):
            assert daemon.status()["spool"]["saves"] == 1
        assert (doing[0]["what"], doing[0]["phase"], doing[0]["source"]) == (key, "upload", "store")
        assert doing[0]["total_bytes"] == 64 * MIB


def read_until(stream: int, pattern: bytes, seconds: float = 15.0) -> bytes:
    seen = b""
    while not re.search(pattern, seen):
        assert select.select([stream], [], [], seconds)[0], seen
        seen += os.read(stream, 1 << 16)
    return seen


@pytest.mark.parametrize("has_rich", [True, False])
def test_on_a_terminal_it_goes_on_until_it_is_stopped(tmp_path: Path, has_rich: bool) -> None:
    with Daemon.start(tmp_path / "root") as daemon:
        ours, theirs = pty.openpty()
        program = ["-m", "modelcache"] if has_rich else ["-c", HIDING_RICH]
        environment = {**daemon.environment, "TERM": "xterm", "COLUMNS": "120", "LINES": "40"}
        process = subprocess.Popen(
            [sys.executable, *program, "top", "--interval", "50ms"], stdin=theirs, stdout=theirs, stderr=theirs, env=environment, cwd="/"
        )
        try:
            os.close(theirs)
            seen = read_until(ours, rb"(?s)nothing is held.*nothing is held")
            assert (b"\x1b[?1049h" in seen) is has_rich  # the screen of its own
            process.send_signal(2)
            assert process.wait(20) == 130
        finally:
            process.kill()
            process.wait()
            os.close(ours)


def test_json_goes_on_line_by_line(tmp_path: Path) -> None:
    with Daemon.start(tmp_path / "root") as daemon:
        command = [sys.executable, "-m", "modelcache", "top", "--json", "--interval", "20ms"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, env=daemon.environment, cwd="/")
        try:
            assert process.stdout is not None
            rounds = [json.loads(process.stdout.readline()) for _ in range(3)]
            assert all(each["pid"] == daemon.pid for each in rounds)
        finally:
            process.kill()
            process.communicate()


def test_without_a_daemon(tmp_path: Path) -> None:
    environment = clean_environment(MODELCACHE_SOCKET=str(tmp_path / "none"))
    done = subprocess.run([sys.executable, "-m", "modelcache", "top"], env=environment, capture_output=True, text=True, cwd="/")
    assert done.returncode == 5 and "hint:" in done.stderr


def test_others_see_what_is_public_and_their_own(shared_tmp_path: Path, hub: Hub) -> None:
    require_root()
    hub.commit("org/shared", {"a.safetensors": Random(3, 4 * MIB)})
    hub.commit("org/secret", {"b.safetensors": Random(4, 4 * MIB)}, private=True, tokens=["hf_secret"])
    with contextlib.ExitStack() as stack:
        daemon = stack.enter_context(Daemon.start(shared_tmp_path / "root", hub, uid=4242))
        one, two = (stack.enter_context(Client.of(daemon, uid=4243)) for _ in range(2))
        hub.misbehave("stall", match="safetensors", after=MIB)
        one.begin("fetch", repo_id="org/shared", purpose="training")
        two.begin("fetch", repo_id="org/secret", token="hf_secret")
        for task in (one, two):
            task.progress(lambda progress: progress["phase"] == "download")

        def seen(uid: int) -> list[str]:
            said = json.loads(top(daemon, "--once", "--json", prefix=tuple(as_uid(uid))))
            return sorted(each["what"].partition("@")[0] for each in said["activities"])

        assert seen(4244) == ["org/shared"]
        assert seen(4242) == seen(0) == ["org/secret", "org/shared"]
        hub.calm()
        one.good()
        two.good()
        for uid, count in ((4244, 0), (4243, 2), (0, 2)):
            said = json.loads(top(daemon, "--once", "--json", prefix=tuple(as_uid(uid))))
            assert len(said["holders"]) == count, uid
            assert "org/secret" not in str(said) or uid != 4244
