"""The conversation with the hub: what a revision is, which files it has, who may have them; and what the hub's moods become."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import pytest
from huggingface_hub.utils._paths import filter_repo_objects
from multidict import CIMultiDict

from modelcached.errors import (
    GatedRepo,
    HubProblem,
    HubUnavailable,
    ModelcachedError,
    RepoNotFound,
    RevisionNotFound,
    TokenRefused,
    UnsafePath,
)
from modelcached.hub import MAX_BACKOFF_SECONDS, MAX_PAUSE_SECONDS, Pauses
from modelcached.hub import Hub as HubClient
from modelcached.hubapi import file_url, matching, pause_asked
from modelcached.model import Commit, Repo

from .hub import Hub, Random, many_path, token_mark
from .peers import answering, reply

TOKEN, OTHER_TOKEN = "hf_may_read", "hf_may_not"
FILES: dict[str, bytes | Random] = {"config.json": b"{}", "sub/a b/ä#?.txt": b"odd", "empty": b"", "model.safetensors": Random("hub", 2000)}


@pytest.fixture(scope="module")
def the_hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    with Hub.start(tmp_path_factory.mktemp("hub"), page_size=4) as hub:
        hub.add_token(OTHER_TOKEN)
        for repo_type in ("model", "dataset", "space"):
            hub.commit("org/name", {**FILES, "type": repo_type.encode()}, repo_type=repo_type)
            hub.commit("bare", FILES, repo_type=repo_type)
        hub.commit("org/private", FILES, private=True, tokens=[TOKEN])
        hub.commit("org/gated", FILES, gated=True, tokens=[TOKEN])
        yield hub


@asynccontextmanager
async def talking(attempts: int = 4, backoff_seconds: float = 0.01) -> AsyncIterator[HubClient]:
    client = HubClient(attempts, backoff_seconds)
    try:
        yield client
    finally:
        client.close()


@pytest.fixture
async def client() -> AsyncIterator[HubClient]:
    async with talking() as client:
        yield client


def repo(hub: Hub | str, repo_id: str = "org/name", repo_type: str = "model") -> Repo:
    return Repo(hub if isinstance(hub, str) else hub.endpoint, repo_type, repo_id)


# --- answers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("repo_type", ["model", "dataset", "space"])
@pytest.mark.parametrize("repo_id", ["org/name", "bare"])
async def test_what_there_is(hub: Hub, client: HubClient, repo_id: str, repo_type: str) -> None:
    of = repo(hub, repo_id, repo_type)
    answer = await client.look_up(of, "main", None)
    assert (answer.private, answer.gated) == (False, False)
    listing = await client.list_files(of, answer.commit, None)
    files = {file.path: file for file in listing.files}
    assert listing.commit == answer.commit and [*files] == sorted(files)
    assert set(FILES) <= set(files) and ("type" in files) == (repo_id != "bare")
    assert all(files[path].size == len(data) for path, data in FILES.items())
    assert (files["config.json"].oid, files["config.json"].sha256) == ("9e26dfeeb6e641a33dae4961196235bdb965b21b", None)  # as git says
    large = files["model.safetensors"]
    assert large.sha256 is not None and large.oid != large.sha256[:40]
    assert {request.kind for request in hub.requests()} == {"info", "tree"}
    assert all(answer.commit in request.path for request in hub.requests(kind="tree"))


async def test_revisions(hub: Hub, client: HubClient) -> None:
    of = repo(hub, "org/moving")
    first = hub.commit("org/moving", {"a": b"1"})
    pull = hub.commit("org/moving", {"a": b"2"}, branch="refs/pr/1")
    odd = hub.commit("org/moving", {"a": b"3"}, branch="feature/a b#ä")
    hub.tag("org/moving", "v1.0", "main")
    last = hub.commit("org/moving", {"a": b"4"})
    wanted = {"main": last, "refs/pr/1": pull, "feature/a b#ä": odd, "v1.0": first, first: first, pull: pull}
    assert {revision: (await client.look_up(of, revision, None)).commit for revision in wanted} == wanted


async def test_a_listing_has_pages(hub: Hub, client: HubClient) -> None:
    commit = Commit(hub.commit_many("org/many", 30, folder=7))
    listing = await client.list_files(repo(hub, "org/many"), commit, None)
    assert {many_path(number, 7) for number in range(30)} <= {file.path for file in listing.files}
    assert len(hub.requests(kind="tree")) > 7


async def test_whose_token_it_is(hub: Hub, client: HubClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller's, or none: never one that the daemon's own environment has."""
    monkeypatch.setenv("HF_TOKEN", "hf_the_daemons_own")
    monkeypatch.setenv("HUGGING_FACE_HUB_TOKEN", "hf_the_daemons_own")
    commit = (await client.look_up(repo(hub), "main", None)).commit
    await client.list_files(repo(hub), commit, None)
    await client.check_access(repo(hub), None)
    assert {request.authorization for request in hub.requests()} == {None}
    hub.reset_log()
    private = repo(hub, "org/private")
    answer = await client.look_up(private, "main", TOKEN)
    assert answer.private and not answer.gated
    await client.list_files(private, answer.commit, TOKEN)
    await client.check_access(private, TOKEN)
    assert {request.authorization for request in hub.requests()} == {token_mark(TOKEN)}
    gated = await client.look_up(repo(hub, "org/gated"), "main", None)  # anybody may see that it is there
    assert gated.gated and not gated.private


