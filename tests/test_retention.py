"""Retention: what the plan keeps, as a table and for any history; and what the store has afterwards."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as some

from modelcache import keys, retention, saving, units
from modelcache.client import shared
from modelcache.retention import Metric, Rule, plan

from .daemon import Daemon
from .saves import fill

Reference = dict[str, Any]


def reference(step: int | None, at: int | None = None, *, unit: str | None = None, complete: str = "whole", **metadata: Any) -> Reference:
    """What a watch says of a unit that was written in second `at` (else: when its number says)."""
    at = at if at is not None else step or 0
    known = {} if step is None else {"step": step}
    return {
        "key": f"k{at}",
        "created_on": "2026-01-01T00:00:00+00:00",
        "unit": unit or f"checkpoint-{step}",
        "layout": "hf-trainer",
        "complete": complete,
        "written_ns": at * 10**9,
        "metadata": {**known, **metadata},
    }


BY_HAND: Reference = {"key": "by hand", "created_on": "2020-01-01T00:00:00+00:00", "metadata": {"step": 1}}
LOSSES = [reference(10, loss=3.0), reference(20, loss=1.0), reference(30, loss=2.0), reference(40, loss=2.5)]
LAST = [reference(None, at, unit="run/last.ckpt") for at in (21, 31)]
HAS_EXTRA = reference(30) | {"extra": "run/last.ckpt"}
RUN = units.Series.of_name("run")
LOSS = Metric("loss", False)


@pytest.mark.parametrize(
    ("stored", "keep", "best", "gone"),
    [
        (LOSSES, None, None, []),
        (LOSSES, 4, None, []),
        (LOSSES, 3, None, ["k10"]),
        (LOSSES, 1, None, ["k10", "k20", "k30"]),
        (LOSSES[::-1], 1, None, ["k10", "k20", "k30"]),  # in whichever order they are listed
        (LOSSES, 1, LOSS, ["k10", "k30"]),
        (LOSSES, 2, LOSS, ["k10"]),
        (LOSSES, None, LOSS, ["k10", "k30"]),  # the best one and the newest
        (LOSSES, None, Metric("loss", True), ["k20", "k30"]),
        (LOSSES, 1, Metric("accuracy", True), ["k10", "k20", "k30"]),  # nobody has one
        ([*LOSSES, BY_HAND], 1, None, ["k10", "k20", "k30"]),  # is nobody's to delete
        # What was trained again replaces what it was, and does not count twice.
        ([reference(10, 1), reference(20, 2), reference(20, 3)], 2, None, ["k2"]),
        # One file, written over and over: its versions are the checkpoints.
        ([reference(None, at, unit="last.pt") for at in (1, 2, 3)], 2, None, ["k1"]),
        # Lightning's last one, written over too, stays beside the numbered ones while it is the newest, and alone counts as any.
        ([reference(10), reference(20), LAST[0], reference(30), LAST[1]], 1, None, ["k10", "k20", "k21"]),
        ([reference(10), reference(20), LAST[0], reference(30), LAST[1]], 2, None, ["k10", "k21"]),
        ([reference(10), reference(20), LAST[0], HAS_EXTRA], 2, None, ["k10", "k21"]),
        # Or while no newer one stays that it can be made of: weights only are no whole state. So does the newest, and no other.
        ([reference(10), reference(20), LAST[0], reference(30)], 2, None, ["k10"]),
        ([reference(10), LAST[0], LAST[1], reference(40), reference(50)], 2, None, ["k10", "k21"]),
        ([HAS_EXTRA, LAST[1], reference(40), reference(50)], 3, None, []),
        (LAST, 1, None, ["k21"]),
        (LAST, 2, None, []),
        # A guess that was wrong goes; the newest that is sure stays, however many guesses are newer.
        ([reference(10, 1, complete="guessed"), reference(10, 2, complete="guessed")], 5, None, ["k1"]),
        ([reference(10), reference(20), reference(30, complete="guessed"), reference(40, complete="guessed")], 1, None, ["k10", "k30"]),
        # A loss that is no number is never the best; of equals it is the newest.
        ([reference(10, loss=math.nan), reference(20, loss="low"), reference(30, loss=True), reference(40)], 2, LOSS, ["k10", "k20"]),
        ([reference(10, loss=1), reference(20, loss=1.0), reference(30, loss=2)], 1, LOSS, ["k10"]),
    ],
)
def test_plan(stored: list[Reference], keep: int | None, best: Metric | None, gone: list[str]) -> None:
    assert plan(stored, Rule(keep, best)) == gone


HISTORIES = some.lists(
    some.builds(
        lambda step, at, complete, loss: reference(step, at, complete=complete, **({} if loss is None else {"loss": loss})),
        some.none() | some.integers(0, 5),
        some.integers(0, 10**6),
        some.sampled_from(["whole", "guessed"]),
        some.none() | some.floats(),
    ),
    unique_by=lambda each: each["key"],
    max_size=12,
)


@given(HISTORIES, some.none() | some.integers(1, 4), some.none() | some.booleans())
def test_what_always_stays(stored: list[Reference], keep: int | None, is_max: bool | None) -> None:
    rule = Rule(keep, None if is_max is None else Metric("loss", is_max))
    gone = set(plan(stored, rule))
    left = [each for each in stored if each["key"] not in gone]
    assert len(left) >= min(len({(each["unit"], units.step_of(each)) for each in stored}), keep or 1)
    for kind in (stored, [each for each in stored if each["complete"] == "whole"]):
        if kind:
            assert max(kind, key=units.age) in left
    assert not plan(left, rule)  # once is enough


@pytest.mark.parametrize(
    ("text", "metric"),
    [
        ("loss", Metric("loss", False)),
        ("eval_loss", Metric("eval_loss", False)),
        ("word_error_rate", Metric("word_error_rate", False)),
        ("Perplexity", Metric("Perplexity", False)),
        ("accuracy", Metric("accuracy", True)),
        ("accuracy:min", Metric("accuracy", False)),
        ("loss:max", Metric("loss", True)),
        ("eval:f1:max", Metric("eval:f1", True)),
    ],
)
def test_metrics(text: str, metric: Metric) -> None:
    assert Metric.parse(text) == metric


@pytest.mark.parametrize("text", ["", ":max", "loss:", "loss:best", "eval:f1"])
def test_what_is_no_metric(text: str) -> None:
    with pytest.raises(ValueError, match=r"direction|name"):
        Metric.parse(text)


@pytest.mark.parametrize("keep", [0, -1, True, 1.5, "3"])
def test_at_least_one_is_kept(keep: Any) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Rule.parse(keep, None)


@pytest.fixture
def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Daemon]:
    with Daemon.start(tmp_path / "root") as daemon:
        monkeypatch.setenv("MODELCACHE_SOCKET", daemon.socket)
        yield daemon
        shared().close()
        shared().leases.close()


def test_the_store_loses_what_is_planned_and_the_folder_nothing(daemon: Daemon, tmp_path: Path) -> None:
    import modelcache

    def save(step: int, **fields: Any) -> str:
        folder = fill(tmp_path / f"out/checkpoint-{step}", {"weights": b"%d" % step})
        draft = {**saving.checkpoint_reference("run"), **reference(step), **fields}
        draft["key"] = keys.checkpoint_key("run", step)
        return str(saving.keep(folder, draft, {"step": step})["key"])

    kept = [save(step) for step in (10, 20, 30, 40)]
    by_hand = modelcache.save(tmp_path / "out/checkpoint-10", kind="checkpoint", name="run")["key"]
    other = modelcache.save(tmp_path / "out/checkpoint-10", kind="checkpoint", name="runs")["key"]
    modelcache.flush()
    assert retention.apply(RUN, Rule()) == []
    assert retention.apply(RUN, Rule(2)) == kept[:2]
    assert retention.apply(RUN, Rule(2)) == []
    assert {each["key"] for each in modelcache.list()} == {*kept[2:], by_hand, other}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [f"checkpoint-{step}" for step in (10, 20, 30, 40)]


def test_what_the_store_does_not_have_yet_does_not_count(daemon: Daemon, tmp_path: Path) -> None:
    """Else the last copy that outlives this node might go."""
    import modelcache

    def save(step: int) -> str:
        folder = fill(tmp_path / f"out/checkpoint-{step}", {"weights": b"%d" % step})
        draft = {**saving.checkpoint_reference("run"), **reference(step), "key": keys.checkpoint_key("run", step)}
        return str(saving.keep(folder, draft, {"step": step})["key"])

    blobs = daemon.root / "store/blobs"
    first = save(1)
    modelcache.flush()
    blobs.rename(tmp_path / "away")
    blobs.write_text("no folder: nothing can be put into it")
    second = save(2)
    assert [each["key"] for each in modelcache.list()] == [second, first]
    assert retention.apply(RUN, Rule(1)) == []
    blobs.unlink()
    (tmp_path / "away").rename(blobs)
    modelcache.flush()
    assert retention.apply(RUN, Rule(1)) == [first]
