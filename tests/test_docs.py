"""The documents against the code: every public name with its arguments and defaults, every error, every command."""

from __future__ import annotations

import builtins
import inspect
import json
import re
import subprocess
import sys
from typing import Any

import pytest

import modelcache
from modelcache import checkpoints, cli, errors, loaded, models, shared_repos
from modelcached.config import SETTINGS

from .conftest import ROOT
from .daemon import clean_environment

API = (ROOT / "docs" / "api.md").read_text()
README = (ROOT / "README.md").read_text()
METAFLOW = API.partition("\n## Metaflow\n")[2].partition("\n## ")[0]
DECORATORS_OWN = {"begin", "load_artifacts", "load_repos", "keys"}  # of what `current` has: for the decorators, not for steps
EXTENSION = """
import json, metaflow
from metaflow.plugins import STEP_DECORATORS
from metaflow_extensions.modelcache.toplevel import toplevel
found = {each.name: each.defaults for each in STEP_DECORATORS if each.__module__.startswith("metaflow_extensions.modelcache")}
print(json.dumps([found, [name for name in toplevel.__all__ if not name.startswith("_")]]))
"""


def _spelt(name: str, function: Any) -> str:
    """A signature as the documents write it: names and defaults, no types."""
    words, has_star = [], False
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name == "self":
            continue
        if parameter.kind is parameter.VAR_KEYWORD:
            words.append(f"**{parameter.name}")
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not has_star:
            words.append("*")
            has_star = True
        words.append(parameter.name if parameter.default is parameter.empty else f"{parameter.name}={parameter.default!r}")
    return f"{name}({', '.join(words)})"


@pytest.mark.parametrize("name", [name for name in modelcache.__all__ if inspect.isfunction(getattr(modelcache, name))])
def test_every_function_is_documented_with_its_arguments(name: str) -> None:
    assert f"## `modelcache.{name}`" in API
    assert _spelt(name, getattr(modelcache, name)) in API


def test_every_documented_argument_has_its_row() -> None:
    for name in inspect.signature(modelcache.snapshot_download).parameters:
        assert re.search(rf"^\| [^|]*`{name}`", API, re.M), name


@pytest.mark.parametrize("name", ["save", "load", "list", "latest", "delete", "flush"])
def test_every_argument_is_told_about_where_it_belongs(name: str) -> None:
    section = re.split(r"^#+ ", API.partition(f"## `modelcache.{name}`\n")[2], maxsplit=1, flags=re.M)[0]
    words = section.rpartition("```\n")[2]
    for argument in inspect.signature(getattr(modelcache, name)).parameters:
        assert re.search(rf"`{argument}\b", words), argument


def test_every_field_of_a_new_reference_has_its_row() -> None:
    from modelcache import saving

    new = {*saving.model_reference("x"), *saving.checkpoint_reference("x")}
    assert new and new <= documented_fields()


@pytest.mark.parametrize(
    ("called", "kind"),
    [
        ("current.checkpoint", checkpoints.CurrentCheckpoint),
        ("current.model", models.CurrentModel),
        ("current.huggingface_hub", shared_repos.CurrentHuggingfaceHub),
    ],
)
def test_everything_a_step_has_is_documented(called: str, kind: type) -> None:
    names = {name: value for name, value in inspect.getmembers(kind) if not name.startswith("_") and name not in DECORATORS_OWN}
    assert names
    for name, value in names.items():
        spelt = _spelt(f"{called}.{name}", value) if inspect.isfunction(value) else f"{called}.{name}"
        assert f"`{spelt}`" in METAFLOW


def test_what_metaflow_has_at_its_top_is_documented() -> None:
    """In a process of its own: what is imported beside Metaflow changes, for one its exceptions."""
    decorators, names = json.loads(
        subprocess.run([sys.executable, "-c", EXTENSION], env=clean_environment(), cwd="/", capture_output=True, check=True).stdout
    )
    for called, value in (
        ("Checkpoint", checkpoints.Checkpoint),
        ("Checkpoint.save", checkpoints.Checkpoint.save),
        ("load_model", models.load_model),
        ("delete_model", models.delete_model),
        ("loaded.cleanup", loaded.Loaded.cleanup),
    ):
        assert f"`{_spelt(called, value)}`" in METAFLOW
    for name in names:
        assert re.search(rf"`{name}\b", METAFLOW), name
    rows = re.findall(r"^\| `?@?(\w+)`? \| `(\w+)` \| .* \| `([^`]*)` \|$", METAFLOW, re.M)
    documented = {name: {argument: default for of, argument, default in rows if of in (name, "each")} for name in decorators}
    spelt = {
        name: {each: json.dumps(value) if isinstance(value, str) else repr(value) for each, value in its.items()}
        for name, its in decorators.items()
    }
    assert spelt == documented


def test_every_error_is_documented() -> None:
    kinds = {name for name, kind in vars(errors).items() if inspect.isclass(kind) and issubclass(kind, errors.ModelcacheError)}
    undocumented = kinds - set(re.findall(r"^\| `(\w+)`", API, re.M)) - {"ModelcacheError", "DaemonError", "HubError", "SaveError"}
    assert not undocumented


def test_every_documented_kinship_is_true() -> None:
    rows = re.findall(r"^\| `(\w+Error)` \| (.*?) \|", API, re.M)
    assert rows
    for name, kin in rows:
        for parent in re.findall(r"`(\w+Error)`", kin):
            expected = getattr(errors, parent, None) or _builtin(parent)
            assert issubclass(getattr(errors, name), expected), (name, parent)


def test_every_command_is_documented(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    commands = re.findall(r"^    ([a-z-]+)  ", capsys.readouterr().out, re.M)
    (listed,) = re.findall(r"^`modelcache ([a-z-]+(?: \| [a-z-]+)+)`", API, re.M)
    assert len(commands) > 10 and sorted(commands) == sorted(listed.split(" | "))


def test_every_variable_of_the_sdk_is_documented() -> None:
    sources = "".join(path.read_text() for path in (ROOT / "sdk" / "modelcache").glob("*.py"))
    variables = set(re.findall(r"\bMODELCACHE_[A-Z_]+\b", sources))
    assert variables and variables <= set(re.findall(r"^\| `(MODELCACHE_\w+)`", API, re.M))


def test_readme_has_the_two_commands() -> None:
    assert "make demo" in README
    assert "make test" in README


def test_readme_names_settings_that_there_are() -> None:
    table = README.partition("| setting | is | default |\n")[2].partition("\n\n")[0]
    named = re.findall(r"^\| `(\w+)`", table, re.M)
    assert [name for name in named if name.startswith("store")] == [name for name in SETTINGS if name.startswith("store")]
    assert set(named) <= set(SETTINGS)


def documented_fields() -> set[str]:
    """The fields of a reference that docs/api.md has a row for."""
    table = API.partition("### The reference")[2].partition("\n#")[0]
    return {name for row in re.findall(r"^\| (`.*?) \|", table, re.M) for name in re.findall(r"`(\w+)`", row)}


def _builtin(name: str) -> type:
    kind: type = getattr(builtins, name)
    return kind
