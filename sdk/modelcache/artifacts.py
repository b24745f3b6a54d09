"""References as objects: the dict's fields as attributes. What is passed around and stored is the dict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Dict, Optional, Type

from . import errors, keys


class MetaflowDataArtifactReference:
    """What a save returns, with its fields as attributes: `.key`, `.type`, `.metadata`, ... Unknown fields are kept."""

    TYPE: Optional[str] = None

    def __init__(self, /, **fields: Any) -> None:
        self.__dict__.update(fields)
        self.__dict__.setdefault("type", self.TYPE)
        if str(fields.get("attempt")).isdecimal():  # metaflow-checkpoint writes text when a subprocess saves
            self.attempt = int(fields["attempt"])

    def __new__(cls, /, **fields: Any) -> Any:
        return super().__new__(cls if cls.TYPE else _BY_TYPE.get(fields.get("type", ""), cls))

    @classmethod
    def from_dict(cls, reference: Mapping[str, Any]) -> Any:
        """The object for a reference's `type`. IncompatibleObjectTypeException if it is no reference."""
        kind = reference.get("type")
        if not isinstance(reference.get("key"), str) or kind not in _BY_TYPE or (cls.TYPE is not None and kind != cls.TYPE):
            raise errors.IncompatibleObjectTypeException(
                "a dict of type %r is not a reference to a %s" % (kind, cls.TYPE or "model or checkpoint"),
                "load takes what a save returned",
            )
        return _BY_TYPE[kind](**reference)

    def to_dict(self) -> Dict[str, Any]:
        return dict(self.__dict__)

    def __getattr__(self, name: str) -> Any:  # only for what is not there
        raise AttributeError("this reference to a %s has no field %r" % (self.__dict__.get("type"), name))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, MetaflowDataArtifactReference) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash(self.__dict__.get("key"))

    def __repr__(self) -> str:
        return "<%s %s>" % (type(self).__name__, self.__dict__.get("key"))


class ModelArtifact(MetaflowDataArtifactReference):
    TYPE = keys.MODEL

    def __init__(self, /, **fields: Any) -> None:
        super().__init__(**fields)
        if "uuid" not in fields and "model_uuid" in fields:  # metaflow-checkpoint writes the second only
            self.uuid = fields["model_uuid"]


class CheckpointArtifact(MetaflowDataArtifactReference):
    TYPE = keys.CHECKPOINT


_BY_TYPE: Dict[str, Type[MetaflowDataArtifactReference]] = {each.TYPE: each for each in (ModelArtifact, CheckpointArtifact) if each.TYPE}


def as_reference(value: Any) -> Dict[str, Any]:
    """The fields of whatever stands for a save: a reference (ours or metaflow-checkpoint's, dict or object), a key, a URL.

    `key` is always there, and names a model or checkpoint. ValueError for what stands for none.
    """
    if isinstance(value, str):
        place = keys.place_of(value)
        return {"key": place.key, **({"store": place.store} if place.store else {})}
    if value is not None and not isinstance(value, Mapping):
        make_dict = getattr(value, "to_dict", None)
        fields = make_dict() if callable(make_dict) else {name: getattr(value, name) for name in ("key", "type") if hasattr(value, name)}
        value = fields if isinstance(fields, Mapping) and fields else value
    if not isinstance(value, Mapping):
        raise ValueError("a reference is what a save returned, its key or its URL, not %s" % type(value).__name__)
    made = MetaflowDataArtifactReference.from_dict(value).to_dict()
    keys.type_of(made["key"])
    return dict(made)
