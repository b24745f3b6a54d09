"""The names that `from metaflow import ...` gives."""

import importlib.util

__mf_extensions__ = "modelcached"

if importlib.util.find_spec("modelcache") is not None:  # a code package may have come without it, for a flow that has no use for it
    from metaflow_extensions.modelcache.client import Checkpoint, artifact_store_from, default_datastore, with_artifact_store
    from modelcache import __version__
    from modelcache.models import delete_model, load_model
    from modelcache.tasks import find_datastore_with

    __all__ = ["Checkpoint", "__version__", "artifact_store_from", "delete_model", "load_model", "with_artifact_store"]

    find_datastore_with(default_datastore)
