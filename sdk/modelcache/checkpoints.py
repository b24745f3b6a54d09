"""Checkpoints of a task: saved under its identity, listed, and loaded by whoever does the same work next.

Every save has a key of its own, so no two writers (child processes, nodes of a gang, equal items of a foreach) meet in one.
A task prefers what itself saved: among the checkpoints of its identity those with other foreach indices are never its own, and
of a gang's those of its own node come first.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Dict, List, Optional, Tuple, Union

from . import artifacts, errors, folders, keys, loading, notes, references, saving, tasks, units
from .tasks import Task

if TYPE_CHECKING:
    from .watching import Watching

Path = Union[str, "os.PathLike[str]"]

POLICIES = ("fresh", "eager", "none")
DECORATOR = "checkpoint"


class Checkpoint:
    """Saves, lists and loads the checkpoints of the task that this process, or an ancestor of it, runs.

    In `with` it has a temporary `directory`; with `init_dir=True` from the beginning; otherwise from the first load on.
    """

    def __init__(self, temp_dir_root: Optional[str] = None, init_dir: bool = False) -> None:
        self._temp_dir_root = temp_dir_root
        self._directory: Optional[str] = None
        self._bound: Optional[Task] = None
        self._policy = "fresh"
        self.watches: List[Watching] = []  # that `watch` began
        if init_dir:
            self.refresh_directory()

    @property
    def directory(self) -> Optional[str]:
        """A private, writable folder, in which a loaded checkpoint lies; None before there is one."""
        return self._directory

    @property
    def task_identifier(self) -> str:
        return self._task.identifier

    def save(
        self,
        path: Optional[Path] = None,
        metadata: Optional[Mapping[str, Any]] = None,
        latest: bool = True,
        name: str = keys.DEFAULT_CHECKPOINT_NAME,
        storage_format: str = "files",
    ) -> Dict[str, Any]:
        """Keeps a folder (None: all of `directory`) or a file as a checkpoint of the task; goes on as soon as it is safe on this node.

        Args:
            metadata: a dict of plain data, see `modelcache.save`. A str is taken as the name, a dict as `name` for the metadata.
            latest: whether the next attempt, or an eager task, may load it by itself.

        Returns: the reference, a dict; `load` takes it or its key. Errors: see `modelcache.save`, and
        CheckpointException outside of a task, ValueError without a folder.
        """
        name, metadata, latest = _sorted_by_type(name, metadata, latest)
        if path is None:
            path = self._directory
        if path is None:
            raise ValueError("no path, and this Checkpoint has no directory: name one, or use Checkpoint(init_dir=True)")
        return save(self._task, path, name, metadata, latest, storage_format)

    def load(self, reference: Any, path: Optional[Path] = None) -> None:
        """Puts private, writable files of a checkpoint into `path`, or into a new `directory`.

        `reference`: what a save returned, its key, or an artifact object. Errors: see `modelcache.load`.
        """
        if reference is None:
            raise ValueError("nothing to load: a reference is what a save returned, or its key")
        if path is not None:
            self._bring(reference, path)
            return
        directory = self._new_directory()
        try:
            self._bring(reference, directory)
        except BaseException:
            folders.remove(directory)
            raise
        self._take(directory)

    def list(
        self,
        name: Optional[str] = None,
        task: Any = None,
        attempt: Union[int, str, None] = None,
        full_namespace: bool = False,
        as_dict: bool = True,
    ) -> List[Any]:
        """Checkpoints, newest first: of this task with all its attempts; of another task its latest attempt.

        Args:
            name: only those of this name.
            task: another task, a metaflow.Task or "flow/run/step/task".
            attempt: only those of this attempt.
            full_namespace: of all tasks that do the same work in this namespace, whatever their run. Not outside of a task.
            as_dict: False gives CheckpointArtifact objects.

        Raises: ValueError outside of a task without `task`, or with `full_namespace`.
        """
        number = None if attempt is None else int(attempt)
        is_inside = self._bound is not None or bool(os.environ.get(tasks.UID_VARIABLE))
        if not is_inside and full_namespace:
            raise ValueError("full_namespace=True is for the checkpoints of a running task; this process runs none")
        if task is not None:
            if full_namespace:
                tasks.say(DECORATOR, "list: `task` is given, so `full_namespace` has no effect")
            found = self._of_other(task, number)
        elif not is_inside:
            raise ValueError("this process runs no task: say which one, list(task='flow/run/step/task')")
        elif full_namespace:
            found = everything(self._task, name)
        else:
            found = made_by(self._task)
        chosen = [each for each in found if name in (None, each.get("name")) and number in (None, each.get("attempt"))]
        return chosen if as_dict else [artifacts.CheckpointArtifact(**each) for each in chosen]

    def watch(
        self,
        directory: Path,
        name: Optional[str] = None,
        *,
        keep: Optional[int] = None,
        keep_best: Optional[str] = None,
        every: Optional[float] = None,
        layout: str = "auto",
        resume: bool = True,
    ) -> Watching:
        """Keeps every checkpoint that a trainer writes into `directory` as one of the task, until the task ends or it is stopped.

        With `resume` the newest that an earlier attempt kept under this name (with the policy "eager" any task that does the same work)
        is first put back into `directory`. The other arguments and what is returned: see `modelcache.watch`.
        """
        from . import watch_client, watching

        task, path = self._task, watching.path_of(directory)
        called = watching.name_of(path, name)
        ask = watch_client.Ask(path, called, keep, keep_best, every, layout, task.store, task.pathspec, task.attempt)
        ask = ask._replace(folder=task.folder, marks={**task.marks, "latest": True})
        watched = watching.begin(ask, (lambda: _watched(task, self._policy, called)) if resume else None)
        self.watches.append(watched)
        if watched.restored is not None:
            notes.note(notes.Load(DECORATOR, called, watched.restored, "", 0.0, path))
        return watched

    def generate_key(self, name: str = keys.DEFAULT_CHECKPOINT_NAME, version_id: Optional[int] = None) -> str:
        """A key such as the next save gets. The last part of a key is its own: no two are the same."""
        task = self._task
        version = keys.next_version() if version_id is None else version_id
        return keys.checkpoint_key(keys.check_name(name, "name"), version, task.pathspec, task.attempt, task.folder)

    def refresh_directory(self) -> str:
        """A new, empty `directory`; the one before is removed."""
        directory = self._new_directory()
        self._take(directory)
        return directory

    def cleanup(self) -> None:
        """Removes the `directory`."""
        directory, self._directory = self._directory, None
        if directory is not None:
            folders.remove(directory)

    @property
    def _task(self) -> Task:
        return self._bound or tasks.of_environment()

    def _of_other(self, task: Any, attempt: Optional[int]) -> List[Dict[str, Any]]:
        """The checkpoints of another task; without `attempt` of its latest."""
        pathspec = task if isinstance(task, str) else getattr(task, "pathspec", None)
        if not isinstance(pathspec, str) or pathspec.count("/") != 3:
            raise ValueError("a task is a metaflow.Task or 'flow/run/step/task', not %r" % (task,))
        flow, _, step, _ = pathspec.split("/")
        found = references.of_task(_prefix(flow, step), pathspec, store=store_of(None, self._bound))
        last = max((each.get("attempt", 0) for each in found), default=0) if attempt is None else attempt
        return [each for each in found if each.get("attempt") == last]

    def _bring(self, reference: Any, path: Path) -> None:
        began = time.monotonic()
        brought = loading.bring(reference, path, store_of(reference, self._bound))
        name = str(brought.reference.get("name") or brought.reference.get("label"))
        notes.note(notes.Load(DECORATOR, name, brought.reference, brought.source, time.monotonic() - began, os.fspath(path)))

    def _new_directory(self) -> str:
        return folders.make("metaflow_checkpoint", self._temp_dir_root)

    def _take(self, directory: str) -> None:
        self.cleanup()
        self._directory = directory

    def __enter__(self) -> Checkpoint:
        if self._directory is None:
            self.refresh_directory()
        return self

    def __exit__(self, *_: object) -> None:
        self.cleanup()

    def __repr__(self) -> str:
        return "<%s %s>" % (type(self).__name__, self._directory)


class CurrentCheckpoint(Checkpoint):
    """`current.checkpoint`: the running task's. `directory` is always there."""

    def __init__(self, task: Task, temp_dir_root: Optional[str] = None) -> None:
        super().__init__(temp_dir_root, init_dir=True)
        self._bound = task
        self._info: Optional[artifacts.CheckpointArtifact] = None

    @property
    def is_loaded(self) -> bool:
        """Whether the task began with a checkpoint in its directory."""
        return self._info is not None

    @property
    def info(self) -> Optional[artifacts.CheckpointArtifact]:
        """What the task began with."""
        return self._info

    def save(  # type: ignore[override]  # both orders are what their users know; either takes the other's
        self,
        path: Optional[Path] = None,
        name: str = keys.DEFAULT_CHECKPOINT_NAME,
        metadata: Optional[Mapping[str, Any]] = None,
        latest: bool = True,
        storage_format: str = "files",
    ) -> Dict[str, Any]:
        """See `Checkpoint.save`; the arguments come in another order."""
        return super().save(path, metadata, latest, name, storage_format)

    def begin(self, policy: str) -> None:
        """What the policy says to load is loaded; what can't be is said, and the next older one taken."""
        self._policy = policy
        for reference in self._settled(policy):
            if units.is_watched(reference):  # belongs into the folder that is watched
                continue
            try:
                self.load(reference)
            except (errors.ReferenceNotFoundError, errors.IncompatibleReferenceError) as error:
                tasks.say(DECORATOR, "skipping %s: %s" % (reference["key"], error))
                continue
            self._info = artifacts.CheckpointArtifact(**reference)
            return

    def _settled(self, policy: str) -> List[Dict[str, Any]]:
        """What may be loaded, best first, when nothing better is on its way from another node, or that takes too long."""
        return references.settled(lambda: candidates(self._task, policy), lambda text: tasks.say(DECORATOR, text))


