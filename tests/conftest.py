"""What holds for every test: nothing is skipped unseen in CI, no process is left behind, nothing blocks the event loop.

Here is only what many tests need; a fixture of one test file stands in that file.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from modelcache.client import shared

from .fake_keeper import FakeKeeper
from .hub import Hub
from .seaweed import SeaweedFS

ROOT = Path(__file__).resolve().parent.parent
SKIPS = ROOT / "tests" / "skips.txt"
IN_CI = os.environ.get("CI", "").lower() in ("1", "true")
BLOCKED_SECONDS = 1.0  # a step of the event loop that takes longer fails its test; a laptop's disk may sync for half of it
LEAVING_SECONDS = 5.0  # what a process that was told to end gets before it counts as left behind

# What runs in the background of a script, or under nohup, ignores these, and so would every program that a test starts.
for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGQUIT, signal.SIG_DFL), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, usual)

hypothesis.settings.register_profile("default", deadline=None, print_blob=True)
hypothesis.settings.register_profile("ci", deadline=None, print_blob=True, derandomize=True, database=None)
hypothesis.settings.load_profile("ci" if IN_CI else "default")


def as_uid(uid: int, gid: int | None = None) -> list[str]:
    """What to put before a command so that it runs as `uid` without any other group. Skips the test where that can't be."""
    if why := _why_no_other_uid():
        pytest.skip(why)
    return _setpriv(uid, uid if gid is None else gid)


def _setpriv(uid: int, gid: int) -> list[str]:
    return ["setpriv", f"--reuid={uid}", f"--regid={gid}", "--clear-groups", "--"]


@functools.cache
def _why_no_other_uid() -> str:
    """Asks for the prefix too: a Python that can't read its own library takes any other that it finds, of another version."""
    if os.getuid() != 0:
        return "only root can run a command as another uid"
    code = f"import sys; open({__file__!r}).close(); sys.exit(sys.base_prefix != {sys.base_prefix!r})"
    tried = subprocess.run([*_setpriv(65534, 65534), sys.executable, "-c", code], capture_output=True)
    return "another uid can't run this Python: it or the checkout lies in a folder of root's own" if tried.returncode else ""


@pytest.fixture
def shared_tmp_path() -> Iterator[Path]:
    """A folder that every uid may enter; `tmp_path` lies in one that only its owner may."""
    with tempfile.TemporaryDirectory(prefix="modelcached-test-") as name:
        os.chmod(name, 0o755)
        yield Path(name)


@pytest.fixture(scope="module")
def the_hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """One hub for the tests of a file, which take `hub`."""
    with Hub.start(tmp_path_factory.mktemp("hub")) as hub:
        yield hub


@pytest.fixture
def hub(the_hub: Hub) -> Iterator[Hub]:
    """Well-behaved until the test says otherwise, with an empty log."""
    the_hub.reset_log()
    yield the_hub
    the_hub.calm()


@pytest.fixture
def keeper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeKeeper]:
    """A daemon that only takes down what the SDK hands it; the SDK's own connection goes there."""
    with FakeKeeper(tmp_path) as keeper:
        monkeypatch.setenv("MODELCACHE_SOCKET", str(keeper.socket_path))
        yield keeper
        shared().close()
        shared().leases.close()


@pytest.fixture(scope="session")
def seaweed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedFS]:
    """One S3 server for the whole session; a test takes a bucket, or a prefix, of its own."""
    with SeaweedFS.start(tmp_path_factory.mktemp("seaweed")) as running:
        yield running


# --- a skip is a decision ---------------------------------------------------------------------------------------------


def read_skips(path: Path = SKIPS) -> dict[str, str]:
    """Node id (a file, a test, one of its parameters) to the reason why it may be skipped in CI."""
    lines = (line.strip() for line in path.read_text().splitlines())
    entries = [line.partition(" ") for line in lines if line and not line.startswith("#")]
    return {node: reason.strip() for node, _, reason in entries}


def is_listed(node: str, skips: dict[str, str]) -> bool:
    return any(node == entry or node.startswith((entry + "::", entry + "[")) for entry in skips)


def _gate(report: pytest.TestReport | pytest.CollectReport) -> None:
    """An expected failure counts as a skip: either way something is not tested."""
    if IN_CI and report.outcome == "skipped" and not is_listed(report.nodeid, read_skips()):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else getattr(report, "wasxfail", report.longrepr)
        report.outcome = "failed"
        report.longrepr = f"{reason}\nhint: CI skips only what tests/skips.txt lists with its reason"
        if hasattr(report, "wasxfail"):
            del report.wasxfail


