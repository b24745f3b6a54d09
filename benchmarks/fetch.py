"""Fetching a repo: ours against huggingface_hub on the same hub, taken in turns.

1 GB in 4 files and 20 small ones; new bytes each run. Every cold run starts with an empty folder and nothing left for the disk
to write; the peer neither checks nor syncs what it downloads, ours does both. Wall and CPU are those of the calls: no
interpreter's start, no import at the top, and never the hub's.
"""

from __future__ import annotations

import contextlib
import http.client
import importlib.metadata
import os
import shutil
import socket
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

from tests.daemon import Daemon, clean_environment
from tests.hub import Hub, Random

from .processes import Memory, Ran, TaskFailed, Tasks, cpu_seconds, memory, seconds_of
from .report import Row

REPO = "bench/model"
LARGE_FILES, LARGE_BYTES = 4, 250_000_000
SMALL_FILES = 20
ROUNDS = 5
WARM_ROUNDS = 5
WARM_CALLS = {"ours": 1000, "peer": 100}
STARTS = 15  # of an interpreter
RATE = 100e6  # bytes a second of the slow hub
IDLE_SECONDS = 3.0
MB = 1e6


class Bench:
    """One hub, one folder to download into, both sides."""

    def __init__(self, hub: Hub, folder: Path, size: int) -> None:
        self.hub = hub
        self.folder = folder
        self.size = size  # of the repo
        self.gigabytes = size / 1e9

    @contextlib.contextmanager
    def daemon(self) -> Iterator[Daemon]:
        """A daemon with an empty root."""
        with self.empty() as folder, Daemon.start(folder / "root", self.hub, log_level="info") as daemon:
            yield daemon

    @contextlib.contextmanager
    def empty(self) -> Iterator[Path]:
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        os.sync()
        try:
            yield folder
        finally:
            shutil.rmtree(folder)

    def peer_environment(self, home: Path) -> dict[str, str]:
        quiet = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        return clean_environment(HF_ENDPOINT=self.hub.endpoint, HF_HOME=str(home), **quiet)

    def ours_cold(self, tasks: int) -> tuple[Ran, float, Memory]:
        """What the tasks took, the CPU seconds of daemon and tasks, the daemon's memory."""
        with self.daemon() as daemon:
            waiting = Tasks("ours", REPO, [daemon.environment] * tasks)
            before = cpu_seconds(daemon.pid)
            with Memory(daemon.pid) as watched:
                ran = waiting.go()
            cpu = cpu_seconds(daemon.pid) - before
        return ran, cpu + ran.cpu_seconds, watched

    def peer_cold(self, tasks: int, is_shared: bool = False) -> tuple[Ran, Memory]:
        with self.empty() as folder:
            homes = [folder / ("home" if is_shared else str(task)) for task in range(tasks)]
            waiting = Tasks("peer", REPO, [self.peer_environment(home) for home in homes])
            with Memory(waiting.processes[0].pid) as watched:
                return waiting.go(), watched

    def egress(self) -> float:
        """How often the hub gave each byte since the last time."""
        sent = self.hub.bytes_sent()
        self.hub.reset_log()
        return sent / self.size


def measure(rounds: int = ROUNDS) -> tuple[list[Row], dict[str, object]]:
    """The rows, and what has to be known to read them."""
    with tempfile.TemporaryDirectory(prefix="modelcached-bench-") as name, Hub.start(name, lfs_process=True) as hub:
        files: dict[str, Random] = {f"model-{i}.safetensors": Random(f"{name}{i}", LARGE_BYTES) for i in range(LARGE_FILES)}
        files |= {f"small/{i}.json": Random(f"{name}s{i}", 2000 * (i + 1)) for i in range(SMALL_FILES)}
        hub.commit(REPO, files)
        bench = Bench(hub, Path(name), sum(map(len, files.values())))
        facts: dict[str, object] = {
            "huggingface_hub": importlib.metadata.version("huggingface_hub"),
            "hub_gigabytes_a_second": round(_drain(bench), 2),
            "disk_gigabytes_a_second": round(_write(bench), 2),
            "rounds": rounds,
            "uid": os.geteuid(),
        }
        rows = [*_cold(bench, rounds), *_slow(bench), *_killed(bench), *_warm(bench), *_starts(bench), *_idle(bench)]
    return rows, facts


