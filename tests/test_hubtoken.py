"""The daemon's own token: it counts for the hub's rate limits, and never gives a caller what that caller could not have without it (I8)."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from modelcached.errors import RootError
from modelcached.hubtoken import HubToken
from modelcached.model import Repo

from .clients import Client, Tree, hashes
from .daemon import Daemon, DaemonError
from .hub import Hub, Random, token_mark

pytestmark = pytest.mark.timeout(120)

OWN, CALLERS = "hf_of_the_node", "hf_of_a_caller"
TREE: Tree = {"config.json": b"{}", "model.safetensors": Random("public", 3 << 20)}


@pytest.fixture
def hub(the_hub: Hub) -> Iterator[Hub]:
    the_hub.add_token(OWN)
    the_hub.add_token(CALLERS)
    the_hub.reset_log()
    yield the_hub
    the_hub.calm()


@pytest.fixture(scope="module")
def credential(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """As the service manager passes it."""
    folder = tmp_path_factory.mktemp("credentials")
    (folder / "hub-token").write_text(f"{OWN}\n")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("CREDENTIALS_DIRECTORY", str(folder))
        yield folder / "hub-token"


@pytest.fixture(scope="module")
def daemon(the_hub: Hub, credential: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    root = tmp_path_factory.mktemp("node") / "root"
    with Daemon.start(root, the_hub, min_free="0", fresh_seconds=0, hub_attempts=1) as daemon:
        yield daemon


@pytest.fixture
def task(daemon: Daemon) -> Iterator[Client]:
    with Client.of(daemon) as task:
        yield task


def marks(hub: Hub, kind: str | None = None) -> list[str | None]:
    """The tokens of the requests, in order."""
    return [request.authorization for request in hub.requests(kind) if request.kind != "lfs"]


def test_public_repos_are_asked_for_with_it(hub: Hub, daemon: Daemon, task: Client) -> None:
    hub.commit("org/counted", TREE)
    hub.reset_log()
    assert task.call("hashes", folder=task.download("org/counted", token=False)).files == hashes(TREE)
    assert marks(hub)[0] is None, "nobody knows yet that it is public"
    assert set(marks(hub)[1:]) == {token_mark(OWN)} and len(marks(hub)) > 3
    hub.reset_log()
    task.download("org/counted", token=False)
    assert marks(hub) == [token_mark(OWN)]
    hub.reset_log()
    (kept,) = daemon.root.glob("repos/*/model--org--counted/visibility.json")
    kept.write_text(json.dumps({**json.loads(kept.read_text()), "checked": 1_000_000_000.0}))
    daemon.restart()
    task.download("org/counted", token=False)
    assert marks(hub) == [token_mark(OWN)], "however long ago it was public: the answer tells whether it still is"
    hub.reset_log()
    task.download("org/counted", token=CALLERS)
    assert marks(hub) == [token_mark(CALLERS)], "a caller's own goes before"


@pytest.mark.parametrize("closed", [{"private": True}, {"gated": True}], ids=str)
def test_what_only_it_may_have_is_given_to_nobody(hub: Hub, daemon: Daemon, task: Client, closed: dict[str, Any]) -> None:
    """The repo was public and is no more; the daemon's own token may read it, the caller may not."""
    repo = f"org/closing-{next(iter(closed))}"
    hub.commit(repo, {"config.json": b"{}"})
    commit = task.fetch(repo, token="")["commit"]
    hub.access(repo, tokens=[OWN], **closed)
    hub.commit(repo, TREE)
    hub.reset_log()
    for revision in ("main", commit):
        refused = task.refused("snapshot_download", repo_id=repo, token=False, revision=revision)
        assert refused.is_error("RepositoryNotFoundError"), refused
    refused = task.refused("snapshot_download", repo_id=repo, token=CALLERS)
    assert refused.is_error("RepositoryNotFoundError")
    assert hub.requests("lfs") == [] and task.ask("ls", repo_id=repo)["repos"][0]["commit"] == commit


def test_it_is_of_no_use_for_a_repo_that_never_was_public(hub: Hub, daemon: Daemon, task: Client) -> None:
    hub.commit("org/always-private", TREE, private=True, tokens=[OWN])
    hub.reset_log()
    assert task.refused("snapshot_download", repo_id="org/always-private", token=False).is_error("RepositoryNotFoundError")
    assert token_mark(OWN) not in marks(hub)


def test_one_that_is_refused_is_left_out(hub: Hub, daemon: Daemon, task: Client) -> None:
    hub.commit("org/refused", TREE)
    daemon.restart()
    task.download("org/refused", token=False, allow_patterns="*.json")
    hub.revoke_token(OWN)
    hub.reset_log()
    assert task.call("hashes", folder=task.download("org/refused", token=False)).files == hashes(TREE)
    assert marks(hub)[:2] == [token_mark(OWN), None] and set(marks(hub)[1:]) == {None}
    (line,) = [line for line in daemon.log.splitlines() if "own token" in line]
    assert "level=error" in line and "hub-token" in line and OWN not in daemon.log


def test_it_is_written_nowhere(hub: Hub, daemon: Daemon, task: Client, credential: Path) -> None:
    hub.commit("org/traces", TREE)
    task.download("org/traces", token=False)
    told = json.dumps(task.ask("status"))
    written = [daemon.log_path.read_bytes(), told.encode(), *(path.read_bytes() for path in daemon.root.rglob("*") if path.is_file())]
    assert len(written) > 5 and not any(OWN.encode() in text for text in written)
    assert OWN not in repr(HubToken(OWN, hub.endpoint))


def test_other_hubs_never_see_it(hub: Hub, daemon: Daemon, task: Client, tmp_path: Path) -> None:
    with Hub.start(tmp_path / "second") as second:
        second.commit("org/elsewhere", TREE)
        daemon.restart(hub_endpoints=[second.endpoint])
        task.download("org/elsewhere", token=False, endpoint=second.endpoint)
        task.download("org/elsewhere", token=False, endpoint=second.endpoint)
        assert set(marks(second)) == {None} and hub.requests() == []


def test_what_is_no_token_keeps_the_daemon_from_starting(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    for raw in (b"two words", b"two\nlines", b"\xff\xfe", b"tab\there"):
        (tmp_path / "hub-token").write_bytes(raw)
        with pytest.raises(RootError, match="the credential hub-token") as raised:
            HubToken.of(os.environ, hub.endpoint)
        assert raw.decode(errors="replace") not in f"{raised.value} {raised.value.hint}"
    with pytest.raises(DaemonError, match="the credential hub-token"):
        Daemon.start(tmp_path / "root", hub)


@pytest.mark.parametrize("environment", [{}, {"CREDENTIALS_DIRECTORY": "/nonexistent"}])
def test_without_one(environment: dict[str, str]) -> None:
    repo = Repo("http://hub", "model", "org/name")
    assert HubToken.of(environment, "http://hub").instead_of(None, repo, 0.0) is None
