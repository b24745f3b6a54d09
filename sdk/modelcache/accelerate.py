"""Helpers for Hugging Face Accelerate: the newest `save_state` of a project, and `load_state` from wherever a state was kept.

Of the processes of one node the main one brings the bytes, the others wait for it; then each has the state's folder and loads.
Accelerate itself is never imported here: whoever passes an Accelerator has imported it.
"""

from __future__ import annotations

import dataclasses
import os
import re
from typing import Any, Dict, Mapping, Union

from . import files, keys, loading, views
from .errors import IncompatibleReferenceError

Path = Union[str, "os.PathLike[str]"]

_LAST_NUMBER = re.compile(r".*?(\d+)", re.DOTALL)  # "checkpoint_12"
# What Accelerate calls the weights of its models: the first, then model_1, model_2; a large one in shards, with an index.
_NAMES = r"(_\d+)?(-\d+-of-\d+)?\.%s(\.index\.json)?"
_SAFE = re.compile("model" + _NAMES % "safetensors")
_UNSAFE = re.compile("pytorch_model" + _NAMES % "bin")


def get_accelerate_project_last_checkpoint_id(project_dir: Path) -> int:
    """The number of the newest checkpoint that `Accelerator.save_state` made with automatic names.

    Args:
        project_dir: the project's folder; the checkpoints are the folders in `checkpoints` in it.

    Returns:
        The highest number; -1 if there is no folder `checkpoints`, or nothing in it.

    Raises:
        ValueError: nothing in it is the folder of a checkpoint. Where some are, a warning names what else is there.
    """
    folder = os.path.join(os.fspath(project_dir), "checkpoints")
    try:
        names = sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return -1
    if not names:
        return -1
    found, others = [], []
    for name in names:
        number = _LAST_NUMBER.fullmatch(name)
        if number and os.path.isdir(os.path.join(folder, name)):
            found.append(int(number.group(1)))
        else:
            others.append(name)
    shown = ", ".join(map(repr, others[:5])) + (", ..." if len(others) > 5 else "")
    if not found:
        raise ValueError("%s has no checkpoint, a folder whose name ends with a number; there is: %s" % (folder, shown))
    if others:
        views.warn("in %s these are no checkpoints: %s" % (folder, shown))
    return max(found)


def accelerator_load_state(accelerator: Any, input_dir: Any, cache_dir: Any = None, safe_serialization: bool = True, **kwargs: Any) -> None:
    """`accelerator.load_state`, from a local folder or from what a save or a store holds. Every process of the job calls it.

    Args:
        accelerator: the Accelerator.
        input_dir: a local folder; a reference, its key or its URL; or the URL of a folder in a store that the daemon serves,
            such as "s3://bucket/run/checkpoints/checkpoint_3". An existing folder is never taken for a key.
        cache_dir: an existing local folder; what is not local is put into a folder of its own in there, as private files. None
            uses the daemon's shared files, and keeps them no longer than it takes.
        safe_serialization: how the state was saved, by which its weights are called (model.safetensors or pytorch_model.bin).
            Not looked at for a local folder.
        kwargs: of `accelerator.load_state`.

    Raises:
        ValueError: no such local folder; no such `cache_dir`; the weights are there under the other spelling. Nothing is loaded then.
        What `modelcache.load` raises, and what `accelerator.load_state` does.
    """
    if _is_local(input_dir):
        if not os.path.exists(input_dir):
            raise ValueError("there is no folder %s to load a state from" % os.fspath(input_dir))
        accelerator.load_state(os.fspath(input_dir), **kwargs)
        return
    if cache_dir is not None and not os.path.isdir(cache_dir):
        raise ValueError("cache_dir is an existing folder, and %s is none" % os.fspath(cache_dir))
    if accelerator.is_local_main_process:
        try:
            state = _State(input_dir, cache_dir, True)
        finally:
            accelerator.wait_for_everyone()  # whatever became of it: the others wait there
    else:
        accelerator.wait_for_everyone()
        state = _State(input_dir, cache_dir, False)
    try:
        _check_spelling(state.path, safe_serialization)
        accelerator.load_state(state.path, **kwargs)
    finally:
        state.close()


class _State:
    """A state that came through the daemon, as this process sees it. Whoever asks second moves no byte."""

    def __init__(self, source: Any, cache_dir: Any, is_first: bool) -> None:
        self._brought = _bring(source)
        self.path = self._brought.path
        if cache_dir is not None:
            # Named by its content: what else was put there, for another state or by a part of an earlier try, is never mixed in.
            self.path = os.path.join(os.fspath(cache_dir), "state-%s" % self._brought.tree[:16])
            try:
                if is_first:
                    files.copy_tree(self._brought.path, self.path)
            finally:
                self.close()

    def close(self) -> None:
        """Gives the shared files back."""
        if self._brought.lease is not None:
            self._brought.lease.close()


@dataclasses.dataclass
class AcceleratorState:
    """A dataclass to inherit from, for progress that is to be saved and loaded with a state.

        @dataclass
        class Progress(AcceleratorState):
            epoch: int = 0
            step: int = 0

        accelerator.register_for_checkpointing(progress)
    """

    def state_dict(self) -> Dict[str, Any]:
        """Every field of the class and its value."""
        return {name: getattr(self, name) for name in self._names()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes the values over; a field that `state` has not keeps its own. KeyError, before anything changes, for an unknown name."""
        known = self._names()
        unknown = [name for name in state if name not in known]
        if unknown:
            raise KeyError("%s has no field %s; it has: %s" % (type(self).__name__, ", ".join(map(repr, unknown)), ", ".join(known)))
        for name in state:
            setattr(self, name, state[name])

    def _names(self) -> Dict[str, None]:
        for kind in type(self).__mro__:
            own = vars(kind)
            if "__dataclass_fields__" not in own and ("__annotations__" in own or "__annotate_func__" in own):
                raise TypeError("%s is no dataclass, so its fields would be lost: write @dataclass above it" % kind.__name__)
        return dict.fromkeys(field.name for field in dataclasses.fields(self))


def _is_local(source: Any) -> bool:
    if isinstance(source, os.PathLike):
        return True
    if not isinstance(source, str) or "://" in source:
        return False
    if os.path.isabs(source) or os.path.exists(source):
        return True
    try:
        keys.type_of(source)
    except IncompatibleReferenceError:
        return True  # a mere path, and nothing is there
    return False


def _bring(source: Any) -> loading.Brought:
    if isinstance(source, str) and "://" in source and not keys.is_url(source):
        return loading.bring_folder(source)
    return loading.bring(source)


def _check_spelling(folder: str, safe_serialization: bool) -> None:
    """Where a state has weights under Accelerate's own names, some of them are spelt as the caller says."""
    names = sorted(os.listdir(folder))
    wanted, other = (_SAFE, _UNSAFE) if safe_serialization else (_UNSAFE, _SAFE)
    others = [name for name in names if other.fullmatch(name)]
    if others and not any(map(wanted.fullmatch, names)):
        spelt = ("model.safetensors", "pytorch_model.bin")
        raise ValueError(
            "safe_serialization=%r looks for %s, and the state has %s: it was saved with safe_serialization=%r"
            % (bool(safe_serialization), spelt[not safe_serialization], others[0], not safe_serialization)
        )
