"""Metaflow copies the public names of the module named here."""

toplevel = "toplevel"
