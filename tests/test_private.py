"""Private and gated repos: who may have them is what the hub said to that very caller, on a hit too (I8).

What the answer protects, the filesystem protects: other uids can't read the bytes.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .clients import Client, Tree, hashes, sha256
from .conftest import as_uid
from .daemon import Daemon
from .hub import Hub, Random, token_mark

pytestmark = pytest.mark.timeout(120)

MIB = 1 << 20
TOKEN, SECOND, STRANGER, UNKNOWN = "hf_the_accepted_one", "hf_accepted_too", "hf_somebody_else", "hf_nobody"
SECRET: Tree = {"config.json": b'{"secret": 1}', "model.safetensors": Random("secret", 2 * MIB)}
DAEMON, ALICE, BOB = 1500, 1001, 1002
needs_root = pytest.mark.skipif(os.getuid() != 0, reason="takes root: three other uids take part")


@pytest.fixture(scope="module")
def the_hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    with Hub.start(tmp_path_factory.mktemp("private")) as hub:
        hub.add_token(STRANGER)
        yield hub


@pytest.fixture
def hub(the_hub: Hub) -> Iterator[Hub]:
    the_hub.commit("org/private", SECRET, private=True, gated=False, tokens=[TOKEN, SECOND])
    the_hub.commit("org/gated", SECRET, gated=True, private=False, tokens=[TOKEN, SECOND])
    the_hub.commit("org/public", {"model.safetensors": SECRET["model.safetensors"], "other.txt": b"other"}, private=False, gated=False)
    the_hub.reset_log()
    yield the_hub
    the_hub.calm()


@pytest.fixture
def daemon(hub: Hub, tmp_path: Path) -> Iterator[Daemon]:
    with Daemon.start(tmp_path / "root", hub, min_free="0", hub_backoff_seconds=0.02, hub_attempts=2) as daemon:
        yield daemon


@pytest.fixture
def task(daemon: Daemon) -> Iterator[Client]:
    with Client.of(daemon) as task:
        yield task


def shown(task: Client, path: str) -> dict[str, str] | None:
    return task.call("hashes", folder=path).files


def error_of(task: Client, repo: str, **arguments: Any) -> str:
    outcome = task.refused("snapshot_download", repo_id=repo, **arguments)
    assert outcome.error is not None and all(token not in outcome.message for token in (TOKEN, STRANGER, UNKNOWN))
    return outcome.error[0]


ERRORS = {"org/private": "RepositoryNotFoundError", "org/gated": "GatedRepoError"}
both = pytest.mark.parametrize("repo", ERRORS)


@both
def test_each_caller_needs_a_token_of_its_own(hub: Hub, daemon: Daemon, task: Client, repo: str) -> None:
    assert error_of(task, repo, token=False) == ERRORS[repo]  # nobody has it yet
    assert error_of(task, repo, token=STRANGER) == ERRORS[repo]
    assert error_of(task, repo, token=UNKNOWN) == "TokenRefusedError"
    reply = task.fetch(repo, token=TOKEN)
    assert shown(task, reply["path"]) == hashes(SECRET)
    hub.reset_log()
    with Client.of(daemon) as other:
        for revision in ("main", reply["commit"]):  # now another task has it
            assert error_of(other, repo, token=False, revision=revision) == ERRORS[repo]
            assert error_of(other, repo, token=STRANGER, revision=revision) == ERRORS[repo]
            assert error_of(other, repo, token=UNKNOWN, revision=revision) == "TokenRefusedError"
            assert error_of(other, repo, token=False, revision=revision, allow_patterns="*.json") == ERRORS[repo]
            refused = other.refused("hf_hub_download", repo_id=repo, filename="config.json", revision=revision, token=STRANGER)
            assert refused.error is not None and refused.error[0] == ERRORS[repo]
            assert other.refused("snapshot_download", repo_id=repo, revision=revision, token=False, dry_run=True).is_error(ERRORS[repo])
        assert other.download(repo, token=SECOND) == reply["path"]
    assert hub.bytes_sent() == 0


@both
def test_a_daemon_that_knows_no_verdict_gives_nothing(hub: Hub, daemon: Daemon, repo: str) -> None:
    """After a restart with the hub away nobody's token can be checked. What is here and what is not look the same to a stranger."""
    with Client.of(daemon) as task:
        reply = task.fetch(repo, token=TOKEN)
    daemon.restart()
    hub.misbehave("down")
    with Client.of(daemon) as task:
        for token in (False, STRANGER, TOKEN):
            for arguments in (
                {},
                {"revision": reply["commit"]},
                {"local_files_only": True},
                {"local_files_only": True, "revision": reply["commit"]},
            ):
                known = task.refused("snapshot_download", repo_id=repo, token=token, **arguments)
                unknown = task.refused("snapshot_download", repo_id="org/zzz", token=token, **arguments)
                assert known.error == unknown.error and known.is_error("LocalEntryNotFoundError")
                assert known.message.replace(repo, "org/zzz") == unknown.message
        hub.calm()
        assert error_of(task, repo, token=STRANGER) == ERRORS[repo] and task.download(repo, token=TOKEN) == reply["path"]


