"""Bytes from the hub: redirects, pauses, broken answers, proxies and certificates; who gets a connection next."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from modelcached.errors import (
    EntryNotFound,
    GatedRepo,
    HubProblem,
    HubUnavailable,
    ModelcachedError,
    RepoNotFound,
    RevisionNotFound,
    TokenRefused,
)
from modelcached.hub import Hub as HubClient
from modelcached.hub import Source
from modelcached.hubapi import file_url
from modelcached.model import Commit, Repo
from modelcached.spans import Budget
from modelcached.transfer import Transfer

from .hub import Hub, Random, token_mark
from .peers import Answer, Proxy, answering, behind_tls, make_certificate, reply

SMALL, LARGE = b'{"hidden_size": 8}', bytes(Random("large", 300_000))
FILES = {"config.json": SMALL, "model.safetensors": LARGE, "a b/ä#?%41.txt": b"odd name"}
TOKEN, OTHER_TOKEN = "hf_may_read", "hf_may_not"
STALL_SECONDS = 0.3


@pytest.fixture(scope="module")
def commit(the_hub: Hub) -> Commit:
    the_hub.add_token(OTHER_TOKEN)
    the_hub.commit("org/private", FILES, private=True, tokens=[TOKEN])
    the_hub.commit("org/gated", FILES, gated=True, tokens=[TOKEN])
    return Commit(the_hub.commit("org/name", FILES))


@asynccontextmanager
async def transferring(connections: int = 8, attempts: int = 4) -> AsyncIterator[Transfer]:
    client = HubClient(attempts, 0.01)
    transfer = Transfer(client, connections, STALL_SECONDS)
    try:
        yield transfer
    finally:
        assert transfer.budget.free == connections  # every connection was given back
        await transfer.close()
        client.close()


@pytest.fixture
async def transfer() -> AsyncIterator[Transfer]:
    async with transferring() as transfer:
        yield transfer


def source(hub: Hub | str, commit: str, path: str = "config.json", token: str | None = None, repo: str = "org/name") -> Source:
    return Source(Repo(hub if isinstance(hub, str) else hub.endpoint, "model", repo), Commit(commit), path, token)


async def whole(transfer: Transfer, of: Source, size: int | None = None) -> bytes:
    counted = 0

    def report(count: int) -> None:
        nonlocal counted
        counted += count

    data = await transfer.whole(of, len(FILES[of.path]) if size is None else size, report)
    assert counted >= len(data)
    return data


# --- whole files, redirects, tokens -----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES)
async def test_a_file(hub: Hub, commit: Commit, transfer: Transfer, path: str) -> None:
    assert await whole(transfer, source(hub, commit, path)) == FILES[path]
    assert hub.requests(kind="resolve")[0].file == path


async def test_the_token_stays_with_the_hub(hub: Hub, commit: Commit, transfer: Transfer) -> None:
    """The second host answers 400 to a request with a token; so do object stores."""
    for repo in ("org/name", "org/private"):
        assert await whole(transfer, source(hub, "main", "model.safetensors", TOKEN, repo)) == LARGE
    assert {request.authorization for request in hub.requests(kind="resolve")} == {token_mark(TOKEN)}
    assert [request.authorization for request in hub.requests(kind="lfs")] == [None, None]


async def test_where_a_token_goes() -> None:
    """To the endpoint's own origin, on the way back to it too, and never to another port, host name or scheme."""
    seen: list[tuple[str, str, str | None]] = []

    def answer(name: str) -> Answer:
        def said(path: str, headers: dict[str, str]) -> bytes:
            seen.append((name, path, headers.get("authorization")))
            if path.startswith("/org"):
                return reply(302, Location="/same")
            step = {"/same": f"{away}/away", "/away": f"{home.replace('127.0.0.1', 'localhost')}/alias", "/alias": f"{home}/back"}
            return reply(307, Location=step[path]) if path in step else reply(200, SMALL)

        return said

    async with answering(answer("home")) as home, answering(answer("away")) as away, transferring() as transfer:
        assert await whole(transfer, source(home, "main", token=TOKEN)) == SMALL
    assert [(name, path.rpartition("/")[2]) for name, path, _ in seen] == [
        ("home", "config.json"),
        ("home", "same"),
        ("away", "away"),
        ("home", "alias"),
        ("home", "back"),
    ]
    assert [token for *_, token in seen] == [f"Bearer {TOKEN}", f"Bearer {TOKEN}", None, None, f"Bearer {TOKEN}"]


