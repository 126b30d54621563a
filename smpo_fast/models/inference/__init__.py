"""No-gradient calls of a UNet, made fast: cached keys and values, compiled blocks, CUDA graphs, float8, deep features.

In: a ``Denoiser`` and the conditioning of a chunk of pairs. Out: the prediction function that the inversion calls.
"""
