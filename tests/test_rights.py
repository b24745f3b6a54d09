"""Who may see what (I8): the daemon, A and B are three uids, none of them root, and B knows every path, digest and key.

Whatever B asks of the daemon, about what is A's: it is told what it is told of things that do not exist.
Whatever B tries on the disk fails.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from .clients import Client, Tree, hashes
from .conftest import as_uid
from .daemon import Daemon
from .hub import Hub, Random
from .hub.oracle import Outcome
from .saves import fill, key_of, until

pytestmark = pytest.mark.timeout(120)

MIB = 1 << 20
DAEMON, A, B = 1500, 1001, 1002
ACCEPTED, STRANGER = "hf_of_a", "hf_of_b"
SECRET: Tree = {".gitattributes": b"same everywhere\n", "config.json": b'{"secret": 1}', "model.safetensors": Random("secret", 2 * MIB)}
PUBLIC: Tree = {".gitattributes": b"same everywhere\n", "readme.md": b"for everybody"}
NOWHERE, NO_COMMIT, NO_TREE = "org/zzzzzz", hashlib.sha1(b"none").hexdigest(), hashlib.sha256(b"none").hexdigest()
NO_KEY, NO_PATH = key_of("none"), "/nonexistent/views/" + NO_TREE


@pytest.fixture(scope="module")
def the_hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    with Hub.start(tmp_path_factory.mktemp("rights")) as hub:
        hub.add_token(STRANGER)
        hub.commit("org/secret", SECRET, private=True, tokens=[ACCEPTED])
        hub.commit("org/public", PUBLIC)
        hub.commit("org/of-b", {**PUBLIC, "of-b": b"b"}, private=True, tokens=[STRANGER])
        yield hub


@pytest.fixture
def node(hub: Hub, shared_tmp_path: Path) -> Iterator[Daemon]:
    as_uid(DAEMON)  # or skip
    (shared_tmp_path / "store").touch()  # in the way: what is saved stays on this node until a test removes it
    store = f"file://{shared_tmp_path}/store"
    os.chmod(shared_tmp_path, 0o777)
    with Daemon.start(shared_tmp_path / "root", hub, uid=DAEMON, store=store, min_free="0", hub_attempts=1, fresh_seconds=0) as daemon:
        yield daemon


@pytest.fixture
def a(node: Daemon) -> Iterator[Client]:
    with Client.of(node, uid=A) as task:
        yield task


@pytest.fixture
def b(node: Daemon) -> Iterator[Client]:
    with Client.of(node, uid=B) as task:
        yield task


class Known(NamedTuple):
    """All that B knows of what A has."""

    commit: str
    tree: str
    saved_tree: str
    key: str
    path: str  # of the repo's view
    paths: list[Path]  # everything below the root


@pytest.fixture
def known(node: Daemon, a: Client, shared_tmp_path: Path) -> Known:
    fetched = a.fetch("org/secret", token=ACCEPTED)
    a.begin("wire", method="pin", params={"name": "of-a", "repo_id": "org/secret"})
    a.good()
    source = fill(shared_tmp_path / "out", {"weights": os.urandom(300_000), "run.sh": b"#!/bin/sh\necho ran\n"})
    (source / "run.sh").chmod(0o755)
    a.begin("save", path=str(source))
    key = a.good().value["key"]
    a.begin("wire", method="load", params={"key": key})
    loaded = a.good().value
    paths = [node.root, *sorted(node.root.rglob("*"))]
    assert {path.suffix for path in paths} >= {".json", ".x"} and len(paths) > 300
    return Known(fetched["commit"], fetched["tree"], loaded["tree"], key, fetched["path"], paths)


# ---- what B is told


def said(outcome: Outcome, *names: str) -> tuple[Any, ...]:
    """An outcome without the names that B itself has sent."""
    text = json.dumps([outcome.message, outcome.value], sort_keys=True)
    for name in sorted(filter(None, names), key=len, reverse=True):
        text = text.replace(name, "?")
        if "/" not in name:
            text = text.replace(name[:12], "?")  # of a digest, errors show the beginning
    return outcome.error, text.replace(ACCEPTED, "")


def asks(known: Known) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """A call, what it asks of A's, and the same of what does not exist."""
    found: list[tuple[str, dict[str, Any], dict[str, Any]]] = []
    for token in (False, STRANGER):
        for more in ({}, {"local_files_only": True}, {"allow_patterns": "*.json"}, {"dry_run": True}, {"force_download": True}):
            for of_secret, of_nothing in (("main", "main"), (known.commit, NO_COMMIT), ("other", "other")):
                how = {"token": token, **more}
                found.append(
                    (
                        "snapshot_download",
                        {"repo_id": "org/secret", "revision": of_secret, **how},
                        {"repo_id": NOWHERE, "revision": of_nothing, **how},
                    )
                )
        for name in ("config.json", "none"):
            how = {"token": token, "filename": name}
            found.append(("hf_hub_download", {"repo_id": "org/secret", **how}, {"repo_id": NOWHERE, **how}))
    reference = {"key": NO_KEY, "type": "model"}
    wire: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        ("fetch", {"repo_id": "org/secret", "held": [known.tree]}, {"repo_id": NOWHERE, "held": [NO_TREE]}),
        ("plan", {"repo_id": "org/secret", "revision": known.commit}, {"repo_id": NOWHERE, "revision": NO_COMMIT}),
        ("save_tree", {"reference": reference, "tree": known.tree}, {"reference": reference, "tree": NO_TREE}),
        ("save_tree", {"reference": reference, "tree": known.saved_tree}, {"reference": reference, "tree": NO_TREE}),
        ("load", {"key": known.key}, {"key": NO_KEY}),
        ("load", {"key": known.key, "held": [known.saved_tree]}, {"key": NO_KEY}),
        ("delete", {"key": known.key}, {"key": NO_KEY}),
        ("flush", {"keys": [known.key], "deadline_seconds": 0}, {"keys": [NO_KEY], "deadline_seconds": 0}),
        ("references", {"prefix": known.key}, {"prefix": NO_KEY}),
        ("ls", {"repo_id": "org/secret"}, {"repo_id": NOWHERE}),
        ("rm", {"repo_id": "org/secret"}, {"repo_id": NOWHERE}),
        ("verify", {"repo_id": "org/secret"}, {"repo_id": NOWHERE}),
        ("explain", {"repo_id": "org/secret"}, {"repo_id": NOWHERE}),
        ("explain", {"repo_id": "org/secret", "revision": known.commit}, {"repo_id": NOWHERE, "revision": NO_COMMIT}),
        ("explain", {"key": known.key}, {"key": NO_KEY}),
        *(("explain", {"path": path}, {"path": none}) for path, none in ((known.path, NO_PATH), (f"{known.path}/config.json", NO_PATH))),
        ("pin", {"repo_id": "org/secret"}, {"repo_id": NOWHERE}),
        ("pin", {"key": known.key}, {"key": NO_KEY}),
        ("unpin", {"name": "of-a"}, {"name": "of-nobody"}),
        ("pins", {}, {}),
    ]
    for method, secret, nothing in wire:
        found.append(("wire", {"method": method, "params": secret}, {"method": method, "params": nothing}))
    return found


