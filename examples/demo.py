"""`make demo`: a hub, a daemon and some tasks on this machine, without a network. Every claim it prints is checked; exit 1 if one is false.

The figures come from the hub's own log and from the daemon's status; the content is new in every run.
"""

from __future__ import annotations

import hashlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import modelcache
from modelcache.client import shared
from tests.daemon import Daemon
from tests.hub import Hub, Random

from .checked import Claims, Task

TASKS = 8
WARM_CALLS = 1000
REPO, SECOND, UNKNOWN = "demo/model", "demo/second", "demo/no-such-model"
SLOW = 60e6  # bytes a second while the daemon is killed: else there is no middle to be killed in
KILL_COSTS_AT_MOST = 8e6  # bytes
MB = 1e6


def main() -> int:
    began = time.monotonic()
    claims = Claims()
    with tempfile.TemporaryDirectory(prefix="modelcached-demo-") as name:
        os.chmod(name, 0o755)
        with Hub.start(name) as hub, Daemon.start(Path(name) / "root", hub, log_level="warning") as daemon:
            os.environ["MODELCACHE_SOCKET"] = daemon.socket
            large = {f"model-{i}-of-4.safetensors": Random(f"{name} {i}", 64_000_000) for i in range(1, 5)}
            small = {f"tokenizer/{i}.json": Random(f"{name} small {i}", 1000 * i) for i in range(1, 12)}
            model = {"config.json": Random(f"{name} config", 700), **large, **small}
            second = {"model.safetensors": Random(f"{name} second", 128_000_000)}
            hub.commit(REPO, model)
            hub.commit(SECOND, second)
            hub.reset_log()
            print(f"A hub on this machine has {REPO}: {_megabytes(model)} in {len(model)} files, bytes that no other run has.")
            print(f"A daemon, pid {daemon.pid}: modelcached serve --root {daemon.root} --socket {daemon.socket}")
            view = _eight_tasks(claims, hub, daemon, model)
            _warm(claims, hub, daemon)
            _killed(claims, hub, daemon, second)
            _where(claims, view, model)
            _mistake(claims)
            shared().close()
    print(f"\n{claims.checked - len(claims.false)} of {claims.checked} claims are true, in {time.monotonic() - began:.0f} s; {name} is gone.")
    return 1 if claims.false else 0


def _eight_tasks(claims: Claims, hub: Hub, daemon: Daemon, model: Mapping[str, Random]) -> Path:
    print(f'\n1. {TASKS} processes call modelcache.snapshot_download("{REPO}") at the same time')
    tasks = [Task(REPO, daemon.environment) for _ in range(TASKS)]
    for task in tasks:
        task.go()
    done = [task.wait() for task in tasks]
    for each in done:
        print(f"   task {each.pid} waited {each.seconds[0]:.2f} s")
    fetches = daemon.status()["fetches"]
    claims.claim(
        f"the daemon began {fetches['started']} download, and {fetches['joined']} tasks waited with the first",
        fetches["started"] == 1 and fetches["joined"] == TASKS - 1,
    )
    sent = {name: hub.bytes_sent(name) for name in model}
    claims.claim(
        f"the hub's log: {sum(sent.values()) / MB:.1f} MB went out, every byte of {len(sent)} files once",
        sent == {name: len(content) for name, content in model.items()},
    )
    views = {each.path for each in done}
    claims.claim(f"all {TASKS} have the same folder, with the very bytes the hub has (SHA-256)", len(views) == 1 and _is_sound(done[0].path, model))
    if done[0].warnings:
        print(f"   (to root each task said: {done[0].warnings.strip().partition(': ')[0].partition(' of /')[0]} ...)")
    return done[0].path


def _warm(claims: Claims, hub: Hub, daemon: Daemon) -> None:
    print(f"\n2. A later task asks {WARM_CALLS} times")
    hub.reset_log()
    task = Task(REPO, daemon.environment, WARM_CALLS)
    task.go()
    seconds = task.wait().seconds
    claims.claim(
        f"first answer after {1000 * seconds[0]:.1f} ms, then {1000 * statistics.median(seconds):.2f} ms (median)",
        statistics.median(seconds) < 0.1,
    )
    requests = len(hub.requests())
    claims.claim(f"the hub was asked {requests} times", requests == 0)


def _killed(claims: Claims, hub: Hub, daemon: Daemon, second: Mapping[str, Random]) -> None:
    size = sum(map(len, second.values()))
    print(f"\n3. kill -9 of the daemon in the middle of {SECOND} ({_megabytes(second)}, the hub slowed to {SLOW / MB:.0f} MB/s)")
    hub.reset_log()
    hub.misbehave("slow", rate=SLOW)
    task = Task(SECOND, daemon.environment)
    task.go()
    hub.wait(kind="lfs", bytes_sent=size // 2, timeout=60)
    killed = daemon.pid
    daemon.kill()
    before = hub.bytes_sent()
    daemon.restart()
    done = task.wait()
    hub.calm()
    sent = hub.bytes_sent()
    claims.claim(f"pid {killed} is dead after {before / MB:.1f} MB, pid {daemon.pid} goes on", size / 2 <= before < size)
    claims.claim(f"the task noticed nothing: it waited {done.seconds[0]:.1f} s and has the right bytes", _is_sound(done.path, second))
    again = sent - size
    claims.claim(f"{again / MB:.1f} MB were asked for again, and not {before / MB:.1f} MB", 0 <= again <= KILL_COSTS_AT_MOST)


def _where(claims: Claims, view: Path, model: Mapping[str, Random]) -> None:
    print(f"\n4. Where the files are: {view.parent}/")
    listing = subprocess.run(["ls", "-l", view.name + "/"], cwd=view.parent, capture_output=True, text=True, check=True).stdout
    print("\n".join("   " + line for line in listing.splitlines()[1:]))
    files = [path for path in view.rglob("*") if path.is_file()]
    claims.claim(f"{len(files)} files, read-only, each a hard link to its one copy in blobs/", _are_links(view, files) and len(files) == len(model))


def _mistake(claims: Claims) -> None:
    print(f'\n5. A mistake: modelcache.snapshot_download("{UNKNOWN}")')
    try:
        modelcache.snapshot_download(UNKNOWN)
    except modelcache.errors.RepositoryNotFoundError as error:
        print(f"   {type(error).__name__}: {str(error).splitlines()[0]}")
        claims.claim(f"hint: {error.hint}", bool(error.hint))
    else:
        claims.claim("an error that says so", False)


def _is_sound(view: Path, model: Mapping[str, Random]) -> bool:
    found = {str(path.relative_to(view)): path for path in view.rglob("*") if path.is_file()}
    return found.keys() == model.keys() and all(_sha256(path) == _sha256(model[name]) for name, path in found.items())


def _sha256(content: Path | Random) -> str:
    if isinstance(content, Path):
        with content.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    digest = hashlib.sha256()
    for chunk in content.chunks():
        digest.update(chunk)
    return digest.hexdigest()


def _are_links(view: Path, files: list[Path]) -> bool:
    blobs = {path.stat().st_ino for path in (view.parent.parent / "blobs").rglob("*") if path.is_file()}
    return all(path.stat().st_ino in blobs and path.stat().st_mode & 0o222 == 0 for path in files)


def _megabytes(model: Mapping[str, Random]) -> str:
    return f"{sum(map(len, model.values())) / MB:.0f} MB"


if __name__ == "__main__":
    sys.exit(main())
