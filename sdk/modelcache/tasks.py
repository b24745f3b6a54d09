"""The task that saves and loads: who it is in the keys, which store is its own, and how its child processes know.

A task of a flow passes all of this on in its environment: METAFLOW_CHECKPOINT_UID as metaflow-checkpoint spells it, the rest in
MODELCACHE_TASK. That is how `Checkpoint()` works in a trainer that the task started.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any, Callable, Dict, List, NamedTuple, Optional

from . import client, errors, flushing, keys, references, runtime
from .errors import ModelcacheError

UID_VARIABLE = "METAFLOW_CHECKPOINT_UID"
IDENTIFIER_VARIABLE = "METAFLOW_CHECKPOINT_TASK_IDENTIFIER"
TASK_VARIABLE = "MODELCACHE_TASK"
_UID_PARTS = 7


_find_datastore: Optional[Callable[[], Optional[str]]] = None


class Task(NamedTuple):
    flow: str
    run: str
    step: str
    task: str  # of a gang: its control task
    identifier: str
    scope: str
    attempt: int = 0
    branch: str = ""  # its index in every enclosing foreach, the outermost first: "0/3". Equal items have the same identifier
    node: Optional[int] = None  # in a gang
    datastore: Optional[str] = None  # the flow's, as an URL

    @property
    def pathspec(self) -> str:
        return "/".join(self[:4])

    @property
    def folder(self) -> str:
        """Of its checkpoints, in keys."""
        return "/".join((self.flow, self.step, self.scope, self.identifier))

    @property
    def store(self) -> Optional[str]:
        """Where its saves go: below the flow's datastore, unless a node's daemon decides (None)."""
        return store_in(self.datastore)

    @property
    def marks(self) -> Dict[str, Any]:
        """What its references say beside the usual."""
        return {"foreach_index": self.branch, "node_index": self.node}

    def environment(self) -> Dict[str, str]:
        """For its child processes."""
        uid = (self.flow, self.run, self.step, self.task, self.identifier, self.scope, str(self.attempt))
        more = {"branch": self.branch, "node": self.node, "datastore": self.datastore}
        return {UID_VARIABLE: "/".join(uid), IDENTIFIER_VARIABLE: self.identifier, TASK_VARIABLE: json.dumps(more)}


def of_environment() -> Task:
    """The task that this process belongs to. CheckpointException if it belongs to none."""
    uid = os.environ.get(UID_VARIABLE)
    if not uid:
        raise errors.CheckpointException(
            "this process belongs to no task", "checkpoints are saved below a step with @checkpoint; anywhere else use modelcache.save"
        )
    parts = uid.split("/")
    if len(parts) != _UID_PARTS or not all(parts) or not parts[-1].isdecimal():
        raise errors.CheckpointException("%s is flow/run/step/task/identifier/scope/attempt, not %r" % (UID_VARIABLE, uid))
    try:
        more = json.loads(os.environ.get(TASK_VARIABLE) or "{}")
        flow, run, step, task, identifier, scope, attempt = parts
        return Task(flow, run, step, task, identifier, scope, int(attempt), **more)
    except (ValueError, TypeError):
        raise errors.CheckpointException("%s is not what the task passed on" % TASK_VARIABLE) from None


def store_in(datastore: Optional[str]) -> Optional[str]:
    """What a request says of the store: a private daemon takes a datastore's own, a node's daemon has one."""
    if datastore is None or not client.shared().hello().private:
        return None
    return datastore.rstrip("/") + "/modelcached"


def default_datastore() -> Optional[str]:
    """The datastore of a process that runs no task: what Metaflow's settings say, where Metaflow is installed."""
    return _find_datastore() if _find_datastore is not None else None


def find_datastore_with(find: Callable[[], Optional[str]]) -> None:
    """Metaflow's extension knows how to ask Metaflow."""
    global _find_datastore
    _find_datastore = find


def saved_by(task: Task) -> List[Dict[str, Any]]:
    """The task's checkpoints in all its attempts, newest first; of child processes too. A daemon that nobody needed is not started."""
    if not (client.shared().is_connected or _is_daemon_here()):
        return []
    return references.of_task(keys.checkpoints_in(task.folder), task.pathspec, store=task.store)


def settle(saved: List[Dict[str, Any]], deadline: Optional[float] = None) -> None:
    """Returns when these and everything that this process saved are in the store. Errors: see `flush`."""
    flushing.expect(reference["key"] for reference in saved)
    flushing.flush(deadline)


def say(decorator: str, text: str) -> None:
    """A line in the task's log."""
    print("[@%s] %s" % (decorator, text), file=sys.stderr, flush=True)


def warn(decorator: str, error: ModelcacheError) -> None:
    say(decorator, str(error).replace("\n", " "))


def _is_daemon_here() -> bool:
    return any(map(os.path.exists, (runtime.named_socket() or runtime.NODE_SOCKET, runtime.user_socket())))
