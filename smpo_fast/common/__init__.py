"""Machinery that knows nothing of preference training: errors, processes, durable files, shared work, plots.

Imports nothing of the project.
"""
