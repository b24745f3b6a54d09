"""The helpers for Accelerate: the newest state of a project, states from anywhere, and who of a job's processes fetches."""

from __future__ import annotations

import inspect
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import modelcache
from modelcache.accelerate import AcceleratorState, accelerator_load_state, get_accelerate_project_last_checkpoint_id
from modelcache.client import shared
from modelcache.errors import IncompatibleReferenceError, ReferenceNotFoundError, StoreNotAllowedError

from .conftest import ROOT
from .daemon import Daemon
from .saves import fill
from .seaweed import SeaweedFS

SAFE = {"model.safetensors": b"weights", "optimizer.bin": b"moments", "random_states_0.pkl": b"dice", "custom_checkpoint_0.pkl": b"own"}
UNSAFE = {**{name: data for name, data in SAFE.items() if name != "model.safetensors"}, "pytorch_model.bin": b"weights"}


class Job:
    """The processes of a job as far as the helper asks of them; threads of this process stand for them."""

    def __init__(self, nodes: int = 1, each: int = 1) -> None:
        self.barrier = threading.Barrier(nodes * each, timeout=30)
        self.ranks = [Rank(self, local) for _ in range(nodes) for local in range(each)]

    def load(self, *arguments: Any, **options: Any) -> list[Rank]:
        """Every rank calls; the first error of any."""
        with ThreadPoolExecutor(len(self.ranks)) as threads:
            calls = [threads.submit(accelerator_load_state, rank, *arguments, **options) for rank in self.ranks]
        for call in calls:
            call.result()
        return self.ranks


class Rank:
    def __init__(self, job: Job, local: int) -> None:
        self.job = job
        self.is_local_main_process = local == 0
        self.waited = 0
        self.found: dict[str, bytes] = {}
        self.folder = ""
        self.options: dict[str, Any] = {}

    def wait_for_everyone(self) -> None:
        self.waited += 1
        self.job.barrier.wait()

    def load_state(self, input_dir: str, **options: Any) -> None:
        self.folder, self.options = input_dir, options
        self.found = {path.name: path.read_bytes() for path in Path(input_dir).iterdir()}


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    folder = tmp_path_factory.mktemp("node")
    with Daemon.start(folder / "root", store=f"file://{folder}/store") as daemon:
        yield daemon


@pytest.fixture
def daemon(node: Daemon, monkeypatch: pytest.MonkeyPatch) -> Iterator[Daemon]:
    monkeypatch.setenv("MODELCACHE_SOCKET", node.socket)
    monkeypatch.setenv("TMPDIR", "/dev/shm")  # another filesystem than the root's: what root gets is the shared view everywhere
    yield node
    shared().close()
    shared().leases.close()


def test_the_functions_are_documented_with_their_arguments() -> None:
    documented = (ROOT / "docs" / "api.md").read_text().partition("## `modelcache.accelerate`")[2].partition("\n## ")[0]
    for function in (get_accelerate_project_last_checkpoint_id, accelerator_load_state):
        found = inspect.signature(function)
        bare = [each.replace(annotation=each.empty) for each in found.parameters.values()]
        assert f"\n{function.__name__}{inspect.Signature(bare)}\n" in documented
        assert all(f"`{name}" in documented for name in found.parameters)


# --- the newest of a project


def project(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / "checkpoints" / name).mkdir(parents=True)
    return folder


def test_the_highest_number_is_the_last(tmp_path: Path) -> None:
    assert get_accelerate_project_last_checkpoint_id(str(project(tmp_path, "checkpoint_2", "checkpoint_10", "checkpoint_9"))) == 10
    assert get_accelerate_project_last_checkpoint_id(tmp_path) == 10


def test_no_project_no_folder_and_an_empty_one_have_none(tmp_path: Path) -> None:
    assert get_accelerate_project_last_checkpoint_id(str(tmp_path / "none")) == -1
    assert get_accelerate_project_last_checkpoint_id(str(tmp_path)) == -1
    (tmp_path / "checkpoints").mkdir()
    assert get_accelerate_project_last_checkpoint_id(str(tmp_path)) == -1


def test_what_is_no_checkpoint_is_skipped_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    project(tmp_path, "checkpoint_3", "checkpoint_best", "checkpoint_7.part")
    (tmp_path / "checkpoints" / "checkpoint_8").write_text("a file")
    assert get_accelerate_project_last_checkpoint_id(str(tmp_path)) == 3
    assert all(name in caplog.text for name in ("'checkpoint_best'", "'checkpoint_7.part'", "'checkpoint_8'"))
    assert "checkpoint_3'" not in caplog.text


