"""@checkpoint: the task's checkpoints, and what it begins with."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Dict, List, Optional

from metaflow.metaflow_current import current

from modelcache import checkpoints, errors, notes, tasks
from modelcache.tasks import Task

from .base import TaskDecorator

if TYPE_CHECKING:
    from modelcache.cards import Card


class CheckpointDecorator(TaskDecorator):
    """
    Enables checkpointing for a step.

    Parameters
    ----------
    load_policy : str, default "fresh"
        What the task begins with. "fresh": the last checkpoint of its own earlier attempts. "eager": that, else the last one that
        any task of this step saved in the namespace, in whichever run. "none": nothing.
    watch : str, default None
        A folder that a trainer writes into: each checkpoint that appears there is kept, and what an earlier attempt (with "eager": any
        task) kept of it is put back first, where the trainer's own resume finds it. `current.checkpoint.watch` does the same, and more.
    temp_dir_root : str, default None
        Where `current.checkpoint.directory` is made.
    show_card : bool, default True
        Whether the step gets a card.

    MF Add To Current
    -----------------
    checkpoint -> modelcache.checkpoints.CurrentCheckpoint
        Saves, lists and loads checkpoints of the task.
    """

    name = "checkpoint"
    defaults = {"load_policy": "fresh", "watch": None, "temp_dir_root": None, "show_card": True}
    _saved: List[Dict[str, Any]] = []  # in all attempts

    def check(self) -> None:
        policy = self.attributes.get("load_policy")
        if policy is not None and policy not in checkpoints.POLICIES:
            raise errors.CheckpointException(
                "@checkpoint: load_policy is %s, not %r" % (" or ".join(map(repr, checkpoints.POLICIES)), policy)
            )

        watch = self.attributes.get("watch")
        if watch is not None and not (isinstance(watch, str) and watch):
            raise errors.CheckpointException("@checkpoint: watch is the path of a folder, not %r" % (watch,))

    def begin(self, task: Task, flow: Any) -> None:
        os.environ.update(task.environment())
        made = checkpoints.CurrentCheckpoint(task, self.attributes.get("temp_dir_root"))
        made.begin(self.attributes.get("load_policy") or "fresh")
        current._update_env({"checkpoint": made})
        self._current = made
        known = None if made.info is None else made.info.to_dict()
        if self.attributes.get("watch"):
            known = made.watch(self.attributes["watch"]).restored or known
        if known is not None:
            fields = {"checkpoint_load_%s" % name: str(known.get(name)) for name in ("key", "pathspec", "attempt", "name")}
            self.record(task, "checkpoint", **fields)

    def end(self, task: Task, flow: Any, is_ok: bool) -> None:
        for watched in self._current.watches:
            try:
                status = watched.stop()
            except errors.ModelcacheError as error:  # what was kept by then is waited for below
                tasks.warn(self.name, error)
                continue
            from modelcache import watching  # with all that a watch needs: only here is it loaded already

            for text in watching.uncaptured(status):
                tasks.say(self.name, text)
        self._saved = tasks.saved_by(task)
        saved = [each for each in self._saved if each.get("attempt") == task.attempt]
        try:
            self.settle(saved, is_ok)
        finally:
            flow._task_checkpoints = saved
            flow._task_latest_checkpoint = next((each for each in saved if each.get("latest", True)), None)
            self._current.cleanup()

    def card(self, task: Task) -> Optional[Card]:
        loads = notes.loads(self.name)
        if not (loads or self._saved):
            return None
        from modelcache import cards

        began_with = self._current.info
        return cards.of_checkpoints(self._saved, loads, None if began_with is None else began_with.key, self.waited_seconds)
