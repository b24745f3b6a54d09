"""The store tier: objects by key, shared by all nodes. `Store` is the contract, `open_store` gives one for an URL."""

from __future__ import annotations

from .contract import MAX_KEY_BYTES, Object, Store
from .open import check_url, open_store

__all__ = ["MAX_KEY_BYTES", "Object", "Store", "check_url", "open_store"]
