"""`current.model` without Metaflow: what a task saves and loads, and how it is given back."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from modelcache import errors, folders, keys
from modelcache.forms import WantedArtifact
from modelcache.models import CurrentModel
from modelcache.tasks import Task

from .daemon import Daemon
from .saves import fill

TASK = Task("Flow", "1", "train", "2", "a92ae9615600", "bfa8ee162568")
FILES = {"config.json": b"{}", "sub/weights": b"w" * 300_000}


@pytest.fixture
def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Daemon]:
    with Daemon.start(tmp_path / "root") as daemon:
        monkeypatch.setenv("MODELCACHE_SOCKET", daemon.socket)
        yield daemon


@pytest.fixture
def content(tmp_path: Path) -> str:
    return str(fill(tmp_path / "content", FILES))


def files(folder: str) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def test_saved_and_loaded(daemon: Daemon, content: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    current = CurrentModel(TASK)
    reference = current.save(content, metadata={"loss": 0.5})
    assert reference["label"] == "Flow_train" and reference["storage_format"] == "tar" and current.saved == [reference]
    path = current.load(reference)
    digits = keys.json_hash(reference["key"])[:6]
    assert files(path) == FILES
    assert list(current.loaded) == [digits, reference["key"]] and len(current.loaded) == 2 and "other" not in current.loaded
    assert current.loaded[digits] == current.loaded[reference["key"]] == path
    assert current.loaded.info[digits]["metadata"] == {"loss": 0.5}
    assert f"[@model] Loaded artifact `{digits}[type:model]` in 0." in capfd.readouterr().err
    with pytest.raises(KeyError, match=f"'x' is not loaded; loaded is: '{digits}'"):
        current.loaded["x"]
    with pytest.raises(TypeError):
        current.loaded["x"] = "y"  # type: ignore[index]
    mine = str(tmp_path / "mine")
    assert current.load(reference["key"], mine) == mine and files(mine) == FILES
    assert current.load(reference["url"], Path(mine)) == mine
    Path(mine, "config.json").write_text("writable")
    current.loaded.cleanup(digits)
    assert not current.loaded and not current.loaded.info and not os.path.exists(mine)


def test_a_root_for_temporary_folders(daemon: Daemon, content: str, tmp_path: Path) -> None:
    root = tmp_path / "temporary" / "deeper"
    current = CurrentModel(TASK, str(root))
    reference = current.save(content, label="a.b", storage_format="files")
    current.load_artifacts([WantedArtifact("one", None), WantedArtifact("two", str(tmp_path / "two"))], lambda _: reference, False)
    one = current.loaded["one"]
    assert Path(one).parent == root and Path(one).name.startswith("metaflow_models_one_") and files(one) == FILES
    Path(one, "config.json").write_text("writable")
    assert files(current.loaded["two"]) == FILES
    current.loaded.release()
    assert os.listdir(root) == [] and files(str(tmp_path / "two")) == FILES


def test_what_can_not_be_loaded(daemon: Daemon, content: str, capfd: pytest.CaptureFixture[str]) -> None:
    current = CurrentModel(TASK)
    good = current.save(content)
    gone = {**good, "key": good["key"] + "0"}

    class Flow:
        fine = good
        lost = gone
        text = "nothing"
        number = 7

    def get(name: str) -> Any:
        return getattr(Flow, name)

    for name in ("lost", "text", "number", "absent"):
        with pytest.raises(errors.LoadingException, match=name):
            current.load_artifacts([WantedArtifact(name, None)], get, False)
    current.load_artifacts([WantedArtifact(name, None) for name in ("lost", "text", "number", "absent", "fine")], get, True)
    assert list(current.loaded) == ["fine"]
    assert "[@model] `absent` is not loaded: " in capfd.readouterr().err
    for reference in (gone, "nothing", 7, {"type": "model"}):
        with pytest.raises(errors.LoadingException):
            current.load(reference)
    with pytest.raises(ValueError, match="nothing to load"):
        current.load(None)
    with pytest.raises(ValueError, match="storage_format"):
        current.save(content, storage_format="zip")


def test_folders_go_with_their_process(tmp_path: Path) -> None:
    made = folders.make("mine", str(tmp_path / "root"))
    child = os.fork()
    if child == 0:
        folders._remove_all()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert os.path.isdir(made)
    folders.remove(made)
    assert os.listdir(tmp_path / "root") == []
