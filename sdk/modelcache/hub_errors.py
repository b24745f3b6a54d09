"""Makes our errors also huggingface_hub's of the same name, in a program that uses it.

Code written for huggingface_hub catches huggingface_hub's classes. They cannot be ours (the SDK needs no package), so when
the package is there already, an error is raised as a class that inherits from both.
"""

from __future__ import annotations

import sys
from typing import Any, Dict, Type

from . import errors

# Where the names differ; every other class is looked for under its own.
_THEIR_NAMES = {"TokenRefusedError": "HfHubHTTPError", "HubUnavailableError": "LocalEntryNotFoundError"}
_combined: Dict[Type[errors.ModelcacheError], Type[errors.ModelcacheError]] = {}


def as_theirs(error: errors.ModelcacheError) -> errors.ModelcacheError:
    """The same error, also an instance of huggingface_hub's class of that name if it is imported here."""
    module = sys.modules.get("huggingface_hub.errors") or sys.modules.get("huggingface_hub.utils")  # where older ones have them
    kind = type(error)
    theirs = getattr(module, _THEIR_NAMES.get(kind.__name__, kind.__name__), None)
    if theirs is None or isinstance(error, theirs):
        return error
    if kind not in _combined:
        try:
            _combined[kind] = type(kind.__name__, (kind, theirs), {"__module__": kind.__module__, "__reduce_ex__": _reduce})
        except TypeError:  # a future class of theirs that does not go together with ours
            return error
    # Their constructors want the response of an HTTP request that the daemon made; without one its attributes are None.
    made = _combined[kind].__new__(_combined[kind])
    made.args = error.args
    for name in ("response", "server_message", "request_id", "_request", "repo_id", "repo_type"):
        made.__dict__[name] = None
    made.__dict__["snapshot_path"] = error.data.get("path", "")
    made.__dict__.update(error.__dict__)
    made.__cause__, made.__traceback__ = error.__cause__, error.__traceback__
    return made


def _reduce(error: errors.ModelcacheError, protocol: Any) -> Any:
    """Pickled as our own class: whoever reads it may not have huggingface_hub."""
    ours = next(kind for kind in type(error).__mro__ if kind.__module__ == errors.__name__ and kind not in _combined.values())
    return (ours, (error.message, error.hint, error.data))
