"""Builds the embedded assets from nothing: ``python -m smpo_fast.embedded.build --out DIR``."""
