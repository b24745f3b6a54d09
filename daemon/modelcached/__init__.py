"""The node daemon of modelcache: one disk cache that fetches, checks and keeps files for every task of a host."""

__version__ = "0.1.0"