async def test_a_signed_address_is_used_again_until_it_expires(hub: Hub, commit: Commit, transfer: Transfer) -> None:
    of = source(hub, commit, "model.safetensors")
    for _ in range(2):
        assert await whole(transfer, of) == LARGE
    assert (len(hub.requests(kind="resolve")), len(hub.requests(kind="lfs"))) == (1, 2)
    hub.misbehave("expired", times=1)
    assert await whole(transfer, of) == LARGE
    assert [request.status for request in hub.requests(kind="lfs")] == [200, 200, 403, 200]
    assert len(hub.requests(kind="resolve")) == 2


async def test_a_host_that_is_gone_is_not_asked_for_ever(hub: Hub, commit: Commit, transfer: Transfer) -> None:
    """The hub may send us elsewhere by now."""
    of = source(hub, commit, "model.safetensors")
    async with answering(lambda path, headers: reply(200, LARGE)) as gone:
        pass
    of.location = f"{gone}/signed"
    assert await whole(transfer, of) == LARGE
    assert len(hub.requests(kind="resolve")) == 1


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("/again", "in a circle"),
        ("", "in a circle"),
        ("http://[", "no address"),
        ("ftp://127.0.0.1/file", "no address"),
        ("file:///etc/passwd", "no address"),
        (None, "HTTP 302"),
    ],
)
async def test_odd_redirects(transfer: Transfer, location: str | None, message: str) -> None:
    count = 0

    def answer(path: str, headers: dict[str, str]) -> bytes:
        nonlocal count
        count += 1
        return reply(302) if location is None else reply(302, Location=location)

    async with answering(answer) as peer:
        with pytest.raises(HubProblem, match=message) as caught:
            await whole(transfer, source(peer, "main"))
    assert count <= 5 and caught.value.hint


Refusal = tuple[str, str, str, str | None, type[ModelcachedError]]


@pytest.mark.parametrize(
    "refusal",
    [
        ("org/name", "main", "missing.txt", None, EntryNotFound),
        ("org/name", "f" * 40, "config.json", None, RevisionNotFound),
        ("org/missing", "main", "config.json", None, RepoNotFound),
        ("org/private", "main", "config.json", None, RepoNotFound),
        ("org/private", "main", "config.json", OTHER_TOKEN, RepoNotFound),
        ("org/private", "main", "config.json", "hf_unknown", TokenRefused),
        ("org/gated", "main", "config.json", None, GatedRepo),
        ("org/gated", "main", "model.safetensors", OTHER_TOKEN, GatedRepo),
    ],
)
async def test_refusals(hub: Hub, transfer: Transfer, refusal: Refusal) -> None:
    repo, revision, path, token, error = refusal
    with pytest.raises(error) as caught:
        await transfer.whole(source(hub, revision, path, token, repo), 10, lambda _: None)
    assert type(caught.value) is error and caught.value.hint
    assert token is None or token not in f"{caught.value.message} {caught.value.hint} {caught.value.data} {caught.value.__cause__!r}"
    assert len(hub.requests()) == 1  # asking again would not help


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410])
async def test_a_second_host_that_refuses(transfer: Transfer, status: int) -> None:
    """That host says nothing about the repo: a 404 of its own does not make the repo one that does not exist."""
    async with answering(lambda path, headers: reply(status)) as away, answering(lambda *_: reply(302, Location=f"{away}/x")) as peer:
        with pytest.raises(HubProblem, match=f"on 127.0.0.1, which refuses it with HTTP {status}") as caught:
            await whole(transfer, source(peer, "main"))
    assert type(caught.value) is HubProblem


def test_a_token_is_not_shown() -> None:
    assert TOKEN not in repr(source("http://h", "main", token=TOKEN))