def save(
    task: Task, path: Path, name: str, metadata: Optional[Mapping[str, Any]], latest: bool, storage_format: str = "files"
) -> Dict[str, Any]:
    made = saving.checkpoint_reference(name, task.pathspec, task.attempt, task.folder)
    draft = {**made, **task.marks, "latest": bool(latest)}
    return saving.keep(path, draft, None if metadata is None else dict(metadata), storage_format, supersede=True, store=task.store)


def made_by(task: Task) -> List[Dict[str, Any]]:
    """Everything that the task saved, in all its attempts, newest first."""
    return _own(task, references.of_task(keys.checkpoints_in(task.folder), task.pathspec, store=task.store))


def everything(task: Task, name: Optional[str] = None) -> List[Dict[str, Any]]:
    """What was saved under the task's identity, in any run, newest first."""
    return _own(task, references.of_task(keys.checkpoints_in(task.folder), name=name, store=task.store))


def candidates(task: Task, policy: str) -> Tuple[List[Dict[str, Any]], List[Dict[str, Any]]]:
    """What a task that begins may load, best first; and what it might if other nodes had brought it, newest first."""
    if policy == "none" or (policy != "eager" and task.attempt == 0):
        return [], []
    now = (task.pathspec, task.attempt)  # other nodes of the gang may be saving already
    pathspec = None if policy == "eager" else task.pathspec
    listed = references.and_awaited(keys.checkpoints_in(task.folder), pathspec, store=task.store)
    found, awaited = (
        [each for each in _own(task, some) if each.get("latest", True) and (each.get("pathspec"), each.get("attempt")) != now]
        for some in listed
    )
    return sorted(found, key=lambda each: _distance(task, each)), awaited  # stable: newest first


