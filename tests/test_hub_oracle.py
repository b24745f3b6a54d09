"""The real huggingface_hub passes the table against tests/hub, and meets its misbehaviour as it would the real hub's."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.hub import Hub, HubError, Random, many_path, token_mark
from tests.hub.cases import CASES, DATA, FORK, MAIN, TOKEN, UNKNOWN, WEIGHTS, Case, hashes, publish
from tests.hub.oracle import Oracle, Outcome
from tests.hub.plain import Reply, large, resolve

BIG = Random("big", 12 << 20)
CHUNK = 10 << 20  # huggingface_hub writes, and so resumes, in pieces of this size


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Hub, dict[str, str]]]:
    with Hub.start(tmp_path_factory.mktemp("published")) as hub:
        yield hub, publish(hub)


@pytest.fixture(scope="module")
def reader(published: tuple[Hub, dict[str, str]], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Oracle]:
    with Oracle(tmp_path_factory.mktemp("reader"), published[0].endpoint) as oracle:
        yield oracle


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Hub, Oracle]]:
    """A hub that tests change, and a huggingface_hub that waits a second for bytes."""
    folder = tmp_path_factory.mktemp("served")
    with Hub.start(folder, page_size=7) as hub, Oracle(folder, hub.endpoint, HF_HUB_DOWNLOAD_TIMEOUT="1") as oracle:
        yield hub, oracle


@pytest.fixture
def hub(served: tuple[Hub, Oracle]) -> Iterator[Hub]:
    served[0].reset_log()
    yield served[0]
    served[0].calm()


@pytest.fixture
def oracle(served: tuple[Hub, Oracle]) -> Oracle:
    return served[1]


# The table


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_table(case: Case, published: tuple[Hub, dict[str, str]], reader: Oracle, tmp_path: Path) -> None:
    outcome = reader.call(case.call, cache_dir=str(tmp_path), **case.filled(published[1]))
    if case.error is not None:
        assert outcome.is_error(case.error), outcome
        assert not outcome.is_error("GatedRepoError") or case.error == "GatedRepoError"
    else:
        assert outcome.files == case.hashes, outcome


def test_local_dir_gets_the_same_files(published: tuple[Hub, dict[str, str]], reader: Oracle, tmp_path: Path) -> None:
    outcome = reader.call("snapshot_download", repo_id="org/model", local_dir=str(tmp_path / "out"), cache_dir=str(tmp_path))
    assert outcome.files == hashes(MAIN)


def test_the_api_around_files(published: tuple[Hub, dict[str, str]], reader: Oracle) -> None:
    _, commits = published

    def value(name: str, **arguments: object) -> object:
        outcome = reader.call(f"api.{name}", **arguments)
        assert outcome.error is None, outcome
        return outcome.value

    info = value("repo_info", repo_id="org/model", files_metadata=True)
    assert isinstance(info, dict) and info["sha"] == commits["main"] and info["private"] is False and info["gated"] is False
    (weights,) = (row for row in info["siblings"] if row["rfilename"] == "model.safetensors")
    assert weights["size"] == WEIGHTS.size and weights["lfs"]["sha256"] == hashes({"": WEIGHTS})[""]
    assert info["siblings"][1] == {**info["siblings"][1], "lfs": None, "size": len(bytes(MAIN["README.md"]))}
    expanded = value("model_info", repo_id="org/gated", expand=["gated", "sha"])
    assert isinstance(expanded, dict) and expanded["gated"] == "manual" and expanded["siblings"] is None
    refs = value("list_repo_refs", repo_id="org/model", include_pull_requests=True)
    assert isinstance(refs, dict) and {row["name"]: row["target_commit"] for row in refs["branches"]} == {
        "main": commits["main"],
        "feature/dev": commits["dev"],
    }
    assert [row["target_commit"] for row in refs["tags"]] == [commits["first"]]
    assert [row["ref"] for row in refs["pull_requests"]] == ["refs/pr/1"]
    assert sorted(value("list_repo_files", repo_id="org/model", repo_type="dataset")) == sorted(DATA)  # type: ignore[call-overload]
    rows = value("list_repo_tree", repo_id="org/model", path_in_repo="tokenizer", expand=True)
    assert isinstance(rows, list) and [row["path"] for row in rows] == ["tokenizer/deep", "tokenizer/merges.txt", "tokenizer/vocab.txt"]
    assert rows[1]["last_commit"]["oid"] == commits["main"] and rows[1]["security"]["safe"] is True
    assert value("get_paths_info", repo_id="org/model", paths=["config.json", "nothing"])[0]["path"] == "config.json"  # type: ignore[index]
    assert [row["commit_id"] for row in value("list_repo_commits", repo_id="org/model")] == [commits["main"], commits["first"]]  # type: ignore[attr-defined]
    assert value("file_exists", repo_id="org/model", filename="config.json") is True
    assert value("file_exists", repo_id="org/model", filename="nothing") is False
    assert value("revision_exists", repo_id="org/model", revision="nowhere") is False
    assert value("auth_check", repo_id="org/gated", token=TOKEN) is None
    assert reader.call("api.auth_check", repo_id="org/gated").is_error("GatedRepoError")
    assert reader.call("api.auth_check", repo_id="org/private").is_error("RepositoryNotFoundError")
    assert value("whoami", token=TOKEN)["name"] == "somebody"  # type: ignore[index]
    refused = reader.call("api.repo_info", repo_id="org/model", token=UNKNOWN)
    assert "Invalid credentials in Authorization header" in refused.message and not refused.is_error("RepositoryNotFoundError")


# What changes on the hub


def test_a_moved_branch_is_followed_and_shares_what_did_not_change(hub: Hub, oracle: Oracle, tmp_path: Path) -> None:
    old = hub.commit("org/moving", {"config.json": b"1", "model.bin": Random("moving", 100_000)})
    first = oracle.call("snapshot_download", repo_id="org/moving", cache_dir=str(tmp_path))
    new = hub.commit("org/moving", {"config.json": b"2"})
    assert old != new
    hub.reset_log()
    second = oracle.call("snapshot_download", repo_id="org/moving", cache_dir=str(tmp_path))
    assert first.path is not None and first.path.endswith(old) and second.path is not None and second.path.endswith(new)
    assert second.files == hashes({"config.json": b"2", "model.bin": Random("moving", 100_000)})
    assert hub.bytes_sent() == 1  # "2": the large file is known by its SHA-256
    hub.delete("org/moving", "main")
    assert oracle.call("api.repo_info", repo_id="org/moving").is_error("RevisionNotFoundError")


def test_offline_and_without_the_hub_what_is_here_is_served(hub: Hub, oracle: Oracle, tmp_path: Path) -> None:
    hub.commit("org/kept", FORK)
    assert oracle.call("snapshot_download", repo_id="org/kept", cache_dir=str(tmp_path)).files == hashes(FORK)
    hub.misbehave("down")
    with Oracle(tmp_path, hub.endpoint) as fresh:  # the other one's idle connection was reset: it would raise ReadError, once
        assert fresh.call("snapshot_download", repo_id="org/kept", cache_dir=str(tmp_path)).files == hashes(FORK)
        nothing = fresh.call("snapshot_download", repo_id="org/never", cache_dir=str(tmp_path))
    assert nothing.is_error("LocalEntryNotFoundError") and "ConnectError" in nothing.message
    hub.calm()
    hub.reset_log()
    with Oracle(tmp_path, hub.endpoint, HF_HUB_OFFLINE="1") as offline:
        assert offline.call("snapshot_download", repo_id="org/kept", cache_dir=str(tmp_path)).files == hashes(FORK)
    assert hub.requests() == []


def test_access_changes_at_once(hub: Hub, oracle: Oracle, tmp_path: Path) -> None:
    hub.commit("org/access", FORK, private=True, tokens=[TOKEN])
    assert oracle.call("api.auth_check", repo_id="org/access", token=TOKEN).error is None
    hub.access("org/access", tokens=[])
    assert oracle.call("api.auth_check", repo_id="org/access", token=TOKEN).is_error("RepositoryNotFoundError")
    hub.revoke_token(TOKEN)
    assert "Invalid credentials" in oracle.call("api.auth_check", repo_id="org/access", token=TOKEN).message
    hub.access("org/access", private=False, gated=True, tokens=[TOKEN])
    assert oracle.call("api.auth_check", repo_id="org/access", token=TOKEN).error is None
    assert oracle.call("api.auth_check", repo_id="org/access").is_error("GatedRepoError")


# Listings


def test_pages_are_linked(hub: Hub, oracle: Oracle) -> None:
    hub.commit_many("org/pages", 30, folder=10)
    outcome = oracle.call("api.list_repo_tree", repo_id="org/pages", recursive=True)
    assert [row["path"] for row in outcome.value if "blob_id" in row] == [many_path(i, 10) for i in range(30)]
    assert [row["path"] for row in outcome.value if "tree_id" in row] == ["00000", "00001", "00002"]
    assert len(hub.requests("tree")) == 5  # 33 rows, 7 a page
    assert [row["path"] for row in oracle.call("api.list_repo_tree", repo_id="org/pages").value] == ["00000", "00001", "00002"]


def test_hostile_listings_are_told_as_they_are(hub: Hub, oracle: Oracle, tmp_path: Path) -> None:
    paths = ["../out", "/etc/motd", "a/../../b", "nul\0", "twice", "twice", "folder", "folder/file", "", ".", "a//b", "\ud83e"]
    hub.commit("org/hostile", [(path, f"{i}") for i, path in enumerate(paths[:-1])], hostile=True)
    shown = oracle.call("api.list_repo_tree", repo_id="org/hostile", recursive=True).value
    assert [row["path"] for row in shown] == paths[:-1]
    assert Reply(f"{hub.endpoint}/org/hostile/resolve/main/twice").body == b"4"
    with pytest.raises(HubError, match="hostile=True"):
        hub.commit("org/hostile", {"../out": b""})
    refused = oracle.call("snapshot_download", repo_id="org/hostile", cache_dir=str(tmp_path / "cache"))
    assert refused.error is not None and not (tmp_path / "out").exists()


# Two hosts


def test_the_token_stays_on_its_host(published: tuple[Hub, dict[str, str]], reader: Oracle, tmp_path: Path) -> None:
    hub, _ = published
    hub.reset_log()
    assert reader.call("snapshot_download", repo_id="org/private", token=TOKEN, cache_dir=str(tmp_path)).files == hashes(FORK)
    seen = {(request.host, request.authorization) for request in hub.requests()}
    assert seen == {("hub", token_mark(TOKEN)), ("lfs", None)}
    assert urlsplit(hub.endpoint).hostname != urlsplit(hub.lfs_url).hostname
    url = large(hub, "org/fork", "model.safetensors")
    assert url.startswith(hub.lfs_url) and Reply(url, "HEAD").status == 200
    assert Reply(url, Authorization="Bearer x").status == 400
    assert hub.requests("lfs")[-1].authorization == token_mark("x")


def test_the_second_host_in_a_process_of_its_own(tmp_path: Path) -> None:
    with Hub.start(tmp_path, lfs_process=True) as hub, Oracle(tmp_path, hub.endpoint) as oracle:
        hub.commit("org/model", MAIN)
        assert oracle.call("snapshot_download", repo_id="org/model").files == hashes(MAIN)
        assert hub.bytes_sent() == sum(len(content) for content in MAIN.values())
        hub.wait(kind="lfs", bytes_sent=WEIGHTS.size)
        hub.misbehave("5xx", match="^lfs", status=500)
        url = large(hub, "org/model", "model.safetensors")
        assert Reply(url).status == 500
        hub.calm()
        assert Reply(url).status == 200
        assert [request.host for request in hub.requests()[-2:]] == ["lfs", "lfs"]


def test_small_files_one_redirect_away(tmp_path: Path) -> None:
    with Hub.start(tmp_path, resolve_cache=True) as hub, Oracle(tmp_path, hub.endpoint) as oracle:
        hub.commit("org/model", MAIN)
        hub.commit("alone", FORK, gated=True, tokens=[TOKEN])
        assert oracle.call("snapshot_download", repo_id="org/model").files == hashes(MAIN)
        assert oracle.call("snapshot_download", repo_id="alone", token=TOKEN).files == hashes(FORK)
        reply = Reply(resolve(hub, "org/model", "config.json"), "HEAD")
        assert reply.status == 307 and reply.headers["Location"].startswith("/api/resolve-cache/models/org/model/")
        assert hub.requests("cache")


# Counting


def test_each_byte_is_counted_where_it_went(published: tuple[Hub, dict[str, str]], reader: Oracle, tmp_path: Path) -> None:
    hub, _ = published
    hub.reset_log()
    reader.call("snapshot_download", repo_id="org/model", cache_dir=str(tmp_path))
    assert hub.bytes_sent() == sum(len(content) for content in MAIN.values())
    for path, content in MAIN.items():
        assert hub.bytes_sent(path) == len(content)
    assert hub.bytes_sent(hashes({"": WEIGHTS})[""]) == WEIGHTS.size
    (request,) = hub.requests("lfs", "model.safetensors")
    assert (request.method, request.status, request.range, request.fault) == ("GET", 200, None, None) and request.seconds is not None
    assert {request.kind for request in hub.requests()} == {"info", "tree", "resolve", "lfs"}


# How huggingface_hub takes misbehaviour


def fetch(hub: Hub, oracle: Oracle, tmp_path: Path) -> Outcome:
    hub.commit("org/fetched", {"config.json": b"{}", "model.bin": BIG})
    hub.reset_log()
    return oracle.call("hf_hub_download", repo_id="org/fetched", filename="model.bin", cache_dir=str(tmp_path))


GOOD = {"model.bin": hashlib.sha256(bytes(BIG)).hexdigest()}


@pytest.mark.parametrize("kind", ["429", "ratelimit"])
def test_huggingface_hub_waits_as_it_is_told(kind: str, hub: Hub, oracle: Oracle, tmp_path: Path) -> None:
    hub.misbehave(kind, match="^lfs", retry_after=0, times=1)
    start = time.monotonic()
    assert fetch(hub, oracle, tmp_path).files == GOOD
    assert time.monotonic() - start >= 1.0  # it adds a second to what it is told
    assert [request.status for request in hub.requests("lfs")] == [429, 200]


def test_huggingface_hub_resumes_a_short_body(hub: Hub, oracle: Oracle, tmp_path: Path) -> None:
    hub.misbehave("short", after=11 << 20, times=1)
    assert fetch(hub, oracle, tmp_path).files == GOOD
    assert [request.range for request in hub.requests("lfs")] == [None, f"bytes={CHUNK}-"]
    assert hub.bytes_sent("model.bin") == BIG.size + (1 << 20)


def test_huggingface_hub_takes_compressed_text(hub: Hub, oracle: Oracle, tmp_path: Path) -> None:
    hub.commit("org/text", {"vocab.txt": b"word\n" * 1000})
    hub.misbehave("gzip")
    outcome = oracle.call("hf_hub_download", repo_id="org/text", filename="vocab.txt", cache_dir=str(tmp_path))
    assert outcome.files == hashes({"vocab.txt": b"word\n" * 1000})
    assert [(request.method, request.fault) for request in hub.requests("resolve")] == [("HEAD", None), ("GET", "gzip")]


def test_huggingface_hub_starts_over_without_ranges(hub: Hub, oracle: Oracle, tmp_path: Path) -> None:
    hub.misbehave("short", after=11 << 20, times=1)
    hub.misbehave("no_range")
    assert fetch(hub, oracle, tmp_path).files == GOOD
    assert [request.status for request in hub.requests("lfs")] == [200, 200]
    assert hub.bytes_sent("model.bin") == BIG.size + (11 << 20)


def test_huggingface_hub_resumes_after_a_stall(hub: Hub, oracle: Oracle, tmp_path: Path) -> None:
    hub.misbehave("stall", after=11 << 20, times=1)
    assert fetch(hub, oracle, tmp_path).files == GOOD
    assert [request.range for request in hub.requests("lfs")] == [None, f"bytes={CHUNK}-"]


def test_huggingface_hub_gives_up_on_a_reset(hub: Hub, oracle: Oracle, tmp_path: Path) -> None:
    hub.misbehave("reset", after=1 << 20, times=1)
    assert fetch(hub, oracle, tmp_path).is_error("ReadError")


def test_huggingface_hub_gives_up_on_5xx_and_expired_addresses(hub: Hub, oracle: Oracle, tmp_path: Path) -> None:
    hub.misbehave("5xx", match="^lfs", times=1)
    assert fetch(hub, oracle, tmp_path).is_error("HfHubHTTPError")
    hub.misbehave("expired", times=1)
    assert fetch(hub, oracle, tmp_path).is_error("HfHubHTTPError")
    assert [request.status for request in hub.requests("lfs")] == [403]


def test_huggingface_hub_takes_wrong_bytes(hub: Hub, oracle: Oracle, tmp_path: Path) -> None:
    hub.misbehave("wrong", times=1)
    outcome = fetch(hub, oracle, tmp_path)
    assert outcome.error is None and outcome.files != GOOD