# --- answers that break -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("kind", ["5xx", "reset", "short", "stall", "hang"])
async def test_what_breaks_is_asked_again(hub: Hub, commit: Commit, transfer: Transfer, kind: str, path: str) -> None:
    hub.misbehave(kind, match=f"GET .*{'config' if path == 'config.json' else 'repos'}", times=2)
    assert await whole(transfer, source(hub, commit, path)) == FILES[path]
    assert len(hub.requests(kind="resolve")) == 3


async def test_it_gives_up(hub: Hub, commit: Commit, transfer: Transfer) -> None:
    hub.misbehave("5xx", status=500)
    with pytest.raises(HubUnavailable, match="HTTP 500") as caught:
        await whole(transfer, source(hub, commit))
    assert "local_files_only" in caught.value.hint and len(hub.requests()) == 4


async def test_a_hub_that_is_down(hub: Hub, commit: Commit, transfer: Transfer) -> None:
    hub.misbehave("down")
    with pytest.raises(HubUnavailable, match="can't be reached"):
        await whole(transfer, source(hub, commit))


@pytest.mark.parametrize(("more", "got"), [(-5, 14), (0, 18)])
async def test_too_many_bytes_show(hub: Hub, commit: Commit, transfer: Transfer, more: int, got: int) -> None:
    assert len(await whole(transfer, source(hub, commit), len(SMALL) + more)) == got


OK = b"HTTP/1.1 200 OK\r\n"


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1", b"\0" * 100, OK + b"Content-Length: x\r\n\r\n", OK + b"A" * 20_000])
async def test_what_is_not_http(transfer: Transfer, answer: bytes) -> None:
    async with answering(lambda path, headers: answer) as peer:
        with pytest.raises(HubUnavailable):
            await whole(transfer, source(peer, "main"))


# --- pauses -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["429", "ratelimit"])
async def test_everybody_waits_when_the_hub_asks_for_it(hub: Hub, commit: Commit, kind: str) -> None:
    """Those who stood in the queue for a connection as well."""
    hub.misbehave(kind, times=1, retry_after=1)
    async with transferring(connections=2) as transfer:
        assert await asyncio.gather(*(whole(transfer, source(hub, commit)) for _ in range(12))) == [SMALL] * 12
        assert transfer._hub.pauses.count == 1
    requests = hub.requests()
    paused = next(request for request in requests if request.status == 429)
    assert paused.seconds is not None
    begun = [request.started - paused.started - paused.seconds for request in requests if request is not paused]
    assert len(begun) == 12
    assert sum(seconds < 0.9 for seconds in begun) <= 1  # the one that was on its way beside it
    assert max(begun) < 3


async def test_a_pause_is_for_one_endpoint(hub: Hub, commit: Commit, transfer: Transfer) -> None:
    transfer._hub.pauses.note("https://elsewhere", 3600)
    transfer._hub.pauses.note("https://elsewhere", 1)  # a shorter one does not end it
    assert transfer._hub.pauses.remaining("https://elsewhere") > 3590
    assert await asyncio.wait_for(whole(transfer, source(hub, commit)), 5) == SMALL


# --- who gets a connection next ---------------------------------------------------------------------------------------


class Queue:
    """Tasks that stand in a budget's queue, and the order in which they were served."""

    def __init__(self, connections: int) -> None:
        self.budget = Budget(connections)
        self.served: list[str] = []
        self.leave: dict[str, asyncio.Event] = {}

    def stand(self, name: str, first: bool = False) -> asyncio.Task[None]:
        self.leave[name] = asyncio.Event()

        async def use() -> None:
            async with self.budget.connection(first):
                self.served.append(name)
                await self.leave[name].wait()

        return asyncio.create_task(use())


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_small_ones_are_served_before_large_ones() -> None:
    queue = Queue(1)
    tasks = [queue.stand("holder")]
    await settle()
    for name, first in [("large 1", False), ("small 1", True), ("large 2", False), ("small 2", True)]:
        tasks.append(queue.stand(name, first))
        await settle()
    for event in queue.leave.values():
        event.set()
    await asyncio.gather(*tasks)
    assert queue.served == ["holder", "small 1", "small 2", "large 1", "large 2"]
    assert queue.budget.free == 1


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("turn_came", ["before", "after", "never"])
async def test_who_is_cancelled_hands_his_turn_on(first: bool, turn_came: str) -> None:
    """In the very step in which the turn came, before it, and while there was none."""
    queue = Queue(1)
    holder = queue.stand("holder")
    await settle()
    leaver, other = queue.stand("leaver", first), queue.stand("other")
    await settle()
    if turn_came == "before":
        queue.budget._give()
        leaver.cancel()
    elif turn_came == "after":
        leaver.cancel()
        queue.budget._give()
    else:
        leaver.cancel()
        await settle()
        queue.budget._give()
    await settle()
    assert leaver.cancelled() and queue.served == ["holder", "other"]
    queue.budget.free -= 1  # the turn that was given here was nobody's
    for event in queue.leave.values():
        event.set()
    await asyncio.gather(holder, other)
    assert queue.budget.free == 1


