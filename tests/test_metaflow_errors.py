"""The exceptions of metaflow-checkpoint under their names: parts of our tree always, MetaflowExceptions where Metaflow is imported."""

from __future__ import annotations

import builtins
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest

from modelcache import artifacts, errors

from .conftest import ROOT

NAMES = """
ArgumentException
CheckpointException CheckpointNotAvailableException LoadingException ModelException KeyNotFoundError KeyNotCompatibleException
KeyNotCompatibleWithObjectException IncompatibleObjectTypeException DatastoreReadInitException DatastoreWriteInitException
DatastoreNotReadyException UnhashableValueException UnresolvableDatastoreException
""".split()

# As Metaflow's own is made: its constructor sets what its command line prints.
STAND_IN = """
class MetaflowException(Exception):
    headline = "Flow failed"

    def __init__(self, msg="", lineno=None, source_file=None):
        self.message = msg
        self.line_no = lineno
        self.source_file = source_file
        super().__init__()
"""


def test_all_names_are_there() -> None:
    assert sorted(NAMES) == sorted(errors.METAFLOW_NAMES)
    for name in NAMES:
        kind = getattr(errors, name)
        assert kind.__name__ == name and issubclass(kind, errors.ModelcacheError)
    with pytest.raises(AttributeError, match="SomeException"):
        _ = errors.SomeException


def test_their_builtins() -> None:
    table = (ROOT / "docs" / "api.md").read_text().partition("find the names that they catch")[2].partition("\n\nA request")[0]
    rows = re.findall(r"^\| (`\w+(?:Error|Exception)`.*?) \| (.*?) \|", table, re.M)
    documented = {name: kin for names, kin in rows for name in re.findall(r"`(\w+)`", names)}
    assert sorted(documented) == sorted(NAMES)
    for name, kin in documented.items():
        for parent in re.findall(r"`(\w+)`", kin):
            assert issubclass(getattr(errors, name), getattr(errors, parent, None) or getattr(builtins, parent)), (name, parent)


def test_what_is_raised_has_their_names() -> None:
    missing = errors.from_wire({"message": "no save has it", "data": {"name": "reference_not_found", "hint": "look", "key": "k"}})
    assert type(missing) is errors.KeyNotFoundError and isinstance(missing, (KeyError, errors.ReferenceNotFoundError))
    assert (str(missing), missing.data) == ("no save has it\nhint: look", {"key": "k"})
    with pytest.raises(errors.KeyNotCompatibleException):
        artifacts.as_reference("nothing")
    with pytest.raises(errors.IncompatibleObjectTypeException):
        artifacts.as_reference({"key": "nothing", "type": "repo"})


def test_pickled_without_metaflow() -> None:
    again = pickle.loads(pickle.dumps(errors.KeyNotFoundError("gone", "save again", {"key": "k"})))
    assert (type(again), again.message, again.hint, again.data) == (errors.KeyNotFoundError, "gone", "save again", {"key": "k"})


WITH_METAFLOW = """
import sys, pickle
from modelcache import errors

before = {name: getattr(errors, name) for name in sys.argv[1:]}
assert "metaflow" not in sys.modules
from metaflow.exception import MetaflowException

for name, plain in before.items():
    kind = getattr(errors, name)
    assert issubclass(kind, MetaflowException) and issubclass(kind, plain) and not issubclass(plain, MetaflowException), name
    assert kind is getattr(errors, name) and kind.__name__ == name
    made = kind("what", "do this", {"key": 1})
    whole = "what\\nhint: do this"  # Metaflow prints the message alone
    assert (made.headline, made.message, made.line_no, made.source_file) == ("modelcache", whole, None, None)
    again = pickle.loads(pickle.dumps(made))
    assert (type(again), again.message, again.hint, again.data) == (kind, whole, "do this", {"key": 1})
    assert str(made) == str(again) == whole
missing = errors.from_wire({"message": "m", "data": {"name": "reference_not_found"}})
try:
    raise missing
except MetaflowException as caught:
    assert isinstance(caught, KeyError) and isinstance(caught, before["KeyNotFoundError"])
print("done", pickle.dumps(missing).hex())
"""


def test_with_metaflow(tmp_path: Path) -> None:
    (tmp_path / "metaflow").mkdir()
    (tmp_path / "metaflow" / "__init__.py").touch()
    (tmp_path / "metaflow" / "exception.py").write_text(STAND_IN)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    ran = subprocess.run([sys.executable, "-c", WITH_METAFLOW, *NAMES], env=environment, capture_output=True, text=True, timeout=20)
    assert ran.returncode == 0 and ran.stdout.startswith("done "), ran.stderr
    read_without_it = pickle.loads(bytes.fromhex(ran.stdout.split()[1]))
    assert type(read_without_it) is errors.KeyNotFoundError
