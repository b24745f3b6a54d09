"""What a node knows of a repo: when it asks, for whom an answer holds, and what counts when the hub is away (I8)."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from modelcached.errors import GatedRepo, HubUnavailable, LocalEntryNotFound, ModelcachedError, RepoNotFound, RevisionNotFound, TokenRefused
from modelcached.hub import Hub as HubClient
from modelcached.layout import Layout
from modelcached.lookup import Lookup
from modelcached.model import Commit, Repo
from modelcached.repos import Repos
from modelcached.root import open_root
from modelcached.tasks import Pool

from .hub import Hub

TOKEN, OTHER_TOKEN = "hf_may_read", "hf_may_not"
LONG = 3600.0


@pytest.fixture(scope="module")
def the_hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    with Hub.start(tmp_path_factory.mktemp("lookup")) as hub:
        hub.add_token(OTHER_TOKEN)
        hub.add_token(TOKEN)
        yield hub


@pytest.fixture
def layout(tmp_path: Path) -> Iterator[Layout]:
    layout, lock = open_root(tmp_path / "root", private=True)
    yield layout
    os.close(lock)
    assert os.listdir(layout.tmp) == []


class Node(Lookup):
    """A daemon's memory of the hub; a second one on the same layout is the daemon after a restart."""

    def __init__(self, repos: Repos, *rest: Any) -> None:
        super().__init__(repos, *rest)
        self.repos = repos
        self.warnings: list[str] = []

    async def get(self, repo: Repo, revision: str = "main", token: str | None = None, force: bool = False, local: bool = False) -> Commit:
        """As a fetch does: which commit, may he have it, what is in it."""
        commit = await self.commit(repo, revision, token, self.warnings.append, force, local)
        await self.permit(repo, revision, token, local)
        assert (await self.listing(repo, commit, token, local)).commit == commit
        return commit


@asynccontextmanager
async def node(layout: Layout, fresh: float = LONG, verdict: float = LONG, offline: bool = False) -> AsyncIterator[Node]:
    client, pool = HubClient(2, 0.01), Pool("test", 2)
    async with asyncio.TaskGroup() as group:
        yield Node(Repos(layout), client, pool, group, group, fresh, verdict, offline)
    pool.close()
    client.close()


def publish(hub: Hub, repo_id: str, content: str = "1", **access: Any) -> tuple[Repo, Commit]:
    commit = Commit(hub.commit(repo_id, {"a.txt": content.encode()}, **access))
    hub.reset_log()
    return Repo(hub.endpoint, "model", repo_id), commit


def asked(hub: Hub) -> list[str]:
    """What the hub was asked since the last time."""
    kinds = [request.kind for request in hub.requests()]
    hub.reset_log()
    return kinds


def age(layout: Layout, repo: Repo, revision: str, seconds: float) -> None:
    """Makes the last answer that old."""
    path = layout.ref(repo, revision)
    path.write_text(json.dumps({**json.loads(path.read_text()), "checked": time.time() - seconds}))


async def test_a_fresh_answer_is_not_asked_again(hub: Hub, layout: Layout) -> None:
    repo, first = publish(hub, "org/fresh")
    async with node(layout) as it:
        assert await it.get(repo) == first
        assert asked(hub) == ["info", "tree"]
        _, second = publish(hub, "org/fresh", "2")
        assert await it.get(repo) == first and asked(hub) == []
        assert await it.get(repo, force=True) == second and asked(hub) == ["info", "tree"]
        assert await it.get(repo) == second and asked(hub) == []
    async with node(layout) as it:  # after a restart
        assert await it.get(repo) == second and asked(hub) == []
        assert it.warnings == []
    age(layout, repo, "main", LONG + 1)
    async with node(layout) as it:
        assert await it.get(repo) == second and asked(hub) == ["info"]


