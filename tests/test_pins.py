"""Pins: kept through restarts and power cuts, their own uid's, over when they expire."""

from __future__ import annotations

from pathlib import Path

import pytest

from modelcached.errors import InvalidRequest, LocalEntryNotFound, TooMany
from modelcached.layout import PRIVATE_FOLDERS, Layout
from modelcached.model import Caller, TreeId
from modelcached.pins import MAX_PINS, Pins

ANNE, BERT, ROOT = Caller(1001, 1001, 1), Caller(1002, 1002, 2), Caller(0, 0, 3)
A, B = TreeId("a" * 64), TreeId("b" * 64)


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    for folder in PRIVATE_FOLDERS:
        (tmp_path / folder).mkdir(exist_ok=True)
    return Layout(tmp_path)


def names(pins: Pins, tree: TreeId) -> list[str]:
    return [pin.name for pin in pins.holding(tree)]


def test_a_pin_survives(layout: Layout) -> None:
    clock = Clock()
    pins = Pins(layout, clock)
    _, keep = pins.put("mine", "org/name", (A, B), ANNE, None)
    assert names(pins, A) == ["mine"], "at once, before it is on the disk"
    keep()
    again = Pins(layout, clock)
    assert again.all() == pins.all() and again.held() == {A, B}
    again.remove("mine", ANNE)()
    assert Pins(layout, clock).all() == [] and list(layout.pins.iterdir()) == []


def test_a_pin_expires(layout: Layout) -> None:
    clock = Clock()
    pins = Pins(layout, clock)
    for name, seconds in (("short", 10.0), ("long", 20.0)):
        pins.put(name, "org/name", (A,), ANNE, seconds)[1]()
    clock.now += 10
    assert names(pins, A) == ["long"] and len(pins) == 2
    assert [pin.name for pin in Pins(layout, clock).all()] == ["long"]
    pins.sweep()()
    assert len(pins) == 1 and len(list(layout.pins.iterdir())) == 1
    with pytest.raises(LocalEntryNotFound):
        pins.remove("short", ANNE)


def test_the_same_name_replaces_and_others_names_are_theirs(layout: Layout) -> None:
    pins = Pins(layout, Clock())
    pins.put("x", "one", (A,), ANNE, None)[1]()
    pins.put("x", "two", (B,), BERT, None)[1]()
    pins.put("x", "three", (B,), ANNE, None)[1]()
    assert {(pin.what, pin.uid) for pin in Pins(layout).all()} == {("two", 1002), ("three", 1001)} and names(pins, A) == []
    pins.remove("x", BERT)()
    assert [pin.what for pin in pins.all()] == ["three"]
    with pytest.raises(LocalEntryNotFound, match="you have no pin"):
        pins.remove("x", BERT)
    pins.remove("x", ROOT)()
    assert pins.all() == []


@pytest.mark.parametrize("name", ["", "x" * 201, "line\nbreak", "\x1b[2J"])
def test_no_name(layout: Layout, name: str) -> None:
    with pytest.raises(InvalidRequest):
        Pins(layout).put(name, "org/name", (A,), ANNE, None)


@pytest.mark.parametrize("name", ["..", "a/b", "имя" * 30, "pulled org/name@main", ".hidden", "%2F", "x" * 200])
def test_every_other_name_is_one_file(layout: Layout, name: str) -> None:
    pins = Pins(layout)
    pins.put(name, "org/name", (A,), ANNE, None)[1]()
    assert [path.parent for path in layout.pins.iterdir()] == [layout.pins]
    assert [pin.name for pin in Pins(layout).all()] == [name]
    pins.remove(name, ANNE)()
    assert list(layout.pins.iterdir()) == []


def test_what_can_not_be_read_costs_no_other(layout: Layout) -> None:
    Pins(layout).put("good", "org/name", (A,), ANNE, None)[1]()
    (layout.pins / "torn.json").write_bytes(b'{"name": "to')
    (layout.pins / "wrong.json").write_bytes(b'{"name":"x","what":"y","trees":["../x"],"uid":1,"created":1}')
    assert [pin.name for pin in Pins(layout).all()] == ["good"]
    assert (layout.pins / "torn.json").exists(), "whoever wants to know why finds it"


def test_there_is_an_end_to_pins(layout: Layout) -> None:
    pins = Pins(layout)
    for number in range(MAX_PINS):
        pins.put(str(number), "org/name", (A,), ANNE, None)
    with pytest.raises(TooMany):
        pins.put("one more", "org/name", (A,), ANNE, None)
    pins.put("another's", "org/name", (A,), BERT, None)
