"""`make demo`: a hub, an S3 server, two nodes and some tasks on this machine, without a network. Every claim it prints is checked; exit 1
if one is false.

The figures come from the hub's own log and from the daemons' status; the content is new in every run.
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
from contextlib import ExitStack
from pathlib import Path

from tests.daemon import Daemon
from tests.hub import Hub, Random
from tests.saves import contents, hashes, in_bucket, until
from tests.seaweed import SeaweedFS

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
        with Hub.start(name) as hub, SeaweedFS.start(name) as s3, ExitStack() as nodes:
            os.environ.update(s3.environment())
            store = s3.bucket()
            daemon = nodes.enter_context(Daemon.start(Path(name) / "root", hub, log_level="warning", store=store))
            large = {f"model-{i}-of-4.safetensors": Random(f"{name} {i}", 64_000_000) for i in range(1, 5)}
            small = {f"tokenizer/{i}.json": Random(f"{name} small {i}", 1000 * i) for i in range(1, 12)}
            model = {"config.json": Random(f"{name} config", 700), **large, **small}
            second = {"model.safetensors": Random(f"{name} second", 128_000_000)}
            hub.commit(REPO, model)
            hub.commit(SECOND, second)
            hub.reset_log()
            print(f"A hub on this machine has {REPO}: {_megabytes(model)} in {len(model)} files, bytes that no other run has.")
            print(f"A daemon, pid {daemon.pid}: modelcached serve --root {daemon.root} --socket {daemon.socket}")
            view, seconds = _eight_tasks(claims, hub, daemon, model)
            _warm(claims, hub, daemon, seconds)
            until(lambda: daemon.status()["exchange"]["shared"] > 0)
            claims.claim(f"meanwhile the daemon has brought the repo to {store}, for other nodes", _has_large(s3, store, large))
            _killed(claims, hub, daemon, second)
            _where(claims, daemon, view, model)
            checkpoint = _save(claims, s3, store, daemon, Path(name))
            other = nodes.enter_context(Daemon.start(Path(name) / "other" / "root", hub, log_level="warning", store=store))
            _other_node(claims, hub, other, model, *checkpoint)
            _mistake(claims, daemon)
    true = claims.checked - len(claims.false)
    print(f"\n{true} of {claims.checked} claims are true, after {time.monotonic() - began:.0f} s; {name} is gone.")
    return 1 if claims.false else 0


def _eight_tasks(claims: Claims, hub: Hub, daemon: Daemon, model: Mapping[str, Random]) -> tuple[Path, float]:
    """Where the files are, and how long a task waited for them."""
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
    view = done[0].path
    claims.claim(
        f"all {TASKS} have the same folder, with the very bytes the hub has (SHA-256)",
        all(each.path == view for each in done) and _is_sound(view, model),
    )
    return view, max(each.seconds[0] for each in done)


def _warm(claims: Claims, hub: Hub, daemon: Daemon, download_seconds: float) -> None:
    print(f"\n2. A later task asks {WARM_CALLS} times")
    hub.reset_log()
    task = Task(REPO, daemon.environment, WARM_CALLS)
    task.go()
    first, *later = task.wait().seconds
    claims.claim(
        f"it waited {1000 * first:.1f} ms the first time (imports, connects), then {1000 * statistics.median(later):.2f} ms (median)",
        statistics.median(later) < first < download_seconds,
    )
    requests = len(hub.requests())
    claims.claim(f"the hub was asked {requests} times", requests == 0)


def _has_large(s3: SeaweedFS, store: str, large: Mapping[str, Random]) -> bool:
    keys = {key.rpartition("/")[2] for key in in_bucket(s3, store)[0]}
    return set(hashes(large).values()) <= keys


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


def _where(claims: Claims, daemon: Daemon, view: Path, model: Mapping[str, Random]) -> None:
    print("\n4. Where the files are: modelcache ls")
    _show(_cli(daemon, "ls").stdout)
    print(f"   ls -l {view}/")
    listing = subprocess.run(["ls", "-l", f"{view}/"], capture_output=True, text=True, check=True).stdout
    _show(listing.partition("\n")[2])
    files = [path for path in view.rglob("*") if path.is_file()]
    claims.claim(
        f"{len(files)} files, read-only, each of them a hard link to its one copy under blobs/",
        len(files) == len(model) and all(_is_link(path, daemon.root / "blobs") for path in files),
    )


def _save(claims: Claims, s3: SeaweedFS, store: str, daemon: Daemon, folder: Path) -> tuple[str, Mapping[str, Random]]:
    """The checkpoint's key, and what is in it."""
    checkpoint = {f"step-100/{part}.bin": Random(f"{folder} {part}", 64_000_000) for part in ("model", "optimizer")}
    checkpoint |= {f"step-100/state-{i}.json": Random(f"{folder} state {i}", 5000) for i in range(20)}
    for path, content in checkpoint.items():
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_bytes(bytes(content))
    files = {path.removeprefix("step-100/"): content for path, content in checkpoint.items()}
    print(f"\n5. A training step saves a checkpoint ({_megabytes(files)}), and the daemon is killed as soon as the step goes on")
    task = f"import modelcache, time; t = time.monotonic(); r = modelcache.save({str(folder / 'step-100')!r}, label='demo'); "
    task += "print(r['key'], time.monotonic() - t)"
    saved = subprocess.run([sys.executable, "-c", task], env=daemon.environment, capture_output=True, text=True)
    daemon.kill()
    key, _, seconds = saved.stdout.strip().partition(" ")
    claims.claim(f"modelcache.save returned after {float(seconds or 0):.2f} s: {key}", saved.returncode == 0)
    daemon.restart()
    flushed = _cli(daemon, "flush")
    claims.claim(
        f"after kill -9 and a restart `modelcache flush` says that {store} has it, and S3's own client reads every byte of it there",
        flushed.returncode == 0 and contents(*in_bucket(s3, store))[key] == hashes(files),
    )
    return key, files


