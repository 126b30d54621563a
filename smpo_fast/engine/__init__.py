"""The optimizer step on any number of devices, and checkpoints: precision, gradient accumulation and sharding.

Imports ``config``, ``common`` and the kernels. In: a UNet and gradients. Out: updated weights, and files that any
number of ranks, ZeRO stage or engine can load.
"""
