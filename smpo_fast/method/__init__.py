"""The paper: noise schedule, inversion, objective, preference weights, and the batch of pairs they work on.

Imports ``config`` and ``common``. Knows neither networks nor files: a network comes in as a function.
"""
