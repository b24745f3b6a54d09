"""What users get: the wheel, in a virtualenv that has nothing else, and beside the daemon's dependencies."""

from __future__ import annotations

import subprocess
import sysconfig
import zipfile
from pathlib import Path

import pytest

from .conftest import ROOT
from .wheels import Install, build, run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

# What uses everything, as it is installed. Tests with other uids need a Python that those may run, and this one lies in pytest's folder.
WHOLE = ("main", "server", "fetch", "oracle", "sdk_connection", "sdk_hub", "cli_exec")
PACKAGES = ["modelcache", "modelcached"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def sdk_alone(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Install:
    return Install.of(wheel, tmp_path_factory.mktemp("alone"))


@pytest.fixture(scope="module")
def with_daemon(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Install:
    """The extras come from this interpreter's own site-packages, behind the wheel, so nothing is downloaded."""
    made = Install.of(wheel, tmp_path_factory.mktemp("daemon"))
    (made.site / "extras.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return made


def test_wheel_holds_the_packages_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (top_level,) = (name for name in names if name.endswith(".dist-info/top_level.txt"))
        # Metaflow finds its extensions by this file.
        tops = archive.read(top_level).decode().split()
    assert sorted(tops) == sorted(PACKAGES + ["metaflow_extensions"] * (ROOT / "sdk" / "metaflow_extensions").exists())
    assert {f"{package}/py.typed" for package in PACKAGES} <= set(names)
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == set(tops)
    assert not [name for name in names if name.endswith(".pyc") or "/tests/" in name or "/test_" in name]
    for root in ("daemon", "sdk"):
        modules = {str(path.relative_to(ROOT / root)) for path in (ROOT / root).rglob("*.py")}
        assert modules <= set(names)
    units = {path.relative_to(ROOT) for path in (ROOT / "systemd").rglob("*") if path.is_file()}
    assert units and {f"modelcached/{path}" for path in units} <= set(names)


def test_wheel_licence_and_dependencies(sdk_alone: Install) -> None:
    wanted = "from importlib.metadata import requires; print([line for line in requires('modelcached') if 'extra ==' not in line])"
    assert sdk_alone.python(wanted) == "[]"
    assert sdk_alone.python("from importlib.metadata import metadata; print(metadata('modelcached')['License-Expression'])") == "Apache-2.0"
    assert list(sdk_alone.site.glob("modelcached-*.dist-info/licenses/LICENSE"))


def test_one_version_everywhere(sdk_alone: Install) -> None:
    versions = "from importlib.metadata import version; import modelcache, modelcached; "
    versions += "print(len({version('modelcached'), modelcache.__version__, modelcached.__version__}))"
    assert sdk_alone.python(versions) == "1"


def test_sdk_alone_imports_only_the_standard_library(sdk_alone: Install) -> None:
    code = "import sys; bare = set(sys.modules); import modelcache; print(modelcache.__file__); "
    code += "assert {name.partition('.')[0] for name in set(sys.modules) - bare} - {'modelcache'} <= set(sys.stdlib_module_names)"
    assert Path(sdk_alone.python(code)).is_relative_to(sdk_alone.site)


def test_sdk_alone_has_a_command(sdk_alone: Install) -> None:
    assert "pull" in run(sdk_alone.bin / "modelcache", "--help")


def test_daemon_without_its_extra_says_what_to_install(sdk_alone: Install) -> None:
    ran = subprocess.run([sdk_alone.bin / "modelcached", "serve"], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert ran.returncode != 0
    assert "modelcached[daemon]" in ran.stderr
    assert "Traceback" not in ran.stderr


def test_daemon_with_its_extra(with_daemon: Install) -> None:
    version = with_daemon.python("import modelcached; print(modelcached.__version__)")
    assert version in run(with_daemon.bin / "modelcached", "version")
    assert Path(with_daemon.python("import modelcached; print(modelcached.__file__)")).is_relative_to(with_daemon.site)


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_quick_tests_pass_against_the_wheel(with_daemon: Install) -> None:
    assert Path(with_daemon.python("import modelcache; print(modelcache.__file__)")).is_relative_to(with_daemon.site)
    quick = ("-q", "-p", "no:cacheprovider", "-m", "not slow and not soak", *(f"tests/test_{name}.py" for name in WHOLE))
    print(run(with_daemon.bin / "python", "-m", "pytest", *quick, cwd=ROOT, PYTHONWARNINGS=""))