@both
def test_a_verdict_is_kept_for_a_while(hub: Hub, daemon: Daemon, task: Client, repo: str) -> None:
    path = task.download(repo, token=TOKEN)
    hub.reset_log()
    with Client.of(daemon) as other:
        assert other.download(repo, token=TOKEN) == path
    assert hub.requests() == []
    hub.misbehave("down")
    assert task.download(repo, token=TOKEN) == path
    assert task.download(repo, token=TOKEN, local_files_only=True) == path
    assert task.refused("snapshot_download", repo_id=repo, token=SECOND).is_error("HubUnavailableError")  # no verdict on this one


@both
def test_a_verdict_ends(hub: Hub, daemon: Daemon, repo: str) -> None:
    daemon.restart(verdict_seconds=0)
    with Client.of(daemon) as task:
        path = task.download(repo, token=TOKEN)
        hub.reset_log()
        assert task.download(repo, token=TOKEN) == path
        assert [request.kind for request in hub.requests()] == ["auth-check"]
        hub.access(repo, tokens=[SECOND])
        assert error_of(task, repo, token=TOKEN) == ERRORS[repo]
        assert task.download(repo, token=SECOND) == path


def test_a_public_repo_that_becomes_private(hub: Hub, daemon: Daemon) -> None:
    daemon.restart(fresh_seconds=0)
    hub.commit("org/closing", SECRET, private=False)
    with Client.of(daemon) as task:
        commit = task.fetch("org/closing")["commit"]
        hub.access("org/closing", private=True, tokens=[TOKEN])
        assert error_of(task, "org/closing", token=False) == "RepositoryNotFoundError"
        assert error_of(task, "org/closing", token=False, revision=commit) == "RepositoryNotFoundError"
        assert shown(task, task.download("org/closing", token=TOKEN)) == hashes(SECRET)


@both
def test_a_refused_caller_spoils_nothing_for_the_others(hub: Hub, daemon: Daemon, repo: str) -> None:
    """All at once: an accepted token, refused ones, and a public repo that shares the large file."""
    with Client.of(daemon) as good, Client.of(daemon) as bad, Client.of(daemon) as worse, Client.of(daemon) as public:
        hub.misbehave("slow", rate=MIB)
        public.begin("fetch", repo_id="org/public")
        bad.begin("snapshot_download", repo_id=repo, token=STRANGER)
        good.begin("fetch", repo_id=repo, token=TOKEN)
        worse.begin("snapshot_download", repo_id=repo, token=False)
        for task in (public, good):
            task.progress(lambda progress: progress["phase"] == "download")
        assert bad.end().is_error(ERRORS[repo]) and worse.end().is_error(ERRORS[repo])
        hub.calm()
        assert public.good().error is None and shown(good, str(good.good().path)) == hashes(SECRET)
    assert hub.bytes_sent(sha256(SECRET["model.safetensors"])) == 2 * MIB


def test_tokens_do_not_split_a_public_download(hub: Hub, daemon: Daemon) -> None:
    """Everybody has a token of their own, and gets the same view of the same download."""
    with contextlib.ExitStack() as stack:
        tasks = [stack.enter_context(Client.of(daemon, {"HF_TOKEN": token})) for token in (TOKEN, SECOND, STRANGER) * 3]
        for task in tasks:
            task.begin("snapshot_download", repo_id="org/public")
        assert len({task.good().path for task in tasks}) == 1
    assert hub.bytes_sent() == 2 * MIB + len(b"other") and len(hub.requests("tree")) <= 3


def test_tokens_travel_to_the_hub_only(hub: Hub, daemon: Daemon, task: Client) -> None:
    """Never to the host that LFS files come from, not into the log (at its most talkative), not onto the disk."""
    task.download("org/private", token=TOKEN)
    task.refused("snapshot_download", repo_id="org/gated", token=STRANGER)
    task.refused("snapshot_download", repo_id="org/gated", token=UNKNOWN)
    assert {request.authorization for request in hub.requests("lfs")} == {None}
    assert {request.authorization for request in hub.requests("resolve")} == {token_mark(TOKEN)}
    written = [daemon.log_path.read_bytes(), *(path.read_bytes() for path in daemon.root.rglob("*") if path.is_file())]
    assert len(written) > 5
    for token in (TOKEN, STRANGER, UNKNOWN):
        assert not any(token.encode() in text for text in written)


