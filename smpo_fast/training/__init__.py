"""Training: what is checked before a run starts, the optimizer step, the loop around it, and the end of a run.

Imports every package below it. In: a ``Config``. Out: a run folder with checkpoints, logs and an export.
"""