@pytest.mark.parametrize(
    ("repo_id", "revision", "token", "error"),
    [
        ("org/missing", "main", None, RepoNotFound),
        ("org/missing", "main", TOKEN, RepoNotFound),
        ("org/name", "missing", None, RevisionNotFound),
        ("org/name", "f" * 40, None, RevisionNotFound),
        ("org/private", "main", None, RepoNotFound),
        ("org/private", "main", OTHER_TOKEN, RepoNotFound),
        ("org/private", "main", "hf_unknown", TokenRefused),
        ("org/name", "main", "hf_unknown", TokenRefused),
    ],
)
async def test_refusals(hub: Hub, client: HubClient, repo_id: str, revision: str, token: str | None, error: type[ModelcachedError]) -> None:
    with pytest.raises(error) as caught:
        await client.look_up(repo(hub, repo_id), revision, token)
    assert type(caught.value) is error and caught.value.hint and client.requests == len(hub.requests()) == 1
    assert token is None or token not in f"{caught.value.message} {caught.value.hint} {caught.value.data}"


@pytest.mark.parametrize(
    ("repo_id", "token", "error"),
    [
        ("org/name", None, None),
        ("org/name", OTHER_TOKEN, None),
        ("org/private", TOKEN, None),
        ("org/private", None, RepoNotFound),
        ("org/private", OTHER_TOKEN, RepoNotFound),
        ("org/private", "hf_unknown", TokenRefused),
        ("org/gated", TOKEN, None),
        ("org/gated", None, GatedRepo),
        ("org/gated", OTHER_TOKEN, GatedRepo),
        ("org/missing", None, RepoNotFound),
    ],
)
async def test_who_may_have_it(hub: Hub, client: HubClient, repo_id: str, token: str | None, error: type[ModelcachedError] | None) -> None:
    if error is None:
        await client.check_access(repo(hub, repo_id), token)
    else:
        with pytest.raises(error) as caught:
            await client.check_access(repo(hub, repo_id), token)
        assert type(caught.value) is error


@pytest.mark.parametrize(
    "paths",
    [["../a"], ["/etc/passwd"], ["a", "a"], ["a", "a/b"], ["a/./b"], ["nul\0"], ["x" * 300]],
)
async def test_hostile_listings(hub: Hub, client: HubClient, paths: list[str]) -> None:
    commit = Commit(hub.commit("org/hostile", [("fine.txt", b"1"), *((path, b"2") for path in paths)], hostile=True))
    with pytest.raises(UnsafePath, match="org/hostile: the file name"):
        await client.list_files(repo(hub, "org/hostile"), commit, None)