def _other_node(claims: Claims, hub: Hub, other: Daemon, model: Mapping[str, Random], key: str, files: Mapping[str, Random]) -> None:
    print("\n6. A second node, with nothing on its disk and the same store")
    hub.reset_log()
    loaded = _cli(other, "load", key)
    claims.claim(
        "`modelcache load` gives the checkpoint, byte for byte",
        loaded.returncode == 0 and _is_sound(Path(loaded.stdout.strip()), files),
    )
    pulled = _cli(other, "pull", REPO)
    claims.claim(
        f"`modelcache pull {REPO}` took 0 bytes from the hub: the first node had left them in the store",
        pulled.returncode == 0 and hub.bytes_sent() == 0 and _is_sound(Path(pulled.stdout.strip()), model),
    )


def _mistake(claims: Claims, daemon: Daemon) -> None:
    print(f"\n7. A mistake: modelcache pull {UNKNOWN}")
    pulled = _cli(daemon, "pull", UNKNOWN)
    _show(pulled.stderr)
    claims.claim(f"exit code {pulled.returncode} (not found), and a hint", pulled.returncode == 3 and "\nhint: " in pulled.stderr)


def _cli(daemon: Daemon, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "modelcache", *words], env=daemon.environment, capture_output=True, text=True)


def _show(text: str) -> None:
    print("\n".join("   " + line for line in text.rstrip().splitlines()))


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


def _is_link(shown: Path, blobs: Path) -> bool:
    digest = _sha256(shown)
    return shown.samefile(blobs / "sha256" / digest[:2] / digest) and shown.stat().st_mode & 0o222 == 0


def _megabytes(model: Mapping[str, Random]) -> str:
    return f"{sum(map(len, model.values())) / MB:.0f} MB"


if __name__ == "__main__":
    sys.exit(main())
