"""`modelcache save | load | flush`, `ls --store`, `rm --store`, the spool in `status`: real processes, a real daemon, a real store."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import select
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from .conftest import as_uid
from .daemon import Daemon, clean_environment
from .proxy import Proxy
from .seaweed import WRITER, SeaweedFS
from .test_cli import DEADLINE_SECONDS, run, started
from .test_docs import documented_fields

LARGE = os.urandom(700_000)  # travels as a descriptor, and is a blob of its own
UNKNOWN = "mf.models/models/artifacts/unknown_0123"


class World(NamedTuple):
    daemon: Daemon
    folder: Path
    source: Path  # five files, a link, an empty folder
    store: str
    other: str  # a store that requests may name

    @property
    def environment(self) -> dict[str, str]:
        return environment_of(self.daemon, self.folder)

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        return run(self.environment, *words)

    def json(self, *words: str) -> Any:
        return json.loads(self.run("--json", *words).stdout)

    def save(self, *words: str) -> str:
        ran = self.run("save", str(self.source), *words)
        assert ran.returncode == 0, ran.stderr
        return ran.stdout.strip()


def environment_of(daemon: Daemon, home: Path, **more: str) -> dict[str, str]:
    return clean_environment(HOME=str(home), MODELCACHE_SOCKET=daemon.socket, **more)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("save")
    source, store, other = folder / "out", f"file://{folder}/store", f"file://{folder}/other"
    fill(source)
    with Daemon.start(folder / "root", store=store, stores=[other]) as daemon:
        yield World(daemon, folder, source, store, other)


class Away(NamedTuple):
    """A daemon whose store is not there until it comes back."""

    daemon: Daemon
    obstacle: Path  # a file where the store's folder should be

    def come_back(self) -> None:
        self.obstacle.unlink()


@pytest.fixture
def away(tmp_path: Path) -> Iterator[Away]:
    obstacle = tmp_path / "away"
    obstacle.touch()
    with Daemon.start(tmp_path / "root", store=f"file://{obstacle}/store") as daemon:
        yield Away(daemon, obstacle)


def fill(folder: Path) -> None:
    (folder / "sub" / "empty").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "weights.bin").write_bytes(LARGE)
    (folder / "zero").touch()
    (folder / "sub" / "größe").write_text("x")
    (folder / "sub" / "run.sh").write_text("#!/bin/sh\n")
    (folder / "sub" / "run.sh").chmod(0o755)
    (folder / "link").symlink_to("sub/run.sh")


def contents(folder: Path) -> dict[str, Any]:
    """Everything in a folder, as a save keeps it."""
    found: dict[str, Any] = {}
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = "-> " + os.readlink(path)
        elif path.is_dir():
            found[name] = "folder"
        else:
            found[name] = path.read_bytes(), bool(path.stat().st_mode & stat.S_IXUSR)
    return found


def object_of(url: str) -> Path:
    return Path(url.removeprefix("file://"))


# ---- save and load


def test_save_prints_the_key_and_load_the_path(world: World) -> None:
    saved = world.run("save", str(world.source))
    assert saved.returncode == 0, saved.stderr
    key = saved.stdout.removesuffix("\n")
    assert key.startswith("mf.models/models/artifacts/out_")
    assert saved.stderr.startswith(f"saved {world.source}: 5 files, 700.0 kB in ") and saved.stderr.endswith(
        f"its store is {world.store}\n"
    )

    loaded = world.run("load", key)
    assert loaded.returncode == 0, loaded.stderr
    path = Path(loaded.stdout.removesuffix("\n"))
    assert contents(path) == contents(world.source)
    assert loaded.stderr.startswith(f"{key}: 5 files, 700.0 kB in ") and loaded.stderr.endswith(" 0 B from the store\n")


@pytest.mark.parametrize(
    ("words", "fields"),
    [
        (["--label", "a.b", "--metadata", '{"loss": NaN, "step": 7}'], {"type": "model", "label": "a.b", "storage_format": "files"}),
        (["--kind", "checkpoint", "--name", "run.7", "--supersede"], {"type": "checkpoint", "name": "run.7", "storage_format": "files"}),
        (["--kind", "checkpoint", "--format", "tar", "--durable"], {"type": "checkpoint", "name": "mfchckpt", "storage_format": "tar"}),
    ],
)
def test_json_is_the_whole_reference(world: World, words: list[str], fields: dict[str, str]) -> None:
    said = json.loads(world.run("save", str(world.source), "--json", *words).stdout, parse_constant=_no_constant)
    assert fields.items() <= said.items()
    assert said["files"] == 5 and said["store"] == world.store
    padding = said["size"] - len(LARGE) - 13
    assert padding == 0 if said["storage_format"] == "files" else 0 < padding < 10_000, "a tar is larger than its files"
    assert "loss" not in said["metadata"] or said["metadata"] == {"loss": {"$float": "nan"}, "step": 7}
    assert set(said) <= documented_fields(), "docs/api.md has a row for each"
    loaded = world.json("load", said["key"])
    assert loaded["reference"] == said and contents(Path(loaded["path"])) == contents(world.source)


def _no_constant(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


def test_one_file_is_saved_under_its_own_name(world: World) -> None:
    path = Path(world.run("load", world.run("save", str(world.source / "weights.bin")).stdout.strip()).stdout.strip())
    assert contents(path) == {"weights.bin": (LARGE, False)}


def test_what_is_saved_is_no_longer_the_paths_business(world: World, tmp_path: Path) -> None:
    source = tmp_path / "mine"
    fill(source)
    before = contents(source)
    key = world.run("save", str(source)).stdout.strip()
    for path in (source / "weights.bin", source / "config.json"):
        path.write_text("changed")
    assert contents(Path(world.run("load", key).stdout.strip())) == before


def test_load_to_a_folder_gives_private_files(world: World, tmp_path: Path) -> None:
    key, target = world.save(), tmp_path / "deep" / "mine"
    ran = world.run("load", key, "--to", str(target))
    assert ran.stdout == f"{target}\n" and contents(target) == contents(world.source), ran.stderr
    (target / "config.json").write_text("mine")
    (target / "notes.txt").write_text("mine too")
    again = world.run("load", key, "--to", str(target))
    assert again.returncode == 0 and "notes.txt" in again.stderr
    assert (target / "config.json").read_text() == "{}" and (target / "notes.txt").read_text() == "mine too"
    assert world.json("load", key, "--to", str(target))["is_private"]
    (tmp_path / "file").touch()
    refused = world.run("load", key, "--to", str(tmp_path / "file" / "below"))
    assert refused.returncode == 1 and "file: not a folder" in refused.stderr


@pytest.mark.parametrize("storage_format", ["files", "tar"])
def test_another_node_loads_it_by_key_or_url(world: World, tmp_path: Path, storage_format: str) -> None:
    ran = world.run("save", str(world.source), "--json", "--flush", "--format", storage_format)
    reference = json.loads(ran.stdout)
    assert "\nin the store after another " in ran.stderr and object_of(reference["url"]).exists()
    with Daemon.start(tmp_path / "root", stores=[world.store]) as daemon:
        environment = environment_of(daemon, tmp_path)
        loaded = json.loads(run(environment, "load", reference["url"], "--json").stdout)
        assert loaded["store_bytes"] >= len(LARGE) and contents(Path(loaded["path"])) == contents(world.source)
        assert run(environment, "load", reference["key"], "--store", world.store).stdout.strip() == loaded["path"]
        assert run(environment, "load", reference["key"]).returncode == 3, "its own store is another one"


def test_an_empty_folder_is_saved_with_a_warning(world: World, tmp_path: Path) -> None:
    ran = world.run("save", str(tmp_path))
    assert ran.returncode == 0 and f"warning: {tmp_path} is empty" in ran.stderr
    assert contents(Path(world.run("load", ran.stdout.strip()).stdout.strip())) == {}


def test_links_that_lead_out_can_be_followed(world: World, tmp_path: Path) -> None:
    (tmp_path / "weights").symlink_to(world.source / "weights.bin")
    ran = world.run("save", str(tmp_path))
    assert ran.returncode == 1 and "'weights' is a link that leads out" in ran.stderr and "--follow-links" in ran.stderr
    key = world.run("save", str(tmp_path), "--follow-links").stdout.strip()
    assert contents(Path(world.run("load", key).stdout.strip())) == {"weights": (LARGE, False)}


def test_the_socket_may_be_named_and_words_left_away(world: World) -> None:
    wrong = {**world.environment, "MODELCACHE_SOCKET": "/nowhere"}
    ran = run(wrong, "save", "--quiet", str(world.source), "--socket", world.daemon.socket, "--flush")
    assert (ran.returncode, ran.stderr) == (0, "") and run(wrong, "-q", "--socket", world.daemon.socket, "load", ran.stdout.strip()).stdout
    assert run(wrong, "flush", "-q", "--socket", world.daemon.socket).returncode == 0


# ---- the store


def test_ls_and_rm_in_the_store(world: World) -> None:
    words = ("--store", world.other)
    assert world.run("ls", *words).stderr == "nothing was saved yet\n" and world.json("ls", *words) == {"references": []}
    model = world.save("--label", "first", *words)
    checkpoints = [world.save("--kind", "checkpoint", "--name", "run", *words) for _ in range(2)]
    assert world.run("flush").stderr == "everything is in the store\n"

    listed = world.run("ls", *words).stdout.splitlines()
    assert listed[0].split() == ["CREATED", "SIZE", "STATE", "KEY"]
    assert [line.split()[-2:] for line in listed[1:]] == [["stored", key] for key in (*checkpoints[::-1], model)], "the newest first"

    def keys(*more: str) -> list[str]:
        return [entry["key"] for entry in world.json("ls", *words, *more)["references"]]

    assert keys("--kind", "model") == keys("--name", "first") == keys("mf.models/") == keys(model) == [model]
    assert keys("--kind", "checkpoint", "--name", "run") == checkpoints[::-1] and keys("--name", "second") == []
    (entry,) = world.json("ls", model, *words)["references"]
    assert entry["state"] == "stored" and entry["size"] == len(LARGE) + 13 and set(entry) - {"state"} <= documented_fields()

    assert world.run("rm", "--store", entry["url"]).stderr == f"removed {model}: nobody can load it any more\n"
    assert world.run("load", model, *words).returncode == world.run("rm", *words, model).returncode == 3
    assert world.json("rm", checkpoints[0], *words) == {"removed": checkpoints[0]} and keys() == checkpoints[1:]
    assert world.run("ls", *words, "mf.models/").stderr == "nothing that was saved matches\n"


def test_without_an_url_it_is_the_daemons_own_store(world: World) -> None:
    key = world.save("--label", "own", "--flush")
    for words in (["--store", key], [key, "--store"], ["--store", world.store, key]):
        assert key in world.run("ls", *words).stdout
    assert world.run("ls", "--store", world.other).stdout.count(key) == 0
    assert world.run("rm", "--store", key).returncode == 0 and world.run("rm", key, "--store").returncode == 3


def test_a_store_that_is_away(away: Away, world: World) -> None:
    environment = environment_of(away.daemon, world.folder)
    saved = run(environment, "save", str(world.source))
    key = saved.stdout.strip()
    assert saved.returncode == 0 and saved.stderr.startswith("saved "), "a save does not need the store"
    assert contents(Path(run(environment, "load", key).stdout.strip())) == contents(world.source)
    listed = run(environment, "ls", "--store")  # half a list would be a wrong one
    assert (listed.returncode, listed.stdout) == (3, "") and "a part of this path is a file" in listed.stderr
    early = run(environment, "rm", "--store", key)
    assert early.returncode == 1 and "still on its way" in early.stderr and "modelcache flush" in early.stderr

    late = run(environment, "flush", "--deadline", "100ms")
    assert (late.returncode, late.stdout) == (9, f"{key}\n")
    assert "error: 1 save is not in the store yet: " in late.stderr and "hint: safe on this node" in late.stderr
    said = run(environment, "flush", "--json", "--deadline", "0")
    assert said.returncode == 9 and json.loads(said.stdout)["pending"] == [key] and away.obstacle.name in json.loads(said.stdout)["error"]
    status = run(environment, "status").stdout
    assert "\nspool       1 save, 700.0 kB, the oldest for " in status and f"\nlast error  {key}: " in status

    away.come_back()
    assert run(environment, "flush").stderr == "everything is in the store\n"
    status = run(environment, "status").stdout
    assert "\nspool       empty\n" in status and "\nto store    70" in status and " in 1 save so far\n" in status
    assert "last error" not in status
    assert json.loads(run(environment, "ls", "--store", "--json").stdout)["references"][0]["state"] == "stored"


def test_what_is_on_its_way_is_listed_as_pending(away: Away, world: World) -> None:
    environment = environment_of(away.daemon, world.folder)
    away.come_back()
    in_the_way = away.obstacle / "store" / "refs"
    in_the_way.parent.mkdir(parents=True)
    in_the_way.touch()
    key = run(environment, "save", str(world.source)).stdout.strip()
    assert run(environment, "ls", "--store").stdout.splitlines()[1].split()[-2:] == ["pending", key]
    in_the_way.unlink()
    assert run(environment, "flush").returncode == 0
    assert run(environment, "ls", "--store").stdout.splitlines()[1].split()[-2:] == ["stored", key]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_key_is_out_before_the_waiting(away: Away, world: World, number: signal.Signals, code: int) -> None:
    environment = environment_of(away.daemon, world.folder)
    with started(environment, "save", str(world.source), "--flush") as saving:
        assert saving.stdout is not None
        key = saving.stdout.readline().strip()
        saving.send_signal(number)
        out, words = saving.communicate(timeout=DEADLINE_SECONDS)
    assert (saving.returncode, out) == (code, "") and "Traceback" not in words, words
    assert run(environment, "load", key).returncode == 0


def test_flush_shows_what_is_left(away: Away, world: World) -> None:
    environment = environment_of(away.daemon, world.folder)
    run(environment, "save", str(world.source))
    seen = on_terminal(environment, "flush", until="0 of 1 saves", then=away.come_back)
    assert "flush 0 %  0 B of 700.0 kB  0 of 1 saves  upload: " in seen, seen
    assert seen.splitlines()[-1].endswith("everything is in the store"), seen


def test_status_names_saves_that_cant_be_read(tmp_path: Path) -> None:
    with Daemon.start(tmp_path / "root") as daemon:
        assert "spool       empty" in run(environment_of(daemon, tmp_path), "status").stdout
        broken = tmp_path / "root" / "spool" / "20250101T000000-0123456789ab"
        broken.mkdir()
        daemon.restart()
        ran = run(environment_of(daemon, tmp_path), "status")
        assert f"unreadable  1 save in spool/corrupt: {broken.name}\n" in ran.stdout and ran.returncode == 0
        said = json.loads(run(environment_of(daemon, tmp_path), "status", "--json").stdout)
        assert said["spool"]["corrupt"] == [broken.name] and said["store"] == f"file://{tmp_path}/root/store"


def test_a_daemon_of_ones_own_has_stored_it_at_the_end(tmp_path: Path, world: World) -> None:
    if os.path.exists("/run/modelcached/modelcached.sock"):
        pytest.skip("a daemon of this node runs")
    (tmp_path / "runtime").mkdir(mode=0o700)
    environment = clean_environment(HOME=str(tmp_path), XDG_RUNTIME_DIR=str(tmp_path / "runtime"), XDG_DATA_HOME=str(tmp_path))
    ran = run(environment, "save", str(world.source), "--json")
    try:
        assert ran.returncode == 0 and object_of(json.loads(ran.stdout)["url"]).exists(), ran.stderr
    finally:
        _end(json.loads(run(environment, "status", "--json").stdout)["pid"])


# ---- mistakes


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["save"], 2, "arguments are required: PATH"),
        (["save", "/nowhere/at.all"], 3, "/nowhere/at.all: not there"),
        (["save", ""], 3, "'': not there"),
        (["save", "/dev/null"], 1, "'null' is a device"),
        (["save", "SOURCE", "--kind", "thing"], 2, "invalid choice: 'thing'"),
        (["save", "SOURCE", "--format", "zip"], 2, "invalid choice: 'zip'"),
        (["save", "SOURCE", "--name", "run"], 2, "only a checkpoint has a name"),
        (["save", "SOURCE", "--kind", "checkpoint", "--label", "x"], 2, "only a model has a label"),
        (["save", "SOURCE", "--label", "a/b"], 2, "a label can't contain '/'"),
        (["save", "SOURCE", "--label", ""], 2, "a label can't be empty"),
        (["save", "SOURCE", "--metadata", "loss=1"], 2, "--metadata is not JSON"),
        (["save", "SOURCE", "--metadata", "[1]"], 2, "--metadata is a JSON object"),
        (["save", "SOURCE", "--store", "file:///not/allowed"], 2, "does not serve the store file:///not/allowed"),
        (["save", "SOURCE", "--store", "s3://bucket/prefix"], 2, "does not serve the store s3://bucket/prefix"),
        (["save", "SOURCE", "--store", "gs://bucket"], 2, "gs:// is not supported yet"),
        (["save", "SOURCE", "--store", "s3://key:secret@bucket"], 2, "has more"),
        (["save", "SOURCE", "--store", "here"], 2, "a store is named by an URL"),
        (["save", "SOURCE", "--socket", "/nowhere/at.all"], 5, "no daemon listens at /nowhere/at.all (--socket)"),
        (["load"], 2, "arguments are required: KEY"),
        (["load", "my-model"], 2, "'my-model' is not the key of a model or checkpoint"),
        (["load", "https://huggingface.co/org/name"], 2, "is not the URL of a model or checkpoint"),
        (["load", UNKNOWN], 3, f"no save has the key {UNKNOWN}"),
        (["load", f"file:///not/allowed/refs/{UNKNOWN}.json"], 2, "does not serve the store file:///not/allowed"),
        (["load", UNKNOWN, "--socket", "/nowhere/at.all"], 5, "no daemon listens at /nowhere/at.all (--socket)"),
        (["ls", "--store", "../up"], 2, "'refs/../up'"),
        (["ls", "--store", "here", "there"], 2, "here is no store"),
        (["ls", "--kind", "model"], 2, "--kind and --name are about what was saved"),
        (["rm"], 2, "which repo is to be removed is not said"),
        (["rm", "--store"], 2, "which save is to be removed is not said"),
        (["rm", "--store", "OTHER"], 2, "is not the URL of a model or checkpoint"),
        (["rm", "--store", UNKNOWN], 3, f"no save has the key {UNKNOWN}"),
        (["flush", "--deadline", "soon"], 2, "'soon' is not a duration"),
        (["flush", "--deadline", "-1s"], 2, "--deadline"),
        (["flush", "--socket", "/nowhere/at.all"], 5, "no daemon listens at /nowhere/at.all (--socket)"),
    ],
)
def test_a_mistake_has_a_code_a_message_and_a_hint(world: World, words: list[str], code: int, said: str) -> None:
    ran = world.run(*({"SOURCE": str(world.source), "OTHER": world.other}.get(word, word) for word in words))
    assert (ran.returncode, ran.stdout) == (code, ""), ran.stderr
    error, hint = ran.stderr.splitlines()[-2:]
    assert said in error and error.startswith("modelcache") and not error.endswith(".") and "secret" not in ran.stderr, ran.stderr
    assert hint.startswith("hint: ") and not hint.endswith("."), ran.stderr


def test_what_cant_be_saved_is_named_before_any_byte_moves(world: World, tmp_path: Path) -> None:
    (tmp_path / "fine.bin").write_bytes(LARGE)
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("/etc/passwd")
    os.close(os.open(os.fsencode(tmp_path) + b"/\xff", os.O_CREAT))
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "sock"))
        before = world.daemon.status()["served"]
        ran = world.run("save", str(tmp_path), "--json")
        assert world.daemon.status()["served"] - before <= 4, "nobody but our own questions for the status"
    said = json.loads(ran.stdout)["error"]
    assert said["name"] == "not_saveable" and said["exit_code"] == ran.returncode == 1 and said["hint"] in ran.stderr
    for what in ("'fifo' is a FIFO", "'link' is a link that leads out of it", "'sock' is a socket", r"'\xff' has a name that is not UTF-8"):
        assert what in said["message"]


def test_another_user_saves_what_it_may_read(world: World, shared_tmp_path: Path) -> None:
    prefix = as_uid(12345)
    (shared_tmp_path / "out").mkdir()
    (shared_tmp_path / "out" / "theirs").write_text("x")
    closed = shared_tmp_path / "out" / "mine"
    closed.write_text("secret")
    closed.chmod(0o600)
    with Daemon.start(shared_tmp_path / "root", uid=23456) as daemon:

        def other(*words: str) -> subprocess.CompletedProcess[str]:
            command = [*prefix, sys.executable, "-m", "modelcache", *words]
            environment = clean_environment(HOME="/nowhere", MODELCACHE_SOCKET=daemon.socket)
            return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=DEADLINE_SECONDS)

        refused = other("save", str(shared_tmp_path / "out"))
        assert refused.returncode == 4 and "uid 12345 may not read 'mine'" in refused.stderr and "hint: " in refused.stderr
        os.chown(closed, 12345, 12345)
        saved = other("save", str(shared_tmp_path / "out"))
        assert saved.returncode == 0, saved.stderr
        loaded = other("load", saved.stdout.strip())
        assert (Path(loaded.stdout.strip()) / "mine").read_text() == "secret", loaded.stderr
        assert other("flush").returncode == 0


def test_the_exit_codes_are_in_the_help(world: World) -> None:
    for command in ("save", "load", "flush", "ls", "rm"):
        said = world.run(command, "--help").stdout
        assert "  9    not all saves are in the store yet" in said and "the hub or the store can't be reached" in said


# ---- S3


@pytest.mark.slow
@pytest.mark.timeout(90)
def test_s3_refuses_comes_back_and_gives(seaweed: SeaweedFS, tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    url = seaweed.bucket()
    with Proxy(seaweed.address) as proxy:
        for name, value in {**seaweed.environment(endpoint=proxy.endpoint), "AWS_MAX_ATTEMPTS": "1"}.items():
            monkeypatch.setenv(name, value)  # the daemon's: what a unit's environment file has
        proxy.refuse()
        with Daemon.start(tmp_path / "root", store=f"{url}/models", stores=["s3://no-such-bucket"]) as daemon:
            environment = environment_of(daemon, tmp_path)
            key = run(environment, "save", str(world.source)).stdout.strip()
            late = run(environment, "flush", "--deadline", "1s")
            assert (late.returncode, late.stdout) == (9, f"{key}\n"), late.stderr
            unreachable = run(environment, "load", UNKNOWN)
            assert unreachable.returncode == 7 and "hint: " in unreachable.stderr, unreachable.stderr
            proxy.listen()
            assert run(environment, "flush").returncode == 0
            assert run(environment, "ls", "--store").stdout.splitlines()[1].split()[-2:] == ["stored", key]
            missing = run(environment, "ls", "--store", "s3://no-such-bucket")
            assert missing.returncode == 3 and "no-such-bucket" in missing.stderr, missing.stderr
        with Daemon.start(tmp_path / "another", store=f"{url}/models") as another:
            loaded = json.loads(run(environment_of(another, tmp_path), "load", key, "--json").stdout)
            assert loaded["store_bytes"] >= len(LARGE) and contents(Path(loaded["path"])) == contents(world.source)
    listed = seaweed.client().list_objects_v2(Bucket=url.removeprefix("s3://"))["Contents"]
    assert f"models/refs/{key}.json" in [entry["Key"] for entry in listed] and not [entry for entry in listed if ".pending" in entry["Key"]]
    for secret in seaweed.keys(WRITER):
        assert secret not in daemon.log + another.log + late.stderr + unreachable.stderr + missing.stderr + json.dumps(loaded)


# ---- helpers


def on_terminal(environment: dict[str, str], *words: str, until: str, then: Callable[[], None]) -> str:
    """What a command writes to a terminal of 120 columns; `then` is called when it has written `until`."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "modelcache", *words]
    environment = {**environment, "TERM": "xterm", "COLUMNS": "120"}
    with subprocess.Popen(command, env=environment, stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        seen, has_happened, deadline = b"", False, time.monotonic() + DEADLINE_SECONDS
        with contextlib.suppress(OSError):  # EIO: the other end is closed
            while select.select([ours], [], [], max(0, deadline - time.monotonic()))[0]:
                seen += os.read(ours, 65536)
                if not has_happened and until.encode() in seen:
                    has_happened = True
                    then()
        os.close(ours)
        if not has_happened:
            process.kill()
    assert process.returncode == 0 and has_happened, seen.decode()
    return seen.decode().replace("\r\n", "\n")


def _end(pid: int) -> None:
    """Ends a daemon that is nobody's child; returns when it has ended."""
    ended = os.pidfd_open(pid)
    try:
        os.kill(pid, signal.SIGTERM)
        assert select.select([ended], [], [], DEADLINE_SECONDS)[0]
    finally:
        os.close(ended)
