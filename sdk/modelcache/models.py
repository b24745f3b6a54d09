"""Models of a task: saved with a label, loaded by reference, key or the name of an artifact that holds one."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any, Callable, Dict, List, Optional, Union

from . import artifacts, checkpoints, errors, keys, loaded, loading, notes, references, saving, tasks
from .errors import ModelcacheError
from .forms import WantedArtifact
from .tasks import Task

Path = Union[str, "os.PathLike[str]"]

DECORATOR = "model"
_FOLDER = "metaflow_models_%s"


class CurrentModel:
    """`current.model`: saves models of the running task, and loads what any task saved."""

    def __init__(self, task: Task, temp_dir_root: Optional[str] = None) -> None:
        self._task = task
        self._temp_dir_root = temp_dir_root
        self._loaded = loaded.Loaded(DECORATOR)
        self.saved: List[Dict[str, Any]] = []

    @property
    def loaded(self) -> loaded.Loaded:
        """Names to paths of what was loaded; `.info` has the references."""
        return self._loaded

    def save(
        self, path: Path, label: Optional[str] = None, metadata: Optional[Mapping[str, Any]] = None, storage_format: str = "tar"
    ) -> Dict[str, Any]:
        """Keeps a folder or a file as a model; goes on as soon as it is safe on this node.

        Args:
            label: a part of its key; None is "<flow>_<step>".
            metadata: a dict of plain data.
            storage_format: how it lies in the store, "tar" or "files".

        Returns: the reference, a dict; set it as an artifact, and later steps load it. Errors: see `modelcache.save`.
        """
        label = "%s_%s" % (self._task.flow, self._task.step) if label is None else label
        draft = {**saving.model_reference(path, label, self._task.pathspec, self._task.attempt), **self._task.marks}
        plain = None if metadata is None else dict(metadata)
        reference = saving.keep(path, draft, plain, storage_format, store=self._task.store)
        self.saved.insert(0, reference)
        return reference

    def load(self, reference: Any, path: Optional[Path] = None) -> str:
        """The folder with the model or checkpoint; `path`, with private files, if it is given.

        `reference`: what a save returned, its key, or an artifact object. LoadingException if it can't be loaded.
        In `loaded` it is called by its key, and by six digits of it.
        """
        if reference is None:
            raise ValueError("nothing to load: a reference is what a save returned, or its key")
        with _Translated("this"):
            key = str(artifacts.as_reference(reference)["key"])
            return self._load(reference, None if path is None else os.fspath(path), keys.json_hash(key)[:6], key)

    def load_artifacts(self, wanted: List[WantedArtifact], get: Callable[[str], Any], best_effort: bool) -> None:
        """What a decorator's `load` asks for; `get` gives an artifact of the flow, or raises AttributeError."""
        for name, path in wanted:
            try:
                with _Translated("the artifact `%s`" % name):
                    try:
                        reference = get(name)
                    except AttributeError:
                        raise errors.LoadingException(
                            "this step has no artifact `%s`" % name,
                            "an earlier step sets self.%s to what a save returned, or to its key; a join has none before it merges" % name,
                        ) from None
                    fields = artifacts.as_reference(reference)
                    kind = fields.get("type") or keys.type_of(fields["key"])
                    tasks.say(DECORATOR, "Loading Artifact with name `%s` [type:%s] with key: %s" % (name, kind, fields["key"]))
                    self._load(reference, path, name)
            except ModelcacheError as error:
                if not best_effort:
                    raise
                tasks.say(DECORATOR, "`%s` is not loaded: %s" % (name, error))

    def _load(self, reference: Any, path: Optional[str], name: str, *also: str) -> str:
        began = time.monotonic()
        store = checkpoints.store_of(reference, self._task)
        place, brought = loaded.put(reference, path, _FOLDER % name.replace("/", "_"), self._temp_dir_root, store)
        self._loaded.add(place, brought.reference, name, *also)
        kind, seconds = brought.reference.get("type"), time.monotonic() - began
        tasks.say(DECORATOR, "Loaded artifact `%s[type:%s]` in %.2f seconds" % (name, kind, seconds))
        notes.note(notes.Load(DECORATOR, name, brought.reference, brought.source, seconds, place.path, place.lease is not None))
        return place.path

    def __repr__(self) -> str:
        return "<CurrentModel %s %r>" % (self._task.pathspec, self._loaded)


class _Translated:
    """What can't be loaded is a LoadingException, whatever is wrong with it."""

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: Any, _: Any) -> None:
        is_ours = isinstance(error, (errors.ReferenceNotFoundError, errors.IncompatibleReferenceError))
        if is_ours or (isinstance(error, ValueError) and not isinstance(error, ModelcacheError)):
            raise errors.LoadingException("%s can't be loaded: %s" % (self._what, error)) from error


def load_model(reference: Any, path: Path) -> None:
    """Puts private files of a model or checkpoint into `path`, in a task and outside of any.

    `reference`: what a save returned, its key, or an artifact object. ValueError if one of the two is None;
    KeyNotCompatibleException for what is no key, KeyNotFoundError if nothing was saved under it.
    """
    if reference is None or path is None:
        raise ValueError("load_model takes a reference and a path")
    began = time.monotonic()
    brought = loading.bring(reference, path, checkpoints.store_of(reference, None))
    name = brought.reference.get("label") or brought.reference.get("name")
    notes.note(notes.Load(DECORATOR, str(name), brought.reference, brought.source, time.monotonic() - began, os.fspath(path)))


def delete_model(reference: Any) -> bool:
    """Takes a model or checkpoint out of the store; its bytes go with the next garbage collection. True; errors as in `load_model`."""
    if reference is None:
        raise ValueError("delete_model takes a reference")
    references.delete(reference, store=checkpoints.store_of(reference, None))
    return True
