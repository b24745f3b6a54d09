"""Old artifacts: what the real metaflow-checkpoint saved, in a folder and in S3, loads as the package itself loads it."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import subprocess
import sysconfig
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import modelcache
from benchmarks.peers import checkpoint_python
from modelcache import MetaflowDataArtifactReference, loading, references
from modelcache.client import shared
from modelcache.errors import IncompatibleReferenceError, NotPermittedError, ReferenceNotFoundError
from modelcached.legacy import datastore, record_key
from modelcached.tars import WINDOW_BYTES

from .clients import clients, partials, sha256
from .conftest import ROOT
from .daemon import Daemon, clean_environment
from .hub import Hub
from .proxy import Proxy
from .seaweed import SeaweedFS
from .test_cli import run

pytestmark = [pytest.mark.soak, pytest.mark.timeout(300)]  # the package's own flows, in the first test, take a minute

TOKEN = "hf_of_the_flow"
LARGE = random.Random(7).randbytes(9 << 20)
REPO = {"config.json": b"{}", "weights.bin": LARGE[: 2 << 20], "sub/vocab.txt": b"a\nb\n"}
NAMES = {  # what is saved, and loaded by the package itself; on S3 a repo is saved too
    "local": [f"{what}_{kind}" for what in ("model", "file", "checkpoint") for kind in ("tar", "files")] + ["repo"],
    "s3": ["model_tar", "model_files"],
}
Seen = dict[str, Any]


class Made(NamedTuple):
    """What a flow left behind."""

    datastore: str  # file:// or s3://
    references: dict[str, dict[str, Any]]
    loaded: Path
    flow: subprocess.Popen[bytes]
    log: Path

    @property
    def store(self) -> str:
        return f"{self.datastore}/modelcached"


def fill(content: Path) -> None:
    files = {f"many/{number % 2}/{number}": random.Random(number).randbytes(number * 37) for number in range(8)}
    files |= {"large": LARGE, "medium": LARGE[: (1 << 20) + 1], "zero": b"", "sub/ünïcode — 文": b"name", "l" * 150: b"long"}
    for path, data in files.items():
        (content / path).parent.mkdir(parents=True, exist_ok=True)
        (content / path).write_bytes(data)
    (content / "run.sh").write_bytes(b"#!/bin/sh\n")
    (content / "run.sh").chmod(0o755)
    (content / "empty/inner").mkdir(parents=True)
    (content / "link").symlink_to("many/1/1")
    (content / "folder").symlink_to("many")
    os.link(content / "medium", content / "sub/second")


def seen(folder: Path) -> Seen:
    """Files (bytes, executable), links and empty folders."""
    found: Seen = {}
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = os.readlink(path)
        elif path.is_file():
            found[name] = (path.read_bytes(), os.access(path, os.X_OK))
        elif not any(path.iterdir()):
            found[name] = None
    return found


def start_flow(folder: Path, hub: Hub, root: str, more: dict[str, str]) -> Made:
    (folder / "content").mkdir(parents=True)
    fill(folder / "content")
    environment = clean_environment(
        OLD_FLOW=str(folder),
        OLD_NAMES=",".join(NAMES[folder.name]),
        HUB_PACKAGES=sysconfig.get_path("purelib"),
        HUB_TOKEN=TOKEN,
        HF_ENDPOINT=hub.endpoint,
        HF_HOME=str(folder / "hf"),
        HF_HUB_DISABLE_XET="1",
        HOME=str(folder),
        TMPDIR=str(folder),
        METAFLOW_USER="old",
        METAFLOW_S3_WORKER_COUNT="1",  # processes of each request
        METAFLOW_DEFAULT_METADATA="local",
        METAFLOW_DATASTORE_SYSROOT_LOCAL=str(folder),
        **more,
    )
    del environment["PYTHONPATH"]  # ours
    with open(folder / "log", "wb") as log:
        command = [str(checkpoint_python()), str(ROOT / "tests/old_flow.py"), "--no-pylint", "run"]
        flow = subprocess.Popen(command, env=environment, cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    return Made(root, {}, folder / "loaded", flow, folder / "log")


@pytest.fixture(scope="module")
def both(seaweed: SeaweedFS, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Made]]:
    """Two flows that run at once, and on while the first one's work is looked at."""
    folder = tmp_path_factory.mktemp("old")
    started: dict[str, Made] = {}
    with Hub.start(folder) as hub:
        hub.add_token(TOKEN)
        hub.commit("org/old", REPO)
        try:
            started["local"] = start_flow(folder / "local", hub, f"file://{folder}/local/.metaflow", {})
            root = f"{seaweed.bucket()}/meta flow"
            s3 = {"METAFLOW_DEFAULT_DATASTORE": "s3", "METAFLOW_S3_ENDPOINT_URL": seaweed.endpoint, **seaweed.environment()}
            started["s3"] = start_flow(folder / "s3", hub, root, {"METAFLOW_DATASTORE_SYSROOT_S3": root, **s3})
            yield started
        finally:
            for made in started.values():
                made.flow.terminate()  # it ends its own processes
                made.flow.wait(30)
    shutil.rmtree(folder)