@pytest.hookimpl(wrapper=True, tryfirst=True)  # outside of the plugin that turns exceptions into skips
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    _gate(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    _gate(report)
    return report


# --- nothing blocks the loop ------------------------------------------------------------------------------------------


class _Blocked(logging.Handler):
    """Takes asyncio's own remark about slow steps (debug mode): `Executing %s took %.3f seconds`."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.steps: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.msg == "Executing %s took %.3f seconds" and isinstance(record.args, tuple):
            step, seconds = record.args
            if isinstance(seconds, float) and seconds > BLOCKED_SECONDS:
                self.steps.append(f"{seconds:.1f} s: {step}")


@pytest.fixture(autouse=True)
def _loop_is_never_blocked() -> Iterator[None]:
    blocked = _Blocked()
    logger = logging.getLogger("asyncio")
    logger.addHandler(blocked)
    yield
    logger.removeHandler(blocked)
    if blocked.steps:
        pytest.fail("the event loop was blocked for\n" + "\n".join(blocked.steps), pytrace=False)


# --- no process is left behind ----------------------------------------------------------------------------------------

_SESSION = f"{os.getpid()}-{os.urandom(4).hex()}"
_MARK = b"MODELCACHE_TEST_SESSION=" + _SESSION.encode()  # inherited, so it finds daemons whose parents are gone too
_PYTHONS_OWN = ("multiprocessing.resource_tracker", "multiprocessing.forkserver")  # end with the interpreter


def _read(path: str) -> bytes:
    with contextlib.suppress(OSError), open(path, "rb") as file:
        return file.read()
    return b""


def _describe(pid: int) -> str | None:
    """The command line and the test that started it, or None if the process is none of this session's or has ended."""
    environment = _read(f"/proc/{pid}/environ").split(b"\0")
    stat = _read(f"/proc/{pid}/stat").rpartition(b")")[2].split()
    if not stat or stat[0] == b"Z" or (_MARK not in environment and int(stat[1]) != os.getpid()):
        return None
    command = _read(f"/proc/{pid}/cmdline").replace(b"\0", b" ").decode(errors="replace").strip()
    if any(name in command for name in _PYTHONS_OWN):
        return None
    test = [entry.partition(b"=")[2].decode() for entry in environment if entry.startswith(b"PYTEST_CURRENT_TEST=")]
    return f"pid {pid}, started in {test[0] if test else '?'}: {command[:300]}"


def _left_behind() -> dict[int, str]:
    pids = (int(name) for name in os.listdir("/proc") if name.isdigit())
    return {pid: found for pid in pids if pid != os.getpid() and (found := _describe(pid))}


def _wait_for_end(pids: Iterable[int], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    waiting, running = select.poll(), 0
    with contextlib.ExitStack() as stack:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                descriptor = os.pidfd_open(pid)
                stack.callback(os.close, descriptor)
                waiting.register(descriptor, select.POLLIN)
                running += 1
        while running and (left := deadline - time.monotonic()) > 0:
            for descriptor, _ in waiting.poll(left * 1000):
                waiting.unregister(descriptor)
                running -= 1


def end_left_behind() -> list[str]:
    """Ends what the session's tests started and left running; says what it was."""
    _wait_for_end(_left_behind(), LEAVING_SECONDS)
    left = _left_behind()
    for number in (signal.SIGTERM, signal.SIGKILL):
        running = _left_behind()
        for pid in running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        _wait_for_end(running, LEAVING_SECONDS)
    return list(left.values())


def pytest_sessionstart() -> None:
    os.environ["MODELCACHE_TEST_SESSION"] = _SESSION
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # started in the background by a shell: programs would inherit that
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if os.environ.pop("PYTHONDONTWRITEBYTECODE", None):  # hundreds of processes would compile everything, each for itself
        os.environ["PYTHONPYCACHEPREFIX"] = os.path.join(tempfile.gettempdir(), f"modelcached-pycache-{os.getuid()}")


@pytest.hookimpl(trylast=True)  # when other processes that run tests have ended
def pytest_sessionfinish(session: pytest.Session) -> None:
    left = session.config.stash.setdefault(_LEFT, [])
    left += end_left_behind()
    if left:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    if hasattr(session.config, "workeroutput"):  # one of several processes that run tests: the first one tells
        session.config.workeroutput["left"] = left


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    node.config.stash.setdefault(_LEFT, []).extend(getattr(node, "workeroutput", {}).get("left", []))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    for line in config.stash.get(_LEFT, []):
        terminalreporter.write_line(f"ERROR process left behind: {line}", red=True)


_LEFT = pytest.StashKey[list[str]]()
