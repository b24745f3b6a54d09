"""What the hub said: kept over restarts, and believed only if it parses; it proves nothing about bytes (I10)."""

from __future__ import annotations

import json
import os
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from modelcached.errors import UnsafePath
from modelcached.layout import Layout
from modelcached.model import Commit, Digest, ListedFile, Listing, Repo, TreeId
from modelcached.repos import Repos, Selected
from modelcached.root import open_root

REPO, SAME_NAME = Repo("https://hub", "model", "org/name"), Repo("https://hub", "dataset", "org/name")
COMMIT, OTHER = Commit("c" * 40), Commit("d" * 40)
OID, DIGEST = "1" * 40, Digest("2" * 64)
SMALL, LARGE = ListedFile("a b/ä.txt", 3, OID), ListedFile("big.bin", 1 << 40, "3" * 40, "4" * 64, "xet")
LISTING = Listing(COMMIT, (SMALL, LARGE))
JUNK = [b"", b"{", b"null", b"[]", b"{}", b"\xff\xfe", b'{"commit": 1, "checked": 2}', b'{"commit": "main", "checked": 2.0}', b"\0" * 100]


@pytest.fixture
def layout(tmp_path: Path) -> Iterator[Layout]:
    layout, lock = open_root(tmp_path / "root", private=True)
    Repos(layout).set_visibility(REPO, private=False, gated=False)
    yield layout
    os.close(lock)
    assert os.listdir(layout.tmp) == []


def test_all_of_it_is_there_after_a_restart(layout: Layout) -> None:
    repos = Repos(layout)
    before = time.time()
    for revision in ("main", "refs/pr/1", "v1.0 ä"):
        repos.set_ref(REPO, revision, COMMIT)
    repos.set_visibility(REPO, private=True, gated=False)
    repos.set_listing(REPO, LISTING)
    repos.set_digest(REPO, OID, DIGEST)
    repos.set_shown(REPO, TreeId("e" * 64), Selected(COMMIT, ("*.txt",), None, None))
    for again in (repos, Repos(layout)):
        assert {name: ref.commit for name, ref in again.refs(REPO).items()} == dict.fromkeys(("main", "refs/pr/1", "v1.0 ä"), COMMIT)
        ref = again.ref(REPO, "refs/pr/1")
        assert ref is not None and before <= ref.checked <= time.time() and 0 <= ref.age() < 60
        seen = again.visibility(REPO)
        assert seen is not None and seen.private and not seen.gated and not seen.is_public
        assert again.has_listing(REPO, COMMIT) and again.listing(REPO, COMMIT) == LISTING and again.commits(REPO) == [COMMIT]
        assert again.digest(REPO, SMALL) == DIGEST and again.digest(REPO, LARGE) == LARGE.sha256
        assert again.shown(REPO) == {TreeId("e" * 64): Selected(COMMIT, ("*.txt",), None, None)}
        assert [repo for repo, _ in again.known()] == [REPO]
    descriptor = repos.open_listing(REPO, COMMIT)
    with open(descriptor, "rb") as file:
        files = [["a b/ä.txt", 3, OID, None, None], ["big.bin", 1 << 40, "3" * 40, "4" * 64, "xet"]]
        assert json.load(file) == {"commit": COMMIT, "files": files}
        assert not os.get_inheritable(descriptor)


def test_nothing_is_known_of_others(layout: Layout) -> None:
    repos = Repos(layout)
    assert repos.ref(SAME_NAME, "main") is None and repos.refs(SAME_NAME) == {} and repos.visibility(SAME_NAME) is None
    assert repos.listing(SAME_NAME, COMMIT) is None and not repos.has_listing(SAME_NAME, COMMIT) and repos.commits(SAME_NAME) == []
    assert repos.shown(SAME_NAME) == {}
    repos.set_visibility(SAME_NAME, private=False, gated=True)
    repos.set_digest(REPO, OID, DIGEST)
    assert repos.digest(SAME_NAME, SMALL) is None  # a git id means something in its own repo only
    assert repos.content(REPO, SMALL) != repos.content(SAME_NAME, SMALL)
    assert repos.content(REPO, LARGE) == repos.content(SAME_NAME, LARGE) == ("sha256", "4" * 64, 1 << 40, "")
    assert sorted(repo for repo, _ in repos.known()) == [SAME_NAME, REPO]