def tell_apart(task: Client, known: Known) -> list[str]:
    """What B can tell from its answers; nothing, as it should be."""
    told = []
    names = ["org/secret", NOWHERE, known.commit, NO_COMMIT, known.key, NO_KEY, known.tree, known.saved_tree, NO_TREE]
    names += [f"{known.path}/config.json", known.path, NO_PATH, "of-a", "of-nobody"]
    for call, secret, nothing in asks(known):
        of_secret, of_nothing = said(task.call(call, **secret), *names), said(task.call(call, **nothing), *names)
        if of_secret != of_nothing:
            told.append(f"{call} {secret}:\n    {of_secret}\n    {of_nothing}")
    return told


def test_nothing_can_be_told_apart(hub: Hub, node: Daemon, b: Client, known: Known) -> None:
    assert not tell_apart(b, known), "\n".join(tell_apart(b, known))
    assert b.ask("ls")["repos"] == []
    hub.misbehave("down")
    assert not tell_apart(b, known), "\n".join(tell_apart(b, known))
    node.restart()
    assert not tell_apart(b, known), "\n".join(tell_apart(b, known))
    hub.calm()
    assert not tell_apart(b, known), "\n".join(tell_apart(b, known))


def test_the_test_can_tell(b: Client, known: Known) -> None:
    """With A's token B is a caller like A: then the answers differ."""
    names = ("org/secret", NOWHERE)
    of_secret = said(b.call("snapshot_download", repo_id="org/secret", token=ACCEPTED), *names)
    assert of_secret != said(b.call("snapshot_download", repo_id=NOWHERE, token=ACCEPTED), *names)
    assert b.ask("ls")["repos"][0]["repo_id"] == "org/secret"
    assert any("save_tree" in told for told in tell_apart(b, known))


