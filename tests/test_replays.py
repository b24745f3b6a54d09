"""Trainers that can't run here, replayed: what they write is captured whole, never early, and put back as their own resume expects it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import modelcache
from modelcache import candidates, gates, layouts, scanning
from modelcache.client import shared

from .daemon import Daemon
from .replays import DONE, OPEN, REPLAYS, Replay
from .saves import until

SETTLE = 0.3  # seconds, instead of the rules' own: the replays pause where a reader can see that more is to come
EVERY = pytest.mark.parametrize("kind", REPLAYS, ids=lambda kind: kind.__name__)


def looks_complete(out: Path, unit: str) -> bool:
    """Whether anything that is, or lies in, the checkpoint would be captured if it stayed as it is."""
    folder = os.open(out, os.O_RDONLY | os.O_DIRECTORY)
    try:
        found = candidates.find(scanning.scan(folder), [rule for rule in layouts.RULES if not rule.guessed])
        mine = [each for each in found if each.path == unit or each.path.startswith(f"{unit}/")]
        return any(not each.problem and not gates.examine(folder, each).problem for each in mine)
    finally:
        os.close(folder)


@EVERY
def test_nothing_looks_complete_before_it_is(kind: type[Replay], tmp_path: Path) -> None:
    replay = kind()
    for step in replay.steps:
        seen = []
        for number, said in enumerate(replay.save(tmp_path, step)):
            seen.append(said)
            if said != DONE:
                assert said != OPEN or not looks_complete(tmp_path, replay.unit(step)), f"after write {number}"
        assert seen[-1] == DONE and len(seen) > 5
        assert looks_complete(tmp_path, replay.unit(step))


def test_what_nothing_tells_waits_for_quiet() -> None:
    """Where a rank may be late and nothing in the folder says so, quiet has to last for longer than anywhere else."""
    settle = {rule.name: rule.settle for rule in layouts.RULES}
    assert settle["deepspeed"] >= 10 and settle["accelerate"] >= 10


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Daemon, Daemon]]:
    """Two, and the store they share."""
    folder = tmp_path_factory.mktemp("nodes")
    store = f"file://{folder}/store"
    with Daemon.start(folder / "one", store=store) as one, Daemon.start(folder / "two", store=store) as two:
        yield one, two


@EVERY
def test_captured_whole_and_resumed_exactly(
    kind: type[Replay], nodes: tuple[Daemon, Daemon], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replay, out = kind(), tmp_path / "out"
    rules = tmp_path / "rules.json"
    plain = [each for each in layouts.as_plain(layouts.RULES) if not each["guessed"]]
    rules.write_text(json.dumps([{**each, "settle": SETTLE, "settle_ranks": 0.0} for each in plain]))
    out.mkdir()
    monkeypatch.setenv("MODELCACHE_SOCKET", nodes[0].socket)
    kept: dict[str, dict[str, bytes]] = {}
    try:
        with modelcache.watch(out, name=kind.__name__, layout=str(rules)) as watching:
            for number, step in enumerate(replay.steps):
                for said in replay.save(out, step):
                    if said == DONE:
                        kept[replay.unit(step)] = contents(out / replay.unit(step))
                until(lambda count=number + 1: watching.status().captured_count == count)  # type: ignore[misc]
                if number:
                    replay.remove(out, replay.steps[number - 1])
        captured = watching.status().captured
        assert [each.unit for each in captured] == list(kept) and {each.complete for each in captured} == {"whole"}
        for each in captured:
            assert contents(Path(modelcache.load(each.key))) == kept[each.unit]
        shared().close()
        monkeypatch.setenv("MODELCACHE_SOCKET", nodes[1].socket)
        again = tmp_path / "again"
        with modelcache.watch(again, name=kind.__name__, layout=str(rules), resume=True) as watching:
            newest = replay.newest(again)
            assert newest is not None and newest.name == replay.unit(replay.steps[-1])
            assert contents(newest) == kept[newest.name]
            assert watching.restored is not None
        assert watching.status().captured_count == 0, "what was put back is no news"
    finally:
        shared().close()
        shared().leases.close()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