# --- moods ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["5xx", "reset", "short", "429", "ratelimit"])
async def test_asked_again(hub: Hub, client: HubClient, kind: str) -> None:
    """For the last page of a listing as for the first answer."""
    commit = (await client.look_up(repo(hub), "main", None)).commit
    for match in ("info GET", "tree GET"):
        hub.reset_log()
        hub.misbehave(kind, match=match, times=1, **({"after": 20} if kind in ("reset", "short") else {"retry_after": 1}))
        begun = time.monotonic()
        assert (await client.look_up(repo(hub), "main", None)).commit == commit
        assert len((await client.list_files(repo(hub), commit, None)).files) == len(FILES) + 1
        assert len([request for request in hub.requests() if request.fault]) == 1
        assert kind not in ("429", "ratelimit") or time.monotonic() - begun >= 1


@pytest.mark.parametrize("status", [500, 502, 503, 504])
async def test_it_gives_up(hub: Hub, client: HubClient, status: int) -> None:
    hub.misbehave("5xx", status=status)
    with pytest.raises(HubUnavailable, match=f"HTTP {status}") as caught:
        await client.look_up(repo(hub), "main", None)
    assert "local_files_only" in caught.value.hint and client.requests == len(hub.requests()) == 4
    with pytest.raises(HubUnavailable):
        await client.look_up(repo(hub), "main", None, attempts=1)
    assert client.requests == 5


async def test_a_hub_that_is_down(hub: Hub, client: HubClient) -> None:
    hub.misbehave("down")
    with pytest.raises(HubUnavailable, match="can't be reached"):
        await client.look_up(repo(hub), "main", None)
    hub.calm()
    await client.look_up(repo(hub), "main", None)


async def test_a_caller_who_leaves_does_not_wait_for_a_hub_that_hangs(hub: Hub, client: HubClient) -> None:
    hub.misbehave("hang")
    asking = asyncio.create_task(client.look_up(repo(hub), "main", None))
    await asyncio.to_thread(hub.wait, requests=1)
    asking.cancel()
    await asyncio.wait([asking], timeout=1)
    assert asking.cancelled()


async def test_everybody_waits_when_the_hub_asks_for_it(hub: Hub, client: HubClient) -> None:
    hub.misbehave("429", times=1, retry_after=1)
    with pytest.raises(HubUnavailable, match="HTTP 429"):
        await client.look_up(repo(hub), "main", None, attempts=1)
    paused = time.monotonic()
    assert 0.5 < client.pauses.remaining(hub.endpoint) <= 1 and client.pauses.count == 1
    await asyncio.gather(*(client.look_up(repo(hub), "main", None) for _ in range(5)))
    assert time.monotonic() - paused > 0.9 and len(hub.requests()) == 6


NO_HUB = [b"", b"<html>log in, please</html>", b"[]", b"null", b"{}", b"\xff"]
NO_HUB += [b'{"id": "org/name"}', b'{"id": "a", "sha": "main"}', b'{"id": 1, "sha": 2}']


@pytest.mark.parametrize("body", NO_HUB)
async def test_what_is_no_hub(body: bytes) -> None:
    """A captive portal, a proxy's own page: an error with a name, and not an endless one."""
    async with answering(lambda path, headers: reply(200, body, Content_Type="application/json")) as peer, talking(attempts=2) as client:
        with pytest.raises((HubProblem, HubUnavailable)) as caught:
            await client.look_up(repo(peer), "main", None)
        assert caught.value.hint and client.requests <= 2


