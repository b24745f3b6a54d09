"""What bad stores, references and paths get, as a user at a terminal sees it: a clear line, what to do, the right exit code.

Invariants of all of them: no traceback, nothing half-visible, never a "saved" for what is not, no secret in a log, a reference or a
message. Where a case is tested closer to its cause (connections: test_store, test_upload, test_load; the path: test_sdk_walk,
test_cli_save; a file that changes for ever: test_sdk_save), it is not repeated here.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from .daemon import Daemon
from .kernel import small_tmpfs
from .liar import Liar
from .proxy import Proxy
from .saves import MIB, fill
from .seaweed import READER, WRITER, SeaweedFS
from .test_cli import run
from .test_cli_save import contents, environment_of

UNKNOWN = "mf.models/models/artifacts/unknown_0123"
Ran = subprocess.CompletedProcess[str]
Node = Callable[..., "User"]


class User:
    """Somebody at a terminal of a node."""

    def __init__(self, daemon: Daemon, home: Path) -> None:
        self.daemon = daemon
        self._environment = environment_of(daemon, home)

    def run(self, *words: str, **more: str) -> Ran:
        ran = run({**self._environment, **more}, *words)
        assert "Traceback" not in ran.stderr + ran.stdout and ("error: " in ran.stderr) == (ran.returncode != 0), ran.stderr
        assert ran.returncode == 0 or ran.stderr.splitlines()[-1].startswith("hint: "), ran.stderr
        return ran

    def save(self, path: Path, *words: str) -> str:
        ran = self.run("save", str(path), *words)
        assert ran.returncode == 0, ran.stderr
        return ran.stdout.strip()

    def late(self, key: str) -> str:
        """What `flush` says of a save that can't arrive; `status` says the same."""
        ran = self.run("flush", "--deadline", "1s")
        while "not in the store yet: " not in ran.stderr:  # the first try is still on
            ran = self.run("flush", "--deadline", "1s")
        assert (ran.returncode, ran.stdout) == (9, f"{key}\n")
        said = ran.stderr.splitlines()[0].partition(f"{key}: ")[2]
        assert said and said.partition(" (")[0] in self.run("status").stdout
        return said


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    """Starts a node, on a store."""
    daemons: list[Daemon] = []

    def start(name: str, **config: Any) -> User:
        daemons.append(Daemon.start(tmp_path / name, **config))
        return User(daemons[-1], tmp_path)

    yield start
    for daemon in daemons:
        daemon.close(is_orderly=True)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return fill(tmp_path / "out", {"config.json": b"{}", "weights.bin": os.urandom(400_000)})


@pytest.fixture
def bad_network(seaweed: SeaweedFS) -> Iterator[Proxy]:
    with Proxy(seaweed.address) as proxy:
        yield proxy


# ---- stores


@pytest.mark.slow
@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("bucket", "identity", "secret", "said", "code"),
    [
        ("", WRITER, "hunter2-hunter2", "the secret key is wrong", 4),
        ("", READER, None, "refuses the request", 3),
        ("s3://no-such-bucket/models", WRITER, None, "there is no such bucket", 3),
    ],
    ids=["wrong key", "may only read", "no bucket"],
)
def test_a_store_that_refuses(
    node: Node,
    seaweed: SeaweedFS,
    source: Path,
    monkeypatch: pytest.MonkeyPatch,
    bucket: str,
    identity: str,
    secret: str | None,
    said: str,
    code: int,
) -> None:
    environment = {**seaweed.environment(identity), "AWS_MAX_ATTEMPTS": "1", **({"AWS_SECRET_ACCESS_KEY": secret} if secret else {})}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    url = bucket or seaweed.bucket()
    user = node("root", store=url)
    key = user.save(source)
    words = user.late(key)
    assert said in words and url in words and words.endswith(")"), "what to do is said too"
    missing = user.run("load", UNKNOWN)
    assert missing.returncode == code and (code == 3 or said in missing.stderr)
    assert contents(Path(user.run("load", key).stdout.strip())) == contents(source), "this node has it all the same"
    user.daemon.terminate()
    written = user.daemon.log + words + missing.stderr + "".join(path.read_text() for path in user.daemon.root.glob("spool/*/entry.json"))
    assert key in written
    assert environment["AWS_SECRET_ACCESS_KEY"] not in written and environment["AWS_ACCESS_KEY_ID"] not in written
    if not bucket:
        assert "Contents" not in seaweed.client().list_objects_v2(Bucket=url.removeprefix("s3://"))
    user.daemon.restart()


