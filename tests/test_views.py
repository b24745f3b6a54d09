"""What a task is shown: exactly the repo's files, whatever they are called, whatever root or an administrator did to them before."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from .clients import Client, Tree, blobs, hashes, sha256, views
from .daemon import Daemon
from .hub import Hub, Random
from .hub.cases import DATA, MAIN, NAMES, PULL, SMALL, SPACE
from .hub.cases import publish as publish_cases

pytestmark = pytest.mark.timeout(120)

MIB = 1 << 20
needs_root = pytest.mark.skipif(os.getuid() != 0, reason="takes root: it writes where only the daemon may")


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    with Hub.start(tmp_path_factory.mktemp("views")) as hub:
        yield hub


@pytest.fixture(scope="module")
def commits(hub: Hub) -> dict[str, str]:
    return publish_cases(hub)


@pytest.fixture(scope="module")
def daemon(hub: Hub, commits: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with Daemon.start(tmp_path_factory.mktemp("node") / "root", hub, min_free="0", hub_backoff_seconds=0.02) as daemon:
        yield daemon


@pytest.fixture
def task(daemon: Daemon) -> Iterator[Client]:
    with Client.of(daemon) as task:
        yield task


class Published(NamedTuple):
    """A repo whose bytes are in no other test's."""

    name: str
    tree: Tree


@pytest.fixture
def repo(hub: Hub, daemon: Daemon, request: pytest.FixtureRequest) -> Published:
    name = "org/" + re.sub(r"[^a-z0-9]+", "-", request.node.name.lower())[:90].strip("-")
    tree: Tree = {
        "config.json": f'"{name}"'.encode(),
        "tokenizer/vocab.txt": name.encode(),
        "tokenizer/deep/er/merges.txt": b"",
        "model.safetensors": Random(name, 2 * MIB),
    }
    hub.commit(name, tree)
    hub.reset_log()
    return Published(name, tree)


def shown(task: Client, path: str) -> dict[str, str] | None:
    return task.call("hashes", folder=path).files


# ---- what a view is


def test_a_view_is_read_only_and_private_to_nobody(daemon: Daemon, task: Client, repo: Published) -> None:
    path = Path(task.download(repo.name))
    assert path.parent == daemon.root / "views" and shown(task, str(path)) == hashes(repo.tree)
    for name, content in repo.tree.items():
        found = (path / name).stat()
        assert stat.S_IMODE(found.st_mode) == 0o444 and found.st_size == len(content)
        assert found.st_ino == (daemon.root / "blobs" / "sha256" / sha256(content)[:2] / sha256(content)).stat().st_ino
    folders = [path, *(folder for folder in path.rglob("*") if folder.is_dir())]
    assert {stat.S_IMODE(folder.stat().st_mode) for folder in folders} == {0o555}
    modes = {entry.name: stat.S_IMODE(entry.stat().st_mode) for entry in daemon.root.iterdir() if entry.is_dir()}
    assert modes.pop("views") == 0o711 and set(modes.values()) == {0o700}


