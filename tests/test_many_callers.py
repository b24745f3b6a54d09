"""A thousand connections that say nothing, and two hundred tasks that ask for what is here: all are served, and nothing of it stays.

How long it takes depends on the machine and on who else uses it: it is printed, not asserted. On two quiet cores p99 is to be below 20 ms.
"""

from __future__ import annotations

import json
import os
import selectors
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from .daemon import Daemon
from .fake_service import Client
from .hub import Hub
from .saves import until

IDLE, TASKS, RATE, SECONDS = 1000, 200, 200, 10


class Callers:
    """Connections that send requests at a fixed rate, whether or not the ones before were answered."""

    def __init__(self, connections: list[Client], params: dict[str, object]) -> None:
        message = {"jsonrpc": "2.0", "id": 1000, "method": "fetch", "params": params}
        self._line = json.dumps(message).encode() + b"\n"
        self._connections = connections
        self._sent: dict[Client, float] = {}
        self.seconds: list[float] = []

    def run(self, requests: int) -> None:
        with selectors.DefaultSelector() as waiting:
            for each in self._connections:
                waiting.register(each.socket, selectors.EVENT_READ, each)
            begun, started = 0, time.perf_counter()
            while len(self.seconds) < requests:
                due = started + begun / RATE
                idle = [each for each in self._connections if each not in self._sent]
                if begun < requests and idle and time.perf_counter() >= due:
                    idle[begun % len(idle)].raw(self._line)
                    self._sent[idle[begun % len(idle)]] = due  # a request that had to wait for its turn counts from when it was due
                    begun += 1
                    continue
                left = max(0.0, due - time.perf_counter()) if begun < requests and idle else 20.0
                for key, _ in waiting.select(left):
                    self._take(key.data)

    def _take(self, caller: Client) -> None:
        message, descriptors = caller.receive()
        for descriptor in descriptors:
            os.close(descriptor)
        assert "error" not in message, message
        if message.get("id") == 1000:
            self.seconds.append(time.perf_counter() - self._sent.pop(caller))


@pytest.mark.soak
@pytest.mark.timeout(300)
@pytest.mark.parametrize("is_held", [True, False], ids=["lease held", "new lease"])
def test_a_thousand_idle_and_two_hundred_at_work(tmp_path: Path, is_held: bool) -> None:
    with ExitStack() as running, ExitStack() as stack:
        hub = running.enter_context(Hub.start(tmp_path / "hub"))
        daemon = running.enter_context(Daemon.start(tmp_path / "root", hub, fresh_seconds=3600, min_free="0"))
        hub.commit("org/warm", {f"{number}.txt": b"x" for number in range(10)})
        first = stack.enter_context(Client(daemon.socket))
        tree = first.call("fetch", repo_id="org/warm")["result"]["tree"]
        descriptors = len(os.listdir(f"/proc/{daemon.pid}/fd"))
        for _ in range(IDLE):
            stack.enter_context(Client(daemon.socket))
        callers = [stack.enter_context(Client(daemon.socket)) for _ in range(TASKS)]
        assert first.call("status")["result"]["connections"] == 1 + IDLE + TASKS
        work = Callers(callers, {"repo_id": "org/warm", "held": [tree] if is_held else []})
        work.run(RATE)  # warms up
        work.seconds.clear()
        rss, spent, begun = daemon.memory_bytes, cpu(daemon), time.perf_counter()
        work.run(RATE * SECONDS)
        took, spent = time.perf_counter() - begun, cpu(daemon) - spent
        done = sorted(work.seconds)
        print(
            f"{len(done) / took:.0f} requests/s, p50 {done[len(done) // 2] * 1e3:.2f} ms, p99 {done[len(done) * 99 // 100] * 1e3:.2f} ms, "
            f"CPU {spent / len(done) * 1e3:.2f} ms each, RSS {rss >> 20} -> {daemon.memory_bytes >> 20} MiB, load {os.getloadavg()[0]:.1f}"
        )
        assert daemon.memory_bytes - rss <= 16 << 20
        assert first.call("status")["result"]["requests"] == 1
        stack.close()
        until(lambda: len(os.listdir(f"/proc/{daemon.pid}/fd")) <= descriptors)


def cpu(daemon: Daemon) -> float:
    """Seconds of user and system time so far."""
    fields = Path(f"/proc/{daemon.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
