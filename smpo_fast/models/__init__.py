"""The networks: locate a diffusers pipeline, load, encode, predict, adapt, export, and count what a call costs.

Imports ``method`` and below, and the Triton kernels. In: ``[model]`` settings. Out: a ``Denoiser`` around a
UNet, encoders, exported folders.
"""
