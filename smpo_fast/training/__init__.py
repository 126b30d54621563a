"""A run: what is checked before it starts, the optimizer step, the loop around it, and what ends it.

Imports everything below it. In: a ``Config``. Out: a run folder with checkpoints, logs and an export.
"""