async def test_with_no_freshness_every_call_asks(hub: Hub, layout: Layout) -> None:
    repo, first = publish(hub, "org/never-fresh")
    async with node(layout, fresh=0) as it:
        assert await it.get(repo) == first
        _, second = publish(hub, "org/never-fresh", "2")
        assert await it.get(repo) == second and asked(hub) == ["info", "tree"]
        assert await it.get(repo) == second and asked(hub) == ["info"]


async def test_a_commit_hash_is_asked_once(hub: Hub, layout: Layout) -> None:
    repo, commit = publish(hub, "org/by-hash")
    async with node(layout, fresh=0) as it:
        assert await it.get(repo, commit) == commit
        assert asked(hub) == ["info", "tree"]
        for force in (False, True):
            assert await it.get(repo, commit, force=force) == commit and asked(hub) == []
        assert it.repos.refs(repo) == {}
    hub.misbehave("down")
    async with node(layout, fresh=0) as it:
        assert await it.get(repo, commit) == commit and it.warnings == []
        with pytest.raises(HubUnavailable):
            await it.get(repo, "f" * 40)


async def test_a_hash_of_a_known_branch_costs_nothing(hub: Hub, layout: Layout) -> None:
    repo, commit = publish(hub, "org/both")
    async with node(layout, fresh=0) as it:
        await it.get(repo)
        asked(hub)
        assert await it.get(repo, commit) == commit and asked(hub) == []


