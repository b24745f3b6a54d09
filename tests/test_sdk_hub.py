"""snapshot_download, hf_hub_download and snapshot: huggingface_hub's signatures, and what a caller gets."""

from __future__ import annotations

import inspect
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.errors as their_errors
import pytest
from huggingface_hub.utils._validators import smoothly_deprecate_legacy_arguments, validate_repo_id

import modelcache
from modelcache import errors, names
from modelcache.client import shared
from modelcache.codes import ERROR_CODES

from .fake_daemon import COMMIT, FakeDaemon, Request
from .test_sdk_client import in_python
from .test_sdk_connection import run
from .test_sdk_files import mounted_with_reflinks

FILES = {"config.json": b"{}", "sub/a.bin": b"a" * 5000, "run.sh": b"#!/bin/sh\n"}


@pytest.fixture
def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDaemon]:
    for name in ("HF_ENDPOINT", "HF_HUB_OFFLINE", "HF_TOKEN", "MODELCACHE_LOADED"):
        monkeypatch.delenv(name, raising=False)
    with FakeDaemon(tmp_path) as daemon:
        daemon.repos = {"org/name": FILES, "name": {"a": b"a"}}
        monkeypatch.setenv("MODELCACHE_SOCKET", str(daemon.socket_path))
        monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "no-token"))
        yield daemon
        shared().close()
        shared().leases.close()


