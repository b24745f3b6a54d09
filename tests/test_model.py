"""Names: a tree has one spelling and one id; what comes from outside is refused by name (I9)."""

from __future__ import annotations

import hashlib
import random
import re

import msgspec
import pytest
from huggingface_hub.utils._validators import validate_repo_id
from hypothesis import given
from hypothesis import strategies as st

from modelcached.errors import InvalidRequest, UnsafePath
from modelcached.model import Digest, Tree, TreeFile, TreeId, check_paths, check_repo, check_revision, decode_tree, is_commit, is_digest

A, B = Digest("a" * 64), Digest("b" * 64)
TREE = Tree((TreeFile("sub/ä b.bin", 3, B, True), TreeFile("config.json", 0, A)), links=(("last", "sub/ä b.bin"),), folders=("empty",))
ENCODED = (
    f'{{"files":[["config.json",0,"{A}",false],["sub/ä b.bin",3,"{B}",true]],"folders":["empty"],"links":[["last","sub/ä b.bin"]]}}'
).encode()


def test_a_tree_has_one_spelling() -> None:
    """Nodes compare ids, and roots outlive versions: this vector must never change."""
    assert TREE.encode() == ENCODED
    assert TREE.tree_id() == "2f36ec7578b6fdd4a35b20d553cfedc13abc0ecadebac28f576de510d4610237"
    assert Tree(()).tree_id() == "0d2c44f34be0904d79311564be524f493de1ef6100bf07f895fdf582968842c0"
    assert TREE.size == 3


NAMES = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=8)
FILES = st.lists(
    st.builds(
        TreeFile,
        st.lists(NAMES, min_size=1, max_size=3).map("/".join),
        st.integers(0, 1 << 50),
        st.binary(min_size=32, max_size=32).map(lambda raw: Digest(raw.hex())),
        st.booleans(),
    ),
    max_size=6,
    unique_by=lambda file: file.path,
)


