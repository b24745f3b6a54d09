"""The wheel, built from this checkout without a network, and virtualenvs that have it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from .conftest import ROOT


def run(*command: str | Path, cwd: Path = Path("/"), **environment: str) -> str:
    """Without the caller's Python settings: only the virtualenv says what can be imported. Warnings are errors."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    clean |= {"PYTHONWARNINGS": "error", **environment}
    ran = subprocess.run([str(part) for part in command], env=clean, cwd=cwd, text=True, capture_output=True, stdin=subprocess.DEVNULL)
    assert ran.returncode == 0, f"{' '.join(map(str, command))}\n{ran.stdout}\n{ran.stderr}"
    return ran.stdout


class Install(NamedTuple):
    bin: Path
    site: Path

    def python(self, code: str) -> str:
        return run(self.bin / "python", "-c", code).strip()

    @classmethod
    def of(cls, wheel: Path, directory: Path) -> Install:
        run(sys.executable, "-m", "venv", "--without-pip", directory)
        pip = (sys.executable, "-m", "pip", "--python", directory / "bin" / "python")
        run(*pip, "install", "--quiet", "--no-index", "--no-deps", wheel, PYTHONWARNINGS="")
        site = run(directory / "bin" / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))")
        return cls(directory / "bin", Path(site.strip()))


def build(source: Path, target: Path) -> Path:
    """The wheel, in `target`. Built from a copy in `source`, because setuptools writes beside its sources."""
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
    for name in ("daemon", "sdk", "tests"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    build = ("wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", target, source)
    run(sys.executable, "-m", "pip", *build, PYTHONWARNINGS="")
    (built,) = target.glob("*.whl")
    return built
