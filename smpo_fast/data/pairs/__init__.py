"""The pair table: its columns, the rules of a usable pair, reading, writing, statistics, and the order of visits.

In come parquet files of preference pairs (images still encoded); out come pairs and rejected rows, and written tables.
Imports ``common``, ``config``, ``method.labels`` and ``data.images``; knows nothing of the cache or of rewards.
"""
