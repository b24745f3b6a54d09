"""What the decorators have in common: who the task is, and that it ends when the store has what it saved.

Metaflow calls `task_exception` of every decorator when one fails, those too whose `task_pre_step` never ran.
"""

from __future__ import annotations

import abc
import os
import time
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Dict, Iterator, List, Optional, Tuple

from metaflow import flowspec
from metaflow.decorators import StepDecorator
from metaflow.metadata_provider import MetaDatum
from metaflow.metaflow_current import current
from metaflow.unbounded_foreach import UBF_CONTROL

import modelcache
from metaflow_extensions.modelcache.client import SDK, datastore_url
from modelcache import flushing, forms, identity, progress, tasks
from modelcache.errors import ArgumentException, ModelcacheError
from modelcache.tasks import Task

if TYPE_CHECKING:
    from modelcache.cards import Card

HIDDEN = ("_task_checkpoints", "_task_latest_checkpoint", "_task_stored_models")
_has_said_who = False
_CONTROL_TASK = "MF_PARALLEL_CONTROL_TASK_ID"

flowspec.INTERNAL_ARTIFACTS_SET.update(HIDDEN)  # merge_artifacts leaves them alone


class TaskDecorator(StepDecorator, abc.ABC):  # type: ignore[misc]  # Metaflow is not typed
    """Subclasses check their attributes in `check`, set `current.<name>` in `begin`, and record in `end` what the task did."""

    defaults: Dict[str, Any] = {}
    _task: Optional[Task] = None
    waited_seconds = 0.0  # for the store, at the task's end

    @abc.abstractmethod
    def check(self) -> None:
        """ArgumentException (a ValueError) for attributes that make no sense."""

    @abc.abstractmethod
    def begin(self, task: Task, flow: Any) -> None: ...

    @abc.abstractmethod
    def end(self, task: Task, flow: Any, is_ok: bool) -> None: ...

    @abc.abstractmethod
    def card(self, task: Task) -> Optional[Card]:
        """What the task's card says once `end` has run; None, and nothing imported for it, if the task loaded and saved nothing."""

    def step_init(self, flow: Any, graph: Any, step_name: str, decorators: Any, environment: Any, flow_datastore: Any, logger: Any) -> None:
        self.check()
        forms.check_temp_dir_root(self.name, self.attributes.get("temp_dir_root"))
        if not isinstance(self.attributes.get("show_card"), bool):
            raise ArgumentException("@%s: show_card is True or False, not %r" % (self.name, self.attributes.get("show_card")))
        datastore_url(flow_datastore.TYPE, flow_datastore.datastore_root or "")

    def add_to_package(self) -> Iterator[Tuple[str, str]]:
        """The SDK travels to where the tasks run, unless it does so anyway: it needs nothing but Python."""
        for name in () if hasattr(modelcache, "METAFLOW_PACKAGE_POLICY") else sorted(os.listdir(SDK)):
            if name.endswith((".py", ".typed")):
                yield os.path.join(SDK, name), "modelcache/" + name

    def runtime_init(self, flow: Any, graph: Any, package: Any, run_id: Any) -> None:
        global _has_said_who
        if not _has_said_who and find_spec("metaflow_extensions.obcheckpoint") is not None:
            _has_said_who = True
            tasks.say(
                self.name,
                "modelcached is in charge of @checkpoint, @model, @huggingface_hub, Checkpoint and load_model; metaflow-checkpoint is "
                "there too, and has no part in this run (pip uninstall metaflow-checkpoint: what it saved loads all the same)",
            )

    def task_pre_step(
        self,
        step_name: str,
        task_datastore: Any,
        metadata: Any,
        run_id: str,
        task_id: str,
        flow: Any,
        graph: Any,
        retry_count: int,
        max_user_code_retries: int,
        ubf_context: Any,
        inputs: Any,
    ) -> None:
        progress.draw_in_log()
        self._metadata = metadata
        self._own_id = (run_id, step_name, task_id)
        self._datastore = backend = task_datastore.parent_datastore
        datastore = datastore_url(backend.TYPE, backend.datastore_root)
        task = _identify(step_name, run_id, task_id, flow, graph, retry_count, ubf_context, datastore)
        self.begin(task, flow)
        self._task = task

    def task_post_step(self, step_name: str, flow: Any, graph: Any, retry_count: int, max_user_code_retries: int) -> None:
        task, self._task = self._task, None
        if task is not None:
            try:
                self.end(task, flow, True)
            finally:
                self._show_card(task)

    def task_exception(
        self, exception: BaseException, step_name: str, flow: Any, graph: Any, retry_count: int, max_user_code_retries: int
    ) -> None:
        task, self._task = self._task, None
        if task is not None:
            try:
                self.end(task, flow, False)
            except ModelcacheError as error:  # the task's own failure is the one to be seen
                tasks.warn(self.name, error)
            finally:
                self._show_card(task)

    def settle(self, saved: List[Dict[str, Any]], is_ok: bool) -> None:
        """The next step, on any node, finds what was saved. A task that failed waits for so long only as a process at its exit does."""
        began = time.monotonic()
        try:
            tasks.settle(saved, None if is_ok else flushing.exit_seconds())
        finally:
            self.waited_seconds = time.monotonic() - began

    def record(self, task: Task, kind: str, **fields: str) -> None:
        """In the task's metadata, so that lineage can be followed."""
        tags = ["attempt_id:%d" % task.attempt]
        data = [MetaDatum(field=name.replace("_", "-"), value=value, type=kind, tags=tags) for name, value in fields.items()]
        self._metadata.register_metadata(*self._own_id, data)

    def _show_card(self, task: Task) -> None:
        try:
            card = self.card(task) if self.attributes["show_card"] else None
            if card is not None:
                from . import drawing

                uuid, said = drawing.keep(card, "/".join((task.flow, *self._own_id)), self._datastore)
                self._metadata.register_metadata(*self._own_id, [drawing.metadata(uuid, said, task.attempt)])
        except Exception as error:  # whatever may be wrong with a card, it is not the task's failure
            tasks.say(self.name, "no card: %s: %s" % (type(error).__name__, error))


def _identify(step_name: str, run_id: str, task_id: str, flow: Any, graph: Any, retry_count: int, ubf_context: Any, datastore: str) -> Task:
    stack = flow.foreach_stack() or []
    control, node = None, None
    if getattr(graph[step_name], "parallel_step", False):
        # Of the control task this is said in its environment only after the step has begun.
        control = task_id if ubf_context == UBF_CONTROL else os.environ.get(_CONTROL_TASK)
    outer = [str(index) for index, _, _ in stack]
    if control is not None and stack:
        outer.pop()
        node = stack[-1][0] or 0
    return Task(
        flow=flow.name,
        run=str(run_id),
        step=step_name,
        task=str(control or task_id),
        identifier=identity.task_identifier(step_name, [(index, item) for index, _, item in stack], control is not None),
        scope=identity.scope_of(current.namespace, current.tags or ()),
        attempt=int(retry_count),
        branch="/".join(outer),
        node=node,
        datastore=datastore,
    )
