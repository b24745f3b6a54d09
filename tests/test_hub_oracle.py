"""The real huggingface_hub passes the table against tests/hub, and the hub does what it says: counts, misbehaves, keeps hosts apart."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote, urlsplit

import pytest

from tests.hub import Hub, HubError, Random, many_content, many_path, token_mark
from tests.hub.cases import CASES, DATA, FORK, MAIN, TOKEN, UNKNOWN, WEIGHTS, Case, hashes, publish
from tests.hub.oracle import Oracle, Outcome

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


class Reply:
    """One plain HTTP exchange on a connection of its own. `broken` is what ended the body early."""

    def __init__(self, url: str, method: str = "GET", **headers: str) -> None:
        parts = urlsplit(url)
        connection = http.client.HTTPConnection(parts.netloc, timeout=10)
        connection.request(method, parts.path + (f"?{parts.query}" if parts.query else ""), headers=headers)
        answer = connection.getresponse()
        self.status, self.headers, self.body, self.broken = answer.status, answer.headers, b"", ""
        try:
            while chunk := answer.read1(1 << 16):
                self.body += chunk
            if answer.length:
                self.broken = "short"
        except ConnectionResetError:
            self.broken = "reset"
        connection.close()


def resolve(hub: Hub, repo_id: str, path: str) -> str:
    return f"{hub.endpoint}/{repo_id}/resolve/main/{quote(path)}"


def large(hub: Hub, repo_id: str, path: str) -> str:
    """The signed address of a file in LFS."""
    return Reply(resolve(hub, repo_id, path), "HEAD").headers["Location"]


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
    hub, commits = published

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


def test_a_renamed_repo_redirects_relatively(published: tuple[Hub, dict[str, str]]) -> None:
    hub, _ = published
    reply = Reply(f"{hub.endpoint}/api/models/org/older-name/revision/main?blobs=true")
    assert (reply.status, reply.headers["Location"]) == (307, "/api/models/org/newer-name/revision/main?blobs=true")
    assert Reply(resolve(hub, "org/older-name", "a b")).headers["Location"] == "/org/newer-name/resolve/main/a%20b"


# Names and numbers


def test_names_are_gits_own(published: tuple[Hub, dict[str, str]], tmp_path: Path) -> None:
    """git makes the same blobs, trees and commits of the same files."""
    hub, commits = published

    def git(*arguments: str) -> str:
        who = {f"GIT_{role}_{part}": text for role in ("AUTHOR", "COMMITTER") for part, text in (("NAME", "A Hub"), ("EMAIL", "hub@localhost"))}
        dates = {"GIT_AUTHOR_DATE": "1700000000 +0000", "GIT_COMMITTER_DATE": "1700000000 +0000"}
        alone = {"HOME": str(tmp_path), "PATH": os.environ["PATH"], "GIT_CONFIG_NOSYSTEM": "1"}
        return subprocess.run(["git", "-C", str(tmp_path), *arguments], check=True, capture_output=True, text=True, env={**alone, **who, **dates}).stdout.strip()

    git("init", "-q")
    rows = json.loads(Reply(f"{hub.endpoint}/api/datasets/org/model/tree/main?recursive=true").body)
    for path, content in DATA.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        data = bytes(content)
        if path.endswith(".bin"):
            data = b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize %d\n" % (hashes({"": content})[""].encode(), len(data))
        (tmp_path / path).write_bytes(data)
    git("add", "-A", "-f")
    git("commit", "-q", "-m", "A commit")
    listed = dict(line.split()[2:4][::-1] for line in git("ls-tree", "-rt", "HEAD").splitlines())
    assert {row["path"]: row["oid"] for row in rows} == listed
    assert git("rev-parse", "HEAD") == json.loads(Reply(f"{hub.endpoint}/api/datasets/org/model").body)["sha"]


def test_commits_are_the_same_on_every_hub(published: tuple[Hub, dict[str, str]], tmp_path: Path) -> None:
    with Hub.start(tmp_path) as other:
        assert publish(other) == published[1]


def test_pages_are_linked(hub: Hub, oracle: Oracle) -> None:
    hub.commit_many("org/pages", 30, folder=10)
    outcome = oracle.call("api.list_repo_tree", repo_id="org/pages", recursive=True)
    assert [row["path"] for row in outcome.value if "blob_id" in row] == [many_path(i, 10) for i in range(30)]
    assert [row["path"] for row in outcome.value if "tree_id" in row] == ["00000", "00001", "00002"]
    assert len(hub.requests("tree")) == 5  # 33 rows, 7 a page
    assert [row["path"] for row in oracle.call("api.list_repo_tree", repo_id="org/pages").value] == ["00000", "00001", "00002"]


def test_many_files_cost_little(tmp_path: Path) -> None:
    with Hub.start(tmp_path) as hub:
        hub.commit_many("org/many", 100_000, 64)
        hub.commit_many("org/equal", 65_001, 8, equal=True)
        rows, url = [], f"{hub.endpoint}/api/models/org/many/tree/main?recursive=true&expand=false"
        while url:
            reply = Reply(url)
            rows += json.loads(reply.body)
            url = reply.headers.get("Link", "").partition(">")[0][1:]
        assert len(rows) == 100_100 and len(hub.requests("tree")) == 101
        path = many_path(77_777, 1000)
        assert Reply(resolve(hub, "org/many", path)).body == bytes(many_content("org/many", 77_777, 64))
        equal = json.loads(Reply(f"{hub.endpoint}/api/models/org/equal?blobs=true").body)["siblings"]
        assert len(equal) == 65_001 and len({row["blobId"] for row in equal}) == 1


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


def test_signed_addresses_are_checked_and_expire(tmp_path: Path) -> None:
    with Hub.start(tmp_path, url_seconds=0) as hub:
        hub.commit("org/a", FORK)
        url = large(hub, "org/a", "model.safetensors")
        assert Reply(url).status == 403
    with Hub.start(tmp_path) as hub:
        hub.commit("org/a", FORK)
        url = large(hub, "org/a", "model.safetensors")
        assert Reply(url).body == bytes(WEIGHTS)
        assert Reply(url.replace("Signature=", "Signature=0")).status == 403
        assert Reply(url.partition("?")[0]).status == 403


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


# Answers in detail


def test_heads_and_ranges(published: tuple[Hub, dict[str, str]]) -> None:
    hub, commits = published
    small = Reply(resolve(hub, "org/model", "config.json"), "HEAD")
    assert (small.status, small.body, small.headers["Content-Length"]) == (200, b"", str(len(bytes(MAIN["config.json"]))))
    assert small.headers["X-Repo-Commit"] == commits["main"] and small.headers["X-Linked-Etag"] is None
    linked = Reply(resolve(hub, "org/model", "model.safetensors"), "HEAD")
    assert linked.status == 302 and linked.headers["X-Linked-Size"] == str(WEIGHTS.size)
    assert linked.headers["X-Linked-Etag"] == '"%s"' % hashes({"": WEIGHTS})[""] and linked.headers["ETag"] != linked.headers["X-Linked-Etag"]
    assert not any("xet" in name.lower() for name in linked.headers)
    for url, content in ((linked.headers["Location"], bytes(WEIGHTS)), (resolve(hub, "org/model", "notes.md"), bytes(MAIN["notes.md"]))):
        size = len(content)
        for header, start, end in (("0-0", 0, 1), ("5-9", 5, 10), (f"{size - 3}-", size - 3, size), ("-4", size - 4, size), (f"7-{size * 2}", 7, size)):
            part = Reply(url, Range=f"bytes={header}")
            assert (part.status, part.body) == (206, content[start:end])
            assert part.headers["Content-Range"] == f"bytes {start}-{end - 1}/{size}"
        past = Reply(url, Range=f"bytes={size}-")
        assert (past.status, past.headers["Content-Range"]) == (416, f"bytes */{size}")
        assert Reply(url, Range="bytes=0-1,3-4").status == 200
        etag = Reply(url, "HEAD").headers["ETag"]
        assert Reply(url, **{"If-None-Match": etag}).status == 304
        assert Reply(url, Range="bytes=0-0", **{"If-Range": '"other"'}).status == 200
    empty = Reply(resolve(hub, "org/model", "tokenizer/merges.txt"))
    assert (empty.status, empty.body) == (200, b"")


@pytest.mark.parametrize(
    ("path", "status", "code"),
    [
        ("/api/models/org/missing", 401, "RepoNotFound"),
        ("/org/private/resolve/main/config.json", 401, "RepoNotFound"),
        ("/org/gated/resolve/main/config.json", 401, "GatedRepo"),
        ("/api/models/org/gated/tree/main", 200, None),
        ("/api/models/org/model/tree/nowhere", 404, "RevisionNotFound"),
        ("/api/models/org/model/tree/main/nothing", 404, "EntryNotFound"),
        ("/org/model/resolve/main/nothing", 404, "EntryNotFound"),
        ("/org/model/resolve/refs/pr/1/pull.txt", 200, None),
        ("/datasets/org/model/resolve/main/data%2Ftrain.csv", 200, None),
        ("/nothing/here", 404, None),
        ("/", 404, None),
    ],
)
def test_refusals_have_names(path: str, status: int, code: str | None, published: tuple[Hub, dict[str, str]]) -> None:
    reply = Reply(published[0].endpoint + path)
    assert (reply.status, reply.headers.get("X-Error-Code")) == (status, code)
    assert (status == 200) or json.loads(reply.body)["error"]


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


def test_what_a_leaving_client_did_not_get_is_not_counted(hub: Hub) -> None:
    hub.commit("org/big", {"big.bin": BIG})
    url = urlsplit(large(hub, "org/big", "big.bin"))
    hub.misbehave("slow", rate=2 << 20)
    connection = http.client.HTTPConnection(url.netloc)
    connection.request("GET", f"{url.path}?{url.query}")
    answer = connection.getresponse()
    answer.read(1 << 20)
    answer.close()
    connection.close()
    hub.wait(kind="lfs", requests=1, over=True)
    assert 1 << 20 <= hub.bytes_sent("big.bin") < 3 << 20


def test_the_hub_ends_with_its_owner(tmp_path: Path) -> None:
    code = f"from tests.hub import Hub; hub = Hub.start({str(tmp_path)!r}); print(hub.endpoint, hub.pid, flush=True); input()"
    owner = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert owner.stdin is not None and owner.stdout is not None
    _, pid = owner.stdout.readline().split()
    watch = os.pidfd_open(int(pid))
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    import select

    assert select.select([watch], [], [], 5)[0]
    os.close(watch)
    owner.stdin.close()
    owner.stdout.close()


# Misbehaviour, seen plainly


@pytest.fixture(params=["lfs", "memory", "disk"])
def body_url(request: pytest.FixtureRequest, hub: Hub) -> tuple[str, bytes]:
    files = {"lfs": ("big.bin", BIG), "memory": ("small.txt", Random("small", 5000)), "disk": ("middle.txt", Random("middle", 300_000))}
    path, content = files[request.param]
    hub.commit("org/bodies", {path: content})
    return (large(hub, "org/bodies", path) if request.param == "lfs" else resolve(hub, "org/bodies", path)), bytes(content)


@pytest.mark.parametrize("kind", ["reset", "short"])
def test_broken_bodies(kind: str, hub: Hub, body_url: tuple[str, bytes]) -> None:
    url, content = body_url
    hub.reset_log()
    hub.misbehave(kind, after=4000, times=1)
    assert Reply(url, "HEAD").status == 200  # not counted
    broken = Reply(url)
    assert broken.broken == kind and broken.body == content[:4000] and broken.headers["Content-Length"] == str(len(content))
    hub.wait(requests=2, over=True, host="lfs" if url.startswith(hub.lfs_url) else "hub")
    assert hub.bytes_sent() == 4000 and hub.requests()[-1].fault == kind
    assert Reply(url).body == content


def test_wrong_bytes_of_the_right_length(hub: Hub, body_url: tuple[str, bytes]) -> None:
    url, content = body_url
    hub.misbehave("wrong", after=10, times=1)
    wrong = Reply(url).body
    assert len(wrong) == len(content) and [i for i in range(len(content)) if wrong[i] != content[i]] == [10]
    assert Reply(url).body == content


def test_ranges_ignored(hub: Hub, body_url: tuple[str, bytes]) -> None:
    url, content = body_url
    hub.misbehave("no_range", times=1)
    whole = Reply(url, Range="bytes=5-9")
    assert (whole.status, whole.body, whole.headers["Accept-Ranges"]) == (200, content, None)
    assert Reply(url, Range="bytes=5-9").status == 206


def test_stalls_last_until_calm(hub: Hub, body_url: tuple[str, bytes]) -> None:
    url, content = body_url
    hub.reset_log()
    hub.misbehave("stall", after=3000)
    replies: list[Reply] = []
    thread = threading.Thread(target=lambda: replies.append(Reply(url)))
    thread.start()
    hub.wait(bytes_sent=3000, host="lfs" if url.startswith(hub.lfs_url) else "hub")
    hub.calm()
    thread.join(10)
    assert (replies[0].body, replies[0].broken) == (content[:3000], "reset")


def test_no_answer_at_all(hub: Hub) -> None:
    hub.commit("org/small", {"config.json": b"{}"})
    hub.misbehave("hang", match="^info")
    replies: list[Reply] = []
    thread = threading.Thread(target=lambda: replies.append(Reply(f"{hub.endpoint}/api/models/org/small")))
    thread.start()
    hub.wait(kind="info", requests=1)
    assert Reply(resolve(hub, "org/small", "config.json")).body == b"{}" and not replies
    hub.calm()
    thread.join(10)
    assert replies[0].status == 503


def test_pace_is_for_all_together_or_for_each(hub: Hub) -> None:
    hub.commit("org/paced", {"a.bin": Random("a", 1 << 20), "b.bin": Random("b", 1 << 20)})
    urls = [large(hub, "org/paced", path) for path in ("a.bin", "b.bin")]

    def seconds() -> float:
        threads = [threading.Thread(target=Reply, args=(url,)) for url in urls]
        start = time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return time.monotonic() - start

    hub.misbehave("slow", rate=4 << 20)
    assert seconds() >= 0.45
    hub.calm()
    hub.misbehave("slow", rate=4 << 20, per_connection=True)
    assert 0.2 <= seconds() < 0.45
    hub.calm()
    assert seconds() < 0.2


def test_down_is_refused_and_comes_back_on_its_port(hub: Hub) -> None:
    hub.commit("org/small", {"config.json": b"{}"})
    hub.misbehave("down", match="hub")
    with pytest.raises(ConnectionRefusedError):
        Reply(hub.endpoint)
    assert Reply(hub.lfs_url).status == 403
    hub.calm()
    assert Reply(resolve(hub, "org/small", "config.json")).body == b"{}"


def test_unknown_misbehaviour_is_named(hub: Hub) -> None:
    with pytest.raises(HubError, match="no such misbehaviour: 'sulk'"):
        hub.misbehave("sulk")


# Misbehaviour, as huggingface_hub takes it


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