def _cold(bench: Bench, rounds: int) -> list[Row]:
    wall: dict[str, list[float]] = {side: [] for side in ("ours 1", "ours 8", "peer 1")}
    cpu: dict[str, list[float]] = {side: [] for side in wall}
    egress: list[float] = []
    rss: dict[str, list[float]] = {"ours": [], "peer": [], "ours own": [], "peer own": []}
    for _ in range(rounds):
        for tasks in (1, 8):
            bench.egress()
            ran, seconds, watched = bench.ours_cold(tasks)
            wall[f"ours {tasks}"].append(ran.seconds)
            cpu[f"ours {tasks}"].append(seconds / bench.gigabytes)
        egress.append(bench.egress())
        rss["ours"].append(watched.rss)
        rss["ours own"].append(watched.anonymous)
        ran, watched = bench.peer_cold(1)
        wall["peer 1"].append(ran.seconds)
        cpu["peer 1"].append(ran.cpu_seconds / bench.gigabytes)
        rss["peer"].append(watched.rss)
        rss["peer own"].append(watched.anonymous)
    bench.egress()
    own, _ = bench.peer_cold(8)
    own_egress = bench.egress()
    shared, _ = bench.peer_cold(8, is_shared=True)
    shared_egress = bench.egress()
    return [
        Row("1 task, cold", "s", wall["ours 1"], wall["peer 1"], most_ratio=0.6),
        Row("... CPU of daemon and tasks", "s/GB", cpu["ours 1"], cpu["peer 1"], most_ratio=0.6),
        Row("8 tasks, cold", "s", wall["ours 8"], wall["peer 1"], most_ratio=0.6, peer_is="for 1 task"),
        Row("... CPU of daemon and tasks", "s/GB", cpu["ours 8"], cpu["peer 1"], most_ratio=0.6, peer_is="for 1 task"),
        Row("... against 8 caches (containers)", "s", [statistics.median(wall["ours 8"])], [own.seconds]),
        Row("... ... times the hub gave each byte", "x", egress, [own_egress], most=1.0),
        Row("... against 8 processes with one HF_HOME", "s", [statistics.median(wall["ours 8"])], [shared.seconds]),
        Row("... ... times the hub gave each byte", "x", egress, [shared_egress], most=1.0),
        Row("memory at most, daemon / peer's process (RSS)", "MB", rss["ours"], rss["peer"], most=150, digits=0),
        Row("... of it its own (RssAnon)", "MB", rss["ours own"], rss["peer own"], digits=0),
    ]


def _slow(bench: Bench) -> list[Row]:
    bench.hub.misbehave("slow", rate=RATE)
    ideal = bench.size / RATE
    ours, _, _ = bench.ours_cold(8)
    peer, _ = bench.peer_cold(1)
    bench.hub.calm()
    what = f"8 tasks, hub limited to {RATE / MB:.0f} MB/s: wall / (bytes / rate)"
    return [Row(what, "x", [ours.seconds / ideal], [peer.seconds / ideal], most=1.05, peer_is="for 1 task")]


def _killed(bench: Bench) -> list[Row]:
    """Bytes the hub gave more than once because of one kill -9 in the middle."""
    bench.hub.misbehave("slow", rate=RATE)
    bench.egress()
    with bench.daemon() as daemon, ThreadPoolExecutor(1) as thread:
        ran = thread.submit(Tasks("ours", REPO, [daemon.environment]).go)
        _wait_for_the_middle(bench)
        daemon.kill()
        daemon.restart()  # the task waits for the daemon's next life
        ran.result()
    ours = bench.egress() - 1
    with bench.empty() as home, ThreadPoolExecutor(1) as thread:
        tasks = Tasks("peer", REPO, [bench.peer_environment(home)])
        ran = thread.submit(tasks.go)
        _wait_for_the_middle(bench)
        tasks.processes[0].kill()
        if not isinstance(ran.exception(), TaskFailed):
            raise RuntimeError("the peer was not killed in the middle")
        Tasks("peer", REPO, [bench.peer_environment(home)]).go()
    peer = bench.egress() - 1
    bench.hub.calm()
    return [Row("kill -9 in the middle: asked for again", "MB", [ours * bench.size / MB], [peer * bench.size / MB], most=8, digits=1)]


