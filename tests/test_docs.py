"""The documents against the code: every public name with its arguments and defaults, every error, every command."""

from __future__ import annotations

import builtins
import inspect
import re
from typing import Any

import pytest

import modelcache
from modelcache import errors

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


def test_every_error_is_documented() -> None:
    kinds = {name for name, kind in vars(errors).items() if inspect.isclass(kind) and issubclass(kind, errors.ModelcacheError)}
    undocumented = kinds - set(re.findall(r"^\| `(\w+)`", API, re.M)) - {"ModelcacheError", "DaemonError", "HubError"}
    assert not undocumented


def test_every_documented_kinship_is_true() -> None:
    rows = re.findall(r"^\| `(\w+Error)` \| (.*?) \|", API, re.M)
    assert rows
    for name, kin in rows:
        for parent in re.findall(r"`(\w+Error)`", kin):
            expected = getattr(errors, parent, None) or _builtin(parent)
            assert issubclass(getattr(errors, name), expected), (name, parent)


def test_readme_has_the_two_commands() -> None:
    assert "make demo" in README
    assert "make test" in README


def _builtin(name: str) -> type:
    kind: type = getattr(builtins, name)
    return kind
