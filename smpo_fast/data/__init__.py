"""Preference pairs on disk: ingest any source, score it, keep it as a pair table, and encode it into a cache.

Imports ``models`` and below. In: a user's files. Out: ``cache.reader.CachedPairs``, which training reads.
"""
