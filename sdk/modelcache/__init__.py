"""Models through this node's shared cache: a task asks for a repo and gets a path, and hands over what it wants kept.

    path = modelcache.snapshot_download("org/name")              # huggingface_hub's signature
    file = modelcache.hf_hub_download("org/name", "config.json")
    with modelcache.snapshot("org/name") as path: ...            # the cache may drop it after the block

    reference = modelcache.save("out/model", metadata={...})     # goes on as soon as the bytes are safe on this node
    path = modelcache.load(reference)                            # on any node; load(reference, "folder") gives private files
    modelcache.flush()                                           # everything saved is in the store

    with modelcache.watch("out", name="run-7", resume=True):     # each checkpoint that a trainer writes there is kept
        train()

Nothing is imported before it is used (PEP 562): `import modelcache` costs a bare interpreter well under a millisecond.
"""

__version__ = "0.1.0"

TYPE_CHECKING = False  # typing's own takes milliseconds to import
if TYPE_CHECKING:
    from typing import Any, List

    from . import accelerate as accelerate
    from . import errors as errors
    from .artifacts import CheckpointArtifact as CheckpointArtifact
    from .artifacts import MetaflowDataArtifactReference as MetaflowDataArtifactReference
    from .artifacts import ModelArtifact as ModelArtifact
    from .errors import ModelcacheError as ModelcacheError
    from .flushing import flush as flush
    from .hub import Snapshot as Snapshot
    from .hub import hf_hub_download as hf_hub_download
    from .hub import snapshot as snapshot
    from .hub import snapshot_download as snapshot_download
    from .loading import load as load
    from .references import delete as delete
    from .references import latest as latest
    from .references import list as list
    from .saving import save as save
    from .watching import watch as watch

# No module is called like a name in here: importing it would put it in that name's place.
_HOME = {
    "snapshot_download": "hub",
    "hf_hub_download": "hub",
    "snapshot": "hub",
    "Snapshot": "hub",
    "save": "saving",
    "load": "loading",
    "list": "references",
    "latest": "references",
    "delete": "references",
    "flush": "flushing",
    "watch": "watching",
    "MetaflowDataArtifactReference": "artifacts",
    "ModelArtifact": "artifacts",
    "CheckpointArtifact": "artifacts",
    "ModelcacheError": "errors",
    "accelerate": "",  # a module
    "errors": "",
}

__all__ = [
    "CheckpointArtifact",
    "MetaflowDataArtifactReference",
    "ModelArtifact",
    "ModelcacheError",
    "Snapshot",
    "__version__",
    "delete",
    "errors",
    "flush",
    "hf_hub_download",
    "latest",
    "list",
    "load",
    "save",
    "snapshot",
    "snapshot_download",
    "watch",
]


def __getattr__(name: str) -> "Any":
    home = _HOME.get(name)
    if home is None:
        raise AttributeError("module %r has no attribute %r" % (__name__, name))
    from importlib import import_module

    value = import_module("." + (home or name), __name__)
    if home:
        value = getattr(value, name)
    globals()[name] = value
    return value


def __dir__() -> "List[str]":
    return sorted({*globals(), *_HOME})
