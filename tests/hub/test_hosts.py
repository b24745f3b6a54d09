"""The hub itself, by plain HTTP: names are git's, answers are the real hub's, misbehaviour is what it is called, each byte is counted."""

from __future__ import annotations

import gzip
import http.client
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.hub import Hub, HubError, Random, many_content, many_path
from tests.hub.cases import DATA, FORK, MAIN, WEIGHTS, hashes, publish
from tests.hub.content import lfs_pointer
from tests.hub.plain import Reply, large, resolve
from tests.hub.repos import FIRST_COMMIT_TIME

BIG = Random("big", 12 << 20)
GIT_AUTHOR = {"NAME": "A Hub", "EMAIL": "hub@localhost", "DATE": f"{FIRST_COMMIT_TIME} +0000"}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Hub, dict[str, str]]]:
    with Hub.start(tmp_path_factory.mktemp("published")) as hub:
        yield hub, publish(hub)


def test_a_renamed_repo_redirects_relatively(published: tuple[Hub, dict[str, str]]) -> None:
    hub, _ = published
    reply = Reply(f"{hub.endpoint}/api/models/org/older-name/revision/main?blobs=true")
    assert (reply.status, reply.headers["Location"]) == (307, "/api/models/org/newer-name/revision/main?blobs=true")
    assert Reply(resolve(hub, "org/older-name", "a b")).headers["Location"] == "/org/newer-name/resolve/main/a%20b"


def test_names_are_gits_own(published: tuple[Hub, dict[str, str]], tmp_path: Path) -> None:
    """git makes the same blobs, trees and commit of the same files."""
    hub, _ = published
    who = {f"GIT_{role}_{part}": text for role in ("AUTHOR", "COMMITTER") for part, text in GIT_AUTHOR.items()}
    environment = {**who, "HOME": str(tmp_path), "PATH": os.environ["PATH"], "GIT_CONFIG_NOSYSTEM": "1"}

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(tmp_path), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout.strip()

    git("init", "-q")
    for path, content in DATA.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        pointer = lfs_pointer(hashes({"": content})[""], len(content))
        (tmp_path / path).write_bytes(pointer if path.endswith(".bin") else bytes(content))
    git("add", "-A", "-f")
    git("commit", "-q", "-m", "A commit")
    rows = json.loads(Reply(f"{hub.endpoint}/api/datasets/org/model/tree/main?recursive=true").body)
    assert {row["path"]: row["oid"] for row in rows} == dict(line.split()[2:4][::-1] for line in git("ls-tree", "-rt", "HEAD").splitlines())
    assert git("rev-parse", "HEAD") == json.loads(Reply(f"{hub.endpoint}/api/datasets/org/model").body)["sha"]


def test_commits_are_the_same_on_every_hub(published: tuple[Hub, dict[str, str]], tmp_path: Path) -> None:
    with Hub.start(tmp_path) as other:
        assert publish(other) == published[1]


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


def test_heads_and_ranges(published: tuple[Hub, dict[str, str]]) -> None:
    hub, commits = published
    small = Reply(resolve(hub, "org/model", "config.json"), "HEAD")
    assert (small.status, small.body, small.headers["Content-Length"]) == (200, b"", str(len(bytes(MAIN["config.json"]))))
    assert small.headers["X-Repo-Commit"] == commits["main"] and small.headers["X-Linked-Etag"] is None
    linked = Reply(resolve(hub, "org/model", "model.safetensors"), "HEAD")
    assert linked.status == 302 and linked.headers["X-Linked-Size"] == str(WEIGHTS.size)
    assert linked.headers["X-Linked-Etag"].strip('"') == hashes({"": WEIGHTS})[""] != linked.headers["ETag"].strip('"')
    assert not any("xet" in name.lower() for name in linked.headers)
    for url, content in ((linked.headers["Location"], bytes(WEIGHTS)), (resolve(hub, "org/model", "notes.md"), bytes(MAIN["notes.md"]))):
        size = len(content)
        parts = {"0-0": (0, 1), "5-9": (5, 10), f"{size - 3}-": (size - 3, size), "-4": (size - 4, size), f"7-{size * 2}": (7, size)}
        for header, (start, end) in parts.items():
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
    assert select.select([watch], [], [], 5)[0]
    os.close(watch)
    owner.stdin.close()
    owner.stdout.close()


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


def test_text_may_come_compressed_and_without_a_length(hub: Hub) -> None:
    hub.commit("org/text", {"vocab.txt": b"word\n" * 1000})
    hub.misbehave("gzip")
    url = resolve(hub, "org/text", "vocab.txt")
    packed = Reply(url, **{"Accept-Encoding": "gzip"})
    assert packed.headers["Content-Length"] is None and packed.headers["ETag"].startswith('W/"')
    assert gzip.decompress(packed.body) == Reply(url).body == b"word\n" * 1000
    assert Reply(url, Range="bytes=0-3", **{"Accept-Encoding": "gzip"}).body == b"word"


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
    together = seconds()
    hub.calm()
    hub.misbehave("slow", rate=4 << 20, per_connection=True)
    each = seconds()
    hub.calm()
    assert 0.45 <= together and 0.2 <= each < together and seconds() < together  # at 4 MiB/s 2 MiB take 0.5 s, 1 MiB takes 0.25 s


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
