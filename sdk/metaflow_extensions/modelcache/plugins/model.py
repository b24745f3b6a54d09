"""@model: models that the task saves, and those it loads."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Optional

from metaflow.metaflow_current import current

from modelcache import forms, models, notes
from modelcache.errors import ArgumentException
from modelcache.tasks import Task

from .base import TaskDecorator

if TYPE_CHECKING:
    from modelcache.cards import Card

_RECORDED = 20  # keys of what was saved, in the task's metadata


class ModelDecorator(TaskDecorator):
    """
    Enables loading and saving of models within a step.

    Parameters
    ----------
    load : Union[List[str], str, List[Tuple[str, Union[str, None]]]], default None
        Names of artifacts that hold what a save returned, or its key. With a path the files are put there; without one
        they are a shared, read-only folder.
    temp_dir_root : str, default None
        Where private, writable copies are made of what is loaded without a path.
    best_effort_load : bool, default False
        What can't be loaded is said in the log, and the step runs without it.
    show_card : bool, default True
        Whether the step gets a card.

    MF Add To Current
    -----------------
    model -> modelcache.models.CurrentModel
        Saves and loads models.
    """

    name = "model"
    defaults = {"load": None, "temp_dir_root": None, "best_effort_load": False, "show_card": True}

    def check(self) -> None:
        forms.wanted_artifacts(self.attributes.get("load"))
        if not isinstance(self.attributes.get("best_effort_load"), bool):
            raise ArgumentException("@model: best_effort_load is True or False, not %r" % (self.attributes["best_effort_load"],))

    def begin(self, task: Task, flow: Any) -> None:
        self._current = made = models.CurrentModel(task, self.attributes.get("temp_dir_root"))
        wanted = forms.wanted_artifacts(self.attributes.get("load"))
        made.load_artifacts(wanted, lambda name: getattr(flow, name), self.attributes["best_effort_load"])
        current._update_env({"model": made})

    def end(self, task: Task, flow: Any, is_ok: bool) -> None:
        made = self._current
        try:
            self.settle(made.saved, is_ok)
        finally:
            flow._task_stored_models = list(made.saved)
            keys = list(dict.fromkeys(each["key"] for each in made.loaded.info.values()))
            if keys:
                self.record(task, "model-registry", loaded_models=json.dumps({"keys": keys}))
            if made.saved and is_ok:
                latest = [each["key"] for each in made.saved[:_RECORDED]]
                self.record(task, "model-registry", saved_models=json.dumps({"keys": latest}))
            made.loaded.release()

    def card(self, task: Task) -> Optional[Card]:
        saved, loads = self._current.saved, notes.loads(self.name)
        if not (saved or loads):
            return None
        from modelcache import cards

        return cards.of_models(task.pathspec, task.attempt, saved, loads, notes.loads())
