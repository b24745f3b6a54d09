"""The table: what lies on the hub, what is asked for, what must come back.

Invariant: every case says itself what must come out, so that a client is held against the table and against the real huggingface_hub, and
neither against itself. `publish` puts the repos on a fresh hub; `CASES` only read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .content import Random
from .handle import Hub

TOKEN = "hf_accepted"  # by the private and the gated repos
STRANGER = "hf_stranger"  # known to the hub, accepted by no repo
UNKNOWN = "hf_unknown"

Tree = Mapping[str, bytes | Random]

WEIGHTS = Random("weights", (3 << 20) + 17)

FIRST: Tree = {
    ".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n",
    "README.md": b"# A model\n",
    "config.json": b'{"hidden_size": 8}',
    "model.safetensors": WEIGHTS,
    "old.txt": b"gone on main",
}
MAIN: Tree = {
    **{path: content for path, content in FIRST.items() if path != "old.txt"},
    "config.json": b'{"hidden_size": 16}',
    "tokenizer/vocab.txt": b"a\nb\n",
    "tokenizer/merges.txt": b"",
    "tokenizer/deep/er/special.json": b"[]",
    "weights/part-1.bin": Random("part 1", 70_000),
    "weights/part-2.bin": b"",
    "notes.md": Random("notes", 200_000),
}
DEV: Tree = {**MAIN, "config.json": b'{"hidden_size": 32}'}
PULL: Tree = {**MAIN, "pull.txt": b"a suggestion"}
DATA: Tree = {"README.md": b"# A dataset\n", "data/train.csv": b"a,b\n1,2\n", "data/train.bin": Random("train", 1 << 20)}
SPACE: Tree = {"README.md": b"# A space\n", "app.py": b"print('hello')\n"}
FORK: Tree = {"config.json": b"{}", "model.safetensors": WEIGHTS}  # shares the large file with FIRST and MAIN
NAMES: Tree = {
    path: path.encode()
    for path in (
        "with space.txt",
        " leading and trailing ",
        "hash#tag.json",
        "percent%41 %.txt",
        "question?x=1.txt",
        "plus+plus.txt",
        "semi;colon&and=.txt",
        "quote'and\"quote.txt",
        "brackets[1].txt",
        "star*.txt",
        "tilde~at@colon:.txt",
        "back\\slash.txt",
        "...",
        "..dots",
        ".hidden/.file",
        "größe/模型 🤗.txt",
        "größe/large ü#.bin",
        "cafe\u0301.txt",
        "caf\u00e9.txt",
        "UPPER.txt",
        "upper.txt",
        "a/tree/main/b.txt",
        "a/resolve/main/b.txt",
        "refs/pr/1",
        "x" * 200 + ".txt",
    )
}
SMALL: Tree = {"config.json": b"{}"}


def publish(hub: Hub) -> dict[str, str]:
    """Puts everything on the hub; returns the commits that cases name in braces."""
    commits = {"first": hub.commit("org/model", FIRST, message="first")}
    hub.tag("org/model", "v1.0")
    commits["main"] = hub.commit("org/model", {**MAIN, "old.txt": None}, message="second")
    commits["dev"] = hub.commit("org/model", {"config.json": DEV["config.json"]}, branch="feature/dev")
    commits["pull"] = hub.commit("org/model", {"pull.txt": PULL["pull.txt"]}, branch="refs/pr/1")
    commits["short"] = commits["first"][:10]
    hub.commit("org/model", DATA, repo_type="dataset")
    hub.commit("org/model", SPACE, repo_type="space")
    hub.commit("alone", SMALL)
    hub.commit("org/fork", FORK)
    hub.commit("org/names", NAMES)
    hub.commit("org/private", FORK, private=True, tokens=[TOKEN])
    hub.commit("org/gated", FORK, gated=True, tokens=[TOKEN])
    hub.commit("org/gone", SMALL)
    hub.delete("org/gone")
    hub.commit("org/older-name", SMALL)
    hub.rename("org/older-name", "org/newer-name")
    hub.add_token(STRANGER)
    return commits


@dataclass(frozen=True)
class Case:
    """One call and what must come of it: `files`, or `error` (a class of huggingface_hub)."""

    name: str
    arguments: dict[str, Any]
    files: Tree | None = None
    error: str | None = None
    call: str = "snapshot_download"
    more: dict[str, Any] = field(default_factory=dict)  # arguments that differ from case to case

    def filled(self, commits: Mapping[str, str]) -> dict[str, Any]:
        """The arguments, with "{main}" replaced by that commit."""
        made = {**self.arguments, **self.more}
        if isinstance(made.get("revision"), str):
            made["revision"] = made["revision"].format(**commits)
        return {"token": False, **made}

    @property
    def hashes(self) -> dict[str, str] | None:
        return None if self.files is None else hashes(self.files)


def hashes(tree: Tree) -> dict[str, str]:
    return {path: hashlib.sha256(bytes(content)).hexdigest() for path, content in tree.items()}


def only(tree: Tree, *paths: str) -> Tree:
    return {path: tree[path] for path in paths}


def _snapshot(name: str, repo_id: str, files: Tree | None = None, error: str | None = None, **more: Any) -> Case:
    return Case(name, {"repo_id": repo_id}, files, error, "snapshot_download", more)


def _file(name: str, repo_id: str, filename: str, files: Tree | None = None, error: str | None = None, **more: Any) -> Case:
    return Case(name, {"repo_id": repo_id, "filename": filename}, files, error, "hf_hub_download", more)


CASES = [
    _snapshot("the whole repo", "org/model", MAIN),
    _snapshot("no organisation", "alone", SMALL),
    _snapshot("another repo that shares a file", "org/fork", FORK),
    _snapshot("branch", "org/model", MAIN, revision="main"),
    _snapshot("branch with a slash", "org/model", DEV, revision="feature/dev"),
    _snapshot("tag", "org/model", FIRST, revision="v1.0"),
    _snapshot("full commit", "org/model", FIRST, revision="{first}"),
    _snapshot("short commit", "org/model", FIRST, revision="{short}"),
    _snapshot("pull request", "org/model", PULL, revision="refs/pr/1"),
    _snapshot("dataset of the same name", "org/model", DATA, repo_type="dataset"),
    _snapshot("space of the same name", "org/model", SPACE, repo_type="space"),
    _snapshot("type None is a model", "org/model", MAIN, repo_type=None),
    _snapshot("hard names", "org/names", NAMES),
    _snapshot("renamed repo", "org/older-name", SMALL),
    _snapshot("one pattern", "org/model", only(MAIN, "config.json", "tokenizer/deep/er/special.json"), allow_patterns="*.json"),
    _snapshot("several patterns", "org/model", only(MAIN, "README.md", "config.json", "notes.md"), allow_patterns=["*.md", "config.*"]),
    _snapshot("folder pattern", "org/model", only(MAIN, "weights/part-1.bin", "weights/part-2.bin"), allow_patterns="weights/"),
    _snapshot(
        "a star passes slashes",
        "org/model",
        only(MAIN, "tokenizer/vocab.txt", "tokenizer/merges.txt", "tokenizer/deep/er/special.json"),
        allow_patterns="tok*",
    ),
    _snapshot("question mark and set", "org/model", only(MAIN, "weights/part-1.bin"), allow_patterns="weights/part-[13].b?n"),
    _snapshot(
        "ignored patterns",
        "org/model",
        only(MAIN, ".gitattributes", "README.md", "config.json", "notes.md"),
        ignore_patterns=["tokenizer/*", "*.bin", "*.safetensors"],
    ),
    _snapshot("allowed and ignored", "org/model", only(MAIN, "README.md"), allow_patterns="*.md", ignore_patterns="notes*"),
    _snapshot("patterns know case", "org/names", only(NAMES, "UPPER.txt"), allow_patterns="UP*"),
    _snapshot("patterns that match nothing", "org/model", {}, allow_patterns="*.onnx"),
    _snapshot("no patterns at all", "org/model", {}, allow_patterns=[]),
    _snapshot("private with its token", "org/private", FORK, token=TOKEN),
    _snapshot("private without a token", "org/private", error="RepositoryNotFoundError"),
    _snapshot("private with a stranger's token", "org/private", error="RepositoryNotFoundError", token=STRANGER),
    _snapshot("private with an unknown token", "org/private", error="HfHubHTTPError", token=UNKNOWN),
    _snapshot("gated with its token", "org/gated", FORK, token=TOKEN),
    _snapshot("gated without a token", "org/gated", error="GatedRepoError"),
    _snapshot("gated with a stranger's token", "org/gated", error="GatedRepoError", token=STRANGER),
    _snapshot("public with a stranger's token", "org/model", MAIN, token=STRANGER),
    _snapshot("public with an unknown token", "org/model", error="HfHubHTTPError", token=UNKNOWN),
    _snapshot("missing repo", "org/missing", error="RepositoryNotFoundError"),
    _snapshot("missing repo with a token", "org/missing", error="RepositoryNotFoundError", token=STRANGER),
    _snapshot("deleted repo", "org/gone", error="RepositoryNotFoundError"),
    _snapshot("a model asked for as a dataset", "org/fork", error="RepositoryNotFoundError", repo_type="dataset"),
    _snapshot("missing revision", "org/model", error="RevisionNotFoundError", revision="nowhere"),
    _snapshot("missing commit", "org/model", error="RevisionNotFoundError", revision="0" * 40),
    _snapshot("malformed repo id", "org/model/more", error="HFValidationError"),
    _snapshot("unknown type", "org/model", error="ValueError", repo_type="thing"),
    _snapshot("only what is here, and nothing is", "org/model", error="LocalEntryNotFoundError", local_files_only=True),
    _file("small file", "org/model", "config.json", only(MAIN, "config.json")),
    _file("large file", "org/model", "model.safetensors", only(MAIN, "model.safetensors")),
    _file("empty file", "org/model", "tokenizer/merges.txt", only(MAIN, "tokenizer/merges.txt")),
    _file("empty large file", "org/model", "weights/part-2.bin", only(MAIN, "weights/part-2.bin")),
    _file("file in a subfolder", "org/model", "vocab.txt", only(MAIN, "tokenizer/vocab.txt"), subfolder="tokenizer"),
    _file("file of a tag", "org/model", "old.txt", only(FIRST, "old.txt"), revision="v1.0"),
    _file("file of a pull request", "org/model", "pull.txt", only(PULL, "pull.txt"), revision="refs/pr/1"),
    _file("file of a dataset", "org/model", "data/train.bin", only(DATA, "data/train.bin"), repo_type="dataset"),
    _file("file of a renamed repo", "org/older-name", "config.json", SMALL),
    _file("file with a hard name", "org/names", "größe/large ü#.bin", only(NAMES, "größe/large ü#.bin")),
    _file("file of a private repo", "org/private", "model.safetensors", only(FORK, "model.safetensors"), token=TOKEN),
    _file("missing file", "org/model", "nothing.txt", error="RemoteEntryNotFoundError"),
    _file("a file that only another revision has", "org/model", "old.txt", error="RemoteEntryNotFoundError"),
    _file("a folder is no file", "org/model", "tokenizer", error="RemoteEntryNotFoundError"),
    _file("file of a missing revision", "org/model", "config.json", error="RevisionNotFoundError", revision="nowhere"),
    _file("file of a missing repo", "org/missing", "config.json", error="RepositoryNotFoundError"),
    _file("file of a private repo without a token", "org/private", "config.json", error="RepositoryNotFoundError"),
    _file("file of a gated repo without a token", "org/gated", "config.json", error="GatedRepoError"),
    _file("file of a gated repo with a stranger's token", "org/gated", "config.json", error="GatedRepoError", token=STRANGER),
    _file("file with an unknown token", "org/model", "config.json", error="HfHubHTTPError", token=UNKNOWN),
]
