"""Ours against the real huggingface_hub, on the same hub: the same files with the same bytes, the same errors, the same folders."""

from __future__ import annotations

import builtins
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .clients import Client, sha256
from .daemon import Daemon
from .hub import Hub
from .hub.cases import CASES, MAIN, TOKEN, UNKNOWN, Case, hashes, publish
from .hub.oracle import Oracle, Outcome, file_hashes

pytestmark = pytest.mark.timeout(120)

OURS = {"HfHubHTTPError": "TokenRefusedError"}  # where the names differ: theirs is any answer of the hub that has no class of its own
SNAPSHOTS = [case for case in CASES if case.files and case.call == "snapshot_download"]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    with Hub.start(tmp_path_factory.mktemp("oracle")) as hub:
        yield hub


@pytest.fixture(scope="module")
def commits(hub: Hub) -> dict[str, str]:
    return publish(hub)


@pytest.fixture(scope="module")
def oracle(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Oracle]:
    with Oracle(tmp_path_factory.mktemp("theirs"), hub.endpoint) as oracle:
        yield oracle


@pytest.fixture(scope="module")
def daemon(hub: Hub, commits: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with Daemon.start(tmp_path_factory.mktemp("ours") / "root", hub, min_free="0") as daemon:
        yield daemon


@pytest.fixture(scope="module")
def task(daemon: Daemon) -> Iterator[Client]:
    with Client.of(daemon) as task:
        yield task


@pytest.fixture(scope="module")
def their_task(daemon: Daemon) -> Iterator[Client]:
    """A program that was written for huggingface_hub."""
    with Client.of(daemon) as task:
        assert task.call("import", module="huggingface_hub.errors").error is None
        yield task


def ask(task: Client, call: str, **arguments: Any) -> Outcome:
    """Our outcome, in the oracle's words."""
    outcome = task.call(call, **arguments)
    if outcome.path is None:
        return outcome
    if call == "snapshot_download":
        return Outcome(outcome.path, file_hashes(Path(outcome.path)))
    shown = os.path.join(arguments.get("subfolder") or "", arguments["filename"])
    return Outcome(outcome.path, {shown: sha256(Path(outcome.path).read_bytes())})


def layout(folder: Path) -> dict[str, str]:
    """Every file and link below, as text: what a link points to, what small files say, the hashes of the others."""
    found = {}
    for above, _, names in os.walk(folder):
        for name in names:
            path = Path(above, name)
            relative = str(path.relative_to(folder))
            if path.is_symlink():
                found[relative] = f"-> {os.readlink(path)}"
            elif "/refs/" in f"/{relative}":
                found[relative] = path.read_text()
            else:
                found[relative] = sha256(path.read_bytes())
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_table(
    case: Case, empty_node: Daemon, commits: dict[str, str], oracle: Oracle, task: Client, their_task: Client, tmp_path: Path
) -> None:
    arguments = case.filled(commits)
    theirs = oracle.call(case.call, cache_dir=str(tmp_path / "theirs"), **arguments)
    if arguments.get("local_files_only") or arguments["token"] == UNKNOWN:  # takes a node that has nothing: a fresh answer needs no token
        with Client.of(empty_node) as fresh:
            ours = ask(fresh, case.call, **arguments)
            assert fresh.call("import", module="huggingface_hub.errors").error is None
            familiar = ask(fresh, case.call, **arguments)
    else:
        ours, familiar = ask(task, case.call, **arguments), ask(their_task, case.call, **arguments)
    if theirs.error is None:
        assert ours.error is None and ours.files == theirs.files == case.hashes
        assert familiar.path == ours.path  # warm, by another process
    else:
        assert ours.error is not None and familiar.error is not None, ours
        assert ours.error[0] == OURS.get(theirs.error[0], theirs.error[0])
        assert {name for name in theirs.error if hasattr(builtins, name)} <= set(ours.error)  # what users catch without theirs
        assert set(theirs.error) <= set(familiar.error)  # and with it


@pytest.mark.parametrize("case", SNAPSHOTS, ids=lambda case: case.name)
def test_local_dir(case: Case, commits: dict[str, str], oracle: Oracle, task: Client, tmp_path: Path) -> None:
    arguments = case.filled(commits)
    theirs = oracle.call(case.call, local_dir=str(tmp_path / "theirs"), cache_dir=str(tmp_path / "cache"), **arguments)
    ours = ask(task, case.call, local_dir=str(tmp_path / "ours"), **arguments)
    assert ours.files == theirs.files == case.hashes
    assert theirs.path == str(tmp_path / "theirs") and ours.path == str(tmp_path / "ours")
    for path in (tmp_path / "ours").rglob("*"):
        assert not path.is_symlink() and os.access(path, os.W_OK) and (path.is_dir() or path.stat().st_nlink == 1)


@pytest.mark.parametrize("case", SNAPSHOTS, ids=lambda case: case.name)
def test_cache_dir(hub: Hub, case: Case, commits: dict[str, str], oracle: Oracle, task: Client, tmp_path: Path) -> None:
    """The same folders, links, references and listings; and theirs finds everything in ours without asking anybody."""
    arguments = case.filled(commits)
    theirs = oracle.call(case.call, cache_dir=str(tmp_path / "theirs"), **arguments)
    ours = ask(task, case.call, cache_dir=str(tmp_path / "ours"), **arguments)
    assert ours.files == theirs.files and theirs.path is not None
    assert ours.path == theirs.path.replace(str(tmp_path / "theirs"), str(tmp_path / "ours"), 1)
    left, right = layout(tmp_path / "ours"), layout(tmp_path / "theirs")
    own = {name for name in left.keys() | right.keys() if name.startswith(".locks/") or name == "CACHEDIR.TAG" or "/trees/" in name}
    assert {name: text for name, text in left.items() if name not in own} == {name: text for name, text in right.items() if name not in own}
    assert {name for name in left if "/trees/" in name} == {name for name in right if "/trees/" in name}
    hub.reset_log()
    found = oracle.call(case.call, cache_dir=str(tmp_path / "ours"), **{**arguments, "local_files_only": True})
    assert found.path == ours.path and found.files == ours.files and hub.requests() == []


def test_a_partial_cache_dir_is_not_taken_for_a_whole_one(commits: dict[str, str], oracle: Oracle, task: Client, tmp_path: Path) -> None:
    arguments = {"repo_id": "org/model", "cache_dir": str(tmp_path), "token": False}
    ask(task, "snapshot_download", allow_patterns="*.json", **arguments)
    partial = oracle.call("snapshot_download", local_files_only=True, **arguments)
    assert partial.is_error("LocalEntryNotFoundError"), partial
    whole = oracle.call("snapshot_download", **arguments)
    assert whole.files == hashes(MAIN)


DRY_RUNS: list[dict[str, Any]] = [
    {"repo_id": "org/model"},
    {"repo_id": "org/model", "allow_patterns": ["*.json", "weights/*"]},
    {"repo_id": "org/names"},
    {"repo_id": "org/private", "token": TOKEN},
    {"repo_id": "org/model", "repo_type": "dataset"},
    {"repo_id": "org/model", "filename": "tokenizer/vocab.txt"},
    {"repo_id": "org/model", "filename": "model.safetensors"},
]


@pytest.fixture(scope="module")
def empty_node(hub: Hub, commits: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """Empty whenever a test begins: each one cleans up."""
    with Daemon.start(tmp_path_factory.mktemp("empty") / "root", hub, min_free="0") as daemon:
        yield daemon


@pytest.fixture
def newcomer(empty_node: Daemon) -> Iterator[Client]:
    with Client.of(empty_node) as task:
        yield task
    with Client.of(empty_node) as task:
        for entry in task.ask("ls")["repos"]:
            task.call("ask", method="rm", repo_id=entry["repo_id"], repo_type=entry["repo_type"])
        assert task.ask("ls")["repos"] == []


@pytest.mark.parametrize("where", ["cache_dir", "local_dir"])
@pytest.mark.parametrize("arguments", DRY_RUNS, ids=lambda arguments: "-".join(map(str, arguments.values())))
def test_dry_run(hub: Hub, oracle: Oracle, newcomer: Client, tmp_path: Path, arguments: dict[str, Any], where: str) -> None:
    """Nothing is downloaded, and what it says is what theirs says: before the download, and after it."""
    arguments = {"token": False, where: str(tmp_path / "place"), **arguments}
    call = "hf_hub_download" if "filename" in arguments else "snapshot_download"
    for moment in ("before", "after"):
        hub.reset_log()
        theirs = oracle.call(call, dry_run=True, **arguments)
        ours = newcomer.call(call, dry_run=True, **arguments)
        assert theirs.error is None and ours.error is None and hub.bytes_sent() == 0
        assert rows(ours.value) == rows(theirs.value), moment
        if moment == "before":
            assert not any(row["is_cached"] for row in rows(ours.value))
            assert oracle.call(call, **arguments).error is None and newcomer.call(call, **arguments).error is None


def rows(value: Any) -> list[dict[str, Any]]:
    return sorted(value if isinstance(value, list) else [value], key=lambda row: row["filename"])


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"repo_id": "org/missing"}, "RepositoryNotFoundError"),
        ({"repo_id": "org/private"}, "RepositoryNotFoundError"),
        ({"repo_id": "org/gated"}, "GatedRepoError"),
        ({"repo_id": "org/model", "revision": "nowhere"}, "RevisionNotFoundError"),
    ],
    ids=str,
)
def test_dry_run_of_what_is_not_to_be_had(
    commits: dict[str, str], oracle: Oracle, task: Client, arguments: dict[str, Any], error: str
) -> None:
    theirs = oracle.call("snapshot_download", dry_run=True, token=False, **arguments)
    ours = task.call("snapshot_download", dry_run=True, token=False, **arguments)
    assert ours.error is not None and ours.error[0] == error and "OSError" in ours.error
    # Theirs says no more of a missing repo than that a dry run can't be done.
    assert theirs.error is not None and theirs.error[0] == ("DryRunError" if error == "RepositoryNotFoundError" else error)
