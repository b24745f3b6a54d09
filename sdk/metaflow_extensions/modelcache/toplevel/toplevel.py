"""The names that `from metaflow import ...` gives."""

from metaflow_extensions.modelcache.client import Checkpoint, artifact_store_from, default_datastore, with_artifact_store
from modelcache import __version__
from modelcache.models import delete_model, load_model
from modelcache.tasks import find_datastore_with

__mf_extensions__ = "modelcached"
__all__ = ["Checkpoint", "__version__", "artifact_store_from", "delete_model", "load_model", "with_artifact_store"]

find_datastore_with(default_datastore)
