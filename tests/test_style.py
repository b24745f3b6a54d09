"""Habits that a program can check: Python 3.9 in the SDK, nothing unfinished, nothing that only this machine knows."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from .conftest import ROOT, read_skips

SDK_FILES = sorted((ROOT / "sdk").rglob("*.py"))
CODE_FILES = sorted(path for folder in ("daemon", "sdk", "tests", "benchmarks", "examples") for path in (ROOT / folder).rglob("*.py"))
# Where anybody's checkout may lie, so that naming it says nothing about this machine.
COMMON_FOLDERS = {"/", "/tmp", "/var/tmp", "/home", "/root", "/srv", "/opt", "/usr/src", "/builds", "/workspace"}


def project_files() -> Iterator[Path]:
    """Every file a clone would hold, without asking git: a copy of the tree is checked the same way."""
    for folder, folders, files in os.walk(ROOT):
        is_top = Path(folder) == ROOT
        hidden = {name for name in folders if name.startswith(".") and not (is_top and name in (".ci", ".github"))}
        folders[:] = [name for name in folders if name not in hidden | {"__pycache__", "build", "dist"} and not name.endswith(".egg-info")]
        yield from (Path(folder, name) for name in files if not name.endswith(".pyc"))


def find_in_project(pattern: str, paths: Iterator[Path] | list[Path]) -> list[str]:
    found, wanted = [], re.compile(pattern.encode())
    for path in paths:
        if b"\0" not in (text := path.read_bytes()):
            found += [f"{path.relative_to(ROOT)}:{number}" for number, line in enumerate(text.splitlines(), 1) if wanted.search(line)]
    return found


def outer_folders() -> list[str]:
    """Prefixes of paths that exist here and on no other machine."""
    checkout = [f"{folder}/" for folder in (ROOT, ROOT.parent) if str(folder) not in COMMON_FOLDERS]
    return [*checkout, f"{Path.home()}/."]


@pytest.mark.parametrize("prefix", outer_folders())
def test_no_path_of_this_machine(prefix: str) -> None:
    assert find_in_project(r"(?<![\w.}])" + re.escape(prefix), project_files()) == []


# The patterns are spelt so that they do not find themselves.
@pytest.mark.parametrize(
    "pattern",
    [
        pytest.param(r"\.\./share[d]|shared/spe[c]", id="documents outside of it"),
        pytest.param(r"(?i)\bissue[s]? #?\d+\b", id="numbers that mean nothing here"),
        pytest.param(r"index-ur[l]|/simpl[e]/|files\.pythonhoste[d]|pypi\.or[g]", id="registries"),
    ],
)
def test_project_stands_alone(pattern: str) -> None:
    assert find_in_project(pattern, project_files()) == []


def test_nothing_unfinished() -> None:
    shipped = [path for path in CODE_FILES if path.is_relative_to(ROOT / "daemon") or path.is_relative_to(ROOT / "sdk")]
    assert find_in_project(r"\b(TODO|FIXME|XXX|NotImplementedError)\b", shipped) == []


def test_tests_use_the_real_thing_or_a_fake() -> None:
    tests = [path for path in CODE_FILES if path.is_relative_to(ROOT / "tests")]
    assert find_in_project(r"unittest\.moc[k]|MagicMoc[k]|AsyncMoc[k]|monkeypatch\.setatt[r]", tests) == []


def test_tests_wait_on_events() -> None:
    """A sleep of so many seconds is a guess; one that is no guess has a comment on its line that says why."""
    tests = [path for path in CODE_FILES if path.is_relative_to(ROOT / "tests")]
    assert find_in_project(r"(asyncio|time)\.sleep\((0\.[0-9]+|[1-9])(?!.*#)", tests) == []


@pytest.mark.parametrize("path", SDK_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_sdk_parses_on_python_39(path: Path) -> None:
    ast.parse(path.read_text(), feature_version=(3, 9))


def python39() -> str | None:
    """A Python 3.9 that runs; a name on the PATH may be a version manager's stand-in that does not."""
    for name in filter(None, (os.environ.get("PYTHON39"), shutil.which("python3.9"))):
        if subprocess.run([name, "-c", "import sys; sys.exit(sys.version_info[:2] != (3, 9))"], stderr=subprocess.DEVNULL).returncode == 0:
            return name
    return None


def test_sdk_imports_on_python_39() -> None:
    """Where there is a 3.9; everywhere else `make check` has vermin look up each name's first version."""
    for python in filter(None, (python39(), sys.executable)):
        names = [".".join(path.relative_to(ROOT / "sdk").with_suffix("").parts) for path in SDK_FILES]
        names = [name for name in names if name.startswith("modelcache.") and not name.endswith("__main__")]
        code = f"import importlib, sys; sys.path.insert(0, {str(ROOT / 'sdk')!r}); [importlib.import_module(name) for name in {names!r}]"
        ran = subprocess.run([python, "-I", "-W", "error", "-c", code], capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr


def test_skips_have_reasons_and_exist() -> None:
    for node, reason in read_skips().items():
        path, _, test = node.partition("::")
        assert len(reason.split()) > 2, f"{node}: a reason that a reader accepts"
        assert (ROOT / path).exists(), f"{node}: no such file"
        assert not test or f"def {test.partition('[')[0].rpartition('::')[2]}(" in (ROOT / path).read_text(), f"{node}: no such test"