@pytest.mark.parametrize(
    "entry",
    [
        '{"type": "file", "path": "a", "size": -1, "oid": "%s"}' % ("0" * 40),
        '{"type": "file", "path": "a", "size": 1, "oid": "../../x"}',
        '{"type": "file", "path": "a", "size": 1, "oid": "%s", "lfs": {"oid": "../x", "size": 1, "pointerSize": 1}}' % ("0" * 40),
        '{"type": "file", "path": "\\ud800", "size": 1, "oid": "%s"}' % ("0" * 40),
        '{"type": "file", "size": 1}',
        '{"type": "file", "path": 3, "size": "big", "oid": null}',
        "3",
        '"a"',
    ],
)
async def test_entries_that_make_no_sense(entry: str) -> None:
    """Ids become paths: they are digests or nothing."""
    body = f"[{entry}]".encode()
    async with answering(lambda path, headers: reply(200, body, Content_Type="application/json")) as peer, talking(attempts=2) as client:
        with pytest.raises((HubProblem, HubUnavailable)) as caught:
            await client.list_files(repo(peer), Commit("0" * 40), None)
        assert caught.value.hint


# --- small rules ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, 0),
        ({"Retry-After": "30"}, 30),
        ({"retry-after": "30"}, 30),
        ({"Retry-After": "soon"}, 0),
        ({"Retry-After": "-5"}, 0),
        ({"RateLimit": '"api";r=0;t=55'}, 55),
        ({"RateLimit": '"api";r=0;t=55', "Retry-After": "3"}, 55),
        ({"RateLimit": '"api";r=12;t=55', "Retry-After": "3"}, 3),
        ({"RateLimit": '"api";r=12;t=55'}, 0),
        ({"RateLimit": "nonsense"}, 0),
    ],
)
def test_how_long_it_asks_us_to_wait(headers: dict[str, str], seconds: float) -> None:
    assert pause_asked(CIMultiDict(headers)) == seconds  # as aiohttp has them
    assert pause_asked({name.lower(): value for name, value in headers.items()}) == seconds  # as huggingface_hub's client has them


def test_pauses_have_an_end() -> None:
    pauses = Pauses()
    assert pauses.remaining("https://hub") == 0
    pauses.note("https://hub", 1e9)
    assert MAX_PAUSE_SECONDS - 5 < pauses.remaining("https://hub") <= MAX_PAUSE_SECONDS
    assert pauses.remaining("https://other") == 0


async def test_backoff_grows_and_is_jittered() -> None:
    async with talking(backoff_seconds=0.5) as client:
        for failures in range(1, 12):
            full = min(MAX_BACKOFF_SECONDS, 0.5 * 2 ** (failures - 1))
            waits = {client.backoff(failures) for _ in range(50)}
            assert len(waits) > 10 and all(full / 2 <= wait <= full for wait in waits)


def test_addresses_of_files() -> None:
    commit = Commit("0" * 40)
    assert (
        file_url(Repo("https://h:8/x", "model", "org/name"), commit, "a b/ä#?%.txt")
        == f"https://h:8/x/org/name/resolve/{commit}/a%20b/%C3%A4%23%3F%25.txt"
    )
    assert file_url(Repo("https://h", "dataset", "org/name"), commit, "a") == f"https://h/datasets/org/name/resolve/{commit}/a"
    assert file_url(Repo("https://h", "space", "org/name"), commit, "a") == f"https://h/spaces/org/name/resolve/{commit}/a"


@pytest.mark.parametrize("allow", [None, [], ["*.json"], ["sub/"], ["a?", "*"], ["[ab]"]])
@pytest.mark.parametrize("ignore", [None, [], ["*.bin"], ["sub/*"]])
def test_patterns_are_huggingface_hubs(allow: list[str] | None, ignore: list[str] | None) -> None:
    paths = ["a", "b", "ab", "x.json", "sub/x.json", "sub/deep/y.bin", "z.bin"]
    assert matching(paths, allow, ignore) == [*filter_repo_objects(paths, allow_patterns=allow, ignore_patterns=ignore)]