def _watched(task: Task, policy: str, name: str) -> Tuple[List[Dict[str, Any]], List[Dict[str, Any]]]:
    """As `candidates`, of what a watch kept."""
    from . import resume

    found, awaited = ([each for each in some if each.get("name") == name] for some in candidates(task, policy))
    return sorted(resume.best_first(found), key=lambda each: _distance(task, each)), awaited


def store_of(reference: Any, task: Optional[Task]) -> Optional[str]:
    """The store to look into: the reference's own, else the task's."""
    named = reference.get("store") if isinstance(reference, Mapping) else getattr(reference, "store", None)
    if named is not None:
        return str(named)
    if task is None and os.environ.get(tasks.UID_VARIABLE):
        task = tasks.of_environment()
    return tasks.store_in(tasks.default_datastore()) if task is None else task.store


def _own(task: Task, found: List[Dict[str, Any]]) -> List[Dict[str, Any]]:
    """Without those of equal items. Older references don't say."""
    return [each for each in found if each.get("foreach_index") in (None, task.branch)]


def _distance(task: Task, each: Dict[str, Any]) -> Tuple[bool, bool]:
    """The task's own come first, and of a gang's those of its node."""
    return each.get("pathspec") != task.pathspec, task.node is not None and each.get("node_index") != task.node


def _prefix(flow: str, step: str) -> str:
    return keys.checkpoints_in("%s/%s" % (flow, step))


def _sorted_by_type(name: Any, metadata: Any, latest: Any) -> Tuple[str, Optional[Mapping[str, Any]], bool]:
    """The three in any order: `Checkpoint.save` and `current.checkpoint.save` differ, and are used one for the other."""
    given = (name, metadata, latest)
    texts = [each for each in given if isinstance(each, str)]
    dicts = [each for each in given if isinstance(each, Mapping)]
    flags = [each for each in given if isinstance(each, bool)]
    others = [each for each in given if each is not None and not isinstance(each, (str, Mapping, bool))]
    if others or max(len(texts), len(dicts), len(flags)) > 1:
        raise ValueError("name is a str, metadata a dict, latest a bool, not %r, %r, %r" % given)
    return (texts[0] if texts else keys.DEFAULT_CHECKPOINT_NAME), (dicts[0] if dicts else None), (flags[0] if flags else True)