@pytest.mark.parametrize(
    ("arguments", "tree"),
    [
        ({"repo_id": "org/names"}, NAMES),
        ({"repo_id": "org/model"}, MAIN),
        ({"repo_id": "org/model", "repo_type": "dataset"}, DATA),
        ({"repo_id": "org/model", "repo_type": "space"}, SPACE),
        ({"repo_id": "org/model", "revision": "refs/pr/1"}, PULL),
        ({"repo_id": "org/older-name"}, SMALL),
        ({"repo_id": "alone"}, SMALL),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if "repo_id" in value else "",
)
def test_repos_of_every_kind(daemon: Daemon, arguments: dict[str, Any], tree: Tree) -> None:
    with Client.of(daemon) as task:
        assert shown(task, task.download(**arguments)) == hashes(tree)


def test_a_short_hash_is_a_revision(daemon: Daemon, commits: dict[str, str]) -> None:
    with Client.of(daemon) as task:
        assert task.fetch("org/model", revision=commits["short"])["commit"] == commits["first"]


def test_patterns_that_match_nothing_show_an_empty_folder(daemon: Daemon) -> None:
    with Client.of(daemon) as task:
        reply = task.fetch("org/model", allow_patterns=["*.onnx"])
        assert reply["files"] == 0 and os.listdir(reply["path"]) == [] and "no file of org/model matches" in reply["warnings"][0]


@pytest.mark.parametrize("name", [name for name in NAMES if name.isprintable()][:8])
def test_one_file_with_a_hard_name(daemon: Daemon, name: str) -> None:
    with Client.of(daemon) as task:
        path = task.call("hf_hub_download", repo_id="org/names", filename=name).path
        assert path is not None and path.endswith(f"/{name}") and Path(path).read_bytes() == NAMES[name]


# ---- names that are not for a folder


HOSTILE: list[tuple[str, list[tuple[str, bytes]]]] = [
    ("../escape.txt", [("../escape.txt", b"out")]),
    ("a/../../escape.txt", [("a/../../escape.txt", b"out")]),
    ("/etc/escape.txt", [("/etc/escape.txt", b"out")]),
    ("a/./b.txt", [("a/./b.txt", b"x")]),
    ("a//b.txt", [("a//b.txt", b"x")]),
    ("nul\\x00.txt", [("nul\0.txt", b"x")]),
    ("..", [("..", b"x")]),
    ("", [("", b"x")]),
    ("twice.txt", [("twice.txt", b"1"), ("twice.txt", b"2")]),
    ("both/inside.txt", [("both", b"1"), ("both/inside.txt", b"2")]),
    ("both", [("both/inside.txt", b"2"), ("both", b"1")]),
    ("y" * 256, [("y" * 256, b"x")]),
]


@pytest.mark.parametrize(("named", "pairs"), HOSTILE, ids=[repr(named)[:30] for named, _ in HOSTILE])
def test_hostile_listings_are_refused_by_name(
    hub: Hub, daemon: Daemon, request: pytest.FixtureRequest, named: str, pairs: list[tuple[str, bytes]]
) -> None:
    repo = f"org/hostile-{[each for each, _ in HOSTILE].index(named)}"
    hub.commit(repo, [("config.json", b"{}"), *pairs], hostile=True)
    before = blobs(daemon), views(daemon)
    hub.reset_log()
    with Client.of(daemon) as task:
        asks: list[dict[str, Any]] = [{}, {"allow_patterns": "config.json"}]
        for arguments in asks:
            refused = task.refused("snapshot_download", repo_id=repo, **arguments)
            assert refused.is_error("UnsafePathError") and refused.is_error("ValueError")
            assert repr(named)[:100].replace("\\\\", "\\") in refused.message and "hint: " in refused.message
        assert (blobs(daemon), views(daemon)) == before and hub.bytes_sent() == 0
        assert shown(task, task.download("alone")) == hashes(SMALL)
    assert not list(daemon.root.parent.rglob("escape.txt")) and not os.path.exists("/etc/escape.txt")


# ---- what root and administrators do


def write_through(path: Path, content: bytes) -> None:
    with open(path, "r+b") as file:
        file.write(content)


@needs_root
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer/vocab.txt"])
@pytest.mark.parametrize("restarted", [False, True], ids=["running", "restarted"])
def test_a_write_through_a_view_is_mended(hub: Hub, daemon: Daemon, task: Client, repo: Published, name: str, restarted: bool) -> None:
    """Root can write through a 0444 hard link, into the blob and every view of it: the next caller gets right bytes all the same."""
    fork_tree: Tree = {**repo.tree, "config.json": b"[]", "large.bin": Random("fork", 3)}
    hub.commit(f"{repo.name}-fork", fork_tree)
    path, fork = Path(task.download(repo.name)), Path(task.download(f"{repo.name}-fork"))
    size = (path / name).stat().st_size
    write_through(path / name, b"##")
    assert (path / name).stat().st_size == size and (path / name).read_bytes()[:2] == b"##"
    if restarted:
        daemon.restart()
    hub.reset_log()
    with Client.of(daemon) as other:
        assert other.download(repo.name) == str(path)
        assert shown(other, str(path)) == hashes(repo.tree)
        assert shown(other, str(fork)) == hashes(fork_tree)
        assert other.download(f"{repo.name}-fork") == str(fork)
    assert hub.bytes_sent() == size
    assert (daemon.root / "quarantine" / sha256(repo.tree[name])).read_bytes()[:2] == b"##"


@needs_root
def test_a_longer_file_is_mended(hub: Hub, daemon: Daemon, task: Client, repo: Published) -> None:
    path = Path(task.download(repo.name))
    with open(path / "config.json", "ab") as file:
        file.write(b"more")
    assert shown(task, task.download(repo.name)) == hashes(repo.tree)


@needs_root
@pytest.mark.parametrize("restarted", [False, True], ids=["running", "restarted"])
def test_touching_a_file_costs_a_hash_and_no_download(hub: Hub, daemon: Daemon, task: Client, repo: Published, restarted: bool) -> None:
    path = Path(task.download(repo.name))
    os.utime(path / "model.safetensors")
    if restarted:
        daemon.restart()
    hub.reset_log()
    assert shown(task, task.download(repo.name)) == hashes(repo.tree)
    assert hub.requests() == [] and not (daemon.root / "quarantine" / sha256(repo.tree["model.safetensors"])).exists()
    again = task.fetch(repo.name)
    assert again["path"] == str(path) and (path / "model.safetensors").stat().st_mtime == 315_532_800


@needs_root
@pytest.mark.parametrize("what", ["file", "folder", "link", "foreign file", "view", "all views"])
@pytest.mark.parametrize("restarted", [False, True], ids=["running", "restarted"])
def test_a_view_that_was_changed_is_made_again(hub: Hub, daemon: Daemon, task: Client, repo: Published, what: str, restarted: bool) -> None:
    path = Path(task.download(repo.name))
    if what == "file":
        (path / "tokenizer" / "vocab.txt").unlink()
    elif what == "folder":
        remove(path / "tokenizer")
    elif what == "link":
        (path / "config.json").unlink()
        (path / "config.json").symlink_to("/etc/hostname")
    elif what == "foreign file":
        (path / "foreign.txt").write_text("not of this repo")
        (path / "config.json").unlink()
    elif what == "view":
        remove(path)
    else:
        remove(path)
        (daemon.root / "trees" / f"{path.name}.json").unlink()
    if restarted:
        daemon.restart()
    hub.reset_log()
    with Client.of(daemon) as other:
        assert other.download(repo.name) == str(path)
        assert shown(other, str(path)) == hashes(repo.tree)
    assert hub.requests() == []


@needs_root
def test_a_blob_that_is_gone_is_fetched_again(hub: Hub, daemon: Daemon, task: Client, repo: Published) -> None:
    path = Path(task.download(repo.name))
    for name in ("model.safetensors", "config.json"):
        digest = sha256(repo.tree[name])
        (daemon.root / "blobs" / "sha256" / digest[:2] / digest).unlink()
        (path / name).unlink()
    hub.reset_log()
    assert shown(task, task.download(repo.name)) == hashes(repo.tree)
    assert hub.bytes_sent() == 2 * MIB + len(repo.tree["config.json"])


def remove(folder: Path) -> None:
    for above, folders, files in os.walk(folder, topdown=False):
        for name in files:
            os.unlink(os.path.join(above, name))
        for name in folders:
            os.rmdir(os.path.join(above, name))
    os.rmdir(folder)


# ---- a container that lacks the mount


@needs_root
@pytest.mark.parametrize("what", ["nothing", "another folder"])
def test_a_task_that_does_not_see_the_cache(daemon: Daemon, task: Client, repo: Published, what: str) -> None:
    """In another mount namespace the daemon's path is nothing, or something else."""
    path = task.download(repo.name)
    prepare = f"mount -t tmpfs none {daemon.root}" + (f" && mkdir -p {path}" if what == "another folder" else "")
    with Client.of(daemon, command=["unshare", "--mount", "sh", "-c", f'{prepare} && exec "$@"', "sh"]) as stranger:
        refused = stranger.refused("snapshot_download", repo_id=repo.name)
        assert refused.is_error("ViewNotVisibleError") and refused.is_error("FileNotFoundError")
        assert f"the mount of {daemon.root} is missing" in refused.message and "docker run -v" in refused.message
        assert task.ask("ls", repo_id=repo.name)["repos"][0]["leases"] == 1  # the first task's
    assert shown(task, path) == hashes(repo.tree)
