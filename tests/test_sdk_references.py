"""Keys, metadata, reference objects; and finding, loading and deleting what was saved, against a daemon that keeps it in memory."""

from __future__ import annotations

import copy
import datetime
import enum
import json
import math
import os
import pickle
from collections import OrderedDict, namedtuple
from pathlib import Path, PurePosixPath
from typing import Any

import hypothesis
import pytest
from hypothesis import strategies

import modelcache
from modelcache import artifacts, keys, metadata
from modelcache.client import shared
from modelcache.errors import IncompatibleReferenceError, MetadataError, ReferenceNotFoundError

from .fake_keeper import FakeKeeper

OLD_MODEL = "mf.models/models/artifacts/basic_model_6483655edd5e44dfb2675968dd23b229"
OLD_CHECKPOINT = "mf.checkpoints/checkpoints/artifacts/CheckpointFlow/start/26ec4b03ee0e/a92ae9615600/54d4b3b1.0.mfchckpt.0"
OLD_REPO = "mf.huggingface_hub/checkpoints/artifacts/HFModelFlow/start/26ec4b03ee0e/a92ae9615600/1a471abc.0.9b5c6e8800.0"


# ---- keys


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        (OLD_MODEL, "model"),
        (OLD_CHECKPOINT, "checkpoint"),
        (OLD_REPO, "checkpoint"),
        ("mf.models_002/models/artifacts/with/slash", "model"),
        ("mf.checkpoints/checkpoints/artifacts/models/artifacts/s/t/h.0.n.0", "checkpoint"),  # a flow called "models"
        ("mf.checkpoints/checkpoints/artifacts/a/b/c/d/h.0.n", None),
        ("mf.checkpoints/checkpoints/artifacts/a/b/c/h.0.n.0", None),
        ("org/name", None),
        ("", None),
    ],
)
def test_what_a_key_names(key: str, expected: str | None) -> None:
    if expected is not None:
        assert keys.type_of(key) == expected
    else:
        with pytest.raises(IncompatibleReferenceError):
            keys.type_of(key)


def test_a_known_pathspec_hash() -> None:
    assert keys.pathspec_hash("CheckpointFlow/7457/start/47456") == "54d4b3b1"
    assert keys.json_hash(OLD_MODEL)[:6] == "4ad1a6"


@pytest.mark.parametrize("name", ["n", "a.b", "1.2.3", ".", "..", "ünï", "-", "v 1", "x" * 180])
def test_a_checkpoints_name_is_read_from_its_key(name: str) -> None:
    ours = keys.checkpoint_key(name, 7, "F/1/s/2", 3)
    assert keys.checkpoint_name(ours)[:4] == (keys.pathspec_hash("F/1/s/2"), "3", name, "7")
    assert ours.startswith(keys.checkpoints_of(name)) and keys.type_of(ours) == "checkpoint"
    theirs = keys.checkpoint_name(f"mf.checkpoints/checkpoints/artifacts/a/b/c/d/54d4b3b1.0.{name}.12")
    assert theirs == ("54d4b3b1", "0", name, "12", "")
    last = ours.rpartition("/")[2]
    assert len(last.split(".")) >= 5 and len(f"{last}.pending".encode()) <= 255


def test_keys_are_unique() -> None:
    assert len({keys.checkpoint_key("n", 0) for _ in range(10_000)}) == 10_000
    assert len({keys.new_model_uuid("n") for _ in range(10_000)}) == 10_000


@pytest.mark.parametrize(
    ("path", "label"),
    [
        ("out/model", "model"),
        ("/a/b/", "b"),
        ("/", "model"),
        ("x\n\x7fy", "xy"),
        ("a\\b", "ab"),
        (os.fsdecode(b"/a/\xffb"), "b"),
        ("é" * 100, "é" * 90),
    ],
)
def test_a_label_is_made_of_any_path(path: str, label: str) -> None:
    assert keys.check_name(keys.default_label(path), "label") == label


