"""Paths: everything stays below the root, and no two things share a place."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote

from hypothesis import given
from hypothesis import strategies as st

from modelcached.errors import InvalidRequest
from modelcached.layout import PRIVATE_FOLDERS, PUBLIC_FOLDERS, Layout
from modelcached.model import Commit, Content, Digest, Repo, TreeId, check_repo, check_revision

ROOT = Path("/r")
LAYOUT = Layout(ROOT)
DIGEST, TREE, COMMIT = Digest("ab" + "0" * 62), TreeId("c" * 64), Commit("d" * 40)
REPO = Repo("https://hub.example:8443/hf", "dataset", "org/na.me")
FOLDER = ROOT / "repos/https+hub.example:8443%2Fhf/dataset--org--na.me"


def test_where_things_lie() -> None:
    """The folders are what a root's format is: changing one needs a new FORMAT_VERSION."""
    assert LAYOUT.blob(DIGEST) == ROOT / "blobs/sha256/ab" / DIGEST
    assert LAYOUT.blob(DIGEST, executable=True) == ROOT / "blobs/sha256/ab" / f"{DIGEST}.x"
    assert LAYOUT.partial(Content("sha256", DIGEST, 1)) == ROOT / "partial" / DIGEST
    assert LAYOUT.tree(TREE) == ROOT / "trees" / f"{TREE}.json"
    assert LAYOUT.view(TREE) == ROOT / "views" / TREE
    assert LAYOUT.partial(Content("object", DIGEST, 1)) == ROOT / "partial" / f"object-{DIGEST}"
    assert LAYOUT.legacy("s3://b", "k").parent == ROOT / "legacy" and LAYOUT.legacy("s3://b", "k") != LAYOUT.legacy("s3://b", "l")
    assert LAYOUT.lease_folder(TREE) == ROOT / "leases" / TREE
    assert LAYOUT.ref(REPO, "refs/pr/1") == FOLDER / "refs/refs%2Fpr%2F1"
    assert LAYOUT.listing(REPO, COMMIT) == FOLDER / f"{COMMIT}.json"
    assert LAYOUT.visibility(REPO) == FOLDER / "visibility.json"
    assert LAYOUT.shown(REPO, TREE) == FOLDER / "shown" / TREE
    assert len(set(LAYOUT.shards())) == 256 and LAYOUT.blob(DIGEST).parent in LAYOUT.shards()
    made = {ROOT / name for name in (*PRIVATE_FOLDERS, *PUBLIC_FOLDERS)}
    assert {LAYOUT.blobs, LAYOUT.partials, LAYOUT.trees, LAYOUT.views, LAYOUT.repos, LAYOUT.leases, LAYOUT.quarantine, LAYOUT.tmp} <= made


def test_a_git_id_means_something_in_one_repo_only() -> None:
    here, there = Content("git-sha1", COMMIT, 3, "one"), Content("git-sha1", COMMIT, 3, "two")
    assert len({LAYOUT.partial(here), LAYOUT.partial(there), LAYOUT.partial(Content("sha256", DIGEST, 3))}) == 3
    assert LAYOUT.partial(here).parent == LAYOUT.partials


IDS = st.from_regex(r"\A[aB_.\-]{1,4}(/[aB_.\-]{1,4})?\Z")
ENDPOINTS = st.sampled_from(["http://h", "https://h", "http://h:80", "http://h/a", "http://h:8%2F", "/tmp/x://h", "../../x://h"])
REPOS = st.builds(Repo, ENDPOINTS, st.sampled_from(["model", "space"]), IDS)


@given(REPOS, REPOS)
def test_no_two_repos_share_a_folder(one: Repo, other: Repo) -> None:
    try:
        check_repo(*one), check_repo(*other)
    except InvalidRequest:
        return
    assert (LAYOUT.repo(one) == LAYOUT.repo(other)) == (one == other)
    assert LAYOUT.repo(one).parent.parent == LAYOUT.repos


@given(st.text(max_size=80) | st.text("./%2Ff", max_size=6))
def test_a_revision_is_one_name(revision: str) -> None:
    try:
        check_revision(revision)
    except InvalidRequest:
        return
    path = LAYOUT.ref(REPO, revision)
    assert path.parent == FOLDER / "refs" and path.name not in ("", ".", "..") and len(path.name) <= 255
    assert unquote(path.name) == revision


def test_fresh_names_are_nobody_elses() -> None:
    names = {LAYOUT.fresh("view") for _ in range(1000)}
    assert len(names) == 1000 and {name.parent for name in names} == {LAYOUT.tmp}
