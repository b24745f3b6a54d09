"""Repos of the hub as a flow knows them: fetched once, then what the store has of them under the scope, until somebody asks anew.

A hit never asks the hub, however its branches move: the reference names the commit it got. Only a private or gated repo is
asked about, with the caller's own token. `force_download=True` asks the hub, and becomes the newest of its scope.
"""

from __future__ import annotations

import contextlib
import os
import time
from typing import Any, ContextManager, Dict, Iterator, List, NamedTuple, Optional, Tuple

from . import checkpoints, client, forms, hub, identity, keys, loaded, names, notes, references, saving, tasks
from .loaded import Place
from .tasks import Task

DECORATOR = "huggingface_hub"
_FOLDER = "metaflow_hf_%s"
_REGISTRY = "huggingface"


class Found(NamedTuple):
    reference: Dict[str, Any]
    is_hit: bool
    forced: bool
    source: str  # the tier that a fetch took it from; "" for a hit
    began: float  # of the monotonic clock


class CurrentHuggingfaceHub:
    """`current.huggingface_hub`."""

    def __init__(self, task: Task, cache_scope: str = "checkpoint", temp_dir_root: Optional[str] = None) -> None:
        self._task = task
        self._folder = identity.repo_folder(cache_scope, task.flow, task.folder)
        self._is_own = cache_scope == "checkpoint"
        self._temp_dir_root = temp_dir_root
        self._loaded = loaded.Loaded(DECORATOR)
        self.keys: List[str] = []  # what the task loaded or fetched

    @property
    def loaded(self) -> loaded.Loaded:
        """Ids of repos to paths; `.info` has the references."""
        return self._loaded

    def snapshot_download(self, repo_id: Optional[str] = None, **kwargs: Any) -> Dict[str, Any]:
        """A reference to the repo in the store, which any later step loads with @model; fetched from the hub if the scope has none.

        Takes what huggingface_hub's `snapshot_download` takes. Errors: its, and ValueError without a repo_id.
        """
        for name in ("local_dir", "cache_dir"):
            if kwargs.pop(name, None) is not None:
                tasks.say(DECORATOR, "`%s` has no effect: what is returned is a reference, not a folder" % name)
        arguments = forms.repo_arguments({"repo_id": repo_id, **kwargs})
        found = self._find(arguments)
        self._note(arguments, found, found.source)
        return found.reference

    @contextlib.contextmanager
    def _loading(self, arguments: Dict[str, Any], path: Optional[str]) -> Iterator[str]:
        found = self._find(arguments)
        place, _ = self._put(arguments, found, path, for_block=True)
        try:
            yield place.path
        finally:
            place.release()

    def load(self, repo_id: Optional[str] = None, path: Any = None, repo_type: str = "model", **kwargs: Any) -> ContextManager[str]:
        """For a `with` block: the repo's folder, given back at its end; `path`, with private files that stay, if it is given.

        More arguments are those of huggingface_hub's `snapshot_download`.
        """
        if kwargs.pop("local_dir", None) is not None:
            tasks.say(DECORATOR, "`local_dir` has no effect: load(repo_id, path=...)")
        arguments = forms.repo_arguments({"repo_id": repo_id, "repo_type": repo_type, **kwargs})
        return self._loading(arguments, None if path is None else os.fspath(path))

    def load_repos(self, wanted: List[forms.WantedRepo]) -> None:
        """What a decorator's `load` asks for."""
        for arguments, path, ignored in wanted:
            if ignored:
                tasks.say(DECORATOR, '%s has no effect; the form is load=[({"repo_id": "org/name"}, "./folder")]' % ignored)
            found = self._find(arguments)
            place, known = self._put(arguments, found, path)
            shown = {name: value for name, value in arguments.items() if name not in ("token", "headers")}
            more = {"hf_kwargs": shown, "cache_hit": found.is_hit, "force_download": found.forced}
            self._loaded.add(place, {**known, **more}, arguments["repo_id"])

    def _find(self, arguments: Dict[str, Any]) -> Found:
        began = time.monotonic()
        arguments = dict(arguments)
        allow, ignore = (names.patterns_of(arguments.get(name)) for name in ("allow_patterns", "ignore_patterns"))
        revision = names.revision_of(arguments.get("revision"))
        name = identity.repo_name(arguments["repo_id"], arguments["repo_type"], revision, allow, ignore)
        forced = bool(arguments.get("force_download"))
        known = None if forced else self._known(name)
        if known is not None:
            if known.get("metadata", {}).get("private"):
                self._ask_leave(arguments, known)
            self.keys.append(known["key"])
            return Found(known, True, False, "", began)
        reference, source = self._fetch(arguments, name, revision, allow, ignore)
        self.keys.append(reference["key"])
        return Found(reference, False, forced, source, began)

    def _known(self, name: str) -> Optional[Dict[str, Any]]:
        found = references.of_task(keys.checkpoints_in(self._folder, keys.REPOS), name=name, store=self._task.store)
        if self._is_own:
            found = [each for each in found if each.get("foreach_index") in (None, self._task.branch)]
        found = [each for each in found if not self._may_be_partial(each)]
        return found[0] if found else None

    def _may_be_partial(self, reference: Dict[str, Any]) -> bool:
        """metaflow-checkpoint called all selections of a repo the same in a task's own scope, and did not always say which it is."""
        metadata = reference.get("metadata") or {}
        if "commit" in metadata or not self._is_own:
            return False
        said = metadata.get("kwargs")
        return said is None or any(said.get(name) is not None for name in ("revision", "allow_patterns", "ignore_patterns"))

    def _ask_leave(self, arguments: Dict[str, Any], known: Dict[str, Any]) -> None:
        """The hub's word on whether this caller may have the repo, or the daemon's memory of it."""
        asked = {**arguments, "revision": known["metadata"].get("commit") or arguments.get("revision")}
        client.shared().plan(hub.request_for(**_of_request(asked)))

    def _fetch(
        self, arguments: Dict[str, Any], name: str, revision: str, allow: Optional[List[str]], ignore: Optional[List[str]]
    ) -> Tuple[Dict[str, Any], str]:
        """What is now in the store, and the tier that it came from."""
        metadata = {
            "repo_id": arguments["repo_id"],
            "repo_type": arguments["repo_type"],
            "registry": _REGISTRY,
            "revision": revision,
            "allow_patterns": allow,
            "ignore_patterns": ignore,
        }
        fetched = hub.fetch(hub.request_for(**_of_request(arguments)), arguments.get("tqdm_class"))
        try:
            reply = fetched.reply
            draft = saving.checkpoint_reference(name, self._task.pathspec, self._task.attempt, self._folder, keys.REPOS)
            metadata.update(commit=reply.commit, private=reply.private)
            source = "hub" if reply.hub_bytes else "store" if reply.store_bytes else "disk"
            return saving.keep_tree(reply.tree, {**draft, **self._task.marks}, metadata, self._task.store), source
        finally:
            fetched.lease.close()

    def _put(
        self, arguments: Dict[str, Any], found: Found, path: Optional[str], for_block: bool = False
    ) -> Tuple[Place, Dict[str, Any]]:
        reference = found.reference
        store = checkpoints.store_of(reference, self._task)
        place, brought = loaded.put(reference, path, _FOLDER % reference["name"], self._temp_dir_root, store, for_block)
        text = "Loading model from datastore to %s. Model being loaded: %s"
        tasks.say(DECORATOR, text % (place.path, reference["key"]))
        self._note(arguments, found, found.source or brought.source, place)
        return place, brought.reference

    def _note(self, arguments: Dict[str, Any], found: Found, source: str, place: Optional[Place] = None) -> None:
        path, is_view = (None, False) if place is None else (place.path, place.lease is not None)
        seconds = time.monotonic() - found.began
        notes.note(notes.Load(DECORATOR, arguments["repo_id"], found.reference, source, seconds, path, is_view))

    def __repr__(self) -> str:
        return "<CurrentHuggingfaceHub %s %r>" % (self._folder, self._loaded)


def _of_request(arguments: Dict[str, Any]) -> Dict[str, Any]:
    return {name: arguments[name] for name in hub.REQUEST if name in arguments}