def contents(folder: str | Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


# ---- signatures


@pytest.mark.parametrize("name", ["snapshot_download", "hf_hub_download"])
def test_signatures_are_huggingface_hubs(name: str) -> None:
    theirs = inspect.signature(getattr(huggingface_hub, name)).parameters
    ours = inspect.signature(getattr(modelcache, name)).parameters
    assert [(each.name, each.kind, each.default) for each in ours.values()] == [
        (each.name, each.kind, each.default) for each in theirs.values()
    ]


def test_every_parameter_does_something_or_is_known_not_to(daemon: FakeDaemon, tmp_path: Path) -> None:
    """What each one changes in the request; those that change nothing are named here."""
    changes: dict[str, tuple[Any, dict[str, Any]]] = {
        "repo_type": ("dataset", {"repo_type": "dataset"}),
        "revision": ("v1", {"revision": "v1"}),
        "force_download": (True, {"force_download": True}),
        "token": ("t", {"token": "t"}),
        "local_files_only": (True, {"local_files_only": True}),
        "allow_patterns": ("*.json", {"allow_patterns": ["*.json"]}),
        "ignore_patterns": (("a", "b"), {"ignore_patterns": ["a", "b"]}),
        "headers": ({"Authorization": "Bearer h"}, {"token": "h"}),
        "endpoint": ("http://hub.example/", {"endpoint": "http://hub.example"}),
    }
    elsewhere = {"cache_dir", "local_dir", "tqdm_class", "dry_run"}  # tests of their own
    nothing = {
        "library_name": "x", "library_version": "1", "user_agent": {"a": "b"}, "etag_timeout": 1.0, "max_workers": 1,
    }  # fmt: skip
    assert {*changes, *elsewhere, *nothing, "repo_id"} == {*inspect.signature(huggingface_hub.snapshot_download).parameters}

    def asked(**keywords: Any) -> dict[str, Any]:
        modelcache.snapshot_download("org/name", **keywords)
        params = daemon.next_request().params
        params.pop("held", None)
        return params

    plain = asked()
    assert {**plain, "purpose": ""} == {"repo_id": "org/name", "purpose": ""}
    for name, (value, change) in changes.items():
        assert asked(**{name: value}) == {**plain, **change}, name
    assert asked(**nothing) == plain


def test_what_the_environment_says(daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://mirror.example/")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_TOKEN", "secret")
    modelcache.snapshot_download("org/name")
    params = daemon.next_request().params
    assert (params["endpoint"], params["local_files_only"], params["token"]) == ("http://mirror.example", True, "secret")


@pytest.mark.parametrize("argument", ["resume_download", "force_filename", "local_dir_use_symlinks", "proxies"])
def test_deprecated_spellings_warn_as_theirs_do(daemon: FakeDaemon, argument: str) -> None:
    keywords: dict[str, Any] = {argument: "x"}
    with pytest.warns(UserWarning, match=argument) as theirs:
        smoothly_deprecate_legacy_arguments("snapshot_download", keywords)
    with pytest.warns(UserWarning, match=argument) as ours:
        modelcache.snapshot_download("org/name", **keywords)
    assert str(ours[0].message).split(". ")[0] == str(theirs[0].message).split(". ")[0]
    assert ours[0].filename == __file__
    keywords[argument] = None
    modelcache.snapshot_download("org/name", **keywords)  # says nothing
    with pytest.raises(TypeError):
        modelcache.snapshot_download("org/name", another="x")  # type: ignore[call-arg]


def test_a_resolved_revision_means_its_commit(daemon: FakeDaemon) -> None:
    revision = huggingface_hub._revision.ResolvedRevision(COMMIT, initial="main")
    modelcache.snapshot_download("org/name", revision=revision)
    assert daemon.next_request().params["revision"] == COMMIT
    modelcache.hf_hub_download("org/name", "config.json", revision=None)
    assert "revision" not in daemon.next_request().params  # main


# ---- names

REPO_IDS = [
    *("gpt2", "org/name", "a.b-c_d/e.f", "123", "x" * 96, "x" * 97, "org/" + "y" * 97, "a_", "_a"),
    *("", "/", "a/", "/a", "a/b/c", "datasets/a/b", ".a", "a.", "-a", "a-", "a--b", "a..b", "org/a--b", "a.git", "org/name.git"),
    *("café", "a b", "a\n", "org/na\tme", "文件"),
]


@pytest.mark.parametrize("repo_id", [*REPO_IDS, Path("a/b"), 3])
def test_repo_ids_are_judged_as_theirs_are(repo_id: Any) -> None:
    verdicts = []
    for check in (validate_repo_id, names.check_repo_id):
        try:
            check(repo_id)
            verdicts.append("fine")
        except ValueError as error:
            verdicts.append(str(error))
    assert verdicts[0] == verdicts[1]


FILENAMES = [
    *("a", "a/b", "a//b", "a..b", "ä/🙂"),
    *("..", "a/../b", "a\\..\\b", "/etc/passwd", "//host/x", "C:/x", "a/C:x", "c:", "\\x", "a/\\x"),
]


@pytest.mark.parametrize("filename", FILENAMES)
def test_filenames_are_judged_as_theirs_are(filename: str) -> None:
    from huggingface_hub._local_folder import _validate_relative_filename

    verdicts = []
    for check in (_validate_relative_filename, lambda name: names.filename_of(name, None)):
        try:
            check(filename)
            verdicts.append("fine")
        except ValueError as error:
            verdicts.append(str(error).split(". ")[0].rstrip("."))
    assert verdicts[0] == verdicts[1]


def test_bad_arguments_ask_nobody(daemon: FakeDaemon) -> None:
    for kind in ("kernel", "models", ""):
        with pytest.raises(ValueError, match="Invalid repo type"):
            modelcache.snapshot_download("org/name", repo_type=kind)
    with pytest.raises(their_errors.HFValidationError):
        modelcache.snapshot_download("a--b")
    with pytest.raises(ValueError, match=r"'\.\.' path segment"):
        modelcache.hf_hub_download("org/name", "b", subfolder="..")
    assert daemon.connections == 0


# ---- what comes back


def test_a_shared_view(daemon: FakeDaemon) -> None:
    path = modelcache.snapshot_download("org/name")
    tree, view = daemon.show(FILES)
    assert path == str(view)
    assert contents(path) == FILES
    assert modelcache.snapshot_download("org/name", revision="main", repo_type="model") == path
    assert daemon.leases(tree) == 1
    assert modelcache.hf_hub_download("org/name", "a.bin", subfolder="sub").endswith("/sub/a.bin")
    assert daemon.leases(tree) == 1


def test_a_view_with_an_end(daemon: FakeDaemon) -> None:
    tree = daemon.show(FILES)[0]
    with modelcache.snapshot("org/name") as path:
        assert contents(path) == FILES
        assert daemon.leases(tree) == 1
        again = modelcache.snapshot("org/name")
    assert daemon.leases(tree) == 1
    assert os.fspath(again) == path
    assert again.commit == COMMIT
    again.close()
    again.close()
    assert daemon.leases(tree) == 0
    modelcache.snapshot_download("org/name")  # keeps it for good
    with modelcache.snapshot("org/name"):
        pass
    assert daemon.leases(tree) == 1


def test_local_dir(daemon: FakeDaemon, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    target = modelcache.snapshot_download("org/name", local_dir=tmp_path / "link" / "model")
    assert target == str(tmp_path / "real" / "model")  # the real path, as huggingface_hub returns it
    assert contents(target) == FILES
    (tmp_path / "real" / "model" / "config.json").write_bytes(b"mine")
    assert caplog.text == ""
    (tmp_path / "real" / "model" / "notes").touch()
    modelcache.snapshot_download("org/name", local_dir=target)
    assert contents(target) == {**FILES, "notes": b""}
    assert caplog.messages == [f"{target} also holds files that were there before; they stay: notes"]
    file = modelcache.hf_hub_download("org/name", "sub/a.bin", local_dir=str(tmp_path / "one"))
    assert contents(tmp_path / "one") == {"sub/a.bin": FILES["sub/a.bin"]}
    assert file == str(tmp_path / "one" / "sub" / "a.bin")
    assert daemon.leases(daemon.show(FILES)[0]) == 0  # private files need none


def test_dry_run(daemon: FakeDaemon, tmp_path: Path) -> None:
    plan = modelcache.snapshot_download("org/name", dry_run=True, allow_patterns="*.json", local_dir=tmp_path)
    fields = {"commit_hash": COMMIT, "file_size": 2, "filename": "config.json", "local_path": str(tmp_path / "config.json")}
    assert [each._asdict() for each in plan] == [{**fields, "is_cached": False, "will_download": True}]
    assert {field for each in plan for field in each._fields} == {*huggingface_hub.file_download.DryRunFileInfo.__dataclass_fields__}
    one = modelcache.hf_hub_download("org/name", "sub/a.bin", dry_run=True, cache_dir=tmp_path)
    assert one.local_path == str(tmp_path / "models--org--name" / "snapshots" / COMMIT / "sub" / "a.bin")
    assert {request.method for request in (daemon.next_request(), daemon.next_request())} == {"plan"}
    daemon.answers["plan"] = lambda request: request.error("local_entry_not_found", "not here")
    with pytest.raises(their_errors.DryRunError, match="not here"):
        modelcache.snapshot_download("org/name", dry_run=True, local_files_only=True)


def test_warnings_are_logged(daemon: FakeDaemon, caplog: pytest.LogCaptureFixture) -> None:
    def answer(request: Request) -> None:
        tree, view = daemon.show(FILES)
        reply = daemon.reply_for(tree, view, FILES, True)
        request.reply({**reply, "warnings": ["the hub is away"]}, [daemon.grant(tree)])

    daemon.answers["fetch"] = answer
    modelcache.snapshot_download("org/name", headers={"x-other": "1"})
    assert [(record.name, record.message) for record in caplog.records if "root can" not in record.message] == [
        ("modelcache", "headers other than `authorization` are not sent: the daemon asks the hub for everybody"),
        ("modelcache", "the hub is away"),
    ]


# ---- a container that sees something else


@pytest.mark.parametrize("spoil", ["path", "inode", "device"])
def test_a_view_that_is_not_visible(daemon: FakeDaemon, spoil: str) -> None:
    def answer(request: Request) -> None:
        tree, view = daemon.show(FILES)
        reply = daemon.reply_for(tree, view, FILES, True)
        reply[spoil] = "/nowhere/views/x" if spoil == "path" else reply[spoil] + 1
        request.reply(reply, [daemon.grant(tree)])

    daemon.answers["fetch"] = answer
    with pytest.raises(errors.ViewNotVisibleError) as caught:
        modelcache.snapshot_download("org/name")
    assert isinstance(caught.value, FileNotFoundError)
    assert f"the mount of {daemon.root} is missing" in str(caught.value)
    assert f"docker run -v {daemon.root}:{daemon.root}:ro" in caught.value.hint
    assert daemon.leases(daemon.show(FILES)[0]) == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
@pytest.mark.parametrize("closed", ["view", "root"])
def test_a_view_that_may_not_be_read(shared_tmp_path: Path, closed: str) -> None:
    code = """
import os
import modelcache.hub
from modelcache import client, hub_errors
client.shared().hello()
modelcache.snapshot_download  # loaded while this user may read the interpreter's files
os.setresuid(12345, 12345, 12345)
try:
    modelcache.snapshot_download("org/name", token=False)
except PermissionError as error:
    print(type(error).__name__, error)
"""
    with FakeDaemon(shared_tmp_path) as daemon:
        daemon.repos = {"org/name": FILES}
        view = daemon.show(FILES)[1]
        (view if closed == "view" else daemon.root).chmod(0o700)
        with in_python(daemon, code) as process:
            assert process.stdout is not None
            assert process.stdout.read().startswith(f"NotPermittedError uid 12345 may not read {view}\nhint: ")


# ---- private files


def test_modelcache_loaded_private(daemon: FakeDaemon, tmp_path: Path) -> None:
    code = """
import os, sys
import modelcache
path = modelcache.snapshot_download("org/name")
again = modelcache.snapshot_download("org/name")
open(os.path.join(path, "config.json"), "w").write("mine")
file = modelcache.hf_hub_download("org/name", "config.json")
with modelcache.snapshot("org/name") as other:
    own = other != path and open(os.path.join(other, "config.json")).read() == "{}"
print(path, again == path, open(file).read(), own, os.path.exists(other), oct(os.stat(path).st_mode & 0o777), flush=True)
if os.fork() == 0:
    sys.exit()  # runs what is registered for the exit; its parent still reads
os.wait()
print(sorted(os.listdir(path)), flush=True)
"""
    with in_python(daemon, code, MODELCACHE_LOADED="private", TMPDIR=str(tmp_path)) as process:
        assert process.stdout is not None
        path, *rest = process.stdout.readline().split()
        assert rest == ["True", "{}", "True", "False", "0o700"]
        assert path.startswith(f"{tmp_path}/modelcache-{process.pid}-")
        assert process.stdout.readline() == "['config.json', 'run.sh', 'sub']\n"
    assert process.returncode == 0
    assert list(tmp_path.glob("modelcache-*")) == []
    assert contents(daemon.show(FILES)[1]) == FILES
    assert daemon.leases(daemon.show(FILES)[0]) == 0


def test_modelcache_loaded_is_checked(daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELCACHE_LOADED", "privat")
    with pytest.raises(ValueError, match="'private' or 'shared'"):
        modelcache.snapshot_download("org/name")


@pytest.mark.skipif(os.geteuid() != 0, reason="what root gets")
def test_root_is_warned_once(daemon: FakeDaemon) -> None:
    code = """
import modelcache
for name in ("org/name", "name", "org/name"):
    print(modelcache.snapshot_download(name))
"""
    with in_python(daemon, f"import sys; sys.stderr = sys.stdout\n{code}", TMPDIR="/dev/shm") as process:  # has no reflinks
        assert process.stdout is not None
        said = process.stdout.read().splitlines()
    views = [str(daemon.show(files)[1]) for files in (FILES, {"a": b"a"}, FILES)]
    assert [line for line in said if not line.startswith("root can write")] == views
    assert len(said) == 4


@pytest.mark.skipif(os.geteuid() != 0, reason="what root gets")
def test_root_gets_files_that_share_blocks(tmp_path: Path) -> None:
    place = mounted_with_reflinks(tmp_path)
    code = """
import os, sys
sys.stderr = sys.stdout
import modelcache
path = modelcache.snapshot_download("org/name")
again = modelcache.snapshot_download("org/name")
open(os.path.join(path, "config.json"), "w").write("mine")
print(path, again == path)
"""
    try:
        with FakeDaemon(place) as daemon:
            daemon.repos = {"org/name": FILES}
            with in_python(daemon, code, TMPDIR=str(place)) as process:
                assert process.stdout is not None
                path, is_same = process.stdout.read().split()
            assert path.startswith(f"{place}/modelcache-{process.pid}-")
            assert is_same == "True"
            assert not os.path.exists(path)
            assert contents(daemon.show(FILES)[1]) == FILES
    finally:
        subprocess.run(["umount", place], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")
def test_root_is_not_warned_on_a_read_only_mount(daemon: FakeDaemon) -> None:
    view = daemon.show(FILES)[1]
    code = "import sys; sys.stderr = sys.stdout; import modelcache; print(modelcache.snapshot_download('org/name'))"
    mounted = f"mount --bind {daemon.root} {daemon.root} && mount -o remount,bind,ro {daemon.root}"
    ran = subprocess.run(
        ["unshare", "--mount", "sh", "-c", f'{mounted} && exec "$0" -c "$1"', sys.executable, code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(modelcache.__file__).parent.parent)},
    )
    assert (ran.stdout, ran.stderr) == (f"{view}\n", "")


# ---- errors


@pytest.mark.parametrize("name", [*sorted(ERROR_CODES)])
def test_every_error_of_the_wire(daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("MODELCACHE_CONNECT_SECONDS", "0")
    daemon.answers["fetch"] = lambda request: request.error(name, "no", "hint", path="/p")
    with pytest.raises(errors.ModelcacheError) as caught:
        modelcache.snapshot_download("org/name")
    error = caught.value
    assert (error.name, error.message, error.hint, error.data) == (name, "no", "hint", {"path": "/p"})
    assert str(error) == "no\nhint: hint"
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.message, copy.data) == (error.message, error.data)
    assert type(copy).__module__ == "modelcache.errors"


BUILTIN = {
    "repo_not_found": (their_errors.RepositoryNotFoundError, OSError),
    "gated_repo": (their_errors.GatedRepoError, their_errors.RepositoryNotFoundError, errors.RepositoryNotFoundError),
    "revision_not_found": (their_errors.RevisionNotFoundError, OSError),
    "entry_not_found": (their_errors.RemoteEntryNotFoundError, their_errors.EntryNotFoundError, errors.EntryNotFoundError),
    "local_entry_not_found": (their_errors.LocalEntryNotFoundError, FileNotFoundError, errors.EntryNotFoundError),
    "incomplete_snapshot": (their_errors.IncompleteSnapshotError, errors.LocalEntryNotFoundError),
    "hub_unavailable": (their_errors.LocalEntryNotFoundError, ConnectionError, FileNotFoundError),
    "token_refused": (their_errors.HfHubHTTPError, OSError),
    "unsafe_path": (ValueError,),
    "endpoint_not_allowed": (ValueError,),
    "no_space": (OSError,),
    "not_permitted": (PermissionError,),
}


@pytest.mark.parametrize("name", BUILTIN)
def test_errors_are_caught_by_code_for_huggingface_hub(daemon: FakeDaemon, name: str) -> None:
    daemon.answers["fetch"] = lambda request: request.error(name, path="/p")
    with pytest.raises(errors.ModelcacheError) as caught:
        modelcache.snapshot_download("org/name")
    assert all(isinstance(caught.value, kind) for kind in BUILTIN[name])
    assert caught.value.data == {"path": "/p"}
    if name == "incomplete_snapshot":
        assert caught.value.snapshot_path == "/p"  # type: ignore[attr-defined]


def test_without_huggingface_hub_errors_are_plain(daemon: FakeDaemon) -> None:
    code = """
import sys
import modelcache
try:
    modelcache.snapshot_download("org/none")
except OSError as error:
    print(type(error) is modelcache.errors.RepositoryNotFoundError, any(name.startswith("huggingface_hub") for name in sys.modules))
"""
    with in_python(daemon, code) as process:
        assert process.stdout is not None
        assert process.stdout.read() == "True False\n"


# ---- the package


def test_import_is_light() -> None:
    code = "import sys; before = set(sys.modules); import modelcache; print(sorted(set(sys.modules) - before), modelcache.__version__)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == f"['modelcache'] {modelcache.__version__}\n"


def test_a_warm_call_loads_little(daemon: FakeDaemon) -> None:
    code = """
import json, sys
before = set(sys.modules)
import modelcache
modelcache.snapshot_download("org/name")
print(json.dumps(sorted(set(sys.modules) - before)))
"""
    with in_python(daemon, code) as process:
        assert process.stdout is not None
        loaded = set(json.loads(process.stdout.read()))
    heavy = {"asyncio", "dataclasses", "inspect", "logging", "pathlib", "random", "selectors", "socket", "subprocess", "tempfile", "urllib"}
    if os.geteuid() == 0:
        heavy.discard("logging")  # root is warned
    assert loaded & heavy == set()


def test_lazy_names() -> None:
    assert set(modelcache.__all__) <= set(dir(modelcache))
    for name in modelcache.__all__:
        assert getattr(modelcache, name) is not None
    with pytest.raises(AttributeError):
        modelcache.nothing  # noqa: B018


def test_many_threads_at_once(daemon: FakeDaemon) -> None:
    waiting = [run(partial(modelcache.hf_hub_download, "org/name", sorted(FILES)[n % 3])) for n in range(30)]
    assert {Path(result()).name for result in waiting} == {"config.json", "a.bin", "run.sh"}
    assert daemon.connections == 1