def ended(made: Made) -> Made:
    assert made.flow.wait(240) == 0, made.log.read_text()[-3000:]
    made.references.update(json.loads((made.log.parent / "references.json").read_text()))
    return made


@pytest.fixture
def local(both: dict[str, Made]) -> Made:
    return ended(both["local"])


@pytest.fixture
def s3(both: dict[str, Made]) -> Made:
    return ended(both["s3"])


@pytest.fixture(params=list(NAMES))
def made(request: pytest.FixtureRequest, both: dict[str, Made]) -> Made:
    return ended(both[request.param])


@pytest.fixture
def node(tmp_path: Path, seaweed: SeaweedFS, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Daemon]]:
    """Starts a daemon on a new root; this process talks to the last one started."""
    started: list[Daemon] = []
    for name, value in seaweed.environment().items():
        monkeypatch.setenv(name, value)

    def start(store: str) -> Daemon:
        daemon = Daemon.start(tmp_path / f"root{len(started)}", store=store)
        started.append(daemon)
        monkeypatch.setenv("MODELCACHE_SOCKET", daemon.socket)
        return daemon

    yield start
    shared().close()
    shared().leases.close()
    for daemon in started:
        daemon.close(is_orderly=True)


Start = Callable[..., Daemon]


def as_expected(name: str, content: Seen) -> Seen:
    """What a save of that kind keeps of what the flow wrote."""
    what, _, kind = name.partition("_")
    if what == "repo":
        return {path: (data, False) for path, data in REPO.items()}
    if what == "file":
        return {"large": (LARGE, False)}
    if kind == "tar":
        return content
    followed = {**content, "link": content["many/1/1"]}  # a link to a file became one; everything else was lost
    return {path: (what[0], False) for path, what in followed.items() if isinstance(what, tuple)}


def contents(folder: Path) -> dict[str, bytes]:
    """Every file as a reader sees it. The package puts a link where a folder lies on this node."""
    found = {}
    for above, _, names in os.walk(folder.resolve()):
        for name in names:
            path = Path(above, name)
            found[str(path.relative_to(folder.resolve()))] = path.read_bytes()
    return {path: data for path, data in found.items() if not path.startswith(".cache/huggingface/")}


def test_everything_loads(made: Made, node: Start) -> None:
    """By key, by dict, by URL and as an object; what the flow wrote, and what the package itself makes of it."""
    daemon = node(made.store)
    written = seen(made.log.parent / "content")
    for name, reference in made.references.items():
        path = modelcache.load(reference["key"])
        assert seen(Path(path)) == as_expected(name, written), name
        theirs = made.loaded / name
        if name in NAMES[made.loaded.parent.name]:
            assert contents(Path(path)) == ({"large": theirs.read_bytes()} if theirs.is_file() else contents(theirs)), name
        moved = daemon.status()["store_bytes"]
        assert [modelcache.load(each) for each in (reference, reference["url"], MetaflowDataArtifactReference.from_dict(reference))] == [
            path
        ] * 3
        assert daemon.status()["store_bytes"] == moved, "the second load moved bytes"
    moved = daemon.status()["store_bytes"]
    daemon.restart()
    for reference in made.references.values():
        modelcache.load(reference)
    assert daemon.status()["store_bytes"] == 0 < moved


