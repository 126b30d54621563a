"""Builds the embedded assets from scratch: ``python -m smpo_fast.embedded.build --out DIR``."""
