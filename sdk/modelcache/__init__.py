"""Models of the Hugging Face Hub from this node's shared cache: a task asks for a repo and gets a path.

    path = modelcache.snapshot_download("org/name")              # huggingface_hub's signature
    file = modelcache.hf_hub_download("org/name", "config.json")
    with modelcache.snapshot("org/name") as path: ...            # the cache may drop it after the block

Nothing is imported before it is used (PEP 562): `import modelcache` costs a bare interpreter well under a millisecond.
"""

__version__ = "0.1.0"

TYPE_CHECKING = False  # typing's own takes milliseconds to import
if TYPE_CHECKING:
    from typing import Any, List

    from . import errors as errors
    from .errors import ModelcacheError as ModelcacheError
    from .hub import Snapshot as Snapshot
    from .hub import hf_hub_download as hf_hub_download
    from .hub import snapshot as snapshot
    from .hub import snapshot_download as snapshot_download

_HOME = {
    "snapshot_download": "hub",
    "hf_hub_download": "hub",
    "snapshot": "hub",
    "Snapshot": "hub",
    "ModelcacheError": "errors",
    "errors": "",  # a module
}

__all__ = ["ModelcacheError", "Snapshot", "__version__", "errors", "hf_hub_download", "snapshot", "snapshot_download"]


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
