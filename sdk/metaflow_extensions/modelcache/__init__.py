"""Metaflow's way to modelcache: step decorators and top-level names. Everything else is in the package `modelcache`."""
