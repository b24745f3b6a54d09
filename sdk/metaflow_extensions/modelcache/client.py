"""What only Metaflow knows of tasks that are over, of datastores, and of code packages."""

from __future__ import annotations

import os
from importlib import metadata
from typing import Any, Dict, List, Optional

import modelcache
from modelcache import checkpoints
from modelcache.errors import ArgumentException

SUPPORTED = ("local", "s3")
SDK = os.path.dirname(os.path.abspath(modelcache.__file__))


def _can_travel_with_all() -> bool:
    """Metaflow fails at a module that lies elsewhere than its distribution says: an editable one, or one below a symbolic link."""
    try:
        said = str(metadata.distribution("modelcached").locate_file("modelcache"))
    except metadata.PackageNotFoundError:
        return True
    return said == os.path.realpath(SDK)


# Metaflow puts this extension into the code package of every flow, where it is nothing without the SDK; so that goes there likewise.
# Where it can't, the step decorators add it to the packages of the flows that use them.
if _can_travel_with_all():
    vars(modelcache)["METAFLOW_PACKAGE_POLICY"] = "include"


class Checkpoint(checkpoints.Checkpoint):
    __doc__ = checkpoints.Checkpoint.__doc__

    def _of_other(self, task: Any, attempt: Optional[int]) -> List[Dict[str, Any]]:
        return recorded(task, attempt) or super()._of_other(task, attempt)


def recorded(task: Any, attempt: Optional[int]) -> Optional[List[Dict[str, Any]]]:
    """What a task that ended noted down itself; None if it did not."""
    from metaflow.client import Task
    from metaflow.exception import MetaflowException

    pathspec = task if isinstance(task, str) else getattr(task, "pathspec", None)
    if not isinstance(pathspec, str) or pathspec.count("/") != 3:
        return None  # the caller says what a task is
    try:
        found = Task(pathspec, attempt=attempt, _namespace_check=False)
        return list(found["_task_checkpoints"].data)
    except (KeyError, MetaflowException):
        return None


def datastore_url(kind: str, root: str) -> str:
    """A datastore as an URL. ArgumentException for those that have no store of ours yet."""
    if kind not in SUPPORTED:
        raise ArgumentException(
            "modelcached keeps nothing in a datastore of type %r" % kind,
            "the supported ones are %s: --datastore, or METAFLOW_DEFAULT_DATASTORE" % " and ".join(map(repr, SUPPORTED)),
        )
    if kind == "s3":
        return root.rstrip("/")
    from urllib.parse import quote

    return "file://" + quote(os.path.abspath(root))


def default_datastore() -> Optional[str]:
    """That of a process without a flow, as Metaflow's settings say."""
    from metaflow.metaflow_config import DEFAULT_DATASTORE
    from metaflow.plugins import DATASTORES

    for backend in DATASTORES:
        if backend.TYPE == DEFAULT_DATASTORE and DEFAULT_DATASTORE in SUPPORTED:
            root = backend.get_datastore_root_from_config(lambda *_: None, create_on_absent=False)
            return None if root is None else datastore_url(DEFAULT_DATASTORE, root)
    return None


def with_artifact_store(*_: Any, **__: Any) -> Any:
    """Of metaflow-checkpoint: says what takes its place."""
    raise ArgumentException(
        "@with_artifact_store is not part of modelcached",
        "which store a node uses is its daemon's setting `store`; without one it is the flow's datastore. Leave the decorator out",
    )


def artifact_store_from(*_: Any, **__: Any) -> Any:
    """Of metaflow-checkpoint: says what takes its place."""
    raise ArgumentException(
        "artifact_store_from is not part of modelcached",
        "a reference names its store: load_model(reference, path) finds it where the daemon's setting `stores` allows it",
    )
