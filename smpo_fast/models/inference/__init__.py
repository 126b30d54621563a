"""The no-gradient call of a UNet: cached keys and values, compiled blocks, CUDA graphs, float8, reused deep features.

In: a ``Denoiser`` and a chunk of prompts. Out: the prediction function that the inversion calls.
"""