@pytest.mark.parametrize(
    ("url", "place"),
    [
        (OLD_MODEL, (OLD_MODEL, None)),
        (f"s3://bucket/prefix/{OLD_MODEL}", (OLD_MODEL, None)),
        (f"/home/u/models/artifacts/.metaflow/{OLD_CHECKPOINT}", (OLD_CHECKPOINT, None)),
        (f"s3://bucket/prefix/modelcached/refs/{OLD_CHECKPOINT}.json", (OLD_CHECKPOINT, "s3://bucket/prefix/modelcached")),
        (f"file:///srv/refs/x/refs/{OLD_MODEL}.json", (OLD_MODEL, "file:///srv/refs/x")),
    ],
)
def test_the_key_in_a_url(url: str, place: tuple[str, str | None]) -> None:
    assert keys.place_of(url) == place


@pytest.mark.parametrize("name", ["", "a/b", "a\\b", "a\nb", "a\0", "\x7f", "\x85", "\udcff", "x" * 181, 7, b"x"])
def test_what_no_name_can_be(name: Any) -> None:
    with pytest.raises(ValueError, match="a label"):
        keys.check_name(name, "label")


# ---- metadata


class Size(enum.IntEnum):
    SMALL = 1


class Mode(enum.StrEnum):
    FAST = "fast"


