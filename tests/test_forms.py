"""The forms of `load=`, and what is none of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from modelcache.errors import ModelcacheError
from modelcache.forms import wanted_artifacts, wanted_repos


@pytest.mark.parametrize(
    ("load", "wanted"),
    [
        (None, []),
        ("a", [("a", None)]),
        (["a", "b"], [("a", None), ("b", None)]),
        ([("a", "./x"), ("b", None), "c"], [("a", "./x"), ("b", None), ("c", None)]),
        ([["a", "./x"]], [("a", "./x")]),  # what a Config makes of tuples
        ((("a", Path("x")),), [("a", "x")]),
    ],
)
def test_artifacts(load: Any, wanted: list[Any]) -> None:
    assert wanted_artifacts(load) == wanted


@pytest.mark.parametrize("load", [1, {"a": "b"}, ("a", "./x"), [1], [("a",)], [("a", 1)], [("a", "x", "y")], [""], "", [None], [("a", "")]])
def test_no_artifacts(load: Any) -> None:
    with pytest.raises(ValueError, match=r"@model can't load .*\n") as caught:
        wanted_artifacts(load)
    assert '@model(load=[("artifact", "./folder")' in str(caught.value)


@pytest.mark.parametrize(
    ("load", "wanted"),
    [
        (["o/r"], [({"repo_id": "o/r", "repo_type": "model"}, None)]),
        ([("o/r", "./x")], [({"repo_id": "o/r", "repo_type": "model"}, "./x")]),
        ([{"repo_id": "o/r", "repo_type": None}], [({"repo_id": "o/r", "repo_type": "model"}, None)]),
        ([{"repo_id": "o/r", "repo_type": "dataset", "path": "y"}], [({"repo_id": "o/r", "repo_type": "dataset"}, "y")]),
        ([({"repo_id": "o/r", "max_workers": 2}, "x")], [({"repo_id": "o/r", "repo_type": "model", "max_workers": 2}, "x")]),
    ],
)
def test_repos(load: Any, wanted: list[Any]) -> None:
    assert [(repo.arguments, repo.path) for repo in wanted_repos(load)] == wanted


def test_a_folder_in_the_wrong_place_is_told() -> None:
    (repo,) = wanted_repos([{"repo_id": "o/r", "local_dir": "x"}])
    assert repo.ignored == "`local_dir`" and "local_dir" not in repo.arguments and repo.path is None


@pytest.mark.parametrize(
    "load",
    ["o/r", ("o/r", "./x"), {"repo_id": "o/r"}, [1], [{}], [{"repo_id": ""}], [{"repo_id": "o/r", "other": 1}], [("o/r", 1)], [("o/r",)]],
)
def test_no_repos(load: Any) -> None:
    with pytest.raises(ValueError, match=r"huggingface_hub|snapshot_download|repo_id") as caught:
        wanted_repos(load)
    assert isinstance(caught.value, ModelcacheError) and caught.value.hint


@pytest.mark.parametrize("repo_id", ["a/b/c", "-x", "x.git", "a--b"])
def test_a_name_that_no_repo_has(repo_id: str) -> None:
    with pytest.raises(ValueError, match="epo"):
        wanted_repos([repo_id])