def test_a_running_flight_is_not_joined(hub: Hub, node: Daemon, a: Client, b: Client) -> None:
    """B asks while A's bytes come in, and gets nothing of them; nor does B's asking disturb A."""
    hub.misbehave("slow", rate=MIB)
    a.begin("fetch", repo_id="org/secret", token=ACCEPTED)
    a.progress(lambda progress: progress["phase"] == "download" and progress["done_bytes"] > 0)
    (listing,) = node.root.glob("repos/*/model--org--secret/" + "?" * 40 + ".json")
    commit = listing.stem
    for token in (False, STRANGER):
        for revision, none in (("main", "main"), (commit, NO_COMMIT)):
            of_secret = b.refused("snapshot_download", repo_id="org/secret", token=token, revision=revision)
            of_nothing = b.refused("snapshot_download", repo_id=NOWHERE, token=token, revision=none)
            assert said(of_secret, "org/secret", commit) == said(of_nothing, NOWHERE, NO_COMMIT)
    hub.calm()
    assert a.call("hashes", folder=str(a.good().path)).files == hashes(SECRET)


def test_a_tree_that_looks_the_same_tells_nothing(node: Daemon, a: Client, b: Client) -> None:
    """Both have a private repo, and files of both that are alike: one view, which both may enter. What else the other has stays unknown."""
    mine = a.fetch("org/secret", token=ACCEPTED, allow_patterns=[".gitattributes"])
    a.fetch("org/secret", token=ACCEPTED)
    theirs = b.fetch("org/of-b", token=STRANGER, allow_patterns=[".gitattributes"])
    assert mine["tree"] == theirs["tree"]
    assert [entry["repo_id"] for entry in b.ask("ls")["repos"]] == ["org/of-b"]
    told, nothing = (b.refused("wire", method="explain", params={"repo_id": repo}) for repo in ("org/secret", NOWHERE))
    assert said(told, "org/secret") == said(nothing, NOWHERE)
    b.begin("wire", method="explain", params={"path": theirs["path"]})
    assert "org/secret" not in json.dumps(b.good().value)
    assert {entry["repo_id"] for entry in a.ask("ls")["repos"]} == {"org/secret"} and len(a.ask("ls")["repos"]) == 2
    node.restart()
    assert [entry["repo_id"] for entry in b.ask("ls")["repos"]] == ["org/of-b"]


# ---- saves


def elsewhere(task: Client) -> list[str]:
    """The keys of saves that it is told somebody brings."""
    task.begin("wire", method="references", params={})
    return [record["key"] for record in task.good().value["elsewhere"]]


def test_a_save_is_its_owners_until_the_store_has_it(node: Daemon, a: Client, b: Client, known: Known, shared_tmp_path: Path) -> None:
    with Client.of(node, uid=B) as other:
        assert other.refused("load", reference=known.key).error == other.refused("load", reference=NO_KEY).error
    (shared_tmp_path / "store").unlink()
    (shared_tmp_path / "store").mkdir()
    os.chown(shared_tmp_path / "store", DAEMON, DAEMON)
    (shared_tmp_path / "store" / "trees").touch()  # in the way: references can be read, and this save can't be sent
    until((shared_tmp_path / "store" / "refs" / f"{known.key}.pending").exists)  # other nodes are told that it is on its way
    of_save, of_nothing = b.refused("load", reference=known.key), b.refused("load", reference=NO_KEY)
    assert of_save.is_error("ReferenceNotFoundError") and said(of_save, known.key) == said(of_nothing, NO_KEY)
    assert b.refused("wire", method="delete", params={"key": known.key}).is_error("ReferenceNotFoundError")
    assert elsewhere(b) == []
    with Client.of(node) as root:
        assert elsewhere(root) == [known.key], "the test can tell"
    a.begin("load", reference=known.key, hashes=True)
    mine = a.good().files
    (shared_tmp_path / "store" / "trees").unlink()
    a.begin("flush", deadline=60)
    a.good()
    b.begin("load", reference=known.key, hashes=True)  # the store is one trust domain
    assert b.good().files == mine


