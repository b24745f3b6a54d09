"""Wake-ups: they come, they come again after the library has failed, and none is expected where none comes."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from modelcache.watch_events import Events, is_silent

from .kernel import fuse
from .saves import until


class Woken:
    """Counts."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self.events = Events(self._event.set)

    def by(self, folder: Path, name: str) -> bool:
        """Whether something wakes it when a file of this name is made, again and again as the watching may not have begun."""
        self._event.clear()

        def is_woken() -> bool:
            with open(os.fsencode(folder) + b"/" + os.fsencode(name), "ab") as file:
                file.write(b"x")
            return self._event.wait(0.2)

        until(is_woken, 20.0)
        return True


def running() -> int:
    return sum(thread.name == "modelcache events" for thread in threading.enumerate())


@pytest.fixture
def woken() -> Iterator[Woken]:
    made = Woken()
    yield made
    made.events.end()
    until(lambda: not running())


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[int]:
    descriptor = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    yield descriptor
    os.close(descriptor)


def test_a_change_wakes(woken: Woken, folder: int, tmp_path: Path) -> None:
    (tmp_path / "deep/er").mkdir(parents=True)
    woken.events.follow(folder)
    assert woken.by(tmp_path, "a") and woken.by(tmp_path / "deep/er", "b")
    assert woken.events.is_working


def test_it_follows_the_folder_not_its_name(woken: Woken, folder: int, tmp_path: Path) -> None:
    woken.events.follow(folder)
    assert woken.by(tmp_path, "a")
    renamed = tmp_path.rename(tmp_path.with_name("renamed"))
    assert woken.by(renamed, "b")
    renamed.rename(tmp_path)


def test_another_folder_is_watched_instead(woken: Woken, folder: int, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = os.open(tmp_path / "other", os.O_RDONLY)
    woken.events.follow(folder)
    woken.events.follow(other)
    os.close(other)  # it keeps a descriptor of its own
    assert woken.by(tmp_path / "other", "a")
    until(lambda: running() == 1)


def test_a_name_that_ends_the_library_does_not_end_it(woken: Woken, folder: int, tmp_path: Path) -> None:
    woken.events.follow(folder)
    assert woken.by(tmp_path, "a")
    with open(os.fsencode(tmp_path) + b"/\xff", "wb"):
        pass
    assert woken.by(tmp_path, "b")
    os.unlink(os.fsencode(tmp_path) + b"/\xff")
    until(lambda: woken.by(tmp_path, "c") and woken.events.is_working)


def test_nothing_comes_from_a_server(tmp_path: Path, folder: int) -> None:
    assert not is_silent(folder)
    with fuse(tmp_path / "fuse") as mount:
        descriptor = os.open(mount, os.O_RDONLY | os.O_DIRECTORY)
        try:
            assert is_silent(descriptor)
            events = Events(lambda: None)
            events.follow(descriptor)
            assert not events.is_working and not running()
        finally:
            os.close(descriptor)
