"""The cache of encoded pairs: what training reads instead of images and captions.

``prepare`` turns a pair table into a cache, ``open_cache`` (identity.py) opens the one that serves a run's settings,
``CachedPairs`` (reader.py) gives its latents and prompt embeddings, ``verify`` checks it. The cache knows nothing of
training; it uses the pair table (data.pairs), reward models (data.rewards) and image decoding (data).
"""
