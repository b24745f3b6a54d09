"""What decorators take as `load=`, in all its forms. What is none of them is an error that shows the right ones."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from typing import Any, Dict, List, NamedTuple, Optional

from . import errors, hub, names
from .errors import ModelcacheError

_MODEL_FORMS = """\
    @model(load="artifact")
    @model(load=["artifact", "another"])
    @model(load=[("artifact", "./folder"), ("another", None)])"""
_REPO_FORMS = """\
    @huggingface_hub(load=["org/name"])
    @huggingface_hub(load=[("org/name", "./folder")])
    @huggingface_hub(load=[{"repo_id": "org/name", "allow_patterns": ["*.json"]}])
    @huggingface_hub(load=[({"repo_id": "org/name", "revision": "v1"}, "./folder")])"""

CACHE_SCOPES = ("checkpoint", "flow", "global")
_NOT_IN_LOAD = ("local_dir", "cache_dir", "dry_run")


class WantedArtifact(NamedTuple):
    name: str  # of an artifact of the flow
    path: Optional[str]


class WantedRepo(NamedTuple):
    arguments: Dict[str, Any]  # of snapshot_download, `repo_id` among them
    path: Optional[str]
    ignored: str = ""  # what was said, and has no effect


def wanted_artifacts(load: Any) -> List[WantedArtifact]:
    """ArgumentException (a ValueError) for what is no form of @model's `load`."""
    if load is None:
        return []
    if isinstance(load, str):
        return [_artifact(load, load)]
    if not _is_list(load) or (isinstance(load, tuple) and any(isinstance(each, str) for each in load)):
        raise _wrong("@model", load, _MODEL_FORMS)
    return [_artifact(each, load) for each in load]


def wanted_repos(load: Any) -> List[WantedRepo]:
    """ArgumentException (a ValueError) for what is no form of @huggingface_hub's `load`."""
    if load is None:
        return []
    if not _is_list(load) or (isinstance(load, tuple) and any(isinstance(each, str) for each in load)):
        raise _wrong("@huggingface_hub", load, _REPO_FORMS)
    return [_repo(each, load) for each in load]


def repo_arguments(arguments: Mapping[str, Any]) -> Dict[str, Any]:
    """Those of `snapshot_download`, checked. ArgumentException (a ValueError) names what it does not take."""
    known = inspect.signature(hub.snapshot_download).parameters
    unknown = sorted(name for name in arguments if name not in known and name not in hub.DEPRECATED)
    if unknown:
        raise errors.ArgumentException(
            "snapshot_download takes no %s" % ", ".join(map(repr, unknown)), "it takes %s" % ", ".join(name for name in known)
        )
    repo_id = arguments.get("repo_id")
    if not isinstance(repo_id, str) or not repo_id:
        raise errors.ArgumentException("no repo_id, which is 'org/name' or 'name'", "the forms are\n%s" % _REPO_FORMS)
    names.check_repo_id(repo_id)
    return {**arguments, "repo_type": names.repo_type_of(arguments.get("repo_type"))}


def check_choice(decorator: str, name: str, value: Any, choices: Any) -> str:
    if value not in choices:
        raise errors.ArgumentException("@%s: %s is %s, not %r" % (decorator, name, " or ".join(map(repr, choices)), value))
    return str(value)


def check_temp_dir_root(decorator: str, value: Any) -> None:
    if value is not None and not isinstance(value, (str, os.PathLike)):
        raise errors.ArgumentException("@%s: temp_dir_root is a path, not %r" % (decorator, value))


def _artifact(entry: Any, load: Any) -> WantedArtifact:
    name, path = _pair(entry) if _is_list(entry) and len(entry) == 2 else (entry, None)
    if not isinstance(name, str) or not name or not _is_path(path):
        raise _wrong("@model", load, _MODEL_FORMS)
    return WantedArtifact(name, path)


def _repo(entry: Any, load: Any) -> WantedRepo:
    asked, path = _pair(entry) if _is_list(entry) and len(entry) == 2 else (entry, None)
    if isinstance(asked, str):
        asked = {"repo_id": asked}
    if not isinstance(asked, Mapping) or not _is_path(path):
        raise _wrong("@huggingface_hub", load, _REPO_FORMS)
    arguments = dict(asked)
    own = arguments.pop("path", None)
    if not _is_path(own):
        raise _wrong("@huggingface_hub", load, _REPO_FORMS)
    ignored = ", ".join("`%s`" % name for name in _NOT_IN_LOAD if arguments.pop(name, None) is not None)
    return WantedRepo(repo_arguments(arguments), path if path is not None else own, ignored)


def _pair(entry: Any) -> Any:
    first, path = entry
    return first, os.fspath(path) if isinstance(path, os.PathLike) else path


def _is_list(value: Any) -> bool:
    """Settings of a flow make lists of tuples."""
    return isinstance(value, (list, tuple))


def _is_path(value: Any) -> bool:
    return value is None or (isinstance(value, str) and value != "")


def _wrong(decorator: str, load: Any, forms: str) -> ModelcacheError:
    made: ModelcacheError = errors.ArgumentException("%s can't load %r" % (decorator, load), "the forms are\n%s" % forms)
    return made
