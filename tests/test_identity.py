"""Identity: the answers are metaflow-checkpoint's own."""

from __future__ import annotations

from typing import Any

import pytest

from modelcache.identity import repo_folder, repo_name, scope_of, task_identifier
from modelcache.keys import json_hash, pathspec_hash


def items(*values: Any) -> list[tuple[int, Any]]:
    return list(enumerate(values))


@pytest.mark.parametrize(("step", "name"), [("start", "a92ae9615600"), ("end", "24105546e482"), ("load_to_path", "1a69a1ab0540")])
def test_a_plain_step_is_named_by_its_name(step: str, name: str) -> None:
    assert task_identifier(step) == task_identifier(step, []) == name


@pytest.mark.parametrize(
    ("values", "name"),
    [(["b", 1], "f58d7bf39f5a"), (["a", {"k": 2.5}], "6d656f542669"), ([0], "07b4183333fb"), ([None], "ff9bbf3f711b")],
)
def test_a_foreach_is_named_by_its_values(values: list[Any], name: str) -> None:
    assert task_identifier("any", items(*values)) == name


def test_the_nodes_of_a_gang_have_one_name() -> None:
    assert {task_identifier("any", [(node, node)], is_gang=True) for node in range(3)} == {"c2df85824caf"}
    assert task_identifier("any", items("a", 0), is_gang=True) == task_identifier("any", [(0, "a"), (7, 7)], is_gang=True)
    assert task_identifier("any", items("a", 0), is_gang=True) != task_identifier("any", items("b", 0), is_gang=True)


def test_an_item_that_json_can_not_say_counts_by_its_index() -> None:
    assert task_identifier("any", [(3, object())]) == task_identifier("any", [(3, {1, 2})]) == task_identifier("any", [(0, 3)])


def test_a_scope_is_the_namespace_unless_a_tag_says_more() -> None:
    assert scope_of("user:u") == "bfa8ee162568"
    assert scope_of("user:u", ["other", "checkpoint:foo"]) == scope_of("user:v", ["checkpoint:foo:bar"]) == "2c26b46b68ff"
    assert scope_of("u", ["checkpoint:b", "checkpoint:a"]) == scope_of("v", ["checkpoint:a"])
    assert scope_of(None) == scope_of("")


def test_hashes_of_keys() -> None:
    assert pathspec_hash("Keys/1795250125662654/start/1") == "f9dcb323"
    assert pathspec_hash("CheckpointFlow/7457/start/47456") == "54d4b3b1"
    assert json_hash("mf.models/models/artifacts/basic_model_6483655edd5e44dfb2675968dd23b229")[:6] == "4ad1a6"


def test_a_repo_is_named_by_what_was_asked() -> None:
    assert (repo_name("bert-base-uncased"), repo_name("acme/tiny"), repo_name("o/r")) == ("9b5c6e8800", "e5af174d1f", "2d6bcef82f")
    assert repo_name("o/r", revision="main") == repo_name("o/r")
    assert repo_name("o/r", allow_patterns=["b", "a"]) == repo_name("o/r", allow_patterns=["a", "b", "a"])
    asks: list[dict[str, Any]] = [
        {},
        {"revision": "v3"},
        {"allow_patterns": ["*.json"]},
        {"ignore_patterns": ["*.json"]},
        {"allow_patterns": []},
        {"repo_type": "dataset"},
        {"revision": '"/allow_patterns=["*.json"]'},
    ]
    assert len({repo_name("o/r", **ask) for ask in asks}) == len(asks)


def test_scopes_of_repos() -> None:
    own = "Flow/start/bfa8ee162568/a92ae9615600"
    assert repo_folder("checkpoint", "Flow", own) == own
    assert repo_folder("flow", "Flow", own) == "mf:internal/huggingface-hub/registry:flow/Flow"
    assert repo_folder("global", "Flow", own) == "mf:internal/huggingface-hub/registry:global/fully-global"