def test_a_folder_without_any_is_an_error_that_names_them(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'final', 'notes'"):
        get_accelerate_project_last_checkpoint_id(str(project(tmp_path, "final", "notes")))


# --- progress as a dataclass


@dataclass
class Progress(AcceleratorState):
    epoch: int = 0
    step: int = 0
    best: list[float] = field(default_factory=list)


def test_a_state_is_its_fields() -> None:
    assert AcceleratorState().state_dict() == {}
    progress = Progress(2, 17, [0.5])
    assert progress.state_dict() == {"epoch": 2, "step": 17, "best": [0.5]}
    other = Progress()
    other.load_state_dict(progress.state_dict())
    assert other == progress
    other.load_state_dict({"step": 18})
    assert other == Progress(2, 18, [0.5])


def test_an_unknown_name_is_refused_before_anything_changes() -> None:
    progress = Progress()
    with pytest.raises(KeyError, match=r"no field 'global_step'; it has: epoch, step, best"):
        progress.load_state_dict({"epoch": 4, "global_step": 9})
    assert progress == Progress()


def test_fields_that_nobody_would_see_are_an_error() -> None:
    class Forgotten(AcceleratorState):
        epoch: int = 0

    with pytest.raises(TypeError, match="@dataclass above it"):
        Forgotten().state_dict()


# --- local folders


def test_a_local_folder_is_loaded_as_it_is(tmp_path: Path) -> None:
    for source in (str(fill(tmp_path, UNSAFE)), tmp_path):
        (rank,) = Job().load(source, strict=False)
        assert (rank.found, rank.folder, rank.options, rank.waited) == (UNSAFE, str(tmp_path), {"strict": False}, 0)


@pytest.mark.parametrize("source", ["no/such/folder", "/no/such/folder", Path("no"), "/x/mf.models/models/artifacts/a_1"])
def test_a_missing_local_folder_is_a_value_error(source: Any) -> None:
    with pytest.raises(ValueError, match="there is no folder"):
        Job().load(source)


# --- from the daemon


def test_references_keys_urls_and_objects(daemon: Daemon, tmp_path: Path) -> None:
    reference = modelcache.save(fill(tmp_path / "state", SAFE), kind="checkpoint", name="accelerate")
    modelcache.flush()
    for source in (reference, reference["key"], reference["url"], modelcache.CheckpointArtifact(**reference)):
        (rank,) = Job().load(source)
        assert rank.found == SAFE
        assert rank.folder.startswith(str(daemon.root / "views"))
    assert daemon.status()["leases"] == 0, "the shared files are given back"


def test_an_existing_folder_is_never_taken_for_a_key(daemon: Daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = modelcache.save(fill(tmp_path / "state", SAFE), kind="checkpoint", name="accelerate")
    monkeypatch.chdir(tmp_path)
    fill(tmp_path / reference["key"], {"here": b"local"})
    assert Job().load(reference["key"])[0].found == {"here": b"local"}


def test_a_cache_dir_gets_private_files_and_mixes_nothing(daemon: Daemon, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    for name, state in (("old", {**SAFE, "custom_checkpoint_1.pkl": b"more"}), ("new", SAFE)):
        saved = modelcache.save(fill(tmp_path / name, state))
        for rank in Job(each=2).load(saved, str(tmp_path / "cache")):
            assert rank.found == state
            assert Path(rank.folder).parent == tmp_path / "cache"
            assert os.access(Path(rank.folder) / "optimizer.bin", os.W_OK)
    assert len(list((tmp_path / "cache").iterdir())) == 2


@pytest.mark.parametrize("cache_dir", ["missing", "file"])
def test_a_cache_dir_that_is_none_is_a_value_error(tmp_path: Path, cache_dir: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cache_dir"):
        Job().load("s3://bucket/state", tmp_path / cache_dir)


@pytest.mark.parametrize(
    ("state", "safe", "said"),
    [
        pytest.param(SAFE, False, "looks for pytorch_model.bin, and the state has model.safetensors", id="safe"),
        pytest.param(UNSAFE, True, "looks for model.safetensors, and the state has pytorch_model.bin", id="unsafe"),
        pytest.param({"pytorch_model-00001-of-00002.bin": b""}, True, "the state has pytorch_model-00001-of-00002.bin", id="shards"),
        pytest.param({"model.safetensors": b"", "pytorch_model_1.bin": b""}, True, None, id="both"),
        pytest.param({"pytorch_model_fsdp.bin": b"", "optimizer.bin": b""}, True, None, id="another layout"),
    ],
)
def test_the_spelling_of_the_weights(daemon: Daemon, tmp_path: Path, state: dict[str, bytes], safe: bool, said: str | None) -> None:
    reference = modelcache.save(fill(tmp_path / "state", state))
    job = Job()
    if said is None:
        assert job.load(reference, safe_serialization=safe)[0].found == state
        return
    with pytest.raises(ValueError, match=said):
        job.load(reference, safe_serialization=safe)
    assert job.ranks[0].folder == "", "nothing was loaded"


def test_the_main_process_of_each_node_fetches_and_the_others_wait(daemon: Daemon, tmp_path: Path) -> None:
    saved = modelcache.save(fill(tmp_path / "state", SAFE))
    ranks = Job(nodes=2, each=3).load(saved, strict=True)
    assert [(rank.waited, rank.found, rank.options) for rank in ranks] == [(1, SAFE, {"strict": True})] * 6


def test_an_error_of_the_main_process_leaves_nobody_waiting(daemon: Daemon, tmp_path: Path) -> None:
    job = Job(each=3)
    with pytest.raises(ReferenceNotFoundError):
        job.load("mf.models/models/artifacts/never_00000000000000000000000000000000")
    assert [rank.waited for rank in job.ranks] == [1, 1, 1]


# --- folders that no save made


def test_a_plain_folder_of_the_store(daemon: Daemon, tmp_path: Path) -> None:
    store = str(daemon.config["store"])
    folder = fill(Path(store.removeprefix("file://")) / "runs/with space/checkpoint_3", {**SAFE, "sub/more": b"deep" * (1 << 19)})
    for url in (f"{store}/runs/with space/checkpoint_3", f"{store}/runs/with%20space/checkpoint_3/"):
        for _ in range(2):
            moved = daemon.status()["store_bytes"]
            brought = modelcache.loading.bring_folder(url)
            assert {p.relative_to(brought.path).as_posix() for p in Path(brought.path).rglob("*") if p.is_file()} == {*SAFE, "sub/more"}
    assert daemon.status()["store_bytes"] == moved, "what has not changed is not read again"
    (folder / "model.safetensors").write_bytes(b"other weights")
    (folder / "sub/more").unlink()
    (folder / "sub").rmdir()
    assert Job().load(url)[0].found == {**SAFE, "model.safetensors": b"other weights"}


def test_a_plain_folder_in_s3(seaweed: SeaweedFS, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = seaweed.bucket()
    for name, data in SAFE.items():
        seaweed.client().put_object(Bucket=bucket.removeprefix("s3://"), Key=f"cached/run/checkpoint_3/{name}", Body=data)
    for name, value in seaweed.environment().items():
        monkeypatch.setenv(name, value)
    with Daemon.start(tmp_path / "root", store=f"{bucket}/cached") as daemon:
        monkeypatch.setenv("MODELCACHE_SOCKET", daemon.socket)
        assert Job(each=2).load(f"{bucket}/cached/run/checkpoint_3")[1].found == SAFE
        with pytest.raises(ReferenceNotFoundError, match="nothing lies in the folder run/checkpoint_4"):
            Job().load(f"{bucket}/cached/run/checkpoint_4")
        with pytest.raises(StoreNotAllowedError, match=f"it serves {bucket}/cached: add it to `stores`"):
            Job().load(f"{bucket}/elsewhere/checkpoint_3")
        shared().close()
        shared().leases.close()


@pytest.mark.parametrize("url", ["gs://bucket/state", "hdfs://host/state"])
def test_other_remote_paths_are_refused_naming_what_works(daemon: Daemon, url: str) -> None:
    with pytest.raises(ValueError, match="s3://bucket/prefix"):
        Job().load(url)


def test_what_stands_for_no_state_is_a_value_error(daemon: Daemon) -> None:
    with pytest.raises(ValueError, match="a reference is what a save returned"):
        Job().load(None)
    with pytest.raises(IncompatibleReferenceError):
        Job().load({"key": "no key", "type": "checkpoint"})