def test_a_key_is_no_way_to_hand_somebody_bytes(a: Client, b: Client, known: Known) -> None:
    """B saves under A's key. On this node A goes on getting what A saved."""
    b.begin("wire", method="save_open", params={"reference": {"key": known.key, "type": "model"}, "files": 0, "size_bytes": 0})
    save = b.good().value["save"]
    b.begin("wire", method="save_close", params={"save": save, "folders": ["empty"]})
    b.good()
    a.begin("load", reference=known.key, hashes=True)
    assert set(a.good().files or ()) == {"weights", "run.sh"}
    b.begin("wire", method="load", params={"key": known.key})
    assert b.good().value["files"] == 0


def test_open_saves_belong_to_who_opened_them(a: Client, b: Client) -> None:
    a.begin("wire", method="save_open", params={"reference": {"key": NO_KEY, "type": "model"}, "files": 0, "size_bytes": 0})
    save = a.good().value["save"]
    for method in ("save_links", "save_close"):
        theirs, nothing = (b.refused("wire", method=method, params={"save": name}) for name in (save, "20250101T000000-000000000000"))
        assert said(theirs, save) == said(nothing, "20250101T000000-000000000000")
    a.begin("wire", method="save_close", params={"save": save})
    a.good()


def test_what_one_user_may_have_waiting(node: Daemon, a: Client, b: Client, shared_tmp_path: Path) -> None:
    source = fill(shared_tmp_path / "out", {"weights": os.urandom(700_000)})

    def save(task: Client) -> Outcome:
        return task.call("save", path=str(source))

    node.restart(max_spool_per_user="1MiB")
    assert save(a).error is None
    for _ in range(2):
        refused = save(a)
        assert refused.is_error("NoSpaceError") and f"uid {A} may have" in refused.message and "max_spool_per_user" in refused.message
        assert refused.value["needed_bytes"] == 700_000 and refused.value["free_bytes"] == MIB - 700_000
        node.restart()  # it counts what a predecessor kept
    assert save(b).error is None
    shown = a.fetch("org/secret", token=ACCEPTED)["tree"]  # larger than the rest, and takes nothing: it is here already
    a.begin("wire", method="save_tree", params={"reference": {"key": NO_KEY, "type": "model"}, "tree": shown})
    a.good()
    node.restart()
    opened = [a.call("wire", method="save_open", params={"reference": {"key": NO_KEY, "type": "model"}, "files": 1, "size_bytes": size})
              for size in (200_000, 200_000)]  # fmt: skip
    assert opened[0].error is None and opened[1].is_error("NoSpaceError")
    a.begin("wire", method="save_close", params={"save": opened[0].value["save"], "drop": True})
    a.good()
    (shared_tmp_path / "store").unlink()
    (shared_tmp_path / "store").mkdir()
    os.chown(shared_tmp_path / "store", DAEMON, DAEMON)
    a.begin("flush", deadline=60)
    a.good()
    assert save(a).error is None
    a.begin("flush", deadline=60)
    a.good()


# ---- what B can do on the disk

TRY = """
import errno, json, os, sys
own, paths = sys.argv[1], json.load(sys.stdin)
done = []
def attempt(what, path, work):
    try:
        work(path)
        done.append([what, path])
    except OSError as error:
        if error.errno in (errno.ENOEXEC,):
            done.append([what, path])
def execute(path):
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        try:
            os.execv(path, [path])
        except OSError as error:
            os._exit(1 if error.errno != errno.ENOEXEC else 0)
    if os.waitpid(child, 0)[1]:
        raise OSError(errno.EACCES, path)
for number, path in enumerate(paths):
    attempt("open", path, lambda path: os.close(os.open(path, os.O_RDONLY | (os.O_DIRECTORY if os.path.isdir(path) else 0))))
    attempt("list", path, os.listdir)
    attempt("write", path, lambda path: os.close(os.open(path, os.O_WRONLY)))
    attempt("create", path, lambda path: os.close(os.open(path + "/of-b", os.O_WRONLY | os.O_CREAT)))
    attempt("link", path, lambda path: os.link(path, f"{own}/{number}"))
    attempt("stat inside", path, lambda path: os.stat(path + "/."))
    attempt("remove", path, lambda path: (os.rmdir if os.path.isdir(path) else os.unlink)(path))
    attempt("rename", path, lambda path: os.rename(path, f"{own}/renamed-{number}"))
    attempt("chmod", path, lambda path: os.chmod(path, 0o777))
    if path.endswith((".x", "run.sh")):
        attempt("exec", path, execute)
print(json.dumps(done))
"""


