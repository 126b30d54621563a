"""The method of the paper: noise schedule, inversion, objectives, preference weights, and the batch they work on.

Imports ``config`` and ``common``. Knows neither networks nor files: a network is passed in as a function.
"""