async def test_concurrent_questions_are_one(hub: Hub, layout: Layout) -> None:
    repo, commit = publish(hub, "org/popular")
    async with node(layout) as it:
        assert await asyncio.gather(*(it.get(repo) for _ in range(30))) == [commit] * 30
        assert asked(hub) == ["info", "tree"]
        outcomes = await asyncio.gather(*(it.get(repo, "missing") for _ in range(10)), return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [RevisionNotFound] * 10
        assert asked(hub) == ["info"]


async def test_answers_are_for_who_asked(hub: Hub, layout: Layout) -> None:
    """Whoever asks at the same moment with another token asks for himself."""
    repo, commit = publish(hub, "org/private-popular", private=True, tokens=[TOKEN])
    async with node(layout) as it:
        tokens = (TOKEN, None, OTHER_TOKEN, "hf_unknown") * 3
        outcomes = await asyncio.gather(*(it.get(repo, token=token) for token in tokens), return_exceptions=True)
        kinds = [outcome if isinstance(outcome, str) else type(outcome) for outcome in outcomes]
        assert kinds == [commit, RepoNotFound, RepoNotFound, TokenRefused] * 3


# --- the hub is away --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["down", "5xx"])
async def test_an_older_answer_will_do(hub: Hub, layout: Layout, kind: str) -> None:
    repo, commit = publish(hub, "org/away")
    async with node(layout) as it:
        await it.get(repo)
    age(layout, repo, "main", 7200)
    hub.reset_log()
    hub.misbehave(kind)
    async with node(layout) as it:
        assert await it.get(repo) == commit
        assert len(it.warnings) == 1 and "can't be reached" in it.warnings[0] and "using org/away@main as of " in it.warnings[0]
        assert await it.get(repo, force=True) == commit and len(it.warnings) == 2
        if kind == "5xx":
            assert len(hub.requests()) == 2  # one try each: nobody waits for the backoff when there is something to give
        with pytest.raises(HubUnavailable):
            await it.get(repo, "v1.0")
        with pytest.raises(HubUnavailable):
            await it.get(Repo(hub.endpoint, "model", "org/never-seen"))
    hub.calm()
    async with node(layout) as it:
        assert await it.get(repo) == commit and it.warnings == []


async def test_a_branch_that_is_gone_is_gone(hub: Hub, layout: Layout) -> None:
    """The hub is there and says no: that is an answer, an older one does not count."""
    repo, _ = publish(hub, "org/branches")
    hub.commit("org/branches", {"a.txt": b"2"}, branch="side")
    async with node(layout, fresh=0) as it:
        await it.get(repo, "side")
        hub.delete("org/branches", "side")
        with pytest.raises(RevisionNotFound):
            await it.get(repo, "side")
        assert it.warnings == []


@pytest.mark.parametrize("how", ["local", "offline"])
async def test_when_the_hub_may_not_be_asked(hub: Hub, layout: Layout, how: str) -> None:
    repo, commit = publish(hub, "org/offline")
    private, _ = publish(hub, "org/offline-private", private=True, tokens=[TOKEN])
    async with node(layout, fresh=0) as it:
        await it.get(repo)
        await it.get(private, token=TOKEN)
    hub.reset_log()
    local = how == "local"
    async with node(layout, fresh=0, offline=not local) as it:
        assert await it.get(repo, local=local, force=True) == commit
        assert await it.get(repo, commit, local=local) == commit
        messages = set()
        for of, revision, token in [
            (repo, "other", None),
            (repo, "f" * 40, None),
            (Repo(hub.endpoint, "model", "org/never-seen"), "main", None),
            (private, "main", TOKEN),  # no verdict survives a restart
            (private, "main", None),
        ]:
            with pytest.raises(LocalEntryNotFound) as caught:
                await it.get(of, revision, token, local=local)
            assert type(caught.value) is LocalEntryNotFound
            messages.add(caught.value.message.replace(f"{of}@{revision}", "X"))
        assert len(messages) == 1  # nobody learns from it what is here for others
    assert asked(hub) == []


# --- who may have it --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("access", ["private", "gated"])
async def test_each_token_is_asked_for_on_its_own(hub: Hub, layout: Layout, access: str) -> None:
    repo, commit = publish(hub, f"org/only-{access}", tokens=[TOKEN], private=access == "private", gated=access == "gated")
    refused: type[ModelcachedError] = GatedRepo if access == "gated" else RepoNotFound
    async with node(layout) as it:
        assert await it.get(repo, token=TOKEN) == commit
        asked(hub)
        assert await it.get(repo, token=TOKEN) == commit and asked(hub) == []  # the verdict is kept
        errors: dict[str | None, type[ModelcachedError]] = {None: refused, OTHER_TOKEN: refused, "hf_unknown": TokenRefused}
        for token, error in errors.items():
            for _ in range(2):  # a no is asked again: access may have been given meanwhile
                for revision in ("main", commit):
                    with pytest.raises(error) as caught:
                        await it.get(repo, revision, token)
                    assert type(caught.value) is error and asked(hub) == ["auth-check"]
        assert await it.permit(repo, "main", TOKEN) is True
        hub.access(repo.id, tokens=[TOKEN, OTHER_TOKEN])
        assert await it.get(repo, token=OTHER_TOKEN) == commit and asked(hub) == ["auth-check"]
        assert await it.get(repo, token=OTHER_TOKEN) == commit and asked(hub) == []
    async with node(layout) as it:  # verdicts live in memory only
        assert await it.get(repo, token=TOKEN) == commit and asked(hub) == ["auth-check"]
    kept = b"".join(path.read_bytes() for path in layout.root.rglob("*") if path.is_file())
    assert TOKEN.encode() not in kept and OTHER_TOKEN.encode() not in kept


async def test_a_verdict_has_an_end(hub: Hub, layout: Layout) -> None:
    repo, commit = publish(hub, "org/short-verdict", private=True, tokens=[TOKEN])
    async with node(layout, verdict=0) as it:
        await it.get(repo, token=TOKEN)
        asked(hub)
        assert await it.get(repo, token=TOKEN) == commit and asked(hub) == ["auth-check"]
        hub.access(repo.id, tokens=[])
        with pytest.raises(RepoNotFound):
            await it.get(repo, token=TOKEN)


async def test_concurrent_checks_are_one(hub: Hub, layout: Layout) -> None:
    repo, commit = publish(hub, "org/checked", gated=True, tokens=[TOKEN])
    async with node(layout) as it:
        assert await asyncio.gather(*(it.get(repo, token=TOKEN) for _ in range(20))) == [commit] * 20
        assert sorted(asked(hub)) == ["auth-check", "info", "tree"]


@pytest.mark.parametrize("kind", ["down", "5xx"])
async def test_when_the_hub_is_away_only_a_kept_verdict_counts(hub: Hub, layout: Layout, kind: str) -> None:
    repo, commit = publish(hub, f"org/private-away-{kind}", private=True, tokens=[TOKEN, OTHER_TOKEN])
    async with node(layout) as it:
        await it.get(repo, token=TOKEN)
        hub.misbehave(kind)
        assert await it.get(repo, token=TOKEN) == commit
        for revision in ("main", commit):
            for token in (None, OTHER_TOKEN):
                with pytest.raises(HubUnavailable):
                    await it.get(repo, revision, token)
    async with node(layout, verdict=0) as it:
        with pytest.raises(HubUnavailable):
            await it.get(repo, token=TOKEN)


async def test_a_refusal_ends_an_earlier_yes(hub: Hub, layout: Layout) -> None:
    """By the hash too, which is never looked up."""
    repo, commit = publish(hub, "org/revoked", private=True, tokens=[TOKEN])
    async with node(layout, fresh=0) as it:
        await it.get(repo, token=TOKEN)
        hub.access(repo.id, tokens=[])
        with pytest.raises(RepoNotFound):
            await it.get(repo, token=TOKEN)
        with pytest.raises(RepoNotFound):
            await it.get(repo, commit, TOKEN)


@pytest.mark.parametrize("seen_by", [None, TOKEN])
async def test_a_repo_that_turns_private(hub: Hub, layout: Layout, seen_by: str | None) -> None:
    """Whoever looks first, refused or accepted: from there on everybody needs his own token."""
    repo, commit = publish(hub, f"org/turns-{seen_by}")
    async with node(layout) as it:
        assert await it.get(repo) == commit and await it.permit(repo, "main", None) is False
    hub.access(repo.id, private=True, tokens=[TOKEN])
    async with node(layout, fresh=0) as it:
        if seen_by is None:
            with pytest.raises(RepoNotFound):
                await it.get(repo)
        else:
            assert await it.get(repo, token=seen_by) == commit
        for revision in ("main", commit):
            with pytest.raises(RepoNotFound):
                await it.get(repo, revision, OTHER_TOKEN)
            with pytest.raises(RepoNotFound):
                await it.get(repo, revision)
            assert await it.get(repo, revision, TOKEN) == commit
    async with node(layout) as it:  # and after a restart
        with pytest.raises(RepoNotFound):
            await it.get(repo)
    hub.access(repo.id, private=False)
    async with node(layout, fresh=0) as it:
        assert await it.get(repo) == commit and await it.permit(repo, "main", None) is False


async def test_a_bad_token_closes_nothing(hub: Hub, layout: Layout) -> None:
    """The hub refuses such a token for public repos too; that says nothing about the repo."""
    repo, commit = publish(hub, "org/stays-public")
    async with node(layout, fresh=0) as it:
        await it.get(repo)
        with pytest.raises(TokenRefused):
            await it.get(repo, token="hf_unknown")
        assert await it.get(repo) == commit and await it.permit(repo, "main", None) is False


async def test_what_was_lost_is_asked_again(hub: Hub, layout: Layout) -> None:
    """Records are not synced: a power cut may leave a part of them (I11)."""
    repo, commit = publish(hub, "org/lost", private=True, tokens=[TOKEN])
    async with node(layout) as it:
        await it.get(repo, token=TOKEN)
    for lost in ({layout.visibility(repo)}, {layout.listing(repo, commit)}, {layout.ref(repo, "main")}):
        for revision in ("main", commit):
            for path in lost:
                path.write_bytes(b"")
            async with node(layout) as it:
                assert await it.get(repo, revision, TOKEN) == commit
                with pytest.raises(RepoNotFound):
                    await it.get(repo, revision)