def _wait_for_the_middle(bench: Bench) -> None:
    bench.hub.wait(kind="lfs", bytes_sent=bench.size // 2, timeout=60)


def _warm(bench: Bench) -> list[Row]:
    with bench.daemon() as daemon, bench.empty() as home:
        sides: dict[str, Mapping[str, str]] = {"ours": daemon.environment, "peer": bench.peer_environment(home)}
        for side, environment in sides.items():
            Tasks(side, REPO, [environment]).go()
        p50: dict[str, list[float]] = {"ours": [], "peer": [], "ours --local": [], "peer --local": []}
        p99: dict[str, list[float]] = {key: [] for key in p50}
        bench.hub.reset_log()
        asked = 0
        for _ in range(WARM_ROUNDS):
            for key in p50:
                side, *flags = key.split()
                _, *later = Tasks(side, REPO, [sides[side]], "--calls", str(WARM_CALLS[side]), *flags).go().calls
                p50[key].append(1000 * statistics.median(later))
                p99[key].append(1000 * sorted(later)[int(0.99 * len(later))])
                asked += len(bench.hub.requests()) if side == "ours" else 0
                bench.hub.reset_log()
        code = "from {} import snapshot_download; snapshot_download({!r})"
        ours, peer = [], []
        for _ in range(STARTS):
            bare = seconds_of("pass", sides["ours"])
            ours.append(1000 * (seconds_of(code.format("modelcache", REPO), sides["ours"]) - bare))
            peer.append(1000 * (seconds_of(code.format("huggingface_hub", REPO), sides["peer"]) - bare))
    return [
        Row("warm, in process, p50", "ms", p50["ours"], p50["peer"], most=0.3, digits=3),
        Row("... p99", "ms", p99["ours"], p99["peer"], digits=3),
        Row("warm, local_files_only, p50", "ms", p50["ours --local"], p50["peer --local"], most=0.3, digits=3),
        Row("... p99", "ms", p99["ours --local"], p99["peer --local"], digits=3),
        Row(f"requests to the hub in {2 * WARM_ROUNDS * WARM_CALLS['ours']} warm calls", "", [asked], most=0, digits=0),
        Row("warm, a new interpreter, over a bare one", "ms", ours, peer, most=30, digits=0),
    ]


def _starts(bench: Bench) -> list[Row]:
    environment = bench.peer_environment(bench.folder)
    found: dict[str, list[float]] = {"modelcache": [], "huggingface_hub": []}
    for _ in range(STARTS):
        bare = seconds_of("pass", environment)
        for package, samples in found.items():
            samples.append(1000 * (seconds_of(f"from {package} import snapshot_download", environment) - bare))
    what = "from ... import snapshot_download, over a bare interpreter"
    return [Row(what, "ms", found["modelcache"], found["huggingface_hub"], digits=0)]


def _idle(bench: Bench) -> list[Row]:
    with bench.daemon() as daemon:
        rss, own = memory(Path(f"/proc/{daemon.pid}/status"))
        before = cpu_seconds(daemon.pid)
        time.sleep(IDLE_SECONDS)
        busy = 100 * (cpu_seconds(daemon.pid) - before) / IDLE_SECONDS
    return [
        Row("idle daemon (RSS)", "MB", [rss], most=70, digits=0),
        Row("... of it its own (RssAnon)", "MB", [own], digits=0),
        Row("... CPU", "%", [busy], most=0, digits=0),
    ]


def _drain(bench: Bench) -> float:
    """GB a second that the hub gives to plain sockets which keep nothing: what no client can pass."""

    def location(file: str) -> str:
        connection = http.client.HTTPConnection(urlsplit(bench.hub.endpoint).netloc)
        connection.request("HEAD", f"/{REPO}/resolve/main/{file}")
        return str(connection.getresponse().headers["Location"])

    def drain(url: str) -> None:
        parts = urlsplit(url)
        with socket.create_connection((parts.hostname, parts.port)) as connection:
            connection.sendall(f"GET {parts.path}?{parts.query} HTTP/1.1\r\nHost: {parts.netloc}\r\nConnection: close\r\n\r\n".encode())
            buffer, left = bytearray(1 << 20), LARGE_BYTES
            while left > 0 and (count := connection.recv_into(buffer)):
                left -= count

    urls = [location(f"model-{i}.safetensors") for i in range(LARGE_FILES)]
    start = time.monotonic()
    with ThreadPoolExecutor(LARGE_FILES) as threads:
        list(threads.map(drain, urls))
    return LARGE_FILES * LARGE_BYTES / 1e9 / (time.monotonic() - start)


def _write(bench: Bench) -> float:
    """GB a second that one writer gets onto the disk, synced."""
    with bench.empty() as folder, open(folder / "file", "wb", buffering=0) as file:
        block, start = os.urandom(4 << 20), time.monotonic()
        for _ in range(LARGE_FILES * LARGE_BYTES // len(block)):
            file.write(block)
        os.fdatasync(file.fileno())
        return LARGE_FILES * LARGE_BYTES / 1e9 / (time.monotonic() - start)
