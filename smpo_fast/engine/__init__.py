"""Optimizer, precision, gradient accumulation and sharding behind one protocol, and the checkpoints of their state.

Imports ``config``, ``common`` and the kernels. In: a UNet and gradients. Out: updated weights, and files that any
number of ranks, ZeRO stage or engine can load.
"""