@given(FILES, st.randoms(use_true_random=False))
def test_a_tree_is_its_files_in_any_order(files: list[TreeFile], chance: random.Random) -> None:
    mixed = list(files)
    chance.shuffle(mixed)
    name = Tree(tuple(files)).tree_id()
    assert Tree(tuple(mixed)).tree_id() == name
    changed = [TreeFile(file.path, file.size, file.sha256, not file.executable) for file in files[:1]] + files[1:]
    assert not files or Tree(tuple(changed)).tree_id() != name
    try:
        check_paths([file.path for file in files], "repo")
    except UnsafePath:
        return
    assert set(decode_tree(Tree(tuple(mixed)).encode(), name).files) == set(files)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{}",
        b"[1]",
        b'{"files":[],"folders":[],"links":[],"more":1}',
        b'{"files":[["a",1]],"folders":[],"links":[]}',
        b'{"files":[],"folders":[],"links":[]',
    ],
)
def test_what_is_no_tree(raw: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        decode_tree(raw, TreeId(hashlib.sha256(raw).hexdigest()))
    with pytest.raises(ValueError, match="not the tree"):
        decode_tree(ENCODED, TreeId(hashlib.sha256(raw).hexdigest()))


@pytest.mark.parametrize(
    ("paths", "problem"),
    [
        ([""], "is empty"),
        (["/etc/passwd"], "is absolute"),
        (["//a"], "is absolute"),
        ([".."], "normalised"),
        (["../a"], "normalised"),
        (["a/../../b"], "normalised"),
        (["a/.."], "normalised"),
        (["./a"], "normalised"),
        (["a/./b"], "normalised"),
        (["a//b"], "normalised"),
        (["a/"], "normalised"),
        (["a\0b"], "NUL"),
        (["\0"], "NUL"),
        (["a\udc80"], "not UTF-8"),
        (["\ud800/b"], "not UTF-8"),
        (["x" * 256], "too long"),
        (["ä" * 128], "too long"),
        (["/".join(["x" * 200] * 16)], "too long"),
        (["a", "a"], "two entries"),
        (["a/b", "c", "a/b"], "two entries"),
        (["a", "a/b"], "lies in 'a', which is a file"),
        (["a/b/c", "a"], "two entries"),
        (["a/b", "a/b/c/d"], "lies in 'a/b', which is a file"),
    ],
)
def test_hostile_names(paths: list[str], problem: str) -> None:
    with pytest.raises(UnsafePath, match=problem) as caught:
        check_paths(["fine.txt", *paths], "org/name")
    assert "org/name" in caught.value.message
    assert caught.value.hint
    msgspec.json.encode([caught.value.message, caught.value.data])  # whatever the name was, the caller can be told


@pytest.mark.parametrize(
    "paths",
    [
        ["a b", "ä/ö", "...", "a..b", "..a/b..", "-rf", "~", "a\\b", "a\nb", "$(id)", "con", "a:b"],
        ["x" * 255, "ä" * 127, "/".join(["x" * 200] * 15)],
        ["a/b", "a/c", "a/d/e", "A/b", "b"],
    ],
)
def test_odd_names_that_are_fine(paths: list[str]) -> None:
    check_paths(paths, "org/name")


SOUND_IDS = ["gpt2", "org/name", "a", "_a/b_", "Org-1/na.me_2", "a_/b", "a/b.gitt", "x" * 96, "o/" + "x" * 94]
ODD_IDS = [
    *("", "/", "a/", "/a", "a/b/c", "-a", "a-", ".a", "a.", "a/.b", "a-/b", "a./b", "a/b-", "a/b.", "a--b", "a/b--c", "a..b"),
    *("a/b.git", "a.git"),
    *("ä/b", "a b", "a\n", "a/b\n", "a\0b", "../b", "a/..", "..", ".", "x" * 97, "o/" + "x" * 95, "a%2Fb", "a:b", "datasets/a/b"),
]


@pytest.mark.parametrize("repo_id", SOUND_IDS)
def test_repo_ids(repo_id: str) -> None:
    assert check_repo("https://hub", "dataset", repo_id) == ("https://hub", "dataset", repo_id)
    validate_repo_id(repo_id)


@pytest.mark.parametrize("repo_id", ODD_IDS)
def test_no_repo_ids(repo_id: str) -> None:
    with pytest.raises(InvalidRequest, match="no repo id"):
        check_repo("https://hub", "model", repo_id)


@given(st.from_regex(re.compile(r"[ab_.\-/\n]{0,12}")) | st.text(max_size=100))
def test_what_we_take_the_hub_takes(repo_id: str) -> None:
    """Else huggingface_hub would refuse it in the middle of a fetch."""
    try:
        check_repo("https://hub", "model", repo_id)
    except InvalidRequest:
        return
    validate_repo_id(repo_id)


def test_repo_types() -> None:
    with pytest.raises(InvalidRequest, match="unknown repo type 'models'") as caught:
        check_repo("https://hub", "models", "gpt2")
    assert caught.value.hint == "one of model, dataset, space"
    assert str(check_repo("e", "model", "a/b")) == "a/b"
    assert str(check_repo("e", "space", "a/b")) == "spaces/a/b"


@pytest.mark.parametrize("revision", ["main", "refs/pr/1", "v1.0", "a/b c", "ä", "0" * 40, "x" * 255, "..a"])
def test_revisions(revision: str) -> None:
    assert check_revision(revision) == revision


@pytest.mark.parametrize("revision", ["", ".", "..", "a\0", "a\n", "\x7f", "\x85", "a\udc80", "x" * 256, "ä" * 100, "a/" * 100])
def test_no_revisions(revision: str) -> None:
    with pytest.raises(InvalidRequest, match="is no revision"):
        check_revision(revision)


def test_ids_are_exact() -> None:
    assert is_digest("0" * 64) and is_commit("f" * 40)
    for odd in ("", "0" * 63, "0" * 65, "F" * 64, "0" * 63 + "\n", "0" * 64 + "\n", "g" * 64):
        assert not is_digest(odd)
    for odd in ("0" * 39, "F" * 40, "0" * 40 + "\n", "main"):
        assert not is_commit(odd)