def test_the_token_is_found_where_huggingface_hub_finds_it(hub: Hub, daemon: Daemon, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(TOKEN + "\n")
    for environment in ({"HF_TOKEN": TOKEN}, {"HF_HOME": str(tmp_path)}, {"HF_TOKEN_PATH": str(tmp_path / "token")}):
        with Client.of(daemon, environment) as task:
            assert shown(task, task.download("org/private")) == hashes(SECRET)
            assert error_of(task, "org/private", token=False) == "RepositoryNotFoundError"


# ---- several uids, none of them root


@pytest.fixture
def node(hub: Hub, shared_tmp_path: Path) -> Iterator[Daemon]:
    """A daemon of a uid of its own."""
    with Daemon.start(shared_tmp_path / "root", hub, uid=DAEMON, min_free="0", hub_backoff_seconds=0.02) as daemon:
        yield daemon


def can_read(uid: int, path: Path) -> bool:
    command = ["ls", "--", str(path)] if path.is_dir() else ["cat", "--", str(path)]
    ran = subprocess.run([*as_uid(uid), *command], capture_output=True, check=False)
    assert ran.returncode == 0 or b"Permission denied" in ran.stderr, ran.stderr
    return ran.returncode == 0


@needs_root
@both
def test_other_uids_cannot_read_a_private_view(node: Daemon, repo: str) -> None:
    with Client.of(node, uid=ALICE) as alice, Client.of(node, uid=BOB) as bob:
        path = Path(alice.download(repo, token=TOKEN))
        file = path / "config.json"
        assert shown(alice, str(path)) == hashes(SECRET)
        assert can_read(ALICE, file) and not can_read(BOB, file) and not can_read(BOB, path)
        assert error_of(bob, repo, token=False) == ERRORS[repo] and error_of(bob, repo, token=STRANGER) == ERRORS[repo]
        assert not can_read(BOB, file)
        digest = sha256(SECRET["config.json"])
        for inside in (
            node.root / "blobs",
            node.root / "blobs" / "sha256" / digest[:2] / digest,
            node.root / "views",
            node.root / "leases",
        ):
            assert not can_read(ALICE, inside) and not can_read(BOB, inside)
        assert [entry["repo_id"] for entry in alice.ask("ls")["repos"]] == [repo] and bob.ask("ls")["repos"] == []
        # With an accepted token of his own he is let in, and nobody is locked out.
        assert bob.download(repo, token=SECOND) == str(path)
        assert shown(bob, str(path)) == hashes(SECRET) and can_read(ALICE, file) and can_read(BOB, file)
        assert not can_read(1003, file)
        assert stat.S_IMODE(path.stat().st_mode) & 0o007 == 0
    node.restart()
    assert can_read(ALICE, file) and not can_read(1003, file)


@needs_root
def test_everybody_can_read_a_public_view_and_nobody_can_write(node: Daemon) -> None:
    with Client.of(node, uid=ALICE) as alice, Client.of(node, uid=BOB) as bob:
        path = Path(alice.download("org/public"))
        assert bob.download("org/public") == str(path) and can_read(1003, path / "other.txt")
        for command in (["tee", str(path / "other.txt")], ["rm", "-f", str(path / "other.txt")], ["touch", str(path / "new")]):
            ran = subprocess.run([*as_uid(ALICE), *command], capture_output=True, stdin=subprocess.DEVNULL, check=False)
            assert ran.returncode != 0 and b"Permission denied" in ran.stderr
        assert bob.refused("ask", method="rm", repo_id="org/public").is_error("NotPermittedError")
        assert bob.refused("ask", method="verify").is_error("NotPermittedError")


@needs_root
def test_private_copies_belong_to_the_caller(node: Daemon, shared_tmp_path: Path) -> None:
    home = shared_tmp_path / "home"
    home.mkdir()
    shutil.chown(home, ALICE, ALICE)
    with Client.of(node, uid=ALICE) as alice:
        path = alice.download("org/private", token=TOKEN, local_dir=str(home / "model"))
        assert path == str(home / "model") and shown(alice, path) == hashes(SECRET)
        found = (home / "model" / "config.json").stat()
        assert found.st_uid == ALICE and found.st_mode & 0o200 and found.st_nlink == 1


@needs_root
def test_a_private_view_is_mended_without_opening_it(hub: Hub, node: Daemon) -> None:
    """Rebuilding the view must not forget who may enter, nor let others in."""
    with Client.of(node, uid=ALICE) as alice, Client.of(node, uid=BOB) as bob:
        path = Path(alice.download("org/private", token=TOKEN))
        bob.download("org/private", token=SECOND)
        shutil.rmtree(path)
        assert alice.download("org/private", token=TOKEN) == str(path)
        assert can_read(ALICE, path / "config.json") and not can_read(1003, path / "config.json")
        assert bob.download("org/private", token=SECOND) == str(path)
        assert can_read(ALICE, path / "config.json") and can_read(BOB, path / "config.json")