@pytest.mark.slow
@pytest.mark.timeout(60)
def test_a_store_that_does_not_answer(
    node: Node, seaweed: SeaweedFS, bad_network: Proxy, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in seaweed.environment(endpoint=bad_network.endpoint).items():
        monkeypatch.setenv(name, value)
    user = node("root", store=seaweed.bucket())
    bad_network.hold()
    key = user.save(source)
    ran = user.run("flush", "--deadline", "300ms")
    assert (ran.returncode, ran.stdout) == (9, f"{key}\n") and "safe on this node" in ran.stderr
    bad_network.let_go()
    assert user.run("flush").stderr == "everything is in the store\n"


def test_a_store_that_is_full(node: Node, tmp_path: Path) -> None:
    source = fill(tmp_path / "out", {"config.json": b"{}", "weights.bin": os.urandom(3 * MIB)})
    with small_tmpfs(tmp_path / "disk") as disk:
        user = node("root", store=f"file://{disk}/store")
        key = user.save(source)
        assert f"file://{disk}/store is full (free space there" in user.late(key)
        assert not list((disk / "store").glob("refs/**/*.json")) and not list((disk / "store").glob("blobs/**/*[0-9a-f]"))
        assert os.listdir(disk / "store" / ".modelcached" / "tmp") == []
        subprocess.run(["mount", "-o", "remount,size=8m", str(disk)], check=True)
        assert user.run("flush").returncode == 0
        assert contents(Path(node("other", store=f"file://{disk}/store").run("load", key).stdout.strip())) == contents(source)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("is_keeping", [True, False], ids=["etags", "bytes"])
async def test_a_bucket_that_lies(node: Node, source: Path, monkeypatch: pytest.MonkeyPatch, is_keeping: bool) -> None:
    """Made-up ETags do no harm. Where other bytes are kept than were sent, nothing false is ever loaded, nor said to be stored."""

    def keep(data: bytes) -> bytes:
        return data if is_keeping or len(data) < 100_000 else b"\0" + data[1:]

    async with Liar(keep) as liar:
        for name, value in {"AWS_ENDPOINT_URL_S3": liar.endpoint, "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y"}.items():
            monkeypatch.setenv(name, value)

        def work() -> None:
            user = node("root", store="s3://liar/models")
            key = user.save(source)
            if is_keeping:
                assert user.run("flush").returncode == 0
                again = node("other", store="s3://liar/models").run("load", key)
                assert again.returncode == 0 and contents(Path(again.stdout.strip())) == contents(source)
            else:
                assert "other bytes" in user.late(key)
                missing = node("other", store="s3://liar/models").run("load", key, MODELCACHE_PENDING_SECONDS="0")
                assert missing.returncode == 3 and missing.stdout == "" and "not in the store yet" in missing.stderr

        await asyncio.to_thread(work)
        assert any(name.endswith(".json") and "/refs/" in name for name in liar.objects) == is_keeping


# ---- references


def spoilt(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """A change of a JSON object in the store."""

    def spoil(path: Path) -> None:
        said = json.loads(path.read_text())
        change(said)
        path.write_text(json.dumps(said))

    return spoil


REFERENCES: dict[str, tuple[str, Callable[[Path], object], int, str]] = {
    "deleted": ("refs", os.unlink, 3, "no save has the key"),
    "cut off": ("refs", lambda path: os.truncate(path, 40), 1, "is damaged in the store"),
    "newer": ("refs", spoilt(lambda said: said.update(format=9)), 1, "is of a newer version (format 9)"),
    "no tree": ("trees", os.unlink, 1, "is missing or damaged"),
    "cut tree": ("trees", lambda path: os.truncate(path, 40), 1, "is missing or damaged"),
    "other tree": ("trees", spoilt(lambda said: said["tree"]["files"].pop()), 1, "is missing or damaged"),
    "no blob": ("blobs", os.unlink, 1, "a part of what was saved is no longer in"),
    "other blob": ("blobs", lambda path: path.write_bytes(os.urandom(path.stat().st_size)), 8, "the bytes of "),
}


@pytest.mark.timeout(60)
def test_references_that_can_not_be_loaded(node: Node, tmp_path: Path) -> None:
    store = tmp_path / "store"
    user, other = node("root", store=f"file://{store}"), node("other", store=f"file://{store}")
    for number, (name, (folder, spoil, code, said)) in enumerate(REFERENCES.items()):
        source = fill(tmp_path / "saves" / str(number), {"weights.bin": os.urandom(300_000)})
        before = set(store.rglob("*"))
        key = user.save(source, "--flush")
        for path in set(store.rglob("*")) - before:
            if path.is_file() and path.relative_to(store).parts[0] == folder:
                spoil(path)
        ran = other.run("load", key, "--to", str(tmp_path / "mine" / str(number)))
        assert (ran.returncode, ran.stdout) == (code, "") and said in ran.stderr, (name, ran.stderr)
        assert not (tmp_path / "mine" / str(number)).exists(), name
    assert os.listdir(other.daemon.root / "views") == [] and os.listdir(other.daemon.root / "trees") == []


def test_a_type_of_a_newer_version_is_listed_and_loaded(node: Node, tmp_path: Path, source: Path) -> None:
    user = node("root", store=f"file://{tmp_path}/store")
    key = user.save(source, "--flush")
    spoilt(lambda said: said["reference"].update(type="adapter"))(tmp_path / "store/refs" / f"{key}.json")
    assert key in user.run("ls", "--store").stdout and key not in user.run("ls", "--store", "--kind", "model").stdout
    assert contents(Path(user.run("load", key).stdout.strip())) == contents(source)


# ---- paths


def test_a_save_that_does_not_fit_on_the_disk(node: Node, tmp_path: Path) -> None:
    source = fill(tmp_path / "out", {"weights.bin": os.urandom(5 * MIB)})
    with (
        small_tmpfs(tmp_path / "disk", "8m") as disk,
        Daemon.start(disk / "root", store=f"file://{tmp_path}/store", min_free="1MiB") as daemon,
    ):
        user = User(daemon, tmp_path)
        for words in ([], ["--format", "tar"]):
            ran = user.run("save", str(source), *words)
            if not words:
                assert ran.returncode == 0, "it fits once"
                fill(tmp_path / "out", {"more.bin": os.urandom(5 * MIB)})
                ran = user.run("save", str(source), *words)
            assert ran.returncode == 6 and ran.stdout == "" and " MiB; " in ran.stderr and "modelcache flush" in ran.stderr
        assert user.run("flush").returncode == 0
        assert os.listdir(disk / "root/tmp") == [] and os.listdir(disk / "root/spool") == ["corrupt"]
        assert user.run("ls", "--store").stdout.count("stored") == 1


@pytest.mark.parametrize("where", [".", "cache"])
def test_a_folder_that_holds_the_cache(node: Node, tmp_path: Path, where: str) -> None:
    user = node("out/cache", store=f"file://{tmp_path}/store")
    fill(tmp_path / "out", {"weights.bin": b"w"})
    ran = user.run("save", str(tmp_path / "out" / where))
    assert ran.returncode == 1 and ran.stdout == "" and "is the daemon's own cache" in ran.stderr
    assert os.listdir(user.daemon.root / "tmp") == [] and os.listdir(user.daemon.root / "spool") == ["corrupt"]


@pytest.mark.parametrize(
    ("name", "make", "code", "said"),
    [
        ("loop", lambda path: path.symlink_to(path), 3, "a link to "),
        ("file/", lambda path: path.touch(), 3, "a file, and no folder"),
        ("itself", lambda path: (path.mkdir(), (path / "up").symlink_to(path)), 1, "'up' contains itself"),
        ("fifo", os.mkfifo, 1, "'fifo' is a FIFO"),
    ],
)
def test_paths_that_are_no_folder(node: Node, tmp_path: Path, name: str, make: Callable[[Path], object], code: int, said: str) -> None:
    make(tmp_path / name.rstrip("/"))
    user = node("root", store=f"file://{tmp_path}/store")
    ran = user.run("save", f"{tmp_path}/{name}", "--follow-links")
    assert (ran.returncode, ran.stdout) == (code, "") and said in ran.stderr
