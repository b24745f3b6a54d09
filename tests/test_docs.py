"""The documents against the code: every public name with its arguments and defaults, every error, every command."""

from __future__ import annotations

import builtins
import inspect
import re
from typing import Any

import pytest

import modelcache
from modelcache import cli, errors
from modelcached.config import SETTINGS

from .conftest import ROOT

API = (ROOT / "docs" / "api.md").read_text()
README = (ROOT / "README.md").read_text()


def _spelt(name: str, function: Any) -> str:
    """A signature as the documents write it: names and defaults, no types."""
    words, has_star = [], False
    for parameter in inspect.signature(function).parameters.values():
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
    assert named == [name for name in SETTINGS if name.startswith("store")]


def documented_fields() -> set[str]:
    """The fields of a reference that docs/api.md has a row for."""
    table = API.partition("### The reference")[2].partition("\n#")[0]
    return {name for row in re.findall(r"^\| (`.*?) \|", table, re.M) for name in re.findall(r"`(\w+)`", row)}


def _builtin(name: str) -> type:
    kind: type = getattr(builtins, name)
    return kind