class Scalar:
    """As NumPy's and torch's are."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def item(self) -> Any:
        if isinstance(self._value, Exception):
            raise self._value
        return self._value


class FloatScalar(float):
    def item(self) -> float:
        return float(self)


Point = namedtuple("Point", "x y")


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (None, None),
        (True, True),
        (2**200, 2**200),
        (0.1, 0.1),
        ("ünï\n", "ünï\n"),
        (Scalar(3), 3),
        (Scalar(Size.SMALL), 1),
        (FloatScalar(2.5), 2.5),
        (Size.SMALL, 1),
        (Mode.FAST, "fast"),
        (datetime.datetime(2025, 1, 2, 3, 4, tzinfo=datetime.UTC), "2025-01-02T03:04:00+00:00"),
        (datetime.date(2025, 1, 2), "2025-01-02"),
        (PurePosixPath("a/b"), "a/b"),
        ((1, (2, 3)), [1, [2, 3]]),
        (Point(1, 2), [1, 2]),
        ({3, 1, 2}, [1, 2, 3]),
        (frozenset({"b", 1, None}), [1, None, "b"]),
        (OrderedDict(a=1), {"a": 1}),
        ({2: "a", None: "b", True: "c", 0.5: "d", Mode.FAST: "e"}, {"2": "a", "null": "b", "true": "c", "0.5": "d", "fast": "e"}),
        ([], []),
    ],
)
def test_metadata_that_is_converted(given: Any, kept: Any) -> None:
    plain = metadata.plain({"key": given})
    assert plain == {"key": kept} and type(plain["key"]) is type(kept)
    assert metadata.decode(json.loads(json.dumps(metadata.encode(plain), allow_nan=False))) == plain


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (b"x", "metadata['a'][0]['b'] is bytes"),
        (object(), "metadata['a'][0]['b'] is object"),
        (1j, "is complex"),
        ("\ud800", "is no valid Unicode"),
        (Scalar(ValueError("more than one")), "with more than one value: more than one"),
        (Scalar(b"x"), "is bytes"),
        (datetime.timedelta(1), "is datetime.timedelta"),
        ({(1, 2): 3}, "a key of metadata['a'][0]['b'] is tuple"),
        ({1: 1, "1": 2}, "metadata['a'][0]['b']['1'] is there twice"),
        (range(3), "is range"),
    ],
)
def test_metadata_that_is_refused_by_name(given: Any, named: str) -> None:
    with pytest.raises(MetadataError) as caught:
        metadata.plain({"a": [{"b": given}]})
    assert named in str(caught.value) and isinstance(caught.value, ValueError)


def test_metadata_without_end_or_too_much_of_it() -> None:
    endless: dict[str, Any] = {}
    endless["self"] = endless
    with pytest.raises(MetadataError, match="contains itself"):
        metadata.plain(endless)
    with pytest.raises(MetadataError, match="at most 524288 are kept"):
        metadata.plain({"a": "x" * metadata.MAX_BYTES})
    with pytest.raises(MetadataError, match="metadata is a dict, not list"):
        metadata.plain([])  # type: ignore[arg-type]
    assert metadata.plain(None) == {}


floats = strategies.floats()
texts = strategies.text(strategies.characters(exclude_categories=["Cs"])) | strategies.sampled_from(["$float", "$$float", "nan", "$"])
values = strategies.recursive(
    strategies.none() | strategies.booleans() | strategies.integers() | floats | texts,
    lambda inner: strategies.lists(inner, max_size=4) | strategies.dictionaries(texts, inner, max_size=4),
    max_leaves=20,
)


@hypothesis.given(strategies.dictionaries(texts, values, max_size=5))
def test_plain_metadata_comes_back_as_it_was(given: dict[str, Any]) -> None:
    plain = metadata.plain(given)
    assert repr(plain) == repr(given)  # NaN is not equal to itself
    sent = json.dumps(metadata.encode(plain), allow_nan=False)
    assert repr(metadata.decode(json.loads(sent))) == repr(given)


# ---- objects


def test_reference_objects() -> None:
    model = {"key": OLD_MODEL, "type": "model", "model_uuid": "u", "metadata": {"a": 1}, "of a newer version": 2}
    made = modelcache.MetaflowDataArtifactReference.from_dict(model)
    assert isinstance(made, modelcache.ModelArtifact)
    assert (made.key, made.uuid, made.model_uuid, made.metadata) == (OLD_MODEL, "u", "u", {"a": 1})
    assert made.to_dict() == {**model, "uuid": "u"} and made == pickle.loads(pickle.dumps(made)) == copy.deepcopy(made)
    checkpoint = modelcache.CheckpointArtifact.from_dict({"key": OLD_CHECKPOINT, "type": "checkpoint", "name": "n"})
    assert isinstance(checkpoint, modelcache.CheckpointArtifact) and checkpoint.name == "n" and checkpoint != made
    with pytest.raises(AttributeError, match="this reference to a checkpoint has no field 'label'"):
        _ = checkpoint.label
    assert modelcache.ModelArtifact(key=OLD_MODEL).type == "model"
    assert len({made, checkpoint, modelcache.ModelArtifact(**model)}) == 2


class OldObject:
    """As metaflow-checkpoint pickles them."""

    def __init__(self, **fields: Any) -> None:
        self.__dict__.update(fields)


@pytest.mark.parametrize(
    "value",
    [
        OLD_MODEL,
        f"s3://bucket/{OLD_MODEL}",
        {"key": OLD_MODEL, "type": "model"},
        OldObject(key=OLD_MODEL, type="model"),
        artifacts.ModelArtifact(key=OLD_MODEL),
    ],
    ids=["key", "url", "dict", "old object", "object"],
)
def test_what_stands_for_a_save(value: Any) -> None:
    assert artifacts.as_reference(value)["key"] == OLD_MODEL


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (None, ValueError),
        (7, ValueError),
        (OldObject(), ValueError),
        ({}, IncompatibleReferenceError),
        ({"key": OLD_MODEL}, IncompatibleReferenceError),
        ({"key": OLD_MODEL, "type": "repo"}, IncompatibleReferenceError),
        ({"key": 7, "type": "model"}, IncompatibleReferenceError),
        ({"key": "nothing", "type": "model"}, IncompatibleReferenceError),
        ("nothing", IncompatibleReferenceError),
        ("s3://bucket/nothing", IncompatibleReferenceError),
    ],
)
def test_what_does_not(value: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        modelcache.load(value)
    assert issubclass(error, ValueError)


# ---- with a daemon


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "out/empty").mkdir(parents=True)
    (tmp_path / "out/a").write_bytes(b"content")
    (tmp_path / "out/run.sh").write_bytes(b"#!")
    (tmp_path / "out/run.sh").chmod(0o755)
    (tmp_path / "out/link").symlink_to("a")
    return tmp_path / "out"


def entries(folder: Path) -> list[tuple[str, Any]]:
    def what(path: Path) -> Any:
        return os.readlink(path) if path.is_symlink() else None if path.is_dir() else (path.read_bytes(), os.access(path, os.X_OK))

    return sorted((str(path.relative_to(folder)), what(path)) for path in folder.rglob("*"))


def test_load_shows_what_was_saved(keeper: FakeKeeper, source: Path) -> None:
    reference = modelcache.save(source, metadata={"a": math.nan})
    path = modelcache.load(reference)
    assert entries(Path(path)) == entries(source)
    assert keeper.leases(Path(path).name) == 1
    again = modelcache.load(modelcache.ModelArtifact(**reference))
    assert again == path and keeper.leases(Path(path).name) == 1
    *_, last = [keeper.next_request() for _ in range(keeper.requests.qsize())]
    assert last.method == "load" and last.params["held"] == [Path(path).name]


def test_load_into_a_folder(keeper: FakeKeeper, source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The path comes back exactly as given; a second time works; foreign files stay, and are named."""
    reference = modelcache.save(source)
    here = os.getcwd()
    os.chdir(tmp_path)
    try:
        for given in ("./models/basic", Path("models/basic")):
            path = modelcache.load(reference["key"], given)
            assert path == str(given) and entries(Path(path)) == entries(source)
            (Path(path) / "a").write_bytes(b"mine to change")
        assert "also holds files" not in caplog.text
        Path("models/basic/foreign").touch()
        assert modelcache.load(reference, "models/basic") == "models/basic"
    finally:
        os.chdir(here)
    assert "foreign" in caplog.text and (tmp_path / "models/basic/a").read_bytes() == b"content"
    assert keeper.leases(reference["key"]) == 0 and shared().leases.trees() == []


