"""A bounded memory: the least recently used goes first, whoever uses it at the same time."""

from __future__ import annotations

import random
import sys
import threading
from collections import OrderedDict

from hypothesis import given
from hypothesis import strategies as st

from modelcached.recent import Recent

STEPS = st.tuples(st.sampled_from(["get", "put", "drop", "clear"]), st.integers(0, 5), st.integers(1, 3))


@given(st.integers(1, 6), st.lists(STEPS, max_size=40))
def test_as_a_model_does(size: int, steps: list[tuple[str, int, int]]) -> None:
    recent: Recent[int, int] = Recent(size, lambda weight: weight)
    model: OrderedDict[int, int] = OrderedDict()
    for step, key, value in steps:
        if step == "put":
            assert recent.put(key, value) == value
            model.pop(key, None)
            model[key] = value
            while sum(model.values()) > size and len(model) > 1:
                model.popitem(last=False)
        elif step == "get":
            assert recent.get(key) == model.get(key)
            if key in model:
                model.move_to_end(key)
        elif step == "drop":
            recent.drop(key)
            model.pop(key, None)
        else:
            recent.clear()
            model.clear()
        assert len(recent) == len(model)


def test_one_that_is_too_heavy_is_kept_alone() -> None:
    recent: Recent[str, str] = Recent(10, len)
    recent.put("light", "x")
    recent.put("heavy", "x" * 100)
    assert recent.get("light") is None and recent.get("heavy") is not None
    recent.put("light", "x")
    assert recent.get("heavy") is None and recent.get("light") == "x"


def test_threads_do_not_disturb_each_other() -> None:
    """The event loop and the pool's threads look things up at the same time."""
    recent: Recent[int, int] = Recent(4)
    failed: list[Exception] = []
    everybody = threading.Barrier(4)

    def use(seed: int) -> None:
        chance = random.Random(seed)
        everybody.wait(5)
        try:
            for _ in range(4000):
                key = chance.randrange(8)
                if chance.random() < 0.5:
                    recent.put(key, key)
                else:
                    assert recent.get(key) in (None, key)
        except Exception as error:
            failed.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=use, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert failed == [] and len(recent) == 4