def test_what_is_known_of_them(made: Made, node: Start, tmp_path: Path) -> None:
    """The reference comes with the load: metadata as it was, and no token that was kept with it."""
    node(made.store)
    brought = loading.bring(made.references["model_tar"]["key"])
    assert repr(brought.reference["metadata"]) == "{'loss': nan, 'steps': [1, 2], 'one': {'$float': 'nan'}}"
    assert brought.reference["model_uuid"] == made.references["model_tar"]["model_uuid"]
    repo = made.references["repo"]
    assert repo["metadata"]["kwargs"]["token"] == TOKEN, "the package has mended its ways"
    brought = loading.bring(repo, tmp_path / "mine")
    assert brought.reference["metadata"] == {**repo["metadata"], "kwargs": {**brought.reference["metadata"]["kwargs"]}}
    assert TOKEN not in repr(brought.reference)
    assert contents(tmp_path / "mine") == REPO
    (tmp_path / "mine/config.json").write_text("private and writable")


def test_they_are_listed_beside_ours(made: Made, node: Start) -> None:
    """By what their keys begin with, as a task looks for what others of its kind saved; with a part of their last component too."""
    node(made.store)
    for reference in made.references.values():
        folder = reference["key"].rpartition("/")[0]
        there = {each["key"] for each in made.references.values() if each["key"].startswith(f"{folder}/")}
        assert {each["key"] for each in modelcache.list(prefix=f"{folder}/")} == there
        (known,) = (each for each in modelcache.list(prefix=f"{folder}/") if each["key"] == reference["key"])
        assert known["type"] == reference["type"] and TOKEN not in repr(known)
        if reference["type"] == "checkpoint":
            found = references.of_task(f"{folder}/", reference["pathspec"], reference["name"])
            assert reference["key"] in {each["key"] for each in found}
            assert references.of_task(f"{folder}/", "Other/1/start/1") == []
    assert modelcache.list() == []  # what is everywhere would be a walk through the whole datastore


def test_the_command(local: Made, node: Start, tmp_path: Path) -> None:
    daemon = node(local.store)
    ran = run({**daemon.environment, "HOME": str(tmp_path)}, "load", local.references["file_tar"]["key"], "--to", str(tmp_path / "there"))
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "there/large").read_bytes() == LARGE