def test_a_reference_names_its_store(keeper: FakeKeeper, source: Path) -> None:
    reference = modelcache.save(source, store="file:///mine")
    assert keeper.next_request().params["store"] == "file:///mine"
    known = {**reference, "store": "file:///theirs"}
    for given, store, expected in (
        (known, None, "file:///theirs"),
        (known, "file:///other", "file:///other"),
        (reference["key"], None, None),
        (f"file:///x/refs/{reference['key']}.json", None, "file:///x"),
    ):
        while not keeper.requests.empty():
            keeper.next_request()
        modelcache.load(given, store=store)
        assert keeper.next_request().params.get("store") == expected


def test_private_files_where_they_were_asked_for(keeper: FakeKeeper, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELCACHE_LOADED", "private")
    path = Path(modelcache.load(modelcache.save(source)))
    assert entries(path) == entries(source) and not path.is_relative_to(keeper.root)
    (path / "a").write_bytes(b"mine")


def test_list_latest_delete(keeper: FakeKeeper, source: Path) -> None:
    assert modelcache.list() == [] and modelcache.latest("run") is None
    model = modelcache.save(source, label="m", metadata={"inf": math.inf})
    first, second = (modelcache.save(source, kind="checkpoint", name="run") for _ in range(2))
    other = modelcache.save(source, kind="checkpoint", name="run.2")
    assert modelcache.list() == [other, second, first, model]
    assert modelcache.list("model") == [model] == modelcache.list(name="m")
    assert modelcache.list("checkpoint", "run") == [second, first]
    (found,) = modelcache.list("model", as_dict=False)
    assert isinstance(found, modelcache.ModelArtifact) and found.metadata == {"inf": math.inf}
    assert modelcache.latest("run") == second and modelcache.latest("m", "model") == model
    modelcache.delete(second)
    assert modelcache.latest("run") == first
    modelcache.delete(first["key"])
    assert modelcache.latest("run") is None
    for gone in (lambda: modelcache.delete(first), lambda: modelcache.load(first)):
        with pytest.raises(ReferenceNotFoundError) as caught:
            gone()
        assert isinstance(caught.value, KeyError) and first["key"] in str(caught.value)
    for wrong in (lambda: modelcache.list("repo"), lambda: modelcache.latest("x", "repo"), lambda: modelcache.latest("a/b")):
        with pytest.raises(ValueError, match=r"repo|a/b"):
            wrong()
