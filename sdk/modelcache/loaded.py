"""What a task has loaded: a read-only mapping from names to paths, and beside it what each of them is."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Tuple

from . import folders, loading, tasks
from .leases import Lease


class Place(NamedTuple):
    """Where something loaded is, until it is given back."""

    path: str
    lease: Optional[Lease] = None  # on the shared view at `path`
    is_temporary: bool = False

    def release(self) -> None:
        if self.lease is not None:
            self.lease.close()
        if self.is_temporary:
            folders.remove(self.path)


class Loaded(Mapping):  # type: ignore[type-arg]  # not subscriptable in Python 3.9's runtime through typing
    """Names to paths. `info` has what is known of each."""

    def __init__(self, decorator: str) -> None:
        self._decorator = decorator
        self._places: Dict[str, Place] = {}
        self._info: Dict[str, Dict[str, Any]] = {}

    @property
    def info(self) -> Mapping[str, Dict[str, Any]]:
        return MappingProxyType(self._info)

    def cleanup(self, name: Optional[str] = None) -> None:
        """Gives one of them back, or all: a folder is removed, a path that was asked for too; the shared view stays where it is."""
        for each in list(self._places) if name is None else [name]:
            place = self._place(each)
            place.release()
            if place.lease is None and not place.is_temporary:
                shutil.rmtree(place.path, ignore_errors=True)
            for other in [other for other, its in self._places.items() if its is place]:
                del self._places[other]
                self._info.pop(other, None)

    def add(self, place: Place, info: Dict[str, Any], *called: str) -> None:
        for name in called:
            if name in self._places and self._places[name].path != place.path:
                tasks.say(self._decorator, "`%s` is loaded more than once: its path is now %s" % (name, place.path))
            self._places[name] = place
            self._info[name] = info

    def release(self) -> None:
        """The task is over: what was asked for by path stays."""
        for place in self._places.values():
            place.release()

    def __getitem__(self, name: str) -> str:
        return self._place(name).path

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __repr__(self) -> str:
        return "<loaded %s>" % {name: place.path for name, place in self._places.items()}

    def _place(self, name: str) -> Place:
        try:
            return self._places[name]
        except KeyError:
            there = ", ".join(map(repr, self._places)) or "nothing"
            raise KeyError("%r is not loaded; loaded is: %s" % (name, there)) from None


def put(
    reference: Any, path: Optional[str], called: str, temp_dir_root: Optional[str], store: Optional[str], for_block: bool = False
) -> Tuple[Place, loading.Brought]:
    """Loads to `path`; without one to a folder of its own below `temp_dir_root`; without that it is the shared view.

    Who gets private files instead of the view gets those of the whole process, which end with it; `for_block`, files of the place's own.
    """
    made: List[str] = []

    def make() -> str:
        made.append(folders.make(called, temp_dir_root))
        return made[0]

    try:
        if path is None and temp_dir_root is not None:
            return Place(make(), None, True), loading.bring(reference, made[0], store)
        brought = loading.bring(reference, path, store, make if for_block else None)
        return Place(brought.path if path is None else os.fspath(path), brought.lease, bool(made)), brought
    except BaseException:
        for folder in made:
            folders.remove(folder)
        raise