@pytest.mark.parametrize("junk", JUNK)
def test_what_does_not_parse_is_not_known(layout: Layout, junk: bytes) -> None:
    repos = Repos(layout)
    repos.set_ref(REPO, "main", COMMIT)
    repos.set_ref(REPO, "other", COMMIT)
    repos.set_listing(REPO, LISTING)
    repos.set_shown(REPO, TreeId("e" * 64), Selected(COMMIT, None, None, None))
    for path in (
        layout.ref(REPO, "main"),
        layout.listing(REPO, COMMIT),
        layout.visibility(REPO),
        layout.shown(REPO, TreeId("e" * 64)),
        layout.oids(REPO),
    ):
        path.write_bytes(junk)
    repos = Repos(layout)
    assert repos.ref(REPO, "main") is None and [*repos.refs(REPO)] == ["other"]
    assert repos.listing(REPO, COMMIT) is None and repos.visibility(REPO) is None
    assert repos.shown(REPO) == {} and [*repos.known()] == []
    assert repos.digest(REPO, SMALL) is None
    repos.set_ref(REPO, "main", COMMIT)
    repos.set_listing(REPO, LISTING)
    repos = Repos(layout)
    assert repos.ref(REPO, "main") is not None and repos.listing(REPO, COMMIT) == LISTING


def test_a_listing_is_of_its_commit(layout: Layout) -> None:
    Repos(layout).set_listing(REPO, LISTING)
    os.rename(layout.listing(REPO, COMMIT), layout.listing(REPO, OTHER))
    assert Repos(layout).listing(REPO, OTHER) is None


def test_names_are_checked_again(layout: Layout) -> None:
    """Whatever wrote it, a listing never leads out of a view (I9)."""
    Repos(layout).set_listing(REPO, Listing(COMMIT, (ListedFile("../../etc/passwd", 1, OID),)))
    with pytest.raises(UnsafePath):
        Repos(layout).listing(REPO, COMMIT)


def test_an_answer_from_the_future_is_old(layout: Layout) -> None:
    """Some clock was wrong, and nobody knows which."""
    layout.ref(REPO, "main").parent.mkdir(parents=True)
    layout.ref(REPO, "main").write_text(json.dumps({"commit": COMMIT, "checked": time.time() + 3600}))
    ref = Repos(layout).ref(REPO, "main")
    assert ref is not None and ref.age() == float("inf")


def test_git_ids_in_a_log_that_was_cut_anywhere(layout: Layout) -> None:
    """What a line lost is asked again; no line is ever read as another."""
    repos = Repos(layout)
    known = {f"{number:040x}": Digest(f"{number:064x}") for number in range(1, 5)}
    for oid, digest in known.items():
        repos.set_digest(REPO, oid, digest)
        repos.set_digest(REPO, oid, digest)  # once is enough
    raw = layout.oids(REPO).read_bytes()
    line = len(raw) // 4
    assert raw.count(b"\n") == 4
    for cut in range(len(raw) + 1):
        layout.oids(REPO).write_bytes(raw[:cut])
        found = {oid: Repos(layout).digest(REPO, ListedFile("x", 1, oid)) for oid in known}
        whole = cut // line
        assert [*found.values()] == [*known.values()][:whole] + [None] * (4 - whole), cut
    forged = f"{OID} {DIGEST}".encode()
    layout.oids(REPO).write_bytes(b"%s %08x\n" % (forged, zlib.crc32(forged) ^ 1) + raw)
    assert Repos(layout).digest(REPO, SMALL) is None and Repos(layout).digest(REPO, ListedFile("x", 1, f"{1:040x}")) is not None


def test_a_line_after_a_torn_one_counts(layout: Layout) -> None:
    repos = Repos(layout)
    repos.set_digest(REPO, OID, DIGEST)
    os.truncate(layout.oids(REPO), 50)
    Repos(layout).set_digest(REPO, "5" * 40, DIGEST)
    assert Repos(layout).digest(REPO, ListedFile("x", 1, "5" * 40)) == DIGEST


def test_forget(layout: Layout) -> None:
    repos = Repos(layout)
    for repo in (REPO, SAME_NAME):
        repos.set_visibility(repo, private=False, gated=False)
        repos.set_ref(repo, "main", COMMIT)
        repos.set_ref(repo, "other", COMMIT)
        repos.set_listing(repo, LISTING)
        repos.set_digest(repo, OID, DIGEST)
        repos.set_shown(repo, TreeId("e" * 64), Selected(COMMIT, None, None, None))
    repos.forget(REPO, "main")
    repos.forget_shown(REPO, TreeId("e" * 64))
    for again in (repos, Repos(layout)):
        assert [*again.refs(REPO)] == ["other"] and again.ref(REPO, "main") is None
        assert again.shown(REPO) == {} and again.visibility(REPO) is not None
    repos.forget(REPO)
    for again in (repos, Repos(layout)):
        assert again.visibility(REPO) is None and again.refs(REPO) == {} and again.digest(REPO, SMALL) is None
        assert [*again.refs(SAME_NAME)] == ["main", "other"] and again.digest(SAME_NAME, SMALL) == DIGEST
        assert again.listing(SAME_NAME, COMMIT) == LISTING and len(again.shown(SAME_NAME)) == 1
    repos.forget(REPO)  # twice is once