def can_do(uid: int, own: Path, paths: list[Path]) -> set[tuple[str, Path]]:
    """What a process of that uid manages to do with these paths; it has a folder of its own beside them."""
    own.mkdir(exist_ok=True)
    os.chown(own, uid, uid)
    command, told = [*as_uid(uid), sys.executable, "-c", TRY, str(own)], json.dumps(list(map(str, paths)))
    ran = subprocess.run(command, input=told, capture_output=True, text=True, cwd="/")
    assert ran.returncode == 0, ran.stderr
    return {(what, Path(path)) for what, path in json.loads(ran.stdout)}


def test_nothing_can_be_done_on_the_disk(node: Daemon, a: Client, b: Client, known: Known, shared_tmp_path: Path) -> None:
    public = Path(b.fetch("org/public")["path"])
    through = Path(f"/proc/{a.pid}/root"), Path(f"/proc/{node.pid}/root"), Path(f"/proc/{node.pid}/cwd"), Path(f"/proc/{a.pid}/fd")
    roundabout = [path / str(each)[1:] for path in through[:3] for each in known.paths]
    done = can_do(B, shared_tmp_path / "own", [*known.paths, public, public / "readme.md", *through, *roundabout])
    root, views = node.root, node.root / "views"
    harmless = {("open", root), ("list", root), ("stat inside", root), ("stat inside", views), ("open", root / "VERSION")}
    readable = {("open", public), ("list", public), ("stat inside", public), ("open", public / "readme.md")}
    assert readable <= done, "the test can tell"
    assert done - readable - harmless == set()
    assert all(path.exists() for path in known.paths)
    mine = can_do(A, shared_tmp_path / "of-a", [node.root / "views" / known.saved_tree / "run.sh", node.root / "views" / known.tree])
    assert {what for what, _ in mine} == {"open", "exec", "list", "stat inside"}


def test_a_store_below_the_root_is_closed_too(hub: Hub, shared_tmp_path: Path) -> None:
    """A daemon that was given no store keeps one below its root: what lies there is had through the daemon, or not at all."""
    as_uid(DAEMON)  # or skip
    with Daemon.start(shared_tmp_path / "root", hub, uid=DAEMON, min_free="0") as daemon, Client.of(daemon, uid=A) as a:
        source = fill(shared_tmp_path / "out", {"weights": b"secret"})
        a.begin("save", path=str(source))
        a.good()
        a.begin("flush", deadline=60)
        a.good()
        inside = [daemon.root / "store", *(daemon.root / "store").rglob("*")]
        assert any(path.suffix == ".json" for path in inside)
        assert can_do(B, shared_tmp_path / "own", inside) == set()


# ---- repos that close


def test_a_repo_that_was_closed_does_not_stay_open_by_commit(hub: Hub, node: Daemon, a: Client, b: Client) -> None:
    """It is asked for by commit only, which is never looked up. But now and then the daemon asks whether it is public still."""
    node.restart(fresh_seconds=3600)
    hub.commit("org/closing", PUBLIC, private=False)
    commit = a.fetch("org/closing")["commit"]
    hub.access("org/closing", private=True, tokens=[ACCEPTED])
    assert b.fetch("org/closing", revision=commit)["commit"] == commit  # the hub said "public" within the last hour
    (kept,) = node.root.glob("repos/*/model--org--closing/visibility.json")
    kept.write_text(json.dumps({**json.loads(kept.read_text()), "checked": 1_000_000_000.0}))
    node.restart()
    asked = {"repo_id": "org/closing", "revision": commit}
    assert b.fetch(**asked)["commit"] == commit, "it is asked behind the caller's back"
    until(lambda: b.call("fetch", **asked).error is not None)
    refused = b.refused("snapshot_download", **asked, token=False)
    assert refused.is_error("RepositoryNotFoundError")
    assert a.fetch(**asked, token=ACCEPTED)["commit"] == commit