@pytest.mark.parametrize("name", ["model_tar", "model_files"])
def test_eight_processes_get_each_byte_once(s3: Made, node: Start, seaweed: SeaweedFS, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = s3.references[name]
    with Proxy(seaweed.address) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        daemon = node(s3.store)
        with clients(daemon, 8) as tasks:
            for task in tasks:
                task.begin("load", reference=reference["key"], hashes=True)
            outcomes = [task.good() for task in tasks]
        assert len({outcome.path for outcome in outcomes}) == 1
        expected = as_expected(name, seen(s3.log.parent / "content"))
        assert outcomes[0].files == {path: sha256(what[0]) for path, what in expected.items() if isinstance(what, tuple)}
        assert daemon.status()["store_bytes"] == reference["size"]
        assert reference["size"] <= proxy.received < reference["size"] * 1.05 + (128 << 10), "and what else there is to say"


def test_a_killed_daemon_goes_on_where_it_was(s3: Made, node: Start, seaweed: SeaweedFS, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = s3.references["model_tar"]
    with Proxy(seaweed.address) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        daemon = node(s3.store)
        with clients(daemon, 1) as (task,):
            proxy.cut(2 << 20, "client", times=1)
            proxy.delay(0.01)  # 64 KiB at a time, so that it is not over before it is held
            task.begin("load", reference=reference["key"])
            proxy.wait(lambda proxy: proxy.received > 7 << 20, 60)
            proxy.hold()
            daemon.kill()
            (kept,) = partials(daemon).values()
            assert kept > 2 << 20
            daemon.restart()
            proxy.heal()
            assert contents(Path(task.good().path or "")) == contents(s3.loaded / "model_tar")
            assert daemon.status()["store_bytes"] <= reference["size"] - kept + WINDOW_BYTES, "it began again"


def test_saved_over_while_it_is_read(s3: Made, node: Start, seaweed: SeaweedFS, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes of two saves are never mixed."""
    reference = s3.references["model_files"]
    bucket, _, prefix = s3.datastore.removeprefix("s3://").partition("/")
    there = {"Bucket": bucket, "Key": f"{prefix}/{reference['key']}/large"}
    with Proxy(seaweed.address) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        daemon = node(s3.store)
        with clients(daemon, 1) as (task,):
            proxy.delay(0.01)
            task.begin("load", reference=reference["key"])
            proxy.wait(lambda proxy: proxy.received > 4 << 20, 60)
            proxy.hold()
            try:
                seaweed.client().put_object(**there, Body=bytes(len(LARGE)))
                proxy.heal()
                outcome = task.end()
                assert outcome.error is not None and outcome.error[0] == "StoreUnavailableError"
                assert "saved again" in str(outcome.message)
            finally:
                seaweed.client().put_object(**there, Body=LARGE)
            task.begin("load", reference=reference["key"])
            assert contents(Path(task.good().path or "")) == contents(s3.loaded / "model_files")


class Store:
    """A datastore in a folder, filled by hand."""

    def __init__(self, folder: Path, like: dict[str, Any]) -> None:
        self.folder = folder
        self.key = f"{like['key']}_{os.urandom(4).hex()}"
        self.reference = {**like, "key": self.key}
        self.payload = folder / self.key
        self.record = folder / (self.key.replace("/artifacts/", "/artifact_metadata/") + ".metadata")

    def put(self, payload: bytes | dict[str, bytes], **changes: Any) -> None:
        files = {"": payload} if isinstance(payload, bytes) else payload
        size = sum(map(len, files.values()))
        kind = "tar" if isinstance(payload, bytes) else "files"
        for path, data in files.items():
            target = self.payload / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
        self.record.parent.mkdir(parents=True, exist_ok=True)
        self.record.write_text(json.dumps({**self.reference, "size": size, "storage_format": kind, **changes}))


def tar_of(*members: tuple[str, bytes, str, bytes]) -> bytes:
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as tar:
        for name, kind, target, data in members:
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = kind, target, len(data)
            tar.addfile(info, io.BytesIO(data))
    return raw.getvalue()


def file(name: str, data: bytes = b"data") -> tuple[str, bytes, str, bytes]:
    return (name, tarfile.REGTYPE, "", data)


@pytest.fixture(scope="module")
def patient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon on a datastore that is filled by hand."""
    folder = tmp_path_factory.mktemp("patient")
    with Daemon.start(folder / "root", store=f"file://{folder}/datastore/modelcached") as daemon:
        yield daemon


@pytest.fixture
def store(local: Made, patient: Daemon, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    monkeypatch.setenv("MODELCACHE_SOCKET", patient.socket)
    yield Store(patient.root.with_name("datastore"), local.references["model_tar"])
    shared().close()
    shared().leases.close()


class Bad(NamedTuple):
    payload: bytes | dict[str, bytes]
    message: str
    damage: Callable[[Store], object] | None = None
    changes: dict[str, Any] = {}  # of the reference


GOOD = tar_of(file("a"), file("sub/b", b"more" * 1000))
TWO = {"a": b"data", "b": b"more"}
LINK, HARD, DEVICE = tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE
BAD = {
    "the tar is gone": Bad(GOOD, "nothing of it is there", lambda store: store.payload.unlink()),
    "the files are gone": Bad(TWO, "nothing of it is there", lambda store: shutil.rmtree(store.payload)),
    "a file is gone": Bad(TWO, "has 4 bytes there, and had 8", lambda store: (store.payload / "b").unlink()),
    "a tar cut off": Bad(GOOD, "has 2000 bytes there", lambda store: os.truncate(store.payload, 2000)),
    "a tar cut off before it was counted": Bad(GOOD[:2000], "breaks off after 2000 bytes"),
    "no tar": Bad(b"no tar" * 1000, "can't be read at 0"),
    "a record that is no JSON": Bad(GOOD, "can't be read", lambda store: os.truncate(store.record, 100)),
    "a record that is no reference": Bad(GOOD, "no JSON object", lambda store: store.record.write_text("[1, 2]")),
    "a record without end": Bad(GOOD, "can't be read", changes={"metadata": {"x": "y" * (2 << 20)}}),
    "a record that no message holds": Bad(GOOD, "too large", changes={"metadata": {"x": "y" * (1000 << 10)}}),
    "a newer format": Bad(GOOD, "storage_format 'zip'", changes={"storage_format": "zip"}),
    "a name that leads out": Bad(tar_of(file("a"), file("../x")), "'../x'"),
    "an absolute name": Bad(tar_of(file("/tmp/x")), "is absolute"),
    "a device": Bad(tar_of(("null", DEVICE, "", b"")), "'null', which is neither"),
    "a link that leads out": Bad(tar_of(("link", LINK, "../../etc", b"")), "leads out"),
    "a link over a link": Bad(tar_of(("s/up", LINK, "..", b""), ("x", LINK, "s/up/..", b"")), "leads out"),
    "a second name of nothing": Bad(tar_of(("a", HARD, "/etc/passwd", b"")), "second name"),
    "two of one name": Bad(tar_of(file("a"), file("a", b"other")), "stands for two"),
    "a file in a link": Bad(tar_of(("a", LINK, "b", b""), file("a/x")), "stands for two"),
}


def everything(daemon: Daemon) -> list[Path]:
    return sorted(path for folder in ("trees", "views", "legacy", "tmp", "partial") for path in (daemon.root / folder).iterdir())


@pytest.mark.parametrize("what", BAD)
def test_what_can_not_be_loaded(store: Store, patient: Daemon, what: str) -> None:
    """One clear error that names the key, and nothing to be seen of it."""
    bad, before = BAD[what], everything(patient)
    store.put(bad.payload, **bad.changes)
    if bad.damage is not None:
        bad.damage(store)
    with pytest.raises(IncompatibleReferenceError) as caught:
        modelcache.load(store.key)
    assert bad.message in str(caught.value) and store.key in str(caught.value)
    assert everything(patient) == before


def test_saved_over(store: Store) -> None:
    """Version counters begin again at 0 in that package, so a key may come to mean something else, or more files than were counted."""
    store.put({"a": b"first"})
    assert contents(Path(modelcache.load(store.key))) == {"a": b"first"}
    store.put({"b": b"other"}, created_on="2030-01-01T00:00:00")
    assert contents(Path(modelcache.load(store.key))) == {"a": b"first", "b": b"other"}
    shutil.rmtree(store.payload)
    store.put(GOOD, created_on="2031-01-01T00:00:00", attempt="3")
    brought = loading.bring(store.key)
    assert contents(Path(brought.path)) == {"a": b"data", "sub/b": b"more" * 1000} and brought.reference["attempt"] == 3


def test_a_damaged_blob_is_brought_again(store: Store, patient: Daemon) -> None:
    store.put(tar_of(file("a", b"right")))
    path = Path(modelcache.load(store.key)) / "a"
    blob = patient.root / "blobs/sha256" / sha256(b"right")[:2] / sha256(b"right")
    blob.chmod(0o644)
    blob.write_bytes(b"wrong")
    assert path.read_bytes() == b"wrong"
    assert (Path(modelcache.load(store.key)) / "a").read_bytes() == b"right" == path.read_bytes()


def test_nothing_of_them_is_deleted(local: Made, node: Start) -> None:
    node(local.store)
    key = local.references["checkpoint_files"]["key"]
    before = sorted(Path(local.datastore.removeprefix("file://")).rglob("*"))
    with pytest.raises(NotPermittedError, match="metaflow-checkpoint"):
        modelcache.delete(key)
    with pytest.raises(ReferenceNotFoundError):
        modelcache.delete(key + "0")
    with pytest.raises(ReferenceNotFoundError):
        modelcache.load(key + "0")
    assert sorted(Path(local.datastore.removeprefix("file://")).rglob("*")) == before


@pytest.mark.parametrize(
    ("store_url", "expected"),
    [
        ("file:///data/.metaflow/modelcached", "file:///data/.metaflow"),
        ("file:///data/store", "file:///data/store"),
        ("file:///modelcached", "file:///modelcached"),
        ("s3://bucket/a/b/modelcached", "s3://bucket/a/b"),
        ("s3://bucket/modelcached", "s3://bucket"),
        ("s3://bucket", "s3://bucket"),
        ("s3://modelcached", "s3://modelcached"),
    ],
)
def test_where_they_lie(store_url: str, expected: str) -> None:
    assert datastore(store_url) == expected


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("mf.models/models/artifacts/a_1", "mf.models/models/artifact_metadata/a_1.metadata"),
        ("mf.models_002/models/artifacts/with/slash", "mf.models_002/models/artifact_metadata/with/slash.metadata"),
        (
            "mf.c/checkpoints/artifacts/models/artifacts/s/t/h.0.n.0",
            "mf.c/checkpoints/artifact_metadata/models/artifacts/s/t/h.0.n.0.metadata",
        ),
        ("refs/x", None),
    ],
)
def test_where_their_records_lie(key: str, expected: str | None) -> None:
    assert record_key(key) == expected