# --- the environment --------------------------------------------------------------------------------------------------


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Says nothing of proxies and certificates, and is put back whoever changes it."""
    proxies = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")
    for name in (*proxies, "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
        for spelling in (name, name.lower()):
            monkeypatch.setenv(spelling, "")
            monkeypatch.delenv(spelling)
    return monkeypatch


async def ask_both_ways(endpoint: str, commit: str, attempts: int = 2) -> None:
    """Over huggingface_hub's client and over our own."""
    async with transferring(attempts=attempts) as transfer:
        assert (await transfer._hub.look_up(Repo(endpoint, "model", "org/name"), "main", None)).commit == commit
        assert await whole(transfer, source(endpoint, commit)) == SMALL


async def test_no_token_comes_from_the_daemons_home(hub: Hub, commit: Commit, environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A caller without a token has none, whatever ~/.netrc says of the hub (I8)."""
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login user password hf_of_the_daemon\n")
    (tmp_path / ".netrc").chmod(0o600)
    environment.setenv("HOME", str(tmp_path))
    environment.setenv("NETRC", str(tmp_path / ".netrc"))
    await ask_both_ways(hub.endpoint, commit)
    assert len(hub.requests()) == 2
    assert not [request for request in hub.requests() if request.authorization]


@pytest.mark.parametrize("name", ["http_proxy", "HTTP_PROXY", "ALL_PROXY"])
async def test_a_proxy(hub: Hub, commit: Commit, environment: pytest.MonkeyPatch, name: str) -> None:
    proxy = Proxy()
    async with proxy.running() as address:
        environment.setenv(name, address)
        await ask_both_ways(hub.endpoint, commit)
        assert [line.split(" ")[1].partition("?")[0] for line in proxy.asked] == [
            f"{hub.endpoint}/api/models/org/name/revision/main",
            file_url(Repo(hub.endpoint, "model", "org/name"), commit, "config.json"),
        ]
        environment.setenv("NO_PROXY", "127.0.0.1")
        await ask_both_ways(hub.endpoint, commit)
        assert len(proxy.asked) == 2


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_certificate(tmp_path_factory.mktemp("certificate"))


@pytest.mark.parametrize("name", ["SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"])
async def test_a_certificate_of_ones_own(hub: Hub, commit: Commit, certificate: Path, environment: pytest.MonkeyPatch, name: str) -> None:
    async with behind_tls(hub.endpoint, certificate) as endpoint:
        with pytest.raises(HubUnavailable, match=r"(?i)certificate"):
            await ask_both_ways(endpoint, commit, attempts=1)
        environment.setenv(name, str(certificate))
        await ask_both_ways(endpoint, commit)
        proxy = Proxy()
        async with proxy.running() as address:
            environment.setenv("https_proxy", address)
            await ask_both_ways(endpoint, commit)
            assert proxy.asked == [f"CONNECT {endpoint.removeprefix('https://')} HTTP/1.1"] * 2


async def test_our_own_client_checks_certificates_too(hub: Hub, commit: Commit, certificate: Path, environment: pytest.MonkeyPatch) -> None:
    async with behind_tls(hub.endpoint, certificate) as endpoint, transferring(attempts=1) as transfer:
        with pytest.raises(HubUnavailable, match=r"(?i)certificate"):
            await whole(transfer, source(endpoint, commit, token=TOKEN))
    assert hub.requests() == [] and "SSL_CERT_FILE" not in os.environ
