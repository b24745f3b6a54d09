"""@huggingface_hub: repos of the hub, fetched once and kept in the flow's store."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any, Optional

from metaflow.metaflow_current import current

from modelcache import forms, notes, shared_repos
from modelcache.tasks import Task

from .base import TaskDecorator

if TYPE_CHECKING:
    from modelcache.cards import Card


class HuggingfaceHubDecorator(TaskDecorator):
    """
    Fetches repos of the Hugging Face Hub once, and keeps them in the flow's store.

    Parameters
    ----------
    load : Union[List[str], List[Tuple[Dict, str]], List[Tuple[str, str]], List[Dict], None]
        Repos that the step needs: ids, or dicts of `snapshot_download`'s arguments, each alone or with a path.
    temp_dir_root : str, default None
        Where private, writable copies are made of what is loaded without a path.
    cache_scope : str, default "checkpoint"
        Who shares what was fetched: "checkpoint", tasks of this step in this namespace; "flow", the flow; "global", everybody.
    show_card : bool, default True
        Whether the step gets a card.

    MF Add To Current
    -----------------
    huggingface_hub -> modelcache.shared_repos.CurrentHuggingfaceHub
        Fetches and loads repos.
    """

    name = "huggingface_hub"
    defaults = {"load": None, "temp_dir_root": None, "cache_scope": "checkpoint", "show_card": True}

    def check(self) -> None:
        forms.check_choice(self.name, "cache_scope", self.attributes.get("cache_scope"), forms.CACHE_SCOPES)
        forms.wanted_repos(self.attributes.get("load"))

    def begin(self, task: Task, flow: Any) -> None:
        os.environ.update(task.environment())
        scope, root = self.attributes["cache_scope"], self.attributes.get("temp_dir_root")
        self._current = made = shared_repos.CurrentHuggingfaceHub(task, scope, root)
        made.load_repos(forms.wanted_repos(self.attributes.get("load")))
        current._update_env({"huggingface_hub": made})

    def end(self, task: Task, flow: Any, is_ok: bool) -> None:
        made = self._current
        try:
            self.settle([], is_ok)
        finally:
            if made.keys:
                self.record(task, "huggingface-hub", hf_loaded_models=json.dumps({"keys": list(dict.fromkeys(made.keys))}))
            made.loaded.release()

    def card(self, task: Task) -> Optional[Card]:
        loads = notes.loads(self.name)
        if not loads:
            return None
        from modelcache import cards

        return cards.of_repos(loads)
