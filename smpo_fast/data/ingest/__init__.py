"""Importing: from preference data in any container and layout to one pair table, and pairs of generated images.

In come files, folders, addresses and hub ids; records of a container become candidate pairs by what their columns
mean, images are read and inspected, and ``data.pairs.writer`` stores what is usable. Imports ``common``, ``config``,
``data.pairs``, ``data.images``; ``generate`` also the pipelines of ``models`` and the scorers of ``data.rewards``.
"""
