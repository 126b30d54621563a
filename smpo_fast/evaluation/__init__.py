"""Base against aligned: images from the same prompts and noise, scores with confidence intervals, and one grid.

Imports ``data`` and below. In: a pipeline and an export. Out: a folder with scores and images.
"""
